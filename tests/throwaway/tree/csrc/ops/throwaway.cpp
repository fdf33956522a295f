// SPDX-License-Identifier: Apache-2.0
// Glue of the throwaway family: csrc/throwaway.h.
#include "throwaway.h"

#include "tensor.h"

namespace lrk::ops {
namespace {

Tensor scaled(const Arg& x, const Tensor& gain_) {
  const Arg gain{x.op, "gain", gain_};
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

Tensor throwaway(const Tensor& x, const Tensor& gain) { return scaled({"throwaway", "x", x}, gain); }

Tensor throwaway_bwd(const Tensor& dy, const Tensor& gain) { return scaled({"throwaway_bwd", "dy", dy}, gain); }

}  // namespace
}  // namespace lrk::ops

LRK_OP(throwaway, "(Tensor x, Tensor gain) -> Tensor")
LRK_OP(throwaway_bwd, "(Tensor dy, Tensor gain) -> Tensor")
