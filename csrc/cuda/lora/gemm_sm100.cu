// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias + S B^T and dx = dy W + dS A on sm_100a by CUTLASS: the tail is [S' U'] of tail.cuh.
#include "../launch.cuh"
#include "gemm_sm100.cuh"

namespace lrk {
namespace {

template <class T, bool kAlongN>
using Kernel = typename LoraGemmSm100<T, kAlongN>::Kernel;
template <class T, bool kAlongN>
using Params = typename Kernel<T, kAlongN>::Params;
template <class T, bool kAlongN>
constexpr int kThreads = Kernel<T, kAlongN>::MaxThreadsPerBlock;

template <class T, bool kAlongN>
__global__ void __launch_bounds__(kThreads<T, kAlongN>, 1)
    lora_gemm_sm100_kernel(const __grid_constant__ Params<T, kAlongN> p) {
  Kernel<T, kAlongN>{}(p, Smem{}.take<char>(Kernel<T, kAlongN>::SharedStorageSize));
}

template <class T, bool kAlongN>
int run(const LoraGemmParams& p, const GemmTail& tail, Stream stream) {
  using Of = Kernel<T, kAlongN>;
  const auto arguments = LoraGemmSm100<T, kAlongN>::arguments(p, tail);
  if (!LoraGemmSm100<T, kAlongN>::fits(arguments)) return kInvalidConfiguration;
  const auto params = Of::to_underlying_arguments(arguments, nullptr);
  return launch("lora_gemm_sm100", lora_gemm_sm100_kernel<T, kAlongN>, Of::get_grid_shape(params),
                Of::get_block_shape(), Of::SharedStorageSize, stream, params);
}

}  // namespace

int lora_gemm_sm100(const LoraGemmParams& p, const GemmTail& tail, Stream stream) {
  return with_bool(p.dtype == DType::kBF16, [&](auto is_bf16) {
    using T = std::conditional_t<decltype(is_bf16)::value, bf16, f16>;
    return with_bool(p.w.stride_n == 1, [&](auto along_n) { return run<T, along_n.value>(p, tail, stream); });
  });
}

}  // namespace lrk
