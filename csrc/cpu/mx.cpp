// SPDX-License-Identifier: Apache-2.0
// MX on the CPU. Quantisers work on a block of 32 in fp32; products decode 8 codes of each of kLanes words at a time, so that
// x is laid out once in their order.
#include "mx.h"

#include "factor.h"

namespace lrk {
namespace LRK_ISA {
namespace {

int64_t grain(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// ---- quantise

template <class X>
void load_block(const X* x, int64_t stride, int n, float (&v)[kMxBlock]) {
  if (stride == 1 && n == kMxBlock) {
    for (int i = 0; i < kMxBlock; i += kLanes) store(v + i, load(x + i));
    return;
  }
  for (int i = 0; i < n; ++i) v[i] = to_float(x[i * stride]);
  for (int i = n; i < kMxBlock; ++i) v[i] = 0.f;
}

// What the rule asks for of a block: its largest magnitude, NaN above all, or its root mean square.
float measure(MxRule rule, const float (&v)[kMxBlock]) {
  if (is_quest(rule)) {
    float sum = 0.f;
    for (float x : v) sum = fmaf(x, x, sum);
    return sqrtf(sum / kMxBlock);
  }
  uint32_t largest = 0;
  for (float x : v) largest = std::max(largest, bit_cast<uint32_t>(x) & 0x7fffffffu);
  return bit_cast<float>(largest);
}

template <class X>
void quantize(const MxQuantizeParams& p) {
  const int64_t G = ceil_div(p.K, int64_t{kMxBlock});
  const uint64_t seed = p.seed ? static_cast<uint64_t>(*p.seed) : 0;
  const uint32_t signs = p.signs ? static_cast<uint32_t>(*p.signs) : 0;
  parallel_for(p.T * G, grain(4 * kMxBlock), [&](int64_t begin, int64_t end) {
    alignas(64) float v[kMxBlock];
    alignas(64) uint32_t code[kMxBlock];
    for (int64_t at = begin; at < end; ++at) {
      const int64_t t = at / G, k = at % G * kMxBlock;
      const X* x = static_cast<const X*>(p.x) + t * p.x_row + k * p.x_column;
      load_block(x, p.x_column, static_cast<int>(std::min<int64_t>(kMxBlock, p.K - k)), v);
      if (p.hadamard) hadamard32(v, signs);
      const uint32_t scale = mx_scale(p.rule, measure(p.rule, v));
      const float inverse = e8m0_inverse(scale);
      uint32_t within = 0;
      for (float& value : v) value = value * inverse * p.gain;
      if (p.mask)
        for (int i = 0; i < kMxBlock; ++i) within |= static_cast<uint32_t>(fabsf(v[i]) < 6.f) << i;
      if (scale == 255u) {
        std::fill_n(code, kMxBlock, 0u);
      } else if (p.seed) {
        for (int i = 0; i < kMxBlock; i += 8) {
          const Philox block = mx_random(seed, t, (k + i) / 8);
          for (int j = 0; j < 8; ++j) code[i + j] = e2m1_stochastic(v[i + j], bits16(block, j));
        }
      } else {
        for (int i = 0; i < kMxBlock; ++i) code[i] = e2m1_code(v[i]);
      }
      uint8_t* to = p.codes + at * kMxBytes;
      for (int i = 0; i < kMxBytes; ++i) to[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
      p.scales[at] = static_cast<uint8_t>(scale);
      if (p.mask) p.mask[at] = static_cast<int32_t>(within);
    }
  });
}

// ---- decode

// The values of nibble j of each word, where `words` holds the codes shifted right by 4 j.
#if defined(__AVX512F__)
inline vf values_of(vu words) {
  const __m512 table =
      _mm512_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f);
  return (vf)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)words, table);
}
#elif defined(__AVX2__)
inline vf values_of(vu words) {
  const __m256 table = _mm256_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f);
  const vf magnitude = (vf)_mm256_permutevar8x32_ps(table, (__m256i)words);
  return (vf)((vu)magnitude | ((words << 28) & 0x80000000u));
}
#else
inline vf values_of(vu words) {
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = e2m1_value(words[i] & 15u);
  return v;
}
#endif

// A span is what kLanes words of codes hold: kLanes / 4 blocks. Element 8 i + j of it is lane i of vector j.
constexpr int kSpan = 8 * kLanes, kSpanBlocks = kSpan / kMxBlock;

// The scales of a span's blocks, each in the lanes of its words. Blocks past the end of a row have none.
inline vf scales_of(const uint8_t* scales, int64_t left) {
  typedef uint8_t vb __attribute__((vector_size(kLanes)));
  uint32_t bytes[kSpanBlocks];
  for (int b = 0; b < kSpanBlocks; ++b) bytes[b] = (b < left ? scales[b] : 127u) * 0x01010101u;
  const vu field = __builtin_convertvector(load_as<vb>(bytes), vu);
  const vu ends = (vu)((field == 0u) | (field == 255u)) & 0x00400000u;  // 2^-127 and NaN
  return (vf)(field << 23 | ends);
}
inline vu words_of(const uint8_t* codes, int64_t left) {
  if (left >= kSpanBlocks) return load_as<vu>(codes);
  uint8_t some[kSpan / 2] = {};
  __builtin_memcpy(some, codes, static_cast<size_t>(left * kMxBytes));
  return load_as<vu>(some);
}

// n values (whole blocks) of a row of codes, times their scales.
template <class Y>
void decode_row(const uint8_t* codes, const uint8_t* scales, int64_t n, Y* y) {
  for (int64_t k = 0; k < n; k += kSpan) {
    const int64_t g = k / kMxBlock, left = ceil_div(n - k, int64_t{kMxBlock});
    const vf s = scales_of(scales + g, left);
    const vu words = words_of(codes + g * kMxBytes, left);
    alignas(64) float some[kSpan];
    vf block[8];
    for (int j = 0; j < 8; ++j) block[j] = values_of(words >> (4 * j)) * s;
    if constexpr (kLanes == 8) {
      transpose(block);
      for (int i = 0; i < 8; ++i) store(some + 8 * i, block[i]);
    } else {
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < kLanes; ++i) some[8 * i + j] = block[j][i];
    }
    const int count = static_cast<int>(std::min<int64_t>(kSpan, n - k));
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + k + i, load(some + i));
    for (; i < count; ++i) y[k + i] = from_float<Y>(some[i]);
  }
}

