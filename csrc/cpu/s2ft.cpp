// SPDX-License-Identifier: Apache-2.0
// S2FT on the CPU: rows of x and y, element by element. Columns are validated before.
#include "s2ft.h"

#include "factor.h"

namespace lrk {
namespace LRK_ISA {
namespace {

int64_t grain(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// Columns of the adapter of a slot, or none.
struct Columns {
  const int32_t* at;
  int32_t count;
};
Columns columns_of(const SliceIndex& s, int64_t row, int32_t slot) {
  const int64_t a = s.adapter(row, slot);
  if (a < 0) return {nullptr, 0};
  const int32_t* at = s.index + a * s.s;
  return {at, static_cast<int32_t>(std::find_if(at, at + s.s, [](int32_t c) { return c < 0; }) - at)};
}
// Where they are neighbours, as a co-permuted layer's are.
bool one_run(const Columns& c) { return c.count && c.at[c.count - 1] - c.at[0] == c.count - 1; }

template <class X, class H>
void gather(const SliceGatherParams& p) {
  parallel_for(p.T, grain(p.slice.K * int64_t{p.P}), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const X* x = static_cast<const X*>(p.x) + t * p.x_pitch;
      for (int32_t k = 0; k < p.slice.K; ++k) {
        const int64_t slot = t * p.slice.K + k;
        H* h = static_cast<H*>(p.h) + slot * p.P;
        const Columns c = columns_of(p.slice, t, k);
        const float scale = p.scales ? p.scales[slot] : 1.f;
        int32_t j = 0;
        if (one_run(c))
          for (; j + kLanes <= c.count; j += kLanes) store(h + j, splat(scale) * load(x + c.at[0] + j));
        for (; j < c.count; ++j) h[j] = from_float<H>(scale * to_float(x[c.at[j]]));
        for (; j < p.P; ++j) h[j] = from_float<H>(0.f);
      }
    }
  });
}

template <class Y, class H>
void scatter(const SliceScatterParams& p) {
  const SliceIndex& slice = p.slice;
  parallel_for(p.T, grain(slice.K * int64_t{p.P}), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Y* y = static_cast<Y*>(p.y) + t * p.y_pitch;
      const H* rows = static_cast<const H*>(p.h) + t * slice.K * p.P;
      const float* scales = p.scales ? p.scales + t * slice.K : nullptr;
      const auto value = [&](int32_t k, int32_t j) {
        return (scales ? scales[k] : 1.f) * to_float(rows[k * int64_t{p.P} + j]);
      };
      for (int32_t k = 0; k < slice.K; ++k) {
        const Columns c = columns_of(slice, t, k);
        int32_t j = 0;
        if (slice.K == 1 && one_run(c)) {
          const float scale = scales ? scales[0] : 1.f;
          for (Y* to = y + c.at[0]; j + kLanes <= c.count; j += kLanes)
            store(to + j, load(to + j) + splat(scale) * load(rows + j));
        }
        for (; j < c.count; ++j) {
          const int32_t column = c.at[j];
          const auto entry = [&](int32_t other) {
            const int64_t a = slice.adapter(t, other);
            return a < 0 ? -1 : slice.find(a, column);
          };
          bool mine = true;  // the first slot with a column adds up all of them
          for (int32_t before = 0; mine && before < k; ++before) mine = entry(before) < 0;
          if (!mine) continue;
          float sum = value(k, j);
          for (int32_t after = k + 1; after < slice.K; ++after)
            if (const int32_t at = entry(after); at >= 0) sum += value(after, at);
          y[column] = from_float<Y>(to_float(y[column]) + sum);
        }
      }
    }
  });
}

template <class W, class S>
void write(const SliceWriteParams& p) {
  parallel_for(p.rows, grain(p.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const S* from = static_cast<const S*>(p.slice) + i * p.columns;
      W* w = static_cast<W*>(p.w) + (p.of_rows ? p.index[i] : i) * p.w_row;
      for (int64_t j = 0; j < p.columns; ++j)
        w[(p.of_rows ? j : p.index[j]) * p.w_column] = from_float<W>(to_float(from[j]));
    }
  });
}

void pages(const SlicePagesParams& p) {
  for (int64_t i = 0; i < p.A * p.M; ++i) p.pages[i] = static_cast<int32_t>(i);
  std::fill_n(p.ranks, p.A, p.rank);
}

}  // namespace
}  // namespace LRK_ISA

LRK_CPU_ENTRY(slice_gather, SliceGatherParams,
              with_types(p.dtype, p.h_dtype, [&](auto x, auto h) { gather<decltype(x), decltype(h)>(p); }))
LRK_CPU_ENTRY(slice_scatter, SliceScatterParams,
              with_types(p.dtype, p.h_dtype, [&](auto y, auto h) { scatter<decltype(y), decltype(h)>(p); }))
LRK_CPU_ENTRY(slice_write, SliceWriteParams,
              with_types(p.dtype, p.slice_dtype, [&](auto w, auto s) { write<decltype(w), decltype(s)>(p); }))
LRK_CPU_ENTRY(slice_pages, SlicePagesParams, pages(p))

}  // namespace lrk
