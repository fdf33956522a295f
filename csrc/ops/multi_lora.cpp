// SPDX-License-Identifier: Apache-2.0
// Glue of multi-LoRA: schemas, checks, allocation, dispatch. Math and letters: csrc/multi_lora.h, docs/ops.md.
#include "multi_lora.h"

#include "base.h"

namespace lrk::ops {
namespace {

// A pool [P, N] in whole pages; N: any where it is negative.
void check_pool(const Arg& pool, const Arg& like, int64_t N) {
  pool.factor_of(like).shape("[P, N]", {-1, N});
  if (const int64_t P = pool.tensor.size(0); P % kPageRanks)
    pool.refuse("hold whole pages of 16 rows, got ", P, " rows");
  pool.contiguous();
}

// What the CPU kernels rely on. On CUDA values are not validated: there a row whose adapter or page does not exist comes out as NaN.
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
  const OptTensor &dropout_p, &seed;
};
const OptTensor kNone;

// Of T rows beside `like`, all slices or one.
Adapters check_adapters(const Arg& like, const Metadata& m, int64_t T, const Arg& pool,
                        std::optional<int64_t> slice = {}) {
  const char* op = like.op;
  const Arg pages{op, "pages", m.pages}, ranks{op, "ranks", m.ranks}, plan{op, "plan", m.plan};
  pages.holds<int32_t>(like).contiguous().shape("[A, L, M]", {-1, -1, -1});
  const int64_t A = m.pages.size(0), L = m.pages.size(1), M = m.pages.size(2);
  if (M * kPageRanks > kMaxRank) pages.refuse("have at most ", kMaxRank / kPageRanks, " pages an adapter, got ", M);
  ranks.holds<int32_t>(like).contiguous().shape("[A, L]", {A, L});
  plan.holds<int32_t>(like).contiguous().shape("[K, plan length]", {-1, plan_layout(T, A).length});
  const int64_t K = m.plan.size(0);
  if (!K) plan.refuse("have at least one slot, got ", text_of(sizes_of(m.plan)));
  if (slice && *slice >= L) fail(op, "slice must lie in [0, L = ", L, "), got ", *slice);
  Adapters d{.pages = pages.data<int32_t>(),
             .ranks = ranks.data<int32_t>(),
             .plan = plan.data<int32_t>(),
             .T = T,
             .K = K,
             .A = A,
             .L = L,
             .M = M,
             .P = pool.tensor.size(0),
             .first = static_cast<int32_t>(slice.value_or(0)),
             .slices = slice ? 1 : static_cast<int32_t>(L),
             .dropout_p = nullptr,
             .seed = nullptr};
  if (m.dropout_p) {
    const Arg p{op, "dropout_p", *m.dropout_p};
    d.dropout_p = p.holds<float>(like).contiguous().shape("[A]", {A}).data<float>();
    d.seed = seed_data(m.seed, like);
  }
  if (!on_cuda(op, like.tensor)) check_plan(op, d);
  return d;
}

// The same behind the pool [P, N] that rows of x or y meet.
Adapters check_pages(const Arg& like, const Rows& rows, const Arg& pool, const Metadata& m,
                     std::optional<int64_t> slice = {}) {
  if (slice && *slice < 0) fail(like.op, "slice must lie in [0, L), got ", *slice);
  pool.factor_of(like).shape("[P, N]", {-1, -1});
  like.features_of(pool, "[P, N]", 1);
  check_pool(pool, like, rows.N);
  return check_adapters(like, m, rows.T, pool, slice);
}

const float* scales_data(const OptTensor& scales, const Adapters& d, const Arg& x) {
  if (!scales) return nullptr;
  const Arg arg{x.op, "scales", *scales};
  arg.holds<float>(Arg{x.op, "x", x.tensor}).contiguous();
  const bool flat = d.K == 1 && scales->dim() == 1;
  return arg.shape(flat ? "[T]" : "[T, K]", flat ? Sizes{d.T} : Sizes{d.T, d.K}).data<float>();
}

// S [..., K, L, R] beside x [..., N], or, where `drop` is 0, beside ids [...].
Sizes s_sizes(const Tensor& x, const Adapters& d, int64_t drop = 1) {
  return with_last(x, {d.K, d.L, kPageRanks * d.M}, drop);
}
Tensor check_s(const Arg& s, const Arg& like, const Adapters& d, const Arg& pool) {
  return s.strided().on(like).shape("[..., K, L, R]", s_sizes(like.tensor, d)).s_beside(pool);
}

// ---- one kernel each

Tensor shrink(const Rows& x, const Arg& pool, const Adapters& d, const float* scales) {
  Tensor s = new_empty(x.tensor, s_sizes(x.tensor, d), s_type(pool.type()));
  if (!s.numel()) return s;
  if (d.slices < d.L || !d.P || !x.N) torch::stable::zero_(s);
  if (!d.P || !x.N) return s;
  const MultiLoraShrinkParams p{.adapters = d,
                                .x = x.data(),
                                .pool = pool.tensor.const_data_ptr(),
                                .s = s.mutable_data_ptr(),
                                .scales = scales,
                                .N = x.N,
                                .x_pitch = x.pitch,
                                .dtype = x.dtype,
                                .factor_dtype = pool.dtype()};
  run(x.op, x.tensor, p, LRK_RUN(multi_lora_shrink));
  return s;
}

// y = base + the sum over slots; y may be base itself.
void expand(const Rows& y, const Rows& base, const Tensor& s, const Arg& pool, const Adapters& d) {
  if (!y.T || !y.N) return;
  const MultiLoraExpandParams p{.adapters = d,
                                .y = y.mutable_data(),
                                .base = base.data(),
                                .s = s.const_data_ptr(),
                                .pool = pool.tensor.const_data_ptr(),
                                .N = y.N,
                                .y_pitch = y.pitch,
                                .base_pitch = base.pitch,
                                .dtype = y.dtype,
                                .factor_dtype = pool.dtype()};
  run(y.op, y.tensor, p, LRK_RUN(multi_lora_expand));
}
void expand_in_place(const char* op, const Tensor& y, const Tensor& s, const Arg& pool, const Adapters& d) {
  const Rows rows = rows_of(op, y);
  expand(rows, rows, s, pool, d);
}

Tensor wgrad(const Rows& x, const Tensor& s, const Arg& pool, const Adapters& d) {
  Tensor g = new_zeros(pool.tensor);
  if (!g.numel() || !x.T) return g;
  const MultiLoraWgradParams p{.adapters = d,
                               .s = s.const_data_ptr(),
                               .x = x.data(),
                               .g = g.mutable_data_ptr(),
                               .N = x.N,
                               .x_pitch = x.pitch,
                               .dtype = x.dtype,
                               .factor_dtype = pool.dtype()};
  run(x.op, x.tensor, p, LRK_RUN(multi_lora_wgrad));
  return g;
}

// ---- ops

Tensor multi_lora_plan(const Tensor& index_, int64_t adapters) {
  const Arg index{"multi_lora_plan", "index", index_};
  const int32_t* data = index.holds<int32_t>(index).contiguous().data<int32_t>();
  if (index_.dim() != 1 && (index_.dim() != 2 || !index_.size(1)))
    index.refuse("have shape [T] or [T, K] with K >= 1, got ", text_of(sizes_of(index_)));
  const int64_t T = index_.size(0), K = index_.dim() == 2 ? index_.size(1) : 1, most = int64_t{1} << 30;
  if (adapters < 0 || adapters > most) fail(index.op, "adapters must lie in [0, 2^30], got ", adapters);
  if (T > most) index.refuse("have at most 2^30 rows, got ", T);
  if (!on_cuda(index.op, index_))
    for (int64_t i = 0; i < T * K; ++i)
      if (data[i] >= adapters) index.refuse("lie below adapters = ", adapters, ", got ", data[i], " in row ", i / K);
  Tensor plan = new_empty(index_, Sizes{K, plan_layout(T, adapters).length});
  const MultiLoraPlanParams p{
      .index = data, .plan = static_cast<int32_t*>(plan.mutable_data_ptr()), .T = T, .K = K, .A = adapters};
  run(index.op, index_, p, LRK_RUN(multi_lora_plan));
  return plan;
}

Tensor multi_lora_shrink(const Tensor& x_, const Tensor& a_pool, const Tensor& pages, const Tensor& ranks,
                         const Tensor& plan, const OptTensor& scales, const OptTensor& dropout_p,
                         const OptTensor& seed) {
  const Arg x{"multi_lora_shrink", "x", x_}, pool{x.op, "a_pool", a_pool};
  const Rows rows = x.floats().rows();
  const Adapters d = check_pages(x, rows, pool, {pages, ranks, plan, dropout_p, seed});
  return shrink(rows, pool, d, scales_data(scales, d, x));
}

// ds is the gradient of S / scales: dx = D(ds A), dA = ds^T D(x).
std::tuple<Tensor, Tensor> multi_lora_shrink_bwd(const Tensor& ds, const Tensor& x_, const Tensor& a_pool,
                                                 const Tensor& pages, const Tensor& ranks, const Tensor& plan,
                                                 const OptTensor& dropout_p, const OptTensor& seed, bool need_dx,
                                                 bool need_da) {
  const Arg x{"multi_lora_shrink (backward)", "x", x_}, pool{x.op, "a_pool", a_pool};
  const Rows rows = x.floats().rows();
  const Adapters d = check_pages(x, rows, pool, {pages, ranks, plan, dropout_p, seed});
  const Tensor s = check_s({x.op, "ds", ds}, x, d, pool), dx = need_dx ? new_zeros(x_) : nothing();
  if (need_dx) expand_in_place(x.op, dx, s, pool, d);
  return {dx, need_da ? wgrad(rows, s, pool, d) : nothing()};
}

void multi_lora_expand_(Tensor y_, const Tensor& s, const Tensor& b_pool, const Tensor& pages, const Tensor& ranks,
                        const Tensor& plan, int64_t slice) {
  const Arg y{"multi_lora_expand_", "y", y_}, pool{y.op, "b_pool", b_pool};
  const Rows rows = y.floats().rows_in_place();
  const Adapters d = check_pages(y, rows, pool, {pages, ranks, plan, kNone, kNone}, slice);
  expand(rows, rows, check_s({y.op, "s", s}, y, d, pool), pool, d);
}

Tensor multi_lora_expand(const Tensor& y_, const Tensor& s, const Tensor& b_pool, const Tensor& pages,
                         const Tensor& ranks, const Tensor& plan, int64_t slice) {
  const Arg y{"multi_lora_expand", "y", y_}, pool{y.op, "b_pool", b_pool};
  const Rows rows = y.floats().rows();
  const Adapters d = check_pages(y, rows, pool, {pages, ranks, plan, kNone, kNone}, slice);
  const Tensor sc = check_s({y.op, "s", s}, y, d, pool), out = new_like(y_);
  expand(rows_of(y.op, out), rows, sc, pool, d);
  return out;
}

std::tuple<Tensor, Tensor> multi_lora_expand_bwd(const Tensor& dy_, const Tensor& s, const Tensor& b_pool,
                                                 const Tensor& pages, const Tensor& ranks, const Tensor& plan,
                                                 int64_t slice, bool need_ds, bool need_db) {
  const Arg dy{"multi_lora_expand (backward)", "dy", dy_}, pool{dy.op, "b_pool", b_pool};
  const Rows rows = dy.floats().rows();
  const Adapters d = check_pages(dy, rows, pool, {pages, ranks, plan, kNone, kNone}, slice);
  const Tensor sc = check_s({dy.op, "s", s}, dy, d, pool);
  return {need_ds ? as_type(shrink(rows, pool, d, nullptr), s.scalar_type()) : nothing(),
          need_db ? wgrad(rows, sc, pool, d) : nothing()};
}

// ids [...] as T tokens below N; on CUDA values are not validated.
Tensor check_ids(const Arg& ids, const Arg& pool) {
  const int64_t N = pool.last();
  const Tensor t = as_contiguous(ids.holds<int64_t>(pool).tensor);
  if (on_cuda(ids.op, t)) return t;
  const int64_t* data = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i)
    if (data[i] < 0 || data[i] >= N) ids.refuse("lie in [0, ", N, "), got ", data[i]);
  return t;
}

