// SPDX-License-Identifier: Apache-2.0
// Every wrapper of csrc/cuda/ptx.cuh once, its result dumped word by word: 64 threads, kWords words of each. Compiles for
// the device and for the emulator; test_emulator.py compares the emulator's dump with numpy.
#include "launch.cuh"
#include "ptx.cuh"

namespace lrk {

constexpr int kWords = 96;

// in: [64, 64] 16-bit floats, exact in both formats. out: [64, kWords].
__global__ void __launch_bounds__(64) wrappers(const uint16_t* in, uint32_t* out) {
  Smem smem;
  uint16_t* tile = smem.take<uint16_t>(64 * 64);
  uint32_t* turn = smem.take<uint32_t>(64);
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  uint32_t* word = out + t * kWords;
  int n = 0;
  const auto put = [&](uint32_t v) { word[n++] = v; };

  for (int i = t; i < 64 * 64 / 8; i += 64) cp_async_16(tile + i * 8, in + i * 8);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();

  const int row = lane % 8, matrix = lane / 8;
  uint32_t x4[4], x2[2];
  ldmatrix_x4(x4, tile + (row + matrix % 2 * 8) * 64 + matrix / 2 * 8);
  for (uint32_t v : x4) put(v);  // 0..3
  uint32_t x4t[4];
  ldmatrix_x4_trans(x4t, tile + (row + matrix % 2 * 8) * 64 + matrix / 2 * 8);
  for (uint32_t v : x4t) put(v);  // 4..7
  ldmatrix_x2(x2, tile + row * 64 + matrix % 2 * 8);
  for (uint32_t v : x2) put(v);  // 8, 9
  uint32_t x2t[2];
  ldmatrix_x2_trans(x2t, tile + (row + matrix % 2 * 8) * 64);
  for (uint32_t v : x2t) put(v);  // 10, 11

  float d[4] = {1.f, 2.f, 3.f, 4.f}, e[4] = {1.f, 2.f, 3.f, 4.f};
  mma_16816(d, x4, x2, bf16{});
  mma_16816(e, x4, x2, f16{});
  for (float v : d) put(bit_cast<uint32_t>(v));  // 12..15
  for (float v : e) put(bit_cast<uint32_t>(v));  // 16..19

  put(shfl(static_cast<uint32_t>(t), 5));       // 20
  put(shfl_xor(static_cast<uint32_t>(t), 9));   // 21
  put(shfl_down(static_cast<uint32_t>(t), 3));  // 22
  put(shfl_up(static_cast<uint32_t>(t), 3));    // 23
  put(ballot(lane % 3 == 0));                   // 24
  put(any_lane(t == 40));                       // 25
  put(all_lanes(t < 40));                       // 26

  turn[t] = static_cast<uint32_t>(1000 + t);
  sync_warp();
  put(turn[t ^ 1]);  // 27
  sync_named(1, 64);
  put(turn[63 - t]);  // 28
  sync_threads();
  if (t < 32) {
    turn[t] = static_cast<uint32_t>(2000 + t);
    sync_named(2, 32);
    put(turn[31 - t]);  // 29
  } else {
    put(0);
  }
  sync_threads();

  for (int bytes : {0, 6, 16}) {  // 30..41
    cp_async_16_zfill(tile + t * 8, in + t * 8, bytes);
    cp_async_commit();
    cp_async_wait<0>();
    const uint32_t* mine = reinterpret_cast<const uint32_t*>(tile + t * 8);
    for (int i = 0; i < 4; ++i) put(mine[i]);
  }

  const float values[] = {1.00390625f, -3.1415927f, 65504.f, 70000.f, 6.1e-5f, 3e-8f, -0.f, 1e-45f, 1e30f};
  for (float v : values) {  // 42..77
    const float scaled = v * static_cast<float>(1 + t % 7);
    put(from_float_fast<bf16>(scaled).bits);
    put(from_float_fast<f16>(scaled).bits);
    put(pack_fast<bf16>(scaled, v));
    put(pack_fast<f16>(scaled, v));
  }
  put(bit_cast<uint32_t>(to_float_fast(f16{in[t]})));                         // 78
  put(bit_cast<uint32_t>(to_float_fast(bf16{in[t]})));                        // 79
  put(bit_cast<uint32_t>(to_float_fast(f16{static_cast<uint16_t>(t * 9)})));  // 80: subnormals
  while (n < kWords) put(0);
}

int run_wrappers(const uint16_t* in, uint32_t* out, Stream stream) {
  return launch("wrappers", wrappers, dim3(1), dim3(64), smem_bytes<uint16_t>(64 * 64) + smem_bytes<uint32_t>(64),
                stream, in, out);
}

}  // namespace lrk

#if defined(LRK_EMULATE)
// Reads the input from stdin, writes the dump to stdout, raw.
int main() {
  alignas(16) static uint16_t in[64 * 64];
  static uint32_t out[64 * lrk::kWords];
  if (std::fread(in, 1, sizeof in, stdin) != sizeof in) return 2;
  const int code = lrk::run_wrappers(in, out, nullptr);
  std::fwrite(out, 1, sizeof out, stdout);
  return code;
}
#endif
