// SPDX-License-Identifier: Apache-2.0
// The vector twin of rng.h: Philox, the dropout mask and the elements of random bases, kLanes counters at a time. rng.h
// defines the bits; tests/ops/test_rng.py holds both to them.
#pragma once

#include "rng.h"
#include "simd.h"

namespace lrk::LRK_ISA {

// Rounds kFirst .. 9 of Philox4x32-10, in registers: a call would pass c through memory.
template <int kFirst>
[[gnu::always_inline]] inline void philox_rounds(vu (&c)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key) + kFirst * kPhiloxW0,
           k1 = static_cast<uint32_t>(key >> 32) + kFirst * kPhiloxW1;
#pragma GCC unroll 10
  for (int round = kFirst; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    const Wide p0 = mul_wide(c[0], kPhiloxM0), p1 = mul_wide(c[2], kPhiloxM1);
    c[0] = p1.hi ^ c[1] ^ k0;
    c[1] = p1.lo;
    c[2] = p0.hi ^ c[3] ^ k1;
    c[3] = p0.lo;
  }
}

// first, first + 1, ... in the lanes.
inline vu count_from(uint32_t first) {
  uint32_t counter[kLanes];
  for (uint32_t i = 0; i < kLanes; ++i) counter[i] = first + i;
  return load_as<vu>(counter);
}

// D of n columns from col0 on, a multiple of kDropoutBlock, of one row in fp32: times keep_scale, or 0 (a dropped nan too).
// Reads and writes up to the next multiple of kLanes.
inline void drop(const Dropout& d, uint64_t seed, int64_t row, int64_t col0, int n, float* x) {
  constexpr int kSpan = kLanes * kDropoutBlock;
  if (!d.threshold) return;
  for (int done = 0; done < n; done += kSpan) {
    const Philox first = dropout_counter(row, (col0 + done) / kDropoutBlock);
    vu c[4] = {count_from(first.v[0]), splat(first.v[1]), splat(first.v[2]), splat(first.v[3])};
    philox_rounds<0>(c, seed);
    uint16_t h[kSpan];  // in column order: block by block, word 0 first, its low half first
    for (int i = 0; i < kLanes; i += 4) {
      v4f words[4];
      for (int w = 0; w < 4; ++w) __builtin_memcpy(&words[w], reinterpret_cast<char*>(&c[w]) + i * 4, 16);
      transpose(words);
      __builtin_memcpy(h + i * kDropoutBlock, words, sizeof words);
    }
    for (int j = 0; j < kSpan && done + j < n; j += kLanes) {
      const vu keep = (vu)(__builtin_convertvector(load_as<vh>(h + j), vu) >= d.threshold);
      store(x + done + j, (vf)(keep & (vu)(load(x + done + j) * d.keep_scale)));
    }
  }
}

// ---- random bases

// Blocks first, first + 1, ... of a row in the lanes, and what all rows of such blocks share of the first round.
struct Group {
  Wide first;
  explicit Group(int64_t block) : first(mul_wide(count_from(static_cast<uint32_t>(block)), kPhiloxM0)) {}
};

// philox4x32 of the group's counters (c0, row, tensor, tag | basis). Only c0 differs between lanes, so that half of the
// first two rounds is the same for all of them.
[[gnu::always_inline]] inline void generate(uint64_t seed, uint32_t tag, uint32_t tensor, const Group& group,
                                            int64_t row, vu (&c)[4]) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint32_t a = mul_hi(kPhiloxM1, tensor) ^ static_cast<uint32_t>(row) ^ k0, b = kPhiloxM1 * tensor;
  const Wide second = mul_wide(group.first.hi ^ (tag ^ k1), kPhiloxM1);
  c[0] = second.hi ^ (b ^ (k0 + kPhiloxW0));
  c[1] = second.lo;
  c[2] = group.first.lo ^ (mul_hi(kPhiloxM0, a) ^ (k1 + kPhiloxW1));
  c[3] = splat(kPhiloxM0 * a);
  philox_rounds<2>(c, seed);
}

constexpr int kTogether = 4;  // planes that are made at a time

// A distribution's planes j .. j + kTogether, j a multiple of kTogether, of words w[0..4): elements over `unit`.
inline vf to_vf(vi v) { return __builtin_convertvector(v, vf); }
inline vf in_mantissa(vu v, uint32_t mask) { return (vf)((v & mask) | 0x3f800000u); }  // in [1, 2)

template <Distribution Dist>
struct Planes;
template <>
struct Planes<Distribution::kUniform8> {
  static constexpr float unit = 2.f;
  static void at(const vu* w, int j, vf (&v)[kTogether]) {
    const vu x = w[j / 4];
    const vu shifted[] = {x << 15, x << 7, x >> 1, x >> 9};
    for (int p = 0; p < 4; ++p) v[p] = in_mantissa(shifted[p], 0x7f8000u) - (1.5f - 0x1p-9f);
  }
};
template <>
struct Planes<Distribution::kUniform16> {
  static constexpr float unit = 2.f;
  static void at(const vu* w, int j, vf (&v)[kTogether]) {
    for (int p = 0; p < 4; ++p) {
      const vu x = w[j / 2 + p / 2];
      v[p] = in_mantissa(p & 1 ? x >> 9 : x << 7, 0x7fff80u) - (1.5f - 0x1p-17f);
    }
  }
};
template <>
struct Planes<Distribution::kUniform32> {
  static constexpr float unit = 0x1p-24f;
  static void at(const vu* w, int j, vf (&v)[kTogether]) {
    for (int p = 0; p < 4; ++p) v[p] = to_vf((vi)(w[j + p] ^ 0x80000000u) >> 7 | 1);
  }
};
template <>
struct Planes<Distribution::kSign> {
  static constexpr float unit = 1.f;
  static void at(const vu* w, int j, vf (&v)[kTogether]) {
    const vu x = w[j / 32] << (28 - j % 32);
    for (int p = 0; p < 4; ++p) v[p] = in_mantissa(x << (3 - p), 0x80000000u);
  }
};
template <>
struct Planes<Distribution::kTernary6> {
  static constexpr float unit = 1.f;
  static void at(const vu* w, int j, vf (&v)[kTogether]) {
    for (int p = 0; p < 4; ++p) {
      const vu x = w[j / 2 + p / 2], h = p & 1 ? x >> 16 : x & 0xffffu;
      v[p] = to_vf((vi)(h < 10923u) - (vi)(h >= 54613u));  // a comparison that holds is -1
    }
  }
};
template <>
struct Planes<Distribution::kTernary4> {
  static constexpr float unit = 1.f;
  static void at(const vu* w, int j, vf (&v)[kTogether]) {
    const vu x = w[j / 16] >> (2 * (j % 16));
    for (int p = 0; p < 4; ++p) v[p] = to_vf((vi)(x >> (2 * p) & 1u) - (vi)(x >> (2 * p + 1) & 1u));
  }
};

template <Distribution Dist>
constexpr int kSpan = kLanes * block_columns(Dist);  // columns of a group

}  // namespace lrk::LRK_ISA
