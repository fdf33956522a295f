// SPDX-License-Identifier: Apache-2.0
// MX on the CPU. Quantisers have a block of 32 in each lane; products decode a vector of codes at a time, in whose order x is laid out
// once.
#include "mx.h"

#include "factor.h"
#include "mx/spans.h"
#include "philox.h"

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

// Its bits: NaN is above all.
inline uint32_t largest_of(const float (&v)[kMxBlock]) {
  uint32_t largest = 0;
  for (float x : v) largest = std::max(largest, bit_cast<uint32_t>(x) & 0x7fffffffu);
  return largest;
}
// kLanes blocks, one in each lane: v[i] has their elements i. Along rows neighbours lie behind one another, of a matrix that lies
// across beside one another. Lanes past the end have the last block.
template <class X>
struct Blocks {
  int64_t t[kLanes], g[kLanes];
  vf v[kMxBlock];

  Blocks(const MxQuantizeParams& p, int64_t first) {
    const int64_t G = ceil_div(p.K, int64_t{kMxBlock}), last = p.T * G - 1;
    const bool across = p.x_column != 1;
    const X* x[kLanes];
    bool whole = true, beside = across && first + kLanes - 1 <= last;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t at = std::min(first + i, last);
      t[i] = across ? at % p.T : at / G, g[i] = across ? at / p.T : at % G;
      x[i] = static_cast<const X*>(p.x) + t[i] * p.x_row + g[i] * kMxBlock * p.x_column;
      whole = whole && (g[i] + 1) * kMxBlock <= p.K;
      beside = beside && x[i] == x[0] + i;
    }
    if (whole && beside) {
      for (int i = 0; i < kMxBlock; ++i) v[i] = load(x[0] + i * p.x_column);
    } else if (whole && !across) {
      for (int i = 0; i < kMxBlock; i += kLanes) {
        vf part[kLanes];
        for (int l = 0; l < kLanes; ++l) part[l] = load(x[l] + i);
        transpose(part);
        std::copy_n(part, kLanes, v + i);
      }
    } else {
      for (int i = 0; i < kMxBlock; ++i)
        for (int l = 0; l < kLanes; ++l) v[i][l] = g[l] * kMxBlock + i < p.K ? to_float(x[l][i * p.x_column]) : 0.f;
    }
  }
};

