// SPDX-License-Identifier: Apache-2.0
// The kernels of product_sm120.cu, which a test asks on the host as well.
#pragma once

#include "../gemm_sm120.cuh"
#include "product_cutlass.cuh"

namespace lrk {

// A block has 128 rows of A and 128 of B, 128 of K at a time. kWide: A in 8 bits.
template <bool kWide>
struct ProductSm120 {
  using Arch = cutlass::arch::Sm120;
  using Scaled = cutlass::arch::OpClassBlockScaledTensorOp;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
  using A = cute::conditional_t<kWide, Fp8, Fp4>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, Scaled, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8,
      Bf16, RowMajor, 8, cutlass::epilogue::collective::EpilogueScheduleAuto, BiasOfColumns>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, Scaled, A, RowMajor, kWide ? 16 : 32, Fp4, ColumnMajor, kWide ? 128 : 32, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, ScaledSegments<Main>, Epilogue>;
};

}  // namespace lrk
