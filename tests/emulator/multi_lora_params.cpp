// SPDX-License-Identifier: Apache-2.0
// Runs every launcher of csrc/multi_lora.h at params level over the emulator, with neither torch nor Python in the process,
// and compares with sums in double; results must have equal bits under every schedule tried.
#include <tuple>

#include "cuda/multi_lora/gemm.cuh"
#include "params.h"

namespace {

using namespace lrk;

// Exact to the byte.
template <class T>
std::vector<T> tracked(int64_t n, bool filled) {
  std::vector<T> v(static_cast<size_t>(n));
  v.shrink_to_fit();
  emu::track_global(v.data(), v.size() * sizeof(T), filled);
  return v;
}

struct Case {
  std::string op;
  DType dtype, factor;
  int64_t T, N, A, K, L, M, pad, shift;
  int32_t first, slices;
  double p;
  bool in_place, scaled;
  int64_t I;  // gemm
  int32_t tile_n, cluster;
  bool n_contig, poisoned;  // adapter 0 has a NaN and an infinity

  std::string text() const {
    return words(op, " ", lrk::name_of(dtype), "/", lrk::name_of(factor), " T=", T, " N=", N, " A=", A, " K=", K,
                 " L=", L, " (", first, ", ", slices, ") M=", M, " pad=", pad, " shift=", shift, " p=", p,
                 in_place ? " in place" : "",
                 op == "gemm" ? words(" I=", I, n_contig ? " W[I,N]" : " W[N,I]", poisoned ? " poisoned" : "",
                                      " tiles of ", cluster, " x 128 x ", tile_n)
                              : "");
  }
};

Case draw_case() {
  Case c{};
  c.op = draw_op({"shrink", "shrink", "expand", "expand", "wgrad", "wgrad", "gather", "scatter"});
  const bool is_short = c.op == "short_gemm";  // several tiles a block, of one step each
  if (is_short) c.op = "gemm";
  std::tie(c.dtype, c.factor) = draw_types();
  c.T = pick({1, 3, 16, 64, 65, 130, 300});
  c.N = pick({1, 8, 24, 64, 130, 257, 520});
  c.A = pick({1, 2, 5, 20}), c.K = pick({1, 1, 2, 3}), c.L = pick({1, 1, 2}), c.M = pick({1, 1, 2, 5});
  if (c.op == "wgrad" && draw() % 3 == 0) c.T = pick({600, 1100}), c.N = std::min<int64_t>(c.N, 66), c.A = pick({1, 2});
  if (c.op == "shrink" && draw() % 4 == 0) {  // several tiles of rows in a block, several steps of a warp
    std::tie(c.T, c.N) = draw() % 2 ? std::pair<int64_t, int64_t>{1100, 72} : std::pair<int64_t, int64_t>{16, 2600};
  }
  c.first = static_cast<int32_t>(draw() % c.L);
  c.slices = static_cast<int32_t>(1 + draw() % (c.L - c.first));
  c.pad = pick({0, 0, 8, 3}), c.shift = pick({0, 0, 1, 8});
  c.p = draw() % 3 == 0 && c.op != "gather" && c.op != "scatter" ? 0.3 : 0.0;
  c.in_place = draw() % 2, c.scaled = draw() % 2;
  if (c.op == "gemm") {
    c.dtype = c.factor = DType::kBF16;
    c.N = pick({8, 64, 136, 264}), c.I = pick({8, 72, 200}), c.L = c.slices = 1, c.first = 0;
    c.pad = pick({0, 8}), c.n_contig = draw() % 2, c.poisoned = draw() % 2;
    if (draw() % 4 == 0) c.A = 200, c.M = 1;  // more than a block of the lists looks at together
    if (!c.n_contig || c.K > 1) c.p = 0;
    c.tile_n = static_cast<int32_t>(pick({128, 256})), c.cluster = static_cast<int32_t>(pick({1, 2}));
    if (is_short) c.T = 300, c.N = 264, c.I = 8, c.A = c.K = c.M = 1, c.tile_n = 128, c.cluster = 1;
  }
  return c;
}

// Y = X W + bias + the sum over slots of D(S pool). What a page has past an adapter's ranks is NaN.
std::string judge_gemm(const Case& c, const std::vector<int>& schedules) {
  const int64_t R = kPageRanks * c.M, used = c.A * c.M, P = kPageRanks * (used + 1);
  const PlanLayout at = plan_layout(c.T, c.A);
  auto pages = tracked<int32_t>(used, true), ranks = tracked<int32_t>(c.A, true);
  auto index = tracked<int32_t>(c.T * c.K, true), plan = tracked<int32_t>(c.K * at.length, false);
  auto drop = tracked<float>(c.A, true);
  for (int64_t i = 0; i < used; ++i) pages[i] = static_cast<int32_t>(i + 1);
  for (int64_t i = used - 1; i > 0; --i) std::swap(pages[i], pages[draw() % (i + 1)]);
  for (int32_t& r : ranks) r = static_cast<int32_t>(draw() % (R + 1));
  for (int32_t& a : index) a = static_cast<int32_t>(draw() % (c.A + 1)) - 1;
  for (float& p : drop) p = static_cast<float>(c.p * static_cast<double>(draw() % 3));  // 0, p, 2 p
  const int64_t lost = c.A > 1 && draw() % 4 == 0 ? c.A - 1 : -1;  // an adapter whose page does not exist
  if (lost >= 0) ranks[lost] = static_cast<int32_t>(R), pages[lost * c.M] = static_cast<int32_t>(P);
  const int64_t seed = 0x1234567890abcdef;
  emu::track_global(&seed, sizeof seed, true);

  const DType b = DType::kBF16;
  Matrix x(b, c.T, c.I, c.pad, 0, true), w(b, c.n_contig ? c.I : c.N, c.n_contig ? c.N : c.I, c.pad, 0, true);
  Matrix pool(b, P, c.N, 0, 0, true), s(b, c.T * c.K, R, 0, 0, true), y(b, c.T, c.N, 0, 0, false),
      bias(b, 1, c.N, 0, 0, true);
  const auto row_of = [&](int64_t a, int64_t r) {
    return int64_t{pages[a * c.M + r / kPageRanks]} * kPageRanks + r % kPageRanks;
  };
  for (int64_t a = 0; a < c.A; ++a)
    for (int64_t r = ranks[a]; r < R && a != lost; ++r)
      for (int64_t n = 0; n < c.N; ++n) store(b, pool.data(), row_of(a, r) * c.N + n, NAN);
  for (int64_t i = 0; i < c.T * c.K; ++i)  // S has zeros where there is no rank
    for (int64_t r = index[i] < 0 ? 0 : ranks[index[i]]; r < R; ++r) store(b, s.data(), i * R + r, 0);
  pool.fresh = pool.bytes, s.fresh = s.bytes;

  const Adapters d{.pages = pages.data(),
                   .ranks = ranks.data(),
                   .plan = plan.data(),
                   .T = c.T,
                   .K = c.K,
                   .A = c.A,
                   .L = 1,
                   .M = c.M,
                   .P = P,
                   .first = 0,
                   .slices = 1,
                   .dropout_p = c.p > 0 ? drop.data() : nullptr,
                   .seed = &seed};
  const MultiLoraGemmParams p{.adapters = d,
                              .y = y.data(),
                              .bias = c.scaled ? bias.data() : nullptr,
                              .x = x.data(),
                              .w = {w.data(), c.n_contig ? w.pitch : 1, c.n_contig ? 1 : w.pitch},
                              .s = s.data(),
                              .pool = pool.data(),
                              .N = c.N,
                              .K = c.I,
                              .x_pitch = x.pitch,
                              .dtype = b,
                              .factor_dtype = b};
  const MultiLoraPlanParams planning{.index = index.data(), .plan = plan.data(), .T = c.T, .K = c.K, .A = c.A};
  const GemmTiles tiles = gemm_tiles(c.T, c.N, c.tile_n, c.cluster);
  const auto scratch_of = [](size_t bytes) {
    return Matrix(DType::kF32, 1, static_cast<int64_t>(bytes / 4), 0, 0, false);
  };
  Matrix counts = scratch_of(multi_lora_plan_workspace(planning, kTarget)),
         scratch = scratch_of(page_lists_bytes(d, tiles));
  const auto run = [&](const std::vector<int>& under) {
    return run_schedules(under, {&y, &scratch, &counts}, {y}, [&] {
      const int code = multi_lora_plan_cuda(planning, counts.data(), nullptr);
      return code ? code : multi_lora_gemm_tiled(p, scratch.data(), tiles, nullptr);
    });
  };
  if (const std::string wrong = run(schedules); !wrong.empty()) return wrong;
  const auto makes_nan = [&](int64_t t) {
    for (int64_t k = 0; k < c.K; ++k)
      if (lost >= 0 && index[t * c.K + k] == lost) return true;
    return false;
  };
  Error error;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = c.scaled ? bias.at(0, n) : 0, magnitude = std::fabs(sum);
      for (int64_t i = 0; i < c.I; ++i) {
        const double v = x.at(t, i) * (c.n_contig ? w.at(i, n) : w.at(n, i));
        sum += v, magnitude += std::fabs(v);
      }
      for (int64_t k = 0; k < c.K && !makes_nan(t); ++k) {
        const int64_t a = index[t * c.K + k];
        const Dropout dropout = a >= 0 && c.p > 0 ? make_dropout(drop[a]) : Dropout{};
        const Philox block = dropout_block(static_cast<uint64_t>(seed), t, n / kDropoutBlock);
        const bool keep = bits16(block, static_cast<int>(n % kDropoutBlock)) >= dropout.threshold;
        for (int64_t r = 0; a >= 0 && keep && r < ranks[a]; ++r) {
          const double v = s.at(t * c.K + k, r) * pool.at(row_of(a, r), n) * dropout.keep_scale;
          sum += v, magnitude += std::fabs(v);
        }
      }
      if (makes_nan(t)) {
        if (!std::isnan(y.at(t, n))) return "a row of an adapter without its page is a number";
      } else {
        error.add(y.at(t, n), sum, magnitude, b, false);
      }
    }
  if (!error.verdict().empty() || !c.poisoned || !ranks[0]) return error.verdict();

