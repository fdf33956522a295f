// SPDX-License-Identifier: Apache-2.0
// Multi-LoRA: choices and scratch memory.
#include "multi_lora.h"

#include "choice.h"

namespace lrk {

ShrinkConfig choose_multi_lora_shrink(int64_t T, int64_t K, int64_t N, int64_t ranks, Target) {
  const int32_t chunks = static_cast<int32_t>(ceil_div(N, kCudaChunk));
  const int64_t rank_blocks = ceil_div(ranks, ranks <= kCudaFewRanks ? kCudaFewRanks : kCudaRanks);
  return {ceil_div(T * K, kPlanRows) * rank_blocks < kFullGrid && chunks > 1, chunks};
}

PageShrinkConfig choose_multi_lora_page_shrink(int64_t T, int64_t K, Target) {
  return {T * K <= 1024 ? kFewPageRows : kManyPageRows};
}

MultiLoraGemmShape shape_of(const MultiLoraGemmParams& p) {
  const Adapters& d = p.adapters;
  const bool aligned = whole_vectors(p.x, p.x_pitch) && whole_vectors(p.w) && whole_vectors(p.y, p.N) &&
                       whole_vectors(p.pool, p.N) && whole_vectors(p.s, kPageRanks);
  return {{d.T, p.N, p.K, static_cast<int32_t>(kPageRanks * d.M), p.dtype, p.factor_dtype, aligned},
          d.K,
          d.P ? d.A : 0,
          d.dropout_p != nullptr};
}

GemmConfig choose_multi_lora_gemm(const MultiLoraGemmShape& s, Target target) {
  const GemmConfig c = choose_gemm(s.gemm, target);
  const auto no = [](const char* why) { return GemmConfig{false, false, 0, 0, why}; };
  if (!c.fits) return c;
  if (s.gemm.dtype != DType::kBF16 || s.gemm.factor_dtype != DType::kBF16) return no("x and pools are not bfloat16");
  if (s.dropout && s.slots > 1) return no("slots have dropout masks of their own");
  if (!s.adapters) return no("there is no adapter");
  return c;
}

size_t multi_lora_gemm_workspace(const MultiLoraGemmParams& p, Target target) {
  const Adapters& d = p.adapters;
  const GemmConfig c = choose_multi_lora_gemm(shape_of(p), target);
  return c.fits ? page_lists_bytes(d, gemm_tiles(d.T, p.N, c.tile_n, c.cluster)) : 0;
}

// Rows of each group.
size_t multi_lora_plan_workspace(const MultiLoraPlanParams& p, Target target) {
  return target.device == Device::kCUDA ? p.K * (p.A + 3) * sizeof(int32_t) : 0;
}

size_t multi_lora_shrink_workspace(const MultiLoraShrinkParams& p, Target target) {
  const Adapters& d = p.adapters;
  if (shrinks_by_pages(p.dtype, p.factor_dtype)) return 0;
  const ShrinkConfig config = choose_multi_lora_shrink(d.T, d.K, p.N, all_ranks(d), target);
  return target.device == Device::kCUDA && config.split ? config.chunks * d.T * d.K * all_ranks(d) * sizeof(float) : 0;
}

// Several slots are summed in fp32 before they meet y.
size_t multi_lora_expand_workspace(const MultiLoraExpandParams& p, Target) {
  return p.adapters.K > 1 ? p.adapters.T * p.N * sizeof(float) : 0;
}

size_t multi_lora_wgrad_workspace(const MultiLoraWgradParams& p, Target target) {
  const Adapters& d = p.adapters;
  const int64_t windows = part_windows(d.T), ranks = all_ranks(d);
  return target.device == Device::kCUDA && windows > 1 ? 2 * d.K * windows * ranks * p.N * sizeof(float) : 0;
}

size_t multi_lora_gather_workspace(const MultiLoraGatherParams&, Target) { return 0; }
size_t multi_lora_scatter_workspace(const MultiLoraScatterParams&, Target) { return 0; }

namespace {

Answer explain_plan(const Question& q) {
  const PlanLayout at = plan_layout(q["T"], q["A"]);
  return {{{"length", at.length}, {"tiles", at.G}}, text("order, begin and up to ", at.G, " tiles")};
}

Answer explain_shrink(const Question& q) {
  const int64_t rows = q["T"] * q["K"], ranks = cpu_page_ranks(rows);
  if (q.cpu()) return {{{"ranks", ranks}}, text("tasks of ", ranks, " ranks of a page, for ", rows, " rows")};
  const ShrinkConfig c = choose_multi_lora_shrink(q["T"], q["K"], q["N"], q["R"], q.target());
  return {{{"split", c.split}, {"chunks", c.chunks}},
          c.split ? "chunks of N in blocks of their own, added in order by a second kernel"
                  : "each block walks the chunks of N of its rows"};
}

Answer explain_page_shrink(const Question& q) {
  const int64_t rows = choose_multi_lora_page_shrink(q["T"], q["K"], q.target()).rows;
  return {{{"rows", rows}}, text("blocks of ", rows, " rows and all of N")};
}

Answer explain_wgrad(const Question& q) {
  const int64_t rows = q.cpu() ? kCpuSplitRows : part_rows(q["T"]),
                splits = q.cpu() ? q["K"] * ceil_div(q["T"], rows) : part_windows(q["T"]);
  return {
      {{"rows", rows}, {"splits", splits}},
      text("up to ", splits, " sums over ", rows, " rows each", q.cpu() ? "" : " of every slot", ", added in order")};
}

Answer explain_gemm(const Question& q) {
  const MultiLoraGemmShape shape{
      {q["T"], q["N"], q["K"], static_cast<int32_t>(q["R"]), q.dtype(), q.dtype("factor_dtype"), true},
      q["slots"],
      q["adapters"],
      q.flag("dropout")};
  return explain(choose_multi_lora_gemm(shape, q.target()), shape.gemm);
}

const Registered registered[] = {
    {"page", kPageRanks},
    {"plan_rows", kPlanRows},
    {"multi_lora_plan",
     {.rule = "rows sorted by adapter, in tiles of at most 64 rows of one adapter",
      .numbers = "64 rows are a tile of the CUDA kernels",
      .arguments = {{"T", {}}, {"A", {}}},
      .answer = explain_plan}},
    {"multi_lora_shrink",
     {.rule =
          "CUDA, factors of 32 bits: chunks of N in blocks of their own where rows and ranks make fewer than 528 blocks. "
          "CPU: 8 ranks a task for up to 24 rows, else a page",
      .numbers = "counts: 528 blocks, two on each of an H100's 132 SMs, are two waves; not measured",
      .arguments = {{"T", {}}, {"N", {}}, {"K", int64_t{1}}, {"R", int64_t{16}}},
      .answer = explain_shrink}},
    {"multi_lora_page_shrink",
     {.rule = "CUDA, factors of x's 16-bit type: blocks of 8 rows up to 1024 rows and slots, else of 32",
      .numbers = "counts: 128 blocks of 8 rows are one on each of an H100's SMs; not measured",
      .arguments = {{"T", {}}, {"K", int64_t{1}}},
      .answer = explain_page_shrink}},
    {"multi_lora_gemm",
     {.rule = "lora_gemm's, bfloat16 alone, and no dropout where rows have several slots",
      .numbers = "lora_gemm's",
      .arguments = {{"T", {}},
                    {"N", {}},
                    {"K", {}},
                    {"R", int64_t{16}},
                    {"dtype", "bfloat16"},
                    {"factor_dtype", "bfloat16"},
                    {"slots", int64_t{1}},
                    {"adapters", int64_t{1}},
                    {"dropout", false}},
      .answer = explain_gemm}},
    {"multi_lora_wgrad",
     {.rule =
          "splits of an adapter's rows: 240 on the CPU; on CUDA 512 of every slot, more where there would be over 16",
      .numbers = "counts, as lora_wgrad's; 240 are whole tiles of 24; not measured",
      .arguments = {{"T", {}}, {"K", int64_t{1}}},
      .answer = explain_wgrad}},
};

}  // namespace

}  // namespace lrk
