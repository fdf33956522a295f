// SPDX-License-Identifier: Apache-2.0
// What the kernels of a GEMM with one adapter hand each other.
#pragma once

#include "cuda/tail.cuh"
#include "lora.h"

namespace lrk {

int lora_tail(const LoraGemmParams& p, void* workspace, Stream stream, GemmTail* tail);

// Architectures that have a kernel for it. A cudaError_t value.
int lora_gemm_sm90(const LoraGemmParams& p, const GemmTail& tail, const GemmTiles& tiles, Stream stream);
int lora_gemm_sm100(const LoraGemmParams& p, const GemmTail& tail, Stream stream);  // where the build found CUTLASS

}  // namespace lrk
