// SPDX-License-Identifier: Apache-2.0
// Runs every launcher of csrc/basis.h at params level over the emulator, with neither torch nor Python in the process.
// fill must have the very bits of rng.h; sums are compared with sums in double, and a token's row of a matmul with the
// bits it has alone; results must have equal bits under every schedule tried.
//
//   basis_params CASES SEED SCHEDULE...     random cases; a line for each that fails
//   basis_params huge                       pitches of more than 2^31 elements, rows and columns that far out
#include <sys/mman.h>

#include <algorithm>

#include "basis.h"
#include "params.h"

namespace {

using namespace lrk;

float value_of(Distribution d, const Philox& block, int j) {
  switch (d) {
    case Distribution::kUniform8: return basis_value<Distribution::kUniform8>(block, j);
    case Distribution::kUniform16: return basis_value<Distribution::kUniform16>(block, j);
    case Distribution::kUniform32: return basis_value<Distribution::kUniform32>(block, j);
    case Distribution::kSign: return basis_value<Distribution::kSign>(block, j);
    case Distribution::kTernary6: return basis_value<Distribution::kTernary6>(block, j);
    default: return basis_value<Distribution::kTernary4>(block, j);
  }
}

// Element (basis k, row, column) of the stack, tensors counted from the first one.
float element(const BasisStream& u, int tensor, int64_t k, int64_t row, int64_t c) {
  const int E = block_columns(u.distribution);
  const Philox block = basis_block(u.seed, u.tag(), u.tensor + static_cast<uint32_t>(tensor),
                                   u.basis0 + static_cast<uint32_t>(k), row, c / E);
  return value_of(u.distribution, block, static_cast<int>(c % E));
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
  std::string text() const {
    char t[320];
    std::snprintf(t, sizeof t,
                  "%s distribution %d %s->%s T=%lld R=%lld Q=%lld C=%lld q0=%lld c0=%lld pad=%lld shift=%lld "
                  "segments=%d W=%lld K=%lld%s%s%s",
                  op.c_str(), static_cast<int>(u.distribution), lrk::name_of(x), lrk::name_of(out),
                  static_cast<long long>(T), static_cast<long long>(R), static_cast<long long>(Q),
                  static_cast<long long>(C), static_cast<long long>(q0), static_cast<long long>(c0),
                  static_cast<long long>(pad), static_cast<long long>(shift), s.count, static_cast<long long>(W()),
                  static_cast<long long>(K()), rows_scaled ? " rows scaled" : "", cols_scaled ? " columns scaled" : "",
                  add ? " add" : "");
    return t;
  }
};

Case draw_case() {
  const char* ops[] = {"fill", "combine", "dot", "matmul", "transposed"};
  const Distribution distributions[] = {Distribution::kUniform8, Distribution::kUniform16, Distribution::kUniform32,
                                        Distribution::kSign,     Distribution::kTernary6,  Distribution::kTernary4};
  Case c{};
  c.op = ops[draw() % 5];
  c.u = {0x0123456789abcdef + draw(), static_cast<uint32_t>(draw()), static_cast<uint32_t>(draw() % 1000),
         Method::kNola, distributions[draw() % 6]};
  const DType types[] = {DType::kF32, DType::kF16, DType::kBF16};
  c.x = types[draw() % 3], c.out = types[draw() % 3];
  const bool empty = draw() % 16 == 0;
  c.T = empty ? pick({0, 1}) : pick({1, 1, 2, 3, 4, 5, 9, 17});
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

bool fail(const Case& c, const char* why) {
  std::printf("FAIL %s: %s\n", c.text().c_str(), why);
  return false;
}

// A matrix even where there is nothing to hold.
Matrix matrix(DType type, int64_t rows, int64_t cols, int64_t pad, int64_t shift, bool filled) {
  return Matrix(type, std::max<int64_t>(rows, 1), std::max<int64_t>(cols, 1), pad, shift, filled);
}

struct Scales {
  Matrix rows, cols;  // [1, n] fp32
  const float *row, *col;
  Scales(const Case& c, int64_t n_rows, int64_t n_cols)
      : rows(matrix(DType::kF32, 1, n_rows, 0, 0, true)),
        cols(matrix(DType::kF32, 1, n_cols, 0, 0, true)),
        row(c.rows_scaled ? static_cast<float*>(rows.data()) : nullptr),
        col(c.cols_scaled ? static_cast<float*>(cols.data()) : nullptr) {}
};

// Runs `call(workspace)` under each schedule on a fresh `out`.
template <class Call>
const char* run(const std::vector<int>& schedules, size_t workspace, Matrix& out, const Call& call) {
  Matrix scratch = matrix(DType::kF32, 1, static_cast<int64_t>(workspace / 4), 0, 0, false);
  std::vector<unsigned char> first;
  for (int schedule : schedules) {
    lrk_emulator_set("schedule", schedule);
    out.bytes = out.fresh, scratch.bytes = scratch.fresh;
    if (call(workspace ? scratch.data() : nullptr)) return "a launch returned an error";
    if (first.empty()) first = out.bytes;
    if (first != out.bytes) return "schedules give different bits";
  }
  return out.padding_untouched() ? nullptr : "wrote between rows";
}

const char* judge(const Error& error) { return error.worst <= 1.0 ? nullptr : "the error is over its bound"; }

const char* run_fill(const Case& c, const std::vector<int>& schedules) {
  Scales scales(c, c.Q, c.C);
  Matrix out = matrix(c.out, c.Q, c.C, 0, c.shift, false);
  const float scale = 0.75f;
  const BasisFillParams p{c.u, out.data(), scales.row, scales.col, c.R, c.q0, c.c0, c.Q, c.C, scale, c.out};
  const char* wrong = run(schedules, basis_fill_workspace(p, kTarget), out,
                          [&](void* workspace) { return basis_fill_cuda(p, workspace, nullptr); });
  Matrix want = matrix(c.out, c.Q, c.C, 0, c.shift, false);
  for (int64_t q = 0; q < c.Q; ++q)
    for (int64_t j = 0; j < c.C; ++j) {
      const float row = scales.row ? scale * scales.row[q] : scale;
      const float v = element(c.u, 0, (c.q0 + q) / c.R, (c.q0 + q) % c.R, c.c0 + j);
      store(c.out, want.data(), q * c.C + j, v * (scales.col ? scales.col[j] * row : row));
    }
  return wrong ? wrong : out.bytes == want.bytes ? nullptr : "the bits differ from rng.h";
}

int segment_of(const int64_t* bounds, int64_t i) {
  int s = 0;
  while (i >= bounds[s + 1]) ++s;
  return s;
}

const char* run_combine(const Case& c, const std::vector<int>& schedules) {
  const int64_t T = c.T, R = c.R, W = c.W(), K = c.K();
  Matrix coef = matrix(DType::kF32, T, K, 0, c.shift, true), base = matrix(DType::kF32, R, W, 0, 0, true);
  Matrix out = matrix(DType::kF32, T * R, W, 0, c.shift, false);
  const BasisCombineParams p{c.u,
                             c.s,
                             static_cast<float*>(coef.data()),
                             c.add ? static_cast<float*>(base.data()) : nullptr,
                             static_cast<float*>(out.data()),
                             T,
                             R};
  const char* wrong = run(schedules, basis_combine_workspace(p, kTarget), out,
                          [&](void* workspace) { return basis_combine_cuda(p, workspace, nullptr); });
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
  return wrong ? wrong : judge(error);
}

const char* run_dot(const Case& c, const std::vector<int>& schedules) {
  const int64_t T = c.T, R = c.R, W = c.W(), K = c.K();
  Matrix g = matrix(DType::kF32, T * R, W, 0, c.shift, true), out = matrix(DType::kF32, T, K, 0, 0, false);
  const BasisDotParams p{c.u, c.s, static_cast<float*>(g.data()), static_cast<float*>(out.data()), T, R};
  const char* wrong = run(schedules, basis_dot_workspace(p, kTarget), out,
                          [&](void* workspace) { return basis_dot_cuda(p, workspace, nullptr); });
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
  return wrong ? wrong : judge(error);
}

// want[t, n] = base + out_scale Σ_m in_scale x U, and the total magnitude of its terms.
void matmul_in_double(const Case& c, bool transposed, Matrix& x, const Scales& scales, Matrix& out, Error& error) {
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
      error.add(out.at(t, n), base + scale * sum, std::fabs(base) + std::fabs(scale) * magnitude, c.out, false);
    }
  }
}

