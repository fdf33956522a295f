// SPDX-License-Identifier: Apache-2.0
// Strips of random bases: a thread generates a strip of a row at a time, at most 16 columns of one Philox block, and keeps
// it in registers. Blocks of a 1- or 2-bit distribution hold 8 or 4 strips, for each of which another thread makes the
// block anew: sums over 128 columns would not fit a thread's registers, and stores of neighbours would lie far apart.
#pragma once

#include "basis.h"
#include "cuda/tile.cuh"

namespace lrk {

constexpr int kRows = 4;    // dot, transposed matmul: rows of U that a warp multiplies by
constexpr int kTokens = 8;  // the same: rows of G or x; kRows kTokens sums, one for each lane
static_assert(kRows * kTokens == kWarpThreads, "reduce_lanes leaves each lane with one sum");

// ---- strip i of a row is columns i kColumns .. (i + 1) kColumns

template <Distribution Dist>
constexpr int kColumns = block_columns(Dist) < 16 ? block_columns(Dist) : 16;

template <Distribution Dist>
__device__ __forceinline__ void generate(const BasisStream& u, uint32_t tensor, uint32_t basis, int64_t row,
                                         int64_t strip, float (&v)[kColumns<Dist>]) {
  constexpr int kStrips = block_columns(Dist) / kColumns<Dist>, kBits = 128 / kStrips;  // of a block
  Philox block = basis_block(u.seed, u.tag(), tensor, basis, row, strip / kStrips);
  if (kStrips > 1) {  // bits of the strip to the front: words are registers, which no variable can index
    const int bit = static_cast<int>(strip % kStrips) * kBits;
    const uint32_t low = bit < 32 ? block.v[0] : block.v[1], high = bit < 96 ? block.v[2] : block.v[3];
    block.v[0] = (bit < 64 ? low : high) >> (bit % 32);
  }
#pragma unroll
  for (int j = 0; j < kColumns<Dist>; ++j) v[j] = basis_value<Dist>(block, j);
}

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {  // one access
  T v[N];
};
template <class T, int N>
constexpr int kPack = 16 / sizeof(T) < N ? 16 / sizeof(T) : N;

template <class T, int N>
__device__ __forceinline__ void store_aligned(T* p, const float (&v)[N]) {
#pragma unroll
  for (int j = 0; j < N; j += kPack<T, N>) {
    Pack<T, kPack<T, N>> pack;
#pragma unroll
    for (int i = 0; i < kPack<T, N>; ++i) pack.v[i] = from_float_fast<T>(v[j + i]);
    *reinterpret_cast<Pack<T, kPack<T, N>>*>(p + j) = pack;
  }
}
template <int N>
__device__ __forceinline__ void load_aligned(const float* p, float (&v)[N]) {
#pragma unroll
  for (int j = 0; j < N; j += kPack<float, N>) {
    const auto pack = *reinterpret_cast<const Pack<float, kPack<float, N>>*>(p + j);
#pragma unroll
    for (int i = 0; i < kPack<float, N>; ++i) v[j + i] = pack.v[i];
  }
}

// Columns first .. first + N of a row, as far as they are in 0 .. cols. With `vectorize` those inside are aligned.
template <class T, int N>
__device__ __forceinline__ void store_columns(T* row, int64_t first, int64_t cols, const float (&v)[N],
                                              bool vectorize) {
  if (vectorize && first >= 0 && first + N <= cols) return store_aligned(row + first, v);
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (first + j >= 0 && first + j < cols) row[first + j] = from_float_fast<T>(v[j]);
}
template <int N>
__device__ __forceinline__ void load_columns(const float* row, int64_t first, int64_t cols, float (&v)[N],
                                             bool vectorize) {
  if (vectorize && first + N <= cols) return load_aligned(row + first, v);
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = first + j < cols ? row[first + j] : 0.f;
}

// ---- the two sums

// Kernels come for one row of coefficients, of G or of x, and for as many as a thread takes: a branch for each row would have the
// compiler make the strip anew in every one.
template <int kAll, class F>
int with_rows(int64_t T, const F& f) {
  if (T == 1) return f(std::integral_constant<int, 1>{});
  return f(std::integral_constant<int, kAll>{});
}

// sum[t] += Σ_i c_i[t] U_i in order: coef(i, c) and elements(i, v) bring coefficients and the strip of U_i.
template <int kCount, int N, class Elements, class Coef>
__device__ __forceinline__ void weighted_sum(int64_t begin, int64_t end, const Elements& elements, const Coef& coef,
                                             float (&sum)[kCount][N]) {
#pragma unroll(1)
  for (int64_t i = begin; i < end; ++i) {
    float c[kCount], v[N];
    coef(i, c);  // first: what it reads arrives while the strip is made
    elements(i, v);
#pragma unroll
    for (int t = 0; t < kCount; ++t)
#pragma unroll
      for (int j = 0; j < N; ++j) sum[t][j] += c[t] * v[j];
  }
}

// sum[r, t] += <U_r, X_t> over the strips of steps begin .. end, for t < kCount: elements(step, r, v) and load(step, t, x)
// bring them.
template <int kCount, int N, class Elements, class Load>
__device__ __forceinline__ void add_dots(int64_t begin, int64_t end, const Elements& elements, const Load& load,
                                         float (&sum)[kWarpThreads]) {
#pragma unroll(1)
  for (int64_t i = begin; i < end; ++i) {
    float v[kRows][N];
#pragma unroll
    for (int r = 0; r < kRows; ++r) elements(i, r, v[r]);
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      float x[N];
      load(i, t, x);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < N; ++j) sum[r * kTokens + t] += v[r][j] * x[j];
    }
  }
}

// Lane i gets the sum over lanes of sum[i]: at each step a lane hands over the half that it is not going to hold. Steps
// are instances, as a loop whose inner bound shrinks is not unrolled, and sums would leave the registers.
template <int kHalf = kWarpThreads / 2>
__device__ __forceinline__ float reduce_lanes(float (&sum)[kWarpThreads]) {
  const bool upper = lane_id() & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float mine = upper ? sum[i + kHalf] : sum[i], other = upper ? sum[i] : sum[i + kHalf];
    sum[i] = mine + shfl_xor(other, kHalf);
  }
  if constexpr (kHalf > 1) return reduce_lanes<kHalf / 2>(sum);
  return sum[0];
}

}  // namespace lrk
