// SPDX-License-Identifier: Apache-2.0
// Runs every launcher of csrc/mx.h at params level over the emulator: codes and scales must be those of loops over csrc/mx.h's
// codecs bit for bit, decoded values exact, and products within a sum's bound of double; equal bits under every schedule tried.
// Codes and scales are any bytes; the allocations end where the last block does.
#include <tuple>

#include "cuda/mx/linear.cuh"
#include "mx.h"
#include "params.h"

namespace {

using namespace lrk;

struct Case {
  std::string op;
  DType dtype, b_dtype;
  int64_t T, K, O, R, E, pad, shift;
  MxRule rule;
  bool hadamard, random, across, mask, bias, low_rank, any_scale;
  float gain;
  int32_t steps;            // of few
  int32_t tile_n, cluster;  // of many

  int64_t G() const { return ceil_div(K, int64_t{kMxBlock}); }
  std::string text() const {
    return words(op, " ", lrk::name_of(dtype), "/", lrk::name_of(b_dtype), " T=", T, " K=", K, " O=", O, " R=", R,
                 " E=", E, " pad=", pad, " shift=", shift, " rule=", static_cast<int>(rule),
                 hadamard ? " hadamard" : "", random ? " random" : "", across ? " across" : "", mask ? " mask" : "",
                 bias ? " bias" : "", low_rank ? " low rank" : "", any_scale ? " any scale" : "", " gain=", gain,
                 steps ? words(" steps=", steps) : "", tile_n ? words(" tiles of ", cluster, " x 128 x ", tile_n) : "");
  }
};

Case draw_case() {
  Case c{};
  c.op = draw_op({"quantize", "quantize", "dequantize", "linear", "linear", "linear", "experts", "experts", "nvfp4"});
  const bool few = c.op == "few", many = c.op == "many", linear = c.op == "linear", experts = c.op == "experts";
  std::tie(c.dtype, c.b_dtype) = draw_types();
  if (few || many) c.dtype = DType::kBF16, c.b_dtype = draw() % 2 ? DType::kBF16 : DType::kF32;
  c.T = linear || few ? 1 + static_cast<int64_t>(draw() % kMxFewCuda) : pick({1, 3, 16, 33, 130});
  c.K = pick({1, 31, 32, 33, 64, 100, 256, 544, 1088, 2112});
  c.O = pick({1, 7, 16, 17, 40, 64});
  c.R = pick({1, 4, 16, 33});
  c.E = experts ? pick({1, 2, 3, 9}) : 1;
  if (experts) c.T = pick({1, 5, 9, 17, 40, 70});
  c.pad = pick({0, 0, 8, 3}), c.shift = pick({0, 0, 0, 1, 8});
  c.rule = static_cast<MxRule>(draw() % kMxRules);
  c.hadamard = draw() % 2, c.random = draw() % 3 == 0, c.across = draw() % 3 == 0, c.mask = draw() % 2;
  c.bias = draw() % 2, c.low_rank = draw() % 2, c.any_scale = draw() % 3 == 0;
  c.gain = draw() % 3 ? 1.f : .75f;
  if (few) {
    c.O = pick({1, 64, 100, 128, 130, 300}), c.R = pick({1, 8, 16, 33, 136});
    c.steps = 1 + static_cast<int32_t>(draw() % kMxMostSteps);
  }
  if (many) {
    c.T = pick({1, 17, 130, 300}), c.K = pick({32, 64, 96, 200, 544}), c.O = pick({8, 136, 128, 264});
    c.R = pick({1, 8, 16, 33, 136}), c.pad = pick({0, 8}), c.shift = pick({0, 8});
    c.tile_n = static_cast<int32_t>(pick({128, 256})), c.cluster = 1 + static_cast<int32_t>(draw() % 2);
  }
  return c;
}

uint32_t code_at(const std::vector<uint8_t>& codes, int64_t i) {
  return codes[static_cast<size_t>(i / 2)] >> i % 2 * 4 & 15u;
}

// What the quantiser does to a block, written from the header's codecs.
struct Block {
  uint32_t codes[kMxBlock], scale, within = 0;
  Block(const Case& c, float (&v)[kMxBlock], uint32_t signs, uint64_t seed, int64_t row, int64_t k) {
    if (c.hadamard) hadamard32(v, signs);
    float of = 0.f;
    for (float x : v) of = is_quest(c.rule) ? fmaf(x, x, of) : std::max(of, std::fabs(x));
    bool finite = true;
    for (float x : v) finite = finite && std::isfinite(x);
    if (is_quest(c.rule)) of = sqrtf(of / kMxBlock);
    scale = finite ? mx_scale(c.rule, of) : 255u;
    for (int i = 0; i < kMxBlock; ++i) {
      const float y = v[i] * e8m0_inverse(scale) * c.gain;
      within |= static_cast<uint32_t>(std::fabs(y) < 6.f) << i;
      codes[i] = c.random ? e2m1_stochastic(y, bits16(mx_random(seed, row, (k + i) / 8), i % 8)) : e2m1_code(y);
      if (scale == 255u) codes[i] = 0;
    }
  }
};

std::string judge_quantize(const Case& c, const std::vector<int>& schedules) {
  Matrix x(c.dtype, c.across ? c.K : c.T, c.across ? c.T : c.K, c.pad, c.shift, true);
  const int64_t x_row = c.across ? 1 : x.pitch, x_column = c.across ? x.pitch : 1, G = c.G();
  const double sizes[] = {1e-30, 1e-3, 1, 100, 0};
  const auto put = [&](int64_t t, int64_t k, double v) {
    store(c.dtype, x.bytes.data() + x.offset, t * x_row + k * x_column, v);
  };
  for (int64_t t = 0; t < c.T; ++t)  // every block of a size of its own, and some that are not numbers
    for (int64_t g = 0; g < G; ++g) {
      const double size = sizes[draw() % 5];
      for (int64_t k = g * kMxBlock; k < std::min(c.K, (g + 1) * kMxBlock); ++k) put(t, k, size * draw_value());
      if (draw() % 8 == 0) put(t, g * kMxBlock, draw() % 2 ? std::nan("") : -HUGE_VAL);
    }
  x.fresh = x.bytes;
  std::vector<uint8_t> codes(static_cast<size_t>(c.T * G * kMxBytes), 0xee), scales(static_cast<size_t>(c.T * G), 0xee);
  std::vector<int32_t> mask(static_cast<size_t>(c.T * G), -7);
  const int64_t seed[1] = {static_cast<int64_t>(draw())};
  const int32_t signs[1] = {static_cast<int32_t>(draw())};
  const bool turned = c.hadamard && draw() % 2;
  const MxQuantizeParams p{.x = x.data(),
                           .codes = codes.data(),
                           .scales = scales.data(),
                           .mask = c.mask ? mask.data() : nullptr,
                           .seed = c.random ? seed : nullptr,
                           .signs = turned ? signs : nullptr,
                           .T = c.T,
                           .K = c.K,
                           .x_row = x_row,
                           .x_column = x_column,
                           .gain = c.gain,
                           .rule = c.rule,
                           .hadamard = c.hadamard,
                           .dtype = c.dtype};
  const std::string wrong =
      run_schedules(schedules, {&x}, {codes, scales, mask}, [&] { return mx_quantize_cuda(p, nullptr, nullptr); });
  if (!wrong.empty()) return wrong;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t g = 0; g < G; ++g) {
      float v[kMxBlock] = {};
      for (int64_t i = 0; i < std::min(c.K - g * kMxBlock, int64_t{kMxBlock}); ++i)
        v[i] = static_cast<float>(load(c.dtype, x.data(), t * x_row + (g * kMxBlock + i) * x_column));
      const Block want(c, v, turned ? static_cast<uint32_t>(signs[0]) : 0u, static_cast<uint64_t>(seed[0]), t,
                       g * kMxBlock);
      const size_t at = static_cast<size_t>(t * G + g);
      if (scales[at] != want.scale)
        return words("row ", t, " block ", g, ": scale ", scales[at] + 0, ", want ", want.scale);
      for (int i = 0; i < kMxBlock; ++i)
        if (code_at(codes, static_cast<int64_t>(at) * kMxBlock + i) != want.codes[i])
          return words("row ", t, " block ", g, " element ", i, ": another code");
      if (c.mask && want.scale != 255u && mask[at] != static_cast<int32_t>(want.within))
        return words("row ", t, " block ", g, ": another mask");
    }
  if (!c.mask && std::count(mask.begin(), mask.end(), -7) != static_cast<int64_t>(mask.size())) return "wrote a mask";
  return x.bytes == x.fresh ? "" : "wrote where it should only read";
}