  // An adapter that is not finite touches nobody: other rows keep their bits, its own are not finite where it is.
  const std::vector<unsigned char> before = y.bytes;
  const int64_t row = row_of(0, ranks[0] - 1), column = static_cast<int64_t>(draw() % c.N);
  store(b, pool.data(), row * c.N + column, NAN);
  store(b, pool.data(), row * c.N + (column + 1) % c.N, INFINITY);
  pool.fresh = pool.bytes;
  Matrix clean = y;
  clean.bytes = before;
  if (const std::string wrong = run({schedules[0]}); !wrong.empty()) return wrong + ", poisoned";
  for (int64_t t = 0; t < c.T; ++t) {
    bool owns = false;
    for (int64_t k = 0; k < c.K; ++k) owns = owns || index[t * c.K + k] == 0;
    for (int64_t n = 0; n < c.N; ++n) {
      const double got = y.at(t, n), was = clean.at(t, n);
      if (!owns && !(got == was || (std::isnan(got) && std::isnan(was))))
        return words("row ", t, " met a NaN of another adapter");
      if (owns && n == column && c.p == 0 && !std::isnan(got)) return words("row ", t, " lost its adapter's NaN");
      if (owns && n != column && n != (column + 1) % c.N && !makes_nan(t) &&
          !(std::fabs(got - was) <= 0.01 * std::fabs(was) + 0.02))
        return words("row ", t, " is off where its adapter is finite");
    }
  }
  return "";
}

