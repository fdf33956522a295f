// SPDX-License-Identifier: Apache-2.0
// Products of two packed operands: kernels for one architecture each, which are built where CUTLASS is.
#pragma once

#include "../launch.cuh"
#include "mx.h"

namespace lrk {

// Scales as the units read them (swizzled_scale).
struct SwizzledScales {
  const uint8_t *a, *b;
};
int mx_product_sm100(const MxProductParams& p, const SwizzledScales& scales, Stream stream);
int mx_product_sm120(const MxProductParams& p, const SwizzledScales& scales, Stream stream);

}  // namespace lrk
