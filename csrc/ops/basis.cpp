// SPDX-License-Identifier: Apache-2.0
// Glue of the random bases: schemas, checks, allocation, dispatch. Math and letters: csrc/basis.h, docs/rng.md, docs/ops.md.
#include "basis.h"

#include "linear.h"

extern "C" {
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                        AtenTensorHandle mat2, double beta, double alpha);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
}

namespace lrk::ops {
namespace {

using Ints = std::vector<int64_t>;

// The stream's arguments, in the order of the schemas: seed, method, distribution, tensor, first basis.
struct StreamArgs {
  int64_t seed, method, distribution, tensor, first;
};
void check_range(const char* op, const char* arg, int64_t value, int64_t low, int64_t end) {
  if (value < low || value >= end) fail(op, arg, " must lie in [", low, ", ", end, "), got ", value);
}

// `bases` of rows R from `first` on, `tensors` tensors, columns below `columns`: refused where a counter would wrap.
BasisStream check_stream(const char* op, const StreamArgs& s, int64_t R, int64_t bases, int64_t tensors,
                         int64_t columns) {
  if (s.seed < 0) fail(op, "seed must lie in [0, 2^63), got ", s.seed);
  check_range(op, "method", s.method, 0, 64);
  check_range(op, "distribution", s.distribution, static_cast<int64_t>(Distribution::kUniform8),
              static_cast<int64_t>(Distribution::kTernary4) + 1);
  const BasisStream u{static_cast<uint64_t>(s.seed), static_cast<uint32_t>(s.tensor), static_cast<uint32_t>(s.first),
                      static_cast<Method>(s.method), static_cast<Distribution>(s.distribution)};
  check_range(op, "tensor", s.tensor, 0, kMaxTensors - tensors + 1);
  check_range(op, "first", s.first, 0, kMaxBases + 1);
  if (bases > kMaxBases - s.first)
    fail(op, "first must leave all bases below 2^16, got ", bases, " bases from ", s.first, " on");
  if (R > kMaxRows) fail(op, "rows must be at most 2^32, got ", R);
  if (columns > kMaxBlocks * block_columns(u.distribution))
    fail(op, "columns must stay below 2^32 blocks of ", block_columns(u.distribution), ", got ", columns);
  return u;
}

const float* scale_data(const char* op, const char* arg, const OptTensor& t, int64_t n, const Tensor& like,
                        const char* like_arg) {
  if (!t) return nullptr;
  check_strided(op, arg, *t);
  check_dtype(op, arg, *t, ScalarType::Float);
  check_device(op, arg, *t, like, like_arg);
  check_shape(op, arg, *t, "[N]", {n});
  if (!t->is_contiguous()) fail(op, arg, " must be contiguous, got strides");
  return static_cast<const float*>(t->const_data_ptr());
}

void fill(const char* op, const Tensor& out, DType dtype, const BasisStream& u, int64_t R, int64_t q0, int64_t c0,
          int64_t Q, int64_t C, const float* row_scale, const float* col_scale, float scale) {
  if (!Q || !C) return;
  const BasisFillParams p{u, out.mutable_data_ptr(), row_scale, col_scale, R, q0, c0, Q, C, scale, dtype};
  run(op, out, p, basis_fill_workspace, basis_fill_cpu, LRK_LAUNCHER(basis_fill_cuda));
}

Tensor basis_fill(const Tensor& like, const OptTensor& row_scale, const OptTensor& col_scale, int64_t seed,
                  int64_t method, int64_t distribution, int64_t tensor, int64_t first, int64_t R, int64_t q0,
                  int64_t c0, int64_t Q, int64_t C, double scale) {
  constexpr const char* op = "basis_fill";
  const DType dtype = check_x(op, "like", like);
  check_range(op, "R", R, 1, kMaxRows + 1);
  for (const auto& [name, n] : {std::pair<const char*, int64_t>{"q0", q0}, {"c0", c0}, {"Q", Q}, {"C", C}})
    check_range(op, name, n, 0, int64_t{1} << 48);
  const BasisStream u =
      check_stream(op, {seed, method, distribution, tensor, first}, R, ceil_div(q0 + Q, R), 1, c0 + C);
  Tensor out = torch::stable::new_empty(like, Sizes{Q, C});
  fill(op, out, dtype, u, R, q0, c0, Q, C, scale_data(op, "row_scale", row_scale, Q, like, "like"),
       scale_data(op, "col_scale", col_scale, C, like, "like"), check_finite(op, "scale", scale));
  return out;
}

// ---- combine and dot

BasisSegments check_segments(const char* op, const Ints& widths, const Ints& counts,
                             const std::vector<double>& scales) {
  if (widths.empty() || widths.size() > kMaxSegments || counts.size() != widths.size() ||
      scales.size() != widths.size())
    fail(op, "widths, counts and scales must have one entry for each of 1 to ", kMaxSegments, " segments, got ",
         widths.size(), ", ", counts.size(), " and ", scales.size());
  BasisSegments s{};
  s.count = static_cast<int32_t>(widths.size());
  for (size_t i = 0; i < widths.size(); ++i) {
    check_range(op, "widths", widths[i], 0, int64_t{1} << 40);
    check_range(op, "counts", counts[i], 0, kMaxBases + 1);
    s.begin[i + 1] = s.begin[i] + widths[i];
    s.first[i + 1] = s.first[i] + counts[i];
    s.scale[i] = check_finite(op, "scales", scales[i]);
  }
  return s;
}
template <class T>
T largest(const std::vector<T>& v) {
  return *std::max_element(v.begin(), v.end());
}
Tensor check_f32(const char* op, const char* arg, const Tensor& t) {
  check_strided(op, arg, t);
  check_dtype(op, arg, t, ScalarType::Float);
  return as_contiguous(t);
}

Tensor basis_combine(const Tensor& coef, const OptTensor& base, int64_t seed, int64_t method, int64_t distribution,
                     int64_t tensor, int64_t R, Ints widths, Ints counts, std::vector<double> scales) {
  constexpr const char* op = "basis_combine";
  const BasisSegments s = check_segments(op, widths, counts, scales);
  check_range(op, "R", R, 0, kMaxRows + 1);
  const BasisStream u =
      check_stream(op, {seed, method, distribution, tensor, 0}, R, largest(counts), s.count, largest(widths));
  const Tensor c = check_f32(op, "coef", coef);
  const int64_t K = s.first[s.count], W = s.begin[s.count];
  if (coef.dim() < 1 || coef.size(coef.dim() - 1) != K)
    fail(op, "coef must have shape [..., K] = [..., ", K, "], got ", shape_of(coef));
  OptTensor b;
  if (base) {
    check_device(op, "base", *base, coef, "coef");
    b = check_f32(op, "base", *base);
    check_shape(op, "base", *base, "[R, W]", {R, W});
  }
  Sizes sizes = sizes_of(coef);
  int64_t T = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) T *= sizes[i];
  sizes.back() = R;
  sizes.push_back(W);
  Tensor out = torch::stable::new_empty(coef, sizes);
  if (!out.numel()) return out;
  const BasisCombineParams p{u,
                             s,
                             static_cast<const float*>(c.const_data_ptr()),
                             b ? static_cast<const float*>(b->const_data_ptr()) : nullptr,
                             static_cast<float*>(out.mutable_data_ptr()),
                             T,
                             R};
  run(op, out, p, basis_combine_workspace, basis_combine_cpu, LRK_LAUNCHER(basis_combine_cuda));
  return out;
}

Tensor basis_dot(const Tensor& g, int64_t seed, int64_t method, int64_t distribution, int64_t tensor, Ints widths,
                 Ints counts, std::vector<double> scales) {
  constexpr const char* op = "basis_dot";
  const BasisSegments s = check_segments(op, widths, counts, scales);
  const Tensor gc = check_f32(op, "g", g);
  const int64_t K = s.first[s.count], W = s.begin[s.count];
  if (g.dim() < 2 || g.size(g.dim() - 1) != W)
    fail(op, "g must have shape [..., R, W] = [..., *, ", W, "], got ", shape_of(g));
  Sizes sizes = sizes_of(g);
  const int64_t R = sizes[sizes.size() - 2];
  int64_t T = 1;
  for (size_t i = 0; i + 2 < sizes.size(); ++i) T *= sizes[i];
  const BasisStream u =
      check_stream(op, {seed, method, distribution, tensor, 0}, R, largest(counts), s.count, largest(widths));
  sizes.pop_back();
  sizes.back() = K;
  Tensor out = torch::stable::new_empty(g, sizes);
  if (!out.numel()) return out;
  if (!g.numel()) {
    torch::stable::zero_(out);
    return out;
  }
  const BasisDotParams p{
      u, s, static_cast<const float*>(gc.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), T, R};
  run(op, out, p, basis_dot_workspace, basis_dot_cpu, LRK_LAUNCHER(basis_dot_cuda));
  return out;
}

// ---- matmul

Tensor narrow(Tensor t, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(t, dim, start, length);
}

void addmm(const char* op, const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
#if !defined(LRK_EMULATE)
  if (!out.is_cpu()) {
    if (!aoti_torch_cuda_addmm_out) fail(op, "this torch has no addmm for cuda");
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), add ? 1.0 : 0.0, 1.0));
    return;
  }
