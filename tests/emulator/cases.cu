// SPDX-License-Identifier: Apache-2.0
// One small healthy kernel and, switch by switch, the mistakes the emulator must catch. test_emulator.py runs each under
// each build; "bug: <name>" marks the line a report must point at.
//
// out[block] = sum over steps of sum over t of in[block][step][63 - t] * (t + 1): a double-buffered cp.async pipeline read
// across warps, a shuffle reduction per warp and one through shared memory. counts: atomics in global memory.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "launch.cuh"
#include "ptx.cuh"

namespace {

using namespace lrk;

// clang-format off
enum Bug {
  kNone, kGlobalRead, kGlobalWrite, kSharedRead, kSharedWrite, kMisaligned, kMissingSync, kMissingLastSync, kMissingSyncWarp,
  kDivergentBarrier, kEarlyReturn, kShortShuffle, kShortMma, kDivergentWarp, kUnwrittenShared, kUnwrittenGlobal,
  kMissingWait, kShortWait, kEarlyRefill, kBlockOrder, kOverflow, kCopyMisaligned, kBarrierCount,
  kShortReduce, kFloatAtomic, kPlainBesideAtomic, kUnwrittenAtomic, kBlockOrderAtomic, kAtomicMisaligned,
  kThreads, kSharedLimit, kGridY, kEmptyGrid, kSharedOvertake, kBugs
};
const char* const kNames[] = {
  "none", "global_read", "global_write", "shared_read", "shared_write", "misaligned", "missing_sync", "missing_last_sync",
  "missing_sync_warp",
  "divergent_barrier", "early_return", "short_shuffle", "short_mma", "divergent_warp", "unwritten_shared", "unwritten_global",
  "missing_wait", "short_wait", "early_refill", "block_order", "overflow", "copy_misaligned", "barrier_count",
  "short_reduce", "float_atomic", "plain_beside_atomic", "unwritten_atomic", "block_order_atomic", "atomic_misaligned",
  "threads", "shared_limit", "grid_y", "empty_grid", "shared_overtake"};
// clang-format on

constexpr int kThreadCount = 64, kSteps = 5, kBlocks = 6;

struct P {
  const float* in;  // [blocks, steps, 64]
  float* out;       // [blocks]
  int* counts;      // threads seen, the largest block
  int huge;         // 2^30, out of the compiler's sight
};

template <int kBug>
__global__ void __launch_bounds__(kThreadCount) pipeline(const __grid_constant__ P p) {
  Smem smem;
  float* stage = smem.take<float>(2 * kThreadCount);
  float* partial = smem.take<float>(3);
  float* turned = smem.take<float>(kThreadCount);
  int* tickets = smem.take<int>(2);
  const int t = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const float* in = p.in + block * kSteps * kThreadCount;

  auto load = [&](int step) {
    if (t < kThreadCount / 4) {
      float* to = stage + step % 2 * kThreadCount + 4 * t;
      if constexpr (kBug == kCopyMisaligned) {
        cp_async_16(to, in + step * kThreadCount + 4 * t - (step > 0));  // bug: copy_misaligned
      } else {
        cp_async_16(to, in + step * kThreadCount + 4 * t);
      }
    }
    cp_async_commit();
  };

  if constexpr (kBug == kEarlyReturn) {
    if (t == 40) return;
  }
  float sum = 0;
  load(0);
  for (int step = 0; step < kSteps; ++step) {
    if constexpr (kBug == kShortWait) {
      cp_async_wait<1>();
    } else if constexpr (kBug != kMissingWait) {
      cp_async_wait<0>();
    }
    if constexpr (kBug == kEarlyRefill) {
      if (step + 1 < kSteps) load(step + 1);  // into the buffer that slower threads still read
      sync_threads();
    } else if constexpr (kBug == kDivergentBarrier) {
      if (t < 32) {
        sync_threads();
      } else {
        sync_threads();  // bug: divergent_barrier
      }
    } else if constexpr (kBug == kEarlyReturn) {
      sync_threads();  // bug: early_return
    } else if constexpr (kBug == kBarrierCount) {
      sync_named(1, t < 32 ? 32 : 64);  // bug: barrier_count
    } else if constexpr (kBug != kMissingSync) {
      sync_threads();
    }
    if constexpr (kBug != kEarlyRefill) {
      if (step + 1 < kSteps) load(step + 1);
    }
    const float* read = stage + step % 2 * kThreadCount;
    const float v = read[kThreadCount - 1 - t];  // bug: missing_sync missing_wait short_wait early_refill
    sum += v * static_cast<float>(t + 1);
  }

  // A turn inside the warp, through shared memory and back: it changes nothing in the sum.
  turned[t ^ 1] = sum;
  if constexpr (kBug != kMissingSyncWarp) sync_warp();
  sum = turned[t];  // bug: missing_sync_warp

  if constexpr (kBug == kMisaligned) {
    const float2 v = *reinterpret_cast<const float2*>(in + 1 + 2 * (t % 2));  // bug: misaligned
    sum += v.x;
  }
  if constexpr (kBug == kGlobalRead) sum += p.in[gridDim.x * kSteps * kThreadCount + t];  // bug: global_read
  if constexpr (kBug == kSharedRead) sum += stage[2 * kThreadCount + t];                  // bug: shared_read
  if constexpr (kBug == kSharedWrite) partial[3 + t / 32] = sum;                          // bug: shared_write
  if constexpr (kBug == kOverflow) sum += static_cast<float>((t + 1) * p.huge);           // bug: overflow
  // Tickets: 64 threads draw 0..63 in some order, and the sum of what they drew is the same in every order.
  if (t == 0) tickets[0] = 0;
  sync_threads();
  if constexpr (kBug == kPlainBesideAtomic) {
    if (t == 63) tickets[0] = 5;  // bug: plain_beside_atomic
  }
  int drawn = atomicAdd(tickets, 1);
  if constexpr (kBug == kUnwrittenAtomic) drawn += atomicAdd(tickets + 1, 1);  // bug: unwritten_atomic
  if constexpr (kBug == kAtomicMisaligned) {
    drawn += atomicCAS(reinterpret_cast<int*>(reinterpret_cast<char*>(tickets) + 2), 0, 1);  // bug: atomic_misaligned
  }
  if constexpr (kBug == kShortReduce) {
    if (t % 32 < 31) drawn = __reduce_add_sync(0xffffffffu, drawn);  // bug: short_reduce
  } else {
    drawn = __reduce_add_sync(0xffffffffu, drawn);
  }
  if (t % 32 == 0) {
    atomicAdd(p.counts, drawn);
    atomicMax(p.counts + 1, block);
  }
  if constexpr (kBug == kFloatAtomic) {
    if (t == 0) turned[0] = 0.f;
    sync_threads();
    atomicAdd(turned, t % 2 ? 1.f : 1e8f * static_cast<float>(t - 31));  // its sum depends on the order
    sync_threads();
    if (t == 0) sum += turned[0];
  }

  if constexpr (kBug == kShortMma) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (t % 32 < 16) mma_16816(d, a, b, bf16{});  // bug: short_mma
    sum += d[0];
  }
  if constexpr (kBug == kDivergentWarp) {
    if (t % 2) {
      sum += shfl_xor(0.f, 2);
    } else {
      sum += shfl_xor(0.f, 2);  // bug: divergent_warp
    }
  }
  for (int mask = 16; mask; mask /= 2) {
    if constexpr (kBug == kShortShuffle) {
      if (t % 32 < 2 * mask) sum += shfl_xor(sum, mask);  // bug: short_shuffle
    } else {
      sum += shfl_xor(sum, mask);
    }
  }
  if (t % 32 == 0) partial[t / 32] = sum;
  if constexpr (kBug != kMissingLastSync) sync_threads();
  if (t > 0) return;
  float total = partial[0] + partial[1];                                              // bug: missing_last_sync
  if constexpr (kBug == kUnwrittenShared) total += partial[2];                        // bug: unwritten_shared
  if constexpr (kBug == kUnwrittenGlobal) total += p.out[block];                      // bug: unwritten_global
  if constexpr (kBug == kBlockOrder) total += block ? p.out[block - 1] : 0.f;         // bug: block_order
  if constexpr (kBug == kBlockOrderAtomic) total += static_cast<float>(p.counts[0]);  // bug: block_order_atomic
  p.out[kBug == kGlobalWrite ? static_cast<int>(gridDim.x) + block : block] = total;  // bug: global_write
}

