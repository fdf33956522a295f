// SPDX-License-Identifier: Apache-2.0
// The loops the low-rank families share on the CPU: fp32 tiles in cache, and two micro-kernels over them.
// A tile is a [rows, kChunk] fp32 block at pitch kPitch, zero-padded on the right, so that no inner loop has a tail.
#pragma once

#include "dispatch.h"
#include "philox.h"

namespace lrk::LRK_ISA {

constexpr int kChunk = 512;          // columns of a tile; sums over N go chunk by chunk, in order
constexpr int kPitch = kChunk + 16;  // rows a power of two apart would fall into the same few cache sets
// What the micro-kernels hold in registers: enough sums under way for the latency of a multiply-add, of 32 registers or 16.
constexpr int kRows = kLanes == 16 ? 6 : 3;  // rows of dot_tile, beside 4 of the factor
constexpr int kOuterRows = 6;                // rows of outer_tile
constexpr int kCols = kLanes == 16 ? 4 : 2;  // vectors of a row it holds beside them
constexpr int kBlock = kCols * kLanes;       // columns per outer_tile call; divides kChunk

constexpr int64_t round_up(int64_t n, int64_t m) { return ceil_div(n, m) * m; }

// dst = n elements of a row, dropped out as columns col0.. of row `row`; columns from n to the next multiple of kBlock are
// zero.
template <class T>
void load_row(const T* src, int n, const Dropout& d, uint64_t seed, int64_t row, int64_t col0, float* dst) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
  for (; i % kBlock; ++i) dst[i] = 0.f;
  drop(d, seed, row, col0, n, dst);
}

// tile[rows][kPitch] = D(x[row0.., col0..])
template <class T>
void load_tile(const T* x, int64_t pitch, int64_t row0, int rows, int64_t col0, int n, const Dropout& d, uint64_t seed,
               float* tile) {
  for (int t = 0; t < rows; ++t) load_row(x + (row0 + t) * pitch + col0, n, d, seed, row0 + t, col0, tile + t * kPitch);
}

// Rows of fp32 in memory, a tile or a factor as it is.
struct View {
  const float* data;
  int64_t pitch;
  View at(int64_t row, int64_t col = 0) const { return {data + row * pitch + col, pitch}; }
};

// That tile as a view: of x itself where it is fp32 rows of whole blocks and nothing is dropped. For few rows: many of them, a
// power of two apart, would fall into the same cache sets, which the copy avoids.
template <class T>
View tile_of(const T* x, int64_t pitch, int64_t row0, int rows, int64_t col0, int n, const Dropout& d, uint64_t seed,
             float* tile) {
  if constexpr (sizeof(T) == 4) {
    if (n % kBlock == 0 && !d.threshold) return {x + row0 * pitch + col0, pitch};
  }
  load_tile(x, pitch, row0, rows, col0, n, d, seed, tile);
  return {tile, kPitch};
}

// Rows of memory that come next, drawn into the cache line by line while the micro-kernels work: the wait for DRAM is then
// spent on arithmetic.
struct Ahead {
  const char *at = nullptr, *row_end = nullptr;
  int64_t skip = 0, pitch = 0;  // bytes from the end of a row to the next one, and from row to row
  int64_t rows = 0;

  template <class T>
  static Ahead of(const T* p, int64_t pitch, int64_t rows, int64_t n) {
    constexpr int64_t kSize = sizeof(T);
    const char* at = reinterpret_cast<const char*>(p);
    return {at, at + n * kSize, (pitch - round_up(n * kSize, 64) / kSize) * kSize, pitch * kSize, rows};
  }
  void next() {
    if (rows <= 0) return;
    __builtin_prefetch(at, 0, 2);  // to L2: L1 holds the tiles at work
    at += 64;
    if (at < row_end) return;
    at += skip;
    row_end += pitch;
    --rows;
  }
};

