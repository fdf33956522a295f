// SPDX-License-Identifier: Apache-2.0
// What sm_90 adds, emulated: mbarriers with transaction bytes, copies of boxes by the tensor memory accelerator, fences of
// the async proxy, wgmma with operands in shared memory, registers that move between warps.
//
// The hardware may do its part at any moment from the call on. Schedules cover the two ends: at once (who refills a buffer
// too early destroys data in use), and as late as somebody cannot go on without it (who does not wait reads what was there
// before). Random ones draw. So a missing wait shows on one side or the other, and the tracked build sees it on any.
#pragma once

#include "../../csrc/cuda/matrix_descriptor.h"
#include "emulator.h"

namespace lrk {

struct alignas(8) Mbarrier {
  uint64_t bits;  // the hardware's; the emulator keeps its state elsewhere
};
struct alignas(64) TensorMap {
  TensorBox box;
};
inline int make_tensor_map(TensorMap* map, const TensorBox& box) {
  map->box = box;
  return refusal_of(box) ? 1 : 0;  // cudaErrorInvalidValue
}

namespace emu {

void mbarrier_init(Mbarrier* b, int count, Where at);
void mbarrier_arrive(Mbarrier* b, uint32_t expected_bytes, Where at);
void mbarrier_wait(Mbarrier* b, uint32_t parity, Where at);
void fence_mbarrier_init(Where at);
void fence_async(Where at);

struct BoxAt {
  int32_t at[kMaxMapRank];
};
void bulk_load(void* smem, const TensorMap& map, Mbarrier* b, int rank, BoxAt from, Where at);
void bulk_store(const TensorMap& map, const void* smem, int rank, BoxAt to, Where at);
void bulk_commit(Where at);
void bulk_wait(int groups_left, bool read_only, Where at);

int cluster_rank();
void sync_cluster(Where at);
void mbarrier_arrive_at(Mbarrier* b, int rank, Where at);
void bulk_load_multicast(void* smem, const TensorMap& map, Mbarrier* b, BoxAt from, uint16_t blocks, Where at);
void wait_predecessor(Where at);

uint32_t shared_window(const void* p);  // an address in the block's shared memory, as descriptors have it
// a: registers of an A fragment, or null for a descriptor.
struct WgmmaCall {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool bf16, add;
  Major a_major, b_major;
};
void wgmma(const WgmmaCall& call, Where at);
void wgmma_fence(Where at);
void wgmma_commit(Where at);
void wgmma_wait(int groups_left, Where at);

void set_registers(int count, bool more, Where at);

}  // namespace emu
}  // namespace lrk