template <class Y>
void dequantize(const MxDequantizeParams& p) {
  parallel_for(p.T, grain(p.columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      decode_row(p.codes + t * p.pitch, p.scales + t * p.scale_pitch, p.columns, static_cast<Y*>(p.y) + t * p.y_pitch);
  });
}

// ---- products of few rows

// rows[t][spans][8][kLanes]: x in the order of codes, zeros past K.
template <class X>
void lay_out(const void* x, int64_t pitch, int64_t T, int64_t K, float* rows) {
  const int64_t spans = ceil_div(K, int64_t{kSpan});
  for (int64_t t = 0; t < T; ++t) {
    const X* row = static_cast<const X*>(x) + t * pitch;
    float* to = rows + t * spans * kSpan;
    for (int64_t k = 0; k < spans * kSpan; ++k)
      to[k / kSpan * kSpan + k % 8 * kLanes + k % kSpan / 8] = k < K ? to_float(row[k]) : 0.f;
  }
}

float sum_of(vf v) {
  float sum = 0.f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// kT rows of x against a row of W.
template <int kT>
void dot_row(const uint8_t* codes, const uint8_t* scales, int64_t G, const float* x, int64_t pitch, float* sums) {
  vf total[kT] = {};
  int64_t g = 0;
  const auto span = [&](vu words, vf s) {
    vf part[kT] = {};
    for (int j = 0; j < 8; ++j) {
      const vf w = values_of(words >> (4 * j));
      for (int t = 0; t < kT; ++t) part[t] += w * load(x + t * pitch + g * kMxBlock + j * kLanes);
    }
    for (int t = 0; t < kT; ++t) total[t] += part[t] * s;
  };
  for (; g + kSpanBlocks <= G; g += kSpanBlocks) {
    __builtin_prefetch(codes + g * kMxBytes + 1024);
    span(load_as<vu>(codes + g * kMxBytes), scales_of(scales + g, kSpanBlocks));
  }
  if (g < G) span(words_of(codes + g * kMxBytes, G - g), scales_of(scales + g, G - g));
  for (int t = 0; t < kT; ++t) sums[t] = sum_of(total[t]);
}

template <class X, class B>
void linear(const MxLinearParams& p) {
  using S = TypeOfS<B>;
  const int64_t G = p.w.G(), pitch = ceil_div(p.w.K, int64_t{kSpan}) * kSpan;
  std::vector<float> memory(static_cast<size_t>(p.T * pitch) + 16);
  float* x = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  lay_out<X>(p.x, p.x_pitch, p.T, p.w.K, x);
  parallel_for(p.w.O, grain(p.w.K * p.T), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const uint8_t *codes = p.w.codes + o * G * kMxBytes, *scales = p.w.scales + o * G;
      const float bias = p.bias ? to_float(static_cast<const X*>(p.bias)[o]) : 0.f;
      for (int64_t t = 0; t < p.T;) {
        float sums[4];
        const int64_t left = p.T - t, count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const float* rows = x + t * pitch;
        if (count == 4) dot_row<4>(codes, scales, G, rows, pitch, sums);
        if (count == 2) dot_row<2>(codes, scales, G, rows, pitch, sums);
        if (count == 1) dot_row<1>(codes, scales, G, rows, pitch, sums);
        for (int64_t i = 0; i < count; ++i, ++t) {
          float sum = sums[i] + bias;
          if (p.s) {
            const B* b = static_cast<const B*>(p.b) + o * p.R;
            const S* of_row = static_cast<const S*>(p.s) + t * p.R;
            float low = 0.f;
            for (int32_t r = 0; r < p.R; ++r) low += to_float(of_row[r]) * to_float(b[r]);
            sum += low;
          }
          static_cast<X*>(p.y)[t * p.w.O + o] = from_float<X>(sum);
        }
      }
    }
  });
}

