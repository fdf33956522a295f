// SPDX-License-Identifier: Apache-2.0
// Rows and ranks of a block of multi-LoRA, as lists in shared memory, and matrices gathered through them.
#pragma once

#include "cuda/place.cuh"
#include "multi_lora.h"

namespace lrk {

constexpr int32_t kAbsent = -1, kUnknown = -2;  // rows of a list: none there; one that does not exist

// What a block works on: rows of the batch, and pool rows of an adapter's ranks.
template <int kRanks>
struct Lists {
  static constexpr size_t kBytes = smem_bytes<int32_t>(kPlanRows) + smem_bytes<int32_t>(kRanks);
  int32_t *rows, *ranks;
  explicit __device__ __forceinline__ Lists(Smem& smem)
      : rows(smem.take<int32_t>(kPlanRows)), ranks(smem.take<int32_t>(kRanks)) {}
};

// ---- the plan. One of other origin must not lead out of memory: what is out of range counts as no row, as an adapter
// nobody knows.

__device__ __forceinline__ const int32_t* order_of(const Adapters& d, int64_t k) {
  return d.plan + k * plan_layout(d.T, d.A).length;
}
__device__ __forceinline__ void fill_rows(const Adapters& d, const int32_t* order, int64_t start, int32_t count,
                                          int32_t* rows) {
  for (int i = static_cast<int>(threadIdx.x); i < kPlanRows; i += kBlockThreads) {
    const int32_t row = i < count && start + i < d.T ? order[start + i] : kAbsent;
    rows[i] = row >= 0 && row < d.T ? row : kAbsent;
  }
}

// Rows of one group in slot k: `count` of the order from `order` on.
struct PlanTile {
  int64_t k, adapter;  // adapter: kAbsent, kUnknown, or one of A
  int32_t count;
  const int32_t* order;

  // Those from the i-th on, `most` at most; none where that is not above zero.
  __device__ __forceinline__ PlanTile part(int i, int most) const {
    return {k, adapter, count - i < most ? count - i : most, order + i};
  }
  __device__ __forceinline__ int32_t row(const Adapters& d, int i) const {
    const int32_t row = i < count ? order[i] : kAbsent;
    return row >= 0 && row < d.T ? row : kAbsent;
  }
};
__device__ __forceinline__ PlanTile tile_of(const Adapters& d, int64_t k, int64_t i) {
  const PlanLayout at = plan_layout(d.T, d.A);
  const int32_t* plan = d.plan + k * at.length;
  const PlanRows rows = plan_rows(plan, at, i);
  if (rows.count <= 0) return {k, kAbsent, 0, plan};
  return {k, rows.group == 0 ? kAbsent : rows.group > d.A ? kUnknown : rows.group - 1, rows.count, plan + rows.start};
}
// The same with its rows in a list.
__device__ __forceinline__ PlanTile plan_tile(const Adapters& d, int64_t k, int64_t i, int32_t* rows) {
  const PlanTile tile = tile_of(d, k, i);
  for (int r = static_cast<int>(threadIdx.x); r < kPlanRows && tile.count > 0; r += kBlockThreads)
    rows[r] = tile.row(d, r);
  return tile;
}

// Where an adapter's rows are in the order of slot k.
struct Span {
  int64_t begin, end;
};
__device__ __forceinline__ Span rows_of(const Adapters& d, int64_t k, int64_t adapter) {
  const int32_t* begin = order_of(d, k) + plan_layout(d.T, d.A).begin + 1 + adapter;
  return {begin[0] < 0 ? 0 : begin[0], begin[1] > d.T ? d.T : begin[1]};
}

// An adapter's rows in parts: of every slot those from s * length on. Where there are several, their partial sums lie in
// planes of scratch by where the parts start in the order of the slot with the most rows: two that start in one window of
// `length` rows are the last part of one adapter and the first of the next, since who has several has more rows than that.
struct Parts {
  int64_t count, first, length;  // first: the plane of part 0
  __device__ __forceinline__ Span of(const Span& rows, int64_t s) const {
    const int64_t from = rows.begin + s * length;
    return {from, from + length < rows.end ? from + length : rows.end};
  }
  __device__ __forceinline__ int64_t plane(int64_t s) const { return first + 2 * s + (s > 0); }
};
__device__ __forceinline__ Parts parts_of(const Adapters& d, int64_t adapter) {
  const int64_t length = part_rows(d.T);
  int64_t most = 0, slot = 0, begin = 0;
  for (int64_t k = 0; k < d.K; ++k) {
    const Span span = rows_of(d, k, adapter);
    if (span.end - span.begin <= most) continue;
    most = span.end - span.begin;
    slot = k;
    begin = span.begin;
  }
  return {ceil_div(most, length), 2 * (slot * part_windows(d.T) + begin / length), length};
}

// ---- ranks, counted through the slices at hand

// ranks[i] = the pool row of rank first + i of the adapter, below `end`; kAbsent where it has none, kUnknown where adapter
// or page do not exist.
__device__ __forceinline__ void fill_ranks(const Adapters& d, int64_t adapter, int64_t first, int64_t end, int count,
                                           int32_t* ranks) {
  const unsigned R = static_cast<unsigned>(kPageRanks * d.M);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kBlockThreads) {
    const unsigned at = static_cast<unsigned>(first) + i, l = at / R, r = at % R;
    int32_t row = adapter == kUnknown ? kUnknown : kAbsent;
    if (first + i >= end) {
      row = kAbsent;
    } else if (adapter >= 0 && r < d.ranks[adapter * d.L + d.first + l]) {
      const int64_t page = d.pages[(adapter * d.L + d.first + l) * d.M + r / kPageRanks];
      row = page >= 0 && page < d.P / kPageRanks ? static_cast<int32_t>(page * kPageRanks + r % kPageRanks) : kUnknown;
    }
    ranks[i] = row;
  }
}
template <class Is>
__device__ __forceinline__ bool any(const int32_t* ranks, int count, const Is& is) {
  bool found = false;
  for (int i = 0; i < count; ++i) found = found || is(ranks[i]);
  return found;
}
__device__ __forceinline__ bool any_present(const int32_t* ranks, int count) {
  return any(ranks, count, [](int32_t row) { return row >= 0; });
}