// hadamard32 of each lane.
inline void hadamard(vf (&v)[kMxBlock], uint32_t signs) {
  for (int i = 0; i < kMxBlock; ++i) v[i] = (vf)((vu)v[i] ^ (signs >> i & 1u) << 31);
#pragma GCC unroll 5
  for (int h = 1; h < kMxBlock; h *= 2)
#pragma GCC unroll 32
    for (int i = 0; i < kMxBlock; ++i)
      if (!(i & h)) {
        const vf a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
  for (vf& x : v) x = x * 0.17677669529663687f;
}

// The scale's byte of each lane.
inline vu scales_of(MxRule rule, const vf (&v)[kMxBlock]) {
  float of[kLanes] = {};
  if (is_quest(rule)) {
    for (const vf& x : v)
      for (int l = 0; l < kLanes; ++l) of[l] = fmaf(x[l], x[l], of[l]);
    for (float& x : of) x = sqrtf(x / kMxBlock);
  } else {
    vu largest = {};
    for (const vf& x : v) {
      const vu bits = (vu)x & 0x7fffffffu;
      largest = bits > largest ? bits : largest;  // NaN is above all
    }
    store_as(of, largest);
  }
  vu scale;
  for (int l = 0; l < kLanes; ++l) scale[l] = mx_scale(rule, of[l]);
  return scale;
}

// e2m1_code and e2m1_stochastic of each lane. What is true is -1.
inline vu code_of(vf x) {
  const vf a = (vf)((vu)x & 0x7fffffffu);
  const vi above = (a > .25f) + (a >= .75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.f);
  return (vu)-above | ((vu)x >> 28 & 8u);
}
inline vu code_of(vf x, vu bits) {
  const vf a = (vf)((vu)x & 0x7fffffffu);
  const vu low = (vu) - ((a >= .5f) + (a >= 1.f) + (a >= 1.5f) + (a >= 2.f) + (a >= 3.f) + (a >= 4.f) + (a >= 6.f));
  const vf step = low < 4u ? splat(2.f) : low < 6u ? splat(1.f) : splat(.5f);
  const vf part = (a - (vf)(low << 22) * 0x1p126f) * step * 65536.f;
  const vi up = (vi)(low < 7u) & (__builtin_convertvector((vi)bits, vf) + .5f < part);
  return (low - (vu)up) | ((vu)x >> 28 & 8u);
}

template <class X>
void quantize(const MxQuantizeParams& p) {
  const int64_t G = ceil_div(p.K, int64_t{kMxBlock}), blocks = p.T * G;
  const uint64_t seed = p.seed ? static_cast<uint64_t>(*p.seed) : 0;
  const uint32_t signs = p.signs ? static_cast<uint32_t>(*p.signs) : 0;
  parallel_for(ceil_div(blocks, int64_t{kLanes}), grain(4 * kMxBlock * kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kLanes; first < std::min(end * kLanes, blocks); first += kLanes) {
      Blocks<X> of(p, first);
      if (p.hadamard) hadamard(of.v, signs);
      const vu scale = scales_of(p.rule, of.v), number = (vu)(scale != 255u);
      vf inverse;
      for (int l = 0; l < kLanes; ++l) inverse[l] = e8m0_inverse(scale[l]);
      vu within = {}, words[4] = {}, random[4];
      for (int i = 0; i < kMxBlock; ++i) {
        const vf y = of.v[i] * inverse * p.gain;
        vu code;
        if (p.seed) {
          if (i % 8 == 0) {
            for (int l = 0; l < kLanes; ++l) {
              const Philox counter = mx_counter(of.t[l], of.g[l] * (kMxBlock / 8) + i / 8);
              for (int w = 0; w < 4; ++w) random[w][l] = counter.v[w];
            }
            philox_rounds<0>(random, seed);
          }
          code = code_of(y, random[i / 2 % 4] >> (i % 2 * 16) & 0xffffu);
        } else {
          code = code_of(y);
        }
        words[i / 8] |= (code & number) << (i % 8 * 4);
        within |= (vu)((vf)((vu)y & 0x7fffffffu) < 6.f) & (1u << i);
      }
      for (int l = 0; l < std::min<int64_t>(kLanes, blocks - first); ++l) {
        const int64_t to = of.t[l] * G + of.g[l];
        for (int w = 0; w < 4; ++w) store_as(p.codes + to * kMxBytes + 4 * w, static_cast<uint32_t>(words[w][l]));
        p.scales[to] = static_cast<uint8_t>(scale[l]);
        if (p.mask) p.mask[to] = static_cast<int32_t>(within[l]);
      }
    }
  });
}

// ---- decode

// The first `count` values of a span in the order of its vectors.
template <class Y>
void put_span(const float* span, int64_t count, Y* y) {
  alignas(64) float v[kSpan];
  for (int l = 0; l < kSpanBlocks; ++l) take_block(span, l, v + l * kMxBlock);
  int64_t i = 0;
  for (; i + kLanes <= std::min<int64_t>(count, kSpan); i += kLanes) store(y + i, load(v + i));
  for (; i < std::min<int64_t>(count, kSpan); ++i) y[i] = from_float<Y>(v[i]);
}
// n values (whole blocks) of a row of codes, times their scales.
template <class Y>
void decode_row(const uint8_t* codes, const uint8_t* scales, int64_t n, Y* y) {
  for_quads(codes, scales, 0, 0, ceil_div(n, int64_t{kMxBlock}), [&](int64_t g, const uint8_t* c, const uint8_t* s) {
    alignas(64) float of_blocks[kLanes], span[kSpan];
    store(of_blocks, scales_of(fields_of(s)));
    for (int q = 0; q < kQuad; ++q) {
      const int64_t k = g * kMxBlock + q * kSpan;
      const Values values(words_of(c, q));
      for (int j = 0; j < 8; ++j) store(span + j * kLanes, values.of[j] * spread(of_blocks, q));
      put_span(span, n - k, y + k);
    }
  });
}

