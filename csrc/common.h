// SPDX-License-Identifier: Apache-2.0
// What every part of lrkern shares: storage types, small integer helpers, the CPU thread pool hook.
// Plain C++20, no torch, no CUDA headers; host and device run the same definitions.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define LRK_HD __host__ __device__ __forceinline__
#else
// Always inline: a copy that stays a function is one for all objects, and may be that of an instruction set not every CPU has.
#define LRK_HD [[gnu::always_inline]] inline
#endif

struct CUstream_st;  // a CUDA stream, so that a contract needs no CUDA header

namespace lrk {

using Stream = CUstream_st*;

enum class DType : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2 };

enum class Device : int32_t { kCPU = 0, kCUDA = 1 };

// What a choice between kernels is made for. arch: 10 major + minor of the compute capability, 0 on the CPU.
struct Target {
  Device device;
  int32_t arch;
};
constexpr Target kCpu{Device::kCPU, 0};
int32_t cuda_arch();  // of the current device; csrc/cuda provides it

// What a contract promises of a kernel: the scratch memory its caller allocates, uninitialised, on the device of x; the CPU's
// entry point; CUDA's, which returns a cudaError_t value.
#define LRK_KERNEL(name, Params)                           \
  size_t name##_workspace(const Params& p, Target target); \
  void name##_cpu(const Params& p, void* workspace);       \
  int name##_cuda(const Params& p, void* workspace, Stream stream);

constexpr size_t size_of(DType t) { return t == DType::kF32 ? 4 : 2; }
constexpr const char* name_of(DType t) {
  return t == DType::kF32 ? "float32" : t == DType::kF16 ? "float16" : "bfloat16";
}

// 16-bit floats as storage; arithmetic is always fp32.
struct alignas(2) f16 {
  uint16_t bits;
};
struct alignas(2) bf16 {
  uint16_t bits;
};

using std::bit_cast;

LRK_HD float to_float(float x) { return x; }
LRK_HD float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
LRK_HD float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, nan
  // 2^112 moves the fp16 exponent bias (15) to fp32's (127); subnormals come out exact, as fp32 is wide enough.
  const float scaled = bit_cast<float>(magnitude << 13) * 5.192296858534828e+33f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
}

// Round to nearest even; nan stays nan.
template <class T>
LRK_HD T from_float(float x);
template <>
LRK_HD float from_float<float>(float x) {
  return x;
}
template <>
LRK_HD bf16 from_float<bf16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
LRK_HD f16 from_float<f16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (mag >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520 rounds to inf
  if (mag < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the 2^-24 grid of subnormals in the low mantissa bits
    const uint32_t r = bit_cast<uint32_t>(bit_cast<float>(mag) + 0.5f) - 0x3f000000u;
    return f16{static_cast<uint16_t>(sign | r)};
  }
  return f16{static_cast<uint16_t>(sign | ((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13))};
}

template <class A, class B>
LRK_HD constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// The only way CPU code starts threads. ops binds it to torch's pool when _C.so loads; without that it runs in order.
// Chunks [begin, end) of `grain` items or more each; results must not depend on how they fall.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* ctx);
using ParallelRunner = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* ctx);
extern ParallelRunner g_parallel_runner;
extern int64_t (*g_parallel_threads)();

template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  ParallelBody body = [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const F*>(ctx))(begin, end); };
  void* ctx = const_cast<void*>(static_cast<const void*>(&f));
  if (n <= grain || !g_parallel_runner) {
    body(0, n, ctx);
  } else {
    g_parallel_runner(0, n, grain, body, ctx);
  }
}

// Threads there are to share work among; only speed may depend on it.
inline int64_t parallel_threads() { return g_parallel_threads ? g_parallel_threads() : 1; }

// Instruction set the CPU kernels run with: the best one this machine has, or LRKERN_CPU_ISA where that is set.
enum class CpuIsa : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
CpuIsa cpu_isa();
constexpr const char* name_of(CpuIsa isa) {
  return isa == CpuIsa::kAvx512 ? "avx512" : isa == CpuIsa::kAvx2 ? "avx2" : "baseline";
}

}  // namespace lrk
