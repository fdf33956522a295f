// SPDX-License-Identifier: Apache-2.0
// S2FT: nothing to choose, no scratch memory.
#include "s2ft.h"

namespace lrk {

size_t slice_gather_workspace(const SliceGatherParams&, Target) { return 0; }
size_t slice_scatter_workspace(const SliceScatterParams&, Target) { return 0; }
size_t slice_write_workspace(const SliceWriteParams&, Target) { return 0; }
size_t slice_pages_workspace(const SlicePagesParams&, Target) { return 0; }

}  // namespace lrk
