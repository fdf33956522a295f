// SPDX-License-Identifier: Apache-2.0
// Products of two packed operands on the FP4 units of sm_120a (block-scaled mma.sync), by CUTLASS.
#include "product_sm120.cuh"

namespace lrk {
namespace {

template <bool kWide>
using Kernel = typename ProductSm120<kWide>::Kernel;
template <bool kWide>
using Params = typename Kernel<kWide>::Params;
template <bool kWide>
constexpr int kThreads = Kernel<kWide>::MaxThreadsPerBlock;

template <bool kWide>
__global__ void __launch_bounds__(kThreads<kWide>, 1) mx_product_sm120_kernel(const __grid_constant__ Params<kWide> p) {
  Kernel<kWide>{}(p, Smem{}.take<char>(Kernel<kWide>::SharedStorageSize));
}

template <bool kWide>
int run(const MxProductParams& p, const SwizzledScales& scales, Stream stream) {
  const auto arguments = product_arguments<Kernel<kWide>>(p, scales);
  if (!product_fits<Kernel<kWide>>(arguments)) return kInvalidConfiguration;
  const auto params = Kernel<kWide>::to_underlying_arguments(arguments, nullptr);
  return launch("mx_product_sm120", mx_product_sm120_kernel<kWide>, Kernel<kWide>::get_grid_shape(params),
                Kernel<kWide>::get_block_shape(), Kernel<kWide>::SharedStorageSize, stream, params);
}

}  // namespace

int mx_product_sm120(const MxProductParams& p, const SwizzledScales& scales, Stream stream) {
  return with_bool(p.wide, [&](auto wide) { return run<wide.value>(p, scales, stream); });
}

}  // namespace lrk
