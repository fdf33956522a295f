// SPDX-License-Identifier: Apache-2.0
// Glue of the MX family: schemas, checks, panels of a decoded weight for ATen's products. Math: csrc/mx.h, docs/ops.md.
#include "mx/packed.h"

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

// Of one weight, or where `experts` is given of E.
Packed check_weight(const Arg& x, const Tensor& codes, const Tensor& scales, const OptTensor& experts) {
  if (codes.dim() != (experts ? 3 : 2))
    Arg{x.op, "codes", codes}.refuse("have shape ", experts ? "[E, O, 16 G] beside experts" : "[O, 16 G]", ", got ",
                                     text_of(sizes_of(codes)));
  Packed w = check_packed(x.op, codes, scales, &x, experts ? "[E, O, G]" : "[O, G]");
  if (experts) w.E = codes.size(0), w.O = codes.size(1);
  return w;
}
MxWay way_of(const Arg& x, int64_t T, const Packed& w, int64_t K) {
  return choose_mx_way(T, w.O, K, x.dtype(), DeviceScope(x.op, x.tensor).target);
}

// S B^T beside the product, S [..., R] with its scale in it.
struct LowRank {
  Tensor s, b;  // [T, R] and [O, R], contiguous; of experts [E, O, R]
  int64_t R;
};