// Page q of an adapter, counted through the slices at hand: the pool's rows from `row` on, of which it has `ranks`.
struct Page {
  int64_t row;
  int32_t ranks;
  bool unknown;  // adapter or page do not exist
  __device__ __forceinline__ int32_t there() const { return unknown ? 0 : ranks; }
};
LRK_HD int64_t all_pages(const Adapters& d) { return d.M * d.slices; }
__device__ __forceinline__ Page page_of(const Adapters& d, int64_t adapter, int64_t q) {
  if (adapter == kUnknown) return {0, kPageRanks, true};
  if (adapter < 0 || q >= all_pages(d)) return {0, 0, false};
  const unsigned M = static_cast<unsigned>(d.M), l = static_cast<unsigned>(q) / M, m = static_cast<unsigned>(q) % M;
  const int64_t slice = adapter * d.L + d.first + l, page = d.pages[slice * d.M + m];
  const int32_t left = d.ranks[slice] - static_cast<int32_t>(m) * kPageRanks;
  const int32_t ranks = left < 0 ? 0 : left < kPageRanks ? left : kPageRanks;
  const bool exists = page >= 0 && page < d.P / kPageRanks;
  return {exists ? page * kPageRanks : 0, ranks, !exists && ranks > 0};
}

// Where S [T, K, L, R] has the ranks of a row's slot k.
__device__ __forceinline__ int64_t s_at(const Adapters& d, int64_t row_and_slot) {
  return (row_and_slot * d.L + d.first) * kPageRanks * d.M;
}
__device__ __forceinline__ int64_t s_at(const Adapters& d, int64_t row, int64_t k) { return s_at(d, row * d.K + k); }
template <class Params>
__device__ __forceinline__ float scale_of(const Params& p, int64_t row, int64_t k) {
  return p.scales ? p.scales[row * p.adapters.K + k] : 1.f;
}

// S's rank `at`, counted through the slices at hand.
template <class F>
__device__ __forceinline__ void store_s(const MultiLoraShrinkParams& p, int64_t row_and_slot, int64_t at, float v) {
  using S = TypeOfS<F>;
  const float scale = p.scales ? p.scales[row_and_slot] : 1.f;
  static_cast<S*>(p.s)[s_at(p.adapters, row_and_slot) + at] = from_float_fast<S>(scale * v);
}

// The probability as a Dropout; its keep_scale is applied to the fp32 result.
__device__ __forceinline__ Dropout dropout_of(const Adapters& d, int64_t adapter) {
  return d.dropout_p && adapter >= 0 ? make_dropout(d.dropout_p[adapter]) : Dropout{};
}

// ---- a matrix whose rows a list names, from column 0 on; columns too where `cols_of` is given, to blank out those it lacks

template <class Src>
struct Gathered {
  const Src* data;
  int64_t pitch;
  const int32_t* rows;
  int64_t cols;
  bool vectorize;
  const int32_t* cols_of = nullptr;
};
template <class Src>
__device__ __forceinline__ Words8<Src> load_vec(const Gathered<Src>& s, int r, int c) {
  const int32_t row = s.rows[r];
  const auto words = load_row(s.data + (row < 0 ? 0 : row) * s.pitch + c, row < 0 ? 0 : s.cols - c, s.vectorize);
  if (!s.cols_of) return words;
  Vec8<Src> v = elements(words);
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (s.cols_of[c + j] < 0) v.v[j] = Src{};
  return bit_cast<Words8<Src>>(v);
}

}  // namespace lrk
