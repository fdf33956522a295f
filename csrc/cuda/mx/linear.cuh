// SPDX-License-Identifier: Apache-2.0
// Products of a packed weight by architectures that have a kernel for it. cudaError_t values.
#pragma once

#include "cuda/tail.cuh"
#include "mx.h"

namespace lrk {

int mx_few_sm90(const MxLinearParams& p, const MxFused& config, void* workspace, Stream stream);
// Tiled: with the tiles at hand, not those that the choice takes. The workspace is of tail_bytes.
int mx_gemm_tiled(const MxLinearParams& p, void* workspace, const GemmTiles& tiles, Stream stream);
int mx_gemm_sm90(const MxLinearParams& p, const GemmTail& tail, const GemmTiles& tiles, Stream stream);

}  // namespace lrk
