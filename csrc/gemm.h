// SPDX-License-Identifier: Apache-2.0
// GEMMs by kernels of our own, with low-rank products inside: where there are some, how they are cut into tiles, and in which
// order blocks take those: for the choice, the launcher and the kernel.
#pragma once

#include "common.h"

namespace lrk {

constexpr int kTileM = 128, kTileK = 64;  // rows of a block's tile, and columns of K in a step
constexpr int64_t kMaxGemmSide = int64_t{1} << 30;
constexpr int kRaster = 8;  // tiles of M whose rows stay in L2 while N goes by

constexpr int32_t kMaxTiles = 65535;  // along a side, of a grid with a block for each

// Tiles of kTileM `cluster` x tile_n, m by n of them.
struct GemmTiles {
  int32_t tile_n, cluster, m, n, count;
};
constexpr GemmTiles gemm_tiles(int64_t M, int64_t N, int32_t tile_n, int32_t cluster) {
  const auto m = static_cast<int32_t>(ceil_div(M, int64_t{kTileM} * cluster));
  const auto n = static_cast<int32_t>(ceil_div(N, int64_t{tile_n}));
  return {tile_n, cluster, m, n, m * n};
}

struct GemmTile {
  int32_t m, row, col;  // the cluster's tile of M; where this block's part begins
};
// The i-th, of the block of that rank: down kRaster tiles of M, then the next of N.
LRK_HD GemmTile tile_at(const GemmTiles& t, int32_t i, int32_t rank) {
  const int32_t band = i / (kRaster * t.n), top = band * kRaster, rows = t.m - top < kRaster ? t.m - top : kRaster;
  const int32_t at = i - top * t.n, m = top + at % rows;
  return {m, (m * t.cluster + rank) * kTileM, at / rows * t.tile_n};
}

// Whether an architecture has a kernel for Y[T, N] = X[T, K] W + S[T, R] U, and its tiles. None was measured on a GPU yet, so
// that they are taken where LRKERN_FUSED asks for them alone; `pays` is what counts say.
struct GemmShape {
  int64_t T, N, K;
  int32_t R;
  DType dtype, factor_dtype;
  bool aligned;  // operands begin at multiples of 16 bytes, and so do their rows
};
struct GemmConfig {
  bool fits, pays;
  int32_t tile_n, cluster;
  const char* why;
};
GemmConfig choose_gemm(const GemmShape& shape, Target target);

// S U beside it, U[r, n] at u[r * stride_r + n * stride_n]; W's memory runs along N or along K.
struct LowRankProduct {
  const void *s, *u;  // s: [T, R] contiguous, fp32 where factors are not bf16
  int64_t stride_r, stride_n, T, N;
  int32_t R;
  DType factor_dtype;
  bool along_n;
};
// Its columns as bf16 operands: three terms of a factor of another type, whole vectors of 8.
constexpr int64_t tail_columns(int64_t R, DType factor) {
  return ceil_div(factor == DType::kBF16 ? R : 3 * R, int64_t{8}) * 8;
}
size_t tail_bytes(const LowRankProduct& p);  // of those that are written; none where factors are read as they are

// Rows of 16-bit elements whose vectors of 8 are aligned.
inline bool whole_vectors(const void* data, int64_t pitch) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch % 8 == 0;
}

}  // namespace lrk
