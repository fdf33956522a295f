// SPDX-License-Identifier: Apache-2.0
// Products of a packed weight by architectures that have a kernel for it. cudaError_t values.
#pragma once

#include "mx.h"

namespace lrk {

int mx_few_sm90(const MxLinearParams& p, const MxFused& config, void* workspace, Stream stream);

// S [T, columns] and B [O, columns] as bf16 operands, whole vectors of 8 columns.
struct MxTail {
  const bf16 *s, *b;
  int32_t columns;
};
int mx_gemm_sm90(const MxLinearParams& p, const MxTail& tail, const GemmTiles& tiles, Stream stream);

}  // namespace lrk
