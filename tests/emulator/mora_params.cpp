// SPDX-License-Identifier: Apache-2.0
// Runs every launcher of csrc/mora.h at params level over the emulator, and compares with sums in double over the map column by
// column; results must have equal bits under every schedule tried.
#include <tuple>

#include "mora.h"
#include "params.h"

namespace {

using namespace lrk;

struct Case {
  std::string op;
  DType dtype, h_dtype;
  int64_t type, T, N, rank, chunks, pad, shift;
  bool output, circular, base, in_place;

  MoraMap map() const {
    return output ? mora_output_map(type, N, rank, chunks) : mora_input_map(type, N, rank, chunks, circular);
  }
  bool turns() const { return type == 6 && !output && chunks > 1; }
  std::string text() const {
    return words(op, " type ", type, output ? " output" : " input", circular ? " circular" : "",
                 in_place ? " in place"
                 : base   ? " base"
                          : "",
                 " ", lrk::name_of(dtype), "/", lrk::name_of(h_dtype), " T=", T, " N=", N, " r=", rank,
                 " chunks=", chunks, " pad=", pad, " shift=", shift);
  }
};

Case draw_case() {
  Case c{};
  c.op = draw() % 2 ? "fold" : "unfold";
  std::tie(c.dtype, c.h_dtype) = draw_types();
  c.type = pick({1, 2, 3, 4, 6, 6, 1});
  c.T = pick({1, 3, 16, 70, 130});
  c.N = pick({1, 8, 33, 64, 97, 100, 256, 520, 1040});
  c.rank = pick({2, 6, 8, 16, 16, 32, 48, 96, 130});
  c.chunks = c.type == 6 ? std::max<int64_t>(1, ceil_div(c.N, c.rank) - pick({0, 0, 1, 3})) : 1;
  c.pad = pick({0, 0, 8, 3});
  c.shift = pick({0, 0, 0, 1, 8});
  c.output = draw() % 2, c.circular = draw() % 3;
  c.base = draw() % 3;
  c.in_place = c.base && draw() % 2;
  return c;
}

// Calls f(column, slot) for each position of the map.
template <class F>
void for_each_position(const MoraMap& m, const F& f) {
  if (m.blocks) {
    for (int32_t s = 0; s < m.slots; ++s)
      for (int32_t j = m.begin(s); j < m.begin(s + 1); ++j) f(j, s);
    return;
  }
  for (int32_t k = 0; k < m.extent; ++k) f(k % m.features, k % m.slots);
}

// h [slots] turned, forth or back.
void turn(const Case& c, std::vector<double>& h, double sign) {
  if (!c.turns()) return;
  const int64_t half = c.rank / 2;
  for (int64_t i = 0; i < c.chunks; ++i)
    for (int64_t p = 0; p < half; ++p) {
      double &a = h[static_cast<size_t>(i * c.rank + p)], &b = h[static_cast<size_t>(i * c.rank + p + half)];
      const double angle =
          static_cast<double>(i) * std::pow(10000.0, -2.0 * static_cast<double>(p) / static_cast<double>(c.rank));
      const double cos = std::cos(angle), sin = sign * std::sin(angle), was = a;
      a = a * cos - b * sin, b = b * cos + was * sin;
    }
}

std::string judge(const Case& c, const std::vector<int>& schedules) {
  const MoraMap m = c.map();
  const bool folds = c.op == "fold";
  Matrix x(c.dtype, c.T, c.N, c.pad, c.shift, folds || c.in_place), h(c.h_dtype, c.T, m.slots, 0, 0, !folds);
  Matrix base(c.dtype, c.T, c.N, c.pad, c.shift, true), table(DType::kF32, 2, c.chunks * (c.rank / 2), 0, 0, false);
  Matrix& from = c.in_place ? x : base;
  const float* rotation = c.turns() ? table.floats() : nullptr;
  const MoraRotationParams turns{table.floats(), c.chunks, c.rank};
  const MoraFoldParams fold{.x = x.data(),
                            .h = h.data(),
                            .rotation = rotation,
                            .T = c.T,
                            .x_pitch = x.pitch,
                            .map = m,
                            .rank = static_cast<int32_t>(c.rank),
                            .dtype = c.dtype,
                            .h_dtype = c.h_dtype};
  const MoraUnfoldParams unfold{.y = x.data(),
                                .base = c.base ? from.data() : nullptr,
                                .h = h.data(),
                                .rotation = rotation,
                                .T = c.T,
                                .y_pitch = x.pitch,
                                .base_pitch = from.pitch,
                                .map = m,
                                .rank = static_cast<int32_t>(c.rank),
                                .dtype = c.dtype,
                                .h_dtype = c.h_dtype};
  const std::string wrong = run_schedules(schedules, {&x, &h, &base, &table}, {x, h, table}, [&] {
    if (rotation)
      if (const int code = mora_rotation_cuda(turns, nullptr, nullptr)) return code;
    return folds ? mora_fold_cuda(fold, nullptr, nullptr) : mora_unfold_cuda(unfold, nullptr, nullptr);
  });
  if (!wrong.empty()) return wrong;
  Error error;
  const size_t slots = static_cast<size_t>(m.slots), columns = static_cast<size_t>(c.N);
  for (int64_t t = 0; t < c.T; ++t) {
    std::vector<double> sum(slots), y(columns);
    if (folds) {
      for_each_position(m, [&](int32_t j, int32_t s) { sum[static_cast<size_t>(s)] += x.at(t, j); });
      turn(c, sum, 1);
      for (int64_t s = 0; s < m.slots; ++s)
        error.add(h.at(t, s), sum[static_cast<size_t>(s)],
                  2.0 + static_cast<double>(c.N) / static_cast<double>(m.slots), c.h_dtype, false);
      continue;
    }
    for (size_t s = 0; s < slots; ++s) sum[s] = h.at(t, static_cast<int64_t>(s));
    turn(c, sum, -1);
    for_each_position(m, [&](int32_t j, int32_t s) { y[static_cast<size_t>(j)] += sum[static_cast<size_t>(s)]; });
    for (int64_t j = 0; j < c.N; ++j) {
      const double add = c.base ? from.fresh_at(t, j) : 0.0;
      error.add(x.at(t, j), add + y[static_cast<size_t>(j)],
                3.0 + static_cast<double>(m.extent) / static_cast<double>(c.N), c.dtype, false);
    }
  }
  if (!x.padding_untouched()) return "wrote between rows";
  if ((folds && x.bytes != x.fresh) || (!folds && h.bytes != h.fresh) || base.bytes != base.fresh)
    return "wrote where it should only read";
  return error.verdict();
}

// Rows far apart.
void huge(int& code, Error& error) {
  const int64_t pitch = (int64_t{1} << 31) + 8;
  bf16* x = reserve(pitch + 32);
  bf16 h[16] = {};
  for (int64_t j = 0; j < 32; ++j) store(DType::kBF16, x, pitch + j, draw_value());
  const MoraMap m = mora_input_map(1, 32, 8, 1, true);
  const MoraFoldParams fold{x, h, nullptr, 2, pitch, m, 8, DType::kBF16, DType::kBF16};
  code = mora_fold_cuda(fold, nullptr, nullptr);
  for (int64_t s = 0; s < 8; ++s) {
    double sum = 0;
    for (int64_t j = s; j < 32; j += 8) sum += load(DType::kBF16, x, pitch + j);
    error.add(to_float(h[8 + s]), sum, 4, DType::kBF16, false);
  }
  const MoraUnfoldParams unfold{x, nullptr, h, nullptr, 2, pitch, 0, m, 8, DType::kBF16, DType::kBF16};
  code |= mora_unfold_cuda(unfold, nullptr, nullptr);
  for (int64_t j = 0; j < 32; ++j)
    error.add(load(DType::kBF16, x, pitch + j), to_float(h[8 + j % 8]), 1, DType::kBF16, false);
}

}  // namespace

int main(int argc, char** argv) { return lrk::run_program(argc, argv, draw_case, judge, huge); }