// Packed rows of any codes; scales of a weight's size, or any byte.
struct Weight {
  std::vector<uint8_t> codes, scales;
  Weight(const Case& c, int64_t rows) {
    for (int64_t i = 0; i < rows * c.G() * kMxBytes; ++i) codes.push_back(static_cast<uint8_t>(draw() % 256));
    constexpr uint8_t ends[] = {0x00, 0xfe, 0xff, 128, 129};
    for (int64_t i = 0; i < rows * c.G(); ++i) {
      const bool end = c.any_scale && draw() % 16 == 0;
      scales.push_back(end ? ends[draw() % 5]
                           : static_cast<uint8_t>(c.any_scale ? 100 + draw() % 60 : 118 + draw() % 8));
    }
    codes.shrink_to_fit(), scales.shrink_to_fit();
    emu::track_global(codes.data(), codes.size(), true);
    emu::track_global(scales.data(), scales.size(), true);
  }
  double at(const Case& c, int64_t row, int64_t k) const {
    const uint32_t byte = scales[static_cast<size_t>(row * c.G() + k / kMxBlock)];
    if (byte == 255u) return std::nan("");
    const uint32_t code = code_at(codes, row * c.G() * kMxBlock + k);
    constexpr double values[] = {0, .5, 1, 1.5, 2, 3, 4, 6};
    return std::ldexp(code & 8u ? -values[code & 7u] : values[code & 7u], static_cast<int>(byte) - 127);
  }
};

