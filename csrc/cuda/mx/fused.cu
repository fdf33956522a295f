// SPDX-License-Identifier: Apache-2.0
// Which kernel of an architecture's own multiplies a packed weight.
#include "cuda/launch.cuh"
#include "linear.cuh"

namespace lrk {

int mx_fused_cuda(const MxLinearParams& p, void* workspace, Stream stream) {
  const MxFused config = choose_mx_fused(fused_shape_of(p), cuda_target());
  return config.fits ? mx_few_sm90(p, config, workspace, stream) : kInvalidConfiguration;
}

}  // namespace lrk
