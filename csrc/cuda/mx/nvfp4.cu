// SPDX-License-Identifier: Apache-2.0
// NVFP4 on CUDA, sm_80 and up. A thread quantises a block of 16, or decodes a word of 8 codes.
#include "cuda/place.cuh"
#include "mx.h"

namespace lrk {
namespace {

// Neighbouring threads have neighbouring blocks, or rows where a matrix lies across.
template <class X, bool kRandom>
__global__ __launch_bounds__(kBlockThreads, 4) void nvfp4_quantize_kernel(Nvfp4QuantizeParams p, bool vectors) {
  const int64_t at = grid_thread(), G = ceil_div(p.K, int64_t{kNvBlock});
  const float global = nvfp4_global(*p.least, *p.most), over_global = 1.f / global;
  if (at == 0) *p.global = global;
  if (at >= p.T * G) return;
  const bool across = p.x_column != 1;
  const int64_t t = across ? at % p.T : at / G, g = across ? at / p.T : at % G, k = g * kNvBlock;
  const X* x = static_cast<const X*>(p.x) + t * p.x_row + k * p.x_column;
  float v[kNvBlock];
  if (across) {
#pragma unroll
    for (int i = 0; i < kNvBlock; ++i) v[i] = k + i < p.K ? to_float_fast(x[i * p.x_column]) : 0.f;
  } else {
    const Words8<X> words[2] = {load_row(x, p.K - k, vectors), load_row(x + 8, p.K - k - 8, vectors)};
#pragma unroll
    for (int i = 0; i < kNvBlock; i += 8) {
      const Vec8<float> some = floats(words[i / 8]);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i + j] = some.v[j];
    }
  }
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kNvBlock; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(v[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const uint32_t scale = nvfp4_scale(bit_cast<float>(largest), global);
  const float inverse = nvfp4_inverse(scale, over_global);
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kNvBlock; i += 8) {
    Philox random{};
    if constexpr (kRandom) random = mx_random(static_cast<uint64_t>(*p.seed), t, (k + i) / 8);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float y = mul_rn(v[i + j], inverse);
      uint32_t code;
      if constexpr (kRandom) {
        code = e2m1_stochastic(y, bits16(random, j));
      } else {
        code = e2m1_code(y);
      }
      words[i / 8] |= scale == 0x7fu ? 0u : code << (4 * j);
    }
  }
  const int64_t to = t * G + g;
  *reinterpret_cast<uint64_t*>(p.codes + to * kNvBytes) = words[0] | uint64_t{words[1]} << 32;
  const uint8_t byte = static_cast<uint8_t>(scale);
  p.scales[to] = byte;
}

template <class Y>
__global__ __launch_bounds__(kBlockThreads, 8) void nvfp4_dequantize_kernel(Nvfp4DequantizeParams p, int shift,
                                                                            bool vectors) {
  const Place at(shift);
  const int64_t first = int64_t{at.group} * 8, G = ceil_div(p.K, int64_t{kNvBlock});
  if (at.row >= p.T || first >= p.K) return;
  const uint32_t word = *reinterpret_cast<const uint32_t*>(p.codes + at.row * G * kNvBytes + first / 2);
  const float scale = mul_rn(*p.global, e4m3_value(p.scales[at.row * G + first / kNvBlock]));
  Vec8<float> v;
#pragma unroll
  for (int j = 0; j < 8; ++j) v.v[j] = e2m1_value(word >> (4 * j) & 15u) * scale;
  store_row(static_cast<Y*>(p.y) + at.row * p.K + first, rounded<Y>(v), p.K - first, vectors);
}

}  // namespace

int nvfp4_quantize_cuda(const Nvfp4QuantizeParams& p, void*, Stream stream) {
  const int64_t blocks = p.T * ceil_div(p.K, int64_t{kNvBlock}), threads = blocks ? blocks : 1;  // one writes *p.global
  const bool vectors = can_vectorize(p.x, p.x_row, size_of(p.dtype));
  return with_float(p.dtype, [&]<class X>(X) {
    return with_bool(p.seed != nullptr, [&](auto random) {
      return launch("nvfp4_quantize", nvfp4_quantize_kernel<X, random.value>, grid_of_threads(threads),
                    dim3(kBlockThreads), 0, stream, p, vectors);
    });
  });
}

int nvfp4_dequantize_cuda(const Nvfp4DequantizeParams& p, void*, Stream stream) {
  const PlaceGrid at = place_grid(p.T, ceil_div(p.K, int64_t{8}));
  const bool vectors = can_vectorize(p.y, p.K, size_of(p.dtype));
  return with_float(p.dtype, [&]<class Y>(Y) {
    return launch("nvfp4_dequantize", nvfp4_dequantize_kernel<Y>, at.grid, dim3(kBlockThreads), 0, stream, p, at.shift,
                  vectors);
  });
}

}  // namespace lrk
