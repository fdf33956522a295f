// SPDX-License-Identifier: Apache-2.0
// Glue of the random bases: schemas, checks, allocation, dispatch. Math and letters: csrc/basis.h, docs/rng.md, docs/ops.md.
#include "basis.h"

#include <algorithm>

#include "base.h"

namespace lrk::ops {
namespace {

using Ints = std::vector<int64_t>;

// The stream's arguments, in the order of the schemas: seed, method, distribution, tensor, first basis.
struct StreamArgs {
  int64_t seed, method, distribution, tensor, first;
};

// `bases` of rows R from `first` on, `tensors` tensors, columns below `columns`: refused where a counter would wrap.
BasisStream check_stream(const char* op, const StreamArgs& s, int64_t R, int64_t bases, int64_t tensors,
                         int64_t columns) {
  if (s.seed < 0) fail(op, "seed must lie in [0, 2^63), got ", s.seed);
  in_range(op, "method", s.method, 0, 64);
  in_range(op, "distribution", s.distribution, static_cast<int64_t>(Distribution::kUniform8),
           static_cast<int64_t>(Distribution::kTernary4) + 1);
  in_range(op, "tensor", s.tensor, 0, kMaxTensors - tensors + 1);
  in_range(op, "first", s.first, 0, kMaxBases + 1);
  const BasisStream u{.seed = static_cast<uint64_t>(s.seed),
                      .tensor = static_cast<uint32_t>(s.tensor),
                      .basis0 = static_cast<uint32_t>(s.first),
                      .method = static_cast<Method>(s.method),
                      .distribution = static_cast<Distribution>(s.distribution)};
  if (bases > kMaxBases - s.first)
    fail(op, "first must leave all bases below 2^16, got ", bases, " bases from ", s.first, " on");
  if (R > kMaxRows) fail(op, "rows must be at most 2^32, got ", R);
  if (columns > kMaxBlocks * block_columns(u.distribution))
    fail(op, "columns must stay below 2^32 blocks of ", block_columns(u.distribution), ", got ", columns);
  return u;
}

const float* scale_data(const char* name, const OptTensor& t, int64_t n, const Arg& like) {
  if (!t) return nullptr;
  return Arg{like.op, name, *t}.holds<float>(like).shape("[N]", {n}).contiguous().data<float>();
}

// Rows [q0, q0 + Q) and columns [c0, c0 + C) of U, into `out`.
void fill(const char* op, const Tensor& out, BasisFillParams p) {
  if (!p.Q || !p.C) return;
  p.out = out.mutable_data_ptr();
  run(op, out, p, LRK_RUN(basis_fill));
}

Tensor basis_fill(const Tensor& like_, const OptTensor& row_scale, const OptTensor& col_scale, int64_t seed,
                  int64_t method, int64_t distribution, int64_t tensor, int64_t first, int64_t R, int64_t q0,
                  int64_t c0, int64_t Q, int64_t C, double scale) {
  constexpr const char* op = "basis_fill";
  const Arg like{op, "like", like_};
  like.floats();
  in_range(op, "R", R, 1, kMaxRows + 1);
  for (const auto& [name, n] : {std::pair<const char*, int64_t>{"q0", q0}, {"c0", c0}, {"Q", Q}, {"C", C}})
    in_range(op, name, n, 0, int64_t{1} << 48);
  const BasisStream u =
      check_stream(op, {seed, method, distribution, tensor, first}, R, ceil_div(q0 + Q, R), 1, c0 + C);
  const float k = finite(op, "scale", scale), *cols = scale_data("col_scale", col_scale, C, like);
  Tensor out = new_empty(like_, Sizes{Q, C});
  fill(op, out,
       {.u = u,
        .out = nullptr,
        .row_scale = scale_data("row_scale", row_scale, Q, like),
        .col_scale = cols,
        .R = R,
        .q0 = q0,
        .c0 = c0,
        .Q = Q,
        .C = C,
        .scale = k,
        .dtype = like.dtype()});
  return out;
}

// ---- combine and dot

BasisSegments check_segments(const char* op, const Ints& widths, const Ints& counts,
                             const std::vector<double>& scales) {
  if (widths.empty() || widths.size() > kMaxSegments || counts.size() != widths.size() ||
      scales.size() != widths.size())
    fail(op, "widths, counts and scales must have one entry for each of 1 to ", kMaxSegments, " segments, got ",
         widths.size(), ", ", counts.size(), " and ", scales.size());
  BasisSegments s{.count = static_cast<int32_t>(widths.size()), .begin = {}, .first = {}, .scale = {}};
  for (size_t i = 0; i < widths.size(); ++i) {
    s.begin[i + 1] = s.begin[i] + in_range(op, "widths", widths[i], 0, int64_t{1} << 40);
    s.first[i + 1] = s.first[i] + in_range(op, "counts", counts[i], 0, kMaxBases + 1);
    s.scale[i] = finite(op, "scales", scales[i]);
  }
  return s;
}
int64_t largest(const Ints& v) { return *std::max_element(v.begin(), v.end()); }

Tensor basis_combine(const Tensor& coef_, const OptTensor& base, int64_t seed, int64_t method, int64_t distribution,
                     int64_t tensor, int64_t R, Ints widths, Ints counts, std::vector<double> scales) {
  constexpr const char* op = "basis_combine";
  const BasisSegments s = check_segments(op, widths, counts, scales);
  in_range(op, "R", R, 0, kMaxRows + 1);
  const BasisStream u =
      check_stream(op, {seed, method, distribution, tensor, 0}, R, largest(counts), s.count, largest(widths));
  const Arg coef{op, "coef", coef_};
  const Tensor c = as_contiguous(coef.strided().is(ScalarType::Float).tensor);
  const int64_t K = s.first[s.count], W = s.begin[s.count];
  if (c.dim() < 1 || coef.last() != K)
    coef.refuse("have shape [..., K] = [..., ", K, "], got ", text_of(sizes_of(coef_)));
  OptTensor b;
  if (base) {
    const Arg arg{op, "base", *base};
    b = as_contiguous(arg.on(coef).strided().is(ScalarType::Float).shape("[R, W]", {R, W}).tensor);
  }
  Tensor out = new_empty(coef_, with_last(coef_, {R, W}));
  if (!out.numel()) return out;
  const BasisCombineParams p{.u = u,
                             .segments = s,
                             .coef = static_cast<const float*>(c.const_data_ptr()),
                             .base = b ? static_cast<const float*>(b->const_data_ptr()) : nullptr,
                             .out = static_cast<float*>(out.mutable_data_ptr()),
                             .T = out.numel() / (R * W),
                             .R = R};
  run(op, out, p, LRK_RUN(basis_combine));
  return out;
}

Tensor basis_dot(const Tensor& g_, int64_t seed, int64_t method, int64_t distribution, int64_t tensor, Ints widths,
                 Ints counts, std::vector<double> scales) {
  constexpr const char* op = "basis_dot";
  const BasisSegments s = check_segments(op, widths, counts, scales);
  const Arg g{op, "g", g_};
  const Tensor gc = as_contiguous(g.strided().is(ScalarType::Float).tensor);
  const int64_t K = s.first[s.count], W = s.begin[s.count];
  if (g_.dim() < 2 || g.last() != W)
    g.refuse("have shape [..., R, W] = [..., *, ", W, "], got ", text_of(sizes_of(g_)));
  const int64_t R = g_.size(g_.dim() - 2);
  const BasisStream u =
      check_stream(op, {seed, method, distribution, tensor, 0}, R, largest(counts), s.count, largest(widths));
  Tensor out = new_empty(g_, with_last(g_, {K}, 2));
  if (!out.numel()) return out;
  if (!g_.numel()) return torch::stable::zero_(out);
  const BasisDotParams p{.u = u,
                         .segments = s,
                         .g = static_cast<const float*>(gc.const_data_ptr()),
                         .out = static_cast<float*>(out.mutable_data_ptr()),
                         .T = out.numel() / K,
                         .R = R};
  run(op, out, p, LRK_RUN(basis_dot));
  return out;
}

// ---- matmul

Tensor narrow(Tensor t, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(t, dim, start, length);
}

// U, with both scales in it, in strips in scratch memory, and ATen's GEMM: in the dtype of x and out, or fp32, which an
// fp16 x needs too where there are scales, since their product may leave fp16's range.
void matmul_by_gemm(const char* op, const BasisMatmulParams& p, const BasisMatmulConfig& config, const Tensor& x,
                    const Tensor& out) {
  const bool scaled = p.in_scale || p.out_scale;
  const bool wide = p.x_dtype != p.out_dtype || (scaled && p.x_dtype == DType::kF16);
  const bool wide_out = wide && p.out_dtype != DType::kF32;
  const Tensor flat = torch::stable::reshape(x, Sizes{p.T, x.size(x.dim() - 1)});
  const Tensor a = wide ? torch::stable::to(flat, ScalarType::Float) : flat;
  Tensor scratch = new_empty(a, Sizes{config.rows, config.cols});
  const float *row_scale = p.transposed ? p.out_scale : p.in_scale,
              *col_scale = p.transposed ? p.in_scale : p.out_scale;
  const int64_t all = p.transposed ? p.Q : p.C, step = p.transposed ? config.rows : config.cols;
  for (int64_t i = 0; i < all; i += step) {
    const int64_t n = std::min(step, all - i), q = p.transposed ? i : 0, c = p.transposed ? 0 : i;
    const int64_t Q = p.transposed ? n : p.Q, C = p.transposed ? p.C : n;
    Tensor strip = torch::stable::reshape(narrow(torch::stable::flatten(scratch, 0, 1), 0, 0, Q * C), Sizes{Q, C});
    fill(op, strip,
         {.u = p.u,
          .out = nullptr,
          .row_scale = row_scale ? row_scale + q : nullptr,
          .col_scale = col_scale ? col_scale + c : nullptr,
          .R = p.R,
          .q0 = q,
          .c0 = c,
          .Q = Q,
          .C = C,
          .scale = 1.f,
          .dtype = wide ? DType::kF32 : p.x_dtype});
    if (p.transposed) strip = torch::stable::transpose(strip, 0, 1);
    Tensor target = narrow(out, 1, i, n), sum = wide_out ? torch::stable::to(target, ScalarType::Float) : target;
    gemm(op, sum, a, strip, p.add ? OptTensor(sum) : std::nullopt);
    if (wide_out) torch::stable::copy_(target, sum);
  }
}

struct Stack {
  int64_t R, Q, C;
  bool transposed;

