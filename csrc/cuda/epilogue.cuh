// SPDX-License-Identifier: Apache-2.0
// How fp32 results leave a kernel: rows of 8 columns on their way to memory, and partial sums that are added in order.
#pragma once

#include "tile.cuh"

namespace lrk {

// f(i, row, column) for a warp's part at row m of kTilesN tiles: where the 8 consecutive columns of a row begin that a lane
// reads and writes as its vector i.
template <int kTilesN, class F>
__device__ __forceinline__ void for_each_place(int m, const F& f) {
#pragma unroll
  for (int i = 0; i < kTilesN / 2; ++i) f(i, m + lane_id() / 4 + i % 2 * 8, (i / 2 * 4 + lane_id() % 4) * 8);
}
// f(i, row, column, v) with what acc has there.
template <int kTilesN, class F>
__device__ __forceinline__ void for_each_row(const float (&acc)[kTilesN][4], int m, const F& f) {
  for_each_place<kTilesN>(m, [&](int i, int row, int col) {
    Vec8<float> v;
    gather_row(v.v, acc, i / 2 * 4, i % 2);
    f(i, row, col, v);
  });
}

// to[i] = f(from[i], i) for the first `left` of 8 columns.
template <bool kPlain = false, class T, class F>
__device__ __forceinline__ void finish_row(T* to, const Words8<T>& from, int64_t left, bool vectorize, const F& f) {
  Vec8<float> v = floats(from);
#pragma unroll
  for (int i = 0; i < 8; ++i) v.v[i] = f(v.v[i], i);
  store_row<kPlain>(to, rounded<T>(v), left, vectorize);
}

// A sum goes to the partial ones where there are any, else, scaled, to the result.
template <class T>
__device__ __forceinline__ void store_sum(float* partial, int64_t at, T* out, float scale, float sum) {
  if (partial) {
    partial[at] = sum;
  } else {
    *out = from_float_fast<T>(scale * sum);
  }
}

// sum of partial[i * pitch], i = 0 .. count, in order.
__device__ __forceinline__ float sum_partial(const float* partial, int64_t count, int64_t pitch) {
  float sum = 0.f;
  for (int64_t i = 0; i < count; ++i) sum += partial[i * pitch];
  return sum;
}

}  // namespace lrk
