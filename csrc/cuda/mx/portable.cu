// SPDX-License-Identifier: Apache-2.0
// MX on CUDA, sm_80 and up. A thread quantises a block of 32, or decodes a word of 8 codes. A product of few rows: 16 rows of W
// are M of the mma and 8 rows of x its N; codes come straight from global memory, 32 of a row in a thread, and become bf16 in registers.
#include "codes.cuh"
#include "cuda/place.cuh"

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
// Thread 4 g + t of a warp has block t of a chunk, of rows g and g + 8: four words of 8 codes each (codes.cuh).

constexpr int kMxThreads = 256, kMxWarps = kMxThreads / kWarpThreads, kMxRows = 16;

// x of one row in a block, as bf16 terms: pairs (i, i + 4) of each of four runs of 8 features. bf16 is one term and comes from x
// itself; two of f16 and three of fp32 are made once for all rows of W (mx_terms_kernel), words [T][G][kTerms][16].
template <class X>
struct Features {
  static constexpr int kTerms = mx_terms(std::is_same_v<X, bf16>  ? DType::kBF16
                                         : std::is_same_v<X, f16> ? DType::kF16
                                                                  : DType::kF32);
  using Source = std::conditional_t<kTerms == 1, X, uint32_t>;
  uint32_t pairs[kTerms][4][4];

  // kPlain: rows are aligned, of whole blocks.
  template <bool kPlain>
  __device__ __forceinline__ void load(const bf16* x, int64_t left, bool vectors) {
    if (kPlain) left = left > 0 ? kMxBlock : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Words8<bf16> words = load_row<kPlain>(x + 8 * i, left - 8 * i, vectors);
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[0][i][j] = pair_of(words, j);
    }
  }
  __device__ __forceinline__ void load(const uint32_t* terms, bool there) {
#pragma unroll
    for (int term = 0; term < kTerms; ++term)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t (&words)[4] = pairs[term][i];
        words[0] = words[1] = words[2] = words[3] = 0;
        if (there) load_16(words, terms + term * (kMxBlock / 2) + 4 * i);
      }
  }
};

// A thread splits 8 features of a row.
template <class X>
__global__ __launch_bounds__(kBlockThreads, 8) void mx_terms_kernel(MxLinearParams p, uint32_t* terms, int shift,
                                                                    bool vectors) {
  const Place at(shift);
  constexpr int kTerms = Features<X>::kTerms;
  const int64_t k = int64_t{at.group} * 8, G = p.w.G();
  if (at.row >= p.T || k >= G * kMxBlock) return;
  terms += (at.row * G + at.group / 4) * kTerms * (kMxBlock / 2) + at.group % 4 * 4;
  const X* x = static_cast<const X*>(p.x) + at.row * p.x_pitch + k;
  Vec8<float> v = floats(load_row<false>(x, p.w.K - k, vectors));
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = pack_fast<bf16>(v.v[j], v.v[j + 4]);
      v.v[j] = rest(v.v[j], bit_cast<float>(words[j] << 16));
      v.v[j + 4] = rest(v.v[j + 4], bit_cast<float>(words[j] & 0xffff0000u));
    }
    store_16(terms + term * (kMxBlock / 2), words);
  }
}

// A thread's block of two rows of W times the same features of kTiles tiles of x.
template <bool kLarge, class X, int kTiles>
__device__ __forceinline__ void multiply(float (&acc)[kTiles][4], const Codes& low, const Codes& high,
                                         const Features<X> (&x)[kTiles]) {
  const Scale of_low(low.byte), of_high(high.byte);
#pragma unroll
  for (int w = 0; w < 4; ++w)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t a[4] = {pair_of<kLarge>(low.words[w], i, of_low), pair_of<kLarge>(high.words[w], i, of_high),
                             pair_of<kLarge>(low.words[w], i + 1, of_low),
                             pair_of<kLarge>(high.words[w], i + 1, of_high)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int term = 0; term < Features<X>::kTerms; ++term) {
          const uint32_t b[2] = {x[n].pairs[term][w][i], x[n].pairs[term][w][i + 1]};
          mma_16816(acc[n], a, b, bf16{});
        }
    }
}

