// SPDX-License-Identifier: Apache-2.0
// Every wrapper of csrc/cuda/ptx.cuh once, and the intrinsics that the emulator knows beside them, the results dumped word
// by word: 64 threads, kWords words of each, then kGlobals words. A program for the device (nvcc) and for the emulator;
// wrapper_words.py says what the words must be.
#include <cstdio>

#include "launch.cuh"
#include "ptx.cuh"

namespace lrk {

constexpr int kWords = 108, kGlobals = 4;

// in: [64, 64] 16-bit floats, exact in both formats. out: [64, kWords] and kGlobals zeros.
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

  constexpr uint32_t kAll = 0xffffffffu;
  const uint32_t mixed = static_cast<uint32_t>(t) * 2654435761u;
  put(__reduce_add_sync(kAll, mixed));                         // 81
  put(static_cast<uint32_t>(__reduce_add_sync(kAll, 7 - t)));  // 82
  put(__reduce_min_sync(kAll, mixed));                         // 83
  put(static_cast<uint32_t>(__reduce_min_sync(kAll, 7 - t)));  // 84
  put(__reduce_max_sync(kAll, mixed));                         // 85
  put(static_cast<uint32_t>(__reduce_max_sync(kAll, 7 - t)));  // 86
  put(__reduce_and_sync(kAll, mixed | 0x80u));                 // 87
  put(__reduce_or_sync(kAll, static_cast<uint32_t>(t & 5)));   // 88
  put(__reduce_xor_sync(kAll, mixed));                         // 89

  if (t < 4) turn[t] = 0;
  sync_threads();
  atomicAdd(turn, static_cast<uint32_t>(t));
  atomicMax(turn + 1, mixed);
  if (atomicCAS(turn + 2, 0u, 1u) == 0u) atomicOr(turn + 2, 6u);  // one thread finds the 0
  atomicAdd(reinterpret_cast<float*>(turn + 3), 0.25f * static_cast<float>(t));
  sync_threads();
  for (int i = 0; i < 4; ++i) put(turn[i]);  // 90..93

  uint32_t* global = out + 64 * kWords;
  atomicAdd(global, 3u);
  atomicAdd(reinterpret_cast<float*>(global + 1), 0.5f);
  atomicAdd(reinterpret_cast<unsigned long long*>(global + 2), 0x100000001ull);
  __threadfence();
  __threadfence_block();
  put(clock64() >= 0);  // 94

  uint32_t quad[4], again[4];
  load_16(quad, in + t * 8);
  store_shared_16(tile + t * 8, quad);
  load_16(again, tile + t * 8);
  for (uint32_t v : again) put(v);                                                                  // 95..98
  const uint32_t raw = static_cast<uint32_t>(t % 8) << 6 | static_cast<uint32_t>(t / 8 % 2) << 15;  // e2m1 times 2^-126
  put(mul_bf16x2(raw | static_cast<uint32_t>(in[t]) << 16, 0x7e80u | 0x3fc0u << 16));               // 99
  store_16(word + 100, quad);                                                                       // 100..103
  n = 104;
  for (uint32_t which : {0x5410u, 0x7632u}) put(byte_perm(quad[0], quad[1], which));  // 104, 105
  n = kWords;
}

int run_wrappers(const uint16_t* in, uint32_t* out, Stream stream) {
  return launch("wrappers", wrappers, dim3(1), dim3(64), smem_bytes<uint16_t>(64 * 64) + smem_bytes<uint32_t>(64),
                stream, in, out);
}

}  // namespace lrk

// Reads the input from stdin, writes the dump to stdout, raw.
int main() {
  alignas(16) static uint16_t in[64 * 64];
  static uint32_t out[64 * lrk::kWords + lrk::kGlobals];
  if (std::fread(in, 1, sizeof in, stdin) != sizeof in) return 2;
#if defined(LRK_EMULATE)
  const int code = lrk::run_wrappers(in, out, nullptr);
#else
  uint16_t* device_in = nullptr;
  uint32_t* device_out = nullptr;
  int code = cudaMalloc(&device_in, sizeof in);
  if (!code) code = cudaMalloc(&device_out, sizeof out);
  if (!code) code = cudaMemcpy(device_in, in, sizeof in, cudaMemcpyHostToDevice);
  if (!code) code = cudaMemcpy(device_out, out, sizeof out, cudaMemcpyHostToDevice);
  if (!code) code = lrk::run_wrappers(device_in, device_out, nullptr);
  if (!code) code = cudaMemcpy(out, device_out, sizeof out, cudaMemcpyDeviceToHost);
  if (code) std::fprintf(stderr, "wrappers: CUDA error %d: %s\n", code, cudaGetErrorString(cudaError_t(code)));
#endif
  std::fwrite(out, 1, sizeof out, stdout);
  return code != 0;
}
