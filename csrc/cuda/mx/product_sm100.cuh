// SPDX-License-Identifier: Apache-2.0
// The kernels of product_sm100.cu, which a test asks on the host as well.
#pragma once

#include "../gemm_sm100.cuh"
#include "product_cutlass.cuh"

namespace lrk {

// A block has 128 rows of A and 128 of B, 128 bytes of each along K at a time. kWide: A in 8 bits.
template <bool kWide>
struct ProductSm100 {
  using Arch = cutlass::arch::Sm100;
  using Scaled = cutlass::arch::OpClassBlockScaledTensorOp;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  template <int kDepth>
  using Tile = cute::Shape<cute::_128, cute::_128, cute::Int<kDepth>>;
  using MainTile = Tile<kWide ? 128 : 256>;
  using A = cute::conditional_t<kWide, Fp8, Fp4>;
  using Schedule = cute::conditional_t<kWide, cutlass::gemm::KernelTmaWarpSpecialized1SmMxf8f6f4Sm100,
                                       cutlass::gemm::KernelTmaWarpSpecialized1SmMxf4Sm100>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, Scaled, MainTile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8,
      Bf16, RowMajor, 8, cutlass::epilogue::TmaWarpSpecialized1Sm, BiasOfColumns>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, Scaled, A, RowMajor, kWide ? 16 : 32, Fp4, ColumnMajor, kWide ? 128 : 32, float, MainTile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      Schedule>::CollectiveOp;
  using Tail = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, cutlass::arch::OpClassTensorOp, Bf16, RowMajor, 8, Bf16, ColumnMajor, 8, float, Tile<64>, Cluster,
      cutlass::gemm::collective::StageCount<Main::DispatchPolicy::Stages>,
      cutlass::gemm::KernelTmaWarpSpecialized1SmSm100>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Segments<Main, Tail>, Epilogue>;
};

}  // namespace lrk
