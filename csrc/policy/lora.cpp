// SPDX-License-Identifier: Apache-2.0
// LoRA: choices between kernels, and the scratch memory they need: pure arithmetic on shapes, the same on every machine.
#include "lora.h"

#include <algorithm>

#include "choice.h"
#include "tuned.h"

namespace lrk {

namespace {

// One split needs no partial sums: the kernel writes the result itself.
int64_t wgrad_partial_sums(const LoraWgradParams& p, int64_t splits) { return splits > 1 ? splits * p.R * p.N : 0; }
int64_t wgrad_splits(const LoraWgradParams& p) { return ceil_div(p.T, split_tokens(p.T, kCudaSplit)); }

}  // namespace

BackwardConfig choose_lora_backward(const BackwardShape& s, Target target) {
  const int64_t chunks = ceil_div(s.O, target.device == Device::kCPU ? kCpuChunk : kCudaChunk);
  BackwardConfig c;
  c.saved_bytes = s.T * s.O * static_cast<int64_t>(size_of(s.dtype));
  c.paid_bytes = 2 * chunks * s.T * s.R * static_cast<int64_t>(sizeof(float));
  const bool fits = target.device == Device::kCPU || s.R <= kCudaFewRanks;
  c.fused = fits && c.paid_bytes < c.saved_bytes;
  return c;
}

// The span whose rounds of blocks take least.
ShrinkSplit lora_shrink_split(int64_t T, int64_t N, int32_t R, int32_t sms, double start) {
  const bool few = R <= kCudaFewRanks;
  const int64_t tiles = ceil_div(T, kCudaTokens) * ceil_div(R, few ? kCudaFewRanks : kCudaRanks);
  const int64_t at_once = sms * (few ? 4 : 2), chunks = ceil_div(N, kCudaChunk);
  const auto cost = [&](int64_t span) {
    return static_cast<double>(ceil_div(tiles * ceil_div(chunks, span), at_once)) * (static_cast<double>(span) + start);
  };
  int64_t best = 1;
  for (int64_t span = kShrinkGroup; span < chunks + kShrinkGroup; span += kShrinkGroup)
    if (cost(span) <= cost(best)) best = span;
  return lora_shrink_split(N, best);
}
ShrinkSplit lora_shrink_split(int64_t N, int64_t span) {
  const int64_t chunks = ceil_div(N, kCudaChunk), plane = span == 1 ? 1 : kShrinkGroup;
  return {static_cast<int32_t>(chunks), static_cast<int32_t>(span), static_cast<int32_t>(plane),
          static_cast<int32_t>(ceil_div(chunks, plane))};
}

ShrinkSplit choose_lora_shrink(int64_t T, int64_t N, int32_t R, Target target) {
  const Tuned of = tuned(target.arch);
  return lora_shrink_split(T, N, R, of.sms, of.start);
}

CpuTasks choose_lora_cpu_shrink(int64_t T, int64_t N, int64_t R) {
  const int64_t tiles = ceil_div(T, kCpuTokens), ranks = tiles > 1 ? kCpuRanks : 4;
  return {ranks, ceil_div(R, ranks) * tiles, cpu_grain(std::min<int64_t>(T, kCpuTokens), N, std::min(R, ranks))};
}

ShrinkWgradLayout shrink_wgrad_layout(const LoraShrinkWgradParams& p) {
  const int64_t chunks = ceil_div(p.shrink.N, kCudaChunk), splits = wgrad_splits(p.wgrad);
  const int64_t db = ceil_div(chunks * p.shrink.T * p.shrink.R, 16) * 16;  // 64-byte aligned
  return {chunks, splits, db, db + wgrad_partial_sums(p.wgrad, splits)};
}

size_t lora_shrink_workspace(const LoraShrinkParams& p, Target target) {
  if (target.device == Device::kCPU) return 0;
  const int64_t planes = choose_lora_shrink(p.T, p.N, p.R, target).planes;
  return planes > 1 ? planes * p.T * p.R * sizeof(float) : 0;
}

size_t lora_expand_workspace(const LoraExpandParams&, Target) { return 0; }

size_t lora_wgrad_workspace(const LoraWgradParams& p, Target target) {
  return target.device == Device::kCUDA ? wgrad_partial_sums(p, wgrad_splits(p)) * sizeof(float) : 0;
}

size_t lora_shrink_wgrad_workspace(const LoraShrinkWgradParams& p, Target target) {
  if (target.device == Device::kCUDA) return shrink_wgrad_layout(p).floats * sizeof(float);
  return ceil_div(p.shrink.N, kCpuChunk) * p.shrink.T * p.shrink.R * sizeof(float);
}

GemmShape shape_of(const LoraGemmParams& p) {
  return {p.T,
          p.N,
          p.K,
          p.R,
          p.dtype,
          p.factor_dtype,
          whole_vectors(p.x, p.x_pitch) && whole_vectors(p.w) && whole_vectors(p.y, p.N) && whole_vectors(p.base, p.N)};
}

GemmConfig choose_lora_gemm(const GemmShape& s, bool plain, Target target) {
  if (target.device != Device::kCUDA || target.arch != 100) return choose_gemm(s, target);
  constexpr int32_t kTileN = 128;
  GemmConfig c = choose_gemm(s, {Device::kCUDA, 90});
  if (!c.fits) return c;
  if (!plain) return {false, false, 0, 0, "the kernel of sm_100a has neither a scale of the base nor dropout"};
  const GemmTiles tiles = gemm_tiles(s.T, s.N, kTileN, 1);
  if (tiles.m > kMaxTiles || tiles.n > kMaxTiles) return {false, false, 0, 0, "T and N are at most 8388480 on sm_100a"};
  c.tile_n = kTileN, c.cluster = 1, c.pays = 2 * int64_t{tiles.m} * tiles.n >= tuned(target.arch).sms;
  c.why = c.pays ? "x and y go through memory once less" : "tiles of 128 rows are too few for half of the GPU";
  return c;
}

size_t lora_gemm_workspace(const LoraGemmParams& p, Target) { return tail_bytes(low_rank_of(p)); }

// Partial sums of dc, one [N] row per kRescaleRows tokens, on both devices.
size_t lora_rescale_workspace(const LoraRescaleParams& p, Target) {
  return p.dc ? ceil_div(p.T, kRescaleRows) * p.N * sizeof(float) : 0;
}

namespace {

Answer explain_backward(const Question& q) {
  const int64_t R = q["R"], chunks = ceil_div(q["O"], kCpuChunk);
  BackwardConfig c = choose_lora_backward({q["T"], q["O"], static_cast<int32_t>(R), q.dtype()}, q.target());
  std::string why = text("partial sums of dS (", c.paid_bytes, " bytes) would cost no less than the read of dY saved (",
                         c.saved_bytes, " bytes)");
  if (c.fused && q.cpu() && !one_cpu_pass(q["O"], q["threads"])) {
    c.fused = false;
    why = text(chunks, " chunks of O are too few tasks for ", q["threads"], " threads");
  } else if (!c.fused && c.paid_bytes < c.saved_bytes) {
    why = text("rank ", R, " is over what the fused kernel holds");
  }
  if (c.fused)
    why = text("it is read once less (", c.saved_bytes, " bytes), for partial sums of dS written and read (",
               c.paid_bytes, " bytes)");
  return {{{"fused", c.fused}, {"saved_bytes", c.saved_bytes}, {"paid_bytes", c.paid_bytes}},
          text("dS and dB in ", c.fused ? "one pass" : "two passes", " over dY: ", why)};
}

Answer explain_shrink(const Question& q) {
  if (q.cpu()) {
    const CpuTasks c = choose_lora_cpu_shrink(q["T"], q["N"], q["R"]);
    return {{{"ranks", c.ranks}, {"tasks", c.count}, {"grain", c.grain}},
            text(c.count, " tasks of ", c.ranks, " ranks, of which a thread takes ", c.grain, " at once")};
  }
  const ShrinkSplit c = choose_lora_shrink(q["T"], q["N"], static_cast<int32_t>(q["R"]), q.target());
  return {{{"chunks", c.chunks}, {"span", c.span}, {"plane", c.plane}, {"planes", c.planes}},
          c.planes == 1 ? "each block walks the chunks of N of its rows"
                        : text("blocks walk ", c.span, " of ", c.chunks, " chunks of N; a second kernel adds up ",
                               c.planes, " partial sums in the order that rows of any batch have")};
}

Answer explain_gemm(const Question& q) {
  const GemmShape shape{q["T"], q["N"], q["K"], static_cast<int32_t>(q["R"]), q.dtype(), q.dtype("factor_dtype"), true};
  return explain(choose_lora_gemm(shape, true, q.target()), shape);
}

Answer explain_wgrad(const Question& q) {
  const int64_t tokens = split_tokens(q["T"], q.cpu() ? kCpuSplit : kCudaSplit), splits = ceil_div(q["T"], tokens);
  return {{{"tokens", tokens}, {"splits", splits}},
          text(splits, " sums over ", tokens, " tokens each, added in order")};
}

const Registered registered[] = {
    {"max_rank", kMaxRank},
    {"lora_backward",
     {.rule =
          "dS and dB in one pass over dY where that moves fewer bytes and dB fits: up to 16 ranks on CUDA; on the CPU "
          "two chunks of O for each thread",
      .numbers = "a count of bytes: dY read once less, against fp32 partial sums of dS written and read",
      .arguments = {{"T", {}}, {"O", {}}, {"R", {}}, {"dtype", "float32"}, {"threads", int64_t{1}}},
      .answer = explain_backward}},
    {"lora_shrink",
     {.rule =
          "CUDA: a block walks one chunk of N or groups of four, whatever fills the GPU in the least rounds; the order of "
          "the sum is the same. CPU: 8 ranks a task for up to 24 tokens, else 64",
      .numbers =
          "counts: 132 SMs of an H100 hold 4 blocks each of up to 16 ranks, else 2; a block's start and end take as "
          "long as a chunk, 8 ranks make 8 tasks of rank 64; not measured",
      .arguments = {{"T", {}}, {"N", {}}, {"R", {}}},
      .answer = explain_shrink}},
    {"lora_gemm",
     {.rule =
          "sm_90a and 16-bit x, W and y in whole vectors of 16 bytes, tiles for half of the GPU or more; tiles of 128 x 256, "
          "or of 128 x 128 where those take fewer rounds, by pairs of blocks; on sm_100a of 128 x 128, where the base has no "
          "scale and there is no dropout behind it",
      .numbers =
          "counts: 132 SMs of an H100 hold a block each; a tile's store takes as long as 16 columns; not measured",
      .arguments = {{"T", {}}, {"N", {}}, {"K", {}}, {"R", {}}, {"dtype", "bfloat16"}, {"factor_dtype", "bfloat16"}},
      .answer = explain_gemm}},
    {"lora_wgrad",
     {.rule = "splits of 256 tokens on the CPU and 128 on CUDA, longer where there would be more than 16",
      .numbers =
          "counts: partial sums take at most 16 times the result, 128 tokens are 2 tiles, so that few tokens still make many blocks; not measured",
      .arguments = {{"T", {}}},
      .answer = explain_wgrad}},
};

}  // namespace

}  // namespace lrk
