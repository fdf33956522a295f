// SPDX-License-Identifier: Apache-2.0
// What emulation costs: nanoseconds per switch between threads, where nothing else happens and inside warp-wide calls.
#include <chrono>
#include <cstdio>

#include "launch.cuh"
#include "ptx.cuh"

namespace {

using namespace lrk;

enum Work { kBarrier, kShuffle, kLdmatrix, kMma };

template <Work kWork>
__global__ void loop(int rounds, float* out) {
  Smem smem;
  bf16* tile = smem.take<bf16>(16 * 8 * 4);
  for (int i = static_cast<int>(threadIdx.x); i < 512; i += 128) tile[i] = bf16{0};
  float v = 0, d[4] = {};
  uint32_t a[4] = {}, b[2] = {};
  sync_threads();
  for (int i = 0; i < rounds; ++i) {
    if constexpr (kWork == kBarrier) sync_threads();
    if constexpr (kWork == kShuffle) v += shfl_xor(v, 1);
    if constexpr (kWork == kLdmatrix) ldmatrix_x4(a, tile + threadIdx.x % 32 * 8);
    if constexpr (kWork == kMma) mma_16816(d, a, b, bf16{});
  }
  if (threadIdx.x == 0) out[blockIdx.x] = v + d[0] + static_cast<float>(a[0]);
}

template <Work kWork>
void measure(const char* name) {
  constexpr int kRounds = 200, kBlocks = 50;
  float out[kBlocks];
  double best = 1e9;
  int64_t switches = 0;
  for (int i = 0; i < 5; ++i) {
    lrk_emulator_set("switches", 0);
    const auto start = std::chrono::steady_clock::now();
    launch(name, loop<kWork>, dim3(kBlocks), dim3(128), smem_bytes<bf16>(512), nullptr, kRounds, &out[0]);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = seconds < best ? seconds : best;
    switches = lrk_emulator_get("switches");
  }
  const double calls = double{kRounds} * kBlocks * (kWork == kBarrier ? 128 : 4);
  std::printf("%-10s %6.1f ns per switch %10.1f ns per %s\n", name, best / static_cast<double>(switches) * 1e9,
              best / calls * 1e9, kWork == kBarrier ? "thread" : "warp");
}

}  // namespace

int main() {
  measure<kBarrier>("barrier");
  measure<kShuffle>("shuffle");
  measure<kLdmatrix>("ldmatrix");
  measure<kMma>("mma");
}
