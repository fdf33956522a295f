// SPDX-License-Identifier: Apache-2.0
// The kernels of gemm_sm100.cu, which a test asks on the host as well.
#pragma once

#include "../gemm_sm100.cuh"
#include "lora/tail.cuh"

namespace lrk {

// y = x W + bias + S' U' with W, and U' beside it, contiguous along K or along N.
template <class T, bool kAlongN>
struct LoraGemmSm100 {
  using Element = cute::conditional_t<cute::is_same_v<T, bf16>, cutlass::bfloat16_t, cutlass::half_t>;
  using RowMajor = cutlass::layout::RowMajor;
  using LayoutW = cute::conditional_t<kAlongN, RowMajor, cutlass::layout::ColumnMajor>;
  using Arch = cutlass::arch::Sm100;
  using Dense = cutlass::arch::OpClassTensorOp;
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Bias = cutlass::epilogue::fusion::LinCombPerColBias<Element, float, Element>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Arch, Dense, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8,
      Element, RowMajor, 8, cutlass::epilogue::TmaWarpSpecialized1Sm, Bias>::CollectiveOp;
  template <class Of, class Stages>
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Arch, Dense, Of, RowMajor, 8, Of, LayoutW, 8, float, Tile, Cluster, Stages,
      cutlass::gemm::KernelTmaWarpSpecialized1SmSm100>::CollectiveOp;
  using Main = Mainloop<Element, cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
                                     sizeof(typename Epilogue::SharedStorage))>>;
  using Tail = Mainloop<cutlass::bfloat16_t, cutlass::gemm::collective::StageCount<Main::DispatchPolicy::Stages>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Segments<Main, Tail>, Epilogue>;

  static typename Kernel::Arguments arguments(const LoraGemmParams& p, const GemmTail& tail) {
    const auto along_k = [](int64_t pitch) { return cute::make_stride(pitch, cute::_1{}, int64_t{0}); };
    const auto of_w = [&](int64_t pitch) {
      if constexpr (kAlongN) return cute::make_stride(cute::_1{}, pitch, int64_t{0});
      if constexpr (!kAlongN) return along_k(pitch);
    };
    const int K = static_cast<int>(p.K);
    typename Kernel::Arguments a{};
    a.problem_shape = {static_cast<int>(p.T), static_cast<int>(p.N), Segments<Main, Tail>::whole(K, tail.columns), 1};
    a.mainloop.main.ptr_A = static_cast<const Element*>(p.x);
    a.mainloop.main.dA = along_k(p.x_pitch);
    a.mainloop.main.ptr_B = static_cast<const Element*>(p.w.data);
    a.mainloop.main.dB = of_w(kAlongN ? p.w.stride_r : p.w.stride_n);
    a.mainloop.tail.ptr_A = reinterpret_cast<const cutlass::bfloat16_t*>(tail.s);
    a.mainloop.tail.dA = along_k(tail.s_pitch);
    a.mainloop.tail.ptr_B = reinterpret_cast<const cutlass::bfloat16_t*>(tail.u);
    a.mainloop.tail.dB = of_w(tail.u_pitch);
    a.mainloop.K = K, a.mainloop.R = tail.columns;
    a.epilogue.thread.alpha = 1.f;
    a.epilogue.thread.bias_ptr = static_cast<const Element*>(p.bias);
    a.epilogue.ptr_D = static_cast<Element*>(p.y);
    a.epilogue.dD = along_k(p.N);
    return a;
  }
  static bool fits(const typename Kernel::Arguments& a) {
    return Kernel::can_implement(a) && !Kernel::get_workspace_size(a);
  }
};

}  // namespace lrk