#endif
  (void)op;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), add ? 1.0 : 0.0, 1.0));
}

// U, with both scales in it, a piece at a time in scratch memory, and ATen's GEMM: in the dtype of x and out, or fp32.
void matmul_by_gemm(const char* op, const BasisMatmulParams& p, const BasisMatmulConfig& config, const Tensor& x,
                    const Tensor& out) {
  const bool wide = p.x_dtype != p.out_dtype;
  const Tensor flat = torch::stable::reshape(x, Sizes{p.T, x.size(x.dim() - 1)});
  const Tensor a = wide ? torch::stable::to(flat, ScalarType::Float) : flat;
  Tensor scratch = torch::stable::new_empty(a, Sizes{config.rows, config.cols});
  const DType dtype = wide ? DType::kF32 : p.x_dtype;
  const bool wide_out = wide && p.out_dtype != DType::kF32;
  const float *row_scale = p.transposed ? p.out_scale : p.in_scale,
              *col_scale = p.transposed ? p.in_scale : p.out_scale;
  const int64_t all = p.transposed ? p.Q : p.C, step = p.transposed ? config.rows : config.cols;
  for (int64_t i = 0; i < all; i += step) {
    const int64_t n = std::min(step, all - i), q = p.transposed ? i : 0, c = p.transposed ? 0 : i;
    const int64_t Q = p.transposed ? n : p.Q, C = p.transposed ? p.C : n;
    Tensor piece = torch::stable::reshape(narrow(torch::stable::flatten(scratch, 0, 1), 0, 0, Q * C), Sizes{Q, C});
    fill(op, piece, dtype, p.u, p.R, q, c, Q, C, row_scale ? row_scale + q : nullptr,
         col_scale ? col_scale + c : nullptr, 1.f);
    if (p.transposed) piece = torch::stable::transpose(piece, 0, 1);
    Tensor target = narrow(out, 1, i, n);
    if (!wide_out) {
      addmm(op, target, a, piece, p.add);
    } else {
      Tensor sum = torch::stable::to(target, ScalarType::Float);
      addmm(op, sum, a, piece, p.add);
      torch::stable::copy_(target, sum);
    }
  }
}

