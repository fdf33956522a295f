// SPDX-License-Identifier: Apache-2.0
// The low-rank product as more columns of a bf16 GEMM: Y += S' [T, columns] U' [columns, N].
#pragma once

#include "lora.h"

namespace lrk {

struct LoraTail {
  const bf16 *s, *u;  // [T, columns]; of U' the layout of W
  int64_t s_pitch, u_pitch;
  int32_t columns;
};
// S and U themselves where they are bf16 and lie so; else S' and U' are written to the workspace (lora_gemm_workspace).
int lora_tail(const LoraGemmParams& p, void* workspace, Stream stream, LoraTail* tail);

// Architectures that have a kernel for it. A cudaError_t value.
int lora_gemm_sm90(const LoraGemmParams& p, const LoraTail& tail, const GemmTiles& tiles, Stream stream);
int lora_gemm_sm100(const LoraGemmParams& p, const LoraTail& tail, Stream stream);  // where the build found CUTLASS

}  // namespace lrk