constexpr size_t kSmem =
    smem_bytes<float>(2 * kThreadCount) + smem_bytes<float>(3) + smem_bytes<float>(kThreadCount) + smem_bytes<int>(2);

template <int kBug>
int run(const P& p) {
  dim3 grid(kBlocks), block(kThreadCount);
  size_t smem = kSmem;
  if (kBug == kThreads) block = dim3(64, 17);
  if (kBug == kSharedLimit) smem = 228 * 1024;
  if (kBug == kGridY) grid = dim3(1, 65536);
  if (kBug == kEmptyGrid) grid = dim3(0);
  if (kBug == kSharedOvertake) smem -= 128;
  return launch("pipeline", pipeline<kBug>, grid, block, smem, nullptr, p);
}

template <int kBug = 0>
int dispatch(const std::string& name, const P& p) {
  if constexpr (kBug < kBugs) {
    return name == kNames[kBug] ? run<kBug>(p) : dispatch<kBug + 1>(name, p);
  } else {
    std::fprintf(stderr, "no case %s\n", name.c_str());
    std::exit(2);
  }
}

}  // namespace

// cases NAME: runs under several schedules, one line each: the launch's result and the bits of the output.
int main(int, char** argv) {
  std::vector<float> in(kBlocks * kSteps * kThreadCount), out(kBlocks);
  for (size_t i = 0; i < in.size(); ++i)
    in[i] = static_cast<float>(i * 7 % 31) - 15.f;  // small integers: any order, same sum
  for (int schedule = 0; schedule < 6; ++schedule) {
    lrk_emulator_set("schedule", schedule);
    for (float& v : out) v = __uint_as_float(0xffffffffu);
    emu::forget_global();
    emu::track_global(in.data(), in.size() * sizeof(float), true);
    emu::track_global(out.data(), out.size() * sizeof(float), false);
    int counts[2] = {0, -1};
    emu::track_global(counts, sizeof counts, true);
    const int code = dispatch(argv[1], P{in.data(), out.data(), counts, 1 << 30});
    if (code == 0 && (counts[0] != kBlocks * kThreadCount * (kThreadCount - 1) / 2 || counts[1] != kBlocks - 1))
      std::fprintf(stderr, "counts %d, %d\n", counts[0], counts[1]);
    std::printf("%d %d", schedule, code);
    for (float v : out) std::printf(" %g", static_cast<double>(v));
    std::printf("\n");
  }
  return 0;
}
