// SPDX-License-Identifier: Apache-2.0
// How fp32 results leave a kernel: rows of 8 columns on their way to memory, and partial sums that are added in order.
#pragma once

#include "tile.cuh"

namespace lrk {

// f(row, column, v) for a warp's part at row m: 8 consecutive columns of a row, which a lane reads and writes as one vector.
template <int kTilesN, class F>
__device__ __forceinline__ void for_each_row(const float (&acc)[kTilesN][4], int m, const F& f) {
#pragma unroll
  for (int j0 = 0; j0 < kTilesN; j0 += 4)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Vec8<float> v;
      gather_row(v.v, acc, j0, h);
      f(m + lane_id() / 4 + h * 8, (j0 + lane_id() % 4) * 8, v);
    }
}

// to[i] = f(from[i], i) for the first `left` of 8 columns; `from` may be null for zeros.
template <class T, class F>
__device__ __forceinline__ void finish_row(T* to, const T* from, int64_t left, bool vectorize, const F& f) {
  Vec8<T> v = {};
  if (from) v = load_row(from, left, vectorize);
#pragma unroll
  for (int i = 0; i < 8; ++i) v.v[i] = from_float_fast<T>(f(to_float_fast(v.v[i]), i));
  store_row(to, v, left, vectorize);
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
