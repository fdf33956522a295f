// SPDX-License-Identifier: Apache-2.0
// Glue of the throwaway family: csrc/throwaway.h.
#include "throwaway.h"

#include "tensor.h"

namespace lrk::ops {
namespace {

Tensor scaled(const Arg& x, const Arg& gain) {
  x.floats();
  const Rows rows = x.rows();
  gain.holds<float>(x).shape("[N]", {rows.N}).contiguous();
  Tensor y = new_like(x.tensor);
  run(x.op, y,
      ThrowawayParams{.x = rows.data(),
                      .gain = gain.data<float>(),
                      .y = y.mutable_data_ptr(),
                      .T = rows.T,
                      .N = rows.N,
                      .pitch = rows.pitch,
                      .dtype = rows.dtype},
      LRK_RUN(throwaway));
  return y;
}

Tensor throwaway(const Tensor& x, const Tensor& gain) {
  constexpr const char* op = "throwaway";
  return scaled({op, "x", x}, {op, "gain", gain});
}

Tensor throwaway_bwd(const Tensor& dy, const Tensor& gain) {
  constexpr const char* op = "throwaway_bwd";
  return scaled({op, "dy", dy}, {op, "gain", gain});
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(throwaway, "(Tensor x, Tensor gain) -> Tensor")
LRK_OP(throwaway_bwd, "(Tensor dy, Tensor gain) -> Tensor")
