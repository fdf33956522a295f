// SPDX-License-Identifier: Apache-2.0
// Glue of the MoRA family: schemas, checks, panels of tokens, and ATen's products with M. Math: csrc/mora.h, docs/ops.md.
#include "mora.h"

#include "base.h"

namespace lrk::ops {
namespace {

void check_type(const char* op, int64_t type, int64_t rank) {
  if (!is_mora_type(type)) fail(op, "type must be 1, 2, 3, 4 or 6 (there is no 5), got ", type);
  if (type == 6 && rank % 2) fail(op, "rank must be even for type 6, whose rotation is of pairs, got ", rank);
}
int64_t check_features(const char* op, const char* name, int64_t n) {
  return in_range(op, name, n, 0, kMaxMoraFeatures);
}
// Chunks of type 6, each as wide as M, that cover a side of n features.
int64_t chunks_of(int64_t n, int64_t rank) { return ceil_div(n, rank); }

// Of chunks that turn; the first one does not.
Tensor rotation_of(const char* op, const Tensor& like, int64_t chunks, int64_t rank) {
  if (chunks < 2) return nothing();
  Tensor table = new_empty(like, Sizes{2, chunks, rank / 2}, ScalarType::Float);
  run(op, like, MoraRotationParams{static_cast<float*>(table.mutable_data_ptr()), chunks, rank},
      LRK_RUN(mora_rotation));
  return table;
}
const float* data_of(const Tensor& table) {
  return table.defined() ? static_cast<const float*>(table.const_data_ptr()) : nullptr;
}
void fold(const Rows& x, const MoraMap& map, int64_t rank, const Tensor& rotation, const Tensor& h) {
  if (!x.T || !map.slots) return;
  run(x.op, x.tensor,
      MoraFoldParams{.x = x.data(),
                     .h = h.mutable_data_ptr(),
                     .rotation = data_of(rotation),
                     .T = x.T,
                     .x_pitch = x.pitch,
                     .map = map,
                     .rank = static_cast<int32_t>(rank),
                     .dtype = x.dtype,
                     .h_dtype = dtype_of(h)},
      LRK_RUN(mora_fold));
}

// y = base + what h holds; base may be y itself.
void unfold(const Rows& y, const Rows* base, const MoraMap& map, int64_t rank, const Tensor& rotation,
            const Tensor& h) {
  if (!y.T || !y.N || (!map.slots && base && base->data() == y.data())) return;
  run(y.op, y.tensor,
      MoraUnfoldParams{.y = y.mutable_data(),
                       .base = base ? base->data() : nullptr,
                       .h = h.const_data_ptr(),
                       .rotation = data_of(rotation),
                       .T = y.T,
                       .y_pitch = y.pitch,
                       .base_pitch = base ? base->pitch : 0,
                       .map = map,
                       .rank = static_cast<int32_t>(rank),
                       .dtype = y.dtype,
                       .h_dtype = dtype_of(h)},
      LRK_RUN(mora_unfold));
}

// ---- the maps alone

Tensor mora_compress(const Tensor& x_, int64_t rank, int64_t type, bool circular, int64_t chunks, bool adjoint) {
  const Arg x{"mora_compress", "x", x_};
  const Rows rows = x.floats().rows();
  check_type(x.op, type, in_range(x.op, "rank", rank, 1, kMaxMoraFeatures));
  check_features(x.op, "the last dimension of x", rows.N);
  if (type != 6 && chunks) fail(x.op, "chunks must be 0 but for type 6, got ", chunks);
  const int64_t n = type != 6 ? 1 : chunks ? chunks : chunks_of(rows.N, rank);
  check_features(x.op, "chunks times rank", in_range(x.op, "chunks", n, 0, kMaxMoraFeatures) * rank);
  Tensor h = new_empty(x_, type == 6 ? with_last(x_, {n, rank}) : with_last(x_, rank), s_type(x.type()));
  if (adjoint) {
    fold(rows, mora_output_map(type, rows.N, rank, n), rank, nothing(), h);
  } else {
    const Tensor rotation = type == 6 ? rotation_of(x.op, x_, n, rank) : nothing();
    fold(rows, mora_input_map(type, rows.N, rank, n, circular), rank, rotation, h);
  }
  return h;
}

// What h has: [..., r], or for type 6 [..., n, r].
struct Slots {
  Tensor tensor;
  int64_t rank, chunks, dims;
};
Slots slots_of(const Arg& h, int64_t type) {
  const int64_t dims = type == 6 ? 2 : 1, given = h.floats().tensor.dim();
  if (given < dims) h.refuse("have at least ", dims, dims > 1 ? " dimensions" : " dimension", ", got ", given);
  const int64_t rank = h.last(), n = type == 6 ? h.tensor.size(given - 2) : 1;
  if (rank < 1) h.refuse("have a rank of at least 1 as its last dimension, got ", rank);
  check_type(h.op, type, rank);
  check_features(h.op, "chunks times rank", check_features(h.op, "chunks", n) * rank);
  return {as_contiguous(h.tensor), rank, n, dims};
}
void decompress(const Rows& y, const Rows* base, const Slots& h, int64_t type, bool circular, bool adjoint) {
  if (adjoint) {
    const Tensor rotation = type == 6 ? rotation_of(y.op, y.tensor, h.chunks, h.rank) : nothing();
    unfold(y, base, mora_input_map(type, y.N, h.rank, h.chunks, circular), h.rank, rotation, h.tensor);
  } else {
    unfold(y, base, mora_output_map(type, y.N, h.rank, h.chunks), h.rank, nothing(), h.tensor);
  }
}

Tensor mora_decompress(const Tensor& h_, int64_t features, int64_t type, bool circular, bool adjoint) {
  const Arg h{"mora_decompress", "h", h_};
  const Slots slots = slots_of(h, type);
  check_features(h.op, "out_features", features);
  const Tensor y = new_empty(h_, with_last(h_, {features}, slots.dims));
  decompress(rows_of(h.op, y), nullptr, slots, type, circular, adjoint);
  return y;
}

void mora_decompress_(Tensor y_, const Tensor& h_, int64_t type, bool circular, bool adjoint) {
  const Arg y{"mora_decompress_", "y", y_}, h{y.op, "h", h_};
  const Rows rows = y.floats().rows_in_place();
  check_features(y.op, "the last dimension of y", rows.N);
  const Slots slots = slots_of(h, type);
  h.factor_of(y);
  Sizes sizes = with_last(y_, slots.rank);
  if (type == 6) sizes.insert(sizes.end() - 1, slots.chunks);
  h.shape(type == 6 ? "[..., n, r]" : "[..., r]", sizes);
  decompress(rows, &rows, slots, type, circular, adjoint);
}

// ---- M beside activations of I and O features

struct Adapter {
  const char* op;
  int64_t rank, chunks;
  MoraMap in, out;
  Tensor m, rotation;
  ScalarType type;  // of M as given
  ScalarType h_type;

