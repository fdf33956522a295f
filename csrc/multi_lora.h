// SPDX-License-Identifier: Apache-2.0
// Multi-LoRA: every row of a batch has adapters of its own. Contract of three products, each of which serves both factors.
// T rows, K slots a row, A adapters, L slices (q, k, v of one x), M pages an adapter and slice; N stands for I or O.
//
// A factor lies in a pool [P, N], rank-major (A as [R, I], B as its transpose [R, O]), in pages of kPageRanks rows. An
// adapter's ranks are the rows of its pages, in order; rows past its rank are never read. No page has two owners.
//
//   shrink   S[T, K, L, R] = scale * D(X)[T, N] pool^T     S = s D(x) A^T      dS = s dY B
//   expand   Y[T, N] = base + sum over K, L of D(S pool)   y += S B^T          dx += D(dS A)
//   wgrad    G[P, N] = S^T D(X)                            dA = dS^T D(x)      dB^T = S^T dY
//   gather   S[T, K, L, R] = scale * pool[:, ids[t]]       an embedding: x is one-hot, N the vocabulary
//   scatter  G[P, N] += S into columns ids                 its dA
//   gemm     Y[T, N] = X[T, K] W + bias + sum over slots of D(S pool)    the base product with it, where there is a kernel
//
// R = kPageRanks M. Ranks an adapter lacks, and slots without an adapter, are zeros in S. D multiplies by the dropout mask
// of (t K + k, column) with the adapter's own probability. Sums run in fp32 and are rounded once; N is summed in an order of
// its own, slots, slices and ranks in order: a row's bits depend on no other row, an adapter's gradient on no other
// adapter. An adapter or a page that does not exist (possible on CUDA, where values are not validated) gives NaN in its rows alone.
#pragma once

#include "lora.h"
#include "page_tail.h"