std::string judge_dequantize(const Case& c, const std::vector<int>& schedules) {
  const Weight w(c, c.T);
  Matrix y(c.dtype, c.T, c.K, c.pad, c.shift, false);
  const MxDequantizeParams p{w.codes.data(),   w.scales.data(), y.data(), c.T,    c.K,
                             c.G() * kMxBytes, c.G(),           y.pitch,  c.dtype};
  const std::string wrong =
      run_schedules(schedules, {&y}, {y}, [&] { return mx_dequantize_cuda(p, nullptr, nullptr); });
  if (!wrong.empty()) return wrong;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t k = 0; k < c.K; ++k) {
      double want = 0;
      store(c.dtype, &want, 0, w.at(c, t, k));  // rounded once
      const double rounded = load(c.dtype, &want, 0), got = y.at(t, k);
      if (got != rounded && !(std::isnan(got) && std::isnan(rounded)))
        return words("row ", t, " column ", k, ": ", got, ", want ", rounded);
    }
  return y.padding_untouched() ? "" : "wrote between rows";
}

// Quantised, each code written from the header's codecs, and decoded again.
std::string judge_nvfp4(const Case& c, const std::vector<int>& schedules) {
  Matrix x(c.dtype, c.across ? c.K : c.T, c.across ? c.T : c.K, c.pad, c.shift, true),
      y(c.dtype, c.T, c.K, 0, 0, false);
  const int64_t x_row = c.across ? 1 : x.pitch, x_column = c.across ? x.pitch : 1, G = ceil_div(c.K, int64_t{kNvBlock});
  const auto value = [&](int64_t t, int64_t k) {
    return k < c.K ? static_cast<float>(load(c.dtype, x.data(), t * x_row + k * x_column)) : 0.f;
  };
  if (c.any_scale)
    store(c.dtype, x.bytes.data() + x.offset, (c.T / 2) * x_row, draw() % 2 ? std::nan("") : HUGE_VAL),
        x.fresh = x.bytes;
  std::vector<uint8_t> codes(static_cast<size_t>(c.T * G * kNvBytes), 0xee), scales(static_cast<size_t>(c.T * G), 0xee);
  const float ends[] = {draw() % 2 ? -1.f : -.01f, .5f};
  std::vector<float> global(1, -7.f);
  const int64_t seed[1] = {static_cast<int64_t>(draw())};
  const Nvfp4QuantizeParams p{.x = x.data(),
                              .codes = codes.data(),
                              .scales = scales.data(),
                              .global = global.data(),
                              .least = ends,
                              .most = ends + 1,
                              .seed = c.random ? seed : nullptr,
                              .T = c.T,
                              .K = c.K,
                              .x_row = x_row,
                              .x_column = x_column,
                              .dtype = c.dtype};
  std::string wrong =
      run_schedules(schedules, {&x}, {codes, scales, global}, [&] { return nvfp4_quantize_cuda(p, nullptr, nullptr); });
  if (!wrong.empty()) return wrong;
  if (global[0] != nvfp4_global(std::max(-ends[0], ends[1]))) return words("the global scale is ", global[0]);
  const Nvfp4DequantizeParams back{codes.data(), scales.data(), global.data(), y.data(), c.T, c.K, c.dtype};
  wrong = run_schedules(schedules, {&y}, {y}, [&] { return nvfp4_dequantize_cuda(back, nullptr, nullptr); });
  if (!wrong.empty()) return wrong;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t g = 0; g < G; ++g) {
      float largest = 0.f;
      for (int64_t k = g * kNvBlock; k < (g + 1) * kNvBlock; ++k)
        largest = std::isfinite(value(t, k)) ? std::max(largest, std::fabs(value(t, k))) : HUGE_VALF;
      const uint32_t scale = nvfp4_scale(largest, global[0]), got = scales[static_cast<size_t>(t * G + g)];
      if (got != scale) return words("row ", t, " block ", g, ": scale ", got, ", want ", scale);
      for (int64_t k = g * kNvBlock; k < (g + 1) * kNvBlock; ++k) {
        const float v = value(t, k) * nvfp4_inverse(scale, 1.f / global[0]);
        const uint32_t code = scale == 0x7fu ? 0u
                              : c.random
                                  ? e2m1_stochastic(v, bits16(mx_random(seed[0], t, k / 8), static_cast<int>(k % 8)))
                                  : e2m1_code(v);
        if (code_at(codes, t * G * kNvBlock + k) != code) return words("row ", t, " element ", k, ": another code");
        if (k >= c.K) continue;
        double want = 0;
        store(c.dtype, &want, 0, e2m1_value(code) * (global[0] * e4m3_value(scale)));
        const double rounded = load(c.dtype, &want, 0), at = y.at(t, k);
        if (at != rounded && !(std::isnan(at) && std::isnan(rounded)))
          return words("row ", t, " column ", k, ": ", at, ", want ", rounded);
      }
    }
  return x.bytes == x.fresh ? "" : "wrote where it should only read";
}

