// SPDX-License-Identifier: Apache-2.0
// The one definition of every random bit in lrkern: Philox4x32-10 (Salmon et al., SC 2011), addressed by (row, column).
//
//   key     = seed in [0, 2^63)
//   counter = (c0 = column block, c1 = row, c2 = tensor id, c3 = basis | method << 16 | distribution << 22 | version << 28)
//
// A block is 128 bits = 128 / b consecutive columns of one row at b bits per element; element j of the block takes bits
// [j b, (j + 1) b), word 0 lowest. No leading dimension enters and a row starts on a fresh block, so a slice, a tile or a
// thread sees the same values on any device and in any order. cpu/philox.h has the same bits in vectors.
#pragma once

#include "common.h"

namespace lrk {

struct Philox {
  uint32_t v[4];
};

LRK_HD uint32_t mul_hi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments

template <int kRounds = 10>
LRK_HD Philox philox4x32(Philox c, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 0; i < kRounds; ++i) {
    const uint32_t h0 = mul_hi(kPhiloxM0, c.v[0]), l0 = kPhiloxM0 * c.v[0];
    const uint32_t h1 = mul_hi(kPhiloxM1, c.v[2]), l1 = kPhiloxM1 * c.v[2];
    c = Philox{{h1 ^ c.v[1] ^ k0, l1, h0 ^ c.v[3] ^ k1, l0}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// c3's fields. Values are part of the stream: add, never renumber.
enum class Method : uint32_t { kDropout = 1, kNola = 2, kVera = 3, kRandLora = 4, kMx = 5 };
enum class Distribution : uint32_t {
  kBits16 = 1,     // dropout's: the bits themselves
  kUniform8 = 2,   // (2 h + 1) / 2^8 - 1 of 8 bits h
  kUniform16 = 3,  // (2 h + 1) / 2^16 - 1 of 16 bits h
  kUniform32 = 4,  // (2 (h >> 8) + 1) / 2^24 - 1 of 32 bits h
  kSign = 5,       // 1 - 2 h of 1 bit h
  kTernary6 = 6,   // 16 bits h: -1 below 10923, +1 from 54613 on, else 0: 1/6, 2/3, 1/6
  kTernary4 = 7,   // 2 bits: low bit - high bit: 1/4, 1/2, 1/4
};
constexpr uint32_t kStreamVersion = 0;

LRK_HD constexpr uint32_t stream_tag(Method method, Distribution distribution, uint32_t basis = 0) {
  return basis | static_cast<uint32_t>(method) << 16 | static_cast<uint32_t>(distribution) << 22 | kStreamVersion << 28;
}

// ---- random bases: element (k, row, column) of tensor `tensor`

LRK_HD constexpr int bits_of(Distribution d) {
  switch (d) {
    case Distribution::kUniform8: return 8;
    case Distribution::kUniform32: return 32;
    case Distribution::kSign: return 1;
    case Distribution::kTernary4: return 2;
    default: return 16;
  }
}
LRK_HD constexpr int block_columns(Distribution d) { return 128 / bits_of(d); }

constexpr int64_t kMaxBases = int64_t{1} << 16, kMaxRows = int64_t{1} << 32, kMaxBlocks = int64_t{1} << 32,
                  kMaxTensors = int64_t{1} << 32;

LRK_HD Philox basis_block(uint64_t seed, uint32_t tag, uint32_t tensor, uint32_t basis, int64_t row,
                          int64_t col_block) {
  return philox4x32(Philox{{static_cast<uint32_t>(col_block), static_cast<uint32_t>(row), tensor, tag | basis}}, seed);
}

// Element j of a block, exact in fp32. kUniform8 is exact in bf16 too, kUniform16 a sum of two bf16.
template <Distribution Dist>
LRK_HD float basis_value(const Philox& block, int j) {
  constexpr int b = bits_of(Dist), per_word = 32 / b;
  const uint32_t h = block.v[j / per_word] >> (j % per_word * b);
  // h as the mantissa's middle byte, 0x80 as its low one: 257 + the value, in two instructions.
  if (Dist == Distribution::kUniform8) return bit_cast<float>(0x43800080u | (h & 0xffu) << 8) - 257.f;
  if (Dist == Distribution::kUniform16)
    return static_cast<float>(static_cast<int>(2 * (h & 0xffffu)) - 65535) * 0x1p-16f;
  if (Dist == Distribution::kUniform32)
    return static_cast<float>(static_cast<int>(2 * (h >> 8)) - ((1 << 24) - 1)) * 0x1p-24f;
  if (Dist == Distribution::kSign) return bit_cast<float>(0x3f800000u | h << 31);
  if (Dist == Distribution::kTernary4)
    return static_cast<float>(static_cast<int>(h & 1u) - static_cast<int>(h >> 1 & 1u));
  return (h & 0xffffu) < 10923u ? -1.f : (h & 0xffffu) >= 54613u ? 1.f : 0.f;
}

// Dropout keeps element (row, col) of x [T, I] iff its 16 random bits are >= threshold = round(p * 65536).
// The keep probability is therefore a multiple of 2^-16, and keep_scale uses that very value, so E[dropout(x)] = x.
constexpr int kDropoutBlock = 8;  // columns per Philox block

LRK_HD Philox dropout_counter(int64_t row, int64_t col_block) {
  return Philox{{static_cast<uint32_t>(col_block), static_cast<uint32_t>(row), 0u,
                 stream_tag(Method::kDropout, Distribution::kBits16)}};
}
LRK_HD Philox dropout_block(uint64_t seed, int64_t row, int64_t col_block) {
  return philox4x32(dropout_counter(row, col_block), seed);
}
LRK_HD uint32_t bits16(const Philox& block, int j) { return (block.v[j >> 1] >> ((j & 1) * 16)) & 0xffffu; }

struct Dropout {
  uint32_t threshold = 0;  // 0: no dropout; 65536: all dropped
  float keep_scale = 1.f;  // 65536 / (65536 - threshold); 0 when all is dropped
};
LRK_HD Dropout make_dropout(double p) {
  Dropout d;
  d.threshold = static_cast<uint32_t>(p * 65536.0 + 0.5);
  d.keep_scale = d.threshold >= 65536u ? 0.f : static_cast<float>(65536.0 / (65536.0 - d.threshold));
  return d;
}

}  // namespace lrk
