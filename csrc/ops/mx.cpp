// SPDX-License-Identifier: Apache-2.0
// Glue of the MX family: schemas, checks, panels of a decoded weight for ATen's products. Math: csrc/mx.h, docs/ops.md.
#include "mx.h"

#include "base.h"

namespace lrk::ops {
namespace {

constexpr const char* kRules[] = {"floor", "rceil", "ceil", "even", "quest", "quest_nearest"};
static_assert(std::size(kRules) == kMxRules);

MxRule rule_of(const char* op, const std::string& name) {
  for (int i = 0; i < kMxRules; ++i)
    if (name == kRules[i]) return static_cast<MxRule>(i);
  fail(op, "rule must be floor, rceil, ceil, even, quest or quest_nearest, got ", name);
}
const int32_t* signs_data(const Arg& x, const OptTensor& signs, bool hadamard) {
  if (!signs) return nullptr;
  const Arg arg{x.op, "signs", *signs};
  if (!hadamard) arg.refuse("be None without hadamard, got a tensor");
  return arg.holds<int32_t>(x).shape("[1]", {1}).data<int32_t>();
}

std::tuple<Tensor, Tensor, Tensor> mx_quantize(const Tensor& x_, const std::string& rule, bool hadamard,
                                               const OptTensor& signs, const OptTensor& seed, double gain, bool mask) {
  const Arg x{"mx_quantize", "x", x_};
  x.floats();
  if (x_.dim() < 1) x.refuse("have at least one dimension, got a scalar");
  const MxRule by = rule_of(x.op, rule);
  const float by_gain = finite(x.op, "gain", gain);
  const int32_t* turned = signs_data(x, signs, hadamard);
  const int64_t* random = seed ? seed_data(seed, x) : nullptr;
  // A matrix is read along any strides, so that one that lies across is quantised without a copy.
  const bool matrix = x_.dim() == 2;
  const std::optional<Rows> rows = matrix ? std::nullopt : std::optional(x.rows());
  const int64_t K = x.last(), T = matrix ? x_.size(0) : rows->T, G = ceil_div(K, int64_t{kMxBlock});
  const Tensor codes = new_empty(x_, with_last(x_, G * kMxBytes), ScalarType::Byte);
  const Tensor scales = new_empty(x_, with_last(x_, G), ScalarType::Byte);
  const Tensor within = mask ? new_empty(x_, with_last(x_, G), ScalarType::Int) : nothing();
  if (scales.numel())
    run(x.op, x_,
        MxQuantizeParams{.x = matrix ? x_.const_data_ptr() : rows->data(),
                         .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
                         .scales = static_cast<uint8_t*>(scales.mutable_data_ptr()),
                         .mask = mask ? static_cast<int32_t*>(within.mutable_data_ptr()) : nullptr,
                         .seed = random,
                         .signs = turned,
                         .T = T,
                         .K = K,
                         .x_row = matrix ? x_.stride(0) : rows->pitch,
                         .x_column = matrix ? x_.stride(1) : 1,
                         .gain = by_gain,
                         .rule = by,
                         .hadamard = hadamard,
                         .dtype = x.dtype()},
        LRK_RUN(mx_quantize));
  return {codes, scales, within};
}

// ---- a packed weight

struct Packed {
  Tensor codes, scales;  // [O, G, 16] and [O, G] of bytes, contiguous
  int64_t O, G;
};
Packed check_packed(const char* op, const Tensor& codes_, const Tensor& scales_, const Arg* like, const char* name,
                    const char* codes_name = "codes", const char* scales_name = "scales") {
  const Arg codes{op, codes_name, codes_}, scales{op, scales_name, scales_};
  codes.strided().is(ScalarType::Byte), scales.strided().is(ScalarType::Byte).on(codes);
  if (like) codes.on(*like);
  if (codes_.dim() < 1 || codes.last() % kMxBytes)
    codes.refuse("have whole blocks of 16 bytes as its last dimension, got ", text_of(sizes_of(codes_)));
  scales.shape(name, with_last(codes_, codes.last() / kMxBytes));
  Packed w{as_contiguous(codes_), as_contiguous(scales_), 1, codes.last() / kMxBytes};
  for (int64_t i = 0; i + 1 < codes_.dim(); ++i) w.O *= codes_.size(i);
  const bool cuda = DeviceScope(op, codes_).target.device == Device::kCUDA;
  if (cuda && reinterpret_cast<uintptr_t>(w.codes.const_data_ptr()) % kMxBytes)
    codes.refuse("begin at a multiple of 16 bytes, where a GPU loads whole blocks, got a view between two");
  return w;
}
void check_columns(const char* op, const char* name, int64_t K, const Packed& w) {
  const int64_t least = w.G ? kMxBlock * (w.G - 1) + 1 : 0, most = kMxBlock * w.G;
  if (K < least || K > most)
    fail(op, name, " must lie in [", least, ", ", most, "], the features of ", w.G, " blocks, got ", K);
}
const uint8_t* bytes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }

// Columns [first, first + n) of rows [row, row + rows) of W into y's rows.
void decode(const char* op, const Packed& w, int64_t row, int64_t rows, int64_t first, int64_t n, const Tensor& y,
            int64_t y_pitch) {
  if (!rows || !n) return;
  run(op, y,
      MxDequantizeParams{.codes = bytes_of(w.codes) + (row * w.G + first / kMxBlock) * kMxBytes,
                         .scales = bytes_of(w.scales) + row * w.G + first / kMxBlock,
                         .y = y.mutable_data_ptr(),
                         .T = rows,
                         .columns = n,
                         .pitch = w.G * kMxBytes,
                         .scale_pitch = w.G,
                         .y_pitch = y_pitch,
                         .dtype = dtype_of(y)},
      LRK_RUN(mx_dequantize));
}

Tensor mx_dequantize(const Tensor& codes, const Tensor& scales, int64_t columns, ScalarType dtype) {
  constexpr const char* op = "mx_dequantize";
  const Packed w = check_packed(op, codes, scales, nullptr, "[..., G]");
  check_columns(op, "columns", columns, w);
  const Tensor y = new_empty(codes, with_last(codes, columns), dtype);
  Arg{op, "dtype", y}.float_type();
  decode(op, w, 0, w.O, 0, columns, y, columns);
  return y;
}

// ---- products

Packed check_weight(const Arg& x, const Tensor& codes, const Tensor& scales) {
  if (codes.dim() != 2) Arg{x.op, "codes", codes}.refuse("have shape [O, 16 G], got ", text_of(sizes_of(codes)));
  return check_packed(x.op, codes, scales, &x, "[O, G]");
}
MxWay way_of(const Arg& x, int64_t T, const Packed& w, int64_t K) {
  return choose_mx_way(T, w.O, K, x.dtype(), DeviceScope(x.op, x.tensor).target);
}

// S B^T beside the product, S [..., R] with its scale in it.
struct LowRank {
  Tensor s, b;  // [T, R] and [O, R], contiguous
  int64_t R;
};

// What ATen's GEMM multiplies in: x's type, or fp32 where that is faster (MxWay::widens).
ScalarType gemm_type(const Arg& x, const MxWay& way) { return way.widens ? ScalarType::Float : x.type(); }
// Factors of its type join W's columns, so that one GEMM makes the sum.
bool joins(const LowRank& low, ScalarType t) {
  return low.R && (t == ScalarType::Float || (low.b.scalar_type() == t && t != ScalarType::Half));
}
// out = alpha a b + add, through fp32 where out has 16 bits and the operands do not.
void product(const char* op, const Tensor& out, const Tensor& a, const Tensor& b, const OptTensor& add,
             double alpha = 1.) {
  if (out.scalar_type() == a.scalar_type()) return gemm(op, out, a, b, add, alpha);
  const Tensor wide = new_empty(a, sizes_of(out));
  gemm(op, wide, a, b, add ? OptTensor(as_type(*add, a.scalar_type())) : std::nullopt, alpha);
  torch::stable::copy_(const_cast<Tensor&>(out), wide);
}

// Rows of x beside S as what a panel [W, B] is multiplied with: x itself where that is all there is.
Tensor joined(const Rows& x, int64_t blocks, const Tensor& s, int64_t R, ScalarType t) {
  const Tensor rows = seen_as(x.tensor, {x.T, x.N}, {x.pitch, 1});
  if (blocks == x.N && !R) return as_type(rows, t);
  Tensor made = new_empty(x.tensor, Sizes{x.T, blocks + R}, t);
  const auto put = [&](int64_t first, const Tensor& t) {
    Tensor part = torch::stable::narrow(made, 1, first, t.size(1));
    torch::stable::copy_(part, t);
  };
  if (blocks != x.N) torch::stable::zero_(made);
  put(0, rows);
  if (R) put(blocks, s);
  return made;
}

Tensor forward(const Arg& x, const Tensor& codes, const Tensor& scales, const OptTensor& bias_, const LowRank& low) {
  const Rows rows = x.floats().rows();
  const Packed w = check_weight(x, codes, scales);
  check_columns(x.op, "the last dimension of x", rows.N, w);
  if (bias_) Arg{x.op, "bias", *bias_}.strided().on(x).typed_as(x).shape("[O]", {w.O});
  OptTensor bias = bias_ ? OptTensor(as_contiguous(*bias_)) : std::nullopt;
  const int64_t T = rows.T, K = rows.N, O = w.O, blocks = w.G * kMxBlock;
  const Tensor y = new_empty(x.tensor, with_last(x.tensor, O));
  if (!T || !O) return y;
  const MxWay way = way_of(x, T, w, K);
  if (way.few) {
    run(x.op, x.tensor,
        MxLinearParams{.w = {bytes_of(w.codes), bytes_of(w.scales), O, K},
                       .x = rows.data(),
                       .y = y.mutable_data_ptr(),
                       .bias = bias ? bias->const_data_ptr() : nullptr,
                       .s = low.R ? low.s.const_data_ptr() : nullptr,
                       .b = low.R ? low.b.const_data_ptr() : nullptr,
                       .T = T,
                       .x_pitch = rows.pitch,
                       .R = static_cast<int32_t>(low.R),
                       .dtype = rows.dtype,
                       .b_dtype = low.R ? dtype_of(low.b) : rows.dtype},
        LRK_RUN(mx_linear));
    return y;
  }
  const ScalarType type = gemm_type(x, way);
  const int64_t R = joins(low, type) ? low.R : 0;
  const Tensor wide = joined(rows, blocks, low.s, R, type);
  Tensor panel = new_empty(x.tensor, Sizes{std::min(way.rows, O), blocks + R}, type), out = seen_as(y, {T, O}, {O, 1});
  for (int64_t o = 0; o < O; o += way.rows) {
    const int64_t n = std::min(way.rows, O - o);
    const auto here = [&](const Tensor& t) { return torch::stable::narrow(const_cast<Tensor&>(t), 0, o, n); };
    decode(x.op, w, o, n, 0, blocks, panel, blocks + R);
    Tensor used = torch::stable::narrow(panel, 0, 0, n);
    if (R) {
      Tensor beside = torch::stable::narrow(used, 1, blocks, R);
      torch::stable::copy_(beside, here(low.b));
    }
    product(x.op, torch::stable::narrow(out, 1, o, n), wide, torch::stable::transpose(used, 0, 1),
            bias ? OptTensor(here(*bias)) : std::nullopt);
  }
  if (low.R && !R)
    run(x.op, x.tensor,
        LoraExpandParams{.y = y.mutable_data_ptr(),
                         .base = y.const_data_ptr(),
                         .base_scale = nullptr,
                         .bias = nullptr,
                         .s = low.s.const_data_ptr(),
                         .u = {.data = low.b.const_data_ptr(), .stride_r = 1, .stride_n = low.R},
                         .T = T,
                         .N = O,
                         .y_pitch = O,
                         .base_pitch = O,
                         .R = static_cast<int32_t>(low.R),
                         .dtype = rows.dtype,
                         .factor_dtype = dtype_of(low.b),
                         .scale = 1.f,
                         .dropout = {},
                         .seed = nullptr},
        LRK_RUN(lora_expand));
  return y;
}

Tensor mx_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const OptTensor& bias) {
  return forward({"mx_linear", "x", x}, codes, scales, bias, LowRank{});
}