Tensor multi_lora_embedding(const Tensor& ids, const Tensor& a_pool, const Tensor& pages, const Tensor& ranks,
                            const Tensor& plan, const OptTensor& scales) {
  const Arg pool{"multi_lora_embedding", "a_pool", a_pool};
  check_pool(pool, pool, -1);
  const Tensor tokens = check_ids({pool.op, "ids", ids}, pool);
  const Adapters d = check_adapters(pool, {pages, ranks, plan, kNone, kNone}, ids.numel(), pool);
  const float* scale = scales_data(scales, d, pool);
  Tensor s = new_empty(a_pool, s_sizes(ids, d, 0), s_type(pool.type()));
  if (!s.numel()) return s;
  const MultiLoraGatherParams p{.adapters = d,
                                .ids = static_cast<const int64_t*>(tokens.const_data_ptr()),
                                .pool = a_pool.const_data_ptr(),
                                .s = s.mutable_data_ptr(),
                                .scales = scale,
                                .N = pool.last(),
                                .factor_dtype = pool.dtype()};
  run(pool.op, a_pool, p, LRK_RUN(multi_lora_gather));
  return s;
}

// ds is the gradient of S / scales.
Tensor multi_lora_embedding_bwd(const Tensor& ds_, const Tensor& ids, const Tensor& a_pool, const Tensor& pages,
                                const Tensor& ranks, const Tensor& plan) {
  const Arg pool{"multi_lora_embedding (backward)", "a_pool", a_pool}, ds{pool.op, "ds", ds_};
  check_pool(pool, pool, -1);
  const Tensor tokens = check_ids({pool.op, "ids", ids}, pool);
  const Adapters d = check_adapters(pool, {pages, ranks, plan, kNone, kNone}, ids.numel(), pool);
  const Tensor s = ds.strided().on(pool).shape("[..., K, L, R]", s_sizes(ids, d, 0)).s_beside(pool);
  Tensor g = new_empty(a_pool, sizes_of(a_pool), ScalarType::Float);
  torch::stable::zero_(g);
  if (g.numel() && s.numel()) {
    const MultiLoraScatterParams p{.adapters = d,
                                   .ids = static_cast<const int64_t*>(tokens.const_data_ptr()),
                                   .s = s.const_data_ptr(),
                                   .g = static_cast<float*>(g.mutable_data_ptr()),
                                   .N = pool.last(),
                                   .factor_dtype = pool.dtype()};
    run(pool.op, a_pool, p, LRK_RUN(multi_lora_scatter));
  }
  return torch::stable::to(g, pool.type());
}

