// SPDX-License-Identifier: Apache-2.0
// MX on CUDA, sm_80 and up. A thread quantises a block of 32, or decodes a word of 8 codes. A product of few rows: 16 rows of W
// are M of the mma and 8 rows of x its N; codes come straight from global memory, 32 of a row in a thread, and become bf16 in registers.
#include "cuda/place.cuh"
#include "mx.h"

namespace lrk {
namespace {

// ---- quantise. Neighbouring threads have neighbouring blocks, or rows where a matrix lies across.

template <class X, bool kHadamard, bool kRandom>
__global__ __launch_bounds__(kBlockThreads, 4) void mx_quantize_kernel(MxQuantizeParams p) {
  const int64_t at = grid_thread(), G = ceil_div(p.K, int64_t{kMxBlock});
  if (at >= p.T * G) return;
  const bool across = p.x_column != 1;
  const int64_t t = across ? at % p.T : at / G, g = across ? at / p.T : at % G, k = g * kMxBlock;
  const X* x = static_cast<const X*>(p.x) + t * p.x_row + k * p.x_column;
  float v[kMxBlock];
#pragma unroll
  for (int i = 0; i < kMxBlock; ++i) v[i] = k + i < p.K ? to_float_fast(x[i * p.x_column]) : 0.f;
  if constexpr (kHadamard) hadamard32(v, p.signs ? static_cast<uint32_t>(*p.signs) : 0u);
  float of;
  if (is_quest(p.rule)) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kMxBlock; ++i) sum = fmaf(v[i], v[i], sum);
    of = sqrtf(sum / kMxBlock);
  } else {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kMxBlock; ++i) {
      const uint32_t bits = bit_cast<uint32_t>(v[i]) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    of = bit_cast<float>(largest);
  }
  const uint32_t scale = mx_scale(p.rule, of);
  const float inverse = e8m0_inverse(scale);
  uint32_t within = 0, words[4] = {};
#pragma unroll
  for (int i = 0; i < kMxBlock; i += 8) {
    Philox random{};
    if constexpr (kRandom) random = mx_random(static_cast<uint64_t>(*p.seed), t, (k + i) / 8);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float y = mul_rn(v[i + j] * inverse, p.gain);
      within |= static_cast<uint32_t>(fabsf(y) < 6.f) << (i + j);
      uint32_t code;
      if constexpr (kRandom) {
        code = e2m1_stochastic(y, bits16(random, j));
      } else {
        code = e2m1_code(y);
      }
      words[i / 8] |= scale == 255u ? 0u : code << (4 * j);
    }
  }
  const int64_t to = t * G + g;
  store_16(p.codes + to * kMxBytes, words);
  const uint8_t byte = static_cast<uint8_t>(scale);
  p.scales[to] = byte;
  const int32_t mask = static_cast<int32_t>(within);
  if (p.mask) p.mask[to] = mask;
}

// ---- decode

template <class Y>
__global__ __launch_bounds__(kBlockThreads, 8) void mx_dequantize_kernel(MxDequantizeParams p, int shift,
                                                                         bool vectors) {
  const Place at(shift);
  const int64_t first = int64_t{at.group} * 8;
  if (at.row >= p.T || first >= p.columns) return;
  const uint32_t word = *reinterpret_cast<const uint32_t*>(p.codes + at.row * p.pitch + first / 2);
  const float scale = e8m0_value(p.scales[at.row * p.scale_pitch + first / kMxBlock]);
  Y* y = static_cast<Y*>(p.y) + at.row * p.y_pitch + first;
  Vec8<float> v;
#pragma unroll
  for (int j = 0; j < 8; ++j) v.v[j] = e2m1_value(word >> (4 * j) & 15u) * scale;
  if (vectors && first + 8 <= p.columns) {
    store_words(y, rounded<Y>(v));
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Y one = from_float_fast<Y>(v.v[j]);
    if (first + j < p.columns) y[j] = one;
  }
}

// ---- Y = X W^T of few rows. Block: 16 rows of W, eight warps that share its chunks of 128 features.
// Thread 4 g + t of a warp has block t of a chunk, of rows g and g + 8: four words of 8 codes each. Codes i and i + 4 of a word
// become a pair by two shifts, so that is the order of features that x is put in as well.

constexpr int kMxThreads = 256, kMxWarps = kMxThreads / kWarpThreads, kMxRows = 16, kMxAhead = 2;

struct Codes {
  uint32_t words[4];
  uint32_t scale;  // twice, as bf16
};

__device__ __forceinline__ Codes load_codes(const MxWeight& w, int64_t row, int64_t g) {
  Codes c = {};
  if (row >= w.O || g >= w.G()) return c;
  const int64_t at = row * w.G() + g;
  load_16(c.words, w.codes + at * kMxBytes);
  const uint32_t byte = w.scales[at];
  const uint32_t half = byte == 0u ? 0x0040u : byte == 255u ? 0x7fc0u : byte << 7;
  c.scale = half | half << 16;
  return c;
}
// Codes i and i + 4 of a word times their scale.
__device__ __forceinline__ uint32_t pair_of(uint32_t word, int i, uint32_t scale) {
  const uint32_t moved = word >> (4 * i);
  const uint32_t raw = (moved << 12 & 0x80008000u) | (moved << 6 & 0x01c001c0u);  // times 2^-126
  return mul_bf16x2(mul_bf16x2(raw, 0x7e807e80u), scale);
}

// x of one row in block g, as bf16 terms: pairs (i, i + 4) of each of four runs of 8 features.
template <class X>
struct Features {
  static constexpr int kTerms = sizeof(X) == 2 ? (std::is_same_v<X, f16> ? 2 : 1) : 3;
  uint32_t pairs[kTerms][4][4];