  int64_t slots() const { return in.slots; }
  // M in a dtype that products are made in.
  Tensor as(ScalarType t) const { return as_type(m, t); }
  Tensor new_h(const Tensor& like, int64_t T, ScalarType t) const { return new_empty(like, Sizes{T, slots()}, t); }
};

Adapter check_adapter(const Arg& x, int64_t I, int64_t O, const Tensor& m_, const Arg& like, int64_t type,
                      bool circular) {
  const Arg m{x.op, "m", m_};
  m.factor_of(like).shape("[r, r]", {-1, m_.dim() ? m_.size(0) : -1});
  const int64_t r = m_.size(0);
  if (r < 1) m.refuse("have a rank of at least 1, got ", r);
  check_type(x.op, type, r);
  check_features(x.op, "r", r), check_features(x.op, "the last dimension of x", I);
  check_features(x.op, "the last dimension of y", O);
  const int64_t chunks = type == 6 ? std::min(chunks_of(I, r), chunks_of(O, r)) : 1;
  Tensor rotation = type == 6 ? rotation_of(x.op, x.tensor, chunks, r) : nothing();
  return {x.op,
          r,
          chunks,
          mora_input_map(type, I, r, chunks, circular),
          mora_output_map(type, O, r, chunks),
          as_contiguous(m_),
          rotation,
          m.type(),
          s_type(m.type())};
}

// Rows [begin, begin + count) of T.
Rows panel_of(const Rows& t, int64_t begin, int64_t count) {
  if (begin == 0 && count == t.T) return t;
  const Tensor whole = t.tensor.dim() == 2 ? t.tensor : seen_as(t.tensor, {t.T, t.N}, {t.pitch, 1});
  return {t.op, torch::stable::narrow(const_cast<Tensor&>(whole), 0, begin, count), t.dtype, count, t.N, t.pitch};
}
template <class F>
void for_each_panel(const Rows& x, const Adapter& a, const F& f) {
  int64_t rows = x.T;
  if (a.chunks > 1) rows = choose_mora_rows(a.slots(), DeviceScope(x.op, x.tensor).target);
  for (int64_t t = 0; t < x.T; t += rows) f(t, std::min(rows, x.T - t));
}
int64_t panels_of(const Rows& x, const Adapter& a) {
  int64_t n = 0;
  for_each_panel(x, a, [&](int64_t, int64_t) { ++n; });
  return n;
}

// H [T, P] or activations of as many columns, as the T P / r rows that M multiplies.
Tensor chunk_rows(const Tensor& t, const Adapter& a) { return seen_as(t, {t.numel() / a.rank, a.rank}, {a.rank, 1}); }
Tensor transposed(const Tensor& t) { return seen_as(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)}); }
// Whether y's rows are those of H: cycles of one round, of the same numbers.
bool is_h(const Rows& y, const MoraMap& map, ScalarType h) {
  return !map.blocks && map.slots == y.N && y.pitch == y.N && y.tensor.scalar_type() == h;
}