// Shared memory: a sum of each warp for 16 rows of W and 8 of each tile of x.
template <int kTiles>
constexpr int kMxSums = kMxWarps * kTiles * kMxRows * 8;

// The block's rows of W times `count` rows of x, up to 8 kTiles; row_of(i) is where the i-th lies among those of x, y and s.
template <class X, class B, int kTiles, bool kPlain, class RowOf>
__device__ __forceinline__ void multiply_rows(const MxLinearParams& p, bool vectors, float* sums, int64_t count,
                                              const RowOf& row_of) {
  constexpr int kAhead = Features<X>::kTerms * kTiles == 1 ? 2 : 1;  // chunks whose loads are under way together
  const int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
  const int64_t o0 = int64_t{blockIdx.x} * kMxRows, G = p.w.G();
  const CodesRow low_row(p.w, o0 + g), high_row(p.w, o0 + g + 8);
  using Source = typename Features<X>::Source;
  const Source* rows[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int64_t i = 8 * n + g;
    rows[n] = static_cast<const Source*>(p.x) + row_of(i < count ? i : count - 1) * p.x_pitch;
  }
  float acc[kTiles][4] = {};
  for (int64_t first = 4 * warp; first < G; first += 4 * kMxWarps * kAhead) {
    Codes low[kAhead], high[kAhead];
    Features<X> x[kAhead][kTiles];
    const auto load = [&](auto whole) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t block = first + 4 * kMxWarps * i + t, k = block * kMxBlock;
        low[i] = low_row.load(block, whole.value || block < G);
        high[i] = high_row.load(block, whole.value || block < G);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if constexpr (Features<X>::kTerms == 1) {
            x[i][n].template load<kPlain>(rows[n] + k, whole.value ? kMxBlock : p.w.K - k, vectors);
          } else {
            x[i][n].load(rows[n] + k / 2 * Features<X>::kTerms, whole.value || block < G);
          }
        }
      }
    };
    if (kPlain && first + 4 * kMxWarps * (kAhead - 1) + 4 <= G) {  // nothing to ask for
      load(std::true_type{});
    } else {
      load(std::false_type{});
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t largest = low[i].byte > high[i].byte ? low[i].byte : high[i].byte;
      if (any_lane(largest > kOneProduct)) {
        multiply<true>(acc, low[i], high[i], x[i]);
      } else {
        multiply<false>(acc, low[i], high[i], x[i]);
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
    const int64_t o = o0 + at / 8 % kMxRows, i = at / (kMxRows * 8) * 8 + at % 8;
    if (o >= p.w.O || i >= count) continue;
    const int64_t row = row_of(i);
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

template <class X, class B, int kTiles, bool kPlain>
__global__ __launch_bounds__(kMxThreads, 1) void mx_linear_kernel(MxLinearParams p, bool vectors) {
  Smem smem;
  float* sums = smem.take<float>(kMxSums<kTiles>);
  multiply_rows<X, B, kTiles, kPlain>(p, vectors, sums, p.T, [](int64_t i) { return i; });
}

// Block (16 rows of W, tile of the plan): the tile's rows, 8 kTiles at a time.
template <class X, class B, int kTiles, bool kPlain>
__global__ __launch_bounds__(kMxThreads, 1) void mx_linear_experts_kernel(MxExpertsParams p, bool vectors) {
  Smem smem;
  float* sums = smem.take<float>(kMxSums<kTiles>);
  const PlanRows tile = plan_rows(p.plan, plan_layout(p.of.T, p.E), blockIdx.y);
  const int32_t* order = p.plan + tile.start;
  const int64_t e = tile.group - 1, O = p.of.w.O, o0 = int64_t{blockIdx.x} * kMxRows;
  if (e < 0 || e >= p.E) {
    const X fill = from_float_fast<X>(e < 0 ? 0.f : not_a_number());
    for (int at = static_cast<int>(threadIdx.x); at < tile.count * kMxRows; at += kMxThreads)
      if (o0 + at % kMxRows < O) static_cast<X*>(p.of.y)[order[at / kMxRows] * O + o0 + at % kMxRows] = fill;
    return;
  }
  MxLinearParams of = p.of;
  of.w.codes += e * O * of.w.G() * kMxBytes, of.w.scales += e * O * of.w.G();
  if (of.bias) of.bias = static_cast<const X*>(of.bias) + e * O;
  if (of.s) of.b = static_cast<const B*>(of.b) + e * O * of.R;
  for (int left = tile.count;;) {
    multiply_rows<X, B, kTiles, kPlain>(of, vectors, sums, left, [&](int64_t i) { return int64_t{order[i]}; });
    order += 8 * kTiles, left -= 8 * kTiles;
    if (left <= 0) break;
    sync_threads();
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

namespace {

// by(p, x, b, tiles, plain, grid of the rows of W, bytes of shared memory, vectors) of a product of so many rows at a time, p with
// x as the kernel reads it.
template <class By>
int with_rows(MxLinearParams p, int64_t rows, void* terms, Stream stream, const By& by) {
  const bool vectors = can_vectorize(p.x, p.x_pitch, size_of(p.dtype));
  return with_types(p.dtype, p.b_dtype, [&]<class X, class B>(X x, B b) {
    constexpr bool kSplit = Features<X>::kTerms > 1;
    if constexpr (kSplit) {
      const int64_t G = p.w.G();
      const PlaceGrid at = place_grid(p.T, 4 * G);
      const int error = launch("mx_terms", mx_terms_kernel<X>, at.grid, dim3(kBlockThreads), 0, stream, p,
                               static_cast<uint32_t*>(terms), at.shift, vectors);
      if (error) return error;
      p.x = terms, p.x_pitch = G * Features<X>::kTerms * (kMxBlock / 2);
    }
    return with_bool(rows > 8, [&](auto two) {
      constexpr int kTiles = two.value ? 2 : 1;
      const auto call = [&](auto plain) {
        return by(p, x, b, std::integral_constant<int, kTiles>{}, plain, ceil_div(p.w.O, int64_t{kMxRows}),
                  smem_bytes<float>(kMxSums<kTiles>), vectors);
      };
      if constexpr (kSplit) {
        return call(std::true_type{});
      } else {
        return with_bool(vectors && p.w.K % kMxBlock == 0, call);
      }
    });
  });
}

}  // namespace

int mx_linear_cuda(const MxLinearParams& p, void* terms, Stream stream) {
  return with_rows(p, p.T, terms, stream,
                   [&]<class X, class B>(const MxLinearParams& q, X, B, auto tiles, auto plain, int64_t blocks,
                                         size_t smem, bool vectors) {
                     return launch("mx_linear", mx_linear_kernel<X, B, tiles.value, plain.value>, grid_of(blocks, 1),
                                   dim3(kMxThreads), smem, stream, q, vectors);
                   });
}

int mx_linear_experts_cuda(const MxExpertsParams& p, void* terms, Stream stream) {
  const int64_t rows = choose_mx_experts_way(p.of.T, p.E, cuda_target()).rows;
  const int64_t G = plan_layout(p.of.T, p.E).G;
  return with_rows(p.of, rows, terms, stream,
                   [&]<class X, class B>(const MxLinearParams& q, X, B, auto tiles, auto plain, int64_t blocks,
                                         size_t smem, bool vectors) {
                     MxExpertsParams of = p;
                     of.of = q;
                     return launch("mx_linear_experts", mx_linear_experts_kernel<X, B, tiles.value, plain.value>,
                                   grid_of(blocks, G), dim3(kMxThreads), smem, stream, of, vectors);
                   });
}

}  // namespace lrk