Tensor mx_linear_expand(const Tensor& x_, const Tensor& codes, const Tensor& scales, const OptTensor& bias,
                        const Tensor& s_, const Tensor& b_) {
  const Arg x{"mx_linear_expand", "x", x_}, s{x.op, "s", s_}, b{x.op, "b", b_};
  x.floats();
  b.factor_of(x).shape("[O, R]", {codes.dim() ? codes.size(0) : -1, -1});
  const int64_t R = b_.size(1);
  if (R > kMaxRank) b.refuse("have a rank of at most ", kMaxRank, ", got ", R);
  if (x_.dim() < 1) x.refuse("have at least one dimension, got a scalar");
  s.strided().on(x).shape("[..., R]", with_last(x_, R));
  const Tensor rows = seen_as(s.s_beside(b), {s.rows().T, R}, {R, 1});
  return forward(x, codes, scales, bias, LowRank{rows, as_contiguous(b_), R});
}

// dx = dy W, from the same bytes.
std::tuple<Tensor, Tensor> mx_linear_bwd(const Tensor& dy_, const Tensor& codes, const Tensor& scales, int64_t columns,
                                         bool need_dx, bool need_dbias) {
  const Arg dy{"mx_linear (backward)", "dy", dy_};
  const Rows rows = dy.floats().rows();
  const Packed w = check_weight(dy, codes, scales);
  check_columns(dy.op, "columns", columns, w);
  if (rows.N != w.O) dy.refuse("have ", w.O, " features, as codes has rows, got ", rows.N);
  const int64_t T = rows.T, K = columns, O = w.O;
  const Tensor dbias =
      need_dbias ? torch::stable::sum(flat(rows), torch::headeronly::IntHeaderOnlyArrayRef(Sizes{0})) : nothing();
  if (!need_dx) return {nothing(), dbias};
  Tensor dx = new_empty(dy_, with_last(dy_, K));
  if (!T || !K) return {dx, dbias};
  if (!O) return {torch::stable::zero_(dx), dbias};
  const MxWay way = way_of(dy, T, w, K);
  if (way.few_dx) {
    run(dy.op, dy_,
        MxLinearDxParams{.w = {bytes_of(w.codes), bytes_of(w.scales), O, K},
                         .dy = rows.data(),
                         .dx = dx.mutable_data_ptr(),
                         .T = T,
                         .dy_pitch = rows.pitch,
                         .dtype = rows.dtype},
        mx_linear_dx_workspace, mx_linear_dx_cpu,
        static_cast<int (*)(const MxLinearDxParams&, void*, Stream)>(nullptr));
    return {dx, dbias};
  }
  const ScalarType type = gemm_type(dy, way);
  const Tensor d = as_type(seen_as(rows.tensor, {T, O}, {rows.pitch, 1}), type), out = seen_as(dx, {T, K}, {K, 1});
  for (int64_t k = 0; k < K; k += way.columns) {
    const int64_t n = std::min(way.columns, K - k);
    const Tensor panel = new_empty(dy_, Sizes{O, n}, type);
    decode(dy.op, w, 0, O, k, n, panel, n);
    product(dy.op, torch::stable::narrow(const_cast<Tensor&>(out), 1, k, n), d, panel, std::nullopt);
  }
  return {dx, dbias};
}

