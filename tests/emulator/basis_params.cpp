// SPDX-License-Identifier: Apache-2.0
// Runs every launcher of csrc/basis.h at params level over the emulator, with neither torch nor Python in the process.
// fill must have the very bits of rng.h; sums are compared with sums in double, and a token's row of a matmul with the
// bits it has alone; results must have equal bits under every schedule tried.
#include "basis.h"
#include "dispatch.h"
#include "params.h"

namespace {

using namespace lrk;

// Element (basis k, row, column) of the stack, tensors counted from the first one.
float element(const BasisStream& u, int tensor, int64_t k, int64_t row, int64_t c) {
  const int E = block_columns(u.distribution);
  const Philox block = basis_block(u.seed, u.tag(), u.tensor + static_cast<uint32_t>(tensor),
                                   u.basis0 + static_cast<uint32_t>(k), row, c / E);
  return with_distribution(u.distribution,
                           [&](auto d) { return basis_value<decltype(d)::value>(block, static_cast<int>(c % E)); });
}

struct Case {
  std::string op;
  BasisStream u;
  DType x, out;
  int64_t T, R, Q, C, q0, c0, pad, shift;  // T: also rows of coefficients
  BasisSegments s;
  bool rows_scaled, cols_scaled, add;

  int64_t W() const { return s.begin[s.count]; }
  int64_t K() const { return s.first[s.count]; }
  bool transposed() const { return op.ends_with("transposed"); }
  std::string text() const {
    return words(op, " distribution ", static_cast<int>(u.distribution), " ", lrk::name_of(x), "->", lrk::name_of(out),
                 " T=", T, " R=", R, " Q=", Q, " C=", C, " q0=", q0, " c0=", c0, " pad=", pad, " shift=", shift,
                 " segments=", s.count, " W=", W(), " K=", K(), rows_scaled ? " rows scaled" : "",
                 cols_scaled ? " columns scaled" : "", add ? " add" : "");
  }
};

Case draw_case() {
  const char* ops[] = {"fill", "combine", "dot", "matmul", "transposed", "product", "product transposed"};
  const Distribution distributions[] = {Distribution::kUniform8, Distribution::kUniform16, Distribution::kUniform32,
                                        Distribution::kSign,     Distribution::kTernary6,  Distribution::kTernary4};
  Case c{};
  c.op = ops[draw() % 7];
  c.u = {0x0123456789abcdef + draw(), static_cast<uint32_t>(draw()), static_cast<uint32_t>(draw() % 1000),
         Method::kNola, distributions[draw() % 6]};
  const DType types[] = {DType::kF32, DType::kF16, DType::kBF16};
  c.x = types[draw() % 3], c.out = types[draw() % 3];
  const bool product = c.op.starts_with("product"),
             empty = draw() % 16 == 0 && !product;  // which a GEMM of no terms takes
  c.T = empty ? pick({0, 1}) : product ? pick({1, 17, 128, 130}) : pick({1, 1, 2, 3, 4, 5, 9, 17});
  c.R = empty ? pick({0, 2}) : pick({1, 2, 3, 8, 16});
  c.Q = !c.R ? 0 : empty ? pick({0, 3}) : pick({1, 3, 8, 17, 40, 100});
  c.C = empty ? pick({0, 7}) : pick({1, 5, 16, 48, 128, 130, 520, 1030});
  c.q0 = pick({0, 1, 37}), c.c0 = pick({0, 0, 16, 128, 3, 77});
  c.pad = pick({0, 0, 8, 3}), c.shift = pick({0, 0, 1, 8});
  c.rows_scaled = draw() % 2, c.cols_scaled = draw() % 2, c.add = draw() % 2;
  c.s.count = static_cast<int32_t>(1 + draw() % kMaxSegments);
  const bool tall = c.op == "dot" && !empty && draw() % 3 == 0;  // more rows than there are splits
  if (tall) c.R = pick({150, 256, 300});
  for (int i = 0; i < c.s.count; ++i) {
    c.s.begin[i + 1] = c.s.begin[i] + (tall    ? pick({1, 40, 260})
                                       : empty ? pick({0, 5})
                                               : pick({1, 4, 16, 48, 128, 130, 260, 516}));
    c.s.first[i + 1] = c.s.first[i] + pick({0, 1, 3, 5, 17, 40});
    c.s.scale[i] = static_cast<float>(pick({1, 2, 3})) * 0.75f;
  }
  return c;
}

struct Scales {
  Matrix rows, cols;  // [1, n] fp32
  const float *row, *col;
  Scales(const Case& c, int64_t n_rows, int64_t n_cols)
      : rows(DType::kF32, 1, n_rows, 0, 0, true),
        cols(DType::kF32, 1, n_cols, 0, 0, true),
        row(c.rows_scaled ? rows.floats() : nullptr),
        col(c.cols_scaled ? cols.floats() : nullptr) {}
};

// Runs a launcher on a fresh `out`.
template <class Params, class Call>
std::string run(const std::vector<int>& schedules, Matrix& out, const Params& p,
                size_t (*workspace_of)(const Params&, Target), const Call& call) {
  const size_t bytes = workspace_of(p, kTarget);
  Matrix scratch(DType::kF32, 1, static_cast<int64_t>(bytes / 4), 0, 0, false);
  const std::string wrong = run_schedules(schedules, {&out, &scratch}, {out},
                                          [&] { return call(p, bytes ? scratch.data() : nullptr, nullptr); });
  return !wrong.empty() ? wrong : out.padding_untouched() ? "" : "wrote between rows";
}

std::string run_fill(const Case& c, const std::vector<int>& schedules) {
  Scales scales(c, c.Q, c.C);
  Matrix out(c.out, c.Q, c.C, 0, c.shift, false);
  const float scale = 0.75f;
  const BasisFillParams p{.u = c.u,
                          .out = out.data(),
                          .row_scale = scales.row,
                          .col_scale = scales.col,
                          .R = c.R,
                          .q0 = c.q0,
                          .c0 = c.c0,
                          .Q = c.Q,
                          .C = c.C,
                          .scale = scale,
                          .dtype = c.out};
  const std::string wrong = run(schedules, out, p, basis_fill_workspace, basis_fill_cuda);
  Matrix want(c.out, c.Q, c.C, 0, c.shift, false);
  for (int64_t q = 0; q < c.Q; ++q)
    for (int64_t j = 0; j < c.C; ++j) {
      const float row = scales.row ? scale * scales.row[q] : scale;
      const float v = element(c.u, 0, (c.q0 + q) / c.R, (c.q0 + q) % c.R, c.c0 + j);
      store(c.out, want.data(), q * c.C + j, v * (scales.col ? scales.col[j] * row : row));
    }
  return !wrong.empty() ? wrong : out.bytes == want.bytes ? "" : "the bits differ from rng.h";
}

int segment_of(const int64_t* bounds, int64_t i) {
  int s = 0;
  while (i >= bounds[s + 1]) ++s;
  return s;
}

std::string run_combine(const Case& c, const std::vector<int>& schedules) {
  const int64_t T = c.T, R = c.R, W = c.W(), K = c.K();
  Matrix coef(DType::kF32, T, K, 0, c.shift, true), base(DType::kF32, R, W, 0, 0, true);
  Matrix out(DType::kF32, T * R, W, 0, c.shift, false);
  const BasisCombineParams p{.u = c.u,
                             .segments = c.s,
                             .coef = coef.floats(),
                             .base = c.add ? base.floats() : nullptr,
                             .out = out.floats(),
                             .T = T,
                             .R = R};
  const std::string wrong = run(schedules, out, p, basis_combine_workspace, basis_combine_cuda);
  Error error;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t w = 0; w < W; ++w) {
      const int s = segment_of(c.s.begin, w);
      std::vector<double> u;
      for (int64_t k = 0; k < c.s.first[s + 1] - c.s.first[s]; ++k)
        u.push_back(c.s.scale[s] * double{element(c.u, s, k, r, w - c.s.begin[s])});
      for (int64_t l = 0; l < T; ++l) {
        double sum = c.add ? base.at(r, w) : 0, magnitude = std::fabs(sum);
        for (size_t k = 0; k < u.size(); ++k) {
          const double v = coef.at(l, c.s.first[s] + static_cast<int64_t>(k)) * u[k];
          sum += v, magnitude += std::fabs(v);
        }
        error.add(out.at(l * R + r, w), sum, magnitude, DType::kF32, false);
      }
    }
  return wrong.empty() ? error.verdict() : wrong;
}

