// SPDX-License-Identifier: Apache-2.0
// The base product x W^T of a linear layer, as an op is given it: low-rank ops add to whatever product stands here.
#pragma once

#include <array>

#include "tensor.h"

namespace lrk::ops {

inline Tensor flat(const Rows& t) { return torch::stable::reshape(t.tensor, Sizes{t.T, t.N}); }

struct BaseProduct {
  virtual ~BaseProduct() = default;
  virtual void check_weight(const Arg& x) const = 0;  // refuses what does not fit x [..., I]
  virtual int64_t out_features() const = 0;
  virtual Tensor forward(const Tensor& x, const OptTensor& bias) const = 0;  // x W^T + bias, contiguous
  virtual Tensor dx(const Rows& dy) const = 0;                               // dy W, contiguous
  virtual Tensor dw(const Rows& dy, const Rows& x) const = 0;                // dy^T x

  void check(const Arg& x, const OptTensor& bias) const {
    check_weight(x);
    if (bias) Arg{x.op, "bias", *bias}.strided().on(x).typed_as(x).shape("[O]", {out_features()});
  }
  Tensor dbias(const Rows& dy) const {
    const Sizes rows{0};
    return torch::stable::sum(flat(dy), torch::headeronly::IntHeaderOnlyArrayRef(rows.data(), 1));
  }
};

// W [O, I] of x's dtype, and ATen's GEMM: cuBLAS, oneDNN, MKL.
struct AtenLinear : BaseProduct {
  const Tensor& weight;

  explicit AtenLinear(const Tensor& w) : weight(w) {}
  void check_weight(const Arg& x) const override {
    const Arg w{x.op, "weight", weight};
    x.features_of(w.strided().on(x).typed_as(x).shape("[O, I]", {-1, -1}), "[O, I]", 1);
  }
  int64_t out_features() const override { return weight.size(0); }
  Tensor forward(const Tensor& x, const OptTensor& bias) const override {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                      torch::stable::detail::from(bias)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return as_contiguous(torch::stable::detail::to<Tensor>(stack[0]));
  }
  Tensor dx(const Rows& dy) const override { return as_contiguous(torch::stable::matmul(dy.tensor, weight)); }
  Tensor dw(const Rows& dy, const Rows& x) const override {
    return torch::stable::matmul(torch::stable::transpose(flat(dy), 0, 1), flat(x));
  }
};

}  // namespace lrk::ops
