// SPDX-License-Identifier: Apache-2.0
// Multi-LoRA: choices and scratch memory.
#include "multi_lora.h"

namespace lrk {

ShrinkConfig choose_multi_lora_shrink(int64_t T, int64_t K, int64_t N, Target) {
  const int32_t chunks = static_cast<int32_t>(ceil_div(N, kCudaChunk));
  return {T * K < 128 * kPlanRows && chunks > 1, chunks};
}

// Rows of each group.
size_t multi_lora_plan_workspace(const MultiLoraPlanParams& p, Target target) {
  return target.device == Device::kCUDA ? p.K * (p.A + 3) * sizeof(int32_t) : 0;
}

size_t multi_lora_shrink_workspace(const MultiLoraShrinkParams& p, Target target) {
  const Adapters& d = p.adapters;
  const ShrinkConfig config = choose_multi_lora_shrink(d.T, d.K, p.N, target);
  return target.device == Device::kCUDA && config.split
             ? config.chunks * d.T * d.K * d.slices * d.M * kPageRanks * sizeof(float)
             : 0;
}

// Several slots are summed in fp32 before they meet y.
size_t multi_lora_expand_workspace(const MultiLoraExpandParams& p, Target) {
  return p.adapters.K > 1 ? p.adapters.T * p.N * sizeof(float) : 0;
}

size_t multi_lora_wgrad_workspace(const MultiLoraWgradParams& p, Target target) {
  const Adapters& d = p.adapters;
  const int64_t splits = d.K * ceil_div(d.T, split_tokens(d.T, kCudaSplit));
  return target.device == Device::kCUDA && splits > 1 ? splits * d.P * p.N * sizeof(float) : 0;
}

size_t multi_lora_gather_workspace(const MultiLoraGatherParams&, Target) { return 0; }
size_t multi_lora_scatter_workspace(const MultiLoraScatterParams&, Target) { return 0; }

}  // namespace lrk
