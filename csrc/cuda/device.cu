// SPDX-License-Identifier: Apache-2.0
// What the choices of policy/ ask of a GPU.
#include <atomic>

#include "launch.cuh"

namespace lrk {

int32_t cuda_arch() {
  static std::atomic<int32_t> known[64];  // by device, 0 for not asked yet
  const int device = current_device();
  if (device < 0 || device >= 64) return arch_of(device);
  int32_t arch = known[device];
  if (!arch) known[device] = arch = arch_of(device);
  return arch;
}

}  // namespace lrk