std::string run_dot(const Case& c, const std::vector<int>& schedules) {
  const int64_t T = c.T, R = c.R, W = c.W(), K = c.K();
  Matrix g(DType::kF32, T * R, W, 0, c.shift, true), out(DType::kF32, T, K, 0, 0, false);
  const BasisDotParams p{.u = c.u, .segments = c.s, .g = g.floats(), .out = out.floats(), .T = T, .R = R};
  const std::string wrong = run(schedules, out, p, basis_dot_workspace, basis_dot_cuda);
  Error error;
  for (int64_t k = 0; k < K; ++k) {
    const int s = segment_of(c.s.first, k);
    std::vector<double> sum(T), magnitude(T);
    for (int64_t r = 0; r < R; ++r)
      for (int64_t w = c.s.begin[s]; w < c.s.begin[s + 1]; ++w) {
        const double u = c.s.scale[s] * double{element(c.u, s, k - c.s.first[s], r, w - c.s.begin[s])};
        for (int64_t l = 0; l < T; ++l) {
          const double v = g.at(l * R + r, w) * u;
          sum[l] += v, magnitude[l] += std::fabs(v);
        }
      }
    for (int64_t l = 0; l < T; ++l) error.add(out.at(l, k), sum[l], magnitude[l], DType::kF32, false);
  }
  return wrong.empty() ? error.verdict() : wrong;
}

