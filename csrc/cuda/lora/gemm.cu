// SPDX-License-Identifier: Apache-2.0
// Base product and low-rank product in one GEMM, by an architecture that has a kernel for it.
#include "cuda/launch.cuh"
#include "lora/tail.cuh"

namespace lrk {

int lora_gemm_cuda(const LoraGemmParams& p, void* workspace, Stream stream) {
  const GemmConfig config = choose_gemm(shape_of(p), cuda_target());
  if (!config.fits) return kInvalidConfiguration;
  LoraTail tail{};
  if (p.R) {
    if (const int error = lora_tail(p, workspace, stream, &tail)) return error;
  }
  return lora_gemm_sm90(p, tail, gemm_tiles(p.T, p.N, config.tile_n, config.cluster), stream);
}

}  // namespace lrk
