// SPDX-License-Identifier: Apache-2.0
// Wrappers of what sm_90a adds, as ptx.cuh has those of sm_80: mbarriers, the tensor memory accelerator, wgmma, clusters. For
// files that are compiled for sm_90a alone. Under LRK_EMULATE they are functions of tests/emulator/hopper.cpp.
#pragma once

#include <type_traits>

#include "matrix_descriptor.h"
#include "ptx.cuh"

#if defined(LRK_EMULATE)

#include "emulated_ptx_sm90.h"

#else

namespace lrk {

// ---- mbarriers, in shared memory. A phase is over when as many threads have arrived as it was made for and all bytes that
// they said to expect have landed. The first phase has parity 0: mbarrier_wait(b, p) returns once the phase of parity p is
// over, and before any phase is, mbarrier_wait(b, 1) returns at once.

struct alignas(8) Mbarrier {
  uint64_t bits;
};
__device__ __forceinline__ void mbarrier_init(Mbarrier* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
// By who made them, before a barrier that lets other threads and the copies see them.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(Mbarrier* b, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(over)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
  } while (!over);
}

// This thread's writes to shared memory so far, for the async proxy: copies of boxes and wgmma. A barrier comes after it
// where another thread begins those.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- boxes. One thread moves a whole box; coordinates are of its first element, in elements, and may be outside of the
// matrix: what lies outside is read as zeros and not written. smem is 128-byte aligned, with a swizzle at the beginning of
// its pattern (8 spans).

