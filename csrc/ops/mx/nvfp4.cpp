// SPDX-License-Identifier: Apache-2.0
// Glue of the NVFP4 codec. Format: csrc/mx.h, docs/ops.md.
#include "mx.h"
#include "ops/tensor.h"

namespace lrk::ops {
namespace {

// The least and the largest element, float32 [1] each; NaN where there is one.
std::pair<Tensor, Tensor> ends_of(const Tensor& x) {
  if (!x.numel()) {
    Tensor none = new_empty(x, Sizes{1}, ScalarType::Float);
    torch::stable::zero_(none);
    return {none, none};
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(std::optional<int64_t>()),
                                    torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::aminmax", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor least = torch::stable::detail::to<Tensor>(stack[0]), most = torch::stable::detail::to<Tensor>(stack[1]);
  return {as_type(least, ScalarType::Float), as_type(most, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor> nvfp4_quantize(const Tensor& x_, const OptTensor& amax, const OptTensor& seed) {
  const Arg x{"nvfp4_quantize", "x", x_};
  x.floats();
  if (x_.dim() < 1) x.refuse("have at least one dimension, got a scalar");
  if (amax) Arg{x.op, "amax", *amax}.holds<float>(x).shape("[1]", {1});
  const int64_t* random = seed ? seed_data(seed, x) : nullptr;
  // A matrix is read along any strides, so that one that lies across is quantised without a copy.
  const bool matrix = x_.dim() == 2;
  const Rows rows = matrix ? Rows{x.op, x_, x.dtype(), x_.size(0), x.last(), x_.stride(0)} : x.rows();
  const int64_t G = ceil_div(rows.N, int64_t{kNvBlock});
  const auto [least, most] = amax ? std::pair(*amax, *amax) : ends_of(x_);
  const Tensor codes = new_empty(x_, with_last(x_, G * kNvBytes), ScalarType::Byte);
  const Tensor scales = new_empty(x_, with_last(x_, G), ScalarType::Byte);
  const Tensor global = new_empty(x_, Sizes{1}, ScalarType::Float);
  // Where there is no block, of no element, so that the scale of the whole is written all the same.
  run(x.op, x_,
      Nvfp4QuantizeParams{.x = rows.data(),
                          .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
                          .scales = static_cast<uint8_t*>(scales.mutable_data_ptr()),
                          .global = static_cast<float*>(global.mutable_data_ptr()),
                          .least = static_cast<const float*>(least.const_data_ptr()),
                          .most = static_cast<const float*>(most.const_data_ptr()),
                          .seed = random,
                          .T = rows.T,
                          .K = rows.N,
                          .x_row = rows.pitch,
                          .x_column = matrix ? x_.stride(1) : 1,
                          .dtype = rows.dtype},
      LRK_RUN(nvfp4_quantize));
  return {codes, scales, global};
}

Tensor nvfp4_dequantize(const Tensor& codes_, const Tensor& scales_, const Tensor& global_, int64_t columns,
                        ScalarType dtype) {
  constexpr const char* op = "nvfp4_dequantize";
  const Arg codes{op, "codes", codes_}, scales{op, "scales", scales_}, global{op, "global_scale", global_};
  codes.strided().is(ScalarType::Byte), scales.strided().is(ScalarType::Byte).on(codes);
  if (codes_.dim() < 1 || codes.last() % kNvBytes)
    codes.refuse("have whole blocks of 8 bytes as its last dimension, got ", text_of(sizes_of(codes_)));
  const int64_t G = codes.last() / kNvBytes, least = G ? kNvBlock * (G - 1) + 1 : 0;
  scales.shape("[..., G]", with_last(codes_, G));
  global.holds<float>(codes).shape("[1]", {1});
  if (columns < least || columns > kNvBlock * G)
    fail(op, "columns must lie in [", least, ", ", kNvBlock * G, "], the elements of ", G, " blocks, got ", columns);
  const Tensor y = new_empty(codes_, with_last(codes_, columns), dtype);
  Arg{op, "dtype", y}.float_type();
  if (!y.numel()) return y;
  const Tensor packed = as_contiguous(codes_), by = as_contiguous(scales_);
  if (on_cuda(op, codes_) && reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 4)
    codes.refuse("begin at a multiple of 4 bytes, where a GPU loads words, got a view between two");
  run(op, y,
      Nvfp4DequantizeParams{.codes = static_cast<const uint8_t*>(packed.const_data_ptr()),
                            .scales = static_cast<const uint8_t*>(by.const_data_ptr()),
                            .global = static_cast<const float*>(global_.const_data_ptr()),
                            .y = y.mutable_data_ptr(),
                            .T = y.numel() / columns,
                            .K = columns,
                            .dtype = dtype_of(y)},
      LRK_RUN(nvfp4_dequantize));
  return y;
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(nvfp4_quantize,
       "(Tensor x, Tensor? amax=None, Tensor? seed=None) -> (Tensor codes, Tensor scales, Tensor global_scale)")
LRK_OP(nvfp4_dequantize, "(Tensor codes, Tensor scales, Tensor global_scale, int columns, ScalarType dtype) -> Tensor")
