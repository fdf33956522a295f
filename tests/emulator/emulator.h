// SPDX-License-Identifier: Apache-2.0
// The emulator: runs a CUDA kernel compiled with plain g++ on the CPU, one fiber per CUDA thread, block after block.
// csrc/cuda/launch.cuh and ptx.cuh include this under LRK_EMULATE in place of <cuda_runtime.h>.
//
// Threads switch only where they wait (barrier, warp-wide call); a seeded schedule decides who goes on, so a thread that
// spins on memory spins for ever. There is no __shared__ here on purpose: shared arrays come from lrk::Smem, so that each
// has redzones around it. A cluster is one block: what would ask for more does not compile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

// CUDA's words.
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct uint3 {
  uint32_t x, y, z;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t vx = 1, uint32_t vy = 1, uint32_t vz = 1) : x(vx), y(vy), z(vz) {}
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Plain thread-local PODs: the scheduler sets threadIdx at each switch, and no access pays for lazy initialisation.
extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(uint32_t) {}
inline long long clock64() { return 0; }

namespace lrk::emu {

// A place in the kernel's source: the default argument of every wrapper, so a report can name the line.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// ---- launch (emulator.cpp) -------------------------------------------------------------------------------------------
using Body = void (*)(void*);
int launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t smem, int cluster,
           bool after_predecessor, Body body, void* context);
int refuse(const char* kernel, dim3 grid, dim3 block, size_t smem, int error);  // reports a launch over the limits

// Ends the launch with a report; called on a fiber.
[[noreturn]] void fault(Where at, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Which thread is running: "kernel k, block (x, y, z), thread (x, y, z)"; empty outside a launch. For death callbacks.
const char* current_place();

// ---- shared memory ---------------------------------------------------------------------------------------------------
struct SharedCursor {
  uint32_t index = 0;
  size_t bytes = 0;
};
void* shared_piece(SharedCursor* cursor, size_t bytes, size_t padded_bytes, Where at);
void require_shared(const void* p, size_t bytes, size_t alignment, const char* what, Where at);

// ---- meeting points ----------------------------------------------------------------------------------------------------
void barrier(int id, int threads, Where at);  // threads = 0: the whole block
// All 32 lanes meet, each with its arguments; the last one to come runs `op` on all of them.
using WarpOp = void (*)(void* const (&lanes)[32]);
void meet_warp(const char* name, void* arguments, WarpOp op, Where at);

// ---- warp-wide operations and copies (warp_ops.cpp) ---------------------------------------------------------------------
void sync_warp(Where at);
uint64_t shuffle(const char* name, uint64_t value, int source_lane, Where at);
uint32_t ballot(bool b, Where at);
void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Where at);
enum class MmaType { kF16, kBF16 };
void mma_16816(float* d, const uint32_t* a, const uint32_t* b, MmaType type, Where at);
// All lanes get combine(f, ... combine(f, v of lane 0, v of lane 1) ..., v of lane 31).
uint32_t reduce(const char* name, uint32_t mask, uint32_t v, uint32_t (*combine)(const void*, uint32_t, uint32_t),
                const void* f, Where at);
void cp_async(void* smem, const void* gmem, int bytes, Where at);
void cp_async_commit();
void cp_async_wait(int groups_left, Where at);

uint64_t atomic_load(void* p, size_t bytes, Where at);
bool atomic_swap(void* p, size_t bytes, uint64_t* old, uint64_t v);  // false: *p was not *old, which is now what it is

// ---- access tracking (track.cpp, traffic.cpp; active where the kernel is compiled with LRK_EMU_TRACK flags, see build.py) ------------
// Declares global memory whose accesses are checked: `written` says whether it holds values yet.
void track_global(const void* p, size_t bytes, bool written);
void forget_global();

template <class T>
struct Same {
  using type = T;
};
template <class To, class From>
To bits_as(From v) {
  To to{};
  std::memcpy(&to, &v, std::min(sizeof to, sizeof v));
  return to;
}
template <class T, class Update>
[[gnu::always_inline]] inline T atomic_update(T* p, const Update& update, Where at) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics take 32 or 64 bits");
  uint64_t old = atomic_load(p, sizeof(T), at);
  while (!atomic_swap(p, sizeof(T), &old, bits_as<uint64_t>(static_cast<T>(update(bits_as<T>(old)))))) {
  }
  return bits_as<T>(old);
}
template <class T, class Combine>
T reduce_as(const char* name, uint32_t mask, T v, const Combine& combine, Where at) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "reductions take 32-bit integers");
  const auto bits = [](const void* f, uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((*static_cast<const Combine*>(f))(static_cast<T>(a), static_cast<T>(b)));
  };
  return static_cast<T>(reduce(name, mask, static_cast<uint32_t>(v), bits, &combine, at));
}

}  // namespace lrk::emu