template <class Y>
void dequantize(const MxDequantizeParams& p) {
  parallel_for(p.T, grain(p.columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      decode_row(p.codes + t * p.pitch, p.scales + t * p.scale_pitch, p.columns, static_cast<Y*>(p.y) + t * p.y_pitch);
  });
}

// ---- products of few rows

// Rows of x are multiplied in groups of eight, four, two and alone: that of row t of T.
struct Group {
  int64_t count, first;
  Group(int64_t t, int64_t T)
      : count(t < T / 8 * 8   ? 8
              : t < T / 4 * 4 ? 4
              : t < T / 2 * 2 ? 2
                              : 1),
        first(t / count * count) {}
};
// Rows of x that meet codes, in fp32. A block's products are summed before they are scaled, so that numbers of 2^112 and more
// go element by element (dot_slowly).
struct Floats {
  static constexpr int kPart = 512;  // vectors of x to work on at a time: they stay in the first cache
  float* rows;                       // of each group [n][its rows][8][kLanes]
  int64_t T, n;

  static int64_t floats(int64_t T, int64_t G) { return T * spans_of(G) * kSpan; }
  Floats(float* memory, int64_t count, int64_t G) : rows(memory), T(count), n(spans_of(G)) {}

  template <class X>
  bool lay_out(const X* x, int64_t K, int64_t t) const {
    const Group group(t, T);
    uint32_t largest = 0;
    for (int64_t g = 0; g < n * kSpanBlocks; ++g) {
      alignas(64) float v[kMxBlock];
      load_block(x + g * kMxBlock, 1, static_cast<int>(std::clamp<int64_t>(K - g * kMxBlock, 0, kMxBlock)), v);
      largest = std::max(largest, largest_of(v));
      const int64_t at = group.first * n + g / kSpanBlocks * group.count + t - group.first;
      lay_out_block(v, static_cast<int>(g % kSpanBlocks), rows + at * kSpan);
    }
    return largest < (127u + 112u) << 23;
  }
  // Adds blocks g0 to g1 of a row of W times rows t0 to t0 + kT of x to their lanes; whether that is what they are.
  template <int kT>
  bool dot(const MxWeight& w, int64_t o, int64_t g0, int64_t g1, int64_t t0, vf* lanes) const {
    vf total[kT];
    for (int t = 0; t < kT; ++t) total[t] = lanes[t];
    for_quads(w, o, g0, g1, [&](int64_t g, const uint8_t* c, const uint8_t* s) {
      alignas(64) float scales[kLanes];
      store(scales, scales_of(fields_of(s)));
      const float* x = rows + (t0 * n + g / kSpanBlocks * kT) * kSpan;
      for (int q = 0; q < kQuad; ++q) {
        const Values values(words_of(c, q));
        vf sum[kT] = {};
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
#pragma GCC unroll 8
          for (int t = 0; t < kT; ++t) sum[t] += values.of[j] * load(x + (q * kT + t) * kSpan + j * kLanes);
        for (int t = 0; t < kT; ++t) total[t] += sum[t] * spread(scales, q);
      }
    });
    for (int t = 0; t < kT; ++t) lanes[t] = total[t];
    return true;
  }
};

#if defined(__AVX2__)

