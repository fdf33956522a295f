// SPDX-License-Identifier: Apache-2.0
// Arguments of an op and what is asked of them. An Arg carries the names of op and argument, so that checks chain,
// x.floats().rows(), and refuse in words: `lrkern::op: argument must ..., got ...`.
#pragma once

#include <cmath>
#include <vector>

#include "check.h"

namespace lrk::ops {

using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor& t) {
  Sizes s;
  for (int64_t i = 0; i < t.dim(); ++i) s.push_back(t.size(i));
  return s;
}
// The sizes of t but the last ones, then others.
inline Sizes with_last(const Tensor& t, std::initializer_list<int64_t> others, int64_t drop = 1) {
  Sizes s = sizes_of(t);
  s.resize(s.size() - drop);
  s.insert(s.end(), others);
  return s;
}
inline Sizes with_last(const Tensor& t, int64_t last) { return with_last(t, {last}); }
inline std::string text_of(const Sizes& sizes) {  // -1: any size
  std::ostringstream out;
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "[") << (sizes[i] < 0 ? "*" : std::to_string(sizes[i]));
  out << (sizes.empty() ? "[]" : "]");
  return out.str();
}

// Of S and dS beside factors of a type, see lora.h.
inline ScalarType s_type(ScalarType factor) { return factor == ScalarType::Half ? ScalarType::Float : factor; }
inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.defined() && t.scalar_type() != type ? torch::stable::to(t, type) : t;
}

