// SPDX-License-Identifier: Apache-2.0
// What kernels over rows share: how those without products spread over a matrix, and what a row holds that cannot be right.
#pragma once

#include "tile.cuh"

namespace lrk {

static_assert(kBlockThreads == 1 << 7);

__device__ __forceinline__ float not_a_number() { return bit_cast<float>(0x7fc00000u); }

// The row and the column group of a thread. Blocks of 128 threads stand over 2^shift groups side by side, and rows below one
// another.
struct Place {
  int64_t row;
  int group;
  explicit __device__ __forceinline__ Place(int shift)
      : row((int64_t{blockIdx.x} << (7 - shift)) + (static_cast<int>(threadIdx.x) >> shift)),
        group((static_cast<int>(blockIdx.y) << shift) + (static_cast<int>(threadIdx.x) & ((1 << shift) - 1))) {}
};

struct PlaceGrid {
  int shift;
  dim3 grid;
};
inline PlaceGrid place_grid(int64_t rows, int64_t groups) {
  int shift = 0;
  while (shift < 7 && (int64_t{1} << shift) < groups) ++shift;
  return {shift, grid_of(ceil_div(rows, int64_t{1} << (7 - shift)), ceil_div(groups, int64_t{1} << shift))};
}

}  // namespace lrk
