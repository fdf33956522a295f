// SPDX-License-Identifier: Apache-2.0
// Choices between kernels, and the scratch memory they need: pure arithmetic on shapes, the same on every machine.
#include "multi_lora.h"

namespace lrk {

namespace {

size_t cuda_partial_sums(const LoraShrinkParams& p) { return ceil_div(p.N, kCudaChunk) * p.T * p.R * sizeof(float); }
// One segment needs no planes: the kernel writes the result itself.
size_t cuda_planes(const LoraWgradParams& p) {
  const int64_t segments = ceil_div(p.T, wgrad_segment(p.T, kCudaSegment));
  return segments > 1 ? segments * p.R * p.N * sizeof(float) : 0;
}
size_t align64(size_t n) { return ceil_div(n, size_t{64}) * 64; }

}  // namespace

BackwardConfig choose_lora_backward(const BackwardShape& s) {
  const int64_t chunks = ceil_div(s.O, s.device == Device::kCPU ? kCpuChunk : kCudaChunk);
  BackwardConfig c;
  c.saved_bytes = s.T * s.O * static_cast<int64_t>(size_of(s.dtype));
  c.paid_bytes = 2 * chunks * s.T * s.R * static_cast<int64_t>(sizeof(float));
  // The fused CUDA kernel keeps dB [R, kCudaChunk] in registers: up to 16 ranks.
  const bool fits = s.device == Device::kCPU || s.R <= 16;
  c.fused = fits && c.paid_bytes < c.saved_bytes;
  return c;
}

ShrinkConfig choose_lora_shrink(int64_t T, int64_t N, int32_t R) {
  const int64_t blocks = ceil_div(T, 64) * ceil_div(R, R <= 16 ? 16 : 64);
  const int32_t chunks = static_cast<int32_t>(ceil_div(N, kCudaChunk));
  return {blocks < 128 && chunks > 1, chunks};
}

size_t lora_shrink_workspace(const LoraShrinkParams& p, Device device) {
  return device == Device::kCUDA && choose_lora_shrink(p.T, p.N, p.R).split ? cuda_partial_sums(p) : 0;
}

size_t lora_expand_workspace(const LoraExpandParams&, Device) { return 0; }

size_t lora_wgrad_workspace(const LoraWgradParams& p, Device device) {
  return device == Device::kCUDA ? cuda_planes(p) : 0;
}

size_t lora_shrink_wgrad_workspace(const LoraShrinkWgradParams& p, Device device) {
  const LoraShrinkParams& s = p.shrink;
  if (device == Device::kCUDA) return align64(cuda_partial_sums(s)) + cuda_planes(p.wgrad);
  return ceil_div(s.N, kCpuChunk) * s.T * s.R * sizeof(float);
}

// Partial sums of dc, one [N] row per kRescaleRows tokens, on both devices.
size_t lora_rescale_workspace(const LoraRescaleParams& p, Device) {
  return p.dc ? ceil_div(p.T, kRescaleRows) * p.N * sizeof(float) : 0;
}

// ---- multi-LoRA

ShrinkConfig choose_multi_lora_shrink(int64_t T, int64_t K, int64_t N) {
  const int32_t chunks = static_cast<int32_t>(ceil_div(N, kCudaChunk));
  return {T * K < 128 * kPlanRows && chunks > 1, chunks};
}

// Rows of each group.
size_t multi_lora_plan_workspace(const MultiLoraPlanParams& p, Device device) {
  return device == Device::kCUDA ? p.K * (p.A + 3) * sizeof(int32_t) : 0;
}

size_t multi_lora_shrink_workspace(const MultiLoraShrinkParams& p, Device device) {
  const Adapters& d = p.adapters;
  const ShrinkConfig config = choose_multi_lora_shrink(d.T, d.K, p.N);
  return device == Device::kCUDA && config.split
             ? config.chunks * d.T * d.K * d.slices * d.M * kPageRanks * sizeof(float)
             : 0;
}

// Several slots are summed in fp32 before they meet y.
size_t multi_lora_expand_workspace(const MultiLoraExpandParams& p, Device) {
  return p.adapters.K > 1 ? p.adapters.T * p.N * sizeof(float) : 0;
}

size_t multi_lora_wgrad_workspace(const MultiLoraWgradParams& p, Device device) {
  const Adapters& d = p.adapters;
  const int64_t segments = d.K * ceil_div(d.T, wgrad_segment(d.T, kCudaSegment));
  return device == Device::kCUDA && segments > 1 ? segments * d.P * p.N * sizeof(float) : 0;
}

size_t multi_lora_gather_workspace(const MultiLoraGatherParams&, Device) { return 0; }
size_t multi_lora_scatter_workspace(const MultiLoraScatterParams&, Device) { return 0; }

}  // namespace lrk
