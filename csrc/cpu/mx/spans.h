// SPDX-License-Identifier: Apache-2.0
// Codes of an MX weight as vectors of the instruction set at hand: spans of kLanes words, their scales, their values.
#pragma once

#include <algorithm>

#include "../simd.h"
#include "mx.h"

namespace lrk::LRK_ISA {
namespace {

// A span is what kLanes words of codes hold: kLanes / 4 blocks.
constexpr int kSpan = 8 * kLanes, kSpanBlocks = kSpan / kMxBlock;

// What lies in kLanes blocks, four spans: their bytes, and what is asked of a span of them.
constexpr int kQuad = 4;
inline vu fields_of(const uint8_t* scales) {
#if defined(__AVX512F__)
  return (vu)_mm512_maskz_cvtepu8_epi32(0xffff, load_as<__m128i>(scales));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load_as<int64_t>(scales)));
#else
  return vu{scales[0], scales[1], scales[2], scales[3]};
#endif
}
inline vf scales_of(vu fields) {
  const vu ends = (vu)((fields == 0u) | (fields == 255u)) & 0x00400000u;  // 2^-127 and NaN
  return (vf)(fields << 23 | ends);
}
// Of kLanes numbers, one for each block, those of span i, each in the lanes of its words.
inline vf spread(const float* blocks, int i) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return (vf)_mm512_maskz_permutevar_ps(
      0xffff, _mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(blocks + i * kSpanBlocks)), lanes);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  double two;
  __builtin_memcpy(&two, blocks + i * kSpanBlocks, sizeof two);
  return (vf)_mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(two)), lanes);
#else
  return splat(blocks[i]);
#endif
}
inline vu words_of(const uint8_t* codes, int i) { return load_as<vu>(codes + i * (kSpan / 2)); }

// f(g, codes, scales) of four spans from block g on, for blocks [first, last) of a row. Those past its end are zeros. The next
// row's are fetched meanwhile.
template <class F>
[[gnu::always_inline]] inline void for_quads(const uint8_t* codes, const uint8_t* scales, int64_t pitch, int64_t first,
                                             int64_t last, const F& f) {
  uint8_t some_codes[kLanes * kMxBytes], some_scales[kLanes];
  for (int64_t g = first; g < last; g += kLanes) {
    const uint8_t *c = codes + g * kMxBytes, *s = scales + g;
    for (int i = 0; i < kLanes * kMxBytes; i += 64) __builtin_prefetch(c + pitch + i);
    if (g + kLanes > last) {
      const size_t left = static_cast<size_t>(last - g);
      __builtin_memset(some_codes, 0, sizeof some_codes), __builtin_memset(some_scales, 127, sizeof some_scales);
      __builtin_memcpy(some_codes, c, left * kMxBytes), __builtin_memcpy(some_scales, s, left);
      c = some_codes, s = some_scales;
    }
    f(g, c, s);
  }
}
template <class F>
[[gnu::always_inline]] inline void for_quads(const MxWeight& w, int64_t row, int64_t first, int64_t last, const F& f) {
  const int64_t G = w.G();
  for_quads(w.codes + row * G * kMxBytes, w.scales + row * G, G * kMxBytes, first, last, f);
}

// The values of a span's codes, in eight vectors. lay_out_block puts those of a block of x, its l-th, where they meet them.
#if defined(__AVX2__)

