// SPDX-License-Identifier: Apache-2.0
// y = g x, a gain for each column: the smallest family. T rows of N columns.
#pragma once

#include "common.h"

namespace lrk {

struct ThrowawayParams {
  const void* x;      // [T, N], rows `pitch` apart
  const float* gain;  // [N]
  void* y;            // [T, N], contiguous, of x's type
  int64_t T, N, pitch;
  DType dtype;
};

LRK_KERNEL(throwaway, ThrowawayParams)

}  // namespace lrk
