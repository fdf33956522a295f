// SPDX-License-Identifier: Apache-2.0
// Glue of the product whose operands both are packed. Math: csrc/mx.h, docs/ops.md.
#include "packed.h"

namespace lrk::ops {
namespace {

// The first K elements of each row, in fp32 or bf16, which hold them exactly: codes times their scales, which are those of ones.
void decode_wide(const char* op, const Packed& a, int64_t K, const Tensor& to) {
  const Tensor ones = new_empty(a.codes, Sizes{a.O, a.G * kMxBytes}, ScalarType::Byte);
  constexpr int kOne = 0x22;
  torch::stable::fill_(const_cast<Tensor&>(ones), kOne);
  Tensor scales = new_empty(to, Sizes{a.O, K});
  decode(op, {ones, a.scales, a.O, a.G}, 0, a.O, 0, K, scales, K);
  const Tensor codes =
      as_type(part(torch::stable::reshape(a.codes, Sizes{a.O, a.G * kMxBlock}), 1, 0, K), to.scalar_type());
  using torch::stable::detail::from;
  torch::stable::copy_(const_cast<Tensor&>(to), called("aten::mul", {from(scales), from(codes)}, "Tensor"));
}

// What lies past the columns would have a part in the units' product.
bool takes_units(const MxProductParams& p, DType dtype, const Tensor& like, int64_t G) {
  bool aligned = true;
  for (const void* operand : {static_cast<const void*>(p.a), static_cast<const void*>(p.b), p.bias, p.s, p.u})
    aligned = aligned && reinterpret_cast<uintptr_t>(operand) % 16 == 0;
  return kCutlass && p.K == G * kMxBlock &&
         takes_fused(
             choose_mx_product({p.T, p.O, p.K, p.R, p.wide, dtype, aligned}, DeviceScope("mx_matmul", like).target));
}

// y = alpha (A B^T + S U^T) + bias: FP4 units where the choice says so, else [A, S] decoded whole and [B, U] in panels, in fp32,
// or in bf16 for a GPU's product of bf16, which hold the same values.
Tensor mx_matmul(const Tensor& a_codes, const Tensor& a_scales, const Tensor& b_codes, const Tensor& b_scales,
                 int64_t columns, ScalarType dtype, double alpha, const OptTensor& bias_, const OptTensor& s_,
                 const OptTensor& u_) {
  constexpr const char* op = "mx_matmul";
  const Arg like{op, "a_codes", a_codes}, other{op, "b_codes", b_codes};
  const bool wide = like.type() == ScalarType::Float8_e4m3fn;
  if (!wide && like.type() != ScalarType::Byte) like.refuse("be uint8 or float8_e4m3fn, got ", name_of(like.type()));
  const Packed a = check_packed(op, a_codes, a_scales, nullptr, "[..., G]", "a_codes", "a_scales", wide);
  if (b_codes.dim() != 2) other.refuse("have shape [O, 16 G], got ", text_of(sizes_of(b_codes)));
  const Packed b = check_packed(op, b_codes, b_scales, &like, "[O, G]", "b_codes", "b_scales");
  if (a.G != b.G) other.refuse("have ", a.G, " blocks a row, as a_codes has, got ", b.G);
  check_columns(op, "columns", columns, a);
  const float by = finite(op, "alpha", alpha);
  const int64_t T = a.O, O = b.O, K = columns;
  Tensor y = new_empty(a_codes, with_last(a_codes, O), dtype);
  Arg{op, "dtype", y}.float_type();
  if (bias_) Arg{op, "bias", *bias_}.strided().is(dtype).on(like).shape("[O]", {O});
  if (s_.has_value() != u_.has_value()) fail(op, "s and u must be given together, got one of them");
  Tensor low_s, low_u;  // [T, R] and [O, R], contiguous
  int64_t R = 0;
  if (s_) {
    const Arg s{op, "s", *s_}, u{op, "u", *u_};
    R = u.strided().is(dtype).on(like).shape("[O, R]", {O, -1}).last();
    if (R > kMaxRank) u.refuse("have a rank of at most ", kMaxRank, ", got ", R);
    s.strided().is(dtype).on(like).shape("[..., R]", with_last(a_codes, R));
    low_s = torch::stable::reshape(as_contiguous(*s_), Sizes{T, R}), low_u = as_contiguous(*u_);
  }
  const OptTensor bias = bias_ ? OptTensor(as_contiguous(*bias_)) : std::nullopt;
  if (!T || !O) return y;
  const auto data = [](const OptTensor& t) { return t && t->defined() ? t->const_data_ptr() : nullptr; };
  const auto bytes = [](const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); };
  const MxProductParams p{.a = bytes(a.codes),
                          .a_scales = bytes(a.scales),
                          .b = bytes(b.codes),
                          .b_scales = bytes(b.scales),
                          .y = y.mutable_data_ptr(),
                          .bias = data(bias),
                          .s = data(low_s),
                          .u = data(low_u),
                          .T = T,
                          .O = O,
                          .K = K,
                          .R = static_cast<int32_t>(R),
                          .wide = wide,
                          .alpha = by};
  if (takes_units(p, dtype_of(y), a_codes, a.G)) {
    run(op, y, p, LRK_RUN_CUDA(mx_product));
    return y;
  }
  const Target target = DeviceScope(op, a_codes).target;
  const bool halves = target.device == Device::kCUDA && dtype == ScalarType::BFloat16;
  const int64_t most = choose_mx_way(T, O, K + R, DType::kF32, target).rows;
  const Tensor rows = new_empty(a_codes, Sizes{T, K + R}, halves ? dtype : ScalarType::Float);
  Tensor panel = new_empty(rows, Sizes{std::min(most, O), K + R}), out = seen_as(y, {T, O}, {O, 1});
  const auto put = [&](const Tensor& t, const Tensor& beside) {
    Tensor to = part(t, 1, K, R);
    if (R) torch::stable::copy_(to, beside);
  };
  if (wide) {
    if (K) decode_wide(op, a, K, part(rows, 1, 0, K));
  } else {
    decode(op, a, 0, T, 0, K, rows, K + R);
  }
  put(rows, low_s);
  for (int64_t o = 0; o < O; o += most) {
    const int64_t n = std::min(most, O - o);
    decode(op, b, o, n, 0, K, panel, K + R);
    Tensor used = part(panel, 0, 0, n);
    put(used, R ? part(low_u, 0, o, n) : low_u);
    product(op, part(out, 1, o, n), rows, torch::stable::transpose(used, 0, 1),
            bias ? OptTensor(part(*bias, 0, o, n)) : std::nullopt, by);
  }
  return y;
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(mx_matmul,
       "(Tensor a_codes, Tensor a_scales, Tensor b_codes, Tensor b_scales, int columns, ScalarType dtype, float "
       "alpha=1.0, Tensor? bias=None, Tensor? s=None, Tensor? u=None) -> Tensor")