// Bytes of codes, 16 to a block: within each 16 bytes a shuffle looks a nibble up.
#if defined(__AVX512F__)
using Bytes = __m512i;
inline Bytes set(__m128i v) { return _mm512_maskz_broadcast_i32x4(0xffff, v); }
inline Bytes look_up(Bytes table, Bytes at) { return _mm512_shuffle_epi8(table, at); }
inline Bytes low_half(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes high_half(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes multiply_8(Bytes a, Bytes b) { return _mm512_maddubs_epi16(a, b); }
inline Bytes multiply_16(Bytes a, Bytes b) { return _mm512_madd_epi16(a, b); }
inline Bytes add_16(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
inline Bytes all_16(int16_t x) { return _mm512_set1_epi16(x); }
inline vi integers_of(vf v) { return (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v); }
inline vf floats_of(vi v) { return (vf)_mm512_maskz_cvtepi32_ps(0xffff, (__m512i)v); }
#else
using Bytes = __m256i;
inline Bytes set(__m128i v) { return _mm256_broadcastsi128_si256(v); }
inline Bytes look_up(Bytes table, Bytes at) { return _mm256_shuffle_epi8(table, at); }
inline Bytes low_half(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes high_half(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes multiply_8(Bytes a, Bytes b) { return _mm256_maddubs_epi16(a, b); }
inline Bytes multiply_16(Bytes a, Bytes b) { return _mm256_madd_epi16(a, b); }
inline Bytes add_16(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline Bytes all_16(int16_t x) { return _mm256_set1_epi16(x); }
inline vi integers_of(vf v) { return (vi)_mm256_cvtps_epi32((__m256)v); }
inline vf floats_of(vi v) { return (vf)_mm256_cvtepi32_ps((__m256i)v); }
#endif

// The even codes of each block as bytes, and the odd ones.
struct Nibbles {
  Bytes of[2];
  [[gnu::always_inline]] explicit Nibbles(vu words)
      : of{(Bytes)(words & 0x0f0f0f0fu), (Bytes)(words >> 4 & 0x0f0f0f0fu)} {}
};

// Codes become the upper halves of floats, two in a word. Vector 4 i + 2 k + h: lane 4 l + d is element 4 d + 2 h + i of half k
// of block l.
struct Values {
  vf of[8];
  [[gnu::always_inline]] explicit Values(vu words) {
    const Nibbles nibbles(words);
    const Bytes upper = set(_mm_setr_epi8(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -0x80, -0x41, -0x41, -0x41,
                                          -0x40, -0x40, -0x40, -0x40));
    const Bytes lower =
        set(_mm_setr_epi8(0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40, 0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40));
    for (int i = 0; i < 2; ++i) {
      const Bytes u = look_up(upper, nibbles.of[i]), l = look_up(lower, nibbles.of[i]);
      const vu halves[2] = {(vu)low_half(l, u), (vu)high_half(l, u)};
      for (int k = 0; k < 2; ++k) {
        of[4 * i + 2 * k] = (vf)(halves[k] << 16);
        of[4 * i + 2 * k + 1] = (vf)(halves[k] & 0xffff0000u);
      }
    }
  }
  static constexpr int vector_of(int e) { return e % 2 * 4 + e / 16 * 2 + e % 4 / 2; }  // of element e of a block
  static constexpr int kApart = 4, kOther = 16;  // elements of neighbouring lanes; where the other half begins
};

#else

// Vector j: lane i is element 8 i + j.
struct Values {
  vf of[8];
  [[gnu::always_inline]] explicit Values(vu words) {
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < kLanes; ++i) of[j][i] = e2m1_value(words[i] >> (4 * j) & 15u);
  }
  static constexpr int vector_of(int e) { return e % 8; }
  static constexpr int kApart = 8, kOther = 4;
};

#endif

// Block l of a span among its vectors [8][kLanes], and back.
inline void lay_out_block(const float (&v)[kMxBlock], int l, float* span) {
  for (int e : {0, Values::kOther}) {
    v4f r[4];
    for (int d = 0; d < 4; ++d) r[d] = load_as<v4f>(v + e + d * Values::kApart);
    transpose(r);
    for (int c = 0; c < 4; ++c) store_as(span + Values::vector_of(e + c) * kLanes + 4 * l, r[c]);
  }
}
inline void take_block(const float* span, int l, float* v) {
  for (int e : {0, Values::kOther}) {
    v4f r[4];
    for (int c = 0; c < 4; ++c) r[c] = load_as<v4f>(span + Values::vector_of(e + c) * kLanes + 4 * l);
    transpose(r);
    for (int d = 0; d < 4; ++d) store_as(v + e + d * Values::kApart, r[d]);
  }
}

inline int64_t spans_of(int64_t G) { return ceil_div(G, int64_t{kLanes}) * kQuad; }

}  // namespace
}  // namespace lrk::LRK_ISA
