// SPDX-License-Identifier: Apache-2.0
// Glue of the S2FT family: schemas, checks, and the products beside a slice. Math: csrc/s2ft.h, docs/ops.md.
#include "s2ft.h"

#include "base.h"
#include "multi_lora.h"

namespace lrk::ops {
namespace {

// Columns of each row of T, in rows of N features.
struct Slices {
  SliceIndex of;
  bool slots;  // ids are [T, K]
  const float* scales;

  Sizes sizes(const Tensor& x) const { return slots ? with_last(x, {of.K, of.s}) : with_last(x, of.s); }
};

void check_ascending(const Arg& index, const SliceIndex& s, int64_t N) {
  for (int64_t a = 0; a < s.A; ++a)
    for (int32_t j = 0; j < s.s; ++j)
      if (!s.ascends(a, j, N))
        index.refuse("ascend in [0, ", N, "), with -1 behind the end, got ", s.column(a, j), " at ", j,
                     s.ids ? " of adapter " + std::to_string(a) : std::string());
}

Slices check_slices(const Arg& like, int64_t T, int64_t N, const Tensor& index_, const OptTensor& ids_,
                    const OptTensor& scales_) {
  const Arg index{like.op, "index", index_};
  index.holds<int32_t>(like).contiguous();
  ids_ ? index.shape("[A, s]", {-1, -1}) : index.shape("[s]", {-1});
  Slices found{.of = {.index = index.data<int32_t>(),
                      .ids = nullptr,
                      .A = ids_ ? index_.size(0) : 1,
                      .s = static_cast<int32_t>(in_range(like.op, "columns", index.last(), 0, int64_t{1} << 31)),
                      .K = 1},
               .slots = false,
               .scales = nullptr};
  if (ids_) {
    const Arg ids{like.op, "ids", *ids_};
    found.slots = ids_->dim() == 2;
    ids.holds<int32_t>(like).contiguous().shape(found.slots ? "[T, K]" : "[T]", found.slots ? Sizes{T, -1} : Sizes{T});
    found.of.K = found.slots ? static_cast<int32_t>(ids_->size(1)) : 1;
    if (found.of.K < 1) ids.refuse("have at least one slot, got ", text_of(sizes_of(*ids_)));
    found.of.ids = ids.data<int32_t>();
  }
  if (scales_) {
    const Arg scales{like.op, "scales", *scales_};
    if (!ids_) scales.refuse("be None without ids, got a tensor");
    scales.holds<float>(like).contiguous();
    found.scales =
        scales.shape(found.slots ? "[T, K], as ids" : "[T], as ids", found.slots ? Sizes{T, found.of.K} : Sizes{T})
            .data<float>();
  }
  if (on_cuda(like.op, like.tensor)) return found;
  check_ascending(index, found.of, N);
  for (int64_t i = 0; ids_ && i < T * found.of.K; ++i)
    if (found.of.ids[i] >= found.of.A)
      Arg{like.op, "ids", *ids_}.refuse("lie below A = ", found.of.A, ", got ", found.of.ids[i], " in row ",
                                        i / found.of.K);
  return found;
}

// h [T, K, P].
void gather(const Rows& x, const SliceIndex& of, const float* scales, const Tensor& h, int64_t P) {
  if (!h.numel()) return;
  run(x.op, x.tensor,
      SliceGatherParams{.slice = of,
                        .x = x.data(),
                        .h = h.mutable_data_ptr(),
                        .scales = scales,
                        .T = x.T,
                        .N = x.N,
                        .x_pitch = x.pitch,
                        .P = static_cast<int32_t>(P),
                        .dtype = x.dtype,
                        .h_dtype = dtype_of(h)},
      LRK_RUN(slice_gather));
}
void scatter(const Rows& y, const SliceIndex& of, const float* scales, const Tensor& h, int64_t P) {
  if (!h.numel() || !y.N) return;
  run(y.op, y.tensor,
      SliceScatterParams{.slice = of,
                         .y = y.mutable_data(),
                         .h = h.const_data_ptr(),
                         .scales = scales,
                         .T = y.T,
                         .N = y.N,
                         .y_pitch = y.pitch,
                         .P = static_cast<int32_t>(P),
                         .dtype = y.dtype,
                         .h_dtype = dtype_of(h)},
      LRK_RUN(slice_scatter));
}

// ---- the slices alone

Tensor slice_gather(const Tensor& x_, const Tensor& index, const OptTensor& ids, const OptTensor& scales) {
  const Arg x{"slice_gather", "x", x_};
  const Rows rows = x.floats().rows();
  const Slices s = check_slices(x, rows.T, rows.N, index, ids, scales);
  const Tensor h = new_empty(x_, s.sizes(x_));
  gather(rows, s.of, s.scales, h, s.of.s);
  return h;
}

void add_scattered(const Arg& y, const Rows& rows, const Tensor& h_, const Tensor& index, const OptTensor& ids,
                   const OptTensor& scales) {
  const Slices s = check_slices(y, rows.T, rows.N, index, ids, scales);
  const Arg h{y.op, "h", h_};
  h.factor_of(y).shape(s.slots ? "[..., K, s]" : "[..., s]", s.sizes(y.tensor));
  scatter(rows, s.of, s.scales, as_contiguous(h_), s.of.s);
}
void scatter_add_(Tensor y_, const Tensor& h, const Tensor& index, const OptTensor& ids, const OptTensor& scales) {
  const Arg y{"scatter_add_", "y", y_};
  add_scattered(y, y.floats().rows_in_place(), h, index, ids, scales);
}
Tensor scatter_add(const Tensor& y_, const Tensor& h, const Tensor& index, const OptTensor& ids,
                   const OptTensor& scales) {
  const Arg y{"scatter_add", "y", y_};
  y.floats().rows();
  Tensor out = new_like(y_);
  torch::stable::copy_(out, y_);
  add_scattered(Arg{y.op, "y", out}, rows_of(y.op, out), h, index, ids, scales);
  return out;
}

// ---- y += x[:, index] d

struct Beside {
  Rows y, x;
  Slices slices;
  Tensor d;  // [s, O] or [A, s, O], contiguous
  ScalarType type, h_type;
  int64_t O;
};
Beside check_beside(const Arg& y, const Arg& x, const Tensor& d_, const Tensor& index, const OptTensor& ids,
                    const OptTensor& scales) {
  const Rows rows = x.floats().rows();
  y.strided().on(x).typed_as(x).shape("[..., O]", with_last(x.tensor, y.tensor.dim() ? y.last() : -1));
  const Slices s = check_slices(x, rows.T, rows.N, index, ids, scales);
  const Arg d{x.op, "d", d_};
  d.factor_of(x);
  ids ? d.shape("[A, s, O]", {s.of.A, s.of.s, y.last()}) : d.shape("[s, O]", {s.of.s, y.last()});
  if (ids && s.of.s > kMaxRank) d.refuse("have at most ", kMaxRank, " columns where rows have ids, got ", s.of.s);
  return {y.rows(), rows, s, as_contiguous(d_), d.type(), s_type(d.type()), y.last()};
}

// Columns [first, first + R) of the one slice there is, as a factor U [R, O] of LoRA's.
struct Part {
  SliceIndex of;
  Factor factor;
  int64_t first;
  int32_t R;
};
template <class F>
void for_each_part(const Beside& b, const F& f) {
  for (int32_t at = 0; at < b.slices.of.s; at += kMaxRank) {
    const int32_t R = std::min(b.slices.of.s - at, kMaxRank);
    const char* d = static_cast<const char*>(b.d.const_data_ptr()) + at * b.O * size_of(dtype_of(b.d));
    f(Part{{b.slices.of.index + at, nullptr, 1, R, 1}, {.data = d, .stride_r = b.O, .stride_n = 1}, at, R});
  }
}

// The slices of all adapters as a pool of multi-LoRA: whole pages each, zeros past their columns.
struct Pool {
  Tensor rows, pages, ranks, plan;
  Adapters adapters;
  int64_t P;  // columns an adapter
};
Pool pool_of(const Beside& b) {
  const SliceIndex& s = b.slices.of;
  const int64_t M = ceil_div(int64_t{s.s}, int64_t{kPageRanks}), P = M * kPageRanks;
  Tensor rows = b.d;
  if (P != s.s) {
    rows = new_empty(b.d, Sizes{s.A, P, b.O});
    torch::stable::zero_(rows);
    Tensor mine = torch::stable::narrow(rows, 1, 0, s.s);
    torch::stable::copy_(mine, b.d);
  }
  const PlanLayout layout = plan_layout(b.x.T, s.A);
  Pool pool{rows,
            new_empty(b.d, Sizes{s.A, 1, M}, ScalarType::Int),
            new_empty(b.d, Sizes{s.A, 1}, ScalarType::Int),
            new_empty(b.d, Sizes{s.K, layout.length}, ScalarType::Int),
            {},
            P};
  const auto data = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  run(b.x.op, b.x.tensor, SlicePagesParams{data(pool.pages), data(pool.ranks), s.A, M, s.s}, LRK_RUN(slice_pages));
  run(b.x.op, b.x.tensor, MultiLoraPlanParams{.index = s.ids, .plan = data(pool.plan), .T = b.x.T, .K = s.K, .A = s.A},
      LRK_RUN(multi_lora_plan));
  pool.adapters = {.pages = data(pool.pages),
                   .ranks = data(pool.ranks),
                   .plan = data(pool.plan),
                   .T = b.x.T,
                   .K = s.K,
                   .A = s.A,
                   .L = 1,
                   .M = M,
                   .P = s.A * P,
                   .first = 0,
                   .slices = 1,
                   .dropout_p = nullptr,
                   .seed = nullptr};
  return pool;
}
bool is_empty(const Beside& b) { return !b.x.T || !b.O || !b.slices.of.s || !b.slices.of.A; }

// H of a part, or of a pool, in the type that LoRA's kernels take beside d.
Tensor gathered(const Beside& b, const SliceIndex& of, int64_t P) {
  const Tensor h = new_empty(b.d, Sizes{b.x.T, of.K, P}, b.h_type);
  gather(b.x, of, b.slices.scales, h, P);
  return h;
}

// y, which may be base itself.
void multiply(const Rows& y, const Rows& base, const Beside& b) {
  if (b.slices.of.ids) {
    const Pool pool = pool_of(b);
    const Tensor h = gathered(b, b.slices.of, pool.P);
    run(y.op, y.tensor,
        MultiLoraExpandParams{.adapters = pool.adapters,
                              .y = y.mutable_data(),
                              .base = base.data(),
                              .s = h.const_data_ptr(),
                              .pool = pool.rows.const_data_ptr(),
                              .N = b.O,
                              .y_pitch = y.pitch,
                              .base_pitch = base.pitch,
                              .dtype = y.dtype,
                              .factor_dtype = dtype_of(b.d)},
        LRK_RUN(multi_lora_expand));
    return;
  }
  for_each_part(b, [&](const Part& part) {
    const Tensor h = gathered(b, part.of, part.R);
    const Rows& from = part.first ? y : base;
    run(y.op, y.tensor,
        LoraExpandParams{.y = y.mutable_data(),
                         .base = from.data(),
                         .base_scale = nullptr,
                         .bias = nullptr,
                         .s = h.const_data_ptr(),
                         .u = part.factor,
                         .T = y.T,
                         .N = b.O,
                         .y_pitch = y.pitch,
                         .base_pitch = from.pitch,
                         .R = part.R,
                         .dtype = y.dtype,
                         .factor_dtype = dtype_of(b.d),
                         .scale = 1.f,
                         .dropout = {},
                         .seed = nullptr},
        LRK_RUN(lora_expand));
  });
}

void gather_matmul_(Tensor y_, const Tensor& x_, const Tensor& d, const Tensor& index, const OptTensor& ids,
                    const OptTensor& scales) {
  const Arg y{"gather_matmul_", "y", y_}, x{y.op, "x", x_};
  Beside b = check_beside(y, x, d, index, ids, scales);
  b.y = y.rows_in_place();
  if (!is_empty(b)) multiply(b.y, b.y, b);
}
Tensor gather_matmul(const Tensor& y_, const Tensor& x_, const Tensor& d, const Tensor& index, const OptTensor& ids,
                     const OptTensor& scales) {
  const Arg y{"gather_matmul", "y", y_}, x{y.op, "x", x_};
  const Beside b = check_beside(y, x, d, index, ids, scales);
  Tensor out = new_like(y_);
  if (is_empty(b))
    torch::stable::copy_(out, y_);
  else
    multiply(rows_of(y.op, out), b.y, b);
  return out;
}

// dx = scatter(dy d^T), dd = gather(x)^T dy.
std::tuple<Tensor, Tensor> gather_matmul_bwd(const Tensor& dy_, const Tensor& x_, const Tensor& d, const Tensor& index,
                                             const OptTensor& ids, const OptTensor& scales, bool need_dx,
                                             bool need_dd) {
  const Arg dy{"gather_matmul (backward)", "dy", dy_}, x{dy.op, "x", x_};
  const Beside b = check_beside(dy, x, d, index, ids, scales);
  const Tensor dx = need_dx ? new_zeros(x_) : nothing();
  Tensor dd = need_dd ? new_zeros(b.d) : nothing();
  if (is_empty(b)) return {dx, dd};
  const DType factor = dtype_of(b.d);
  const auto add_to_dx = [&](const SliceIndex& of, const Tensor& dh, int64_t P) {
    scatter(rows_of(dy.op, dx), of, nullptr, dh, P);
  };
  if (b.slices.of.ids) {
    const Pool pool = pool_of(b);
    if (need_dx) {
      const Tensor dh = new_empty(b.d, Sizes{b.x.T, b.slices.of.K, pool.P}, b.h_type);
      run(dy.op, dy_,
          MultiLoraShrinkParams{.adapters = pool.adapters,
                                .x = b.y.data(),
                                .pool = pool.rows.const_data_ptr(),
                                .s = dh.mutable_data_ptr(),
                                .scales = b.slices.scales,
                                .N = b.O,
                                .x_pitch = b.y.pitch,
                                .dtype = b.y.dtype,
                                .factor_dtype = factor},
          LRK_RUN(multi_lora_shrink));
      add_to_dx(b.slices.of, dh, pool.P);
    }
    if (need_dd) {
      const Tensor h = gathered(b, b.slices.of, pool.P);
      Tensor g = pool.P == b.slices.of.s ? dd : new_zeros(pool.rows);
      run(dy.op, dy_,
          MultiLoraWgradParams{.adapters = pool.adapters,
                               .s = h.const_data_ptr(),
                               .x = b.y.data(),
                               .g = g.mutable_data_ptr(),
                               .N = b.O,
                               .x_pitch = b.y.pitch,
                               .dtype = b.y.dtype,
                               .factor_dtype = factor},
          LRK_RUN(multi_lora_wgrad));
      if (pool.P != b.slices.of.s) torch::stable::copy_(dd, torch::stable::narrow(g, 1, 0, b.slices.of.s));
    }
    return {dx, dd};
  }
  for_each_part(b, [&](const Part& part) {
    if (need_dx) {
      const Tensor dh = new_empty(b.d, Sizes{b.x.T, 1, part.R}, b.h_type);
      run(dy.op, dy_,
          LoraShrinkParams{.x = b.y.data(),
                           .u = part.factor,
                           .s = dh.mutable_data_ptr(),
                           .T = b.y.T,
                           .N = b.O,
                           .x_pitch = b.y.pitch,
                           .R = part.R,
                           .dtype = b.y.dtype,
                           .factor_dtype = factor,
                           .scale = 1.f,
                           .dropout = {},
                           .seed = nullptr},
          LRK_RUN(lora_shrink));
      add_to_dx(part.of, dh, part.R);
    }
    if (!need_dd) return;
    const Tensor h = gathered(b, part.of, part.R);
    run(dy.op, dy_,
        LoraWgradParams{.s = h.const_data_ptr(),
                        .x = b.y.data(),
                        .g = static_cast<char*>(dd.mutable_data_ptr()) + part.first * b.O * size_of(factor),
                        .g_stride_r = b.O,
                        .g_stride_n = 1,
                        .T = b.y.T,
                        .N = b.O,
                        .x_pitch = b.y.pitch,
                        .R = part.R,
                        .dtype = b.y.dtype,
                        .factor_dtype = factor,
                        .scale = 1.f,
                        .dropout = {},
                        .seed = nullptr},
        LRK_RUN(lora_wgrad));
  });
  return {dx, dd};
}

// ---- a linear layer that trains a slice of W: columns where dim is 1, rows where it is 0

struct Trained {
  SliceIndex of;
  bool of_rows;
};
Trained check_trained(const Arg& x, const Tensor& weight, const Tensor& slice_, const Tensor& index_, int64_t dim) {
  if (dim != 0 && dim != 1) fail(x.op, "dim must be 0 (rows of weight) or 1 (columns), got ", dim);
  const int64_t s = index_.dim() ? index_.size(0) : 0;
  const Arg slice{x.op, "slice", slice_};
  const SliceIndex of = check_slices(x, 0, weight.size(dim), index_, std::nullopt, std::nullopt).of;
  if (!on_cuda(x.op, x.tensor) && s && of.index[s - 1] < 0)
    Arg{x.op, "index", index_}.refuse("have a feature of weight in each place, got ", of.index[s - 1], " at ", s - 1);
  slice.factor_of(x);
  dim ? slice.shape("[O, s]", {weight.size(0), s}) : slice.shape("[s, I]", {s, weight.size(1)});
  return {of, dim == 0};
}
void write(const Arg& x, const Tensor& weight, const Tensor& slice_, const Trained& t, int64_t dim) {
  const Tensor slice = as_contiguous(slice_);
  if (!slice.numel()) return;
  run(x.op, x.tensor,
      SliceWriteParams{.w = weight.mutable_data_ptr(),
                       .slice = slice.const_data_ptr(),
                       .index = t.of.index,
                       .rows = slice.size(0),
                       .columns = slice.size(1),
                       .N = weight.size(dim),
                       .w_row = weight.stride(0),
                       .w_column = weight.stride(1),
                       .of_rows = t.of_rows,
                       .dtype = x.dtype(),
                       .slice_dtype = dtype_of(slice)},
      LRK_RUN(slice_write));
}
Tensor as_matrix(const Rows& r) { return seen_as(r.tensor, {r.T, r.N}, {r.pitch, 1}); }
Tensor turned(const Rows& r) { return seen_as(r.tensor, {r.N, r.T}, {1, r.pitch}); }

std::tuple<Tensor, Tensor> forward(const Tensor& x_, Tensor& weight, const OptTensor& bias, const Tensor& slice_,
                                   const Tensor& index, int64_t dim, bool keeps) {
  const Arg x{"slice_linear", "x", x_};
  const Rows rows = x.floats().rows();
  const AtenLinear product(weight);
  product.check(x, bias);
  const Trained t = check_trained(x, weight, slice_, index, dim);
  write(x, weight, slice_, t, dim);
  Tensor h = nothing();
  if (keeps && !t.of_rows) {
    h = new_empty(x_, Sizes{rows.T, t.of.s});
    gather(rows, t.of, nullptr, h, t.of.s);
  }
  return {product.forward(x_, bias), h};
}

std::tuple<Tensor, Tensor> slice_linear_fwd(const Tensor& x, Tensor weight, const OptTensor& bias, const Tensor& slice,
                                            const Tensor& index, int64_t dim) {
  return forward(x, weight, bias, slice, index, dim, true);
}
Tensor slice_linear(const Tensor& x, Tensor weight, const OptTensor& bias, const Tensor& slice, const Tensor& index,
                    int64_t dim) {
  return std::get<0>(forward(x, weight, bias, slice, index, dim, false));
}

// dx = dy W. Of the slice's columns dy^T h, of its rows dy[:, index]^T x.
std::tuple<Tensor, Tensor, Tensor> slice_linear_bwd(const Tensor& dy_, const OptTensor& x_, const Tensor& weight,
                                                    const Tensor& slice, const Tensor& index, const OptTensor& h_,
                                                    int64_t dim, bool need_dx, bool need_dbias, bool need_dslice) {
  const Arg dy{"slice_linear (backward)", "dy", dy_};
  const Rows rows = dy.floats().rows();
  Arg{dy.op, "weight", weight}.strided().on(dy).typed_as(dy).shape("[O, I]", {rows.N, -1});
  const Trained t = check_trained(dy, weight, slice, index, dim);
  const AtenLinear product(weight);
  // W holds the slice, unless another forward wrote another one since, or FSDP gathered W from its shards again.
  if (need_dx) write(dy, weight, slice, t, dim);
  Tensor d = nothing();
  if (need_dslice && !(slice.numel() && rows.T)) {
    d = new_zeros(slice);
  } else if (need_dslice) {
    d = new_empty(dy_, sizes_of(slice));
    if (t.of_rows) {
      if (!x_) fail(dy.op, "x is needed for the gradient of slice where dim is 0, got None");
      const Rows x =
          Arg{dy.op, "x", *x_}.strided().on(dy).typed_as(dy).shape("[..., I]", with_last(dy_, weight.size(1))).rows();
      const Tensor g = new_empty(dy_, Sizes{rows.T, t.of.s});
      gather(rows, t.of, nullptr, g, t.of.s);
      gemm(dy.op, d, turned(rows_of(dy.op, g)), as_matrix(x), std::nullopt);
    } else {
      if (!h_) fail(dy.op, "h is needed for the gradient of slice where dim is 1, got None");
      const Arg h{dy.op, "h", *h_};
      h.strided().on(dy).typed_as(dy).shape("[T, s]", {rows.T, t.of.s});
      gemm(dy.op, d, turned(rows), *h_, std::nullopt);
    }
    d = as_type(d, slice.scalar_type());
  }
  return {need_dx ? product.dx(rows) : nothing(), need_dbias ? product.dbias(rows) : nothing(), d};
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(slice_gather, "(Tensor x, Tensor index, Tensor? ids=None, Tensor? scales=None) -> Tensor")
LRK_OP(scatter_add, "(Tensor y, Tensor h, Tensor index, Tensor? ids=None, Tensor? scales=None) -> Tensor")
LRK_OP(scatter_add_, "(Tensor(a!) y, Tensor h, Tensor index, Tensor? ids=None, Tensor? scales=None) -> ()")
LRK_OP(gather_matmul, "(Tensor y, Tensor x, Tensor d, Tensor index, Tensor? ids=None, Tensor? scales=None) -> Tensor")
LRK_OP(gather_matmul_, "(Tensor(a!) y, Tensor x, Tensor d, Tensor index, Tensor? ids=None, Tensor? scales=None) -> ()")
LRK_OP(gather_matmul_bwd,
       "(Tensor dy, Tensor x, Tensor d, Tensor index, Tensor? ids, Tensor? scales, bool need_dx, bool need_dd) -> "
       "(Tensor dx, Tensor dd)")
LRK_OP(slice_linear, "(Tensor x, Tensor(a!) weight, Tensor? bias, Tensor slice, Tensor index, int dim=1) -> Tensor")
LRK_OP(slice_linear_fwd,
       "(Tensor x, Tensor(a!) weight, Tensor? bias, Tensor slice, Tensor index, int dim=1) -> (Tensor y, Tensor h)")
LRK_OP(slice_linear_bwd,
       "(Tensor dy, Tensor? x, Tensor weight, Tensor slice, Tensor index, Tensor? h, int dim, bool need_dx, bool "
       "need_dbias, bool need_dslice) -> (Tensor dx, Tensor dbias, Tensor dslice)")