struct alignas(64) TensorMap {
  uint64_t words[16];
};
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void bulk_load(void* smem, const TensorMap& map, Mbarrier* b, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(smem)),
      "l"(&map), "r"(shared_address(b)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void bulk_load_3d(void* smem, const TensorMap& map, Mbarrier* b, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(smem)),
      "l"(&map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void bulk_store(const TensorMap& map, const void* smem, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(smem)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups of stores have still to read shared memory, which may be written again then.
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// ---- clusters: blocks that run together, launch.cuh says how many; a block alone is a cluster of one. Before a block sends
// anything to another, that one has made its mbarriers, and it ends no sooner than what is sent to it has come: sync_cluster,
// or a wait for it.

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// By all threads of all blocks; those that have returned are not waited for.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// At the mbarrier that lies at the same place in block `rank` of the cluster. It tells of reads of shared memory that are over;
// for writes it would have to be .release.cluster, which waits for all of the thread's memory (MEMBAR.GPU) at each arrival.
__device__ __forceinline__ void mbarrier_arrive_at(Mbarrier* b, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}
// The box lands at the same place, and its bytes on the same mbarrier, of each block whose bit is set in `blocks`.
__device__ __forceinline__ void bulk_load_multicast(void* smem, const TensorMap& map, Mbarrier* b, int x, int y,
                                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(smem)),
      "l"(&map), "r"(shared_address(b)), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

// ---- launches that overlap, see LaunchOptions::after_predecessor. What the launch before has written is there after the
// wait, which returns once all of it is over; launch_dependents says no more than that the next may begin.

__device__ __forceinline__ void wait_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- warpgroups: four warps, the first a multiple of four

// Registers of each of its threads: less before more, the sum of all warps below 64 K.
template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// d += a b for 16 of K, or d = a b: a [64, 16], b [N, 16], d [64, N] in fp32. Of warp w of the four, lane = 4 g + t:
//   d[i]  row 16 w + g + 8 (i / 2 mod 2), column 8 (i / 4) + 2 t + i mod 2        a[i]  as mma_16816's, of rows 16 w...
// It is under way from its call to a wgmma_wait; neither its registers nor its shared memory may be touched in between.
// Before the first one, and the first after a wait: wgmma_fence.
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {  // the compiler moves no use of them over this line
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// v, of which the compiler knows nothing: what depends on it is not computed ahead of a loop and held in registers.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
template <int N>
__device__ __forceinline__ void wgmma_fence(float (&d)[N]) {
  hold(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Before products whose a are registers, of which these were written since the last.
template <int N, int kSteps>
__device__ __forceinline__ void wgmma_fence(float (&d)[N], uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  wgmma_fence(d);
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kLeft committed groups are under way.
template <int kLeft, int N>
__device__ __forceinline__ void wgmma_wait(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
  hold(d);
}

// What depends on N: the registers of d, their places in the text, and those of what follows: a (a word, or four registers),
// b, whether to add, how A and B lie.
#define LRK_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LRK_16(i) LRK_4(i), LRK_4(i + 4), LRK_4(i + 8), LRK_4(i + 12)
#define LRK_64(i) LRK_16(i), LRK_16(i + 16), LRK_16(i + 32), LRK_16(i + 48)
#define LRK_OUT_4 LRK_4(0)
#define LRK_OUT_8 LRK_4(0), LRK_4(4)
#define LRK_OUT_16 LRK_16(0)
#define LRK_OUT_32 LRK_16(0), LRK_16(16)
#define LRK_OUT_64 LRK_64(0)
#define LRK_OUT_128 LRK_64(0), LRK_64(64)
#define LRK_PLACES_4 "%0, %1, %2, %3"
#define LRK_PLACES_8 \
  LRK_PLACES_4       \
  ", "               \
  "%4, %5, %6, %7"
#define LRK_PLACES_16 \
  LRK_PLACES_8        \
  ", "                \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define LRK_PLACES_32 \
  LRK_PLACES_16       \
  ", "                \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LRK_PLACES_64                                                              \
  LRK_PLACES_32                                                                    \
  ", "                                                                             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", "                                                                             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LRK_PLACES_128                                                                         \
  LRK_PLACES_64                                                                                \
  ", "                                                                                         \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", "                                                                                         \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", "                                                                                         \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", "                                                                                         \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LRK_ADD_SS_4 "%6"
#define LRK_IN_SS_4 "%4, %5, p, 1, 1, %7, %8"
#define LRK_ADD_RS_4 "%9"
#define LRK_IN_RS_4 "{%4, %5, %6, %7}, %8, p, 1, 1, %10"
#define LRK_ADD_SS_8 "%10"
#define LRK_IN_SS_8 "%8, %9, p, 1, 1, %11, %12"
#define LRK_ADD_RS_8 "%13"
#define LRK_IN_RS_8 "{%8, %9, %10, %11}, %12, p, 1, 1, %14"
#define LRK_ADD_SS_16 "%18"
#define LRK_IN_SS_16 "%16, %17, p, 1, 1, %19, %20"
#define LRK_ADD_RS_16 "%21"
#define LRK_IN_RS_16 "{%16, %17, %18, %19}, %20, p, 1, 1, %22"
#define LRK_ADD_SS_32 "%34"
#define LRK_IN_SS_32 "%32, %33, p, 1, 1, %35, %36"
#define LRK_ADD_RS_32 "%37"
#define LRK_IN_RS_32 "{%32, %33, %34, %35}, %36, p, 1, 1, %38"
#define LRK_ADD_SS_64 "%66"
#define LRK_IN_SS_64 "%64, %65, p, 1, 1, %67, %68"
#define LRK_ADD_RS_64 "%69"
#define LRK_IN_RS_64 "{%64, %65, %66, %67}, %68, p, 1, 1, %70"
#define LRK_ADD_SS_128 "%130"
#define LRK_IN_SS_128 "%128, %129, p, 1, 1, %131, %132"
#define LRK_ADD_RS_128 "%133"
#define LRK_IN_RS_128 "{%128, %129, %130, %131}, %132, p, 1, 1, %134"

#define LRK_WGMMA(N, R, TYPE, FORM, ...)                                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " LRK_ADD_##FORM##_##R ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                                                                        "k16.f32." TYPE "." TYPE " {" LRK_PLACES_##R \
               "}, " LRK_IN_##FORM##_##R ";\n}\n"                                                                    \
               : LRK_OUT_##R                                                                                         \
               : __VA_ARGS__)
#define LRK_WGMMA_EITHER(N, R, FORM, ...)           \
  if constexpr (kN == N && std::is_same_v<T, bf16>) \
    LRK_WGMMA(N, R, "bf16", FORM, __VA_ARGS__);     \
  else if constexpr (kN == N)                       \
  LRK_WGMMA(N, R, "f16", FORM, __VA_ARGS__)
#define LRK_WGMMA_ANY(FORM, ...)                                                        \
  static_assert(kN == 8 || kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 256); \
  LRK_WGMMA_EITHER(8, 4, FORM, __VA_ARGS__);                                            \
  LRK_WGMMA_EITHER(16, 8, FORM, __VA_ARGS__);                                           \
  LRK_WGMMA_EITHER(32, 16, FORM, __VA_ARGS__);                                          \
  LRK_WGMMA_EITHER(64, 32, FORM, __VA_ARGS__);                                          \
  LRK_WGMMA_EITHER(128, 64, FORM, __VA_ARGS__);                                         \
  LRK_WGMMA_EITHER(256, 128, FORM, __VA_ARGS__)

// a and b: words of matrix_descriptor.h.
template <class T, int kN, Major kA = Major::kK, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  LRK_WGMMA_ANY(SS, "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kA)), "n"(static_cast<int>(kB)));
}
template <class T, int kN, Major kB = Major::kK>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  LRK_WGMMA_ANY(RS, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),
                "n"(static_cast<int>(kB)));
}

}  // namespace lrk

#endif