// One row of x. In a block it is an integer of 31 bits times a power of two, in four digits of base 256 from -128 to
// 127, and a code is a byte, 12 above twice its value. So products of bytes, summed in 16 bits and then in 32, are exact over a
// block, and blocks meet in fp32. What the 12 of each code brings is taken off. Most of bf16 has no lower two digits,
// and what is 0 takes no part. Lane 4 l + j of a product has elements 8 j to 8 j + 7 of a span's block l.
// Units and scales multiply to normal numbers, and their products with sums do not overflow, where x's largest number lies in
// [2^-48, 2^56), or is 0, and scales in [2^-63, 2^64]. And where eight numbers of a block and more are below 1/128 of its
// largest 31 bits are too few for fp32. Such rows of x are summed in fp32, those of W element by element.
struct Integers {
  using Digits = int8_t[2][2][4 * kLanes];  // the higher of two and the lower: even elements, odd ones; 16 to a block
  struct Span {
    Digits high;
    int32_t high_twelves[kLanes];
    Digits low;
    int32_t low_twelves[kLanes];
  };
  static constexpr int kPart = 1 << 20;
  static constexpr uint32_t kLeastField = 127 - 48, kMostField = 127 + 56, kLeastScale = 127 - 63;
  static_assert(kLeastField + kLeastScale >= 142 + 1 && kMostField + kLeastScale + 127 - 142 - 127 + 22 <= 254);

  Span* spans;      // [n]
  float* units;     // [n kSpanBlocks]: the power of two, with that of the higher digits, 2^16, and that of codes, 2^-1
  uint8_t* digits;  // [n]: how many of the lower two digits there are, of fp32 both
  int64_t n;

  static int64_t floats(int64_t, int64_t G) {
    return spans_of(G) * static_cast<int64_t>(sizeof(Span) / sizeof(float) + kSpanBlocks + 1);
  }
  Integers(float* memory, int64_t, int64_t G)
      : spans(reinterpret_cast<Span*>(memory)),
        units(reinterpret_cast<float*>(spans + spans_of(G))),
        digits(reinterpret_cast<uint8_t*>(units + spans_of(G) * kSpanBlocks)),
        n(spans_of(G)) {}

  static vi product(Bytes even, Bytes odd, const int8_t (&x)[2][4 * kLanes], int16_t times) {
    const Bytes sum = add_16(multiply_8(even, load_as<Bytes>(x[0])), multiply_8(odd, load_as<Bytes>(x[1])));
    return (vi)multiply_16(sum, all_16(times));
  }
  static vi product(Bytes even, Bytes odd, const Digits& x, bool both = true) {
    const vi first = product(even, odd, x[0], 256);
    return both ? first + product(even, odd, x[1], 1) : first;
  }