// x [..., N] times the stack, into out, whose rows the caller made.
void matmul(const char* op, const Tensor& x, const Tensor& out, const OptTensor& in_scale, const OptTensor& out_scale,
            const StreamArgs& stream, int64_t R, int64_t Q, int64_t C, bool transposed, bool add) {
  BasisMatmulParams p{};
  p.x_dtype = check_x(op, "x", x);
  p.out_dtype = check_x(op, "y", out);
  const Rows rows = rows_of(op, "x", x), y = rows_of(op, "y", out);
  p.u = check_stream(op, stream, R, ceil_div(Q, R), 1, C);
  p.in_scale = scale_data(op, "in_scale", in_scale, transposed ? C : Q, x, "x");
  p.out_scale = scale_data(op, "out_scale", out_scale, transposed ? Q : C, x, "x");
  p.x = rows.tensor.const_data_ptr();
  p.out = y.tensor.mutable_data_ptr();
  p.T = rows.T, p.R = R, p.Q = Q, p.C = C, p.x_pitch = rows.pitch, p.out_pitch = y.pitch;
  p.transposed = transposed, p.add = add;
  if (!out.numel()) return;
  const BasisMatmulConfig config = choose_basis_matmul(p.T, Q, C, transposed, target_of(op, x));
  if (config.scratch && Q && C)
    return matmul_by_gemm(op, p, config, rows.tensor, torch::stable::view(y.tensor, Sizes{y.T, y.N}));
  run(op, x, p, basis_matmul_workspace, basis_matmul_cpu, LRK_LAUNCHER(basis_matmul_cuda));
}