// want[t, n] = base + out_scale Σ_m in_scale x U, and the total magnitude of its terms.
void matmul_in_double(const Case& c, Matrix& x, const Scales& scales, Matrix& out, Error& error) {
  const bool transposed = c.transposed(), two_terms = c.op.starts_with("product");
  const int64_t M = transposed ? c.C : c.Q, N = transposed ? c.Q : c.C;
  for (int64_t n = 0; n < N; ++n) {
    std::vector<double> u;
    for (int64_t m = 0; m < M; ++m) {
      const int64_t q = transposed ? n : m, column = transposed ? m : n;
      u.push_back(double{element(c.u, 0, q / c.R, q % c.R, column)} * (scales.row ? scales.row[m] : 1.f));
    }
    for (int64_t t = 0; t < c.T; ++t) {
      double sum = 0, magnitude = 0;
      for (int64_t m = 0; m < M; ++m) {
        const double v = x.at(t, m) * u[m];
        sum += v, magnitude += std::fabs(v);
      }
      const double scale = scales.col ? scales.col[n] : 1.f, base = c.add ? out.fresh_at(t, n) : 0;
      error.add(out.at(t, n), base + scale * sum, std::fabs(base) + std::fabs(scale) * magnitude, c.out, two_terms);
    }
  }
}