  // The unit of block l of a span.
  static float lay_out_block(const float (&v)[kMxBlock], uint32_t largest, int l, Span& span, uint8_t& digits) {
    // The largest becomes at least 2^30, and less than 2^31 - 2^24, so that its digits fit.
    const uint32_t field = std::clamp((largest + 0x20000u) >> 23, kLeastField, kMostField);
    const float inverse = bit_cast<float>((284u - field) << 23);
    typedef uint16_t pairs __attribute__((vector_size(16)));
    alignas(64) int32_t whole[kMxBlock];
    vi any = {};
    for (int i = 0; i < kMxBlock; i += kLanes) {
      const vi number = (integers_of(load(v + i) * inverse) + 0x00808080) ^ 0x00808080;  // its bytes are digits now
      any |= number;
      store_as(whole + i, number);
    }
    uint32_t some = 0;
    for (int i = 0; i < kLanes; ++i) some |= static_cast<uint32_t>(any[i]);
    digits = std::max<uint8_t>(digits, some & 0xffu ? 2 : some & 0xff00u ? 1 : 0);
    pairs r[8];  // of four elements each: digit after digit, its even and its odd elements
    for (int i = 0; i < 8; ++i)
      r[i] = (pairs)_mm_shuffle_epi8(load_as<__m128i>(whole + 4 * i),
                                     _mm_setr_epi8(3, 11, 7, 15, 2, 10, 6, 14, 1, 9, 5, 13, 0, 8, 4, 12));
    transpose(r);
    for (int i = 0; i < 8; ++i) store_as((i < 4 ? span.high : span.low)[i / 2 % 2][i % 2] + 16 * l, r[i]);
    return bit_cast<float>((field - 15u) << 23);
  }
  template <class X>
  bool lay_out(const X* x, int64_t K, int64_t) const {
    const Bytes twelve = set(_mm_set1_epi8(12));
    uint32_t most = 0;
    bool even = true;
    for (int64_t i = 0; i < n; ++i) {
      Span& span = spans[i];
      digits[i] = 0;
      for (int l = 0; l < kSpanBlocks; ++l) {
        alignas(64) float v[kMxBlock];
        const int64_t k = i * kSpan + l * kMxBlock;
        load_block(x + k, 1, static_cast<int>(std::clamp<int64_t>(K - k, 0, kMxBlock)), v);
        const uint32_t largest = largest_of(v);
        most = std::max(most, largest);
        int small = 0;  // beside the largest
        for (float value : v) small += (value != 0.f) & (fabsf(value) < bit_cast<float>(largest) * (1.f / 128));
        even &= sizeof(X) == 2 || small < 8;
        units[i * kSpanBlocks + l] = lay_out_block(v, largest, l, span, digits[i]);
      }
      store_as(span.high_twelves, product(twelve, twelve, span.high));
      store_as(span.low_twelves, product(twelve, twelve, span.low));
    }
    return even && (most == 0 || (most >= kLeastField << 23 && most < kMostField << 23));
  }
  template <int kT>
  bool dot(const MxWeight& w, int64_t o, int64_t g0, int64_t g1, int64_t, vf* lanes) const {
    static_assert(kT == 1);
    const Bytes table = set(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    vf total = *lanes;
    vu beyond = {};
    for_quads(w, o, g0, g1, [&](int64_t g, const uint8_t* c, const uint8_t* s) {
      alignas(64) float factors[kLanes];
      const vu fields = fields_of(s);
      beyond |= fields - kLeastScale;
      store(factors, load(units + g) * (vf)(fields << 23));
#pragma GCC unroll 4
      for (int q = 0; q < kQuad; ++q) {
        const Nibbles nibbles(words_of(c, q));
        const Bytes even = look_up(table, nibbles.of[0]), odd = look_up(table, nibbles.of[1]);
        const Span& span = spans[g / kSpanBlocks + q];
        vf sum = floats_of(product(even, odd, span.high) - load_as<vi>(span.high_twelves));
        if (const int more = digits[g / kSpanBlocks + q])
          sum += floats_of(product(even, odd, span.low, more > 1) - load_as<vi>(span.low_twelves)) * 0x1p-16f;
        total += sum * spread(factors, q);
      }
    });
    *lanes = total;
    uint32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= beyond[i];
    return any < 128u;
  }
};

#endif

// Element by element, of numbers of any size.
template <class X>
float dot_slowly(const uint8_t* codes, const uint8_t* scales, const X* x, int64_t K) {
  double sum = 0.;
  for (int64_t k = 0; k < K; ++k)
    sum += double{to_float(x[k])} *
           (double{e2m1_value(codes[k / 2] >> (k % 2 * 4) & 15u)} * e8m0_value(scales[k / kMxBlock]));
  return static_cast<float>(sum);
}

template <class Rows, class X, class B>
struct Product {
  using S = TypeOfS<B>;
  static constexpr int kRows = 16;  // of W at a time

  const MxLinearParams& p;
  const Rows x;
  const int64_t G = p.w.G();
  bool plain[kMxFewCpu];  // rows of x that `x` is right for

  explicit Product(const MxLinearParams& params)
      : p(params), x(thread_scratch(static_cast<size_t>(Rows::floats(p.T, p.w.G()))), p.T, p.w.G()) {
    for (int64_t t = 0; t < p.T; ++t) plain[t] = x.lay_out(row(t), p.w.K, t);
  }
  const X* row(int64_t t) const { return static_cast<const X*>(p.x) + t * p.x_pitch; }
  const S* s(int64_t t) const { return static_cast<const S*>(p.s) + t * p.R; }
  const B* b(int64_t o) const { return static_cast<const B*>(p.b) + o * p.R; }