// A base product and one slice of both pools beside it.
struct Linear {
  Rows x;
  Adapters a, b;  // over a_pool and over b_pool; dropout belongs to the first
  const float* scales;
};
Linear check_linear(const Arg& x, const BaseProduct& product, const OptTensor& bias, const Arg& a_pool,
                    const Arg& b_pool, const Metadata& m, const OptTensor& scales) {
  const Rows rows = x.floats().rows();
  product.check(x, bias);
  check_pool(a_pool, x, rows.N);
  check_pool(b_pool, x, product.out_features());
  b_pool.typed_as(a_pool);
  if (const int64_t P = a_pool.tensor.size(0); P != b_pool.tensor.size(0))
    b_pool.refuse("have the rows of a_pool, ", P, ", got ", b_pool.tensor.size(0));
  const Adapters a = check_adapters(x, m, rows.T, a_pool);
  if (a.L != 1) fail(x.op, "pages must have one slice, got L = ", a.L, "; use multi_lora_shrink and multi_lora_expand");
  Linear l{.x = rows, .a = a, .b = a, .scales = scales_data(scales, a, x)};
  l.b.dropout_p = nullptr;
  return l;
}

// Base product and adapters in one kernel: Y = X W + bias + the sum over slots of D(S pool). W is read along N or along K.
struct FusedLinear {
  const Rows& x;
  const Tensor& weight;
  bool along_n;
  const Arg& pool;
  const Adapters& adapters;
  OptTensor bias = {};

