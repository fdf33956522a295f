// SPDX-License-Identifier: Apache-2.0
// The wrappers through which kernels reach the hardware. Here the body is PTX; under LRK_EMULATE the same names are
// functions of tests/emulator/, so a kernel has no #ifdef and the very same .cu runs on the CPU.
// Warp-wide calls (ldmatrix, mma, shfl, vote, sync_warp) are made by all 32 lanes together. Some serve no kernel yet; all
// are checked (tests/emulator/wrappers.cu), on a GPU too.
#pragma once

#include "../common.h"

#if defined(LRK_EMULATE)

#include "emulated_ptx.h"

#else

#include <cuda_runtime.h>

namespace lrk {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Barriers. Named barriers are 1..15 (0 is sync_threads); `threads` is the number that meet, a multiple of 32.
__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_named(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Lane exchange and votes.
template <class T>
__device__ __forceinline__ T shfl(T v, int source_lane) {
  return __shfl_sync(0xffffffffu, v, source_lane);
}
template <class T>
__device__ __forceinline__ T shfl_xor(T v, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, v, lane_mask);
}
template <class T>
__device__ __forceinline__ T shfl_down(T v, int delta) {
  return __shfl_down_sync(0xffffffffu, v, delta);
}
template <class T>
__device__ __forceinline__ T shfl_up(T v, int delta) {
  return __shfl_up_sync(0xffffffffu, v, delta);
}
__device__ __forceinline__ uint32_t ballot(bool b) { return __ballot_sync(0xffffffffu, b); }
__device__ __forceinline__ bool any_lane(bool b) { return __any_sync(0xffffffffu, b); }
__device__ __forceinline__ bool all_lanes(bool b) { return __all_sync(0xffffffffu, b); }

// ldmatrix: lane l passes the address of row l % 8 of 8x8 matrix l / 8 (16 bytes, 16-byte aligned, in shared memory).
// r[i] is this lane's pair of matrix i: row lane / 4, columns 2 (lane % 4) and + 1; the transposed form swaps row and column.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(smem_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(smem_row))
               : "memory");
}

// d += a b, m16n8k16, a row-major, b column-major, fp32 accumulators. Lane = 4 g + t, pairs are (low half, high half):
//   a[i]  row g + 8 (i & 1), columns 2 t + 8 (i >> 1) and + 1      b[i]  rows 2 t + 8 i and + 1, column g
//   d[i]  row g + 8 (i >> 1), column 2 t + (i & 1)
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 aligned bytes as four words: from global memory, to global memory (nvcc makes four of a plain store), to shared memory.
// A vector is held in words from its load to its store: of code that takes it apart into 16-bit elements in between, nvcc
// puts that right behind the load, and waits for it there.
__device__ __forceinline__ void load_16(uint32_t (&w)[4], const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
}
__device__ __forceinline__ void store_16(void* gmem, const uint32_t (&w)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(gmem)), "r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3])
               : "memory");
}
__device__ __forceinline__ void store_shared_16(void* smem, const uint32_t (&w)[4]) {
  *static_cast<uint4*>(smem) = make_uint4(w[0], w[1], w[2], w[3]);
}

// Asynchronous copy of 16 bytes (both ends 16-byte aligned). The zfill form reads `bytes` <= 16 and zero-fills the rest;
// with 0 the source is not read, yet must be aligned.
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(smem)), "l"(gmem) : "memory");
}
__device__ __forceinline__ void cp_async_16_zfill(void* smem, const void* gmem, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(smem)), "l"(gmem), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way. Other threads see the data only after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A product that is rounded for itself: the compiler may not fuse it with a sum.
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }

// Two bf16 products, each rounded once; subnormals are numbers. (mul.bf16x2 is of sm_90; -0 leaves every product as it is.)
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
  return y;
}

// Four of the eight bytes of a (0..3) and b (4..7): byte i is the one that nibble i names, at most 7.
__device__ __forceinline__ uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t which) {
  return __byte_perm(a, b, which);
}

// Conversions. The values are those of to_float and from_float in common.h, except that every NaN becomes one NaN.
__device__ __forceinline__ float to_float_fast(float x) { return x; }
__device__ __forceinline__ float to_float_fast(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float_fast(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
__device__ __forceinline__ T from_float_fast(float x);
template <>
__device__ __forceinline__ float from_float_fast<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float_fast<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ __forceinline__ f16 from_float_fast<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two 16-bit values in one register, `lo` in the low half (the lower address, the lower column of a fragment).
template <class T>
__device__ __forceinline__ uint32_t pack_fast(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack_fast<bf16>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack_fast<f16>(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

}  // namespace lrk

#endif