  // kRows of W from o0 on times kT of x, in parts of K of which x stays in the first cache for all of them. S B^T is in the same
  // lanes, but for the last R % kLanes.
  template <int kT>
  void rows(int64_t o0, int64_t t0) const {
    constexpr int kPart = Rows::kPart / 8 / kT * kSpanBlocks;
    const int count = static_cast<int>(std::min<int64_t>(kRows, p.w.O - o0));
    vf lanes[kRows * kT] = {};
    bool fits[kRows];
    std::fill_n(fits, kRows, true);
    for (int i = 0; p.s && i < count; ++i)
      for (int t = 0; t < kT; ++t)
        for (int32_t r = 0; r + kLanes <= p.R; r += kLanes)
          lanes[i * kT + t] += load(s(t0 + t) + r) * load(b(o0 + i) + r);
    for (int64_t g = 0; g < G; g += kPart)
      for (int i = 0; i < count; ++i)
        fits[i] &= x.template dot<kT>(p.w, o0 + i, g, std::min(g + kPart, G), t0, lanes + i * kT);
    for (int i = 0; i < count * kT; i += 4) {
      const v4f four = sum_lanes(lanes[i], lanes[i + 1], lanes[i + 2], lanes[i + 3]);
      for (int j = i; j < std::min(i + 4, count * kT); ++j)
        put(o0 + j / kT, t0 + j % kT, fits[j / kT] && plain[t0 + j % kT], four[j - i]);
    }
  }
  void put(int64_t o, int64_t t, bool good, float sum) const {
    int32_t r = p.R / kLanes * kLanes;
    if (!good) sum = dot_slowly(p.w.codes + o * G * kMxBytes, p.w.scales + o * G, row(t), p.w.K), r = 0;
    for (; p.s && r < p.R; ++r) sum += to_float(s(t)[r]) * to_float(b(o)[r]);
    if (p.bias) sum += to_float(static_cast<const X*>(p.bias)[o]);
    static_cast<X*>(p.y)[t * p.w.O + o] = from_float<X>(sum);
  }
  void all(int64_t o) const {
    if constexpr (std::is_same_v<Rows, Floats>)
      for (int64_t t = 0; t < p.T;) {
        const Group group(t, p.T);
        if (group.count == 8) rows<8>(o, t);
        if (group.count == 4) rows<4>(o, t);
        if (group.count == 2) rows<2>(o, t);
        if (group.count == 1) rows<1>(o, t);
        t += group.count;
      }
    else
      rows<1>(o, 0);
  }
};

template <class Rows, class X, class B>
bool linear_by(const MxLinearParams& p, bool all_plain) {
  const Product<Rows, X, B> product(p);
  if (all_plain && !product.plain[0]) return false;
  constexpr int64_t kRows = product.kRows;
  parallel_for(ceil_div(p.w.O, kRows), grain(kRows * p.w.K * p.T), [&](int64_t begin, int64_t end) {
    for (int64_t o = kRows * begin; o < std::min(kRows * end, p.w.O); o += kRows) product.all(o);
  });
  return true;
}
template <class X, class B>
void linear(const MxLinearParams& p) {
#if defined(__AVX2__)
  if (p.T == 1 && linear_by<Integers, X, B>(p, true)) return;
#endif
  linear_by<Floats, X, B>(p, false);
}

// ---- dX of few rows. A task has so many blocks of its columns and walks all of W's rows, some at a time.
constexpr int kDxBlocks = 1024 / kMxBlock, kDxRows = 8;

// Adds kDxRows times eight vectors and a factor of each, which f gives, to sums.
template <class F>
[[gnu::always_inline]] inline void add_rows(float* sums, const F& f) {
  vf sum[8], v[8];
  for (int j = 0; j < 8; ++j) sum[j] = load(sums + j * kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kDxRows; ++r) {
    const vf factor = f(r, v);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] += v[j] * factor;
  }
  for (int j = 0; j < 8; ++j) store(sums + j * kLanes, sum[j]);
}