// Rows by expert, as csrc/multi_lora.h lays a plan out; -1 is none, E one that does not exist.
std::vector<int32_t> plan_of(const std::vector<int64_t>& experts, int64_t E) {
  const PlanLayout at = plan_layout(static_cast<int64_t>(experts.size()), E);
  std::vector<int32_t> order, begin, tiles;
  for (int64_t g = 0; g < E + 2; ++g) {
    begin.push_back(static_cast<int32_t>(order.size()));
    for (size_t t = 0; t < experts.size(); ++t) {
      if (experts[t] + 1 != g) continue;
      if ((order.size() - static_cast<size_t>(begin.back())) % kPlanRows == 0)
        tiles.insert(tiles.end(), {static_cast<int32_t>(g), static_cast<int32_t>(order.size())});
      order.push_back(static_cast<int32_t>(t));
    }
  }
  begin.push_back(static_cast<int32_t>(at.T));
  while (static_cast<int64_t>(tiles.size()) < 2 * at.G) tiles.insert(tiles.end(), {0, static_cast<int32_t>(at.T)});
  order.insert(order.end(), begin.begin(), begin.end());
  order.insert(order.end(), tiles.begin(), tiles.end());
  order.shrink_to_fit();
  return order;
}

std::string judge_linear(const Case& c, const std::vector<int>& schedules) {
  const bool by_expert = c.op == "experts";
  const Weight w(c, c.E * c.O);
  const DType s_dtype = c.b_dtype == DType::kF16 ? DType::kF32 : c.b_dtype;
  Matrix x(c.dtype, c.T, c.K, c.pad, c.shift, true), y(c.dtype, c.T, c.O, 0, 0, false);
  Matrix bias(c.dtype, c.E, c.O, 0, 0, true), s(s_dtype, c.T, c.R, 0, 0, true),
      b(c.b_dtype, c.E * c.O, c.R, 0, 0, true);
  const MxLinearParams p{.w = {w.codes.data(), w.scales.data(), c.O, c.K},
                         .x = x.data(),
                         .y = y.data(),
                         .bias = c.bias ? bias.data() : nullptr,
                         .s = c.low_rank ? s.data() : nullptr,
                         .b = c.low_rank ? b.data() : nullptr,
                         .T = c.T,
                         .x_pitch = x.pitch,
                         .R = static_cast<int32_t>(c.low_rank ? c.R : 0),
                         .dtype = c.dtype,
                         .b_dtype = c.b_dtype};
  std::vector<int64_t> experts;
  for (int64_t t = 0; t < c.T; ++t)
    experts.push_back(!by_expert ? 0 : draw() % 3 == 0 ? 0 : static_cast<int64_t>(draw() % (c.E + 2)) - 1);
  const std::vector<int32_t> plan = plan_of(experts, c.E);
  emu::track_global(plan.data(), plan.size() * sizeof(int32_t), true);
  const MxExpertsParams of_experts{p, plan.data(), c.E};
  const bool own = c.steps || c.tile_n;  // kernels that take fp32 factors apart
  MxFused parts{.why = ""};
  if (c.steps) parts.steps = c.steps, parts.parts = static_cast<int32_t>(ceil_div(c.K, int64_t{kMxStep} * c.steps));
  const size_t bytes = by_expert  ? mx_linear_experts_workspace(of_experts, kTarget)
                       : c.steps  ? static_cast<size_t>(parts.parts * c.T * c.O) * 4
                       : c.tile_n ? (c.low_rank ? tail_bytes(low_rank_of(p)) : 0)
                                  : mx_linear_workspace(p, kTarget);
  Matrix scratch(DType::kF32, 1, static_cast<int64_t>(bytes / 4), 0, 0, false);
  const std::string wrong = run_schedules(schedules, {&y, &scratch}, {y}, [&] {
    return by_expert ? mx_linear_experts_cuda(of_experts, scratch.data(), nullptr)
           : c.steps ? mx_few_sm90(p, parts, scratch.data(), nullptr)
           : c.tile_n
               ? mx_gemm_tiled(p, bytes ? scratch.data() : nullptr, gemm_tiles(c.O, c.T, c.tile_n, c.cluster), nullptr)
               : mx_linear_cuda(p, scratch.data(), nullptr);
  });
  if (!wrong.empty()) return wrong;
  Error error;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t o = 0; o < c.O; ++o) {
      const int64_t e = experts[static_cast<size_t>(t)], row = e * c.O + o;
      const double got = y.at(t, o);
      if (e < 0 && got != 0) return words("row ", t, " has no expert, and is ", got);
      if (e == c.E && !std::isnan(got)) return words("row ", t, " has an expert that does not exist, and is ", got);
      if (e < 0 || e == c.E) continue;
      double want = c.bias ? bias.at(e, o) : 0.0, magnitude = std::fabs(want);
      bool number = true;
      const auto add = [&](double v) { want += v, magnitude += std::fabs(v); };
      for (int64_t k = 0; k < c.G() * kMxBlock; ++k) {  // a block past K is NaN as a whole too
        const double v = w.at(c, row, k);
        number = number && !std::isnan(v);
        if (k < c.K && !std::isnan(v)) add(x.at(t, k) * v);
        if (std::fabs(v) >= 0x1p128) magnitude = HUGE_VAL;  // of a float: times 0 it is NaN
      }
      for (int64_t r = 0; c.low_rank && r < c.R; ++r) add(s.at(t, r) * b.at(row, r));
      if (!number) {
        if (!std::isnan(got)) return words("row ", t, " column ", o, " has a NaN block, and is ", got);
      } else if (magnitude < (c.dtype == DType::kF16 ? 6e4 : 1e37)) {  // beyond them an overflow may come first
        error.add(got, want, magnitude, c.dtype, own && c.low_rank && c.b_dtype == DType::kF32);
      }
    }
  if (x.bytes != x.fresh) return "wrote where it should only read";
  return error.verdict();
}