// A task has so many spans of dX's columns and walks all of W's rows.
constexpr int kDxSpans = 512 / kSpan;

template <class X>
void linear_dx(const MxLinearDxParams& p) {
  const int64_t G = p.w.G(), spans = ceil_div(p.w.K, int64_t{kSpan}), tasks = ceil_div(spans, int64_t{kDxSpans});
  parallel_for(tasks * p.T, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task / tasks, first = task % tasks * kDxSpans,
                    count = std::min<int64_t>(kDxSpans, spans - first);
      const X* dy = static_cast<const X*>(p.dy) + t * p.dy_pitch;
      alignas(64) float sums[kDxSpans * kSpan] = {};
      for (int64_t o = 0; o < p.w.O; ++o) {
        const float d = to_float(dy[o]);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t g = (first + i) * kSpanBlocks, left = G - g;
          const vf s = scales_of(p.w.scales + o * G + g, left) * d;
          const vu words = words_of(p.w.codes + (o * G + g) * kMxBytes, left);
          for (int j = 0; j < 8; ++j) {
            float* sum = sums + i * kSpan + j * kLanes;
            store(sum, load(sum) + values_of(words >> (4 * j)) * s);
          }
        }
      }
      X* dx = static_cast<X*>(p.dx) + t * p.w.K;
      for (int64_t k = first * kSpan; k < std::min(p.w.K, (first + count) * kSpan); ++k) {
        const int64_t at = k - first * kSpan;
        dx[k] = from_float<X>(sums[at / kSpan * kSpan + at % 8 * kLanes + at % kSpan / 8]);
      }
    }
  });
}

}  // namespace
}  // namespace LRK_ISA

LRK_CPU_ENTRY(mx_quantize, MxQuantizeParams, with_float(p.dtype, [&](auto x) { quantize<decltype(x)>(p); }))
LRK_CPU_ENTRY(mx_dequantize, MxDequantizeParams, with_float(p.dtype, [&](auto y) { dequantize<decltype(y)>(p); }))
LRK_CPU_ENTRY(mx_linear, MxLinearParams,
              with_types(p.dtype, p.b_dtype, [&](auto x, auto b) { linear<decltype(x), decltype(b)>(p); }))
LRK_CPU_ENTRY(mx_linear_dx, MxLinearDxParams, with_float(p.dtype, [&](auto x) { linear_dx<decltype(x)>(p); }))

}  // namespace lrk
