// SPDX-License-Identifier: Apache-2.0
// The throwaway family: it has nothing to choose and needs no scratch memory.
#include "throwaway.h"

namespace lrk {

size_t throwaway_workspace(const ThrowawayParams&, Target) { return 0; }

}  // namespace lrk
