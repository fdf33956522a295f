// SPDX-License-Identifier: Apache-2.0
// MX on the CPU. Quantisers work on a block of 32 in fp32; products decode a vector of codes at a time, in whose order x is laid
// out once.
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
  const auto byte = [&](int b) { return b < left ? scales[b] : 127u; };
#if defined(__AVX512F__)
  const uint32_t four = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
  const __m128i each = _mm_shuffle_epi8(_mm_cvtsi32_si128(static_cast<int>(four)),
                                        _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
  const vu field = (vu)_mm512_maskz_cvtepu8_epi32(0xffff, each);
#elif defined(__AVX2__)
  const uint64_t two = byte(0) * uint64_t{0x01010101u} | byte(1) * uint64_t{0x01010101u} << 32;
  const vu field = (vu)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(two)));
#else
  const vu field = splat(byte(0));
#endif
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

float sum_of(vf v) {
  float sum = 0.f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

#if defined(__AVX2__)

// Bytes of codes, 16 to a block, and what they are made of: within each 16 bytes a shuffle looks a nibble up.
#if defined(__AVX512F__)
using Bytes = __m512i;
inline Bytes set(__m128i v) { return _mm512_maskz_broadcast_i32x4(0xffff, v); }
inline Bytes look_up(Bytes table, Bytes at) { return _mm512_shuffle_epi8(table, at); }
inline Bytes low_half(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes high_half(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes multiply(Bytes a, Bytes b) { return _mm512_madd_epi16(a, b); }
inline vf floats_of(Bytes v) { return (vf)_mm512_maskz_cvtepi32_ps(0xffff, v); }
#else
using Bytes = __m256i;
inline Bytes set(__m128i v) { return _mm256_broadcastsi128_si256(v); }
inline Bytes look_up(Bytes table, Bytes at) { return _mm256_shuffle_epi8(table, at); }
inline Bytes low_half(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes high_half(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes multiply(Bytes a, Bytes b) { return _mm256_madd_epi16(a, b); }
inline vf floats_of(Bytes v) { return (vf)_mm256_cvtepi32_ps(v); }
#endif

// The even codes of each block as bytes, and the odd ones.
struct Nibbles {
  Bytes of[2];
  explicit Nibbles(vu words) : of{(Bytes)(words & 0x0f0f0f0fu), (Bytes)(words >> 4 & 0x0f0f0f0fu)} {}
};

// Y: in a block x is an integer hi 2^15 + lo of 30 bits times a power of two, and a code twice its value, so that products of 16
// bits sum exactly over the block; blocks meet in fp32. Four vectors of a span, i even or odd codes and k half of a block: lane
// 8 l + j is element 2 (8 k + j) + i of block l.
constexpr float kHigh = 32768.f;

struct Integers {
  int16_t* parts;  // [T][spans][4][hi, lo][2 kLanes]
  float*
      units;  // [T][spans][kLanes]: the power of two, for each lane's block, with what the product has of its own: 2^-9
  int64_t spans;

  static int64_t floats(int64_t T, int64_t spans) { return T * spans * 9 * kLanes; }
  Integers(float* memory, int64_t T, int64_t n)
      : parts(reinterpret_cast<int16_t*>(memory + T * n * kLanes)), units(memory), spans(n) {}
  int16_t* part(int64_t t, int64_t span) const { return parts + (t * spans + span) * 16 * kLanes; }
};

template <class X>
void lay_out(const void* x, int64_t pitch, int64_t T, int64_t K, const Integers& to) {
  for (int64_t t = 0; t < T; ++t) {
    const X* row = static_cast<const X*>(x) + t * pitch;
    for (int64_t block = 0; block < to.spans * kSpanBlocks; ++block) {
      alignas(64) float v[kMxBlock];
      const int64_t k0 = block * kMxBlock, count = std::clamp<int64_t>(K - k0, 0, kMxBlock);
      if (count == kMxBlock) {
        for (int i = 0; i < kMxBlock; i += kLanes) store(v + i, load(row + k0 + i));
      } else {
        for (int i = 0; i < kMxBlock; ++i) v[i] = i < count ? to_float(row[k0 + i]) : 0.f;
      }
      uint32_t largest = 0;
      for (float value : v) largest = std::max(largest, bit_cast<uint32_t>(value) & 0x7fffffffu);
      // 2^(floor(log2 largest) + 1) is 2^29 units; of what is not finite the unit is NaN.
      const int field = std::max(static_cast<int>(largest >> 23), 30);
      const bool finite = field < 255;
      const float unit = finite ? bit_cast<float>(static_cast<uint32_t>(field - 28 > 0 ? field - 28 : 1) << 23) : 1.f;
      const float inverse = bit_cast<float>(static_cast<uint32_t>(254 - (field - 28)) << 23);
      const int64_t span = block / kSpanBlocks, lane = block % kSpanBlocks;
      for (int i = 0; i < 4; ++i)
        to.units[(t * to.spans + span) * kLanes + 4 * lane + i] =
            finite ? unit * 0x1p-9f : bit_cast<float>(0x7fc00000u);
      int16_t* part = to.part(t, span);
      for (int e = 0; e < kMxBlock; ++e) {
        const float whole = finite ? v[e] * inverse : 0.f, hi = rintf(whole * (1.f / kHigh));
        const int at = (e % 2 * 2 + e / 16) * 4 * kLanes + static_cast<int>(lane) * 8 + e % 16 / 2;
        part[at] = static_cast<int16_t>(hi);
        part[at + 2 * kLanes] = static_cast<int16_t>(rintf(whole - hi * kHigh));
      }
    }
  }
}

template <int kT>
void dot_row(const uint8_t* codes, const uint8_t* scales, int64_t G, const Integers& x, int64_t t0, float* sums) {
  const Bytes table = set(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)), zero = {};
  vf total[kT] = {};
  const auto span = [&](int64_t n, vu words, vf s) {
    const Nibbles nibbles(words);
    Bytes w[4];
    for (int i = 0; i < 2; ++i) {
      const Bytes twice = look_up(table, nibbles.of[i]);
      w[2 * i] = low_half(zero, twice), w[2 * i + 1] = high_half(zero, twice);
    }
    for (int t = 0; t < kT; ++t) {
      const int16_t* part = x.part(t0 + t, n);
      vi hi = {}, lo = {};
      for (int i = 0; i < 4; ++i) {
        hi += (vi)multiply(w[i], load_as<Bytes>(part + 4 * kLanes * i));
        lo += (vi)multiply(w[i], load_as<Bytes>(part + 4 * kLanes * i + 2 * kLanes));
      }
      const vf unit = load(x.units + ((t0 + t) * x.spans + n) * kLanes);
      total[t] += (floats_of((Bytes)hi) * kHigh + floats_of((Bytes)lo)) * unit * s;
    }
  };
  int64_t g = 0;
  for (; g + kSpanBlocks <= G; g += kSpanBlocks) {
    __builtin_prefetch(codes + g * kMxBytes + 2048);
    span(g / kSpanBlocks, load_as<vu>(codes + g * kMxBytes), scales_of(scales + g, kSpanBlocks));
  }
  if (g < G) span(g / kSpanBlocks, words_of(codes + g * kMxBytes, G - g), scales_of(scales + g, G - g));
  for (int t = 0; t < kT; ++t) sums[t] = sum_of(total[t]);
}

// dX: codes as the upper halves of floats, two in a word. Vector 4 i + 2 k + h of a span: lane 4 l + d is element 4 d + 2 h + i of
// half k of block l.
struct Values {
  vf of[8];
  explicit Values(vu words) {
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
};
inline int place_of(int e) {  // of element e of a span among its 8 vectors
  const int in = e % kMxBlock;
  return (in % 2 * 4 + in / 16 * 2 + in % 4 / 2) * kLanes + e / kMxBlock * 4 + in % 16 / 4;
}

#else

// Y, without shuffles of bytes: x in fp32 in the order of codes, zeros past K.
struct Integers {
  float* rows;  // [T][spans][8][kLanes]
  int64_t spans;
  static int64_t floats(int64_t T, int64_t spans) { return T * spans * kSpan; }
  Integers(float* memory, int64_t, int64_t n) : rows(memory), spans(n) {}
};
template <class X>
void lay_out(const void* x, int64_t pitch, int64_t T, int64_t K, const Integers& to) {
  for (int64_t t = 0; t < T; ++t) {
    const X* row = static_cast<const X*>(x) + t * pitch;
    for (int64_t k = 0; k < to.spans * kSpan; ++k)
      to.rows[t * to.spans * kSpan + k / kSpan * kSpan + k % 8 * kLanes + k % kSpan / 8] =
          k < K ? to_float(row[k]) : 0.f;
  }
}
template <int kT>
void dot_row(const uint8_t* codes, const uint8_t* scales, int64_t G, const Integers& x, int64_t t0, float* sums) {
  vf total[kT] = {};
  for (int64_t g = 0; g < G; g += kSpanBlocks) {
    const vu words = words_of(codes + g * kMxBytes, G - g);
    vf part[kT] = {};
    for (int j = 0; j < 8; ++j) {
      const vf w = values_of(words >> (4 * j));
      for (int t = 0; t < kT; ++t) part[t] += w * load(x.rows + (t0 + t) * x.spans * kSpan + g * kMxBlock + j * kLanes);
    }
    for (int t = 0; t < kT; ++t) total[t] += part[t] * scales_of(scales + g, G - g);
  }
  for (int t = 0; t < kT; ++t) sums[t] = sum_of(total[t]);
}

struct Values {
  vf of[8];
  explicit Values(vu words) {
    for (int j = 0; j < 8; ++j) of[j] = values_of(words >> (4 * j));
  }
};
inline int place_of(int e) { return e % 8 * kLanes + e / 8; }

#endif

// A row of x that is not finite, which no integers hold: element by element.
template <class X>
float dot_slowly(const uint8_t* codes, const uint8_t* scales, const X* x, int64_t K) {
  float sum = 0.f;
  for (int64_t k = 0; k < K; ++k)
    sum += to_float(x[k]) * (e2m1_value(codes[k / 2] >> (k % 2 * 4) & 15u) * e8m0_value(scales[k / kMxBlock]));
  return sum;
}
template <class X>
bool is_finite(const X* x, int64_t K) {
  for (int64_t k = 0; k < K; ++k)
    if ((bit_cast<uint32_t>(to_float(x[k])) & 0x7f800000u) == 0x7f800000u) return false;
  return true;
}

template <class X, class B>
void linear(const MxLinearParams& p) {
  using S = TypeOfS<B>;
  const int64_t G = p.w.G(), spans = ceil_div(G, int64_t{kSpanBlocks});
  const Integers x(thread_scratch(static_cast<size_t>(Integers::floats(p.T, spans))), p.T, spans);
  lay_out<X>(p.x, p.x_pitch, p.T, p.w.K, x);
  const auto row_of = [&](int64_t t) { return static_cast<const X*>(p.x) + t * p.x_pitch; };
  bool finite[kMxFewCpu];
  for (int64_t t = 0; t < p.T; ++t) finite[t] = is_finite(row_of(t), p.w.K);
  parallel_for(p.w.O, grain(p.w.K * p.T), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const uint8_t *codes = p.w.codes + o * G * kMxBytes, *scales = p.w.scales + o * G;
      const float bias = p.bias ? to_float(static_cast<const X*>(p.bias)[o]) : 0.f;
      for (int64_t t = 0; t < p.T;) {
        float sums[4];
        const int64_t left = p.T - t, count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (count == 4) dot_row<4>(codes, scales, G, x, t, sums);
        if (count == 2) dot_row<2>(codes, scales, G, x, t, sums);
        if (count == 1) dot_row<1>(codes, scales, G, x, t, sums);
        for (int64_t i = 0; i < count; ++i, ++t) {
          float sum = (finite[t] ? sums[i] : dot_slowly(codes, scales, row_of(t), p.w.K)) + bias;
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

// A task has so many spans of dX's columns and walks all of W's rows, some at a time, so that sums stay in registers for them.
constexpr int kDxSpans = 1024 / kSpan, kDxRows = 8;

template <class X>
void linear_dx(const MxLinearDxParams& p) {
  const int64_t G = p.w.G(), spans = ceil_div(G, int64_t{kSpanBlocks}), tasks = ceil_div(spans, int64_t{kDxSpans});
  parallel_for(tasks * p.T, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task / tasks, first = task % tasks * kDxSpans;
      const int64_t count = std::min<int64_t>(kDxSpans, spans - first);
      const X* dy = static_cast<const X*>(p.dy) + t * p.dy_pitch;
      alignas(64) float sums[kDxSpans * kSpan] = {};
      for (int64_t o = 0; o < p.w.O; o += kDxRows) {
        const int64_t rows = std::min<int64_t>(kDxRows, p.w.O - o);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t g = (first + i) * kSpanBlocks, left = G - g;
          vf sum[8];
          for (int j = 0; j < 8; ++j) sum[j] = load(sums + i * kSpan + j * kLanes);
          for (int64_t r = o; r < o + rows; ++r) {
            const vf s = scales_of(p.w.scales + r * G + g, left) * to_float(dy[r]);
            const Values w(words_of(p.w.codes + (r * G + g) * kMxBytes, left));
            for (int j = 0; j < 8; ++j) sum[j] += w.of[j] * s;
          }
          for (int j = 0; j < 8; ++j) store(sums + i * kSpan + j * kLanes, sum[j]);
        }
      }
      X* dx = static_cast<X*>(p.dx) + t * p.w.K;
      for (int64_t k = first * kSpan; k < std::min(p.w.K, (first + count) * kSpan); ++k) {
        const int at = static_cast<int>(k - first * kSpan);
        dx[k] = from_float<X>(sums[at / kSpan * kSpan + place_of(at % kSpan)]);
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
