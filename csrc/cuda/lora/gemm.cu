// SPDX-License-Identifier: Apache-2.0
// Base product and low-rank product in one GEMM, by an architecture that has a kernel for it.
#include "lora/tail.cuh"

namespace lrk {
namespace {

template <class S, class U, bool kThree>
__global__ void __launch_bounds__(kBlockThreads)
    lora_terms_kernel(TermsOf s, TermsOf u, int R, int columns, bool along_n) {
  write_terms<S, U, kThree>(s, u, R, columns, along_n);
}

}  // namespace

int lora_tail(const LoraGemmParams& p, void* workspace, Stream stream, GemmTail* tail) {
  return make_tail(low_rank_of(p), workspace, tail,
                   [&]<class S, class U>(S, U, auto three, dim3 grid, const auto&... args) {
                     return launch("lora_terms", lora_terms_kernel<S, U, three.value>, grid, dim3(kBlockThreads), 0,
                                   stream, args...);
                   });
}

int lora_gemm_cuda(const LoraGemmParams& p, void* workspace, Stream stream) {
  const Target target = cuda_target();
  const GemmConfig config = choose_lora_gemm(shape_of(p), is_plain(p), target);
  if (!config.fits) return kInvalidConfiguration;
  GemmTail tail{};
  if (p.R) {
    if (const int error = lora_tail(p, workspace, stream, &tail)) return error;
  }
  if (target.arch == 100) {
#if defined(LRK_CUTLASS)
    return lora_gemm_sm100(p, tail, stream);
#else
    return kInvalidConfiguration;
#endif
  }
  return lora_gemm_sm90(p, tail, gemm_tiles(p.T, p.N, config.tile_n, config.cluster), stream);
}

}  // namespace lrk
