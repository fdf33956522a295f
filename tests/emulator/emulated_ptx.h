// SPDX-License-Identifier: Apache-2.0
// Host bodies of csrc/cuda/ptx.cuh: the same names and arguments, plus the caller's line.
#pragma once

#include "../../csrc/common.h"
#include "emulator.h"

#define LRK_AT emu::Where at = emu::Where::here()

namespace lrk {

inline void sync_threads(LRK_AT) { emu::barrier(0, 0, at); }
inline void sync_named(int id, int threads, LRK_AT) { emu::barrier(id, threads, at); }
inline void sync_warp(LRK_AT) { emu::sync_warp(at); }

namespace emu {
inline int this_lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}
template <class T>
T shuffle_as(const char* name, T v, int source_lane, Where at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  bits = shuffle(name, bits, source_lane, at);
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}
}  // namespace emu

template <class T>
T shfl(T v, int source_lane, LRK_AT) {
  return emu::shuffle_as("shfl", v, source_lane & 31, at);
}
template <class T>
T shfl_xor(T v, int lane_mask, LRK_AT) {
  return emu::shuffle_as("shfl_xor", v, (emu::this_lane() ^ lane_mask) & 31, at);
}
template <class T>
T shfl_down(T v, int delta, LRK_AT) {
  const int lane = emu::this_lane();
  return emu::shuffle_as("shfl_down", v, lane + delta > 31 ? lane : lane + delta, at);
}
template <class T>
T shfl_up(T v, int delta, LRK_AT) {
  const int lane = emu::this_lane();
  return emu::shuffle_as("shfl_up", v, lane - delta < 0 ? lane : lane - delta, at);
}
inline uint32_t ballot(bool b, LRK_AT) { return emu::ballot(b, at); }
inline bool any_lane(bool b, LRK_AT) { return emu::ballot(b, at) != 0; }
inline bool all_lanes(bool b, LRK_AT) { return emu::ballot(b, at) == 0xffffffffu; }

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row, LRK_AT) { emu::ldmatrix(r, 4, false, smem_row, at); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row, LRK_AT) {
  emu::ldmatrix(r, 4, true, smem_row, at);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row, LRK_AT) { emu::ldmatrix(r, 2, false, smem_row, at); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row, LRK_AT) {
  emu::ldmatrix(r, 2, true, smem_row, at);
}

inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16, LRK_AT) {
  emu::mma_16816(d, a, b, emu::MmaType::kF16, at);
}
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16, LRK_AT) {
  emu::mma_16816(d, a, b, emu::MmaType::kBF16, at);
}

namespace emu {
using Quad [[gnu::vector_size(16), gnu::may_alias]] = uint32_t;  // one access, as the device's
}
inline void load_16(uint32_t (&w)[4], const void* p) {
  const emu::Quad v = *static_cast<const emu::Quad*>(p);
  for (int i = 0; i < 4; ++i) w[i] = v[i];
}
inline void store_16(void* p, const uint32_t (&w)[4]) {
  *static_cast<emu::Quad*>(p) = emu::Quad{w[0], w[1], w[2], w[3]};
}

inline void store_shared_16(void* p, const uint32_t (&w)[4]) { store_16(p, w); }

inline void cp_async_16(void* smem, const void* gmem, LRK_AT) { emu::cp_async(smem, gmem, 16, at); }
inline void cp_async_16_zfill(void* smem, const void* gmem, int bytes, LRK_AT) { emu::cp_async(smem, gmem, bytes, at); }
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
void cp_async_wait(LRK_AT) {
  emu::cp_async_wait(N, at);
}

inline float mul_rn(float a, float b) { return a * b; }  // g++ fuses nothing without -mfma

inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {  // a product of two bf16 is exact in fp32
  const auto half = [](uint32_t x) { return to_float(bf16{static_cast<uint16_t>(x)}); };
  return from_float<bf16>(half(a) * half(b)).bits |
         static_cast<uint32_t>(from_float<bf16>(half(a >> 16) * half(b >> 16)).bits) << 16;
}

inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) y |= static_cast<uint32_t>(bytes >> (which >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  return y;
}

inline float to_float_fast(float x) { return x; }
inline float to_float_fast(bf16 x) { return to_float(x); }
inline float to_float_fast(f16 x) { return to_float(x); }
template <class T>
T from_float_fast(float x) {
  return from_float<T>(x);
}
template <class T>
uint32_t pack_fast(float lo, float hi) {
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
}

}  // namespace lrk

#undef LRK_AT
