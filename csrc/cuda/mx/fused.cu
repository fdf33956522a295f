// SPDX-License-Identifier: Apache-2.0
// A packed weight's product with the low-rank one inside, by an architecture that has kernels for it.
#include "linear.cuh"

namespace lrk {
namespace {

template <class S, class U, bool kThree>
__global__ void __launch_bounds__(kBlockThreads)
    mx_tail_kernel(TermsOf s, TermsOf b, int R, int columns, bool along_n) {
  write_terms<S, U, kThree>(s, b, R, columns, along_n);
}

}  // namespace

int mx_fused_cuda(const MxLinearParams& p, void* workspace, Stream stream) {
  const MxFused config = choose_mx_fused(shape_of(p), cuda_target());
  if (!config.fits) return kInvalidConfiguration;
  if (config.few) return mx_few_sm90(p, config, workspace, stream);
  return mx_gemm_tiled(p, workspace, gemm_tiles(p.w.O, p.T, config.tile_n, config.cluster), stream);
}

int mx_gemm_tiled(const MxLinearParams& p, void* workspace, const GemmTiles& tiles, Stream stream) {
  GemmTail tail{};
  if (p.s) {
    const auto run = [&]<class S, class U>(S, U, auto three, dim3 grid, const auto&... args) {
      return launch("mx_tail", mx_tail_kernel<S, U, three.value>, grid, dim3(kBlockThreads), 0, stream, args...);
    };
    if (const int error = make_tail(low_rank_of(p), workspace, &tail, run)) return error;
  }
  return mx_gemm_sm90(p, tail, tiles, stream);
}

}  // namespace lrk