// out[m][j] += sum_k x[m][k] u[j][k]; k < n rounded up to kLanes. The order of each sum is the same for every M and J, so
// a row's bits do not depend on its neighbours.
template <int M, int J>
inline void dot_tile(View x, View u, int n, float* out, int64_t pitch, Ahead& ahead) {
  vf acc[M][J] = {};
  Ahead lines = ahead;
  for (int k = 0; k < n; k += kLanes) {
    lines.next();
    lines.next();
    vf b[J];
    for (int j = 0; j < J; ++j) b[j] = load(u.data + j * u.pitch + k);
    for (int m = 0; m < M; ++m) {
      const vf a = load(x.data + m * x.pitch + k);
      for (int j = 0; j < J; ++j) acc[m][j] += a * b[j];
    }
  }
  ahead = lines;
  for (int m = 0; m < M; ++m) {
    const v4f sums = sum_lanes(acc[m][0], acc[m][J > 1 ? 1 : 0], acc[m][J > 2 ? 2 : 0], acc[m][J > 3 ? 3 : 0]);
    for (int j = 0; j < J; ++j) out[m * pitch + j] += sums[j];
  }
}

// Calls emit(m, v, sums) for vector v of the kBlock columns of row m of p q: sum_k p[m * pm + k * pk] q[k], in order of k.
template <int M, class Emit>
inline void outer_tile(const float* p, int64_t pm, int64_t pk, View q, int64_t K, Ahead& ahead, const Emit& emit) {
  vf acc[M][kCols] = {};
  Ahead lines = ahead;
  for (int64_t k = 0; k < K; ++k) {
    lines.next();
    lines.next();
    vf b[kCols];
    for (int v = 0; v < kCols; ++v) b[v] = load(q.data + k * q.pitch + v * kLanes);
    for (int m = 0; m < M; ++m) {
      const vf a = splat(p[m * pm + k * pk]);
      for (int v = 0; v < kCols; ++v) acc[m][v] += a * b[v];
    }
  }
  ahead = lines;
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kCols; ++v) emit(m, v, acc[m][v]);
}

// Calls f with integral_constant<int, n> for the runtime n in 1..kMax.
template <int kMax, class F>
inline void with_count(int n, const F& f) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_count<kMax - 1>(n, f);
  }
  f(std::integral_constant<int, kMax>{});
}

// out[rows][ranks] += x u^T over n columns, for any counts.
inline void dot_tiles(View x, int rows, View u, int ranks, int n, float* out, int64_t pitch, Ahead ahead = {}) {
  for (int m = 0; m < rows; m += kRows)
    with_count<kRows>(rows - m < kRows ? rows - m : kRows, [&](auto M) {
      for (int j = 0; j < ranks; j += 4)
        with_count<4>(ranks - j < 4 ? ranks - j : 4, [&](auto J) {
          dot_tile<M.value, J.value>(x.at(m), u.at(j), n, out + m * pitch + j, pitch, ahead);
        });
    });
}

// c[rows][kPitch] = p q, or += where `add`, for any count of rows, over the columns [0, n) rounded up to kBlock.
template <bool kAdd>
inline void outer_tiles(const float* p, int64_t pm, int64_t pk, View q, int64_t K, int rows, int n, float* c,
                        Ahead ahead) {
  for (int i = 0; i < n; i += kBlock)
    for (int m0 = 0; m0 < rows; m0 += kOuterRows)
      with_count<kOuterRows>(rows - m0 < kOuterRows ? rows - m0 : kOuterRows, [&](auto M) {
        outer_tile<M.value>(p + m0 * pm, pm, pk, q.at(0, i), K, ahead, [&](int m, int v, vf sums) {
          float* dst = c + (m0 + m) * kPitch + i + v * kLanes;
          store(dst, kAdd ? load(dst) + sums : sums);
        });
      });
}
inline void outer_tiles(bool add, const float* p, int64_t pm, int64_t pk, View q, int64_t K, int rows, int n, float* c,
                        Ahead ahead = {}) {
  (add ? outer_tiles<true> : outer_tiles<false>)(p, pm, pk, q, K, rows, n, c, ahead);
}

}  // namespace lrk::LRK_ISA
