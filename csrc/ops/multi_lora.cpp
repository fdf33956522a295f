// SPDX-License-Identifier: Apache-2.0
// Glue of multi-LoRA: schemas, checks, allocation, dispatch. Math and letters: csrc/multi_lora.h, docs/ops.md.
#include "multi_lora.h"

#include "linear.h"

namespace lrk::ops {
namespace {

const int32_t* int32_data(const char* op, const char* arg, const Tensor& t, const Tensor& like, const char* like_arg) {
  check_strided(op, arg, t);
  check_dtype(op, arg, t, ScalarType::Int);
  check_device(op, arg, t, like, like_arg);
  if (!t.is_contiguous()) fail(op, arg, " must be contiguous, got strides");
  return static_cast<const int32_t*>(t.const_data_ptr());
}
const float* float_data(const char* op, const char* arg, const Tensor& t, const Tensor& like, const char* like_arg) {
  check_strided(op, arg, t);
  check_dtype(op, arg, t, ScalarType::Float);
  check_device(op, arg, t, like, like_arg);
  if (!t.is_contiguous()) fail(op, arg, " must be contiguous, got strides");
  return static_cast<const float*>(t.const_data_ptr());
}

// A pool [P, N] in whole pages.
DType check_pool(const char* op, const char* arg, const Tensor& pool, int64_t N, const Tensor& x, const char* x_arg) {
  const DType dtype = check_factor(op, arg, pool, x, x_arg);
  check_shape(op, arg, pool, "[P, N]", {-1, N});
  if (pool.size(0) % kPageRanks) fail(op, arg, " must hold whole pages of 16 rows, got ", pool.size(0), " rows");
  if (!pool.is_contiguous()) fail(op, arg, " must be contiguous, got strides");
  return dtype;
}

// What the CPU kernels rely on. On CUDA nobody looks: there a row whose adapter or page does not exist comes out as NaN.
void check_plan(const char* op, const Adapters& d) {
  const PlanLayout at = plan_layout(d.T, d.A);
  for (int64_t k = 0; k < d.K; ++k) {
    const int32_t *order = d.plan + k * at.length, *begin = order + at.begin, *tiles = order + at.tiles;
    bool ok = begin[0] == 0 && begin[d.A + 1] == d.T && begin[d.A + 2] == d.T;
    for (int64_t t = 0; ok && t < d.T; ++t) ok = order[t] >= 0 && order[t] < d.T;
    for (int64_t g = 0; ok && g <= d.A; ++g) ok = begin[g] <= begin[g + 1];
    for (int64_t i = 0; ok && i < at.G && tiles[2 * i + 1] != d.T; ++i) {
      const int32_t group = tiles[2 * i], start = tiles[2 * i + 1];
      ok = group >= 0 && group <= d.A && start >= begin[group] && start < begin[group + 1];
    }
    if (!ok)
      fail(op, "plan must be what multi_lora_plan made for ", d.T, " rows and ", d.A, " adapters, got other values");
    for (int64_t a = 0; a < d.A; ++a) {
      if (begin[a + 1] == begin[a + 2]) continue;
      for (int64_t l = d.first; l < d.first + d.slices; ++l) {
        const int64_t rank = d.ranks[a * d.L + l];
        if (rank < 0 || rank > kPageRanks * d.M)
          fail(op, "ranks must lie in [0, ", kPageRanks * d.M, "], got ", rank, " of adapter ", a);
        for (int64_t m = 0; m * kPageRanks < rank; ++m) {
          const int64_t page = d.pages[(a * d.L + l) * d.M + m];
          if (page < 0 || page >= d.P / kPageRanks)
            fail(op, "pages must lie in [0, ", d.P / kPageRanks, "), got ", page, " of adapter ", a);
        }
      }
      if (d.dropout_p && !(d.dropout_p[a] >= 0.f && d.dropout_p[a] <= 1.f))
        fail(op, "dropout_p must lie in [0, 1], got ", d.dropout_p[a], " of adapter ", a);
    }
  }
}

struct Metadata {
  const Tensor &pages, &ranks, &plan;
  OptTensor dropout_p, seed;
};

// slice: the one slice taking part, or -1 for all of them.
Adapters check_adapters(const char* op, const Metadata& m, int64_t T, const Tensor& pool, int64_t slice,
                        const Tensor& x, const char* x_arg) {
  Adapters d = {};
  d.pages = int32_data(op, "pages", m.pages, x, x_arg);
  check_shape(op, "pages", m.pages, "[A, L, M]", {-1, -1, -1});
  d.A = m.pages.size(0), d.L = m.pages.size(1), d.M = m.pages.size(2), d.T = T, d.P = pool.size(0);
  if (d.M * kPageRanks > kMaxRank)
    fail(op, "pages must have at most ", kMaxRank / kPageRanks, " pages an adapter, got ", d.M);
  d.ranks = int32_data(op, "ranks", m.ranks, x, x_arg);
  check_shape(op, "ranks", m.ranks, "[A, L]", {d.A, d.L});
  d.plan = int32_data(op, "plan", m.plan, x, x_arg);
  check_shape(op, "plan", m.plan, "[K, plan length]", {-1, plan_layout(T, d.A).length});
  d.K = m.plan.size(0);
  if (!d.K) fail(op, "plan must have at least one slot, got ", shape_of(m.plan));
  if (slice >= d.L) fail(op, "slice must lie in [0, L = ", d.L, "), got ", slice);
  d.first = slice < 0 ? 0 : static_cast<int32_t>(slice);
  d.slices = slice < 0 ? static_cast<int32_t>(d.L) : 1;
  if (m.dropout_p) {
    d.dropout_p = float_data(op, "dropout_p", *m.dropout_p, x, x_arg);
    check_shape(op, "dropout_p", *m.dropout_p, "[A]", {d.A});
    d.seed = check_seed(op, m.seed, x);
  }
  if (!on_cuda(op, x)) check_plan(op, d);
  return d;
}

const float* check_scales(const char* op, const OptTensor& scales, const Adapters& d, const Tensor& x) {
  if (!scales) return nullptr;
  const float* data = float_data(op, "scales", *scales, x, "x");
  if (!(d.K == 1 && scales->dim() == 1)) {
    check_shape(op, "scales", *scales, "[T, K]", {d.T, d.K});
  } else {
    check_shape(op, "scales", *scales, "[T]", {d.T});
  }
  return data;
}

Sizes s_sizes(const Tensor& x, const Adapters& d) {
  Sizes sizes = sizes_of(x);
  sizes.pop_back();
  for (const int64_t n : {d.K, d.L, kPageRanks * d.M}) sizes.push_back(n);
  return sizes;
}
Tensor check_s(const char* op, const char* arg, const Tensor& s, const Tensor& like, const char* like_arg,
               const Adapters& d, const Tensor& pool, const char* pool_arg) {
  check_strided(op, arg, s);
  check_device(op, arg, s, like, like_arg);
  check_shape(op, arg, s, "[..., K, L, R]", s_sizes(like, d));
  if (s.scalar_type() != pool.scalar_type())
    fail(op, arg, " must be ", name_of(pool.scalar_type()), " (the dtype of ", pool_arg, "), got ",
         name_of(s.scalar_type()));
  return as_contiguous(s);
}

// ---- one kernel each

Tensor shrink(const char* op, const Rows& x, DType dtype, const Tensor& pool, DType pool_dtype, const Adapters& d,
              const float* scales) {
  Tensor s = torch::stable::new_empty(x.tensor, s_sizes(x.tensor, d), pool.scalar_type());
  if (!s.numel()) return s;
  if (d.slices < d.L || !d.P || !x.N) torch::stable::zero_(s);
  if (!d.P || !x.N) return s;
  const MultiLoraShrinkParams p{
      d,         x.tensor.const_data_ptr(), pool.const_data_ptr(), s.mutable_data_ptr(), scales, x.N, x.pitch, dtype,
      pool_dtype};
  run(op, x.tensor, p, multi_lora_shrink_workspace, multi_lora_shrink_cpu, LRK_LAUNCHER(multi_lora_shrink_cuda));
  return s;
}

// y = base + the sum over slots; y may be base itself.
void expand(const char* op, const Rows& y, const Rows& base, DType dtype, const Tensor& s, const Tensor& pool,
            DType pool_dtype, const Adapters& d) {
  if (!y.T || !y.N) return;
  const MultiLoraExpandParams p{d,
                                y.tensor.mutable_data_ptr(),
                                base.tensor.const_data_ptr(),
                                s.const_data_ptr(),
                                pool.const_data_ptr(),
                                y.N,
                                y.pitch,
                                base.pitch,
                                dtype,
                                pool_dtype};
  run(op, y.tensor, p, multi_lora_expand_workspace, multi_lora_expand_cpu, LRK_LAUNCHER(multi_lora_expand_cuda));
}

Tensor wgrad(const char* op, const Rows& x, DType dtype, const Tensor& s, const Tensor& pool, DType pool_dtype,
             const Adapters& d) {
  Tensor g = torch::stable::new_empty(pool, sizes_of(pool));
  torch::stable::zero_(g);
  if (!g.numel() || !x.T) return g;
  const MultiLoraWgradParams p{d,     s.const_data_ptr(), x.tensor.const_data_ptr(), g.mutable_data_ptr(), x.N, x.pitch,
                               dtype, pool_dtype};
  run(op, x.tensor, p, multi_lora_wgrad_workspace, multi_lora_wgrad_cpu, LRK_LAUNCHER(multi_lora_wgrad_cuda));
  return g;
}

// ---- ops

Tensor multi_lora_plan(const Tensor& index, int64_t adapters) {
  constexpr const char* op = "multi_lora_plan";
  const int32_t* data = int32_data(op, "index", index, index, "index");
  if (index.dim() != 1 && (index.dim() != 2 || !index.size(1)))
    fail(op, "index must have shape [T] or [T, K] with K >= 1, got ", shape_of(index));
  const int64_t T = index.size(0), K = index.dim() == 2 ? index.size(1) : 1, most = int64_t{1} << 30;
  if (adapters < 0 || adapters > most) fail(op, "adapters must lie in [0, 2^30], got ", adapters);
  if (T > most) fail(op, "index must have at most 2^30 rows, got ", T);
  if (!on_cuda(op, index))
    for (int64_t i = 0; i < T * K; ++i)
      if (data[i] >= adapters)
        fail(op, "index must lie below adapters = ", adapters, ", got ", data[i], " in row ", i / K);
  Tensor plan = torch::stable::new_empty(index, {K, plan_layout(T, adapters).length});
  const MultiLoraPlanParams p{data, static_cast<int32_t*>(plan.mutable_data_ptr()), T, K, adapters};
  run(op, index, p, multi_lora_plan_workspace, multi_lora_plan_cpu, LRK_LAUNCHER(multi_lora_plan_cuda));
  return plan;
}

Tensor multi_lora_shrink(const Tensor& x, const Tensor& a_pool, const Tensor& pages, const Tensor& ranks,
                         const Tensor& plan, const OptTensor& scales, const OptTensor& dropout_p,
                         const OptTensor& seed) {
  constexpr const char* op = "multi_lora_shrink";
  const DType dtype = check_x(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  const DType a_dtype = check_pool(op, "a_pool", a_pool, rows.N, x, "x");
  const Adapters d = check_adapters(op, {pages, ranks, plan, dropout_p, seed}, rows.T, a_pool, -1, x, "x");
  return shrink(op, rows, dtype, a_pool, a_dtype, d, check_scales(op, scales, d, x));
}

// ds is the gradient of S / scales: dx = D(ds A), dA = ds^T D(x).
std::tuple<Tensor, Tensor> multi_lora_shrink_bwd(const Tensor& ds, const Tensor& x, const Tensor& a_pool,
                                                 const Tensor& pages, const Tensor& ranks, const Tensor& plan,
                                                 const OptTensor& dropout_p, const OptTensor& seed, bool need_dx,
                                                 bool need_da) {
  constexpr const char* op = "multi_lora_shrink_bwd";
  const DType dtype = check_x(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  const DType a_dtype = check_pool(op, "a_pool", a_pool, rows.N, x, "x");
  const Adapters d = check_adapters(op, {pages, ranks, plan, dropout_p, seed}, rows.T, a_pool, -1, x, "x");
  const Tensor s = check_s(op, "ds", ds, x, "x", d, a_pool, "a_pool");
  Tensor dx = nothing();
  if (need_dx) {
    dx = torch::stable::new_empty(x, sizes_of(x));
    torch::stable::zero_(dx);
    const Rows out = rows_of(op, "dx", dx);
    expand(op, out, out, dtype, s, a_pool, a_dtype, d);
  }
  return {dx, need_da ? wgrad(op, rows, dtype, s, a_pool, a_dtype, d) : nothing()};
}

void multi_lora_expand_(Tensor y, const Tensor& s, const Tensor& b_pool, const Tensor& pages, const Tensor& ranks,
                        const Tensor& plan, int64_t slice) {
  constexpr const char* op = "multi_lora_expand_";
  const DType dtype = check_x(op, "y", y);
  const Rows rows = rows_of(op, "y", y);
  if (y.numel() && rows.tensor.const_data_ptr() != y.const_data_ptr())
    fail(op, "y must be rows of contiguous elements at one pitch, since it is written in place, got other strides");
  if (slice < 0) fail(op, "slice must lie in [0, L), got ", slice);
  const DType b_dtype = check_pool(op, "b_pool", b_pool, rows.N, y, "y");
  const Adapters d = check_adapters(op, {pages, ranks, plan, {}, {}}, rows.T, b_pool, slice, y, "y");
  expand(op, rows, rows, dtype, check_s(op, "s", s, y, "y", d, b_pool, "b_pool"), b_pool, b_dtype, d);
}

Tensor multi_lora_expand(const Tensor& y, const Tensor& s, const Tensor& b_pool, const Tensor& pages,
                         const Tensor& ranks, const Tensor& plan, int64_t slice) {
  constexpr const char* op = "multi_lora_expand";
  const DType dtype = check_x(op, "y", y);
  const Rows rows = rows_of(op, "y", y);
  if (slice < 0) fail(op, "slice must lie in [0, L), got ", slice);
  const DType b_dtype = check_pool(op, "b_pool", b_pool, rows.N, y, "y");
  const Adapters d = check_adapters(op, {pages, ranks, plan, {}, {}}, rows.T, b_pool, slice, y, "y");
  Tensor out = torch::stable::new_empty(y, sizes_of(y));
  expand(op, rows_of(op, "out", out), rows, dtype, check_s(op, "s", s, y, "y", d, b_pool, "b_pool"), b_pool, b_dtype,
         d);
  return out;
}

std::tuple<Tensor, Tensor> multi_lora_expand_bwd(const Tensor& dy, const Tensor& s, const Tensor& b_pool,
                                                 const Tensor& pages, const Tensor& ranks, const Tensor& plan,
                                                 int64_t slice, bool need_ds, bool need_db) {
  constexpr const char* op = "multi_lora_expand_bwd";
  const DType dtype = check_x(op, "dy", dy);
  const Rows rows = rows_of(op, "dy", dy);
  if (slice < 0) fail(op, "slice must lie in [0, L), got ", slice);
  const DType b_dtype = check_pool(op, "b_pool", b_pool, rows.N, dy, "dy");
  const Adapters d = check_adapters(op, {pages, ranks, plan, {}, {}}, rows.T, b_pool, slice, dy, "dy");
  const Tensor sc = check_s(op, "s", s, dy, "dy", d, b_pool, "b_pool");
  return {need_ds ? shrink(op, rows, dtype, b_pool, b_dtype, d, nullptr) : nothing(),
          need_db ? wgrad(op, rows, dtype, sc, b_pool, b_dtype, d) : nothing()};
}

// ids [...] as T tokens below N; on CUDA nobody looks.
Tensor check_ids(const char* op, const Tensor& ids, const Tensor& pool, int64_t N) {
  check_strided(op, "ids", ids);
  check_dtype(op, "ids", ids, ScalarType::Long);
  check_device(op, "ids", ids, pool, "a_pool");
  const Tensor t = as_contiguous(ids);
  if (on_cuda(op, t)) return t;
  const int64_t* data = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i)
    if (data[i] < 0 || data[i] >= N) fail(op, "ids must lie in [0, ", N, "), got ", data[i]);
  return t;
}

Sizes embedded_sizes(const Tensor& ids, const Adapters& d) {
  Sizes sizes = sizes_of(ids);
  for (const int64_t n : {d.K, d.L, kPageRanks * d.M}) sizes.push_back(n);
  return sizes;
}

Tensor multi_lora_embedding(const Tensor& ids, const Tensor& a_pool, const Tensor& pages, const Tensor& ranks,
                            const Tensor& plan, const OptTensor& scales) {
  constexpr const char* op = "multi_lora_embedding";
  const DType dtype = check_pool(op, "a_pool", a_pool, -1, a_pool, "a_pool");
  const Tensor tokens = check_ids(op, ids, a_pool, a_pool.size(1));
  const Adapters d = check_adapters(op, {pages, ranks, plan, {}, {}}, ids.numel(), a_pool, -1, a_pool, "a_pool");
  const float* scale = check_scales(op, scales, d, a_pool);
  Tensor s = torch::stable::new_empty(a_pool, embedded_sizes(ids, d));
  if (!s.numel()) return s;
  const MultiLoraGatherParams p{d,
                                static_cast<const int64_t*>(tokens.const_data_ptr()),
                                a_pool.const_data_ptr(),
                                s.mutable_data_ptr(),
                                scale,
                                a_pool.size(1),
                                dtype};
  run(op, a_pool, p, multi_lora_gather_workspace, multi_lora_gather_cpu, LRK_LAUNCHER(multi_lora_gather_cuda));
  return s;
}

// ds is the gradient of S / scales.
Tensor multi_lora_embedding_bwd(const Tensor& ds, const Tensor& ids, const Tensor& a_pool, const Tensor& pages,
                                const Tensor& ranks, const Tensor& plan) {
  constexpr const char* op = "multi_lora_embedding_bwd";
  const DType dtype = check_pool(op, "a_pool", a_pool, -1, a_pool, "a_pool");
  const Tensor tokens = check_ids(op, ids, a_pool, a_pool.size(1));
  const Adapters d = check_adapters(op, {pages, ranks, plan, {}, {}}, ids.numel(), a_pool, -1, a_pool, "a_pool");
  check_factor(op, "ds", ds, a_pool, "a_pool");
  check_dtype(op, "ds", ds, a_pool.scalar_type());
  check_shape(op, "ds", ds, "[..., K, L, R]", embedded_sizes(ids, d));
  const Tensor s = as_contiguous(ds);
  Tensor g = torch::stable::new_empty(a_pool, sizes_of(a_pool), ScalarType::Float);
  torch::stable::zero_(g);
  if (g.numel() && s.numel()) {
    const MultiLoraScatterParams p{d,
                                   static_cast<const int64_t*>(tokens.const_data_ptr()),
                                   s.const_data_ptr(),
                                   static_cast<float*>(g.mutable_data_ptr()),
                                   a_pool.size(1),
                                   dtype};
    run(op, a_pool, p, multi_lora_scatter_workspace, multi_lora_scatter_cpu, LRK_LAUNCHER(multi_lora_scatter_cuda));
  }
  return torch::stable::to(g, a_pool.scalar_type());
}

struct LinearArgs {
  Rows x;
  DType dtype, pool_dtype;
  Adapters a, b;  // over a_pool and over b_pool; dropout belongs to the first
  const float* scales;
};
LinearArgs check_linear(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                        const Tensor& a_pool, const Tensor& b_pool, const Metadata& m, const OptTensor& scales) {
  LinearArgs args;
  args.dtype = check_x(op, "x", x);
  args.x = rows_of(op, "x", x);
  check_base(op, x, weight, bias);
  args.pool_dtype = check_pool(op, "a_pool", a_pool, args.x.N, x, "x");
  check_pool(op, "b_pool", b_pool, weight.size(0), x, "x");
  if (a_pool.scalar_type() != b_pool.scalar_type())
    fail(op, "b_pool must be ", name_of(a_pool.scalar_type()), " (the dtype of a_pool), got ",
         name_of(b_pool.scalar_type()));
  if (a_pool.size(0) != b_pool.size(0))
    fail(op, "b_pool must have the rows of a_pool, ", a_pool.size(0), ", got ", b_pool.size(0));
  args.a = args.b = check_adapters(op, m, args.x.T, a_pool, -1, x, "x");
  if (args.a.L != 1)
    fail(op, "pages must have one slice, got L = ", args.a.L, "; use multi_lora_shrink and multi_lora_expand");
  args.b.dropout_p = nullptr;
  args.scales = check_scales(op, scales, args.a, x);
  return args;
}

std::tuple<Tensor, Tensor> linear_forward(const char* op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                          const Tensor& a_pool, const Tensor& b_pool, const Metadata& m,
                                          const OptTensor& scales) {
  const LinearArgs args = check_linear(op, x, weight, bias, a_pool, b_pool, m, scales);
  Tensor y = as_contiguous(aten_linear(x, weight, bias));
  const Tensor s = shrink(op, args.x, args.dtype, a_pool, args.pool_dtype, args.a, args.scales);
  const Rows rows = rows_of(op, "y", y);
  expand(op, rows, rows, args.dtype, s, b_pool, args.pool_dtype, args.b);
  return {y, s};
}

std::tuple<Tensor, Tensor> multi_lora_linear_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                                 const Tensor& a_pool, const Tensor& b_pool, const Tensor& pages,
                                                 const Tensor& ranks, const Tensor& plan, const OptTensor& scales,
                                                 const OptTensor& dropout_p, const OptTensor& seed) {
  return linear_forward("multi_lora_linear_fwd", x, weight, bias, a_pool, b_pool, {pages, ranks, plan, dropout_p, seed},
                        scales);
}
Tensor multi_lora_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& a_pool,
                         const Tensor& b_pool, const Tensor& pages, const Tensor& ranks, const Tensor& plan,
                         const OptTensor& scales, const OptTensor& dropout_p, const OptTensor& seed) {
  return std::get<0>(linear_forward("multi_lora_linear", x, weight, bias, a_pool, b_pool,
                                    {pages, ranks, plan, dropout_p, seed}, scales));
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// s is what the forward made: scale * D(x) A^T. dS = scale * dY B, so that dA = dS^T D(x) and dx += D(dS A).
Five multi_lora_linear_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& a_pool,
                           const Tensor& b_pool, const Tensor& s, const Tensor& pages, const Tensor& ranks,
                           const Tensor& plan, const OptTensor& scales, const OptTensor& dropout_p,
                           const OptTensor& seed, bool need_dx, bool need_dw, bool need_dbias, bool need_da,
                           bool need_db) {
  constexpr const char* op = "multi_lora_linear_bwd";
  const LinearArgs args =
      check_linear(op, x, weight, std::nullopt, a_pool, b_pool, {pages, ranks, plan, dropout_p, seed}, scales);
  check_x(op, "dy", dy);
  check_device(op, "dy", dy, x, "x");
  check_dtype(op, "dy", dy, x.scalar_type());
  check_shape(op, "dy", dy, "[..., O]", with_last(x, weight.size(0)));
  const Tensor sc = check_s(op, "s", s, x, "x", args.a, a_pool, "a_pool");
  const Rows rows = rows_of(op, "dy", dy);
  Tensor dx = nothing(), da = nothing();
  if (need_dx) dx = base_dx(rows, weight);
  if (need_dx || need_da) {
    const Tensor ds = shrink(op, rows, args.dtype, b_pool, args.pool_dtype, args.b, args.scales);
    if (need_da) da = wgrad(op, args.x, args.dtype, ds, a_pool, args.pool_dtype, args.a);
    if (need_dx) {
      const Rows out = rows_of(op, "dx", dx);
      expand(op, out, out, args.dtype, ds, a_pool, args.pool_dtype, args.a);
    }
  }
  return {dx, need_dw ? base_dw(rows, args.x) : nothing(), need_dbias ? base_dbias(rows) : nothing(), da,
          need_db ? wgrad(op, rows, args.dtype, sc, b_pool, args.pool_dtype, args.b) : nothing()};
}

}  // namespace
}  // namespace lrk::ops

