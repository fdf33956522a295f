// SPDX-License-Identifier: Apache-2.0
// Runs every launcher of csrc/s2ft.h at params level over the emulator, and compares with loops over columns; results must have
// equal bits under every schedule tried. Rows whose adapter or columns are wrong must be NaN, and no other.
#include <tuple>

#include "params.h"
#include "s2ft.h"

namespace {

using namespace lrk;

struct Case {
  std::string op;
  DType dtype, h_dtype;
  int64_t T, N, s, A, K, P, pad, shift;
  bool ids, scales, run, broken, of_rows;

  std::string text() const {
    return words(op, ids ? " ids" : "", scales ? " scales" : "", run ? " run" : "", broken ? " broken" : "",
                 of_rows ? " rows" : "", " ", lrk::name_of(dtype), "/", lrk::name_of(h_dtype), " T=", T, " N=", N,
                 " s=", s, " A=", A, " K=", K, " P=", P, " pad=", pad, " shift=", shift);
  }
};

Case draw_case() {
  Case c{};
  const int64_t op = pick({0, 0, 0, 1, 1, 1, 2, 2, 3});
  c.op = op == 0 ? "gather" : op == 1 ? "scatter" : op == 2 ? "write" : "pages";
  std::tie(c.dtype, c.h_dtype) = draw_types();
  c.T = pick({1, 3, 16, 70, 130});
  c.N = pick({1, 8, 33, 64, 100, 256, 520});
  c.s = std::min(c.N, pick({1, 2, 15, 16, 40, 64, 200}));
  c.ids = draw() % 3;
  c.A = c.ids && c.op != "write" ? pick({1, 2, 5}) : 1;
  c.K = c.ids ? pick({1, 1, 2, 3}) : 1;
  c.P = c.s + pick({0, 0, 3, 16});
  c.pad = pick({0, 0, 8, 3});
  c.shift = pick({0, 0, 1});
  c.scales = c.ids && draw() % 2, c.run = draw() % 2, c.of_rows = draw() % 2;
  c.broken = (c.op == "gather" || c.op == "scatter") && c.ids && draw() % 4 == 0;
  return c;
}

// Columns of an adapter: ascending, some of them without an end.
std::vector<int32_t> draw_columns(const Case& c) {
  std::vector<int32_t> index;
  for (int64_t a = 0; a < c.A; ++a) {
    const int64_t count = c.op == "write" ? c.s : a ? static_cast<int64_t>(draw()) % (c.s + 1) : c.s;
    const int64_t spare = c.N - count, first = static_cast<int64_t>(draw()) % (spare + 1);
    int64_t at = c.run ? first : 0, skipped = 0;
    for (int64_t j = 0; j < c.s; ++j) {
      while (!c.run && skipped < spare && draw() % 2) ++at, ++skipped;
      index.push_back(j < count ? static_cast<int32_t>(at++) : -1);
    }
  }
  return index;
}

std::string judge_pages(const Case& c, const std::vector<int>& schedules) {
  const int64_t M = ceil_div(c.s, int64_t{16});
  std::vector<int32_t> pages(static_cast<size_t>(c.A * M), -7), ranks(static_cast<size_t>(c.A), -7);
  const SlicePagesParams p{pages.data(), ranks.data(), c.A, M, static_cast<int32_t>(c.s)};
  const std::string wrong =
      run_schedules(schedules, {}, {pages, ranks}, [&] { return slice_pages_cuda(p, nullptr, nullptr); });
  if (!wrong.empty()) return wrong;
  for (size_t i = 0; i < pages.size(); ++i)
    if (pages[i] != static_cast<int32_t>(i)) return "pages do not count up";
  return std::count(ranks.begin(), ranks.end(), c.s) == c.A ? "" : "ranks are not those of the slices";
}

std::string judge_write(const Case& c, const std::vector<int>& schedules) {
  const std::vector<int32_t> index = draw_columns(c);
  const int64_t rows = c.of_rows ? c.N : c.T, columns = c.of_rows ? c.T : c.N;  // of W
  Matrix w(c.dtype, rows, columns, c.pad, c.shift, true);
  Matrix slice(c.h_dtype, c.of_rows ? c.s : c.T, c.of_rows ? c.T : c.s, 0, 0, true);
  const SliceWriteParams p{w.data(), slice.data(), index.data(), slice.rows, slice.cols, c.N, w.pitch,
                           1,        c.of_rows,    c.dtype,      c.h_dtype};
  const std::string wrong =
      run_schedules(schedules, {&w, &slice}, {w}, [&] { return slice_write_cuda(p, nullptr, nullptr); });
  if (!wrong.empty()) return wrong;
  Error error;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const auto at = std::find(index.begin(), index.end(), static_cast<int32_t>(c.of_rows ? i : j));
      const int64_t k = at - index.begin();
      const bool mine = at != index.end();
      error.add(w.at(i, j), !mine ? w.fresh_at(i, j) : c.of_rows ? slice.at(k, j) : slice.at(i, k), 0, c.dtype, false);
    }
  return w.padding_untouched() ? error.verdict() : "wrote between rows";
}