// Scales of both operands of a product, each at its place and zeros beside them.
std::string judge_swizzle(const Case& c, const std::vector<int>& schedules) {
  const Weight a(c, c.T), b(c, c.O);
  MxProductParams p{};
  p.a_scales = a.scales.data(), p.b_scales = b.scales.data(), p.T = c.T, p.O = c.O, p.K = c.G() * kMxBlock;
  std::vector<uint8_t> got(mx_product_workspace(p, kTarget), 0xee), want(got.size(), 0);
  const std::string wrong =
      run_schedules(schedules, {}, {got}, [&] { return mx_swizzle_cuda(p, got.data(), nullptr); });
  if (!wrong.empty()) return wrong;
  uint8_t* to = want.data();
  for (const auto& [rows, of] : {std::pair(c.T, &a), std::pair(c.O, &b)}) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t g = 0; g < c.G(); ++g)
        to[swizzled_scale(r, g, c.G())] = of->scales[static_cast<size_t>(r * c.G() + g)];
    to += swizzled_bytes(rows, c.G());
  }
  return got == want ? "" : "another layout";
}

std::string judge(const Case& c, const std::vector<int>& schedules) {
  return c.op == "quantize"     ? judge_quantize(c, schedules)
         : c.op == "dequantize" ? judge_dequantize(c, schedules)
         : c.op == "nvfp4"      ? judge_nvfp4(c, schedules)
         : c.op == "swizzle"    ? judge_swizzle(c, schedules)
                                : judge_linear(c, schedules);
}

