// SPDX-License-Identifier: Apache-2.0
// Host bodies of csrc/cuda/ptx_sm90.cuh: the same names and arguments, plus the caller's line.
#pragma once

#include <type_traits>

#include "../../csrc/common.h"
#include "hopper.h"

// Inlined, so that a return address from the emulator lies in the kernel.
#define LRK_INLINE [[gnu::always_inline]] inline
#define LRK_AT emu::Where at = emu::Where::here()

namespace lrk {

LRK_INLINE void mbarrier_init(Mbarrier* b, int count, LRK_AT) { emu::mbarrier_init(b, count, at); }
LRK_INLINE void fence_mbarrier_init(LRK_AT) { emu::fence_mbarrier_init(at); }
LRK_INLINE void mbarrier_arrive(Mbarrier* b, LRK_AT) { emu::mbarrier_arrive(b, 0, at); }
LRK_INLINE void mbarrier_arrive_expect(Mbarrier* b, uint32_t bytes, LRK_AT) { emu::mbarrier_arrive(b, bytes, at); }
LRK_INLINE void mbarrier_wait(Mbarrier* b, uint32_t parity, LRK_AT) { emu::mbarrier_wait(b, parity, at); }
LRK_INLINE void fence_async(LRK_AT) { emu::fence_async(at); }

LRK_INLINE uint32_t shared_address(const void* p) { return emu::shared_window(p); }
LRK_INLINE void prefetch_map(const TensorMap&) {}
LRK_INLINE void bulk_load(void* smem, const TensorMap& map, Mbarrier* b, int x, int y, LRK_AT) {
  emu::bulk_load(smem, map, b, 2, {{x, y, 0}}, at);
}
LRK_INLINE void bulk_load_3d(void* smem, const TensorMap& map, Mbarrier* b, int x, int y, int z, LRK_AT) {
  emu::bulk_load(smem, map, b, 3, {{x, y, z}}, at);
}
LRK_INLINE void bulk_store(const TensorMap& map, const void* smem, int x, int y, LRK_AT) {
  emu::bulk_store(map, smem, 2, {{x, y, 0}}, at);
}
LRK_INLINE void bulk_commit(LRK_AT) { emu::bulk_commit(at); }
template <int N>
LRK_INLINE void bulk_wait_read(LRK_AT) {
  emu::bulk_wait(N, true, at);
}

LRK_INLINE int cluster_rank() { return emu::cluster_rank(); }
LRK_INLINE void sync_cluster(LRK_AT) { emu::sync_cluster(at); }
LRK_INLINE void mbarrier_arrive_at(Mbarrier* b, int rank, LRK_AT) { emu::mbarrier_arrive_at(b, rank, at); }
LRK_INLINE void bulk_load_multicast(void* smem, const TensorMap& map, Mbarrier* b, int x, int y, uint16_t blocks,
                                    LRK_AT) {
  emu::bulk_load_multicast(smem, map, b, {{x, y, 0}}, blocks, at);
}
LRK_INLINE void wait_predecessor(LRK_AT) { emu::wait_predecessor(at); }
LRK_INLINE void launch_dependents() {}

template <int N>
LRK_INLINE void fewer_registers(LRK_AT) {
  emu::set_registers(N, false, at);
}
template <int N>
LRK_INLINE void more_registers(LRK_AT) {
  emu::set_registers(N, true, at);
}

LRK_INLINE int opaque(int v) { return v; }
template <int N>
LRK_INLINE void wgmma_fence(float (&)[N], LRK_AT) {
  emu::wgmma_fence(at);
}
template <int N, int kSteps>
LRK_INLINE void wgmma_fence(float (&)[N], uint32_t (&)[kSteps][4], LRK_AT) {
  emu::wgmma_fence(at);
}
LRK_INLINE void wgmma_commit(LRK_AT) { emu::wgmma_commit(at); }
template <int kLeft, int N>
LRK_INLINE void wgmma_wait(float (&)[N], LRK_AT) {
  emu::wgmma_wait(kLeft, at);
}
template <class T, int kN, Major kA = Major::kK, Major kB = Major::kK>
LRK_INLINE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add, LRK_AT) {
  emu::wgmma({d, nullptr, a, b, kN, std::is_same_v<T, bf16>, add, kA, kB}, at);
}
template <class T, int kN, Major kB = Major::kK>
LRK_INLINE void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add, LRK_AT) {
  emu::wgmma({d, a, 0, b, kN, std::is_same_v<T, bf16>, add, Major::kK, kB}, at);
}

}  // namespace lrk

#undef LRK_AT
#undef LRK_INLINE
