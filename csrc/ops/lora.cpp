// SPDX-License-Identifier: Apache-2.0
// Glue of the LoRA family: schemas, checks, allocation, dispatch. Math and letters: csrc/lora.h, docs/ops.md.
#include "lora.h"

#include "linear.h"

namespace lrk::ops {
namespace {

// A Factor over A [R, I] (n contiguous) or over B [O, R] read as [R, O] (r contiguous).
struct SmallMatrix {
  Tensor tensor;
  DType dtype;
  int64_t R, N;
  Factor factor;
};
SmallMatrix factor_of_a(const Tensor& a, DType dtype) {
  Tensor t = as_contiguous(a);
  return {t, dtype, t.size(0), t.size(1), Factor{t.const_data_ptr(), t.size(1), 1}};
}
SmallMatrix factor_of_b(const Tensor& b, DType dtype) {
  Tensor t = as_contiguous(b);
  return {t, dtype, t.size(1), t.size(0), Factor{t.const_data_ptr(), 1, t.size(1)}};
}

void check_rank(const char* op, const char* arg, int64_t R) {
  if (R > kMaxRank) fail(op, arg, " must have a rank of at most ", kMaxRank, ", got ", R);
}

struct DropoutArgs {
  Dropout dropout;
  OptTensor seed;  // keeps the memory alive
  const int64_t* seed_ptr = nullptr;
};
DropoutArgs check_dropout(const char* op, double p, const OptTensor& seed, const Tensor& x) {
  DropoutArgs d;
  if (!(p >= 0.0 && p <= 1.0)) fail(op, "dropout_p must lie in [0, 1], got ", p);
  d.dropout = make_dropout(p);
  if (!d.dropout.threshold) return d;
  d.seed_ptr = check_seed(op, seed, x);
  d.seed = seed;
  return d;
}

// ---- one kernel each; `s` is [T, R] contiguous

Tensor shrink(const char* op, const Rows& x, DType x_dtype, const SmallMatrix& u, float scale, const DropoutArgs& d) {
  Tensor s = torch::stable::new_empty(x.tensor, with_last(x.tensor, u.R), u.tensor.scalar_type());
  if (!s.numel()) return s;
  if (!x.N) return torch::stable::zero_(s);
  const LoraShrinkParams p{x.tensor.const_data_ptr(),
                           u.factor,
                           s.mutable_data_ptr(),
                           x.T,
                           x.N,
                           x.pitch,
                           static_cast<int32_t>(u.R),
                           x_dtype,
                           u.dtype,
                           scale,
                           d.dropout,
                           d.seed_ptr};
  run(op, x.tensor, p, lora_shrink_workspace, lora_shrink_cpu, LRK_LAUNCHER(lora_shrink_cuda));
  return s;
}

// What the low-rank product is added to: c * base + bias, each of them optional.
struct Addend {
  OptTensor base, base_scale, bias;
};

// y = c * base + bias + scale * D(S U); y may be base itself.
void expand(const char* op, const Rows& y, DType y_dtype, const Addend& add, const Tensor& s, const SmallMatrix& u,
            float scale, const DropoutArgs& d) {
  const bool in_place = add.base && add.base->const_data_ptr() == y.tensor.const_data_ptr();
  if (!y.T || !y.N || (in_place && !u.R && !add.base_scale)) return;
  const Rows base = add.base ? rows_of(op, "y", *add.base) : Rows{y.tensor, 0, 0, 0};
  const LoraExpandParams p{y.tensor.mutable_data_ptr(),
                           add.base ? base.tensor.const_data_ptr() : nullptr,
                           add.base_scale ? static_cast<const float*>(add.base_scale->const_data_ptr()) : nullptr,
                           add.bias ? add.bias->const_data_ptr() : nullptr,
                           s.const_data_ptr(),
                           u.factor,
                           y.T,
                           y.N,
                           y.pitch,
                           base.pitch,
                           static_cast<int32_t>(u.R),
                           y_dtype,
                           u.dtype,
                           scale,
                           d.dropout,
                           d.seed_ptr};
  run(op, y.tensor, p, lora_expand_workspace, lora_expand_cpu, LRK_LAUNCHER(lora_expand_cuda));
}

void expand_in_place(const char* op, const Rows& y, DType dtype, const Tensor& s, const SmallMatrix& u, float scale,
                     const DropoutArgs& d) {
  expand(op, y, dtype, {y.tensor, std::nullopt, std::nullopt}, s, u, scale, d);
}

// dX = D(dS A), of x's shape.
Tensor shrink_dx(const char* op, const Tensor& x, DType dtype, const Tensor& ds, const SmallMatrix& a, float scale,
                 const DropoutArgs& d) {
  Tensor dx = torch::stable::new_empty(x, sizes_of(x));
  expand(op, rows_of(op, "dx", dx), dtype, {}, ds, a, scale, d);
  return dx;
}

LoraWgradParams wgrad_params(const Rows& x, DType x_dtype, const Tensor& s, int64_t R, const Tensor& g, bool g_is_b,
                             DType dtype, float scale, const DropoutArgs& d) {
  return {s.const_data_ptr(),
          x.tensor.const_data_ptr(),
          g.mutable_data_ptr(),
          g_is_b ? 1 : x.N,
          g_is_b ? R : 1,
          x.T,
          x.N,
          x.pitch,
          static_cast<int32_t>(R),
          x_dtype,
          dtype,
          scale,
          d.dropout,
          d.seed_ptr};
}

// G = scale * S^T D(x), laid out as A [R, I] or as B [O, R].
Tensor wgrad(const char* op, const Rows& x, DType x_dtype, const Tensor& s, const SmallMatrix& like, bool g_is_b,
             float scale, const DropoutArgs& d) {
  Tensor g = torch::stable::new_empty(like.tensor, sizes_of(like.tensor));
  if (!g.numel()) return g;
  if (!x.T) return torch::stable::zero_(g);
  const LoraWgradParams p = wgrad_params(x, x_dtype, s, like.R, g, g_is_b, like.dtype, scale, d);
  run(op, x.tensor, p, lora_wgrad_workspace, lora_wgrad_cpu, LRK_LAUNCHER(lora_wgrad_cuda));
  return g;
}

// dS = scale * dY B and dB = scale_b * dY^T S, in one pass over dY where that moves fewer bytes.
struct ExpandGrads {
  Tensor ds, db;
};
ExpandGrads expand_grads(const char* op, const Rows& dy, DType dy_dtype, const Tensor& s, const SmallMatrix& b,
                         float scale, float scale_b, bool need_ds, bool need_db) {
  const DropoutArgs none;
  const Target target = target_of(op, dy.tensor);
  const bool fused = need_ds && need_db && dy.T && dy.N && b.R &&
                     choose_lora_backward({dy.T, dy.N, static_cast<int32_t>(b.R), dy_dtype}, target).fused;
  if (!fused) {
    return {need_ds ? shrink(op, dy, dy_dtype, b, scale, none) : nothing(),
            need_db ? wgrad(op, dy, dy_dtype, s, b, true, scale_b, none) : nothing()};
  }
  Tensor ds = torch::stable::new_empty(s, with_last(dy.tensor, b.R));
  Tensor db = torch::stable::new_empty(b.tensor, sizes_of(b.tensor));
  LoraShrinkWgradParams p;
  p.shrink = {dy.tensor.const_data_ptr(),
              b.factor,
              ds.mutable_data_ptr(),
              dy.T,
              dy.N,
              dy.pitch,
              static_cast<int32_t>(b.R),
              dy_dtype,
              b.dtype,
              scale,
              Dropout{},
              nullptr};
  p.wgrad = wgrad_params(dy, dy_dtype, s, b.R, db, true, b.dtype, scale_b, none);
  run(op, dy.tensor, p, lora_shrink_wgrad_workspace, lora_shrink_wgrad_cpu, LRK_LAUNCHER(lora_shrink_wgrad_cuda));
  return {ds, db};
}

// dZ = c * dY and dc = sum over T of dY * base.
struct RescaleGrads {
  Tensor dz, dc;
};
RescaleGrads rescale(const char* op, const Rows& dy, DType dtype, const OptTensor& base, const Tensor& c, bool need_dz,
                     bool need_dc) {
  RescaleGrads g{nothing(), nothing()};
  if (need_dz) g.dz = torch::stable::new_empty(dy.tensor, sizes_of(dy.tensor));
  if (need_dc) g.dc = torch::stable::new_empty(c, {dy.N});
  if (!dy.T || !dy.N) {
    if (need_dc) torch::stable::zero_(g.dc);
    return g;
  }
  const Rows base_rows = need_dc ? rows_of(op, "base", *base) : Rows{dy.tensor, 0, 0, 0};
  const LoraRescaleParams p{dy.tensor.const_data_ptr(),
                            need_dc ? base_rows.tensor.const_data_ptr() : nullptr,
                            static_cast<const float*>(c.const_data_ptr()),
                            need_dz ? g.dz.mutable_data_ptr() : nullptr,
                            need_dc ? static_cast<float*>(g.dc.mutable_data_ptr()) : nullptr,
                            dy.T,
                            dy.N,
                            dy.pitch,
                            base_rows.pitch,
                            dtype};
  run(op, dy.tensor, p, lora_rescale_workspace, lora_rescale_cpu, LRK_LAUNCHER(lora_rescale_cuda));
  return g;
}

// c [O], of x's dtype or fp32, as contiguous fp32.
Tensor check_base_scale(const char* op, const Tensor& c, const Tensor& x, int64_t O) {
  check_factor(op, "base_scale", c, x, "x");
  check_shape(op, "base_scale", c, "[O]", {O});
  return as_contiguous(torch::stable::to(c, ScalarType::Float));
}

// ---- ops

SmallMatrix check_a(const char* op, const Tensor& a, const Tensor& x) {
  const DType dtype = check_factor(op, "a", a, x, "x");
  check_shape(op, "a", a, "[R, I]", {-1, x.size(x.dim() - 1)});
  check_rank(op, "a", a.size(0));
  return factor_of_a(a, dtype);
}

SmallMatrix check_b(const char* op, const Tensor& b, int64_t O, int64_t R, const Tensor& x, const char* x_arg) {
  const DType dtype = check_factor(op, "b", b, x, x_arg);
  check_shape(op, "b", b, "[O, R]", {O, R});
  check_rank(op, "b", b.size(1));
  return factor_of_b(b, dtype);
}

// S [..., R] beside the [..., N] tensor it belongs to.
Tensor check_s(const char* op, const char* arg, const Tensor& s, const Tensor& like, const char* like_arg,
               const SmallMatrix& u, const char* u_arg) {
  check_strided(op, arg, s);
  check_device(op, arg, s, like, like_arg);
  check_shape(op, arg, s, "[..., R]", with_last(like, u.R));
  if (s.scalar_type() != u.tensor.scalar_type())
    fail(op, arg, " must be ", name_of(u.tensor.scalar_type()), " (the dtype of ", u_arg, "), got ",
         name_of(s.scalar_type()));
  return as_contiguous(s);
}

Tensor lora_shrink(const Tensor& x, const Tensor& a, double scale, double dropout_p, const OptTensor& seed) {
  constexpr const char* op = "lora_shrink";
  const DType dtype = check_x(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  const SmallMatrix u = check_a(op, a, x);
  return shrink(op, rows, dtype, u, check_finite(op, "scale", scale), check_dropout(op, dropout_p, seed, x));
}

std::tuple<Tensor, Tensor> lora_shrink_bwd(const Tensor& ds, const Tensor& x, const Tensor& a, double scale,
                                           double dropout_p, const OptTensor& seed, bool need_dx, bool need_da) {
  constexpr const char* op = "lora_shrink_bwd";
  const DType dtype = check_x(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  const SmallMatrix u = check_a(op, a, x);
  const Tensor s = check_s(op, "ds", ds, x, "x", u, "a");
  const float k = check_finite(op, "scale", scale);
  const DropoutArgs d = check_dropout(op, dropout_p, seed, x);
  Tensor dx = nothing(), da = nothing();
  if (need_da) da = wgrad(op, rows, dtype, s, u, false, k, d);
  if (need_dx) dx = shrink_dx(op, x, dtype, s, u, k, d);
  return {dx, da};
}

void lora_expand_(Tensor y, const Tensor& s, const Tensor& b, double scale) {
  constexpr const char* op = "lora_expand_";
  const DType dtype = check_x(op, "y", y);
  const Rows rows = rows_of(op, "y", y);
  if (y.numel() && rows.tensor.const_data_ptr() != y.const_data_ptr())
    fail(op, "y must be rows of contiguous elements at one pitch, since it is written in place, got other strides");
  const SmallMatrix u = check_b(op, b, rows.N, -1, y, "y");
  expand_in_place(op, rows, dtype, check_s(op, "s", s, y, "y", u, "b"), u, check_finite(op, "scale", scale), {});
}

Tensor linear_expand(const OptTensor& x, const OptTensor& weight, const OptTensor& bias, const Tensor& s,
                     const Tensor& b, double scale) {
  constexpr const char* op = "linear_expand";
  if (x.has_value() != weight.has_value()) fail(op, "x and weight must come together, got only ", x ? "x" : "weight");
  const Tensor& like = x ? *x : bias ? *bias : s;
  const char* like_arg = x ? "x" : bias ? "bias" : "s";
  const DType dtype = check_x(op, like_arg, like);
  if (s.dim() < 1) fail(op, "s must have at least one dimension, got a scalar");
  const float k = check_finite(op, "scale", scale);
  Tensor y = s;
  SmallMatrix u;
  Addend add;
  if (x) {
    rows_of(op, "x", *x);
    check_base(op, *x, *weight, bias);
    u = check_b(op, b, weight->size(0), -1, *x, "x");
    check_s(op, "s", s, *x, "x", u, "b");
    y = as_contiguous(aten_linear(*x, *weight, bias));
    add.base = y;
  } else {
    if (bias) check_shape(op, "bias", *bias, "[O]", {b.dim() == 2 ? b.size(0) : -1});
    u = check_b(op, b, -1, s.size(s.dim() - 1), like, like_arg);
    check_s(op, "s", s, s, "s", u, "b");
    check_device(op, "s", s, like, like_arg);
    y = torch::stable::new_empty(like, with_last(s, b.size(0)));
    if (bias) add.bias = as_contiguous(*bias);
  }
  expand(op, rows_of(op, "y", y), dtype, add, as_contiguous(s), u, k, {});
  return y;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five linear_expand_bwd(const Tensor& dy, const OptTensor& x, const OptTensor& weight, const Tensor& s, const Tensor& b,
                       double scale, bool need_dx, bool need_dw, bool need_dbias, bool need_ds, bool need_db) {
  constexpr const char* op = "linear_expand_bwd";
  const DType dtype = check_x(op, "dy", dy);
  const Rows rows = rows_of(op, "dy", dy);
  const SmallMatrix u = check_b(op, b, rows.N, -1, dy, "dy");
  const Tensor sc = check_s(op, "s", s, dy, "dy", u, "b");
  const float k = check_finite(op, "scale", scale);
  if (need_dx && !weight) fail(op, "weight is needed for the gradient of x, got None");
  if (need_dw && !x) fail(op, "x is needed for the gradient of weight, got None");
  if (need_dx) check_shape(op, "weight", *weight, "[O, I]", {rows.N, -1});
  const ExpandGrads g = expand_grads(op, rows, dtype, sc, u, k, k, need_ds, need_db);
  return {need_dx ? base_dx(rows, *weight) : nothing(), need_dw ? base_dw(rows, rows_of(op, "x", *x)) : nothing(),
          need_dbias ? base_dbias(rows) : nothing(), g.ds, g.db};
}

// a and b of one dtype, fp32 or that of the activations beside them.
void check_pair(const char* op, const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type())
    fail(op, "b must be ", name_of(a.scalar_type()), " (the dtype of a), got ", name_of(b.scalar_type()));
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

// (y, s, the base product where base_scale asks for it in backward)
Three lora_forward(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& a,
                   const Tensor& b, double scale, double dropout_p, const OptTensor& seed,
                   const OptTensor& base_scale) {
  const DType dtype = check_x(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  check_base(op, x, weight, bias);
  const SmallMatrix ua = check_a(op, a, x), ub = check_b(op, b, weight.size(0), a.size(0), x, "x");
  check_pair(op, a, b);
  const float k = check_finite(op, "scale", scale);
  const DropoutArgs d = check_dropout(op, dropout_p, seed, x);
  if (!base_scale) {
    Tensor y = as_contiguous(aten_linear(x, weight, bias));
    const Tensor s = shrink(op, rows, dtype, ua, k, d);
    expand_in_place(op, rows_of(op, "y", y), dtype, s, ub, 1.f, {});
    return {y, s, nothing()};
  }
  Addend add{std::nullopt, check_base_scale(op, *base_scale, x, weight.size(0)), std::nullopt};
  if (bias) add.bias = as_contiguous(*bias);
  add.base = as_contiguous(aten_linear(x, weight, std::nullopt));
  const Tensor s = shrink(op, rows, dtype, ua, k, d);
  Tensor y = torch::stable::new_empty(x, with_last(x, weight.size(0)));
  expand(op, rows_of(op, "y", y), dtype, add, s, ub, 1.f, {});
  return {y, s, *add.base};
}

Three lora_linear_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& a, const Tensor& b,
                      double scale, double dropout_p, const OptTensor& seed, const OptTensor& base_scale) {
  return lora_forward("lora_linear_fwd", x, weight, bias, a, b, scale, dropout_p, seed, base_scale);
}

Tensor lora_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& a, const Tensor& b,
                   double scale, double dropout_p, const OptTensor& seed, const OptTensor& base_scale) {
  return std::get<0>(lora_forward("lora_linear", x, weight, bias, a, b, scale, dropout_p, seed, base_scale));
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// s is what the forward made: scale * D(x) A^T. dS = scale * dY B, so that dA = dS^T D(x) and dx += D(dS A).
Six lora_linear_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b,
                    const Tensor& s, double scale, double dropout_p, const OptTensor& seed, const OptTensor& base_scale,
                    const OptTensor& base, bool need_dx, bool need_dw, bool need_dbias, bool need_da, bool need_db,
                    bool need_dbase_scale) {
  constexpr const char* op = "lora_linear_bwd";
  const DType dtype = check_x(op, "x", x);
  check_x(op, "dy", dy);
  const Rows dy_rows = rows_of(op, "dy", dy), x_rows = rows_of(op, "x", x);
  check_base(op, x, weight, std::nullopt);
  check_device(op, "dy", dy, x, "x");
  check_dtype(op, "dy", dy, x.scalar_type());
  check_shape(op, "dy", dy, "[..., O]", with_last(x, weight.size(0)));
  const SmallMatrix ua = check_a(op, a, x), ub = check_b(op, b, weight.size(0), a.size(0), x, "x");
  check_pair(op, a, b);
  const Tensor sc = check_s(op, "s", s, x, "x", ua, "a");
  const float k = check_finite(op, "scale", scale);
  const DropoutArgs d = check_dropout(op, dropout_p, seed, x);
  Rows dz = dy_rows;  // the gradient of the base product
  Tensor dc = nothing();
  if (base_scale) {
    if (need_dbase_scale) {
      if (!base) fail(op, "base must be what lora_linear_fwd returned where dbase_scale is needed, got None");
      check_strided(op, "base", *base);
      check_device(op, "base", *base, x, "x");
      check_dtype(op, "base", *base, x.scalar_type());
      check_shape(op, "base", *base, "[..., O]", with_last(x, weight.size(0)));
    }
    const Tensor c = check_base_scale(op, *base_scale, x, weight.size(0));
    const bool need_dz = need_dx || need_dw;
    const RescaleGrads g = rescale(op, dy_rows, dtype, base, c, need_dz, need_dbase_scale);
    if (need_dz) dz = rows_of(op, "dz", g.dz);
    if (need_dbase_scale) dc = torch::stable::to(g.dc, base_scale->scalar_type());
  }
  const ExpandGrads g = expand_grads(op, dy_rows, dtype, sc, ub, k, 1.f, need_dx || need_da, need_db);
  Tensor dx = nothing();
  if (need_dx) {
    dx = base_dx(dz, weight);
    expand_in_place(op, rows_of(op, "dx", dx), dtype, g.ds, ua, 1.f, d);
  }
  return {dx,
          need_dw ? base_dw(dz, x_rows) : nothing(),
          need_dbias ? base_dbias(dy_rows) : nothing(),
          need_da ? wgrad(op, x_rows, dtype, g.ds, ua, false, 1.f, d) : nothing(),
          g.db,
          dc};
}

// ---- beside a base layer of any kind, whose result y is

std::tuple<Tensor, Tensor> add_forward(const char* op, const Tensor& y, const Tensor& x, const Tensor& a,
                                       const Tensor& b, double scale, double dropout_p, const OptTensor& seed) {
  const DType dtype = check_x(op, "x", x), y_dtype = check_x(op, "y", y);
  const Rows rows = rows_of(op, "x", x);
  check_device(op, "y", y, x, "x");
  const SmallMatrix ua = check_a(op, a, x), ub = check_b(op, b, -1, a.size(0), y, "y");
  check_pair(op, a, b);
  check_shape(op, "y", y, "[..., O]", with_last(x, ub.N));
  const Tensor s = shrink(op, rows, dtype, ua, check_finite(op, "scale", scale), check_dropout(op, dropout_p, seed, x));
  Tensor out = torch::stable::new_empty(y, sizes_of(y));
  expand(op, rows_of(op, "y", out), y_dtype, {y, std::nullopt, std::nullopt}, s, ub, 1.f, {});
  return {out, s};
}

std::tuple<Tensor, Tensor> lora_add_fwd(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                        double scale, double dropout_p, const OptTensor& seed) {
  return add_forward("lora_add_fwd", y, x, a, b, scale, dropout_p, seed);
}

Tensor lora_add(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, double scale, double dropout_p,
                const OptTensor& seed) {
  return std::get<0>(add_forward("lora_add", y, x, a, b, scale, dropout_p, seed));
}

// The gradient of y is dy itself.
Three lora_add_bwd(const Tensor& dy, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& s, double scale,
                   double dropout_p, const OptTensor& seed, bool need_dx, bool need_da, bool need_db) {
  constexpr const char* op = "lora_add_bwd";
  const DType dtype = check_x(op, "x", x), dy_dtype = check_x(op, "dy", dy);
  const Rows dy_rows = rows_of(op, "dy", dy), x_rows = rows_of(op, "x", x);
  check_device(op, "dy", dy, x, "x");
  const SmallMatrix ua = check_a(op, a, x), ub = check_b(op, b, dy_rows.N, a.size(0), dy, "dy");
  check_pair(op, a, b);
  const Tensor sc = check_s(op, "s", s, x, "x", ua, "a");
  check_shape(op, "dy", dy, "[..., O]", with_last(x, ub.N));
  const float k = check_finite(op, "scale", scale);
  const DropoutArgs d = check_dropout(op, dropout_p, seed, x);
  const ExpandGrads g = expand_grads(op, dy_rows, dy_dtype, sc, ub, k, 1.f, need_dx || need_da, need_db);
  return {need_dx ? shrink_dx(op, x, dtype, g.ds, ua, 1.f, d) : nothing(),
          need_da ? wgrad(op, x_rows, dtype, g.ds, ua, false, 1.f, d) : nothing(), g.db};
}

}  // namespace
}  // namespace lrk::ops

STABLE_TORCH_LIBRARY_FRAGMENT(LRK_NAMESPACE, m) {
  m.def("lora_shrink(Tensor x, Tensor a, float scale=1.0, float dropout_p=0.0, Tensor? seed=None) -> Tensor");
  m.def(
      "lora_shrink_bwd(Tensor ds, Tensor x, Tensor a, float scale, float dropout_p, Tensor? seed, bool need_dx, "
      "bool need_da) -> (Tensor dx, Tensor da)");
  m.def("lora_expand_(Tensor(a!) y, Tensor s, Tensor b, float scale=1.0) -> ()");
  m.def("linear_expand(Tensor? x, Tensor? weight, Tensor? bias, Tensor s, Tensor b, float scale=1.0) -> Tensor");
  m.def(
      "linear_expand_bwd(Tensor dy, Tensor? x, Tensor? weight, Tensor s, Tensor b, float scale, bool need_dx, "
      "bool need_dw, bool need_dbias, bool need_ds, bool need_db) "
      "-> (Tensor dx, Tensor dw, Tensor dbias, Tensor ds, Tensor db)");
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale=1.0, float dropout_p=0.0, "
      "Tensor? seed=None, Tensor? base_scale=None) -> Tensor");
  m.def(
      "lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale=1.0, "
      "float dropout_p=0.0, Tensor? seed=None, Tensor? base_scale=None) -> (Tensor y, Tensor s, Tensor base)");
  m.def(
      "lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor s, float scale, "
      "float dropout_p, Tensor? seed, Tensor? base_scale, Tensor? base, bool need_dx, bool need_dw, bool need_dbias, "
      "bool need_da, bool need_db, bool need_dbase_scale) "
      "-> (Tensor dx, Tensor dw, Tensor dbias, Tensor da, Tensor db, Tensor dbase_scale)");
  m.def(
      "lora_add(Tensor y, Tensor x, Tensor a, Tensor b, float scale=1.0, float dropout_p=0.0, Tensor? seed=None) "
      "-> Tensor");
  m.def(
      "lora_add_fwd(Tensor y, Tensor x, Tensor a, Tensor b, float scale=1.0, float dropout_p=0.0, "
      "Tensor? seed=None) -> (Tensor out, Tensor s)");
  m.def(
      "lora_add_bwd(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor s, float scale, float dropout_p, Tensor? seed, "
      "bool need_dx, bool need_da, bool need_db) -> (Tensor dx, Tensor da, Tensor db)");
}

// For every backend: the checks refuse what is not a dense cpu or cuda tensor in words of ours.
STABLE_TORCH_LIBRARY_IMPL(LRK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("lora_shrink", TORCH_BOX(&lrk::ops::lora_shrink));
  m.impl("lora_shrink_bwd", TORCH_BOX(&lrk::ops::lora_shrink_bwd));
  m.impl("lora_expand_", TORCH_BOX(&lrk::ops::lora_expand_));
  m.impl("linear_expand", TORCH_BOX(&lrk::ops::linear_expand));
  m.impl("linear_expand_bwd", TORCH_BOX(&lrk::ops::linear_expand_bwd));
  m.impl("lora_linear", TORCH_BOX(&lrk::ops::lora_linear));
  m.impl("lora_linear_fwd", TORCH_BOX(&lrk::ops::lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lrk::ops::lora_linear_bwd));
  m.impl("lora_add", TORCH_BOX(&lrk::ops::lora_add));
  m.impl("lora_add_fwd", TORCH_BOX(&lrk::ops::lora_add_fwd));
  m.impl("lora_add_bwd", TORCH_BOX(&lrk::ops::lora_add_bwd));
}
