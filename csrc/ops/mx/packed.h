// SPDX-License-Identifier: Apache-2.0
// A packed operand as an op is given it, its elements, and products of them.
#pragma once

#include "mx.h"
#include "ops/base.h"

namespace lrk::ops {

struct Packed {
  Tensor codes, scales;  // [O, G, 16] and [O, G] of bytes, contiguous
  int64_t O, G, E = 1;   // experts, each of which has O rows
  bool wide = false;     // MXFP8: codes float8_e4m3fn [O, G, 32]

  const uint8_t* codes_from(int64_t row) const {
    return static_cast<const uint8_t*>(codes.const_data_ptr()) + row * G * kMxBytes;
  }
  const uint8_t* scales_from(int64_t row) const {
    return static_cast<const uint8_t*>(scales.const_data_ptr()) + row * G;
  }
  MxWeight weight(int64_t expert, int64_t K) const { return {codes_from(expert * O), scales_from(expert * O), O, K}; }
};
inline Packed check_packed(const char* op, const Tensor& codes_, const Tensor& scales_, const Arg* like,
                           const char* name, const char* codes_name = "codes", const char* scales_name = "scales",
                           bool wide = false) {
  const Arg codes{op, codes_name, codes_}, scales{op, scales_name, scales_};
  const int64_t block = wide ? kMxBlock : kMxBytes;
  codes.strided().is(wide ? ScalarType::Float8_e4m3fn : ScalarType::Byte);
  scales.strided().is(ScalarType::Byte).on(codes);
  if (like) codes.on(*like);
  if (codes_.dim() < 1 || codes.last() % block)
    codes.refuse("have whole blocks of ", block, " bytes as its last dimension, got ", text_of(sizes_of(codes_)));
  scales.shape(name, with_last(codes_, codes.last() / block));
  Packed w{as_contiguous(codes_), as_contiguous(scales_), 1, codes.last() / block, 1, wide};
  for (int64_t i = 0; i + 1 < codes_.dim(); ++i) w.O *= codes_.size(i);
  const bool cuda = DeviceScope(op, codes_).target.device == Device::kCUDA;
  if (cuda && reinterpret_cast<uintptr_t>(w.codes.const_data_ptr()) % kMxBytes)
    codes.refuse("begin at a multiple of 16 bytes, where a GPU loads whole blocks, got a view between two");
  return w;
}
inline void check_columns(const char* op, const char* name, int64_t K, const Packed& w) {
  const int64_t least = w.G ? kMxBlock * (w.G - 1) + 1 : 0, most = kMxBlock * w.G;
  if (K < least || K > most)
    fail(op, name, " must lie in [", least, ", ", most, "], the features of ", w.G, " blocks, got ", K);
}
// Columns [first, first + n) of rows [row, row + rows) of W into y's rows.
inline void decode(const char* op, const Packed& w, int64_t row, int64_t rows, int64_t first, int64_t n,
                   const Tensor& y, int64_t y_pitch) {
  if (!rows || !n) return;
  run(op, y,
      MxDequantizeParams{.codes = w.codes_from(row) + first / kMxBlock * kMxBytes,
                         .scales = w.scales_from(row) + first / kMxBlock,
                         .y = y.mutable_data_ptr(),
                         .T = rows,
                         .columns = n,
                         .pitch = w.G * kMxBytes,
                         .scale_pitch = w.G,
                         .y_pitch = y_pitch,
                         .dtype = dtype_of(y)},
      LRK_RUN(mx_dequantize));
}

inline Tensor part(const Tensor& t, int64_t dim, int64_t first, int64_t n) {
  return torch::stable::narrow(const_cast<Tensor&>(t), dim, first, n);
}

// out = alpha a b + add, through fp32 where out has 16 bits and the operands do not.
inline void product(const char* op, const Tensor& out, const Tensor& a, const Tensor& b, const OptTensor& add,
                    double alpha = 1.) {
  if (out.scalar_type() == a.scalar_type()) return gemm(op, out, a, b, add, alpha);
  const Tensor wide = new_empty(a, sizes_of(out));
  gemm(op, wide, a, b, add ? OptTensor(as_type(*add, a.scalar_type())) : std::nullopt, alpha);
  torch::stable::copy_(const_cast<Tensor&>(out), wide);
}

inline Tensor called(const char* name, std::initializer_list<StableIValue> args, const char* overload = "") {
  std::vector<StableIValue> stack(args);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace lrk::ops
