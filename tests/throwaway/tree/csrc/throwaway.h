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

size_t throwaway_workspace(const ThrowawayParams&, Target);
void throwaway_cpu(const ThrowawayParams&, void* workspace);
int throwaway_cuda(const ThrowawayParams&, void* workspace, Stream);

}  // namespace lrk