// y = base + unfold(h M^T), of one panel.
void expand(const Rows& y, const Rows& base, const Adapter& a, const Tensor& h) {
  const ScalarType t = h.scalar_type();
  const Tensor rows = chunk_rows(h, a), m = transposed(a.as(t));
  if (is_h(y, a.out, t) && is_h(base, a.out, t))
    return gemm(a.op, chunk_rows(y.tensor, a), rows, m, chunk_rows(base.tensor, a));
  const Tensor z = new_empty(h, sizes_of(rows));
  gemm(a.op, z, rows, m, std::nullopt);
  unfold(y, &base, a.out, a.rank, nothing(), z);
}

// Folds, multiplies and adds to y, which may be base itself; the fold where it is kept for backward, that is of one panel.
Tensor add_to(const Rows& y, const Rows& base, const Rows& x, const Adapter& a, bool keeps) {
  if (!a.slots()) {
    if (y.data() != base.data()) unfold(y, &base, a.out, a.rank, nothing(), a.m);
    return nothing();
  }
  Tensor h;
  for_each_panel(x, a, [&](int64_t t, int64_t count) {
    if (!h.defined() || h.size(0) != count) h = a.new_h(x.tensor, count, a.h_type);
    fold(panel_of(x, t, count), a.in, a.rank, a.rotation, h);
    const Rows to = panel_of(y, t, count);
    expand(to, y.data() == base.data() ? to : panel_of(base, t, count), a, h);
  });
  return keeps ? h : nothing();
}

