// SPDX-License-Identifier: Apache-2.0
// How a GEMM on Hopper is cut into tiles, and in which order blocks take them: for the choice, the launcher and the kernel.
#pragma once

#include "common.h"

namespace lrk {

constexpr int kTileM = 128, kTileK = 64;  // rows of a block's tile, and columns of K in a step
constexpr int64_t kMaxGemmSide = int64_t{1} << 30;
constexpr int kRaster = 8;  // tiles of M whose rows stay in L2 while N goes by

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

}  // namespace lrk