STABLE_TORCH_LIBRARY_FRAGMENT(LRK_NAMESPACE, m) {
  m.def("multi_lora_plan(Tensor index, int adapters) -> Tensor");
  m.def(
      "multi_lora_shrink(Tensor x, Tensor a_pool, Tensor pages, Tensor ranks, Tensor plan, Tensor? scales=None, "
      "Tensor? dropout_p=None, Tensor? seed=None) -> Tensor");
  m.def(
      "multi_lora_shrink_bwd(Tensor ds, Tensor x, Tensor a_pool, Tensor pages, Tensor ranks, Tensor plan, "
      "Tensor? dropout_p, Tensor? seed, bool need_dx, bool need_da) -> (Tensor dx, Tensor da)");
  m.def(
      "multi_lora_expand_(Tensor(a!) y, Tensor s, Tensor b_pool, Tensor pages, Tensor ranks, Tensor plan, "
      "int slice=0) -> ()");
  m.def(
      "multi_lora_expand(Tensor y, Tensor s, Tensor b_pool, Tensor pages, Tensor ranks, Tensor plan, int slice=0) "
      "-> Tensor");
  m.def(
      "multi_lora_expand_bwd(Tensor dy, Tensor s, Tensor b_pool, Tensor pages, Tensor ranks, Tensor plan, int slice, "
      "bool need_ds, bool need_db) -> (Tensor ds, Tensor db)");
  m.def(
      "multi_lora_embedding(Tensor ids, Tensor a_pool, Tensor pages, Tensor ranks, Tensor plan, Tensor? scales=None) "
      "-> Tensor");
  m.def(
      "multi_lora_embedding_bwd(Tensor ds, Tensor ids, Tensor a_pool, Tensor pages, Tensor ranks, Tensor plan) "
      "-> Tensor");
  m.def(
      "multi_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a_pool, Tensor b_pool, Tensor pages, "
      "Tensor ranks, Tensor plan, Tensor? scales=None, Tensor? dropout_p=None, Tensor? seed=None) -> Tensor");
  m.def(
      "multi_lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor a_pool, Tensor b_pool, Tensor pages, "
      "Tensor ranks, Tensor plan, Tensor? scales=None, Tensor? dropout_p=None, Tensor? seed=None) "
      "-> (Tensor y, Tensor s)");
  m.def(
      "multi_lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor a_pool, Tensor b_pool, Tensor s, "
      "Tensor pages, Tensor ranks, Tensor plan, Tensor? scales, Tensor? dropout_p, Tensor? seed, bool need_dx, "
      "bool need_dw, bool need_dbias, bool need_da, bool need_db) "
      "-> (Tensor dx, Tensor dw, Tensor dbias, Tensor da, Tensor db)");
}

