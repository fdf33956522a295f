// SPDX-License-Identifier: Apache-2.0
// One vector of fp32 as the instruction set at hand has it, through GCC/Clang vector extensions, so that every kernel is
// written once. CMake compiles each csrc/cpu/<family>.cpp once per instruction set with LRK_ISA naming the namespace.
#pragma once

#include <utility>

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lrk::LRK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

template <class V, class T>
inline V load_as(const T* p) {
  static_assert(sizeof(V) % sizeof(T) == 0, "a vector of whole elements");
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store_as(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

inline vf splat(float x) { return x - vf{}; }
inline vu splat(uint32_t x) { return x - vu{}; }

inline vf load(const float* p) { return load_as<vf>(p); }
inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16); }
inline void store(float* p, vf v) { store_as(p, v); }
inline void store(bf16* p, vf v) {
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
  const vu is_nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  store_as(p, __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), vh));
}
#if defined(__AVX512F__)
inline vf load(const f16* p) { return (vf)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_as<vh>(p)); }
inline void store(f16* p, vf v) {
  store_as(p, (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline vf load(const f16* p) { return (vf)_mm256_cvtph_ps((__m128i)load_as<vh>(p)); }
inline void store(f16* p, vf v) { store_as(p, (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline vf load(const f16* p) {
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
inline void store(f16* p, vf v) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(v[i]);
}
#endif

// p and q in groups of g lanes: the lower half of each group plus its upper half, those of p before those of q.
template <int g, int... L>
inline vf fold(vf p, vf q, std::integer_sequence<int, L...>) {
  constexpr int h = kLanes / 2;
  return __builtin_shufflevector(p, q, (L / h * kLanes + L % h / (g / 2) * g + L % (g / 2))...) +
         __builtin_shufflevector(p, q, (L / h * kLanes + L % h / (g / 2) * g + L % (g / 2) + g / 2)...);
}
template <int g>
inline vf fold(vf p, vf q) {
  return fold<g>(p, q, std::make_integer_sequence<int, kLanes>{});
}

// Sums of the lanes of four vectors. Halves first, in a fixed order: lane i + lane i + kLanes / 2, and so on.
typedef float v4f __attribute__((vector_size(16)));
inline v4f sum_lanes(vf a, vf b, vf c, vf d) {
  vf v = fold<kLanes / 2>(fold<kLanes>(a, b), fold<kLanes>(c, d));
  if constexpr (kLanes >= 16) v = fold<kLanes / 4>(v, v);
  if constexpr (kLanes >= 8) v = fold<2>(v, v);
  return __builtin_shufflevector(v, v, 0, 1, 2, 3);
}

// n x n: in step h, the off-diagonal h x h blocks of every 2h x 2h block change places.
template <int h, class V, int... L>
inline void transpose_step(V* r, std::integer_sequence<int, L...>) {
  constexpr int n = sizeof...(L);
  for (int i = 0; i < n; ++i) {
    if (i & h) continue;
    const V a = r[i], b = r[i | h];
    r[i] = __builtin_shufflevector(a, b, ((L & h) ? n + L - h : L)...);
    r[i | h] = __builtin_shufflevector(a, b, ((L & h) ? n + L : L + h)...);
  }
}
template <class V, int n, int h = n / 2>
inline void transpose(V (&r)[n]) {
  transpose_step<h>(r, std::make_integer_sequence<int, n>{});
  if constexpr (h > 1) transpose<V, n, h / 2>(r);
}

// High and low words of a * m, lane by lane. SIMD multiplies 32 x 32 bits in the even lanes only: twice, then interleave.
struct Wide {
  vu hi, lo;
};
inline Wide mul_wide(vu a, uint32_t m) {
  typedef uint64_t vl __attribute__((vector_size(kLanes * 4)));
  const vl v = (vl)a, high = ~vl{} << 32;
#if defined(__AVX512F__)
  const auto mul = [m](vl x) { return (vl)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi32((int)m)); };
#elif defined(__AVX2__)
  const auto mul = [m](vl x) { return (vl)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32((int)m)); };
#else
  const auto mul = [m, high](vl x) { return (x & ~high) * m; };
#endif
  const vl even = mul(v), odd = mul(v >> 32);
  return {(vu)(even >> 32 | (odd & high)), (vu)((even & ~high) | odd << 32)};
}

}  // namespace lrk::LRK_ISA
