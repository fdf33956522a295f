// SPDX-License-Identifier: Apache-2.0
// S2FT on CUDA, sm_80 and up: a thread for each element of gather and write, a warp for each row of scatter.
#include "cuda/place.cuh"
#include "s2ft.h"

namespace lrk {
namespace {

// Row of H: slot k of row t.
template <class X, class H>
__global__ __launch_bounds__(kBlockThreads, 8) void slice_gather_kernel(SliceGatherParams p, int shift) {
  const Place at(shift);
  const SliceIndex& s = p.slice;
  if (at.row >= p.T * s.K || at.group >= p.P) return;
  const int64_t t = at.row / s.K, a = s.adapter(t, static_cast<int32_t>(at.row % s.K));
  float v = a < s.A ? 0.f : not_a_number();
  if (a >= 0 && a < s.A && at.group < s.s) {
    const int32_t c = s.column(a, at.group);
    if (c >= p.N) {
      v = not_a_number();
    } else if (c >= 0) {
      v = to_float_fast(static_cast<const X*>(p.x)[t * p.x_pitch + c]);
      if (p.scales) v *= p.scales[at.row];
    }
  }
  const H rounded = from_float_fast<H>(v);
  static_cast<H*>(p.h)[at.row * p.P + at.group] = rounded;
}

// A column that several slots have is added to by the first of them, for all.
template <class Y, class H>
__global__ __launch_bounds__(kBlockThreads, 8) void slice_scatter_kernel(SliceScatterParams p) {
  const int64_t t = grid_thread() / kWarpThreads;
  if (t >= p.T) return;
  const SliceIndex& s = p.slice;
  Y* y = static_cast<Y*>(p.y) + t * p.y_pitch;
  bool bad = false;
  for (int32_t k = 0; k < s.K; ++k) {
    const int64_t a = s.adapter(t, k);
    bad = bad || a >= s.A;
    for (int32_t j = lane_id(); a >= 0 && a < s.A && j < s.s; j += kWarpThreads) bad = bad || !s.ascends(a, j, p.N);
  }
  if (any_lane(bad)) {
    const Y nan = from_float_fast<Y>(not_a_number());
    for (int64_t n = lane_id(); n < p.N; n += kWarpThreads) y[n] = nan;
    return;
  }
  const auto value = [&](int32_t k, int32_t j) {
    const int64_t row = t * s.K + k;
    return mul_rn(p.scales ? p.scales[row] : 1.f, to_float_fast(static_cast<const H*>(p.h)[row * p.P + j]));
  };
  for (int32_t k = 0; k < s.K; ++k) {
    const int64_t a = s.adapter(t, k);
    for (int32_t j = lane_id(); a >= 0 && j < s.s; j += kWarpThreads) {
      const int32_t c = s.column(a, j);
      const auto entry = [&](int32_t other) {
        const int64_t of = s.adapter(t, other);
        return of < 0 ? -1 : s.find(of, c);
      };
      bool mine = c >= 0;
      for (int32_t before = 0; mine && before < k; ++before) mine = entry(before) < 0;
      if (!mine) continue;
      float sum = value(k, j);
      for (int32_t after = k + 1; after < s.K; ++after)
        if (const int32_t at = entry(after); at >= 0) sum += value(after, at);
      const Y added = from_float_fast<Y>(to_float_fast(y[c]) + sum);
      y[c] = added;
    }
  }
}

template <class W, class S>
__global__ __launch_bounds__(kBlockThreads, 8) void slice_write_kernel(SliceWriteParams p, int shift) {
  const Place at(shift);
  if (at.row >= p.rows || at.group >= p.columns) return;
  const int64_t c = p.index[p.of_rows ? at.row : at.group];
  if (c < 0 || c >= p.N) return;
  const W v = from_float_fast<W>(to_float_fast(static_cast<const S*>(p.slice)[at.row * p.columns + at.group]));
  static_cast<W*>(p.w)[(p.of_rows ? c : at.row) * p.w_row + (p.of_rows ? at.group : c) * p.w_column] = v;
}

__global__ __launch_bounds__(kBlockThreads) void slice_pages_kernel(SlicePagesParams p) {
  const int64_t i = grid_thread();
  if (i < p.A * p.M) p.pages[i] = static_cast<int32_t>(i);
  if (i < p.A) p.ranks[i] = p.rank;
}

}  // namespace

int slice_gather_cuda(const SliceGatherParams& p, void*, Stream stream) {
  const PlaceGrid at = place_grid(p.T * p.slice.K, p.P);
  return with_types(p.dtype, p.h_dtype, [&]<class X, class H>(X, H) {
    return launch("slice_gather", slice_gather_kernel<X, H>, at.grid, dim3(kBlockThreads), 0, stream, p, at.shift);
  });
}

int slice_scatter_cuda(const SliceScatterParams& p, void*, Stream stream) {
  return with_types(p.dtype, p.h_dtype, [&]<class Y, class H>(Y, H) {
    return launch("slice_scatter", slice_scatter_kernel<Y, H>, grid_of(ceil_div(p.T, kWarps), 1), dim3(kBlockThreads),
                  0, stream, p);
  });
}

int slice_write_cuda(const SliceWriteParams& p, void*, Stream stream) {
  const PlaceGrid at = place_grid(p.rows, p.columns);
  return with_types(p.dtype, p.slice_dtype, [&]<class W, class S>(W, S) {
    return launch("slice_write", slice_write_kernel<W, S>, at.grid, dim3(kBlockThreads), 0, stream, p, at.shift);
  });
}

int slice_pages_cuda(const SlicePagesParams& p, void*, Stream stream) {
  return launch("slice_pages", slice_pages_kernel, grid_of_threads(p.A * p.M), dim3(kBlockThreads), 0, stream, p);
}

}  // namespace lrk