STABLE_TORCH_LIBRARY_IMPL(LRK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("multi_lora_plan", TORCH_BOX(&lrk::ops::multi_lora_plan));
  m.impl("multi_lora_shrink", TORCH_BOX(&lrk::ops::multi_lora_shrink));
  m.impl("multi_lora_shrink_bwd", TORCH_BOX(&lrk::ops::multi_lora_shrink_bwd));
  m.impl("multi_lora_expand_", TORCH_BOX(&lrk::ops::multi_lora_expand_));
  m.impl("multi_lora_expand", TORCH_BOX(&lrk::ops::multi_lora_expand));
  m.impl("multi_lora_expand_bwd", TORCH_BOX(&lrk::ops::multi_lora_expand_bwd));
  m.impl("multi_lora_embedding", TORCH_BOX(&lrk::ops::multi_lora_embedding));
  m.impl("multi_lora_embedding_bwd", TORCH_BOX(&lrk::ops::multi_lora_embedding_bwd));
  m.impl("multi_lora_linear", TORCH_BOX(&lrk::ops::multi_lora_linear));
  m.impl("multi_lora_linear_fwd", TORCH_BOX(&lrk::ops::multi_lora_linear_fwd));
  m.impl("multi_lora_linear_bwd", TORCH_BOX(&lrk::ops::multi_lora_linear_bwd));
}