std::string judge(const Case& c, const std::vector<int>& schedules) {
  if (c.op == "gemm") return judge_gemm(c, schedules);
  const int64_t R = kPageRanks * c.M, used = c.A * c.L * c.M, P = kPageRanks * (used + 1);
  const PlanLayout at = plan_layout(c.T, c.A);
  auto pages = tracked<int32_t>(used, true), ranks = tracked<int32_t>(c.A * c.L, true);
  auto index = tracked<int32_t>(c.T * c.K, true), plan = tracked<int32_t>(c.K * at.length, false);
  auto ids = tracked<int64_t>(c.T, true);
  auto drop = tracked<float>(c.A, true), scales = tracked<float>(c.T * c.K, true);
  for (int64_t i = 0; i < used; ++i) pages[i] = static_cast<int32_t>(i + 1);
  for (int64_t i = used - 1; i > 0; --i) std::swap(pages[i], pages[draw() % (i + 1)]);
  for (int32_t& r : ranks) r = static_cast<int32_t>(draw() % (R + 1));
  for (int32_t& a : index) a = static_cast<int32_t>(draw() % (c.A + 1)) - 1;
  if (part_windows(c.T) > 1)  // an adapter has several parts only where it has so many rows
    for (int32_t& a : index) a = draw() % 16 ? 0 : a;
  for (int64_t& id : ids) id = static_cast<int64_t>(draw() % c.N);
  for (float& p : drop) p = static_cast<float>(c.p);
  for (float& v : scales) v = static_cast<float>(draw_value());
  const int64_t seed = 0x1234567890abcdef;
  emu::track_global(&seed, sizeof seed, true);

  Matrix x(c.dtype, c.T, c.N, c.pad, c.shift, true), pool(c.factor, P, c.N, 0, 0, true);
  Matrix out(c.dtype, c.T, c.N, c.pad, 0, false), g(c.factor, P, c.N, 0, 0, true), g32(DType::kF32, P, c.N, 0, 0, true);
  const DType s_type = s_dtype(c.factor);
  Matrix s_in(s_type, c.T * c.K * c.L, R, 0, 0, true), s_out(s_type, c.T * c.K * c.L, R, 0, 0, false);
  for (Matrix* m : {&g, &g32}) {
    std::fill(m->bytes.begin(), m->bytes.end(), 0);
    m->fresh = m->bytes;
  }
  const Adapters d{.pages = pages.data(),
                   .ranks = ranks.data(),
                   .plan = plan.data(),
                   .T = c.T,
                   .K = c.K,
                   .A = c.A,
                   .L = c.L,
                   .M = c.M,
                   .P = P,
                   .first = c.first,
                   .slices = c.slices,
                   .dropout_p = c.p > 0 ? drop.data() : nullptr,
                   .seed = &seed};
  Matrix& y = c.in_place ? x : out;
  const float* scale = c.scaled ? scales.data() : nullptr;
  const MultiLoraPlanParams planning{.index = index.data(), .plan = plan.data(), .T = c.T, .K = c.K, .A = c.A};
  const MultiLoraShrinkParams shrink{.adapters = d,
                                     .x = x.data(),
                                     .pool = pool.data(),
                                     .s = s_out.data(),
                                     .scales = scale,
                                     .N = c.N,
                                     .x_pitch = x.pitch,
                                     .dtype = c.dtype,
                                     .factor_dtype = c.factor};
  const MultiLoraExpandParams expand{.adapters = d,
                                     .y = y.data(),
                                     .base = x.data(),
                                     .s = s_in.data(),
                                     .pool = pool.data(),
                                     .N = c.N,
                                     .y_pitch = y.pitch,
                                     .base_pitch = x.pitch,
                                     .dtype = c.dtype,
                                     .factor_dtype = c.factor};
  const MultiLoraWgradParams wgrad{.adapters = d,
                                   .s = s_in.data(),
                                   .x = x.data(),
                                   .g = g.data(),
                                   .N = c.N,
                                   .x_pitch = x.pitch,
                                   .dtype = c.dtype,
                                   .factor_dtype = c.factor};
  const MultiLoraGatherParams gather{.adapters = d,
                                     .ids = ids.data(),
                                     .pool = pool.data(),
                                     .s = s_out.data(),
                                     .scales = scale,
                                     .N = c.N,
                                     .factor_dtype = c.factor};
  const MultiLoraScatterParams scatter{
      .adapters = d, .ids = ids.data(), .s = s_in.data(), .g = g32.floats(), .N = c.N, .factor_dtype = c.factor};

  const auto scratch_of = [](size_t bytes) {
    return Matrix(DType::kF32, 1, static_cast<int64_t>(bytes / 4), 0, 0, false);
  };
  Matrix counts = scratch_of(multi_lora_plan_workspace(planning, kTarget));
  const auto run = [&](const auto& p, auto workspace_of, auto call) {
    Matrix scratch = scratch_of(workspace_of(p, kTarget));
    return run_schedules(schedules, {&x, &s_out, &g, &g32, &out, &scratch, &counts}, {x, s_out, g, g32, out, plan},
                         [&] {
                           const int code = multi_lora_plan_cuda(planning, counts.data(), nullptr);
                           return code ? code : call(p, scratch.data(), nullptr);
                         });
  };
  const std::string wrong = c.op == "shrink"   ? run(shrink, multi_lora_shrink_workspace, multi_lora_shrink_cuda)
                            : c.op == "expand" ? run(expand, multi_lora_expand_workspace, multi_lora_expand_cuda)
                            : c.op == "wgrad"  ? run(wgrad, multi_lora_wgrad_workspace, multi_lora_wgrad_cuda)
                            : c.op == "gather" ? run(gather, multi_lora_gather_workspace, multi_lora_gather_cuda)
                                               : run(scatter, multi_lora_scatter_workspace, multi_lora_scatter_cuda);
  if (!wrong.empty()) return wrong;

  for (int64_t k = 0; k < c.K; ++k) {  // the plan: groups ascending, rows ascending in each, tiles that cover them
    const int32_t *order = plan.data() + k * at.length, *tiles = order + at.tiles;
    for (int64_t i = 0; i + 1 < c.T; ++i) {
      const int32_t a = index[order[i] * c.K + k], b = index[order[i + 1] * c.K + k];
      if (a > b || (a == b && order[i] >= order[i + 1])) return "the plan is not in order";
    }
    int64_t covered = 0;
    for (int64_t i = 0; i < at.G && tiles[2 * i + 1] < c.T; ++i) {
      const int32_t group = tiles[2 * i], start = tiles[2 * i + 1];
      if (start != covered || index[order[start] * c.K + k] != group - 1) return "a tile is off";
      while (covered < c.T && covered < start + kPlanRows && index[order[covered] * c.K + k] == group - 1) ++covered;
    }
    if (covered != c.T) return "the tiles leave rows out";
  }

  const Dropout dropout = make_dropout(static_cast<float>(c.p));
  const auto mask = [&](int64_t t, int64_t k, int64_t n) {
    const Philox block = dropout_block(static_cast<uint64_t>(seed), t * c.K + k, n / kDropoutBlock);
    return bits16(block, static_cast<int>(n % kDropoutBlock)) >= dropout.threshold ? double{dropout.keep_scale} : 0.0;
  };
  const auto row_of = [&](int64_t a, int64_t l, int64_t r) {  // of the pool, or -1
    if (a < 0 || r >= ranks[a * c.L + l]) return int64_t{-1};
    return int64_t{pages[(a * c.L + l) * c.M + r / kPageRanks]} * kPageRanks + r % kPageRanks;
  };
  const bool exact = c.dtype == c.factor, mixed = !exact || c.factor != s_type;  // mixed: two bf16 terms
  Error error;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t l = c.first; l < c.first + c.slices; ++l)
        for (int64_t r = 0; r < R && (c.op == "shrink" || c.op == "gather"); ++r) {
          const int64_t row = row_of(index[t * c.K + k], l, r);
          const double times = c.scaled ? scales[t * c.K + k] : 1.0;
          double sum = 0, magnitude = 0;
          for (int64_t n = 0; n < c.N && row >= 0; ++n) {
            const double v =
                c.op == "gather" ? (n == ids[t]) * pool.at(row, n) : mask(t, k, n) * x.fresh_at(t, n) * pool.at(row, n);
            sum += v, magnitude += std::fabs(v);
          }
          error.add(s_out.at((t * c.K + k) * c.L + l, r), times * sum, std::fabs(times) * magnitude, s_type, !exact);
        }
  for (int64_t t = 0; t < c.T && c.op == "expand"; ++t)
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = x.fresh_at(t, n), magnitude = std::fabs(sum) + 1;
      for (int64_t k = 0; k < c.K; ++k)
        for (int64_t l = c.first; l < c.first + c.slices; ++l)
          for (int64_t r = 0; r < R; ++r) {
            const int64_t row = row_of(index[t * c.K + k], l, r);
            if (row < 0) continue;
            const double v = mask(t, k, n) * s_in.at((t * c.K + k) * c.L + l, r) * pool.at(row, n);
            sum += v, magnitude += std::fabs(v);
          }
      error.add(y.at(t, n), sum, magnitude, c.dtype, mixed);
    }
  if (c.op == "wgrad" || c.op == "scatter") {
    std::vector<double> sum(P * c.N), magnitude(P * c.N);
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t k = 0; k < c.K; ++k)
        for (int64_t l = c.first; l < c.first + c.slices; ++l)
          for (int64_t r = 0; r < R; ++r) {
            const int64_t row = row_of(index[t * c.K + k], l, r);
            for (int64_t n = 0; n < c.N && row >= 0; ++n) {
              const double to = c.op == "scatter" ? n == ids[t] : mask(t, k, n) * x.fresh_at(t, n);
              const double v = to * s_in.at((t * c.K + k) * c.L + l, r);
              sum[row * c.N + n] += v, magnitude[row * c.N + n] += std::fabs(v);
            }
          }
    for (int64_t row = 0; row < P; ++row)
      for (int64_t n = 0; n < c.N; ++n) {
        const size_t i = static_cast<size_t>(row * c.N + n);
        const bool wide = c.op == "scatter";
        error.add((wide ? g32 : g).at(row, n), sum[i], magnitude[i], wide ? DType::kF32 : c.factor, mixed);
      }
  }
  const bool writes_x = c.op == "expand" && c.in_place;
  if (!x.padding_untouched() || !out.padding_untouched() || (!writes_x && x.bytes != x.fresh))
    return "wrote where it should only read";
  return error.verdict();
}