// ---- both operands packed

// y = alpha A B^T, A decoded whole and B in panels: in fp32, or in bf16 for a GPU's product of bf16, which hold the same values.
Tensor mx_matmul(const Tensor& a_codes, const Tensor& a_scales, const Tensor& b_codes, const Tensor& b_scales,
                 int64_t columns, ScalarType dtype, double alpha) {
  constexpr const char* op = "mx_matmul";
  const Arg like{op, "a_codes", a_codes}, other{op, "b_codes", b_codes};
  const Packed a = check_packed(op, a_codes, a_scales, nullptr, "[..., G]", "a_codes", "a_scales");
  if (b_codes.dim() != 2) other.refuse("have shape [O, 16 G], got ", text_of(sizes_of(b_codes)));
  const Packed b = check_packed(op, b_codes, b_scales, &like, "[O, G]", "b_codes", "b_scales");
  if (a.G != b.G) other.refuse("have ", a.G, " blocks a row, as a_codes has, got ", b.G);
  check_columns(op, "columns", columns, a);
  const double by = finite(op, "alpha", alpha);
  const int64_t T = a.O, O = b.O, K = columns;
  Tensor y = new_empty(a_codes, with_last(a_codes, O), dtype);
  Arg{op, "dtype", y}.float_type();
  if (!T || !O) return y;
  if (!K) return torch::stable::zero_(y);
  const Target target = DeviceScope(op, a_codes).target;
  const bool halves = target.device == Device::kCUDA && dtype == ScalarType::BFloat16;
  const int64_t most = choose_mx_way(T, O, K, DType::kF32, target).rows;
  const Tensor rows = new_empty(a_codes, Sizes{T, K}, halves ? dtype : ScalarType::Float);
  Tensor panel = new_empty(rows, Sizes{std::min(most, O), K}), out = seen_as(y, {T, O}, {O, 1});
  decode(op, a, 0, T, 0, K, rows, K);
  for (int64_t o = 0; o < O; o += most) {
    const int64_t n = std::min(most, O - o);
    decode(op, b, o, n, 0, K, panel, K);
    Tensor used = torch::stable::narrow(panel, 0, 0, n);
    product(op, torch::stable::narrow(out, 1, o, n), rows, torch::stable::transpose(used, 0, 1), std::nullopt, by);
  }
  return y;
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(mx_quantize,
       "(Tensor x, str rule='even', bool hadamard=False, Tensor? signs=None, Tensor? seed=None, float gain=1.0, bool "
       "mask=False) -> (Tensor codes, Tensor scales, Tensor mask)")
LRK_OP(mx_dequantize, "(Tensor codes, Tensor scales, int columns, ScalarType dtype) -> Tensor")
LRK_OP(mx_matmul,
       "(Tensor a_codes, Tensor a_scales, Tensor b_codes, Tensor b_scales, int columns, ScalarType dtype, float "
       "alpha=1.0) -> Tensor")
LRK_OP(mx_linear, "(Tensor x, Tensor codes, Tensor scales, Tensor? bias=None) -> Tensor")
LRK_OP(mx_linear_expand, "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, Tensor s, Tensor b) -> Tensor")
LRK_OP(mx_linear_bwd,
       "(Tensor dy, Tensor codes, Tensor scales, int columns, bool need_dx, bool need_dbias) -> (Tensor dx, Tensor "
       "dbias)")
