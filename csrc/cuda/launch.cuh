// SPDX-License-Identifier: Apache-2.0
// How a kernel gets its shared memory and how a launcher starts it. The only file that touches the CUDA runtime's launch
// API; under LRK_EMULATE both go to the emulator (tests/emulator/).
#pragma once

#include "../dispatch.h"

#if defined(LRK_EMULATE)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace lrk {

// Limits every CUDA device since sm_80 shares. Shared memory per block differs (sm_80 163 KB, sm_90 227 KB, sm_120 99 KB)
// and is left to the runtime.
constexpr int64_t kMaxGridX = 2147483647, kMaxGridYZ = 65535;
constexpr unsigned kMaxThreads = 1024, kMaxThreadsZ = 64;
constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration

// Of kernels for sm_90a (ptx_sm90.cuh). cluster: blocks along x that run together, 8 at most. after_predecessor: the launch
// may begin before the one before it in its stream is over; what that one writes is there after wait_predecessor.
struct LaunchOptions {
  int cluster = 1;
  bool after_predecessor = false;
};
constexpr int kMaxCluster = 8;

inline int launch_error(dim3 grid, dim3 block, LaunchOptions options) {
  const bool grid_ok =
      grid.x >= 1 && grid.x <= kMaxGridX && grid.y >= 1 && grid.y <= kMaxGridYZ && grid.z >= 1 && grid.z <= kMaxGridYZ;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool block_ok = threads >= 1 && threads <= kMaxThreads && block.x <= kMaxThreads && block.y <= kMaxThreads &&
                        block.z <= kMaxThreadsZ;
  const bool cluster_ok =
      options.cluster >= 1 && options.cluster <= kMaxCluster && grid.x % static_cast<unsigned>(options.cluster) == 0;
  return grid_ok && block_ok && cluster_ok ? 0 : kInvalidConfiguration;
}

// Shared memory. A kernel carves its arrays out of the launch's dynamic bytes in the order of its calls, the same in every
// thread; the launcher sums smem_bytes over the same list.
constexpr size_t kSmemAlign = 128;

template <class T>
LRK_HD constexpr size_t smem_bytes(size_t count) {
  return (count * sizeof(T) + kSmemAlign - 1) / kSmemAlign * kSmemAlign;
}

#if defined(LRK_EMULATE)

inline int current_device() { return -1; }  // of which nothing is remembered: its architecture is a setting
inline int32_t arch_of(int) { return static_cast<int32_t>(lrk_emulator_get("arch")); }
inline int multiprocessors() { return static_cast<int>(lrk_emulator_get("multiprocessors")); }

struct Smem {
  template <class T>
  T* take(size_t count, emu::Where at = emu::Where::here()) {
    return static_cast<T*>(emu::shared_piece(&cursor_, count * sizeof(T), smem_bytes<T>(count), at));
  }

 private:
  emu::SharedCursor cursor_;
};

template <class Kernel, class... Args>
int launch(const char* name, Kernel kernel, dim3 grid, dim3 block, size_t smem, Stream, LaunchOptions options,
           const Args&... args) {
  if (const int error = launch_error(grid, block, options)) return emu::refuse(name, grid, block, smem, error);
  auto body = [&] { kernel(args...); };
  return emu::launch(
      name, reinterpret_cast<const void*>(kernel), grid, block, smem, options.cluster, options.after_predecessor,
      [](void* b) { (*static_cast<decltype(body)*>(b))(); }, &body);
}

#else

inline int current_device() {
  int device = -1;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}
inline int32_t arch_of(int device) {  // 0 where the runtime does not say
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}
inline int multiprocessors() {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()) == cudaSuccess ? count : 1;
}

struct Smem {
  template <class T>
  __device__ __forceinline__ T* take(size_t count) {
    extern __shared__ __align__(1024) unsigned char lrk_dynamic_shared[];  // swizzles of sm_90 repeat so
    T* piece = reinterpret_cast<T*>(lrk_dynamic_shared + offset_);
    offset_ += static_cast<uint32_t>(smem_bytes<T>(count));
    return piece;
  }

 private:
  uint32_t offset_ = 0;
};

// Returns a cudaError_t value. A failed launch leaves no error behind that a later, innocent check would find.
template <class Kernel, class... Args>
int launch(const char* /*name*/, Kernel kernel, dim3 grid, dim3 block, size_t smem, Stream stream,
           LaunchOptions options, const Args&... args) {
  if (const int error = launch_error(grid, block, options)) return error;
  // More than this needs an opt-in per kernel; the call is cheap beside a launch.
  constexpr size_t kDefaultSharedLimit = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (smem > kDefaultSharedLimit)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    cudaLaunchAttribute asked[2] = {};
    config.attrs = asked;
    if (options.cluster > 1) {
      cudaLaunchAttribute& a = asked[config.numAttrs++];
      a.id = cudaLaunchAttributeClusterDimension;
      a.val.clusterDim = {static_cast<unsigned>(options.cluster), 1, 1};
    }
    if (options.after_predecessor) {
      cudaLaunchAttribute& a = asked[config.numAttrs++];
      a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      a.val.programmaticStreamSerializationAllowed = 1;
    }
    error = cudaLaunchKernelEx(&config, kernel, args...);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

#endif

template <class Kernel, class... Args>
int launch(const char* name, Kernel kernel, dim3 grid, dim3 block, size_t smem, Stream stream, const Args&... args) {
  return launch(name, kernel, grid, block, smem, stream, LaunchOptions{}, args...);
}

inline Target cuda_target() { return {Device::kCUDA, cuda_arch()}; }
inline dim3 grid_of(int64_t x, int64_t y, int64_t z = 1) {
  // launch refuses what does not fit; an index past 32 bits must not wrap into something that does
  const auto narrow = [](int64_t n) { return static_cast<unsigned>(n < int64_t{1} << 32 ? n : 0); };
  return dim3(narrow(x), narrow(y), narrow(z));
}

}  // namespace lrk
