// SPDX-License-Identifier: Apache-2.0
// MX: which way a packed weight is multiplied, and how much of it is decoded at a time.
#include "mx.h"

#include <algorithm>

#include "choice.h"
#include "tuned.h"

namespace lrk {

namespace {

// Whether oneDNN has instructions for products of 16-bit floats.
bool multiplies_halves() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return true;
#endif
}

}  // namespace

MxWay choose_mx_way(int64_t T, int64_t O, int64_t K, DType dtype, Target target) {
  const bool cpu = target.device == Device::kCPU, slow = cpu && size_of(dtype) == 2 && !multiplies_halves();
  const bool few = T <= (!cpu ? kMxFewCuda : slow || size_of(dtype) == 4 ? kMxFewCpu : kMxFewHalves);
  // A panel and a product's rows beside it stay in the cache; on CUDA panels are there for memory alone.
  const int64_t elements = int64_t{1} << (cpu ? 19 : 25);
  const auto panel = [&](int64_t along, int64_t across) {
    const int64_t n = std::max<int64_t>(elements / std::max<int64_t>(1, across), 64) / 32 * 32;
    return std::min(n, ceil_div(std::max<int64_t>(along, 1), int64_t{32}) * 32);
  };
  return {few, few && cpu, slow, panel(O, K), panel(K, O)};
}

MxExpertsWay choose_mx_experts_way(int64_t T, int64_t E, Target target) {
  const bool few = target.device == Device::kCUDA && T <= std::min(kMxFewCuda * E, kMxExpertRows);
  return {few, T <= std::max<int64_t>(8, 4 * E) ? 8 : 16};
}

MxFused choose_mx_fused(const MxFusedShape& s, Target target) {
  const auto no = [](const char* why) { return MxFused{.why = why}; };
  if (target.device != Device::kCUDA || target.arch != 90) return no("kernels of their own are of sm_90a");
  if (s.dtype != DType::kBF16) return no("codes become bf16, and x of another type several products of it");
  if (!s.T || !s.O || !s.K || s.O > kMaxGemmSide || s.K > kMaxGemmSide) return no("sizes lie in 1..2^30");
  if (s.T > kMxFewCuda) {
    if (s.O % 8) return no("rows of y are not whole vectors of 16 bytes");
    const auto whole = [](int64_t n) { return ceil_div(n, int64_t{8}) * 8; };
    const GemmConfig c = choose_gemm({s.O, whole(s.T), whole(s.K), s.R, s.dtype, s.b_dtype, s.aligned}, target);
    return {
        c.fits, c.pays,   false,     0,
        0,      c.tile_n, c.cluster, c.pays ? "W is not written decoded, x and y go through memory once less" : c.why};
  }
  // Rounds of blocks, two on an SM, each as long as its steps, and one to begin and end.
  const int64_t tiles = ceil_div(s.O, int64_t{kMxTile}), steps = ceil_div(s.K, int64_t{kMxStep});
  const int64_t places = 2 * tuned(target.arch).sms;
  int64_t parts = 0, least = 0;
  for (int64_t n = ceil_div(steps, int64_t{kMxMostSteps}); n <= std::min(steps, int64_t{kMaxMxParts}); ++n) {
    const int64_t cost = ceil_div(tiles * n, places) * (ceil_div(steps, n) + 1);
    if (!parts || cost < least) parts = n, least = cost;
  }
  if (!parts) return no("its parts of K are too many");
  const auto each = static_cast<int32_t>(ceil_div(steps, parts));
  parts = ceil_div(steps, int64_t{each});
  const bool pays = tiles * parts >= tuned(target.arch).sms;
  return {true, pays, true, static_cast<int32_t>(parts),
          each, 0,    0,    pays ? "x is read once for 128 rows of W, not for 16" : "blocks are too few for the GPU"};
}
MxFusedShape shape_of(const MxLinearParams& p) {
  return {
      p.T, p.w.O, p.w.K, p.s ? p.R : 0, p.dtype, p.b_dtype, whole_vectors(p.x, p.x_pitch) && whole_vectors(p.y, p.w.O)};
}
LowRankProduct low_rank_of(const MxLinearParams& p) { return {p.s, p.b, 1, p.R, p.T, p.w.O, p.R, p.b_dtype, false}; }
MxProductConfig choose_mx_product(const MxProductShape& s, Target target) {
  const auto no = [](const char* why) { return MxProductConfig{false, false, why}; };
  if (target.device != Device::kCUDA || (target.arch != 100 && target.arch != 120))
    return no("kernels for FP4 units are of sm_100a and sm_120a");
  if (s.dtype != DType::kBF16) return no("they give bfloat16");
  if (!s.T || !s.O || !s.K || s.T > kMxProductSide || s.O > kMxProductSide || s.K > int64_t{1} << 30)
    return no("T and O lie in 1..8388480, K in 1..2^30");
  if (s.K % (s.wide ? 128 : kMxBlock))
    return no(s.wide ? "K beside 8 bits is no multiple of 128" : "K is no multiple of 32");
  if (s.O % 8 || s.R % 8) return no("rows of y, S and U are no whole vectors of 16 bytes");
  if (!s.aligned) return no("operands do not begin at multiples of 16 bytes");
  if (s.T < kMxProductTile / 2) return {true, false, "over half of its tile of 128 rows would be empty"};
  return {true, true, "no operand is decoded in memory"};
}

