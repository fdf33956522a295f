// SPDX-License-Identifier: Apache-2.0
// Products of a packed weight by architectures that have a kernel for it. A cudaError_t value.
#pragma once

#include "mx.h"

namespace lrk {

int mx_few_sm90(const MxLinearParams& p, const MxFused& config, void* workspace, Stream stream);

}  // namespace lrk