// dM = G^T H and dX = base + unfold(G M) for G = fold(dY), of all tokens: panel by panel, in order. H is kept from the forward
// pass, or folded again of x. dx is null where nobody asks for it.
Tensor gradients(const Rows& dy, const Rows* x, const Adapter& a, const OptTensor& kept, const Rows* dx, bool adds,
                 bool need_dm) {
  if (!a.slots() || !dy.T) {
    if (dx && !adds && dx->T) unfold(*dx, nullptr, a.in, a.rank, nothing(), a.m);
    return need_dm ? new_zeros(a.m) : nothing();
  }
  // Sums of several panels are fp32, rounded once.
  const bool one = panels_of(dy, a) == 1;
  const ScalarType t = one ? a.h_type : ScalarType::Float;
  Tensor dm = need_dm ? new_empty(a.m, Sizes{a.rank, a.rank}, t) : nothing(), h, g, m = dx ? a.as(t) : nothing();
  for_each_panel(dy, a, [&](int64_t at, int64_t count) {
    const Rows d = panel_of(dy, at, count);
    Tensor mine;
    if (is_h(d, a.out, t)) {
      mine = d.tensor;
    } else {
      if (!g.defined() || g.size(0) != count) g = a.new_h(a.m, count, t);
      fold(d, a.out, a.rank, nothing(), g);
      mine = g;
    }
    const Tensor rows = chunk_rows(mine, a);
    if (need_dm) {
      if (!kept) {
        if (!h.defined() || h.size(0) != count) h = a.new_h(a.m, count, t);
        fold(panel_of(*x, at, count), a.in, a.rank, a.rotation, h);
      }
      gemm(a.op, dm, transposed(rows), chunk_rows(kept ? *kept : h, a), at ? OptTensor(dm) : std::nullopt);
    }
    if (!dx) return;
    if (kept || !h.defined() || h.size(0) != count) h = a.new_h(a.m, count, t);  // H has served
    gemm(a.op, chunk_rows(h, a), rows, m, std::nullopt);
    const Rows to = panel_of(*dx, at, count);
    unfold(to, adds ? &to : nullptr, a.in, a.rank, a.rotation, h);
  });
  return as_type(dm, a.type);
}

// ---- beside a linear layer

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x_, const Tensor& weight, const OptTensor& bias,
                                          const Tensor& m, int64_t type, bool circular, bool keeps) {
  const Arg x{"mora_linear", "x", x_};
  const Rows rows = x.floats().rows();
  const AtenLinear product(weight);
  product.check(x, bias);
  const Adapter a = check_adapter(x, rows.N, product.out_features(), m, x, type, circular);
  const Tensor y = product.forward(x_, bias);
  const Rows out = rows_of(x.op, y);
  Tensor h = add_to(out, out, rows, a, keeps && type != 6);
  if (keeps && type != 6 && !h.defined()) h = a.new_h(x_, rows.T, a.h_type);
  return {y, h};
}