const char* run_matmul(const Case& c, const std::vector<int>& schedules) {
  const bool transposed = c.op == "transposed";
  const int64_t M = transposed ? c.C : c.Q, N = transposed ? c.Q : c.C;
  Scales scales(c, M, N);  // in_scale, out_scale
  Matrix x = matrix(c.x, c.T, M, c.pad, c.shift, true), out = matrix(c.out, c.T, N, c.pad, c.shift, c.add);
  BasisMatmulParams p{c.u, x.data(), out.data(), scales.row, scales.col, c.T, c.R,  c.Q,
                      c.C, x.pitch,  out.pitch,  transposed, c.add,      c.x, c.out};
  const auto call = [&](void* workspace) { return basis_matmul_cuda(p, workspace, nullptr); };
  if (const char* wrong = run(schedules, basis_matmul_workspace(p, kTarget), out, call)) return wrong;
  Error error;
  matmul_in_double(c, transposed, x, scales, out, error);
  if (!c.T || !N || judge(error)) return judge(error);
  Matrix alone = matrix(c.out, 1, N, 0, 0, true);  // the last token
  const int64_t last = (c.T - 1) * out.pitch;
  for (int64_t n = 0; n < N; ++n) store(c.out, alone.data(), n, out.fresh_at(c.T - 1, n));
  alone.fresh = alone.bytes;
  p.x = static_cast<unsigned char*>(x.data()) + static_cast<size_t>((c.T - 1) * x.pitch) * size_of(c.x);
  p.out = alone.data(), p.T = 1;
  if (const char* wrong = run({schedules[0]}, basis_matmul_workspace(p, kTarget), alone, call)) return wrong;
  const auto* row = static_cast<unsigned char*>(out.data()) + static_cast<size_t>(last) * size_of(c.out);
  return std::equal(alone.bytes.begin(), alone.bytes.end(), row) ? nullptr : "a token alone has other bits";
}