std::string run_matmul(const Case& c, const std::vector<int>& schedules) {
  const bool transposed = c.transposed(), product = c.op.starts_with("product");
  const auto workspace = product ? basis_product_workspace : basis_matmul_workspace;
  const auto launcher = product ? basis_product_cuda : basis_matmul_cuda;
  const int64_t M = transposed ? c.C : c.Q, N = transposed ? c.Q : c.C;
  Scales scales(c, M, N);  // in_scale, out_scale
  Matrix x(c.x, c.T, M, c.pad, c.shift, true), out(c.out, c.T, N, c.pad, c.shift, c.add);
  BasisMatmulParams p{.u = c.u,
                      .x = x.data(),
                      .out = out.data(),
                      .in_scale = scales.row,
                      .out_scale = scales.col,
                      .T = c.T,
                      .R = c.R,
                      .Q = c.Q,
                      .C = c.C,
                      .x_pitch = x.pitch,
                      .out_pitch = out.pitch,
                      .transposed = transposed,
                      .add = c.add,
                      .x_dtype = c.x,
                      .out_dtype = c.out};
  std::string wrong = run(schedules, out, p, workspace, launcher);
  if (!wrong.empty()) return wrong;
  Error error;
  matmul_in_double(c, x, scales, out, error);
  if (!c.T || !N || !error.verdict().empty()) return error.verdict();
  Matrix alone(c.out, 1, N, 0, 0, true);  // the last token
  const int64_t last = (c.T - 1) * out.pitch;
  for (int64_t n = 0; n < N; ++n) store(c.out, alone.data(), n, out.fresh_at(c.T - 1, n));
  alone.fresh = alone.bytes;
  p.x = static_cast<unsigned char*>(x.data()) + static_cast<size_t>((c.T - 1) * x.pitch) * size_of(c.x);
  p.out = alone.data(), p.T = 1;
  wrong = run({schedules[0]}, alone, p, workspace, launcher);
  if (!wrong.empty()) return wrong;
  const auto* row = static_cast<unsigned char*>(out.data()) + static_cast<size_t>(last) * size_of(c.out);
  return std::equal(alone.bytes.begin(), alone.bytes.end(), row) ? "" : "a token alone has other bits";
}

std::string judge(const Case& c, const std::vector<int>& schedules) {
  return c.op == "fill"      ? run_fill(c, schedules)
         : c.op == "combine" ? run_combine(c, schedules)
         : c.op == "dot"     ? run_dot(c, schedules)
                             : run_matmul(c, schedules);
}

// x and out with two rows far apart; and elements far out.
void huge(int& code, Error& error) {
  const int64_t pitch = (int64_t{1} << 31) + 200, T = 2, Q = 5, C = 40;
  const DType b = DType::kBF16;
  const BasisStream u{
      .seed = 7, .tensor = 3, .basis0 = 0, .method = Method::kVera, .distribution = Distribution::kUniform8};
  bf16 *x = reserve(pitch + 100), *out = x + 50;
  for (bool transposed : {false, true}) {
    const int64_t M = transposed ? C : Q, N = transposed ? Q : C;
    for (int64_t t = 0; t < T; ++t)
      for (int64_t m = 0; m < M; ++m) store(b, x, t * pitch + m, draw_value());
    const BasisMatmulParams p{.u = u,
                              .x = x,
                              .out = out,
                              .in_scale = nullptr,
                              .out_scale = nullptr,
                              .T = T,
                              .R = 3,
                              .Q = Q,
                              .C = C,
                              .x_pitch = pitch,
                              .out_pitch = pitch,
                              .transposed = transposed,
                              .add = false,
                              .x_dtype = b,
                              .out_dtype = b};
    std::vector<float> scratch(basis_matmul_workspace(p, kTarget) / 4);
    code |= basis_matmul_cuda(p, scratch.data(), nullptr);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0;
        for (int64_t m = 0; m < M; ++m) {
          const int64_t q = transposed ? n : m;
          sum += load(b, x, t * pitch + m) * element(u, 0, q / 3, q % 3, transposed ? m : n);
        }
        error.add(load(b, out, t * pitch + n), sum, M, b, false);
      }
  }
  const int64_t R = kMaxRows, q0 = 3 * R - 2, c0 = kMaxBlocks * 16 - C;  // the last columns; rows of two bases
  std::vector<float> filled(Q * C);
  const BasisFillParams fill{.u = u,
                             .out = filled.data(),
                             .row_scale = nullptr,
                             .col_scale = nullptr,
                             .R = R,
                             .q0 = q0,
                             .c0 = c0,
                             .Q = Q,
                             .C = C,
                             .scale = 1.f,
                             .dtype = DType::kF32};
  code |= basis_fill_cuda(fill, nullptr, nullptr);
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t c = 0; c < C; ++c)
      if (filled[q * C + c] != element(u, 0, (q0 + q) / R, (q0 + q) % R, c0 + c)) error.worst = 1e30;
}

}  // namespace

int main(int argc, char** argv) { return lrk::run_program(argc, argv, draw_case, judge, huge); }
