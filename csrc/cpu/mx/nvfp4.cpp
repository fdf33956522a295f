// SPDX-License-Identifier: Apache-2.0
// NVFP4 on the CPU: a block of 16 at a time, in fp32.
#include "cpu/factor.h"
#include "mx.h"

namespace lrk {
namespace LRK_ISA {
namespace {

constexpr int64_t kGrain = 512;  // blocks of a task

template <class X>
void quantize(const Nvfp4QuantizeParams& p) {
  const int64_t G = ceil_div(p.K, int64_t{kNvBlock});
  const uint64_t seed = p.seed ? static_cast<uint64_t>(*p.seed) : 0;
  const float global = *p.global = nvfp4_global(*p.least, *p.most), over_global = 1.f / global;
  parallel_for(p.T * G, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t t = at / G, k = at % G * kNvBlock, n = std::min<int64_t>(kNvBlock, p.K - k);
      const X* x = static_cast<const X*>(p.x) + t * p.x_row + k * p.x_column;
      alignas(64) float v[kNvBlock] = {};
      uint32_t largest = 0, code[kNvBlock];
      if (p.x_column == 1 && n == kNvBlock) {
        for (int i = 0; i < kNvBlock; i += kLanes) store(v + i, load(x + i));
      } else {
        for (int64_t i = 0; i < n; ++i) v[i] = to_float(x[i * p.x_column]);
      }
      for (float value : v) largest = std::max(largest, bit_cast<uint32_t>(value) & 0x7fffffffu);
      const uint32_t scale = nvfp4_scale(bit_cast<float>(largest), global);
      const float inverse = nvfp4_inverse(scale, over_global);
      if (scale == 0x7fu) {
        std::fill_n(code, kNvBlock, 0u);
      } else if (p.seed) {
        for (int i = 0; i < kNvBlock; i += 8) {
          const Philox block = mx_random(seed, t, (k + i) / 8);
          for (int j = 0; j < 8; ++j) code[i + j] = e2m1_stochastic(v[i + j] * inverse, bits16(block, j));
        }
      } else {
        for (float& value : v) value *= inverse;
        for (int i = 0; i < kNvBlock; ++i) code[i] = e2m1_code(v[i]);
      }
      uint8_t* to = p.codes + at * kNvBytes;
      for (int i = 0; i < kNvBytes; ++i) to[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
      p.scales[at] = static_cast<uint8_t>(scale);
    }
  });
}

template <class Y>
void dequantize(const Nvfp4DequantizeParams& p) {
  const int64_t G = ceil_div(p.K, int64_t{kNvBlock});
  parallel_for(p.T * G, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t k = at % G * kNvBlock, n = std::min<int64_t>(kNvBlock, p.K - k);
      const float scale = *p.global * e4m3_value(p.scales[at]);
      alignas(64) float values[16], v[kNvBlock];
      for (uint32_t c = 0; c < 16; ++c) values[c] = e2m1_value(c) * scale;
      for (int i = 0; i < kNvBytes; ++i) {
        const uint8_t two = p.codes[at * kNvBytes + i];
        v[2 * i] = values[two & 15u], v[2 * i + 1] = values[two >> 4];
      }
      Y* y = static_cast<Y*>(p.y) + at / G * p.K + k;
      if (n == kNvBlock) {
        for (int i = 0; i < kNvBlock; i += kLanes) store(y + i, load(v + i));
      } else {
        for (int64_t i = 0; i < n; ++i) y[i] = from_float<Y>(v[i]);
      }
    }
  });
}

}  // namespace
}  // namespace LRK_ISA

LRK_CPU_ENTRY(nvfp4_quantize, Nvfp4QuantizeParams, with_float(p.dtype, [&](auto x) { quantize<decltype(x)>(p); }))
LRK_CPU_ENTRY(nvfp4_dequantize, Nvfp4DequantizeParams, with_float(p.dtype, [&](auto y) { dequantize<decltype(y)>(p); }))

}  // namespace lrk