bool run_case(const Case& c, const std::vector<int>& schedules) {
  emu::forget_global();
  const char* wrong = c.op == "fill"      ? run_fill(c, schedules)
                      : c.op == "combine" ? run_combine(c, schedules)
                      : c.op == "dot"     ? run_dot(c, schedules)
                                          : run_matmul(c, schedules);
  return wrong ? fail(c, wrong) : true;
}

// x and out with two rows far apart in memory that is reserved and mostly never touched; and elements far out.
bool run_huge() {
  const int64_t pitch = (int64_t{1} << 31) + 200, T = 2, Q = 5, C = 40;
  const size_t bytes = static_cast<size_t>((pitch + 100) * 2);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::printf("SKIP no address space for 2^31 elements\n");
    std::exit(0);
  }
  const DType b = DType::kBF16;
  const BasisStream u{7, 3, 0, Method::kVera, Distribution::kUniform8};
  bf16 *x = static_cast<bf16*>(memory), *out = x + 50;
  int code = 0;
  Error error;
  for (bool transposed : {false, true}) {
    const int64_t M = transposed ? C : Q, N = transposed ? Q : C;
    for (int64_t t = 0; t < T; ++t)
      for (int64_t m = 0; m < M; ++m) store(b, x, t * pitch + m, draw_value());
    const BasisMatmulParams p{u, x, out, nullptr, nullptr, T, 3, Q, C, pitch, pitch, transposed, false, b, b};
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
  munmap(memory, bytes);
  const int64_t R = kMaxRows, q0 = 3 * R - 2, c0 = kMaxBlocks * 16 - C;  // the last columns; rows of two bases
  std::vector<float> filled(Q * C);
  code |= basis_fill_cuda({u, filled.data(), nullptr, nullptr, R, q0, c0, Q, C, 1.f, DType::kF32}, nullptr, nullptr);
  for (int64_t q = 0; q < Q; ++q)
    for (int64_t c = 0; c < C; ++c)
      if (filled[q * C + c] != element(u, 0, (q0 + q) / R, (q0 + q) % R, c0 + c)) error.worst = 1e30;
  const bool ok = code == 0 && error.worst <= 1.0;
  std::printf("%s huge pitches: code %d, error %.3g of its bound\n", ok ? "ok" : "FAIL", code, error.worst);
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  return lrk::run_program(
      argc, argv, [](const std::vector<int>& schedules) { return run_case(draw_case(), schedules); }, run_huge);
}