  __device__ __forceinline__ void load(const X* x, int64_t K, int64_t g, bool there, bool vectors) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t k = g * kMxBlock + 8 * i;
      Vec8<float> v = {};
      if (there && vectors && k + 8 <= K) {
        Words8<X> words;
        load_words(words, x + k);
        v = floats(words);
      } else if (there) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v.v[j] = k + j < K ? to_float_fast(x[k + j]) : 0.f;
      }
#pragma unroll
      for (int term = 0; term < kTerms; ++term)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t pair = pack_fast<bf16>(v.v[j], v.v[j + 4]);
          pairs[term][i][j] = pair;
          v.v[j] -= bit_cast<float>(pair << 16);
          v.v[j + 4] -= bit_cast<float>(pair & 0xffff0000u);
        }
    }
  }
};

template <class X, class B, int kTiles>
__global__ __launch_bounds__(kMxThreads, 1) void mx_linear_kernel(MxLinearParams p, bool vectors) {
  Smem smem;
  float* sums = smem.take<float>(kMxWarps * kTiles * kMxRows * 8);
  const int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
  const int64_t o0 = int64_t{blockIdx.x} * kMxRows, chunks = ceil_div(p.w.G(), int64_t{4});
  float acc[kTiles][4] = {};
  for (int64_t c0 = warp; c0 < chunks; c0 += kMxWarps * kMxAhead) {
    Codes low[kMxAhead], high[kMxAhead];
#pragma unroll
    for (int i = 0; i < kMxAhead; ++i) {
      const int64_t block = (c0 + i * kMxWarps) * 4 + t;
      low[i] = load_codes(p.w, o0 + g, block);
      high[i] = load_codes(p.w, o0 + g + 8, block);
    }
#pragma unroll
    for (int i = 0; i < kMxAhead; ++i) {
      const int64_t block = (c0 + i * kMxWarps) * 4 + t;
      Features<X> x[kTiles];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int64_t row = 8 * n + g;
        x[n].load(static_cast<const X*>(p.x) + row * p.x_pitch, p.w.K, block, row < p.T && block < p.w.G(), vectors);
      }
#pragma unroll
      for (int w = 0; w < 4; ++w)
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          const uint32_t a[4] = {
              pair_of(low[i].words[w], half, low[i].scale), pair_of(high[i].words[w], half, high[i].scale),
              pair_of(low[i].words[w], half + 1, low[i].scale), pair_of(high[i].words[w], half + 1, high[i].scale)};
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int term = 0; term < Features<X>::kTerms; ++term) {
              const uint32_t b[2] = {x[n].pairs[term][w][half], x[n].pairs[term][w][half + 1]};
              mma_16816(acc[n], a, b, bf16{});
            }
        }
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[((warp * kTiles + n) * kMxRows + g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[n][i];
  sync_threads();
  // Row of W, and row of x in its tile.
  for (int at = static_cast<int>(threadIdx.x); at < kTiles * kMxRows * 8; at += kMxThreads) {
    const int64_t o = o0 + at / 8 % kMxRows, row = at / (kMxRows * 8) * 8 + at % 8;
    if (o >= p.w.O || row >= p.T) continue;
    float sum = 0.f;
    for (int w = 0; w < kMxWarps; ++w) sum += sums[w * kTiles * kMxRows * 8 + at];
    if (p.bias) sum += to_float_fast(static_cast<const X*>(p.bias)[o]);
    if (p.s) {
      using S = TypeOfS<B>;
      const B* b = static_cast<const B*>(p.b) + o * p.R;
      const S* s = static_cast<const S*>(p.s) + row * p.R;
      float beside = 0.f;
      for (int r = 0; r < p.R; ++r) beside += to_float_fast(s[r]) * to_float_fast(b[r]);
      sum += beside;
    }
    const X y = from_float_fast<X>(sum);
    static_cast<X*>(p.y)[row * p.w.O + o] = y;
  }
}

}  // namespace

int mx_quantize_cuda(const MxQuantizeParams& p, void*, Stream stream) {
  const int64_t blocks = p.T * ceil_div(p.K, int64_t{kMxBlock});
  return with_float(p.dtype, [&]<class X>(X) {
    return with_bool(p.hadamard, [&](auto hadamard) {
      return with_bool(p.seed != nullptr, [&](auto random) {
        return launch("mx_quantize", mx_quantize_kernel<X, hadamard.value, random.value>, grid_of_threads(blocks),
                      dim3(kBlockThreads), 0, stream, p);
      });
    });
  });
}

int mx_dequantize_cuda(const MxDequantizeParams& p, void*, Stream stream) {
  const PlaceGrid at = place_grid(p.T, ceil_div(p.columns, int64_t{8}));
  const bool vectors = can_vectorize(p.y, p.y_pitch, size_of(p.dtype));
  return with_float(p.dtype, [&]<class Y>(Y) {
    return launch("mx_dequantize", mx_dequantize_kernel<Y>, at.grid, dim3(kBlockThreads), 0, stream, p, at.shift,
                  vectors);
  });
}

int mx_linear_cuda(const MxLinearParams& p, void*, Stream stream) {
  const bool vectors = can_vectorize(p.x, p.x_pitch, size_of(p.dtype));
  return with_types(p.dtype, p.b_dtype, [&]<class X, class B>(X, B) {
    return with_bool(p.T > 8, [&](auto two) {
      constexpr int kTiles = two.value ? 2 : 1;
      return launch("mx_linear", mx_linear_kernel<X, B, kTiles>, grid_of(ceil_div(p.w.O, int64_t{kMxRows}), 1),
                    dim3(kMxThreads), smem_bytes<float>(kMxWarps * kTiles * kMxRows * 8), stream, p, vectors);
    });
  });
}

}  // namespace lrk