// Atomics on global and shared memory, and the warp reductions of sm_80: CUDA's own names, with the caller's line.
#define LRK_AT lrk::emu::Where at = lrk::emu::Where::here()
#define LRK_VALUE typename lrk::emu::Same<T>::type
template <class T>
[[gnu::always_inline]] inline T atomicAdd(T* p, LRK_VALUE v, LRK_AT) {
  return lrk::emu::atomic_update(p, [=](T old) { return old + v; }, at);
}
template <class T>
[[gnu::always_inline]] inline T atomicSub(T* p, LRK_VALUE v, LRK_AT) {
  return lrk::emu::atomic_update(p, [=](T old) { return old - v; }, at);
}
template <class T>
[[gnu::always_inline]] inline T atomicMin(T* p, LRK_VALUE v, LRK_AT) {
  return lrk::emu::atomic_update(p, [=](T old) { return min(old, v); }, at);
}
template <class T>
[[gnu::always_inline]] inline T atomicMax(T* p, LRK_VALUE v, LRK_AT) {
  return lrk::emu::atomic_update(p, [=](T old) { return max(old, v); }, at);
}
template <class T>
[[gnu::always_inline]] inline T atomicAnd(T* p, LRK_VALUE v, LRK_AT) {
  return lrk::emu::atomic_update(p, [=](T old) { return old & v; }, at);
}
template <class T>
[[gnu::always_inline]] inline T atomicOr(T* p, LRK_VALUE v, LRK_AT) {
  return lrk::emu::atomic_update(p, [=](T old) { return old | v; }, at);
}
template <class T>
[[gnu::always_inline]] inline T atomicXor(T* p, LRK_VALUE v, LRK_AT) {
  return lrk::emu::atomic_update(p, [=](T old) { return old ^ v; }, at);
}
template <class T>
[[gnu::always_inline]] inline T atomicExch(T* p, LRK_VALUE v, LRK_AT) {
  return lrk::emu::atomic_update(p, [=](T) { return v; }, at);
}
template <class T>
[[gnu::always_inline]] inline T atomicCAS(T* p, LRK_VALUE is, LRK_VALUE v, LRK_AT) {
  return lrk::emu::atomic_update(p, [=](T old) { return old == is ? v : old; }, at);
}
template <class T>
T __reduce_add_sync(uint32_t mask, T v, LRK_AT) {
  return lrk::emu::reduce_as(
      "__reduce_add_sync", mask, v, [](T a, T b) { return static_cast<uint32_t>(a) + static_cast<uint32_t>(b); }, at);
}
template <class T>
T __reduce_min_sync(uint32_t mask, T v, LRK_AT) {
  return lrk::emu::reduce_as("__reduce_min_sync", mask, v, [](T a, T b) { return min(a, b); }, at);
}
template <class T>
T __reduce_max_sync(uint32_t mask, T v, LRK_AT) {
  return lrk::emu::reduce_as("__reduce_max_sync", mask, v, [](T a, T b) { return max(a, b); }, at);
}
template <class T>
T __reduce_and_sync(uint32_t mask, T v, LRK_AT) {
  return lrk::emu::reduce_as("__reduce_and_sync", mask, v, [](T a, T b) { return a & b; }, at);
}
template <class T>
T __reduce_or_sync(uint32_t mask, T v, LRK_AT) {
  return lrk::emu::reduce_as("__reduce_or_sync", mask, v, [](T a, T b) { return a | b; }, at);
}
template <class T>
T __reduce_xor_sync(uint32_t mask, T v, LRK_AT) {
  return lrk::emu::reduce_as("__reduce_xor_sync", mask, v, [](T a, T b) { return a ^ b; }, at);
}
#undef LRK_VALUE
#undef LRK_AT

// Settings and counters, for harnesses and ctypes. Also read from the environment as LRK_EMU_<NAME> at the first launch.
//   schedule    0 ascending, 1 descending, other values random
//   threads     host threads that take blocks      max_shared  bytes per block a launch may ask for
//   arch, multiprocessors   of the device that launchers are told of: 80, and 4
//   switches, blocks, launches   counters (settable to 0)
// LRK_EMU_SKIP=<file>:<line> makes the barriers and waits of that line do nothing: what a test leaves out must be noticed.
extern "C" int64_t lrk_emulator_get(const char* name);
extern "C" int lrk_emulator_set(const char* name, int64_t value);
extern "C" const char* lrk_emulator_report();  // the last fault, "" if none since the last call of lrk_emulator_clear
extern "C" void lrk_emulator_clear();
// Launches since the last call, each kind once: lines of "name threads bytes-of-shared-memory".
extern "C" const char* lrk_emulator_launched();
