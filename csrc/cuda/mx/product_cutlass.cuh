// SPDX-License-Identifier: Apache-2.0
// What CUTLASS is told of a product of two packed operands, on sm_100a and sm_120a alike. T is its M, O its N.
#pragma once

#include "product.cuh"

namespace lrk {

using Fp4 = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
using Fp8 = cutlass::mx_float8_t<cutlass::float_e4m3_t>;
using Bf16 = cutlass::bfloat16_t;
using cutlass::layout::ColumnMajor, cutlass::layout::RowMajor;
using BiasOfColumns = cutlass::epilogue::fusion::LinCombPerColBias<Bf16, float, Bf16>;  // alpha sum + bias, in fp32

template <class Kernel>
typename Kernel::Arguments product_arguments(const MxProductParams& p, const SwizzledScales& scales) {
  using Mainloop = typename Kernel::CollectiveMainloop;
  using Config = typename Mainloop::Sm1xxBlkScaledConfig;
  const int T = static_cast<int>(p.T), O = static_cast<int>(p.O), K = static_cast<int>(p.K);
  const auto pitch = [](int64_t elements) { return cute::make_stride(elements, cute::_1{}, int64_t{0}); };
  const auto scale = [](const uint8_t* bytes) { return reinterpret_cast<const cutlass::float_ue8m0_t*>(bytes); };
  const auto shape = cute::make_shape(T, O, K, 1);
  typename Kernel::Arguments a{};
  a.problem_shape = {T, O, Mainloop::whole(K, p.R), 1};
  a.mainloop.main.ptr_A = reinterpret_cast<typename Mainloop::ElementA const*>(p.a);
  a.mainloop.main.ptr_B = reinterpret_cast<typename Mainloop::ElementB const*>(p.b);
  a.mainloop.main.dA = a.mainloop.main.dB = pitch(p.K);
  a.mainloop.main.ptr_SFA = scale(scales.a);
  a.mainloop.main.ptr_SFB = scale(scales.b);
  a.mainloop.main.layout_SFA = Config::tile_atom_to_shape_SFA(shape);
  a.mainloop.main.layout_SFB = Config::tile_atom_to_shape_SFB(shape);
  a.mainloop.tail.ptr_A = static_cast<const Bf16*>(p.s);
  a.mainloop.tail.ptr_B = static_cast<const Bf16*>(p.u);
  a.mainloop.tail.dA = a.mainloop.tail.dB = pitch(p.R);
  a.mainloop.K = K, a.mainloop.R = p.R;
  a.epilogue.thread.alpha = p.alpha;
  a.epilogue.thread.bias_ptr = static_cast<const Bf16*>(p.bias);
  a.epilogue.ptr_D = static_cast<Bf16*>(p.y);
  a.epilogue.dD = pitch(p.O);
  return a;
}
template <class Kernel>
bool product_fits(const typename Kernel::Arguments& a) {
  return Kernel::can_implement(a) && !Kernel::get_workspace_size(a);
}

}  // namespace lrk
