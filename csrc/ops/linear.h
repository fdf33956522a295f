// SPDX-License-Identifier: Apache-2.0
// What the low-rank families' glue shares: checks of activations and factors, and the base GEMM, which is ATen's (cuBLAS,
// oneDNN, MKL), with its gradients.
#pragma once

#include "check.h"

namespace lrk::ops {

using Sizes = std::vector<int64_t>;

inline DType check_x(const char* op, const char* arg, const Tensor& x) {
  check_strided(op, arg, x);
  return float_dtype(op, arg, x);
}

// A factor is of the activations' dtype or fp32 (PEFT keeps A and B in fp32 over a 16-bit base).
inline DType check_factor(const char* op, const char* arg, const Tensor& f, const Tensor& x, const char* x_arg) {
  check_strided(op, arg, f);
  check_device(op, arg, f, x, x_arg);
  const DType dtype = float_dtype(op, arg, f);
  if (f.scalar_type() != x.scalar_type() && dtype != DType::kF32)
    fail(op, arg, " must be ", name_of(x.scalar_type()), " (the dtype of ", x_arg, ") or float32, got ",
         name_of(f.scalar_type()));
  return dtype;
}
inline const int64_t* check_seed(const char* op, const OptTensor& seed, const Tensor& x) {
  if (!seed) fail(op, "seed must be an int64 tensor of shape [1] where dropout_p > 0, got None");
  check_shape(op, "seed", *seed, "[1]", {1});
  check_dtype(op, "seed", *seed, ScalarType::Long);
  check_device(op, "seed", *seed, x, "x");
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

inline Sizes sizes_of(const Tensor& t) {
  Sizes s;
  for (int64_t i = 0; i < t.dim(); ++i) s.push_back(t.size(i));
  return s;
}
inline Sizes with_last(const Tensor& t, int64_t last) {
  Sizes s = sizes_of(t);
  s.back() = last;
  return s;
}
inline Tensor nothing() { return Tensor(); }  // a gradient nobody asked for: None in Python

// The base GEMM is ATen's: cuBLAS, oneDNN, MKL.
inline Tensor aten_linear(const Tensor& x, const Tensor& w, const OptTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// ---- base GEMM and its gradients

inline void check_base(const char* op, const Tensor& x, const Tensor& w, const OptTensor& bias) {
  check_strided(op, "weight", w);
  check_device(op, "weight", w, x, "x");
  check_dtype(op, "weight", w, x.scalar_type());
  check_shape(op, "weight", w, "[O, I]", {-1, x.size(x.dim() - 1)});
  if (!bias) return;
  check_strided(op, "bias", *bias);
  check_device(op, "bias", *bias, x, "x");
  check_dtype(op, "bias", *bias, x.scalar_type());
  check_shape(op, "bias", *bias, "[O]", {w.size(0)});
}

inline Tensor flat(const Rows& t) { return torch::stable::reshape(t.tensor, Sizes{t.T, t.N}); }
inline Tensor base_dx(const Rows& dy, const Tensor& w) { return as_contiguous(torch::stable::matmul(dy.tensor, w)); }
inline Tensor base_dw(const Rows& dy, const Rows& x) {
  return torch::stable::matmul(torch::stable::transpose(flat(dy), 0, 1), flat(x));
}
inline Tensor base_dbias(const Rows& dy) {
  const Sizes rows{0};
  return torch::stable::sum(flat(dy), torch::headeronly::IntHeaderOnlyArrayRef(rows.data(), 1));
}

}  // namespace lrk::ops