  MultiLoraGemmParams params(void* y, const void* s) const {
    const int64_t pitch = weight.stride(0);
    return {.adapters = adapters,
            .y = y,
            .bias = bias ? bias->const_data_ptr() : nullptr,
            .x = x.data(),
            .w = {.data = weight.const_data_ptr(), .stride_r = along_n ? pitch : 1, .stride_n = along_n ? 1 : pitch},
            .s = s,
            .pool = pool.tensor.const_data_ptr(),
            .N = weight.size(along_n ? 1 : 0),
            .K = x.N,
            .x_pitch = x.pitch,
            .dtype = x.dtype,
            .factor_dtype = pool.dtype()};
  }
  bool taken() const {
    if (!on_cuda(x.op, x.tensor) || weight.stride(1) != 1) return false;
    return takes_fused(choose_multi_lora_gemm(shape_of(params(nullptr, nullptr)), DeviceScope(x.op, x.tensor).target));
  }
  void run_into(const Tensor& y, const Tensor& s) const {
    run(x.op, x.tensor, params(y.mutable_data_ptr(), s.const_data_ptr()), LRK_RUN_CUDA(multi_lora_gemm));
  }
};

std::tuple<Tensor, Tensor> linear_forward(const char* op, const Tensor& x_, const BaseProduct& product,
                                          const OptTensor& bias, const Tensor& a_pool, const Tensor& b_pool,
                                          const Metadata& m, const OptTensor& scales) {
  const Arg x{op, "x", x_}, a{op, "a_pool", a_pool}, b{op, "b_pool", b_pool};
  const Linear l = check_linear(x, product, bias, a, b, m, scales);
  if (FusedLinear fused{l.x, *product.dense(), false, b, l.b}; fused.taken()) {
    if (bias) fused.bias = as_contiguous(*bias);
    const Tensor s = shrink(l.x, a, l.a, l.scales), y = new_empty(x_, with_last(x_, product.out_features()));
    fused.run_into(y, s);
    return {y, s};
  }
  const Tensor y = product.forward(x_, bias), s = shrink(l.x, a, l.a, l.scales);
  expand_in_place(op, y, s, b, l.b);
  return {y, s};
}