// What ATen's GEMM multiplies in: x's type, or fp32 where that is faster (MxWay::widens).
ScalarType gemm_type(const Arg& x, const MxWay& way) { return way.widens ? ScalarType::Float : x.type(); }
// Factors of its type join W's columns, so that one GEMM makes the sum.
bool joins(const LowRank& low, ScalarType t) {
  return low.R && (t == ScalarType::Float || (low.b.scalar_type() == t && t != ScalarType::Half));
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

MxLinearParams linear_params(const Rows& rows, const MxWeight& w, const OptTensor& bias, const LowRank& low,
                             const Tensor& y) {
  return {.w = w,
          .x = rows.data(),
          .y = y.mutable_data_ptr(),
          .bias = bias ? bias->const_data_ptr() : nullptr,
          .s = low.R ? low.s.const_data_ptr() : nullptr,
          .b = low.R ? low.b.const_data_ptr() : nullptr,
          .T = rows.T,
          .x_pitch = rows.pitch,
          .R = static_cast<int32_t>(low.R),
          .dtype = rows.dtype,
          .b_dtype = low.R ? dtype_of(low.b) : rows.dtype};
}

// y [T, O] = rows W^T + bias + S B^T, W one of w's experts.
void multiply(const Arg& x, const Rows& rows, const Packed& w, int64_t expert, const OptTensor& bias,
              const LowRank& low, const Tensor& y) {
  const int64_t T = rows.T, K = rows.N, O = w.O, blocks = w.G * kMxBlock;
  if (on_cuda(x.op, x.tensor)) {
    const MxLinearParams p = linear_params(rows, w.weight(expert, K), bias, low, y);
    if (takes_fused(choose_mx_fused(shape_of(p), DeviceScope(x.op, x.tensor).target)))
      return run(x.op, y, p, LRK_RUN_CUDA(mx_fused));
  }
  const MxWay way = way_of(x, T, w, K);
  if (way.few) return run(x.op, y, linear_params(rows, w.weight(expert, K), bias, low, y), LRK_RUN(mx_linear));
  const ScalarType type = gemm_type(x, way);
  const int64_t R = joins(low, type) ? low.R : 0;
  const Tensor wide = joined(rows, blocks, low.s, R, type);
  const Tensor panel = new_empty(x.tensor, Sizes{std::min(way.rows, O), blocks + R}, type);
  for (int64_t o = 0; o < O; o += way.rows) {
    const int64_t n = std::min(way.rows, O - o);
    decode(x.op, w, expert * O + o, n, 0, blocks, panel, blocks + R);
    Tensor used = part(panel, 0, 0, n);
    if (R) {
      Tensor beside = part(used, 1, blocks, R);
      torch::stable::copy_(beside, part(low.b, 0, o, n));
    }
    product(x.op, part(y, 1, o, n), wide, torch::stable::transpose(used, 0, 1),
            bias ? OptTensor(part(*bias, 0, o, n)) : std::nullopt);
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
}

// ---- experts

// Rows sorted by their expert: the plan of multi-LoRA, with experts for adapters.
struct ByExpert {
  const Arg& x;
  int64_t T, E;
  Tensor plan;  // int32 [length]

  ByExpert(const Arg& x_, int64_t rows, int64_t experts, const Tensor& index_) : x(x_), T(rows), E(experts) {
    const Arg index{x.op, "experts", index_};
    index.holds<int32_t>(x).shape("[...]", with_last(x.tensor, std::initializer_list<int64_t>{}));
    const int64_t most = int64_t{1} << 30;
    if (T > most || E > most) index.refuse("be of at most 2^30 rows and experts, got ", T, " and ", E);
    const Tensor each = as_contiguous(index_);
    const int32_t* data = static_cast<const int32_t*>(each.const_data_ptr());
    if (!on_cuda(x.op, each))
      for (int64_t t = 0; t < T; ++t)
        if (data[t] >= E) index.refuse("lie below ", E, ", as codes has experts, got ", data[t], " in row ", t);
    plan = new_empty(each, Sizes{plan_layout(T, E).length});
    run(x.op, each,
        MultiLoraPlanParams{
            .index = data, .plan = static_cast<int32_t*>(plan.mutable_data_ptr()), .T = T, .K = 1, .A = E},
        LRK_RUN(multi_lora_plan));
  }
  const int32_t* data() const { return static_cast<const int32_t*>(plan.const_data_ptr()); }
  Tensor order() const { return part(plan, 0, 0, T); }
  Tensor sorted(const Tensor& t) const {  // of t [T, n]
    using torch::stable::detail::from;
    return called("aten::index_select", {from(t), from(int64_t{0}), from(order())});
  }
  // to[order] = t [T, n]
  void put(const Tensor& to, const Tensor& t) const {
    using torch::stable::detail::from;
    called("aten::index_copy_",
           {from(to), from(int64_t{0}), from(torch::stable::to(order(), ScalarType::Long)), from(t)});
  }
  // by(expert, first, rows) of each that has rows; on CUDA how many is read back. What no expert makes is filled in in `made`,
  // sorted rows: zeros, and NaN of experts that do not exist.
  template <class By>
  void each(std::initializer_list<Tensor> made, const By& by) const {
    const Tensor begins = torch::stable::to(part(plan, 0, plan_layout(T, E).begin, E + 3),
                                            torch::stable::Device(torch::headeronly::DeviceType::CPU));
    const int32_t* begin = static_cast<const int32_t*>(begins.const_data_ptr());
    for (const Tensor& t : made)
      if (t.defined()) {
        Tensor none = part(t, 0, 0, begin[1]), unknown = part(t, 0, begin[E + 1], T - begin[E + 1]);
        torch::stable::zero_(none);
        torch::stable::fill_(unknown, std::numeric_limits<double>::quiet_NaN());
      }
    for (int64_t e = 0; e < E; ++e)
      if (begin[e + 2] > begin[e + 1]) by(e, begin[e + 1], begin[e + 2] - begin[e + 1]);
  }
};
Tensor of_expert(const Tensor& t, int64_t e) { return torch::stable::select(const_cast<Tensor&>(t), 0, e); }

void multiply_by_expert(const Arg& x, const Rows& rows, const Packed& w, const OptTensor& bias, const LowRank& low,
                        const Tensor& index, const Tensor& y) {
  const ByExpert by(x, rows.T, w.E, index);
  if (!rows.T || !w.O) return;
  if (choose_mx_experts_way(rows.T, w.E, DeviceScope(x.op, x.tensor).target).few) {
    const MxExpertsParams p{linear_params(rows, w.weight(0, rows.N), bias, low, y), by.data(), w.E};
    return run(x.op, y, p, mx_linear_experts_workspace, static_cast<void (*)(const MxExpertsParams&, void*)>(nullptr),
               LRK_IF_CUDA(mx_linear_experts_cuda));
  }
  const Tensor xs = by.sorted(flat(rows)), ss = low.R ? by.sorted(low.s) : nothing(), ys = new_like(y);
  by.each({ys}, [&](int64_t e, int64_t first, int64_t n) {
    const LowRank own = low.R ? LowRank{part(ss, 0, first, n), of_expert(low.b, e), low.R} : low;
    multiply(x, rows_of(x.op, part(xs, 0, first, n)), w, e, bias ? OptTensor(of_expert(*bias, e)) : std::nullopt, own,
             part(ys, 0, first, n));
  });
  by.put(y, ys);
}

Tensor forward(const Arg& x, const Tensor& codes, const Tensor& scales, const OptTensor& bias_, const LowRank& low,
               const OptTensor& experts) {
  const Rows rows = x.floats().rows();
  const Packed w = check_weight(x, codes, scales, experts);
  check_columns(x.op, "the last dimension of x", rows.N, w);
  if (bias_)
    Arg{x.op, "bias", *bias_}.strided().on(x).typed_as(x).shape(experts ? "[E, O]" : "[O]",
                                                                experts ? Sizes{w.E, w.O} : Sizes{w.O});
  const OptTensor bias = bias_ ? OptTensor(as_contiguous(*bias_)) : std::nullopt;
  const Tensor made = new_empty(x.tensor, with_last(x.tensor, w.O)), y = seen_as(made, {rows.T, w.O}, {w.O, 1});
  if (experts) {
    multiply_by_expert(x, rows, w, bias, low, *experts, y);
  } else if (rows.T && w.O) {
    multiply(x, rows, w, 0, bias, low, y);
  }
  return made;
}

Tensor mx_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const OptTensor& bias,
                 const OptTensor& experts) {
  return forward({"mx_linear", "x", x}, codes, scales, bias, LowRank{}, experts);
}

// S and B as the kernels take them.
LowRank check_low_rank(const Arg& x, const Tensor& like, const Tensor& codes, const Tensor& s_, const Tensor& b_,
                       bool experts) {
  const Arg s{x.op, "s", s_}, b{x.op, "b", b_};
  const auto size = [&](int64_t i) { return i < codes.dim() ? codes.size(i) : -1; };
  b.factor_of(x).shape(experts ? "[E, O, R]" : "[O, R]", experts ? Sizes{size(0), size(1), -1} : Sizes{size(0), -1});
  const int64_t R = b.last();
  if (R > kMaxRank) b.refuse("have a rank of at most ", kMaxRank, ", got ", R);
  if (like.dim() < 1) x.refuse("have at least one dimension, got a scalar");
  s.strided().on(x).shape("[..., R]", with_last(like, R));
  return {seen_as(s.s_beside(b), {s.rows().T, R}, {R, 1}), as_contiguous(b_), R};
}

Tensor mx_linear_expand(const Tensor& x_, const Tensor& codes, const Tensor& scales, const OptTensor& bias,
                        const Tensor& s, const Tensor& b, const OptTensor& experts) {
  const Arg x{"mx_linear_expand", "x", x_};
  return forward(x, codes, scales, bias, check_low_rank(x.floats(), x_, codes, s, b, experts.has_value()), experts);
}

// ---- gradients

// dx [T, K] = dy W, from the same bytes.
void multiply_back(const Arg& dy, const Rows& rows, const Packed& w, int64_t expert, const Tensor& dx) {
  const int64_t T = rows.T, K = dx.size(1), O = w.O;
  const MxWay way = way_of(dy, T, w, K);
  if (way.few_dx)
    return run(dy.op, dx,
               MxLinearDxParams{.w = w.weight(expert, K),
                                .dy = rows.data(),
                                .dx = dx.mutable_data_ptr(),
                                .T = T,
                                .dy_pitch = rows.pitch,
                                .dtype = rows.dtype},
               mx_linear_dx_workspace, mx_linear_dx_cpu,
               static_cast<int (*)(const MxLinearDxParams&, void*, Stream)>(nullptr));
  const ScalarType type = gemm_type(dy, way);
  const Tensor d = as_type(seen_as(rows.tensor, {T, O}, {rows.pitch, 1}), type);
  for (int64_t k = 0; k < K; k += way.columns) {
    const int64_t n = std::min(way.columns, K - k);
    const Tensor panel = new_empty(dy.tensor, Sizes{O, n}, type);
    decode(dy.op, w, expert * O, O, k, n, panel, n);
    product(dy.op, part(dx, 1, k, n), d, panel, std::nullopt);
  }
}

Tensor sum_of_rows(const Rows& rows) {
  return torch::stable::sum(flat(rows), torch::headeronly::IntHeaderOnlyArrayRef(Sizes{0}));
}

// What the gradients of both products begin with.
struct Back {
  Rows rows;
  Packed w;
  Tensor dx;
  bool makes_dx;
};
Back check_back(const Arg& dy, const Tensor& codes, const Tensor& scales, int64_t columns, const OptTensor& experts,
                bool need_dx) {
  const Rows rows = dy.floats().rows();
  Back back{rows, check_weight(dy, codes, scales, experts), nothing(), false};
  check_columns(dy.op, "columns", columns, back.w);
  if (rows.N != back.w.O) dy.refuse("have ", back.w.O, " features, as codes has rows, got ", rows.N);
  if (need_dx) back.dx = new_empty(dy.tensor, with_last(dy.tensor, columns));
  back.makes_dx = need_dx && rows.T && columns && rows.N;
  if (need_dx && !back.makes_dx) torch::stable::zero_(back.dx);
  return back;
}
Tensor rows_seen(const Tensor& t, int64_t T, int64_t n) { return seen_as(t, {T, n}, {n, 1}); }

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Rows by expert; dS = dY B and dB = dY^T S where there is a low rank.
Four back_by_expert(const Arg& dy, Back back, const LowRank& low, const Tensor& index, bool need_dbias, bool need_ds,
                    bool need_db) {
  const Rows& rows = back.rows;
  const Packed& w = back.w;
  const ByExpert by(dy, rows.T, w.E, index);
  const auto zeros = [](Tensor t) { return torch::stable::zero_(t); };
  const Tensor dbias = need_dbias ? zeros(new_empty(dy.tensor, Sizes{w.E, w.O})) : nothing();
  const Tensor db = need_db ? new_zeros(low.b) : nothing(), ds = need_ds ? zeros(new_like(low.s)) : nothing();
  if (!rows.T || !w.O) return {back.dx, dbias, ds, db};
  const Tensor dys = by.sorted(flat(rows)), ss = need_db ? by.sorted(low.s) : nothing();
  const Tensor dxs = back.makes_dx ? new_empty(dy.tensor, Sizes{rows.T, back.dx.size(back.dx.dim() - 1)}) : nothing();
  const Tensor dss = need_ds ? new_like(low.s) : nothing();
  by.each({dxs, dss}, [&](int64_t e, int64_t first, int64_t n) {
    const Rows own = rows_of(dy.op, part(dys, 0, first, n));
    if (dxs.defined()) multiply_back(dy, own, w, e, part(dxs, 0, first, n));
    if (need_dbias) {
      Tensor sum = of_expert(dbias, e);
      torch::stable::copy_(sum, sum_of_rows(own));
    }
    if (!low.R) return;
    const Tensor b = of_expert(low.b, e);
    const int32_t R = static_cast<int32_t>(low.R);
    if (need_ds)
      run(dy.op, dys,
          LoraShrinkParams{.x = own.data(),
                           .u = {.data = b.const_data_ptr(), .stride_r = 1, .stride_n = low.R},
                           .s = part(dss, 0, first, n).mutable_data_ptr(),
                           .T = n,
                           .N = w.O,
                           .x_pitch = own.pitch,
                           .R = R,
                           .dtype = own.dtype,
                           .factor_dtype = dtype_of(b),
                           .scale = 1.f,
                           .dropout = {},
                           .seed = nullptr},
          LRK_RUN(lora_shrink));
    if (need_db)
      run(dy.op, dys,
          LoraWgradParams{.s = part(ss, 0, first, n).const_data_ptr(),
                          .x = own.data(),
                          .g = of_expert(db, e).mutable_data_ptr(),
                          .g_stride_r = 1,
                          .g_stride_n = low.R,
                          .T = n,
                          .N = w.O,
                          .x_pitch = own.pitch,
                          .R = R,
                          .dtype = own.dtype,
                          .factor_dtype = dtype_of(b),
                          .scale = 1.f,
                          .dropout = {},
                          .seed = nullptr},
          LRK_RUN(lora_wgrad));
  });
  if (dxs.defined()) by.put(rows_seen(back.dx, rows.T, dxs.size(1)), dxs);
  if (need_ds) by.put(ds, dss);
  return {back.dx, dbias, ds, db};
}

std::tuple<Tensor, Tensor> mx_linear_bwd(const Tensor& dy_, const Tensor& codes, const Tensor& scales, int64_t columns,
                                         bool need_dx, bool need_dbias, const OptTensor& experts) {
  const Arg dy{"mx_linear (backward)", "dy", dy_};
  const Back back = check_back(dy, codes, scales, columns, experts, need_dx);
  if (experts) {
    const auto [dx, dbias, ds, db] = back_by_expert(dy, back, LowRank{}, *experts, need_dbias, false, false);
    return {dx, dbias};
  }
  if (back.makes_dx) multiply_back(dy, back.rows, back.w, 0, rows_seen(back.dx, back.rows.T, columns));
  return {back.dx, need_dbias ? sum_of_rows(back.rows) : nothing()};
}

// Of experts alone: without them the gradients are mx_linear_bwd's and linear_expand_bwd's.
Four mx_linear_expand_bwd(const Tensor& dy_, const Tensor& codes, const Tensor& scales, int64_t columns,
                          const Tensor& s, const Tensor& b, const Tensor& experts, bool need_dx, bool need_dbias,
                          bool need_ds, bool need_db) {
  const Arg dy{"mx_linear_expand (backward)", "dy", dy_};
  const Back back = check_back(dy, codes, scales, columns, experts, need_dx);
  const LowRank low = check_low_rank(dy, dy_, codes, s, b, true);
  const auto [dx, dbias, ds, db] = back_by_expert(dy, back, low, experts, need_dbias, need_ds, need_db);
  if (!need_ds) return {dx, dbias, ds, db};
  return {dx, dbias, as_type(torch::stable::reshape(ds, sizes_of(s)), s.scalar_type()), db};
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(mx_quantize,
       "(Tensor x, str rule='even', bool hadamard=False, Tensor? signs=None, Tensor? seed=None, float gain=1.0, bool "
       "mask=False) -> (Tensor codes, Tensor scales, Tensor mask)")
LRK_OP(mx_dequantize, "(Tensor codes, Tensor scales, int columns, ScalarType dtype) -> Tensor")
LRK_OP(mx_linear, "(Tensor x, Tensor codes, Tensor scales, Tensor? bias=None, Tensor? experts=None) -> Tensor")
LRK_OP(mx_linear_expand,
       "(Tensor x, Tensor codes, Tensor scales, Tensor? bias, Tensor s, Tensor b, Tensor? experts=None) -> Tensor")
LRK_OP(mx_linear_bwd,
       "(Tensor dy, Tensor codes, Tensor scales, int columns, bool need_dx, bool need_dbias, Tensor? experts=None) -> "
       "(Tensor dx, Tensor dbias)")
LRK_OP(mx_linear_expand_bwd,
       "(Tensor dy, Tensor codes, Tensor scales, int columns, Tensor s, Tensor b, Tensor experts, bool need_dx, bool "
       "need_dbias, bool need_ds, bool need_db) -> (Tensor dx, Tensor dbias, Tensor ds, Tensor db)")
