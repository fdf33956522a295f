// SPDX-License-Identifier: Apache-2.0
// What choices for CUDA lean on, by architecture. `python tools/gpu.py --tune` measures a row of this table and writes the
// file with it.
#pragma once

#include <cstdint>

namespace lrk {

struct Tuned {
  int32_t arch, sms;  // such as 90; the last row, of 0, is for all that have none
  double start;       // of a block of shrink, to start and to write its sums: so many chunks of N
};
constexpr Tuned kTuned[] = {
    {0, 132, 1},  // counts: an H100's SMs; not measured
};
constexpr Tuned tuned(int32_t arch) {
  for (const Tuned& row : kTuned)
    if (row.arch == arch || !row.arch) return row;
  return {};
}

}  // namespace lrk
