// SPDX-License-Identifier: Apache-2.0
// A packed weight's product with the low-rank one inside, by an architecture that has kernels for it.
#include "cuda/launch.cuh"
#include "linear.cuh"

namespace lrk {

int mx_fused_cuda(const MxLinearParams& p, void* workspace, Stream stream) {
  const MxFused config = choose_mx_fused(shape_of(p), cuda_target());
  if (!config.fits) return kInvalidConfiguration;
  if (config.few) return mx_few_sm90(p, config, workspace, stream);
  return mx_gemm_tiled(p, workspace, gemm_tiles(p.w.O, p.T, config.tile_n, config.cluster), stream);
}

int mx_gemm_tiled(const MxLinearParams& p, void* workspace, const GemmTiles& tiles, Stream stream) {
  LoraTail tail{};
  if (p.s) {
    if (const int error = lora_tail(tail_of(p), workspace, stream, &tail)) return error;
  }
  return mx_gemm_sm90(p, tail, tiles, stream);
}

}  // namespace lrk
