// SPDX-License-Identifier: Apache-2.0
// Rows and ranks of a block of multi-LoRA, as lists in shared memory, and matrices gathered through them.
#pragma once

#include "cuda/tile.cuh"
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

// Rows of one group in slot k.
struct RowTile {
  int64_t k, adapter;  // adapter: kAbsent, kUnknown, or one of A
  int32_t count;
};
__device__ __forceinline__ RowTile plan_tile(const Adapters& d, int64_t k, int64_t i, int32_t* rows) {
  const PlanLayout at = plan_layout(d.T, d.A);
  const int32_t *plan = d.plan + k * at.length, group = plan[at.tiles + 2 * i], start = plan[at.tiles + 2 * i + 1];
  if (start < 0 || start >= d.T || group < 0 || group > d.A + 1) return {k, kAbsent, 0};
  const int32_t left = plan[at.begin + group + 1] - start, count = left < 0 ? 0 : left < kPlanRows ? left : kPlanRows;
  fill_rows(d, plan, start, count, rows);
  return {k, group == 0 ? kAbsent : group > d.A ? kUnknown : group - 1, count};
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
  const int64_t length = split_tokens(d.T, kCudaSplit);
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
__device__ __forceinline__ float not_a_number() { return bit_cast<float>(0x7fc00000u); }

// Where S [T, K, L, R] has the ranks of a row's slot k.
__device__ __forceinline__ int64_t s_at(const Adapters& d, int64_t row_and_slot) {
  return (row_and_slot * d.L + d.first) * kPageRanks * d.M;
}
__device__ __forceinline__ int64_t s_at(const Adapters& d, int64_t row, int64_t k) { return s_at(d, row * d.K + k); }
template <class Params>
__device__ __forceinline__ float scale_of(const Params& p, int64_t row, int64_t k) {
  return p.scales ? p.scales[row * p.adapters.K + k] : 1.f;
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