// Two rows far apart: x and y, and a pool as wide.
void huge(int& code, Error& error) {
  const int64_t pitch = (int64_t{1} << 31) + 8, T = 2, N = 40, R = 3;
  const DType b = DType::kBF16;
  bf16* x = reserve(pitch + N);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) store(b, x, t * pitch + n, draw_value());
  std::vector<bf16> pool(kPageRanks * N), s(T * kPageRanks), g(kPageRanks * N, bf16{0});
  for (size_t i = 0; i < pool.size(); ++i) store(b, pool.data(), static_cast<int64_t>(i), draw_value());
  const PlanLayout at = plan_layout(T, 1);
  std::vector<int32_t> page{0}, rank{static_cast<int32_t>(R)}, index{0, 0}, plan(at.length), counts(4);
  const Adapters d{.pages = page.data(),
                   .ranks = rank.data(),
                   .plan = plan.data(),
                   .T = T,
                   .K = 1,
                   .A = 1,
                   .L = 1,
                   .M = 1,
                   .P = kPageRanks,
                   .first = 0,
                   .slices = 1,
                   .dropout_p = nullptr,
                   .seed = nullptr};
  const MultiLoraPlanParams planning{.index = index.data(), .plan = plan.data(), .T = T, .K = 1, .A = 1};
  const MultiLoraShrinkParams shrink{.adapters = d,
                                     .x = x,
                                     .pool = pool.data(),
                                     .s = s.data(),
                                     .scales = nullptr,
                                     .N = N,
                                     .x_pitch = pitch,
                                     .dtype = b,
                                     .factor_dtype = b};
  const MultiLoraWgradParams wgrad{
      .adapters = d, .s = s.data(), .x = x, .g = g.data(), .N = N, .x_pitch = pitch, .dtype = b, .factor_dtype = b};
  const MultiLoraExpandParams expand{.adapters = d,
                                     .y = x,
                                     .base = x,
                                     .s = s.data(),
                                     .pool = pool.data(),
                                     .N = N,
                                     .y_pitch = pitch,
                                     .base_pitch = pitch,
                                     .dtype = b,
                                     .factor_dtype = b};
  const auto x_at = [&](int64_t t, int64_t n) { return load(b, x, t * pitch + n); };
  const auto pool_at = [&](int64_t r, int64_t n) { return load(b, pool.data(), r * N + n); };
  const auto s_at = [&](int64_t t, int64_t r) { return load(b, s.data(), t * kPageRanks + r); };
  std::vector<float> scratch(multi_lora_shrink_workspace(shrink, kTarget) / 4 + 1);
  code = multi_lora_plan_cuda(planning, counts.data(), nullptr);
  code |= multi_lora_shrink_cuda(shrink, scratch.data(), nullptr);
  code |= multi_lora_wgrad_cuda(wgrad, nullptr, nullptr);
  std::vector<double> want(T * N);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t r = 0; r < R; ++r) {
      double sum = 0;
      for (int64_t n = 0; n < N; ++n) sum += x_at(t, n) * pool_at(r, n);
      error.add(s_at(t, r), sum, N, b, false);
    }
  for (int64_t n = 0; n < N; ++n)
    for (int64_t r = 0; r < R; ++r)
      error.add(load(b, g.data(), r * N + n), s_at(0, r) * x_at(0, n) + s_at(1, r) * x_at(1, n), 10, b, false);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) {
      want[t * N + n] = x_at(t, n);
      for (int64_t r = 0; r < R; ++r) want[t * N + n] += s_at(t, r) * pool_at(r, n);
    }
  code |= multi_lora_expand_cuda(expand, nullptr, nullptr);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) error.add(x_at(t, n), want[t * N + n], N, b, false);
}

}  // namespace

int main(int argc, char** argv) { return lrk::run_program(argc, argv, draw_case, judge, huge); }
