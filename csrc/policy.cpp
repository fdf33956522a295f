// SPDX-License-Identifier: Apache-2.0
// Choices between kernels, and the scratch memory they need: pure arithmetic on shapes, the same on every machine.
#include <algorithm>

#include "basis.h"
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

// ---- random bases

// CUDA: slices are to give a GPU some thousand warps (dot: of 8 layers and 4 bases each; the others: of 32 times 16
// columns), but none so short that to add them up would cost more than they do.
int64_t basis_dot_slices(int64_t L, int64_t K, Device device) {
  if (device == Device::kCUDA)
    return std::clamp<int64_t>(4096 / std::max<int64_t>(1, ceil_div(L, 8) * ceil_div(K, 4)), 1, 128);
  return std::clamp<int64_t>((int64_t{1} << 22) / std::max<int64_t>(1, L * K), 1, 32);
}
int64_t basis_matmul_slices(int64_t Q, int64_t C, Device device) {
  if (device == Device::kCUDA) {
    const int64_t most = std::clamp<int64_t>(ceil_div(Q, 8), 1, 64);
    return std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(1, C), 1, most);
  }
  const int64_t groups = std::max<int64_t>(1, ceil_div(C, 256));
  return std::clamp<int64_t>(32 / groups, 1, std::max<int64_t>(1, ceil_div(Q, 128)));
}
int64_t basis_combine_slices(int64_t R, int64_t W, int64_t K, Device device) {
  if (device == Device::kCPU) return 1;
  const int64_t most = std::clamp<int64_t>(ceil_div(K, 16), 1, 32);
  return std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(1, R * W), 1, most);
}
BasisMatmulLayout basis_matmul_layout(const BasisMatmulParams& p) {
  // A warp takes 32 pieces of at most 16 columns of x without asking for its end; a thread one of a plane.
  if (p.transposed) return {p.T * ceil_div(p.C, 512) * 512, ceil_div(p.C, 512) * 512, 0};
  return {ceil_div(p.T, kBasisSums) * kBasisSums * p.Q, ceil_div(p.C, 16) * 16,
          p.Q ? basis_matmul_slices(p.Q, p.C, Device::kCUDA) : 0};
}

BasisMatmulConfig choose_basis_matmul(int64_t T, int64_t Q, int64_t C, bool transposed, Device device) {
  constexpr int64_t kTokens = 16;
  const int64_t elements = device == Device::kCPU ? int64_t{1} << 20 : int64_t{1} << 23;  // 4 MB; 16 MB in 16 bits
  BasisMatmulConfig c{T > kTokens, Q, C};
  const int64_t fixed = std::max<int64_t>(1, transposed ? C : Q);
  const int64_t most = std::max<int64_t>(128, elements / fixed / 128 * 128);
  (transposed ? c.rows : c.cols) = std::min(transposed ? Q : C, most);
  return c;
}

size_t basis_fill_workspace(const BasisFillParams&, Device) { return 0; }

// The coefficients times scale; on CUDA the sums of slices.
size_t basis_combine_workspace(const BasisCombineParams& p, Device device) {
  const int64_t W = p.segments.begin[p.segments.count], K = p.segments.first[p.segments.count];
  if (device == Device::kCPU) return p.L * K * sizeof(float);
  const int64_t slices = basis_combine_slices(p.R, W, K, device);
  return slices > 1 ? slices * p.L * p.R * W * sizeof(float) : 0;
}

size_t basis_dot_workspace(const BasisDotParams& p, Device device) {
  const int64_t K = p.segments.first[p.segments.count];
  return basis_dot_slices(p.L, K, device) * p.L * K * sizeof(float);
}

// x in fp32, for the CPU's widest vectors, and the sums of slices.
size_t basis_matmul_workspace(const BasisMatmulParams& p, Device device) {
  if (device == Device::kCUDA) {
    const BasisMatmulLayout at = basis_matmul_layout(p);
    return (at.x + at.slices * p.T * at.width) * sizeof(float);
  }
  const int64_t span = 16 * block_columns(p.u.distribution), width = ceil_div(p.C, span) * span;
  const int64_t x = p.transposed ? width : p.Q,
                sums = p.transposed ? p.Q : basis_matmul_slices(p.Q, p.C, device) * width;
  return p.T * (x + sums) * sizeof(float);
}

}  // namespace lrk