std::string judge(const Case& c, const std::vector<int>& schedules) {
  if (c.op == "pages") return judge_pages(c, schedules);
  if (c.op == "write") return judge_write(c, schedules);
  const bool gathers = c.op == "gather";
  std::vector<int32_t> index = draw_columns(c), ids;
  std::vector<float> scales;
  for (int64_t i = 0; i < c.T * c.K; ++i) {
    ids.push_back(static_cast<int32_t>(draw() % static_cast<uint64_t>(c.A + 1)) - 1);
    scales.push_back(static_cast<float>(draw_value()));
  }
  const int64_t how = pick({0, 1, 2});
  if (c.broken && how == 0) ids[0] = static_cast<int32_t>(c.A) + 3;
  if (c.broken && how == 1) ids[0] = 0, index[0] = static_cast<int32_t>(c.N) + 5;
  if (c.broken && how == 2 && c.s > 1) ids[0] = 0, index[1] = index[0];
  const bool doubled = c.broken && how == 2;
  Matrix x(c.dtype, c.T, c.N, c.pad, c.shift, true), h(c.h_dtype, c.T * c.K, c.P, 0, 0, !gathers);
  const SliceIndex of{index.data(), c.ids ? ids.data() : nullptr, c.A, static_cast<int32_t>(c.s),
                      static_cast<int32_t>(c.K)};
  const float* scale = c.scales ? scales.data() : nullptr;
  const int32_t P = static_cast<int32_t>(c.P);
  const SliceGatherParams gather{of, x.data(), h.data(), scale, c.T, c.N, x.pitch, P, c.dtype, c.h_dtype};
  const SliceScatterParams scatter{of, x.data(), h.data(), scale, c.T, c.N, x.pitch, P, c.dtype, c.h_dtype};
  const std::string wrong = run_schedules(schedules, {&x, &h}, {x, h}, [&] {
    return gathers ? slice_gather_cuda(gather, nullptr, nullptr) : slice_scatter_cuda(scatter, nullptr, nullptr);
  });
  if (!wrong.empty()) return wrong;
  Error error;
  for (int64_t t = 0; t < c.T; ++t) {
    std::vector<double> sum(static_cast<size_t>(c.N));
    bool bad = false;
    for (int64_t k = 0; k < c.K; ++k) {
      const int64_t row = t * c.K + k, a = c.ids ? ids[static_cast<size_t>(row)] : 0;
      const double factor = c.scales ? scales[static_cast<size_t>(row)] : 1.0;
      bad = bad || a >= c.A;
      for (int64_t j = 0; j < c.P; ++j) {
        const int32_t column = a >= 0 && a < c.A && j < c.s ? index[static_cast<size_t>(a * c.s + j)] : -1;
        const bool lost = a >= c.A || column >= c.N;
        bad = bad || lost || (doubled && a == 0);
        if (gathers && lost != std::isnan(h.at(row, j))) return words("row ", row, " is NaN where it should not be");
        if (gathers && !lost)
          error.add(h.at(row, j), column < 0 ? 0.0 : factor * x.fresh_at(t, column), 1, c.h_dtype, false);
        if (!gathers && column >= 0 && column < c.N) sum[static_cast<size_t>(column)] += factor * h.at(row, j);
      }
    }
    for (int64_t n = 0; !gathers && n < c.N; ++n) {
      if (bad != std::isnan(x.at(t, n))) return words("row ", t, bad ? " must be NaN" : " is NaN");
      if (!bad) error.add(x.at(t, n), x.fresh_at(t, n) + sum[static_cast<size_t>(n)], 3, c.dtype, false);
    }
  }
  if (!x.padding_untouched()) return "wrote between rows";
  if (gathers ? x.bytes != x.fresh : h.bytes != h.fresh) return "wrote where it should only read";
  return error.verdict();
}

// Rows far apart.
void huge(int& code, Error& error) {
  const int64_t pitch = (int64_t{1} << 31) + 8;
  bf16* x = reserve(pitch + 32);
  bf16 h[8] = {};
  const int32_t index[4] = {1, 5, 6, 31};
  for (int64_t j = 0; j < 32; ++j) store(DType::kBF16, x, pitch + j, draw_value());
  const SliceIndex of{index, nullptr, 1, 4, 1};
  code = slice_gather_cuda({of, x, h, nullptr, 2, 32, pitch, 4, DType::kBF16, DType::kBF16}, nullptr, nullptr);
  for (int64_t j = 0; j < 4; ++j)
    error.add(to_float(h[4 + j]), load(DType::kBF16, x, pitch + index[j]), 1, DType::kBF16, false);
  const double before = load(DType::kBF16, x, pitch + 5);
  code |= slice_scatter_cuda({of, x, h, nullptr, 2, 32, pitch, 4, DType::kBF16, DType::kBF16}, nullptr, nullptr);
  error.add(load(DType::kBF16, x, pitch + 5), 2 * before, 1, DType::kBF16, false);
  const bf16 one = from_float<bf16>(1.f);
  const int32_t last[1] = {1};
  code |= slice_write_cuda({x, &one, last, 1, 1, 2, pitch, 1, true, DType::kBF16, DType::kBF16}, nullptr, nullptr);
  error.add(load(DType::kBF16, x, pitch), 1.0, 1, DType::kBF16, false);
}

}  // namespace

int main(int argc, char** argv) { return lrk::run_program(argc, argv, draw_case, judge, huge); }