template <class X>
void linear_dx(const MxLinearDxParams& p) {
  const int64_t G = p.w.G(), O = p.w.O;
  parallel_for(ceil_div(G, int64_t{kDxBlocks}), 1, [&](int64_t begin, int64_t end) {
    uint8_t some_codes[kDxRows * kLanes * kMxBytes], some_scales[kDxRows * kLanes];
    float* sums = thread_scratch(static_cast<size_t>(p.T * kDxBlocks * kMxBlock));  // [spans][T][8][kLanes]
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kDxBlocks, last = std::min(first + kDxBlocks, G);
      std::fill_n(sums, p.T * kDxBlocks * kMxBlock, 0.f);
      for (int64_t o = 0; o < O; o += kDxRows) {
        for (int64_t g = first; g < last; g += kLanes) {
          const auto of = [&](const uint8_t* bytes, int64_t each) { return bytes + (o * G + g) * each; };
          const uint8_t *codes = of(p.w.codes, kMxBytes), *scales = of(p.w.scales, 1);
          int64_t pitch = G;
          for (int r = 0; r < kDxRows; ++r)
            for (int i = 0; i < kLanes * kMxBytes; i += 64)
              __builtin_prefetch(codes + (kDxRows + r) * G * kMxBytes + i);
          if (o + kDxRows > O || g + kLanes > last) {  // zeros past an end
            std::fill_n(some_codes, sizeof some_codes, 0), std::fill_n(some_scales, sizeof some_scales, 127);
            for (int64_t r = 0; r < std::min<int64_t>(kDxRows, O - o); ++r) {
              const int64_t n = std::min<int64_t>(kLanes, last - g);
              std::copy_n(codes + r * G * kMxBytes, n * kMxBytes, some_codes + r * kLanes * kMxBytes);
              std::copy_n(scales + r * G, n, some_scales + r * kLanes);
            }
            codes = some_codes, scales = some_scales, pitch = kLanes;
          }
          const auto dy = [&](int64_t t, int r) {
            return o + r < O ? to_float(static_cast<const X*>(p.dy)[t * p.dy_pitch + o + r]) : 0.f;
          };
          alignas(64) float factors[kDxRows][kLanes];
          for (int r = 0; r < kDxRows; ++r)
            store(factors[r], scales_of(fields_of(scales + r * pitch)) * (p.T == 1 ? dy(0, r) : 1.f));
          for (int q = 0; q < kQuad; ++q) {
            const auto words = [&](int r) { return words_of(codes + r * pitch * kMxBytes, q); };
            float* to = sums + ((g - first) / kSpanBlocks + q) * p.T * kSpan;
            if (p.T == 1) {
              add_rows(to, [&](int r, vf(&v)[8]) {
                const Values values(words(r));
                std::copy_n(values.of, 8, v);
                return spread(factors[r], q);
              });
              continue;
            }
            vf values[kDxRows][8];
            for (int r = 0; r < kDxRows; ++r) {
              const Values v(words(r));
              const vf s = spread(factors[r], q);
              for (int j = 0; j < 8; ++j) values[r][j] = v.of[j] * s;
            }
            for (int64_t t = 0; t < p.T; ++t)
              add_rows(to + t * kSpan, [&](int r, vf(&v)[8]) {
                std::copy_n(values[r], 8, v);
                return splat(dy(t, r));
              });
          }
        }
      }
      for (int64_t t = 0; t < p.T; ++t) {
        X* dx = static_cast<X*>(p.dx) + t * p.w.K;
        for (int64_t k = first * kMxBlock; k < std::min(p.w.K, last * kMxBlock); k += kSpan)
          put_span(sums + ((k / kMxBlock - first) / kSpanBlocks * p.T + t) * kSpan, p.w.K - k, dx + k);
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