std::tuple<Tensor, Tensor> mora_linear_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                           const Tensor& m, int64_t type, bool circular) {
  return linear_forward(x, weight, bias, m, type, circular, true);
}
Tensor mora_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& m, int64_t type,
                   bool circular) {
  return std::get<0>(linear_forward(x, weight, bias, m, type, circular, false));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mora_linear_bwd(const Tensor& dy_, const OptTensor& x_, const Tensor& weight,
                                                           const Tensor& m, const OptTensor& h, int64_t type,
                                                           bool circular, bool need_dx, bool need_dw, bool need_dbias,
                                                           bool need_dm) {
  const Arg dy{"mora_linear (backward)", "dy", dy_};
  const Rows rows = dy.floats().rows();
  Arg{dy.op, "weight", weight}.strided().on(dy).typed_as(dy).shape("[O, I]", {rows.N, -1});
  const int64_t I = weight.size(1);
  const Adapter a = check_adapter(dy, I, rows.N, m, dy, type, circular);
  std::optional<Rows> x;
  if (x_) x = Arg{dy.op, "x", *x_}.strided().on(dy).typed_as(dy).shape("[..., I]", with_last(dy_, I)).rows();
  if (need_dw && !x) fail(dy.op, "x is needed for the gradient of weight, got None");
  OptTensor kept;
  if (h && type != 6) {
    const Arg arg{dy.op, "h", *h};
    kept = as_contiguous(arg.strided().on(dy).is(a.h_type).shape("[T, r]", {rows.T, a.rank}).tensor);
  }
  if (need_dm && !kept && !x) fail(dy.op, "x or h is needed for the gradient of m, got None");
  const AtenLinear product(weight);
  Tensor dx = nothing();
  std::optional<Rows> to;
  if (need_dx) {
    dx = product.dx(rows);
    to = rows_of(dy.op, dx);
  }
  const Tensor dm = gradients(rows, x ? &*x : nullptr, a, kept, to ? &*to : nullptr, true, need_dm);
  return {dx, need_dw ? product.dw(rows, *x) : nothing(), need_dbias ? product.dbias(rows) : nothing(), dm};
}

// ---- beside a base layer of any kind, whose result y is

struct Beside {
  Rows y, x;
  Adapter a;
};
Beside check_beside(const Arg& y, const Arg& x, const Tensor& m_, int64_t type, bool circular) {
  x.floats(), y.floats();
  const Rows rows = x.rows();
  const Arg m{x.op, "m", m_};
  m.factor_of(x);
  y.on(x).shape("[..., O]", with_last(x.tensor, y.tensor.dim() ? y.last() : -1));
  return {y.rows(), rows, check_adapter(x, rows.N, y.last(), m_, y, type, circular)};
}

Tensor mora_add(const Tensor& y_, const Tensor& x_, const Tensor& m, int64_t type, bool circular) {
  const Beside b = check_beside({"mora_add", "y", y_}, {"mora_add", "x", x_}, m, type, circular);
  const Tensor out = new_like(y_);
  add_to(rows_of(b.y.op, out), b.y, b.x, b.a, false);
  return out;
}

std::tuple<Tensor, Tensor> mora_add_bwd(const Tensor& dy_, const Tensor& x_, const Tensor& m, int64_t type,
                                        bool circular, bool need_dx, bool need_dm) {
  constexpr const char* op = "mora_add (backward)";
  const Beside b = check_beside({op, "dy", dy_}, {op, "x", x_}, m, type, circular);
  Tensor dx = need_dx ? new_like(x_) : nothing();
  std::optional<Rows> to;
  if (need_dx) to = rows_of(op, dx);
  const Tensor dm = gradients(b.y, &b.x, b.a, std::nullopt, to ? &*to : nullptr, false, need_dm);
  return {dx, dm};
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(mora_compress,
       "(Tensor x, int rank, int type=1, bool circular=True, int chunks=0, bool adjoint=False) -> Tensor")
LRK_OP(mora_decompress, "(Tensor h, int out_features, int type=1, bool circular=True, bool adjoint=False) -> Tensor")
LRK_OP(mora_decompress_, "(Tensor(a!) y, Tensor h, int type=1, bool circular=True, bool adjoint=False) -> ()")
LRK_OP(mora_linear, "(Tensor x, Tensor weight, Tensor? bias, Tensor m, int type=1, bool circular=True) -> Tensor")
LRK_OP(mora_linear_fwd,
       "(Tensor x, Tensor weight, Tensor? bias, Tensor m, int type=1, bool circular=True) -> (Tensor y, Tensor h)")
LRK_OP(
    mora_linear_bwd,
    "(Tensor dy, Tensor? x, Tensor weight, Tensor m, Tensor? h, int type, bool circular, bool need_dx, bool need_dw, "
    "bool need_dbias, bool need_dm) -> (Tensor dx, Tensor dw, Tensor dbias, Tensor dm)")
LRK_OP(mora_add, "(Tensor y, Tensor x, Tensor m, int type=1, bool circular=True) -> Tensor")
LRK_OP(mora_add_bwd,
       "(Tensor dy, Tensor x, Tensor m, int type, bool circular, bool need_dx, bool need_dm) -> (Tensor dx, Tensor dm)")
