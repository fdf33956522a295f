// SPDX-License-Identifier: Apache-2.0
// For programs that run on the device and in the emulator: memory that both sides see, never freed, and what went wrong.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "launch.cuh"

namespace lrk {

template <class T>
T* visible(size_t count) {
  void* p = nullptr;
#if defined(LRK_EMULATE)
  p = std::aligned_alloc(256, (count * sizeof(T) + 255) / 256 * 256);
#else
  if (cudaMallocManaged(&p, count * sizeof(T)) != cudaSuccess) p = nullptr;
#endif
  if (!p) {
    std::fprintf(stderr, "no memory\n");
    std::exit(2);
  }
  std::memset(p, 0xff, count * sizeof(T));
  return static_cast<T*>(p);
}

// Of a launch and what it runs.
inline int finished(int code) {
#if !defined(LRK_EMULATE)
  if (code == 0) code = static_cast<int>(cudaDeviceSynchronize());
  if (code) std::fprintf(stderr, "CUDA error %d: %s\n", code, cudaGetErrorString(static_cast<cudaError_t>(code)));
#endif
  return code;
}

}  // namespace lrk