namespace lrk {

constexpr int kPageRanks = 16;
constexpr int kPlanRows = 64;  // rows of one adapter that a tile of the plan holds at most

// One plan per slot, int32 [K, plan_length(T, A)]: the rows sorted by adapter. Its parts, in this order:
//   order  [T]      rows without an adapter, then by adapter, then (CUDA) of unknown adapters; ascending in each group
//   begin  [A + 3]  group g starts at order[begin[g]]: 0 none, 1 + a adapter a, A + 1 unknown; begin[A + 2] = T
//   tiles  [G, 2]   (group, start in order), at most kPlanRows rows of one group, in order: a tile
//                  ends where the next one starts, an unused tile starts at T
struct PlanLayout {
  int64_t T, A, G, begin, tiles, length;
};
LRK_HD constexpr PlanLayout plan_layout(int64_t T, int64_t A) {
  const int64_t groups = A + 2 < T ? A + 2 : T, G = ceil_div(T, int64_t{kPlanRows}) + groups;
  return {T, A, G, T, T + A + 3, T + A + 3 + 2 * G};
}
// Rows of one group: `count` of the order from `start` on. A tile ends where the next one starts, so that one step leads from
// it to its rows. A plan of other origin must not lead out of memory: what is out of range has no rows.
struct PlanRows {
  int32_t group, start, count;
};
LRK_HD PlanRows plan_rows(const int32_t* plan, const PlanLayout& at, int64_t i) {
  const int32_t *tile = plan + at.tiles + 2 * i, rows = static_cast<int32_t>(at.T);
  const int32_t group = tile[0], start = tile[1], next = i + 1 < at.G ? tile[3] : rows;
  if (start < 0 || start >= rows || group < 0 || group > at.A + 1) return {0, 0, 0};
  const int32_t count = (next < rows ? next : rows) - start;
  return {group, start, count < kPlanRows ? count : kPlanRows};
}

struct MultiLoraPlanParams {
  const int32_t* index;  // [T, K]: an adapter, or negative for none
  int32_t* plan;         // [K, length]
  int64_t T, K, A;
};

// Who has which adapter, and where its factors are. Slices [first, first + slices) of L take part.
struct Adapters {
  const int32_t* pages;  // [A, L, M]: page m is rows kPageRanks * pages[..] and the 15 after it of the pool
  const int32_t* ranks;  // [A, L]
  const int32_t* plan;   // [K, length]
  int64_t T, K, A, L, M, P;
  int32_t first, slices;
  const float* dropout_p;  // [A], or null for none
  const int64_t* seed;     // [1], read where dropout_p is given
};

struct MultiLoraShrinkParams {
  Adapters adapters;
  const void* x;        // [T, N] dtype
  const void* pool;     // [P, N] factor_dtype, contiguous
  void* s;              // [T, K, L, R] s_dtype(factor_dtype), contiguous
  const float* scales;  // [T, K], or null for ones
  int64_t N, x_pitch;
  DType dtype, factor_dtype;
};

struct MultiLoraExpandParams {
  Adapters adapters;
  void* y;           // [T, N] dtype
  const void* base;  // [T, N] dtype; y itself to add in place
  const void* s;     // [T, K, L, R] s_dtype(factor_dtype), contiguous
  const void* pool;  // [P, N] factor_dtype, contiguous
  int64_t N, y_pitch, base_pitch;
  DType dtype, factor_dtype;
};

struct MultiLoraWgradParams {
  Adapters adapters;
  const void* s;  // [T, K, L, R] s_dtype(factor_dtype), contiguous
  const void* x;  // [T, N] dtype
  void* g;        // [P, N] factor_dtype, zeros: pages of adapters that have rows in this batch are written
  int64_t N, x_pitch;
  DType dtype, factor_dtype;
};

// x of shrink and wgrad as the numbers of its ones.
struct MultiLoraGatherParams {
  Adapters adapters;    // without dropout
  const int64_t* ids;   // [T], below N; one out of range (CUDA) gives NaN in its row, and no gradient
  const void* pool;     // [P, N] factor_dtype, contiguous
  void* s;              // [T, K, L, R] s_dtype(factor_dtype), contiguous
  const float* scales;  // [T, K], or null for ones
  int64_t N;
  DType factor_dtype;
};
struct MultiLoraScatterParams {
  Adapters adapters;
  const int64_t* ids;
  const void* s;  // [T, K, L, R] s_dtype(factor_dtype), contiguous
  float* g;       // [P, N] zeros; rows of a token are added in order
  int64_t N;
  DType factor_dtype;
};

constexpr int kCpuSplitRows = kCpuSplit / kCpuTokens * kCpuTokens;  // of a split of wgrad on the CPU: whole tiles

// shrink on the CPU: ranks of a page that a task takes, fewer where rows are few, so that threads share an adapter.
constexpr int cpu_page_ranks(int64_t rows) { return rows <= kCpuTokens ? kPageRanks / 2 : kPageRanks; }

// Rows of a part of wgrad on CUDA, where there are many: adapters make blocks enough. Windows of so many rows have planes of
// scratch, two each, in every slot; one window: no scratch.
LRK_HD constexpr int64_t part_rows(int64_t T) { return split_tokens(T, 512); }
LRK_HD constexpr int64_t part_windows(int64_t T) { return ceil_div(T, part_rows(T)); }

LRK_HD int64_t all_ranks(const Adapters& d) { return kPageRanks * d.M * d.slices; }  // of the slices at hand

// shrink on CUDA beside 16-bit factors of x's type: a block has a page or two of a tile's adapter, all of N and so many rows,
// a multiple of 8. Their number decides how often the pool is read, and no bits.
constexpr bool shrinks_by_pages(DType x, DType factor) { return x == factor && size_of(x) == 2; }
constexpr int kFewPageRows = 8, kManyPageRows = 32;
struct PageShrinkConfig {
  int32_t rows;
};
PageShrinkConfig choose_multi_lora_page_shrink(int64_t T, int64_t K, Target target);

// The same beside other factors: one block walks all chunks of its rows, or, where that leaves the GPU idle, one block per
// chunk writes a partial sum and a second kernel adds them. Both add the same chunks in the same order: equal bits. `ranks`
// of the slices at hand.
constexpr int kFullGrid = 528;  // blocks; fewer leave a GPU idle
struct ShrinkConfig {
  bool split;
  int32_t chunks;
};
ShrinkConfig choose_multi_lora_shrink(int64_t T, int64_t K, int64_t N, int64_t ranks, Target target);

// gemm: of one slice. What LoraGemmParams says of the launch before holds here too.
struct MultiLoraGemmParams {
  Adapters adapters;  // dropout: with one slot alone
  void* y;            // [T, N] dtype, contiguous
  const void* bias;   // [N] dtype; null for zeros
  const void* x;      // [T, K] dtype
  Factor w;           // W[k, n] of dtype, as LoraGemmParams has it
  const void* s;      // [T, slots, R] s_dtype(factor_dtype), contiguous
  const void* pool;   // [P, N] factor_dtype, contiguous
  int64_t N, K, x_pitch;
  DType dtype, factor_dtype;
};
struct MultiLoraGemmShape {
  GemmShape gemm;
  int64_t slots, adapters;
  bool dropout;
};
// Entries of a tile's list at most, and bytes of all lists.
constexpr int64_t page_capacity(const Adapters& d, const GemmTiles& tiles) {
  const int64_t rows = int64_t{kTileM} * tiles.cluster;
  return d.K * (d.A < rows ? d.A : rows) * d.M;
}
constexpr size_t page_lists_bytes(const Adapters& d, const GemmTiles& tiles) {
  return tiles.m * (page_capacity(d, tiles) * sizeof(PageEntry) + sizeof(int32_t)) + d.K * d.T * sizeof(int32_t);
}
GemmConfig choose_multi_lora_gemm(const MultiLoraGemmShape& shape, Target target);
MultiLoraGemmShape shape_of(const MultiLoraGemmParams& p);

LRK_KERNEL(multi_lora_plan, MultiLoraPlanParams)
LRK_KERNEL(multi_lora_shrink, MultiLoraShrinkParams)
LRK_KERNEL(multi_lora_expand, MultiLoraExpandParams)
LRK_KERNEL(multi_lora_wgrad, MultiLoraWgradParams)
LRK_KERNEL(multi_lora_gather, MultiLoraGatherParams)
LRK_KERNEL(multi_lora_scatter, MultiLoraScatterParams)
LRK_KERNEL(multi_lora_gemm, MultiLoraGemmParams)  // not of the CPU

}  // namespace lrk
