// SPDX-License-Identifier: Apache-2.0
// Codes of a packed weight as operands of products: a thread takes whole blocks of a row, four words of 8 codes. Codes i and
// i + 4 of a word become a pair by two shifts, so that is the order of features that x is put in as well. Rows past the end
// are the last one once more: what comes of them is not stored.
#pragma once

#include "cuda/tile.cuh"
#include "mx.h"

namespace lrk {

struct Codes {
  uint32_t words[4], byte;  // its scale
};
struct CodesRow {
  const uint8_t *codes, *scales;
  __device__ __forceinline__ CodesRow(const MxWeight& w, int64_t row) {
    const int64_t block = (row < w.O ? row : w.O - 1) * w.G();
    codes = w.codes + block * kMxBytes, scales = w.scales + block;
  }
  __device__ __forceinline__ Codes load(int64_t block, bool there) const {
    Codes c = {};
    if (there) load_16(c.words, codes + block * kMxBytes), c.byte = scales[block];
    return c;
  }
};
// A code that lies where bf16 has an exponent's last bits and a mantissa's first is 2^-126 times its value. One product with
// 2^126 times the scale makes up for that, exactly, as long as this is a bf16: for scales up to 2. Larger ones take two.
constexpr uint32_t kOneProduct = 128;
struct Scale {
  uint32_t first, second;  // each twice
  explicit __device__ __forceinline__ Scale(uint32_t byte) : Scale(byte < kOneProduct ? byte : kOneProduct, byte) {}
  static __device__ __forceinline__ Scale small(uint32_t byte) { return {byte, byte}; }  // of at most kOneProduct

 private:
  __device__ __forceinline__ Scale(uint32_t small, uint32_t byte)
      : first(small * 0x00800080u + 0x3f003f00u),
        second(byte == 255u ? 0x7fc07fc0u : (byte - small) * 0x00800080u + 0x3f803f80u) {}
};
template <bool kLarge>
__device__ __forceinline__ uint32_t times(uint32_t pair, const Scale& scale) {
  pair = mul_bf16x2(pair, scale.first);
  return kLarge ? mul_bf16x2(pair, scale.second) : pair;
}
// Codes i and i + 4 of a word times their scale.
template <bool kLarge>
__device__ __forceinline__ uint32_t pair_of(uint32_t word, int i, const Scale& scale) {
  const uint32_t moved = word >> (4 * i);
  return times<kLarge>((moved << 12 & 0x80008000u) | (moved << 6 & 0x01c001c0u), scale);
}
// Codes 2 t and 2 t + 1: a byte, of which one product makes two.
template <bool kLarge>
__device__ __forceinline__ uint32_t neighbours_of(uint32_t word, int t, const Scale& scale) {
  const uint32_t moved = byte_perm(word, 0u, 0x4440u | static_cast<uint32_t>(t)) * 0x00040040u;
  return times<kLarge>((moved << 6 & 0x80008000u) | (moved & 0x01c001c0u), scale);
}

// What a bf16 term leaves of a number; beside inf and nan the others are 0.
__device__ __forceinline__ float rest(float v, float term) { return is_finite(term) ? v - term : 0.f; }

// Features i and i + 4 of 8.
__device__ __forceinline__ uint32_t pair_of(const Words8<bf16>& v, int i) {
  return byte_perm(v.w[0][i / 2], v.w[0][i / 2 + 2], i % 2 ? 0x7632u : 0x5410u);
}

}  // namespace lrk
