// SPDX-License-Identifier: Apache-2.0
// LoRA: choices between kernels, and the scratch memory they need: pure arithmetic on shapes, the same on every machine.
#include "lora.h"

namespace lrk {

namespace {

// One split needs no partial sums: the kernel writes the result itself.
int64_t wgrad_partial_sums(const LoraWgradParams& p, int64_t splits) { return splits > 1 ? splits * p.R * p.N : 0; }
int64_t wgrad_splits(const LoraWgradParams& p) { return ceil_div(p.T, split_tokens(p.T, kCudaSplit)); }

}  // namespace

BackwardConfig choose_lora_backward(const BackwardShape& s, Target target) {
  const int64_t chunks = ceil_div(s.O, target.device == Device::kCPU ? kCpuChunk : kCudaChunk);
  BackwardConfig c;
  c.saved_bytes = s.T * s.O * static_cast<int64_t>(size_of(s.dtype));
  c.paid_bytes = 2 * chunks * s.T * s.R * static_cast<int64_t>(sizeof(float));
  const bool fits = target.device == Device::kCPU || s.R <= kCudaFewRanks;
  c.fused = fits && c.paid_bytes < c.saved_bytes;
  return c;
}

ShrinkConfig choose_lora_shrink(int64_t T, int64_t N, int32_t R, Target) {
  const int64_t blocks = ceil_div(T, kCudaTokens) * ceil_div(R, R <= kCudaFewRanks ? kCudaFewRanks : kCudaRanks);
  const int32_t chunks = static_cast<int32_t>(ceil_div(N, kCudaChunk));
  return {blocks < 128 && chunks > 1, chunks};
}

ShrinkWgradLayout shrink_wgrad_layout(const LoraShrinkWgradParams& p) {
  const int64_t chunks = ceil_div(p.shrink.N, kCudaChunk), splits = wgrad_splits(p.wgrad);
  const int64_t db = ceil_div(chunks * p.shrink.T * p.shrink.R, 16) * 16;  // 64-byte aligned
  return {chunks, splits, db, db + wgrad_partial_sums(p.wgrad, splits)};
}

size_t lora_shrink_workspace(const LoraShrinkParams& p, Target target) {
  if (target.device == Device::kCPU) return 0;
  const ShrinkConfig config = choose_lora_shrink(p.T, p.N, p.R, target);
  return config.split ? config.chunks * p.T * p.R * sizeof(float) : 0;
}

size_t lora_expand_workspace(const LoraExpandParams&, Target) { return 0; }

size_t lora_wgrad_workspace(const LoraWgradParams& p, Target target) {
  return target.device == Device::kCUDA ? wgrad_partial_sums(p, wgrad_splits(p)) * sizeof(float) : 0;
}

size_t lora_shrink_wgrad_workspace(const LoraShrinkWgradParams& p, Target target) {
  if (target.device == Device::kCUDA) return shrink_wgrad_layout(p).floats * sizeof(float);
  return ceil_div(p.shrink.N, kCpuChunk) * p.shrink.T * p.shrink.R * sizeof(float);
}

// Partial sums of dc, one [N] row per kRescaleRows tokens, on both devices.
size_t lora_rescale_workspace(const LoraRescaleParams& p, Target) {
  return p.dc ? ceil_div(p.T, kRescaleRows) * p.N * sizeof(float) : 0;
}

}  // namespace lrk