  int64_t in() const { return transposed ? C : Q; }
  int64_t out() const { return transposed ? Q : C; }
};

void check_stack(const Arg& x, const Stack& s) {
  in_range(x.op, "R", s.R, 1, kMaxRows + 1);
  in_range(x.op, "Q", s.Q, 0, int64_t{1} << 48);
  in_range(x.op, "C", s.C, 0, int64_t{1} << 48);
  if (x.tensor.dim() < 1 || x.last() != s.in())
    x.refuse("have shape [..., ", s.transposed ? 'C' : 'Q', "] = [..., ", s.in(), "], got ",
             text_of(sizes_of(x.tensor)));
}

// x [..., N] times the stack, into out, whose rows the caller made.
void matmul(const Arg& x, const Tensor& out, const OptTensor& in_scale, const OptTensor& out_scale,
            const StreamArgs& stream, const Stack& s, bool add) {
  x.floats();
  const Rows rows = x.rows(), y = rows_of(x.op, out);
  const BasisStream u = check_stream(x.op, stream, s.R, ceil_div(s.Q, s.R), 1, s.C);
  const float* in = scale_data("in_scale", in_scale, s.in(), x);
  const BasisMatmulParams p{.u = u,
                            .x = rows.data(),
                            .out = y.mutable_data(),
                            .in_scale = in,
                            .out_scale = scale_data("out_scale", out_scale, s.out(), x),
                            .T = rows.T,
                            .R = s.R,
                            .Q = s.Q,
                            .C = s.C,
                            .x_pitch = rows.pitch,
                            .out_pitch = y.pitch,
                            .transposed = s.transposed,
                            .add = add,
                            .x_dtype = rows.dtype,
                            .out_dtype = y.dtype};
  if (!out.numel()) return;
  const Target target = DeviceScope(x.op, x.tensor).target;
  constexpr void (*no_cpu)(const BasisMatmulParams&, void*) = nullptr;
  if (choose_basis_product(p, target))
    return run(x.op, x.tensor, p, basis_product_workspace, no_cpu, LRK_IF_CUDA(basis_product_cuda));
  const BasisMatmulConfig config = choose_basis_matmul(p.T, s.Q, s.C, s.transposed, target);
  if (config.scratch && s.Q && s.C)
    return matmul_by_gemm(x.op, p, config, rows.tensor, torch::stable::view(y.tensor, Sizes{y.T, y.N}));
  run(x.op, x.tensor, p, LRK_RUN(basis_matmul));
}

Tensor basis_matmul(const Tensor& x_, const OptTensor& in_scale, const OptTensor& out_scale, int64_t seed,
                    int64_t method, int64_t distribution, int64_t tensor, int64_t first, int64_t R, int64_t Q,
                    int64_t C, bool transposed, bool fp32) {
  const Arg x{"basis_matmul", "x", x_};
  const Stack stack{R, Q, C, transposed};
  check_stack(x, stack);
  x.floats();
  Tensor out = new_empty(x_, with_last(x_, stack.out()), fp32 ? ScalarType::Float : x.type());
  matmul(x, out, in_scale, out_scale, {seed, method, distribution, tensor, first}, stack, false);
  return out;
}

void basis_matmul_(Tensor y_, const Tensor& x_, const OptTensor& in_scale, const OptTensor& out_scale, int64_t seed,
                   int64_t method, int64_t distribution, int64_t tensor, int64_t first, int64_t R, int64_t Q, int64_t C,
                   bool transposed) {
  const Arg x{"basis_matmul_", "x", x_}, y{x.op, "y", y_};
  const Stack stack{R, Q, C, transposed};
  check_stack(x, stack);
  y.floats().on(x).shape(transposed ? "[..., Q]" : "[..., C]", with_last(x_, stack.out()));
  if (!y_.is_contiguous()) y.refuse("be contiguous, since it is written in place, got strides");
  matmul(x, y_, in_scale, out_scale, {seed, method, distribution, tensor, first}, stack, true);
}

}  // namespace
}  // namespace lrk::ops

#define LRK_STREAM "int seed, int method, int distribution, int tensor"

LRK_OP(basis_fill, "(Tensor like, Tensor? row_scale, Tensor? col_scale, " LRK_STREAM
                   ", int first, int R, int q0, int c0, int Q, int C, float scale=1.0) -> Tensor")
LRK_OP(basis_combine,
       "(Tensor coef, Tensor? base, " LRK_STREAM ", int R, int[] widths, int[] counts, float[] scales) -> Tensor")
LRK_OP(basis_dot, "(Tensor g, " LRK_STREAM ", int[] widths, int[] counts, float[] scales) -> Tensor")
LRK_OP(basis_matmul, "(Tensor x, Tensor? in_scale, Tensor? out_scale, " LRK_STREAM
                     ", int first, int R, int Q, int C, bool transposed, bool fp32=False) -> Tensor")
LRK_OP(basis_matmul_, "(Tensor(a!) y, Tensor x, Tensor? in_scale, Tensor? out_scale, " LRK_STREAM
                      ", int first, int R, int Q, int C, bool transposed) -> ()")
