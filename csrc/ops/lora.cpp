// SPDX-License-Identifier: Apache-2.0
// Glue of the LoRA family: schemas, checks, allocation, dispatch. Math and letters: csrc/lora.h, docs/ops.md.
#include "lora.h"

#include "base.h"

namespace lrk::ops {
namespace {

// A [R, I] or B [O, R], checked, as U of lora.h.
struct SmallFactor {
  Tensor tensor;
  DType dtype;
  int32_t R;
  int64_t N;
  Factor factor;
};
SmallFactor checked(const Arg& arg, bool is_a) {
  const Tensor t = as_contiguous(arg.tensor);
  const int64_t rows = t.size(0), cols = t.size(1), R = is_a ? rows : cols;
  if (R > kMaxRank) arg.refuse("have a rank of at most ", kMaxRank, ", got ", R);
  return {t, arg.dtype(), static_cast<int32_t>(R), is_a ? cols : rows,
          Factor{.data = t.const_data_ptr(), .stride_r = is_a ? cols : 1, .stride_n = is_a ? 1 : cols}};
}
SmallFactor factor_a(const Arg& a, const Arg& x) {
  return checked(a.factor_of(x).shape("[R, I]", {-1, x.last()}), true);
}
// The same where nothing else says what x [..., I] should be.
SmallFactor factor_of(const Arg& a, const Arg& x) {
  x.features_of(a.factor_of(x).shape("[R, I]", {-1, -1}), "[R, I]", 1);
  return factor_a(a, x);
}
SmallFactor factor_b(const Arg& b, const Arg& like, int64_t O, int64_t R) {
  return checked(b.factor_of(like).shape("[O, R]", {O, R}), false);
}

// a and b of one dtype, fp32 or that of the activations beside them.
struct Pair {
  SmallFactor a, b;
};
Pair check_pair(const Arg& x, const Tensor& a, const Arg& like, const Tensor& b, int64_t O, bool base = true) {
  const Arg a_arg{x.op, "a", a}, b_arg{x.op, "b", b};
  Pair pair{base ? factor_a(a_arg, x) : factor_of(a_arg, x), factor_b(b_arg, like, O, a.size(0))};
  b_arg.typed_as(a_arg);
  return pair;
}

// S [..., R] of the factor u, beside the [..., N] tensor it belongs to.
Tensor check_s(const Arg& s, const Arg& like, const Arg& u, int64_t R) {
  return s.strided().on(like).shape("[..., R]", with_last(like.tensor, R)).s_beside(u);
}

struct DropoutArgs {
  Dropout dropout;
  const int64_t* seed = nullptr;
};
DropoutArgs check_dropout(const Arg& x, double p, const OptTensor& seed) {
  if (!(p >= 0.0 && p <= 1.0)) fail(x.op, "dropout_p must lie in [0, 1], got ", p);
  const Dropout d = make_dropout(p);
  return {d, d.threshold ? seed_data(seed, x) : nullptr};
}

// ---- one kernel each; `s` is [T, R] contiguous

LoraShrinkParams shrink_params(const Rows& x, const SmallFactor& u, void* s, float scale, const DropoutArgs& d) {
  return {.x = x.data(),
          .u = u.factor,
          .s = s,
          .T = x.T,
          .N = x.N,
          .x_pitch = x.pitch,
          .R = u.R,
          .dtype = x.dtype,
          .factor_dtype = u.dtype,
          .scale = scale,
          .dropout = d.dropout,
          .seed = d.seed};
}

Tensor shrink(const Rows& x, const SmallFactor& u, float scale, const DropoutArgs& d) {
  Tensor s = new_empty(x.tensor, with_last(x.tensor, u.R), s_type(u.tensor.scalar_type()));
  if (!s.numel()) return s;
  if (!x.N) return torch::stable::zero_(s);
  run(x.op, x.tensor, shrink_params(x, u, s.mutable_data_ptr(), scale, d), LRK_RUN(lora_shrink));
  return s;
}

// What the low-rank product is added to: c * base + bias, each of them optional.
struct Addend {
  std::optional<Rows> base = {};
  OptTensor base_scale = {}, bias = {};
};

// y = c * base + bias + scale * D(S U); y may be base itself.
void expand(const Rows& y, const Addend& add, const void* s, const SmallFactor& u, float scale, const DropoutArgs& d) {
  const bool in_place = add.base && add.base->data() == y.data();
  if (!y.T || !y.N || (in_place && !u.R && !add.base_scale)) return;
  const LoraExpandParams p{
      .y = y.mutable_data(),
      .base = add.base ? add.base->data() : nullptr,
      .base_scale = add.base_scale ? static_cast<const float*>(add.base_scale->const_data_ptr()) : nullptr,
      .bias = add.bias ? add.bias->const_data_ptr() : nullptr,
      .s = s,
      .u = u.factor,
      .T = y.T,
      .N = y.N,
      .y_pitch = y.pitch,
      .base_pitch = add.base ? add.base->pitch : 0,
      .R = u.R,
      .dtype = y.dtype,
      .factor_dtype = u.dtype,
      .scale = scale,
      .dropout = d.dropout,
      .seed = d.seed};
  run(y.op, y.tensor, p, LRK_RUN(lora_expand));
}
void expand(const Rows& y, const Addend& add, const Tensor& s, const SmallFactor& u, float scale,
            const DropoutArgs& d) {
  expand(y, add, s.const_data_ptr(), u, scale, d);
}

// dX = D(dS A), of x's shape.
Tensor shrink_dx(const Arg& x, const Tensor& ds, const SmallFactor& a, float scale, const DropoutArgs& d) {
  Tensor dx = new_like(x.tensor);
  expand(rows_of(x.op, dx), {}, ds, a, scale, d);
  return dx;
}

// G has the layout of the factor it is the gradient of.
LoraWgradParams wgrad_params(const Rows& x, const Tensor& s, const SmallFactor& u, const Tensor& g, float scale,
                             const DropoutArgs& d) {
  return {.s = s.const_data_ptr(),
          .x = x.data(),
          .g = g.mutable_data_ptr(),
          .g_stride_r = u.factor.stride_r,
          .g_stride_n = u.factor.stride_n,
          .T = x.T,
          .N = x.N,
          .x_pitch = x.pitch,
          .R = u.R,
          .dtype = x.dtype,
          .factor_dtype = u.dtype,
          .scale = scale,
          .dropout = d.dropout,
          .seed = d.seed};
}

// G = scale * S^T D(x).
Tensor wgrad(const Rows& x, const Tensor& s, const SmallFactor& u, float scale, const DropoutArgs& d) {
  Tensor g = new_like(u.tensor);
  if (!g.numel()) return g;
  if (!x.T) return torch::stable::zero_(g);
  run(x.op, x.tensor, wgrad_params(x, s, u, g, scale, d), LRK_RUN(lora_wgrad));
  return g;
}

// dS = scale * dY B and dB = scale_b * dY^T S, in one pass over dY where that moves fewer bytes.
struct ExpandGrads {
  Tensor ds, db;
};
ExpandGrads expand_grads(const Rows& dy, const Tensor& s, const SmallFactor& b, float scale, float scale_b,
                         bool need_ds, bool need_db) {
  const Target target = DeviceScope(dy.op, dy.tensor).target;
  const bool both = need_ds && need_db && dy.T && dy.N && b.R;
  if (!both || !choose_lora_backward({.T = dy.T, .O = dy.N, .R = b.R, .dtype = dy.dtype}, target).fused) {
    return {need_ds ? shrink(dy, b, scale, {}) : nothing(), need_db ? wgrad(dy, s, b, scale_b, {}) : nothing()};
  }
  Tensor ds = new_empty(s, with_last(dy.tensor, b.R)), db = new_like(b.tensor);
  const LoraShrinkWgradParams p{.shrink = shrink_params(dy, b, ds.mutable_data_ptr(), scale, {}),
                                .wgrad = wgrad_params(dy, s, b, db, scale_b, {})};
  run(dy.op, dy.tensor, p, LRK_RUN(lora_shrink_wgrad));
  return {ds, db};
}

// dZ = c * dY and dc = sum over T of dY * base, which is asked for where base is given.
struct RescaleGrads {
  Tensor dz, dc;
};
RescaleGrads rescale(const Rows& dy, const std::optional<Rows>& base, const Tensor& c, bool need_dz) {
  RescaleGrads g{nothing(), nothing()};
  if (need_dz) g.dz = new_like(dy.tensor);
  if (base) g.dc = new_empty(c, Sizes{dy.N});
  if (!dy.T || !dy.N) {
    if (base) torch::stable::zero_(g.dc);
    return g;
  }
  const LoraRescaleParams p{.dy = dy.data(),
                            .base = base ? base->data() : nullptr,
                            .base_scale = static_cast<const float*>(c.const_data_ptr()),
                            .dz = need_dz ? g.dz.mutable_data_ptr() : nullptr,
                            .dc = base ? static_cast<float*>(g.dc.mutable_data_ptr()) : nullptr,
                            .T = dy.T,
                            .N = dy.N,
                            .dy_pitch = dy.pitch,
                            .base_pitch = base ? base->pitch : 0,
                            .dtype = dy.dtype};
  run(dy.op, dy.tensor, p, LRK_RUN(lora_rescale));
  return g;
}

// c [O], of x's dtype or fp32, as contiguous fp32.
Tensor check_base_scale(const Tensor& c, const Arg& x, int64_t O) {
  Arg{x.op, "base_scale", c}.factor_of(x).shape("[O]", {O});
  return as_contiguous(torch::stable::to(c, ScalarType::Float));
}

// ---- ops

Tensor lora_shrink(const Tensor& x_, const Tensor& a, double scale, double dropout_p, const OptTensor& seed) {
  const Arg x{"lora_shrink", "x", x_};
  const Rows rows = x.floats().rows();
  const SmallFactor u = factor_of({x.op, "a", a}, x);
  const DropoutArgs d = check_dropout(x, dropout_p, seed);
  return shrink(rows, u, finite(x.op, "scale", scale), d);
}

std::tuple<Tensor, Tensor> lora_shrink_bwd(const Tensor& ds, const Tensor& x_, const Tensor& a_, double scale,
                                           double dropout_p, const OptTensor& seed, bool need_dx, bool need_da) {
  const Arg x{"lora_shrink (backward)", "x", x_}, a{x.op, "a", a_};
  const Rows rows = x.floats().rows();
  const SmallFactor u = factor_a(a, x);
  const Tensor s = check_s({x.op, "ds", ds}, x, a, u.R);
  const float k = finite(x.op, "scale", scale);
  const DropoutArgs d = check_dropout(x, dropout_p, seed);
  return {need_dx ? shrink_dx(x, s, u, k, d) : nothing(), need_da ? wgrad(rows, s, u, k, d) : nothing()};
}

void lora_expand_(Tensor y_, const Tensor& s, const Tensor& b_, double scale) {
  const Arg y{"lora_expand_", "y", y_}, b{y.op, "b", b_};
  const Rows rows = y.floats().rows_in_place();
  y.features_of(b.factor_of(y).shape("[O, R]", {-1, -1}), "[O, R]", 0);
  const SmallFactor u = factor_b(b, y, rows.N, -1);
  const float k = finite(y.op, "scale", scale);
  expand(rows, {.base = rows}, check_s({y.op, "s", s}, y, b, u.R), u, k, {});
}

Tensor linear_expand(const OptTensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& s_,
                     const Tensor& b_, double scale) {
  constexpr const char* op = "linear_expand";
  if (x.has_value() != weight.has_value()) fail(op, "x and weight must come together, got only ", x ? "x" : "weight");
  const Arg s{op, "s", s_}, b{op, "b", b_}, like = x ? Arg{op, "x", *x} : bias ? Arg{op, "bias", *bias} : b;
  like.floats();
  if (s_.dim() < 1) s.refuse("have at least one dimension, got a scalar");
  const float k = finite(op, "scale", scale);
  if (x) {
    like.rows();
    const AtenLinear product(*weight);
    product.check(like, bias);
    const SmallFactor u = factor_b(b, like, product.out_features(), -1);
    const Tensor sc = check_s(s, like, b, u.R), y = product.forward(*x, bias);
    const Rows rows = rows_of(op, y);
    expand(rows, {.base = rows}, sc, u, k, {});
    return y;
  }
  if (bias) like.shape("[O]", {b_.dim() == 2 ? b_.size(0) : -1});
  const SmallFactor u = factor_b(b, like, -1, s.last());
  const Tensor sc = check_s(s, s, b, u.R);
  s.on(like);
  Tensor y = new_empty(like.tensor, with_last(s_, u.N));
  expand(rows_of(op, y), {.bias = bias ? OptTensor(as_contiguous(*bias)) : std::nullopt}, sc, u, k, {});
  return y;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five linear_expand_bwd(const Tensor& dy_, const OptTensor& x, const OptTensor& weight, const Tensor& s,
                       const Tensor& b_, double scale, bool need_dx, bool need_dw, bool need_dbias, bool need_ds,
                       bool need_db) {
  const Arg dy{"linear_expand (backward)", "dy", dy_}, b{dy.op, "b", b_};
  const Rows rows = dy.floats().rows();
  const SmallFactor u = factor_b(b, dy, rows.N, -1);
  const Tensor sc = check_s({dy.op, "s", s}, dy, b, u.R);
  const float k = finite(dy.op, "scale", scale);
  if (need_dx && !weight) fail(dy.op, "weight is needed for the gradient of x, got None");
  if (need_dw && !x) fail(dy.op, "x is needed for the gradient of weight, got None");
  if (need_dx) Arg{dy.op, "weight", *weight}.strided().on(dy).typed_as(dy).shape("[O, I]", {rows.N, -1});
  if (need_dw) {
    const Arg given{dy.op, "x", *x};
    given.strided().on(dy).typed_as(dy);
    if (x->dim() < 1) given.refuse("have at least one dimension, got a scalar");
    given.shape("[..., I]", with_last(dy_, given.last()));
  }
  const AtenLinear product(weight ? *weight : dy_);  // dw and dbias do not read it
  const ExpandGrads g = expand_grads(rows, sc, u, k, k, need_ds, need_db);
  return {need_dx ? product.dx(rows) : nothing(), need_dw ? product.dw(rows, Arg{dy.op, "x", *x}.rows()) : nothing(),
          need_dbias ? product.dbias(rows) : nothing(), as_type(g.ds, s.scalar_type()), g.db};
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

// ---- base product and low-rank product in one kernel

// Y = c X W + bias + D(S U), and X W by itself where `base` is given. W is read along N (dx = dz W + ...) or along K.
struct FusedLinear {
  const Rows& x;
  const Tensor* weight;
  bool along_n;
  const SmallFactor& u;
  const DropoutArgs& dropout;
  OptTensor base_scale = {}, bias = {};

  LoraGemmParams params(void* y, void* base, const void* s) const {
    const int64_t pitch = weight->stride(0);
    return {.y = y,
            .base = base,
            .base_scale = base_scale ? static_cast<const float*>(base_scale->const_data_ptr()) : nullptr,
            .bias = bias ? bias->const_data_ptr() : nullptr,
            .x = x.data(),
            .w = {.data = weight->const_data_ptr(), .stride_r = along_n ? pitch : 1, .stride_n = along_n ? 1 : pitch},
            .s = s,
            .u = u.factor,
            .T = x.T,
            .N = weight->size(along_n ? 1 : 0),
            .K = x.N,
            .x_pitch = x.pitch,
            .R = u.R,
            .dtype = x.dtype,
            .factor_dtype = u.dtype,
            .dropout = dropout.dropout,
            .seed = dropout.seed};
  }
  bool taken(bool plain) const {
    if (!weight || !on_cuda(x.op, x.tensor) || weight->stride(1) != 1) return false;
    const Target target = DeviceScope(x.op, x.tensor).target;
    if (target.arch == 100 && !kCutlass) return false;
    return takes_fused(choose_lora_gemm(shape_of(params(nullptr, nullptr, nullptr)), plain, target));
  }
  void run_into(const Tensor& y, const Tensor& base, const Tensor& s) const {
    void* kept = base.defined() ? base.mutable_data_ptr() : nullptr;
    run(x.op, x.tensor, params(y.mutable_data_ptr(), kept, s.const_data_ptr()), LRK_RUN_CUDA(lora_gemm));
  }
};

// Whether an S that nobody keeps fits on the stack: a tensor costs as much as the products of few tokens.
constexpr int64_t kBrief = 2048;
bool is_brief(const Rows& x, const SmallFactor& a) {
  return x.N && x.T * a.R > 0 && x.T * a.R <= kBrief && !on_cuda(x.op, x.tensor);
}
// y = base + scale * D(x) A^T B^T with such an S.
void add_brief(const Rows& y, const Rows& base, const Rows& x, const SmallFactor& a, const SmallFactor& b, float scale,
               const DropoutArgs& d) {
  alignas(64) float s[kBrief];
  run(x.op, x.tensor, shrink_params(x, a, s, scale, d), LRK_RUN(lora_shrink));
  expand(y, {.base = base}, s, b, 1.f, {});
}

// (y, s, the base product where base_scale asks for it in backward)
Three lora_forward(const char* op, const Tensor& x_, const BaseProduct& product, const OptTensor& bias,
                   const Tensor& a_, const Tensor& b_, double scale, double dropout_p, const OptTensor& seed,
                   const OptTensor& base_scale, bool keeps_s) {
  const Arg x{op, "x", x_};
  const Rows rows = x.floats().rows();
  product.check(x, bias);
  const int64_t O = product.out_features();
  const auto [a, b] = check_pair(x, a_, x, b_, O);
  const float k = finite(op, "scale", scale);
  const DropoutArgs d = check_dropout(x, dropout_p, seed);
  const DropoutArgs undropped;
  if (FusedLinear fused{rows, product.dense(), false, b, undropped}; fused.taken(!base_scale)) {
    if (base_scale) fused.base_scale = check_base_scale(*base_scale, x, O);
    if (bias) fused.bias = as_contiguous(*bias);
    const Tensor s = shrink(rows, a, k, d), y = new_empty(x_, with_last(x_, O));
    const Tensor base = base_scale && keeps_s ? new_like(y) : nothing();
    fused.run_into(y, base, s);
    return {y, s, base};
  }
  if (!base_scale && !keeps_s && is_brief(rows, a)) {
    const Tensor y = product.forward(x_, bias);
    const Rows out = rows_of(op, y);
    add_brief(out, out, rows, a, b, k, d);
    return {y, nothing(), nothing()};
  }
  if (!base_scale) {
    const Tensor s = shrink(rows, a, k, d);  // first: x is in L2 then for the GEMM, and the end of y for expand
    const Tensor y = product.forward(x_, bias);
    const Rows out = rows_of(op, y);
    expand(out, {.base = out}, s, b, 1.f, {});
    return {y, s, nothing()};
  }
  const Tensor c = check_base_scale(*base_scale, x, O), s = shrink(rows, a, k, d);
  const Tensor base = product.forward(x_, std::nullopt), y = new_empty(x_, with_last(x_, O));
  expand(rows_of(op, y), {rows_of(op, base), c, bias ? OptTensor(as_contiguous(*bias)) : std::nullopt}, s, b, 1.f, {});
  return {y, s, base};
}

Three lora_linear_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& a, const Tensor& b,
                      double scale, double dropout_p, const OptTensor& seed, const OptTensor& base_scale) {
  return lora_forward("lora_linear", x, AtenLinear(weight), bias, a, b, scale, dropout_p, seed, base_scale, true);
}

Tensor lora_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& a, const Tensor& b,
                   double scale, double dropout_p, const OptTensor& seed, const OptTensor& base_scale) {
  return std::get<0>(
      lora_forward("lora_linear", x, AtenLinear(weight), bias, a, b, scale, dropout_p, seed, base_scale, false));
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// s is what the forward made: scale * D(x) A^T. dS = scale * dY B, so that dA = dS^T D(x) and dx += D(dS A).
Six lora_linear_bwd(const Tensor& dy_, const Tensor& x_, const Tensor& weight, const Tensor& a_, const Tensor& b_,
                    const Tensor& s, double scale, double dropout_p, const OptTensor& seed, const OptTensor& base_scale,
                    const OptTensor& base, bool need_dx, bool need_dw, bool need_dbias, bool need_da, bool need_db,
                    bool need_dbase_scale) {
  constexpr const char* op = "lora_linear (backward)";
  const Arg x{op, "x", x_}, dy{op, "dy", dy_};
  x.floats(), dy.floats();
  const Rows dy_rows = dy.rows(), x_rows = x.rows();
  const AtenLinear product(weight);
  product.check(x, std::nullopt);
  const int64_t O = product.out_features();
  const Sizes y_sizes = with_last(x_, O);
  dy.on(x).typed_as(x).shape("[..., O]", y_sizes);
  const auto [a, b] = check_pair(x, a_, x, b_, O);
  const Tensor sc = check_s({op, "s", s}, x, {op, "a", a_}, a.R);
  const float k = finite(op, "scale", scale);
  const DropoutArgs d = check_dropout(x, dropout_p, seed);
  Rows dz = dy_rows;  // the gradient of the base product
  Tensor dc = nothing(), dx = nothing();
  if (base_scale) {
    std::optional<Rows> base_rows;
    if (need_dbase_scale) {
      if (!base) fail(op, "base, the forward's x W^T, is needed for the gradient of base_scale, got None");
      base_rows = Arg{op, "base", *base}.strided().on(x).typed_as(x).shape("[..., O]", y_sizes).rows();
    }
    const RescaleGrads g = rescale(dy_rows, base_rows, check_base_scale(*base_scale, x, O), need_dx || need_dw);
    if (need_dx || need_dw) dz = rows_of(op, g.dz);
    if (need_dbase_scale) dc = torch::stable::to(g.dc, base_scale->scalar_type());
  }
  const ExpandGrads g = expand_grads(dy_rows, sc, b, k, 1.f, need_dx || need_da, need_db);
  if (const FusedLinear fused{dz, &weight, true, a, d}; need_dx && fused.taken(!d.dropout.threshold)) {
    dx = new_like(x_);
    fused.run_into(dx, nothing(), g.ds);
  } else if (need_dx) {
    dx = product.dx(dz);
    const Rows out = rows_of(op, dx);
    expand(out, {.base = out}, g.ds, a, 1.f, d);
  }
  return {dx,
          need_dw ? product.dw(dz, x_rows) : nothing(),
          need_dbias ? product.dbias(dy_rows) : nothing(),
          need_da ? wgrad(x_rows, g.ds, a, 1.f, d) : nothing(),
          g.db,
          dc};
}

// ---- beside a base layer of any kind, whose result y is

std::tuple<Tensor, Tensor> add_forward(const char* op, const Tensor& y_, const Tensor& x_, const Tensor& a_,
                                       const Tensor& b_, double scale, double dropout_p, const OptTensor& seed,
                                       bool keeps_s) {
  const Arg x{op, "x", x_}, y{op, "y", y_};
  x.floats(), y.floats();
  const Rows rows = x.rows();
  y.on(x);
  const auto [a, b] = check_pair(x, a_, y, b_, -1, false);
  y.shape("[..., O]", with_last(x_, b.N));
  const DropoutArgs d = check_dropout(x, dropout_p, seed);
  const float k = finite(op, "scale", scale);
  const Tensor out = new_like(y_);
  if (!keeps_s && is_brief(rows, a)) {
    add_brief(rows_of(op, out), y.rows(), rows, a, b, k, d);
    return {out, nothing()};
  }
  const Tensor s = shrink(rows, a, k, d);
  expand(rows_of(op, out), {.base = y.rows()}, s, b, 1.f, {});
  return {out, s};
}

std::tuple<Tensor, Tensor> lora_add_fwd(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                        double scale, double dropout_p, const OptTensor& seed) {
  return add_forward("lora_add", y, x, a, b, scale, dropout_p, seed, true);
}

Tensor lora_add(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, double scale, double dropout_p,
                const OptTensor& seed) {
  return std::get<0>(add_forward("lora_add", y, x, a, b, scale, dropout_p, seed, false));
}

// The gradient of y is dy itself.
Three lora_add_bwd(const Tensor& dy_, const Tensor& x_, const Tensor& a_, const Tensor& b_, const Tensor& s,
                   double scale, double dropout_p, const OptTensor& seed, bool need_dx, bool need_da, bool need_db) {
  const Arg x{"lora_add (backward)", "x", x_}, dy{x.op, "dy", dy_};
  x.floats(), dy.floats();
  const Rows dy_rows = dy.rows(), x_rows = x.rows();
  dy.on(x);
  const auto [a, b] = check_pair(x, a_, dy, b_, dy_rows.N);
  const Tensor sc = check_s({x.op, "s", s}, x, {x.op, "a", a_}, a.R);
  dy.shape("[..., O]", with_last(x_, b.N));
  const float k = finite(x.op, "scale", scale);
  const DropoutArgs d = check_dropout(x, dropout_p, seed);
  const ExpandGrads g = expand_grads(dy_rows, sc, b, k, 1.f, need_dx || need_da, need_db);
  return {need_dx ? shrink_dx(x, g.ds, a, 1.f, d) : nothing(), need_da ? wgrad(x_rows, g.ds, a, 1.f, d) : nothing(),
          g.db};
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(lora_shrink, "(Tensor x, Tensor a, float scale=1.0, float dropout_p=0.0, Tensor? seed=None) -> Tensor")
LRK_OP(lora_shrink_bwd,
       "(Tensor ds, Tensor x, Tensor a, float scale, float dropout_p, Tensor? seed, bool need_dx, "
       "bool need_da) -> (Tensor dx, Tensor da)")
LRK_OP(lora_expand_, "(Tensor(a!) y, Tensor s, Tensor b, float scale=1.0) -> ()")
LRK_OP(linear_expand, "(Tensor? x, Tensor? weight, Tensor? bias, Tensor s, Tensor b, float scale=1.0) -> Tensor")
LRK_OP(linear_expand_bwd,
       "(Tensor dy, Tensor? x, Tensor? weight, Tensor s, Tensor b, float scale, bool need_dx, "
       "bool need_dw, bool need_dbias, bool need_ds, bool need_db) "
       "-> (Tensor dx, Tensor dw, Tensor dbias, Tensor ds, Tensor db)")
LRK_OP(lora_linear,
       "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale=1.0, float dropout_p=0.0, "
       "Tensor? seed=None, Tensor? base_scale=None) -> Tensor")
LRK_OP(lora_linear_fwd,
       "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale=1.0, "
       "float dropout_p=0.0, Tensor? seed=None, Tensor? base_scale=None) -> (Tensor y, Tensor s, Tensor base)")
LRK_OP(lora_linear_bwd,
       "(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor s, float scale, "
       "float dropout_p, Tensor? seed, Tensor? base_scale, Tensor? base, bool need_dx, bool need_dw, bool need_dbias, "
       "bool need_da, bool need_db, bool need_dbase_scale) "
       "-> (Tensor dx, Tensor dw, Tensor dbias, Tensor da, Tensor db, Tensor dbase_scale)")
LRK_OP(lora_add,
       "(Tensor y, Tensor x, Tensor a, Tensor b, float scale=1.0, float dropout_p=0.0, Tensor? seed=None) "
       "-> Tensor")
LRK_OP(lora_add_fwd,
       "(Tensor y, Tensor x, Tensor a, Tensor b, float scale=1.0, float dropout_p=0.0, "
       "Tensor? seed=None) -> (Tensor out, Tensor s)")
LRK_OP(lora_add_bwd,
       "(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor s, float scale, float dropout_p, Tensor? seed, "
       "bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)")