void check_matmul(const char* op, const Tensor& x, int64_t R, int64_t Q, int64_t C, bool transposed) {
  check_range(op, "R", R, 1, kMaxRows + 1);
  check_range(op, "Q", Q, 0, int64_t{1} << 48);
  check_range(op, "C", C, 0, int64_t{1} << 48);
  const int64_t N = transposed ? C : Q;
  if (x.dim() < 1 || x.size(x.dim() - 1) != N)
    fail(op, "x must have shape [..., ", transposed ? 'C' : 'Q', "] = [..., ", N, "], got ", shape_of(x));
}

Tensor basis_matmul(const Tensor& x, const OptTensor& in_scale, const OptTensor& out_scale, int64_t seed,
                    int64_t method, int64_t distribution, int64_t tensor, int64_t first, int64_t R, int64_t Q,
                    int64_t C, bool transposed, bool fp32) {
  constexpr const char* op = "basis_matmul";
  check_matmul(op, x, R, Q, C, transposed);
  check_x(op, "x", x);
  const Sizes sizes = with_last(x, transposed ? Q : C);
  Tensor out = fp32 ? torch::stable::new_empty(x, sizes, ScalarType::Float) : torch::stable::new_empty(x, sizes);
  matmul(op, x, out, in_scale, out_scale, {seed, method, distribution, tensor, first}, R, Q, C, transposed, false);
  return out;
}

void basis_matmul_(Tensor y, const Tensor& x, const OptTensor& in_scale, const OptTensor& out_scale, int64_t seed,
                   int64_t method, int64_t distribution, int64_t tensor, int64_t first, int64_t R, int64_t Q, int64_t C,
                   bool transposed) {
  constexpr const char* op = "basis_matmul_";
  check_matmul(op, x, R, Q, C, transposed);
  check_x(op, "y", y);
  check_device(op, "y", y, x, "x");
  check_shape(op, "y", y, transposed ? "[..., Q]" : "[..., C]", with_last(x, transposed ? Q : C));
  if (!y.is_contiguous()) fail(op, "y must be contiguous, since it is written in place, got strides");
  matmul(op, x, y, in_scale, out_scale, {seed, method, distribution, tensor, first}, R, Q, C, transposed, true);
}

}  // namespace
}  // namespace lrk::ops

#define LRK_STREAM "int seed, int method, int distribution, int tensor"

STABLE_TORCH_LIBRARY_FRAGMENT(LRK_NAMESPACE, m) {
  m.def("basis_fill(Tensor like, Tensor? row_scale, Tensor? col_scale, " LRK_STREAM
        ", int first, int R, int q0, int c0, int Q, int C, float scale=1.0) -> Tensor");
  m.def("basis_combine(Tensor coef, Tensor? base, " LRK_STREAM
        ", int R, int[] widths, int[] counts, float[] scales) -> Tensor");
  m.def("basis_dot(Tensor g, " LRK_STREAM ", int[] widths, int[] counts, float[] scales) -> Tensor");
  m.def("basis_matmul(Tensor x, Tensor? in_scale, Tensor? out_scale, " LRK_STREAM
        ", int first, int R, int Q, int C, bool transposed, bool fp32=False) -> Tensor");
  m.def("basis_matmul_(Tensor(a!) y, Tensor x, Tensor? in_scale, Tensor? out_scale, " LRK_STREAM
        ", int first, int R, int Q, int C, bool transposed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LRK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("basis_fill", TORCH_BOX(&lrk::ops::basis_fill));
  m.impl("basis_combine", TORCH_BOX(&lrk::ops::basis_combine));
  m.impl("basis_dot", TORCH_BOX(&lrk::ops::basis_dot));
  m.impl("basis_matmul", TORCH_BOX(&lrk::ops::basis_matmul));
  m.impl("basis_matmul_", TORCH_BOX(&lrk::ops::basis_matmul_));
}