inline Tensor nothing() { return Tensor(); }  // a gradient nobody asked for: None in Python
// A new tensor like t. torch::stable::new_empty calls it by name, through a stack of boxed values, which costs more than a
// product of few tokens.
inline Tensor new_empty(const Tensor& t, const Sizes& sizes, ScalarType type) {
  int32_t dtype = static_cast<int32_t>(type);
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(t.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                                          &dtype, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}
inline Tensor new_empty(const Tensor& t, const Sizes& sizes) { return new_empty(t, sizes, t.scalar_type()); }
inline Tensor new_like(const Tensor& t) { return new_empty(t, sizes_of(t)); }
inline Tensor new_zeros(const Tensor& t) {
  Tensor made = new_like(t);
  return torch::stable::zero_(made);
}
inline Tensor as_contiguous(const Tensor& t) {  // a call through the dispatcher only where it has something to do
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A tensor [..., N] as T rows of N contiguous elements, `pitch` apart.
struct Rows {
  const char* op;
  Tensor tensor;
  DType dtype;
  int64_t T, N, pitch;

  const void* data() const { return tensor.const_data_ptr(); }
  void* mutable_data() const { return tensor.mutable_data_ptr(); }
};

template <class T>
constexpr ScalarType kTypeOf = ScalarType::Float;
template <>
inline constexpr ScalarType kTypeOf<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kTypeOf<int64_t> = ScalarType::Long;

struct Arg {
  const char *op, *name;
  const Tensor& tensor;

  template <class... Text>
  [[noreturn]] void refuse(const Text&... text) const {
    fail(op, name, " must ", text...);
  }
  ScalarType type() const { return tensor.scalar_type(); }
  DType dtype() const {
    return type() == ScalarType::Half ? DType::kF16 : type() == ScalarType::BFloat16 ? DType::kBF16 : DType::kF32;
  }
  int64_t last() const { return tensor.size(tensor.dim() - 1); }
  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  const Arg& strided() const {
    if (tensor.layout() != torch::headeronly::Layout::Strided) refuse("be a dense strided tensor, got another layout");
    return *this;
  }
  const Arg& float_type() const {
    if (type() != ScalarType::Float && type() != ScalarType::Half && type() != ScalarType::BFloat16)
      refuse("be float32, float16 or bfloat16, got ", name_of(type()));
    return *this;
  }
  const Arg& floats() const { return strided().float_type(); }
  const Arg& is(ScalarType want) const {
    if (type() != want) refuse("be ", name_of(want), ", got ", name_of(type()));
    return *this;
  }
  const Arg& on(const Arg& like) const {
    if (tensor.device() != like.tensor.device())
      refuse("be on the device of ", like.name, " (", device_name(like.tensor), "), got ", device_name(tensor));
    return *this;
  }
  // Letters of the shape beside its sizes: shape("[R, I]", {-1, 4096}).
  const Arg& shape(const char* letters, const Sizes& sizes) const {
    bool ok = tensor.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; ok && i < sizes.size(); ++i) ok = sizes[i] < 0 || tensor.size(i) == sizes[i];
    if (!ok) refuse("have shape ", letters, " = ", text_of(sizes), ", got ", text_of(sizes_of(tensor)));
    return *this;
  }
  const Arg& contiguous() const {
    if (!tensor.is_contiguous()) refuse("be contiguous, got strides");
    return *this;
  }
  // Of the element type of another argument.
  const Arg& typed_as(const Arg& other) const {
    if (type() != other.type())
      refuse("be ", name_of(other.type()), " (the dtype of ", other.name, "), got ", name_of(type()));
    return *this;
  }
  template <class T>
  const Arg& holds(const Arg& like) const {
    return strided().is(kTypeOf<T>).on(like);
  }
  // A factor beside activations x is of their dtype or fp32 (PEFT keeps A and B in fp32 over a 16-bit base).
  const Arg& factor_of(const Arg& x) const {
    strided().on(x).float_type();
    if (x.type() == ScalarType::Float) return typed_as(x);
    if (type() != x.type() && type() != ScalarType::Float)
      refuse("be ", name_of(x.type()), " (the dtype of ", x.name, ") or float32, got ", name_of(type()));
    return *this;
  }
  // Activations [..., N] beside the first parameter they meet, whose sizes are the layer's: where they differ, these are wrong.
  const Arg& features_of(const Arg& parameter, const char* letters, int64_t dim) const {
    if (tensor.dim() < 1) refuse("have at least one dimension, got a scalar");
    if (const int64_t n = parameter.tensor.size(dim); n != last())
      refuse("have ", n, " features (", parameter.name, " is ", letters, " = ", text_of(sizes_of(parameter.tensor)),
             "), got ", last());
    return *this;
  }
  // S or dS as kernels take it beside the factor u (s_dtype in lora.h): of u's dtype, or fp32 beside fp16, where fp16 is
  // widened.
  Tensor s_beside(const Arg& u) const {
    if (u.type() != ScalarType::Half) return as_contiguous(typed_as(u).tensor);
    if (type() != ScalarType::Float && type() != ScalarType::Half)
      refuse("be float32 or float16 (the dtype of ", u.name, "), got ", name_of(type()));
    return as_contiguous(as_type(tensor, ScalarType::Float));
  }

  // Strides that are not those of rows at one pitch are copied once.
  Rows rows() const {
    const Tensor& t = tensor;
    const int64_t d = t.dim();
    if (d < 1) refuse("have at least one dimension, got a scalar");
    const int64_t N = t.size(d - 1);
    int64_t T = 1, pitch = N, span = 0;  // span: the stride one more step of the next outer dimension must have
    bool ok = N <= 1 || t.stride(d - 1) == 1;
    for (int64_t i = d - 2; i >= 0; --i) {
      T *= t.size(i);
      if (!ok || t.size(i) == 1) continue;
      if (!span) {
        pitch = t.stride(i);
        span = pitch * t.size(i);
        ok = pitch >= N;
      } else {
        ok = t.stride(i) == span;
        span *= t.size(i);
      }
    }
    if (T >= int64_t{1} << 32) refuse("have fewer than 2^32 rows, got ", T);
    if (ok || !t.numel()) return {op, t, dtype(), T, N, pitch};
    return {op, as_contiguous(t), dtype(), T, N, N};
  }
  Rows rows_in_place() const {
    const Rows r = rows();
    if (tensor.numel() && r.data() != tensor.const_data_ptr())
      refuse("be rows of contiguous elements at one pitch, since it is written in place, got other strides");
    return r;
  }
};

inline DType dtype_of(const Tensor& t) { return Arg{"", "", t}.dtype(); }  // of a tensor of ours
// An output of ours, as rows.
inline Rows rows_of(const char* op, const Tensor& t) { return Arg{op, "out", t}.rows(); }

inline float finite(const char* op, const char* arg, double v) {
  if (!std::isfinite(v) || !std::isfinite(static_cast<float>(v))) fail(op, arg, " must be finite in float32, got ", v);
  return static_cast<float>(v);
}
inline int64_t in_range(const char* op, const char* arg, int64_t value, int64_t low, int64_t end) {
  if (value < low || value >= end) fail(op, arg, " must lie in [", low, ", ", end, "), got ", value);
  return value;
}
inline const int64_t* seed_data(const OptTensor& seed, const Arg& x) {
  if (!seed) fail(x.op, "seed must be an int64 tensor of shape [1] where dropout_p > 0, got None");
  return Arg{x.op, "seed", *seed}.shape("[1]", {1}).is(ScalarType::Long).on(x).data<int64_t>();
}

}  // namespace lrk::ops
