// SPDX-License-Identifier: Apache-2.0
// The base product x W^T of a linear layer, as an op is given it: low-rank ops add to whatever product stands here.
#pragma once

#include <array>

#include "tensor.h"

namespace lrk::ops {

// ATen's GEMM by its type: out = alpha a b, plus `add` where it is given ([N] or of out's sizes). Calls by name go through the
// dispatcher's table and a stack of boxed values, which costs as much as a product of few tokens.
inline void addmm(const char* op, const Tensor& out, const Tensor& a, const Tensor& b, const OptTensor& add,
                  double alpha = 1.) {
  auto call = aoti_torch_cpu_addmm_out;
#if !defined(LRK_EMULATE)
  if (!out.is_cpu()) call = aoti_torch_cuda_addmm_out;
#endif
  if (!call) fail(op, "this torch has no addmm for cuda");
  STABLE_TORCH_ERROR_CODE_CHECK(
      call(out.get(), add ? add->get() : out.get(), a.get(), b.get(), add ? 1.0 : 0.0, alpha));
}
// The same where what lies between a's rows does not count. oneDNN's bf16 product on a CPU with AMX reads some of it past each
// row and multiplies it by zero: a NaN there is a NaN of the result (torch 2.13), which F.linear has too.
inline void gemm(const char* op, const Tensor& out, const Tensor& a, const Tensor& b, const OptTensor& add,
                 double alpha = 1.) {
  const bool pitched = a.is_cpu() && a.scalar_type() == ScalarType::BFloat16 && a.stride(1) == 1;
  addmm(op, out, pitched ? as_contiguous(a) : a, b, add, alpha);
}
// Another tensor over the memory of t, from its first element on: the offset given here counts from there.
inline Tensor seen_as(const Tensor& t, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes.data(), strides.data(), 0, &made));
  return Tensor(made);
}

inline Tensor flat(const Rows& t) { return torch::stable::reshape(t.tensor, Sizes{t.T, t.N}); }

struct BaseProduct {
  virtual ~BaseProduct() = default;
  virtual void check_weight(const Arg& x) const = 0;  // refuses what does not fit x [..., I]
  virtual int64_t out_features() const = 0;
  virtual Tensor forward(const Tensor& x, const OptTensor& bias) const = 0;  // x W^T + bias, contiguous
  virtual Tensor dx(const Rows& dy) const = 0;                               // dy W, contiguous
  virtual Tensor dw(const Rows& dy, const Rows& x) const = 0;                // dy^T x
  virtual const Tensor* dense() const { return nullptr; }                    // W [O, I] of x's dtype, where it is one

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
  const Tensor* dense() const override { return &weight; }
  // The bits of F.linear: its own way, which for rows and a bias is one addmm.
  Tensor forward(const Tensor& x, const OptTensor& bias) const override {
    const int64_t dims = x.dim(), O = out_features(), I = weight.size(1);
    if (bias && x.is_cpu() && x.numel() && O && (dims == 2 || (dims == 3 && x.is_contiguous()))) {
      const Tensor y = new_empty(x, with_last(x, O));
      const auto rows = [&](const Tensor& t, int64_t n) {
        return dims == 2 ? t : seen_as(t, {t.numel() / n, n}, {n, 1});
      };
      addmm("linear", rows(y, O), rows(x, I), seen_as(weight, {I, O}, {weight.stride(1), weight.stride(0)}), bias);
      return y;
    }
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