// Rows far apart.
void huge(int& code, Error& error) {
  const int64_t pitch = (int64_t{1} << 31) + 8;
  bf16* x = reserve(pitch + 32);
  for (int64_t j = 0; j < 32; ++j) store(DType::kBF16, x, pitch + j, j % 2 ? 6.0 : 1.0);
  alignas(16) uint8_t codes[2 * kMxBytes] = {};
  uint8_t scales[2] = {};
  const MxQuantizeParams quantize{.x = x,
                                  .codes = codes,
                                  .scales = scales,
                                  .mask = nullptr,
                                  .seed = nullptr,
                                  .signs = nullptr,
                                  .T = 2,
                                  .K = 32,
                                  .x_row = pitch,
                                  .x_column = 1,
                                  .gain = 1.f,
                                  .rule = MxRule::kFloor,
                                  .hadamard = false,
                                  .dtype = DType::kBF16};
  code = mx_quantize_cuda(quantize, nullptr, nullptr);
  error.add(scales[1], 127, 0, DType::kF32, false);
  error.add(codes[kMxBytes], 0x72, 0, DType::kF32, false);
  code |= mx_dequantize_cuda({codes, scales, x, 2, 32, kMxBytes, 1, pitch, DType::kBF16}, nullptr, nullptr);
  error.add(load(DType::kBF16, x, pitch + 1), 6, 0, DType::kBF16, false);
  bf16 y[2] = {};
  const MxLinearParams linear{
      {codes + kMxBytes, scales + 1, 1, 32}, x, y, nullptr, nullptr, nullptr, 2, pitch, 0, DType::kBF16, DType::kBF16};
  code |= mx_linear_cuda(linear, nullptr, nullptr);
  error.add(to_float(y[1]), 16 * 37, 0, DType::kBF16, false);
  float parts[2];
  MxFused few{.why = ""};
  few.parts = 1, few.steps = 1, y[1] = {};
  code |= mx_few_sm90(linear, few, parts, nullptr);
  error.add(to_float(y[1]), 16 * 37, 0, DType::kBF16, false);
}

}  // namespace

int main(int argc, char** argv) { return lrk::run_program(argc, argv, draw_case, judge, huge); }
