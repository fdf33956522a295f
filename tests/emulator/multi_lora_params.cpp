// SPDX-License-Identifier: Apache-2.0
// Runs every launcher of csrc/multi_lora.h at params level over the emulator, with neither torch nor Python in the process,
// and compares with sums in double; results must have equal bits under every schedule tried.
//
//   multi_lora_params CASES SEED SCHEDULE...     random cases; a line for each that fails
//   multi_lora_params huge                       pitches of more than 2^31 elements
#include <sys/mman.h>

#include <algorithm>
#include <tuple>

#include "multi_lora.h"
#include "params.h"

namespace {

using namespace lrk;

struct Ints {  // int32 or int64, exact to the byte
  std::vector<int32_t> v;
  explicit Ints(size_t n, int32_t fill = 0) : v(n, fill) { v.shrink_to_fit(); }
  void track(bool filled) { emu::track_global(v.data(), v.size() * 4, filled); }
};

struct Case {
  std::string op;
  DType dtype, factor;
  int64_t T, N, A, K, L, M, pad, shift;
  int32_t first, slices;
  double p;
  bool in_place, scaled;

  std::string text() const {
    char s[256];
    std::snprintf(s, sizeof s, "%s %s/%s T=%lld N=%lld A=%lld K=%lld L=%lld (%d, %d) M=%lld pad=%lld shift=%lld p=%g%s",
                  op.c_str(), lrk::name_of(dtype), lrk::name_of(factor), static_cast<long long>(T),
                  static_cast<long long>(N), static_cast<long long>(A), static_cast<long long>(K),
                  static_cast<long long>(L), first, slices, static_cast<long long>(M), static_cast<long long>(pad),
                  static_cast<long long>(shift), p, in_place ? " in place" : "");
    return s;
  }
};

Case draw_case() {
  const std::pair<DType, DType> types[] = {{DType::kF32, DType::kF32},
                                           {DType::kF16, DType::kF16},
                                           {DType::kBF16, DType::kBF16},
                                           {DType::kF16, DType::kF32},
                                           {DType::kBF16, DType::kF32}};
  const char* ops[] = {"shrink", "shrink", "expand", "expand", "wgrad", "wgrad", "gather", "scatter"};
  Case c{};
  c.op = ops[draw() % 8];
  std::tie(c.dtype, c.factor) = types[draw() % 5];
  c.T = pick({1, 3, 16, 64, 65, 130, 300});
  c.N = pick({1, 8, 24, 64, 130, 257, 520});
  c.A = pick({1, 2, 5, 20}), c.K = pick({1, 1, 2, 3}), c.L = pick({1, 1, 2}), c.M = pick({1, 1, 2, 5});
  if (c.op == "wgrad" && draw() % 3 == 0) c.T = pick({513, 600}), c.N = std::min<int64_t>(c.N, 130), c.A = pick({1, 2});
  c.first = static_cast<int32_t>(draw() % c.L);
  c.slices = static_cast<int32_t>(1 + draw() % (c.L - c.first));
  c.pad = pick({0, 0, 8, 3}), c.shift = pick({0, 0, 1, 8});
  c.p = draw() % 3 == 0 && c.op != "gather" && c.op != "scatter" ? 0.3 : 0.0;
  c.in_place = draw() % 2, c.scaled = draw() % 2;
  return c;
}

bool fail(const Case& c, const char* why) {
  std::printf("FAIL %s: %s\n", c.text().c_str(), why);
  return false;
}

bool run_case(const Case& c, const std::vector<int>& schedules) {
  emu::forget_global();
  const int64_t R = kPageRanks * c.M, used = c.A * c.L * c.M, P = kPageRanks * (used + 1);
  const PlanLayout at = plan_layout(c.T, c.A);
  Ints pages(used), ranks(c.A * c.L), index(c.T * c.K), plan(c.K * at.length);
  for (int64_t i = 0; i < used; ++i) pages.v[i] = static_cast<int32_t>(i + 1);
  for (int64_t i = used - 1; i > 0; --i) std::swap(pages.v[i], pages.v[draw() % (i + 1)]);
  for (int32_t& r : ranks.v) r = static_cast<int32_t>(draw() % (R + 1));
  for (int32_t& a : index.v) a = static_cast<int32_t>(draw() % (c.A + 1)) - 1;
  pages.track(true), ranks.track(true), index.track(true), plan.track(false);
  std::vector<int64_t> ids(c.T);
  for (int64_t& id : ids) id = static_cast<int64_t>(draw() % c.N);
  emu::track_global(ids.data(), ids.size() * 8, true);
  std::vector<float> drop(c.A, static_cast<float>(c.p)), scales(c.T * c.K);
  for (float& v : scales) v = static_cast<float>(draw_value());
  emu::track_global(drop.data(), drop.size() * 4, true), emu::track_global(scales.data(), scales.size() * 4, true);
  const int64_t seed = 0x1234567890abcdef;
  emu::track_global(&seed, sizeof seed, true);

  Matrix x(c.dtype, c.T, c.N, c.pad, c.shift, true), pool(c.factor, P, c.N, 0, 0, true);
  Matrix out(c.dtype, c.T, c.N, c.pad, 0, false), g(c.factor, P, c.N, 0, 0, true), g32(DType::kF32, P, c.N, 0, 0, true);
  Matrix s_in(c.factor, c.T * c.K * c.L, R, 0, 0, true), s_out(c.factor, c.T * c.K * c.L, R, 0, 0, false);
  for (Matrix* m : {&g, &g32}) {
    std::fill(m->bytes.begin(), m->bytes.end(), 0);
    m->fresh = m->bytes;
  }
  const Adapters d{pages.v.data(),
                   ranks.v.data(),
                   plan.v.data(),
                   c.T,
                   c.K,
                   c.A,
                   c.L,
                   c.M,
                   P,
                   c.first,
                   c.slices,
                   c.p > 0 ? drop.data() : nullptr,
                   &seed};
  Matrix& y = c.in_place ? x : out;
  const float* scale = c.scaled ? scales.data() : nullptr;
  const MultiLoraPlanParams planning{index.v.data(), plan.v.data(), c.T, c.K, c.A};
  const MultiLoraShrinkParams shrink{d, x.data(), pool.data(), s_out.data(), scale, c.N, x.pitch, c.dtype, c.factor};
  const MultiLoraExpandParams expand{d,   y.data(), x.data(), s_in.data(), pool.data(),
                                     c.N, y.pitch,  x.pitch,  c.dtype,     c.factor};
  const MultiLoraWgradParams wgrad{d, s_in.data(), x.data(), g.data(), c.N, x.pitch, c.dtype, c.factor};
  const MultiLoraGatherParams gather{d, ids.data(), pool.data(), s_out.data(), scale, c.N, c.factor};
  const MultiLoraScatterParams scatter{d, ids.data(), s_in.data(), static_cast<float*>(g32.data()), c.N, c.factor};

  const auto scratch_of = [](size_t bytes) { return std::max<int64_t>(1, static_cast<int64_t>(bytes / 4)); };
  size_t bytes = 0;
  if (c.op == "shrink") bytes = multi_lora_shrink_workspace(shrink, kTarget);
  if (c.op == "expand") bytes = multi_lora_expand_workspace(expand, kTarget);
  if (c.op == "wgrad") bytes = multi_lora_wgrad_workspace(wgrad, kTarget);
  Matrix scratch(DType::kF32, 1, scratch_of(bytes), 0, 0, false);
  Matrix counts(DType::kF32, 1, scratch_of(multi_lora_plan_workspace(planning, kTarget)), 0, 0, false);
  void* ws = scratch.data();

  std::vector<unsigned char> first;
  for (int schedule : schedules) {
    lrk_emulator_set("schedule", schedule);
    for (Matrix* m : {&x, &s_out, &g, &g32, &out, &scratch, &counts}) m->bytes = m->fresh;
    int code = multi_lora_plan_cuda(planning, counts.data(), nullptr);
    if (!code)
      code = c.op == "shrink"   ? multi_lora_shrink_cuda(shrink, ws, nullptr)
             : c.op == "expand" ? multi_lora_expand_cuda(expand, ws, nullptr)
             : c.op == "wgrad"  ? multi_lora_wgrad_cuda(wgrad, ws, nullptr)
             : c.op == "gather" ? multi_lora_gather_cuda(gather, ws, nullptr)
                                : multi_lora_scatter_cuda(scatter, ws, nullptr);
    if (code) return fail(c, "a launch returned an error");
    std::vector<unsigned char> now;
    for (Matrix* m : {&x, &s_out, &g, &g32, &out}) now.insert(now.end(), m->bytes.begin(), m->bytes.end());
    const auto* words = reinterpret_cast<const unsigned char*>(plan.v.data());
    now.insert(now.end(), words, words + plan.v.size() * 4);
    if (first.empty()) first = now;
    if (first != now) return fail(c, "schedules give different bits");
  }

  for (int64_t k = 0; k < c.K; ++k) {  // the plan: groups ascending, rows ascending in each, tiles that cover them
    const int32_t *order = plan.v.data() + k * at.length, *tiles = order + at.tiles;
    for (int64_t i = 0; i + 1 < c.T; ++i) {
      const int32_t a = index.v[order[i] * c.K + k], b = index.v[order[i + 1] * c.K + k];
      if (a > b || (a == b && order[i] >= order[i + 1])) return fail(c, "the plan is not in order");
    }
    int64_t covered = 0;
    for (int64_t i = 0; i < at.G && tiles[2 * i + 1] < c.T; ++i) {
      const int32_t group = tiles[2 * i], start = tiles[2 * i + 1];
      if (start != covered || index.v[order[start] * c.K + k] != group - 1) return fail(c, "a tile is off");
      while (covered < c.T && covered < start + kPlanRows && index.v[order[covered] * c.K + k] == group - 1) ++covered;
    }
    if (covered != c.T) return fail(c, "the tiles leave rows out");
  }

  const Dropout dropout = make_dropout(static_cast<float>(c.p));
  const auto mask = [&](int64_t t, int64_t k, int64_t n) {
    const Philox block = dropout_block(static_cast<uint64_t>(seed), t * c.K + k, n / kDropoutBlock);
    return bits16(block, static_cast<int>(n % kDropoutBlock)) >= dropout.threshold ? double{dropout.keep_scale} : 0.0;
  };
  const auto row_of = [&](int64_t a, int64_t l, int64_t r) {  // of the pool, or -1
    if (a < 0 || r >= ranks.v[a * c.L + l]) return int64_t{-1};
    return int64_t{pages.v[(a * c.L + l) * c.M + r / kPageRanks]} * kPageRanks + r % kPageRanks;
  };
  const bool mixed = c.dtype != c.factor;
  Error error;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t k = 0; k < c.K; ++k)
      for (int64_t l = c.first; l < c.first + c.slices; ++l)
        for (int64_t r = 0; r < R && (c.op == "shrink" || c.op == "gather"); ++r) {
          const int64_t row = row_of(index.v[t * c.K + k], l, r);
          const double times = c.scaled ? scales[t * c.K + k] : 1.0;
          double sum = 0, magnitude = 0;
          for (int64_t n = 0; n < c.N && row >= 0; ++n) {
            const double v =
                c.op == "gather" ? (n == ids[t]) * pool.at(row, n) : mask(t, k, n) * x.fresh_at(t, n) * pool.at(row, n);
            sum += v, magnitude += std::fabs(v);
          }
          error.add(s_out.at((t * c.K + k) * c.L + l, r), times * sum, std::fabs(times) * magnitude, c.factor, mixed);
        }
  for (int64_t t = 0; t < c.T && c.op == "expand"; ++t)
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = x.fresh_at(t, n), magnitude = std::fabs(sum) + 1;
      for (int64_t k = 0; k < c.K; ++k)
        for (int64_t l = c.first; l < c.first + c.slices; ++l)
          for (int64_t r = 0; r < R; ++r) {
            const int64_t row = row_of(index.v[t * c.K + k], l, r);
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
            const int64_t row = row_of(index.v[t * c.K + k], l, r);
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
  if (!(error.worst <= 1.0))
    return fail(c, ("the error is " + std::to_string(error.worst) + " times its bound").c_str());
  const bool writes_x = c.op == "expand" && c.in_place;
  if (!x.padding_untouched() || !out.padding_untouched() || (!writes_x && x.bytes != x.fresh))
    return fail(c, "wrote where it should only read");
  return true;
}

// Two rows far apart in memory that is reserved and mostly never touched: x and y, and a pool as wide.
bool run_huge() {
  const int64_t pitch = (int64_t{1} << 31) + 8, T = 2, N = 40, R = 3;
  const size_t bytes = static_cast<size_t>((pitch + N) * 2);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::printf("SKIP no address space for 2^31 elements\n");
    std::exit(0);
  }
  const DType b = DType::kBF16;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) store(b, p, t * pitch + n, draw_value());
  std::vector<bf16> pool(kPageRanks * N), s(T * kPageRanks), g(kPageRanks * N, bf16{0});
  for (size_t i = 0; i < pool.size(); ++i) store(b, pool.data(), static_cast<int64_t>(i), draw_value());
  const PlanLayout at = plan_layout(T, 1);
  std::vector<int32_t> page{0}, rank{static_cast<int32_t>(R)}, index{0, 0}, plan(at.length), counts(4);
  const Adapters d{page.data(), rank.data(), plan.data(), T, 1, 1, 1, 1, kPageRanks, 0, 1, nullptr, nullptr};
  const auto x_at = [&](int64_t t, int64_t n) { return load(b, p, t * pitch + n); };
  const auto pool_at = [&](int64_t r, int64_t n) { return load(b, pool.data(), r * N + n); };
  const auto s_at = [&](int64_t t, int64_t r) { return load(b, s.data(), t * kPageRanks + r); };
  int code = multi_lora_plan_cuda({index.data(), plan.data(), T, 1, 1}, counts.data(), nullptr);
  const MultiLoraShrinkParams shrink{d, p, pool.data(), s.data(), nullptr, N, pitch, b, b};
  std::vector<float> scratch(multi_lora_shrink_workspace(shrink, kTarget) / 4 + 1);
  code |= multi_lora_shrink_cuda(shrink, scratch.data(), nullptr);
  code |= multi_lora_wgrad_cuda({d, s.data(), p, g.data(), N, pitch, b, b}, nullptr, nullptr);
  Error error;
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
  code |= multi_lora_expand_cuda({d, p, p, s.data(), pool.data(), N, pitch, pitch, b, b}, nullptr, nullptr);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) error.add(x_at(t, n), want[t * N + n], N, b, false);
  munmap(p, bytes);
  const bool ok = code == 0 && error.worst <= 1.0;
  std::printf("%s huge pitches: code %d, error %.3g of its bound\n", ok ? "ok" : "FAIL", code, error.worst);
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  return lrk::run_program(
      argc, argv, [](const std::vector<int>& schedules) { return run_case(draw_case(), schedules); }, run_huge);
}
