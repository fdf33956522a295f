// SPDX-License-Identifier: Apache-2.0
// The S2FT family: slices of activations and of W, by index. T rows, N features, K slots a row, A adapters of s columns at most.
// Row pitches are in elements; the last dimension is contiguous.
//
//   gather   H[T, K, P] = scale * x[t, index[id(t, k), j]]    0 past an adapter's columns and where a slot has none
//   scatter  y[t, index[id(t, k), j]] += scale * H[t, k, j]   its adjoint: a column's slots in order, rounded once
//   write    W[O, I] at rows or columns `index` = slice
//
// The products beside them are ATen's, or LoRA's and multi-LoRA's with a slice as a factor. On CUDA values are not validated: an
// adapter or a column that does not exist, or columns that do not ascend where they are added to, give NaN in that row alone.
#pragma once

#include "common.h"

namespace lrk {

struct SliceIndex {
  const int32_t* index;  // [A, s]: an adapter's columns, ascending, and behind their end negative
  const int32_t* ids;    // [T, K]: an adapter, or negative for none; null for the first one in every row
  int64_t A;
  int32_t s, K;

  LRK_HD constexpr int64_t adapter(int64_t row, int32_t slot) const { return ids ? ids[row * K + slot] : 0; }
  LRK_HD constexpr int32_t column(int64_t adapter, int32_t j) const { return index[adapter * s + j]; }
  // Whether entry j is a column of N behind the one before it, or an end.
  LRK_HD constexpr bool ascends(int64_t adapter, int32_t j, int64_t N) const {
    const int32_t c = column(adapter, j), before = j ? column(adapter, j - 1) : -1;
    return c < 0 || (c > before && c < N && (j == 0 || before >= 0));
  }
  // Which entry of an adapter is column c, or -1.
  LRK_HD constexpr int32_t find(int64_t adapter, int32_t c) const {
    int32_t low = 0, high = s;
    while (low < high) {
      const int32_t middle = (low + high) / 2, at = column(adapter, middle);
      if (at >= 0 && at < c) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < s && column(adapter, low) == c ? low : -1;
  }
};

struct SliceGatherParams {
  SliceIndex slice;
  const void* x;        // [T, N] dtype
  void* h;              // [T, K, P] h_dtype, contiguous
  const float* scales;  // [T, K], or null for ones
  int64_t T, N, x_pitch;
  int32_t P;  // s or more
  DType dtype, h_dtype;
};

struct SliceScatterParams {
  SliceIndex slice;
  void* y;              // [T, N] dtype
  const void* h;        // [T, K, P] h_dtype, contiguous
  const float* scales;  // [T, K], or null for ones
  int64_t T, N, y_pitch;
  int32_t P;
  DType dtype, h_dtype;
};

struct SliceWriteParams {
  void* w;                                    // W [O, I] dtype, at any strides
  const void* slice;                          // [rows, columns] slice_dtype, contiguous: [O, s], or of rows of W [s, I]
  const int32_t* index;                       // [s]; one out of range (CUDA) is not written
  int64_t rows, columns, N, w_row, w_column;  // N: how many rows or columns W has there
  bool of_rows;
  DType dtype, slice_dtype;
};

// pages [A, 1, M] and ranks [A, 1] of multi-LoRA for slices that lie in a pool one behind the other.
struct SlicePagesParams {
  int32_t *pages, *ranks;
  int64_t A, M;
  int32_t rank;
};

LRK_KERNEL(slice_gather, SliceGatherParams)
LRK_KERNEL(slice_scatter, SliceScatterParams)
LRK_KERNEL(slice_write, SliceWriteParams)
LRK_KERNEL(slice_pages, SlicePagesParams)

}  // namespace lrk