size_t mx_quantize_workspace(const MxQuantizeParams&, Target) { return 0; }
size_t mx_dequantize_workspace(const MxDequantizeParams&, Target) { return 0; }
size_t nvfp4_quantize_workspace(const Nvfp4QuantizeParams&, Target) { return 0; }
size_t nvfp4_dequantize_workspace(const Nvfp4DequantizeParams&, Target) { return 0; }
// The terms of x, where it has several.
size_t mx_linear_workspace(const MxLinearParams& p, Target target) {
  if (target.device == Device::kCPU || p.dtype == DType::kBF16) return 0;
  return static_cast<size_t>(mx_terms(p.dtype) * p.T * p.w.G() * kMxBlock) * sizeof(bf16);
}
size_t mx_linear_experts_workspace(const MxExpertsParams& p, Target target) {
  return mx_linear_workspace(p.of, target);
}
size_t mx_linear_dx_workspace(const MxLinearDxParams&, Target) { return 0; }
size_t mx_fused_workspace(const MxLinearParams& p, Target target) {
  const MxFused c = choose_mx_fused(shape_of(p), target);
  return c.few ? c.parts * p.T * p.w.O * sizeof(float) : p.s ? tail_bytes(low_rank_of(p)) : 0;
}
size_t mx_product_workspace(const MxProductParams& p, Target) {
  return static_cast<size_t>(swizzled_bytes(p.T, p.G()) + swizzled_bytes(p.O, p.G()));
}

namespace {

Answer explain_way(const Question& q) {
  const MxWay way = choose_mx_way(q["T"], q["O"], q["K"], q["halves"] ? DType::kBF16 : DType::kF32, q.target());
  return {
      {{"few", way.few}, {"few_dx", way.few_dx}, {"widens", way.widens}, {"rows", way.rows}, {"columns", way.columns}},
      way.few ? "codes are decoded in registers"
              : text("W is decoded ", way.rows, " rows at a time for y and ", way.columns,
                     " columns for dx, each to ATen's GEMM")};
}

Answer explain_experts(const Question& q) {
  const MxExpertsWay way = choose_mx_experts_way(q["T"], q["E"], q.target());
  return {{{"few", way.few}, {"rows", way.rows}},
          way.few ? text("one launch over the experts' rows, ", way.rows, " of one at a time; nothing is read back")
                  : "each expert's rows as mx_linear of so many; on CUDA their numbers are read back"};
}

Answer explain_fused(const Question& q) {
  const MxFusedShape shape{q["T"], q["O"], q["K"], static_cast<int32_t>(q["R"]), q.dtype(), q.dtype("b_dtype"), true};
  const MxFused c = choose_mx_fused(shape, q.target());
  return {{{"fits", c.fits},
           {"pays", c.pays},
           {"few", c.few},
           {"parts", int64_t{c.parts}},
           {"steps", int64_t{c.steps}},
           {"tile_n", int64_t{c.tile_n}},
           {"cluster", int64_t{c.cluster}}},
          text(c.pays ? "one kernel's accumulator where LRKERN_FUSED=1: " : "the portable kernels: ", c.why)};
}

Answer explain_product(const Question& q) {
  const MxProductConfig c = choose_mx_product(
      {q["T"], q["O"], q["K"], static_cast<int32_t>(q["R"]), q["bits"] == 8, q.dtype(), true}, q.target());
  return {
      {{"fits", c.fits}, {"pays", c.pays}},
      text(c.pays ? "FP4 units multiply where LRKERN_FUSED=1: " : "panels of decoded elements, ATen's GEMM: ", c.why)};
}

const Registered registered[] = {
    {"mx_product",
     {.rule =
          "sm_100a and sm_120a: FP4 units, where y is bfloat16 and rows are whole vectors; they pay from 64 rows on",
      .numbers = "counts: a tile has 128 rows; not measured, and taken where LRKERN_FUSED asks for it alone",
      .arguments = {{"T", {}}, {"O", {}}, {"K", {}}, {"R", int64_t{0}}, {"bits", int64_t{4}}, {"dtype", "bfloat16"}},
      .answer = explain_product}},
    {"mx_linear",
     {.rule =
          "few rows of x: codes are decoded in registers; more of them: panels of W for ATen's GEMM, in fp32 where a "
          "CPU has no products of 16-bit floats",
      .numbers =
          "CPU: up to 32 rows, measured, one of them in an order of its own; up to 8 of 16 bits where it has products of those, not "
          "measured; panels of 2^19 elements stay in the last-level cache. CUDA: up to 16 rows, a count",
      .arguments = {{"T", {}}, {"O", {}}, {"K", {}}, {"halves", 0}},
      .answer = explain_way}},
    {"mx_fused",
     {.rule =
          "sm_90a and bf16 x. Up to 16 rows: 128 rows of W a block, K in parts of up to 4 steps of 512 features, as many as take "
          "the least rounds of blocks; the parts are added in order, and T has no part in it. More: lora_gemm's tiles, W's rows for x's",
      .numbers =
          "counts: 132 SMs of an H100 hold two blocks each, a step's time goes by to begin and end; not measured",
      .arguments = {{"T", {}}, {"O", {}}, {"K", {}}, {"R", int64_t{0}}, {"dtype", "bfloat16"}, {"b_dtype", "bfloat16"}},
      .answer = explain_fused}},
    {"mx_linear_experts",
     {.rule =
          "rows that each have an expert: on CUDA up to 16 E and 1024 of them one launch, 8 of an expert at a time up to "
          "4 E rows, else 16; more, and on the CPU all, by expert",
      .numbers = "counts: with 16 rows an expert a panel of its W is not yet read often; not measured",
      .arguments = {{"T", {}}, {"E", {}}},
      .answer = explain_experts}},
};

}  // namespace

}  // namespace lrk
