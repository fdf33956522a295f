// SPDX-License-Identifier: Apache-2.0
// Products of two packed operands on the FP4 units of sm_100a (tcgen05, block-scaled), by CUTLASS.
#include "product_sm100.cuh"

namespace lrk {
namespace {

template <bool kWide, class Kernel = typename ProductSm100<kWide>::Kernel>
__global__ __launch_bounds__(Kernel::MaxThreadsPerBlock) void mx_product_sm100_kernel(
    const __grid_constant__ typename Kernel::Params p) {
  Kernel{}(p, Smem{}.take<char>(Kernel::SharedStorageSize));
}

template <bool kWide>
int run(const MxProductParams& p, const SwizzledScales& scales, Stream stream) {
  using Kernel = typename ProductSm100<kWide>::Kernel;
  const auto arguments = product_arguments<Kernel>(p, scales);
  if (!product_fits<Kernel>(arguments)) return cudaErrorInvalidValue;
  const auto params = Kernel::to_underlying_arguments(arguments, nullptr);
  return launch("mx_product_sm100", mx_product_sm100_kernel<kWide>, Kernel::get_grid_shape(params),
                Kernel::get_block_shape(), Kernel::SharedStorageSize, stream, params);
}

}  // namespace

int mx_product_sm100(const MxProductParams& p, const SwizzledScales& scales, Stream stream) {
  return with_bool(p.wide, [&](auto wide) { return run<wide.value>(p, scales, stream); });
}

}  // namespace lrk
