// SPDX-License-Identifier: Apache-2.0
// One vector of fp32 as the instruction set at hand has it, through GCC/Clang vector extensions, so that every kernel is
// written once. CMake compiles each csrc/cpu/<family>.cpp once per instruction set with LRK_ISA naming the namespace.
#pragma once

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
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

template <class V, class T>
inline V load_as(const T* p) {
  static_assert(sizeof(V) == kLanes * sizeof(T), "a vector of kLanes elements");
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store_as(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

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
inline void store(f16* p, vf v) { store_as(p, (vh)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
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

// Sum of the lanes, halves first: a fixed order.
inline float sum_lanes(vf v) {
  float a[kLanes];
  store(a, v);
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) a[i] += a[i + w];
  return a[0];
}

}  // namespace lrk::LRK_ISA
