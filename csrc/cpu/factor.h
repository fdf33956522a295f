// SPDX-License-Identifier: Apache-2.0
// What the low-rank families do with a factor on the CPU: view or pack a part of it as a tile;
// and how they choose types, share tasks and keep scratch memory.
#pragma once

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "lora.h"
#include "tile.h"

namespace lrk::LRK_ISA {

static_assert(kChunk == kCpuChunk, "workspace sizes follow lora.h");

// Tokens that do not pay for reading a factor. The hardware's own prefetch is the best there.
constexpr int kFewRows = 16;
constexpr int kFewCols = 128;    // columns of a factor [N, R] that are then packed at a time: they stay in L1
constexpr int kWgradCols = 256;  // columns of one task of wgrad

// Memory of this thread, kept for its next call.
inline float* thread_scratch(size_t floats) {
  static thread_local std::vector<float> memory;
  if (memory.size() < floats + 16) memory.resize(floats + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
}

// U's columns [n0, n0 + n) of ranks [r0, r0 + ranks), widened to fp32 rows in `tile` [ranks][kPitch], zero-padded to kBlock
// columns.
template <class F>
void pack(const Factor& u, int64_t r0, int ranks, int64_t n0, int n, float* tile) {
  const F* data = static_cast<const F*>(u.data) + r0 * u.stride_r + n0 * u.stride_n;
  if (u.stride_n == 1) {
    load_tile(data, u.stride_r, 0, ranks, 0, n, Dropout{}, 0, tile);
    return;
  }
  int r = 0;
  for (; r + kLanes <= ranks; r += kLanes) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      vf block[kLanes];
      for (int j = 0; j < kLanes; ++j) block[j] = load(data + (i + j) * u.stride_n + r);
      transpose(block);
      for (int j = 0; j < kLanes; ++j) store(tile + (r + j) * kPitch + i, block[j]);
    }
    for (; i < n; ++i)
      for (int j = r; j < r + kLanes; ++j) tile[j * kPitch + i] = to_float(data[i * u.stride_n + j]);
  }
  for (; r < ranks; ++r)
    for (int i = 0; i < n; ++i) tile[r * kPitch + i] = to_float(data[i * u.stride_n + r]);
  for (r = 0; r < ranks; ++r)
    for (int64_t i = n; i < round_up(n, kBlock); ++i) tile[r * kPitch + i] = 0.f;
}

// The same as a view: of the factor itself where it is fp32 rows of whole blocks, else packed.
template <class F>
View factor_tile(const Factor& u, int64_t r0, int ranks, int64_t n0, int n, float* tile) {
  if constexpr (sizeof(F) == 4) {
    if (u.stride_n == 1 && n % kBlock == 0)
      return {static_cast<const float*>(u.data) + r0 * u.stride_r + n0, u.stride_r};
  }
  pack<F>(u, r0, ranks, n0, n, tile);
  return {tile, kPitch};
}

}  // namespace lrk::LRK_ISA

// A kernel of the contract: LRK_CPU_ENTRY(lora_shrink, LoraShrinkParams, <what it does with p and workspace>), and, in the
// baseline copy of a family, the entry point name_cpu, which runs the copy for this machine.
#if !defined(LRK_ISA_ENTRY)
#define LRK_CPU_DISPATCH(name, Params)
#elif defined(LRK_HAVE_AVX)
#define LRK_CPU_DISPATCH(name, Params)                                            \
  namespace avx2 {                                                                \
  void name(const Params& p, float* workspace);                                   \
  }                                                                               \
  namespace avx512 {                                                              \
  void name(const Params& p, float* workspace);                                   \
  }                                                                               \
  void name##_cpu(const Params& p, void* workspace) {                             \
    const CpuIsa isa = cpu_isa();                                                 \
    (isa == CpuIsa::kAvx512 ? avx512::name                                        \
     : isa == CpuIsa::kAvx2 ? avx2::name                                          \
                            : baseline::name)(p, static_cast<float*>(workspace)); \
  }
#else
#define LRK_CPU_DISPATCH(name, Params) \
  void name##_cpu(const Params& p, void* workspace) { baseline::name(p, static_cast<float*>(workspace)); }
#endif
#define LRK_CPU_ENTRY(name, Params, ...)                                         \
  namespace LRK_ISA {                                                            \
  void name(const Params& p, [[maybe_unused]] float* workspace) { __VA_ARGS__; } \
  }                                                                              \
  LRK_CPU_DISPATCH(name, Params)