std::tuple<Tensor, Tensor> multi_lora_linear_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                                 const Tensor& a_pool, const Tensor& b_pool, const Tensor& pages,
                                                 const Tensor& ranks, const Tensor& plan, const OptTensor& scales,
                                                 const OptTensor& dropout_p, const OptTensor& seed) {
  return linear_forward("multi_lora_linear", x, AtenLinear(weight), bias, a_pool, b_pool,
                        {pages, ranks, plan, dropout_p, seed}, scales);
}
Tensor multi_lora_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& a_pool,
                         const Tensor& b_pool, const Tensor& pages, const Tensor& ranks, const Tensor& plan,
                         const OptTensor& scales, const OptTensor& dropout_p, const OptTensor& seed) {
  return std::get<0>(linear_forward("multi_lora_linear", x, AtenLinear(weight), bias, a_pool, b_pool,
                                    {pages, ranks, plan, dropout_p, seed}, scales));
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// s is what the forward made: scale * D(x) A^T. dS = scale * dY B, so that dA = dS^T D(x) and dx += D(dS A).
Five multi_lora_linear_bwd(const Tensor& dy_, const Tensor& x_, const Tensor& weight, const Tensor& a_pool,
                           const Tensor& b_pool, const Tensor& s, const Tensor& pages, const Tensor& ranks,
                           const Tensor& plan, const OptTensor& scales, const OptTensor& dropout_p,
                           const OptTensor& seed, bool need_dx, bool need_dw, bool need_dbias, bool need_da,
                           bool need_db) {
  constexpr const char* op = "multi_lora_linear (backward)";
  const Arg x{op, "x", x_}, dy{op, "dy", dy_}, a{op, "a_pool", a_pool}, b{op, "b_pool", b_pool};
  const AtenLinear product(weight);
  const Linear l = check_linear(x, product, std::nullopt, a, b, {pages, ranks, plan, dropout_p, seed}, scales);
  dy.floats().on(x).typed_as(x).shape("[..., O]", with_last(x_, product.out_features()));
  const Tensor sc = check_s({op, "s", s}, x, l.a, a);
  const Rows rows = dy.rows();
  const FusedLinear fused{rows, weight, true, a, l.a};
  const bool one_kernel = need_dx && fused.taken();
  Tensor dx = one_kernel ? new_like(x_) : need_dx ? product.dx(rows) : nothing(), da = nothing();
  if (need_dx || need_da) {
    const Tensor ds = shrink(rows, b, l.b, l.scales);
    if (one_kernel) {
      fused.run_into(dx, ds);
    } else if (need_dx) {
      expand_in_place(op, dx, ds, a, l.a);
    }
    if (need_da) da = wgrad(l.x, ds, a, l.a);
  }
  return {dx, need_dw ? product.dw(rows, l.x) : nothing(), need_dbias ? product.dbias(rows) : nothing(), da,
          need_db ? wgrad(rows, sc, b, l.b) : nothing()};
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(multi_lora_plan, "(Tensor index, int adapters) -> Tensor")
LRK_OP(multi_lora_shrink,
       "(Tensor x, Tensor a_pool, Tensor pages, Tensor ranks, Tensor plan, Tensor? scales=None, "
       "Tensor? dropout_p=None, Tensor? seed=None) -> Tensor")
LRK_OP(multi_lora_shrink_bwd,
       "(Tensor ds, Tensor x, Tensor a_pool, Tensor pages, Tensor ranks, Tensor plan, "
       "Tensor? dropout_p, Tensor? seed, bool need_dx, bool need_da) -> (Tensor dx, Tensor da)")
LRK_OP(multi_lora_expand_,
       "(Tensor(a!) y, Tensor s, Tensor b_pool, Tensor pages, Tensor ranks, Tensor plan, "
       "int slice=0) -> ()")
LRK_OP(multi_lora_expand,
       "(Tensor y, Tensor s, Tensor b_pool, Tensor pages, Tensor ranks, Tensor plan, int slice=0) "
       "-> Tensor")
LRK_OP(multi_lora_expand_bwd,
       "(Tensor dy, Tensor s, Tensor b_pool, Tensor pages, Tensor ranks, Tensor plan, int slice, "
       "bool need_ds, bool need_db) -> (Tensor ds, Tensor db)")
LRK_OP(multi_lora_embedding,
       "(Tensor ids, Tensor a_pool, Tensor pages, Tensor ranks, Tensor plan, Tensor? scales=None) "
       "-> Tensor")
LRK_OP(multi_lora_embedding_bwd,
       "(Tensor ds, Tensor ids, Tensor a_pool, Tensor pages, Tensor ranks, Tensor plan) "
       "-> Tensor")
LRK_OP(multi_lora_linear,
       "(Tensor x, Tensor weight, Tensor? bias, Tensor a_pool, Tensor b_pool, Tensor pages, "
       "Tensor ranks, Tensor plan, Tensor? scales=None, Tensor? dropout_p=None, Tensor? seed=None) -> Tensor")
LRK_OP(multi_lora_linear_fwd,
       "(Tensor x, Tensor weight, Tensor? bias, Tensor a_pool, Tensor b_pool, Tensor pages, "
       "Tensor ranks, Tensor plan, Tensor? scales=None, Tensor? dropout_p=None, Tensor? seed=None) "
       "-> (Tensor y, Tensor s)")
LRK_OP(multi_lora_linear_bwd,
       "(Tensor dy, Tensor x, Tensor weight, Tensor a_pool, Tensor b_pool, Tensor s, "
       "Tensor pages, Tensor ranks, Tensor plan, Tensor? scales, Tensor? dropout_p, Tensor? seed, bool need_dx, "
       "bool need_dw, bool need_dbias, bool need_da, bool need_db) "
       "-> (Tensor dx, Tensor dw, Tensor dbias, Tensor da, Tensor db)")
