// SPDX-License-Identifier: Apache-2.0
// Two launches that overlap, healthy in three ways and, switch by switch, with the mistakes the emulator must catch; see
// cases.cu. The first makes x and y from r; the second, launched after_predecessor, copies x to out.
#include <string>

#include "launch_sm90.cuh"
#include "memory.h"

namespace {

using namespace lrk;

// clang-format off
enum How {
  kAllWait, kOneWaits, kOneLoads,
  kNoWait, kLateWait, kNoBarrier, kEarlyLoad, kTwoBefore, kEarlyWrite, kEarlyOverwrite, kWays
};
const char* const kNames[] = {
  "all_wait", "one_waits", "one_loads",
  "no_wait", "late_wait", "no_barrier", "early_load", "two_before", "early_write", "early_overwrite"};
// clang-format on

constexpr int kThreads = 64, kBlocks = 3, kCount = kThreads * kBlocks;

struct P {
  TensorMap map;  // of x: [kBlocks, kThreads]
  int *r, *x, *y, *out;
};

__global__ void __launch_bounds__(kThreads) earlier(const __grid_constant__ P p) {
  launch_dependents();
  const auto i = blockIdx.x * kThreads + threadIdx.x;
  p.x[i] = p.r[i] + 1;
  p.y[i] = 0;
}

// Waits for the first, and says nothing of what that wrote.
__global__ void __launch_bounds__(kThreads) between() {
  launch_dependents();
  wait_predecessor();
}

template <int kHow>
__global__ void __launch_bounds__(kThreads) later(const __grid_constant__ P p) {
  Smem smem;
  int* tile = smem.take<int>(kThreads);
  Mbarrier* landed = smem.take<Mbarrier>(1);
  const auto t = threadIdx.x, i = blockIdx.x * kThreads + t;
  if constexpr (kHow == kOneLoads || kHow == kEarlyLoad) {
    if (t == 0) {
      mbarrier_init(landed, 1);
      fence_mbarrier_init();
      if constexpr (kHow == kOneLoads) wait_predecessor();
      mbarrier_arrive_expect(landed, kThreads * 4);
      bulk_load(tile, p.map, landed, 0, static_cast<int>(blockIdx.x));  // bug: early_load
    }
    sync_threads();
    if constexpr (kHow == kEarlyLoad) wait_predecessor();
    mbarrier_wait(landed, 0);
    p.out[i] = tile[t];
    return;
  }
  if constexpr (kHow == kEarlyWrite) p.r[i] = 0;      // bug: early_write
  if constexpr (kHow == kEarlyOverwrite) p.y[i] = 1;  // bug: early_overwrite
  int x = 0;
  if constexpr (kHow == kLateWait || kHow == kTwoBefore) x = p.x[i];  // bug: late_wait two_before
  if constexpr (kHow == kOneWaits || kHow == kNoBarrier) {
    if (t == 0) wait_predecessor();
  } else if constexpr (kHow != kNoWait) {
    wait_predecessor();
  }
  if constexpr (kHow == kOneWaits) sync_threads();
  if constexpr (kHow != kLateWait && kHow != kTwoBefore) x = p.x[i];  // bug: no_barrier
  p.out[i] = x;
}

template <int kHow = 0>
int dispatch(const std::string& name, const P& p) {
  if constexpr (kHow < kWays) {
    if (name != kNames[kHow]) return dispatch<kHow + 1>(name, p);
    const LaunchOptions after{.after_predecessor = true};
    int code = launch("earlier", earlier, dim3(kBlocks), dim3(kThreads), 0, nullptr, p);
    if (!code && kHow == kTwoBefore) code = launch("between", between, dim3(1), dim3(kThreads), 0, nullptr, after);
    constexpr size_t kSmem = smem_bytes<int>(kThreads) + smem_bytes<Mbarrier>(1);
    return code ? code : launch("later", later<kHow>, dim3(kBlocks), dim3(kThreads), kSmem, nullptr, after, p);
  } else {
    std::fprintf(stderr, "no case %s\n", name.c_str());
    std::exit(2);
  }
}

}  // namespace

// overlap_sm90 NAME: under eight schedules, one line each: the launches' result, and how many elements are wrong.
int main(int argc, char** argv) {
  int faults = 0;
  for (int schedule = 0; schedule < 8; ++schedule) {
    P p{{}, visible<int>(kCount), visible<int>(kCount), visible<int>(kCount), visible<int>(kCount)};
    for (int i = 0; i < kCount; ++i) p.r[i] = i;
    lrk_emulator_set("schedule", schedule);
    emu::forget_global();
    emu::track_global(p.r, kCount * sizeof(int), true);
    for (int* q : {p.x, p.y, p.out}) emu::track_global(q, kCount * sizeof(int), false);
    int code = make_tensor_map(&p.map, {p.x, 4, 2, {kThreads, kBlocks}, {kThreads * 4}, {kThreads, 1}, Swizzle::kNone});
    if (!code) code = dispatch(argc > 1 ? argv[1] : "", p);
    int wrong = 0;
    for (int i = 0; i < kCount; ++i) wrong += p.out[i] != i + 1;
    std::printf("%d %d\n", code, wrong);
    faults += code || wrong;
  }
  return faults != 0;
}
