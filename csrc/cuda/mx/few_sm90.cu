// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias + S B^T of up to 16 rows on sm_90a. Operands are swapped: 64 rows of W are M of a wgmma, decoded in the
// registers of its A operand, 8 or 16 rows of x its N. Blocks take 128 rows of W and a part of K each, the last part S B^T as
// well; a second kernel adds up the parts in order. How K is cut does not depend on T, nor a row's bits.
#include "codes.cuh"
#include "cuda/launch_sm90.cuh"
#include "cuda/place.cuh"
#include "linear.cuh"

namespace lrk {
namespace {

constexpr int kFewThreads = 256, kFewWarps = kFewThreads / kWarpThreads;
constexpr int kChunk = 128, kChunks = kMxStep / kChunk;  // features of a thread's four neighbours; under way together
constexpr int kCodesBytes = kChunks * 2 * kFewThreads * kMxBytes;

// x in shared memory, of each chunk eight products' B operands [kTokens, 16] without a swizzle: 8 tokens x 8 of K are 128
// bytes in a row. Thread t's pair i of word w is k = 2 t and + 1 of half i mod 2 of product 2 w + i / 2.
constexpr int kHalf = 128, kTile = 2 * kHalf;  // bytes, of 8 tokens
template <int kTokens>
constexpr int kChunkBytes = 8 * kTile * kTokens / 8;

struct Source {
  const void* data;  // of T rows, of which these columns
  int64_t pitch, T, columns;
  bool vectors;
};
// By the whole block; a warp puts 8 tokens of a chunk there, pair(8 elements, i) each. What is not there is zeros.
template <int kTokens, class Src, class Pair>
__device__ __forceinline__ void stage(unsigned char* to, int chunks, const Source& from, const Pair& pair) {
  constexpr int kGroups = kTokens / 8;
  const int lane = lane_id(), t = lane % 4;
#pragma unroll 1
  for (int task = warp_id(); task < chunks * kGroups; task += kFewWarps) {
    const int chunk = task / kGroups, group = task % kGroups, n = group * 8 + lane / 4, k = chunk * kChunk + 32 * t;
    const Src* row = static_cast<const Src*>(from.data) + n * from.pitch + k;
    const int64_t left = n < from.T ? from.columns - k : 0;
    const auto put = [&](const Words8<Src>& v, int w) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned char* tile = to + ((chunk * 8 + 2 * w + i / 2) * kGroups + group) * kTile;
        *reinterpret_cast<uint32_t*>(tile + i % 2 * kHalf + lane / 4 * 16 + 4 * t) = pair(v, i);
      }
    };
    if (from.vectors && (chunk + 1) * kChunk <= from.columns) {
      Words8<Src> v[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) v[w] = load_row<true>(row + 8 * w, left, true);
#pragma unroll
      for (int w = 0; w < 4; ++w) put(v[w], w);
    } else {
#pragma unroll 1
      for (int w = 0; w < 4; ++w) put(load_row<false>(row + 8 * w, left - 8 * w, from.vectors), w);
    }
  }
}

// Of 8 numbers of a factor, pair i of a term. One of bf16; of fp32 [hi, hi, lo] of S meet [hi, lo, hi] of B, where what is not
// finite is in the first alone, so that it meets no zero.
template <class F>
constexpr int kFactorTerms = sizeof(F) == 2 ? 1 : 3;
template <bool kOfS, class F>
__device__ __forceinline__ uint32_t factor_pair(const Words8<F>& words, int term, int i) {
  if constexpr (sizeof(F) == 2) {
    return pair_of(words, i);
  } else {
    const Vec8<float> v = floats(words);
    const uint32_t hi = pack_fast<bf16>(v.v[i], v.v[i + 4]);
    if (term == 0) return hi;
    const float low = bit_cast<float>(hi << 16), high = bit_cast<float>(hi & 0xffff0000u);
    if (term == (kOfS ? 2 : 1)) return pack_fast<bf16>(rest(v.v[i], low), rest(v.v[i + 4], high));
    return (is_finite(low) ? hi & 0xffffu : 0u) | (is_finite(high) ? hi & 0xffff0000u : 0u);
  }
}

template <class B, int kTokens>
__global__ void __launch_bounds__(kFewThreads, 2)
    mx_few_kernel(MxLinearParams p, float* planes, int steps, bool vectors) {
  Smem smem;
  auto* x = smem.take<unsigned char>(kMxMostSteps * kChunks * kChunkBytes<kTokens>);  // later S
  auto* codes = smem.take<unsigned char>(kCodesBytes);
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  const int64_t o = (int64_t{blockIdx.x} * kFewWarps + warp_id()) * 16 + g, G = p.w.G(), K = p.w.K;
  const int64_t first = int64_t{blockIdx.y} * steps * kMxStep;  // feature
  const CodesRow rows[2] = {CodesRow(p.w, o), CodesRow(p.w, o + 8)};

  // A thread's own codes come by way of shared memory, a step ahead.
  uint32_t bytes[kChunks][2];  // scales
  const auto slot = [&](int i, int below) {
    return codes + ((2 * i + below) * kFewThreads + static_cast<int>(threadIdx.x)) * kMxBytes;
  };
  const auto load = [&](int step, int i) {
    const int64_t block = first / kMxBlock + (step * kChunks + i) * 4 + t;
    const bool there = step < steps && block < G;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      cp_async_16_zfill(slot(i, below), rows[below].codes + (there ? block * kMxBytes : 0), there ? kMxBytes : 0);
      bytes[i][below] = there ? rows[below].scales[block] : 0;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kChunks; ++i) load(0, i);

  stage<kTokens, bf16>(x, steps * kChunks, {static_cast<const bf16*>(p.x) + first, p.x_pitch, p.T, K - first, vectors},
                       [](const Words8<bf16>& v, int i) { return pair_of(v, i); });
  fence_async();
  sync_threads();

  float sum[kTokens / 2] = {};
  uint32_t a[2][4][4];  // of the products under way, and of those that are made meanwhile
  // Half of a chunk: words 2 half and + 1 of rows g and g + 8, pair(below, w, i) each.
  const auto make = [&](int half, const auto& pair) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[half][k][i] = pair(i % 2, 2 * half + k / 2, 2 * (k % 2) + i / 2);
  };
  const auto multiply = [&](const unsigned char* chunk, int half) {
    wgmma_fence(sum, a[half]);
    const uint64_t word = packed({shared_address(chunk), kHalf, kTile, Swizzle::kNone});
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma<bf16, kTokens>(sum, a[half][k], word + (4 * half + k) * kTile * kTokens / 8 / 16, true);
    wgmma_commit();
    wgmma_wait<1>(sum);
  };
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint32_t byte[2] = {bytes[i][0], bytes[i][1]};
      const bool large =
          any_lane((byte[0] > byte[1] ? byte[0] : byte[1]) > kOneProduct);  // wgmma is for all warps alike
      uint32_t words[2][4];
      cp_async_wait<kChunks - 1>();
      load_16(words[0], slot(i, 0)), load_16(words[1], slot(i, 1));
      load(step + 1, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (large) {
          const Scale scales[2] = {Scale(byte[0]), Scale(byte[1])};
          make(half, [&](int below, int w, int j) { return pair_of<true>(words[below][w], j, scales[below]); });
        } else {
          const Scale scales[2] = {Scale::small(byte[0]), Scale::small(byte[1])};
          make(half, [&](int below, int w, int j) { return pair_of<false>(words[below][w], j, scales[below]); });
        }
        multiply(x + (step * kChunks + i) * kChunkBytes<kTokens>, half);
      }
    }
  }
  if (p.s && blockIdx.y + 1 == gridDim.y) {
    using S = TypeOfS<B>;
    const auto whole = [&](const void* data) { return p.R % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    const int of_term = ceil_div(p.R, kChunk), chunks = of_term * kFactorTerms<B>;
    static_assert(kMaxRank / kChunk * 3 <= kMxMostSteps * kChunks);
    wgmma_wait<0>(sum);
    sync_threads();
#pragma unroll 1
    for (int term = 0; term < kFactorTerms<B>; ++term)
      stage<kTokens, S>(x + term * of_term * kChunkBytes<kTokens>, of_term, {p.s, p.R, p.T, p.R, whole(p.s)},
                        [&](const Words8<S>& v, int i) { return factor_pair<true>(v, term, i); });
    fence_async();
    sync_threads();
    const B* from[2];
#pragma unroll
    for (int below = 0; below < 2; ++below)
      from[below] = static_cast<const B*>(p.b) + (o + 8 * below < p.w.O ? o + 8 * below : p.w.O - 1) * p.R;
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      const int term = c / of_term, r = c % of_term * kChunk + 32 * t;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Words8<B> v[2][2];
#pragma unroll
        for (int below = 0; below < 2; ++below)
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            const int at = r + 8 * (2 * half + w);
            v[below][w] = load_row<false>(from[below] + at, p.R - at, whole(p.b));
          }
        make(half, [&](int below, int w, int j) { return factor_pair<false>(v[below][w % 2], term, j); });
        multiply(x + c * kChunkBytes<kTokens>, half);
      }
    }
  }
  wgmma_wait<0>(sum);
  launch_dependents();
  float* plane = planes + int64_t{blockIdx.y} * p.T * p.w.O;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int64_t n = i / 4 * 8 + 2 * t + i % 2, row = o + i / 2 % 2 * 8;
    if (n < p.T && row < p.w.O) plane[n * p.w.O + row] = sum[i];
  }
}

__global__ void __launch_bounds__(kBlockThreads, 8) mx_sum_kernel(MxLinearParams p, const float* planes, int parts) {
  const int64_t at = grid_thread(), all = p.T * p.w.O;
  if (at >= all) return;
  const float bias = p.bias ? to_float_fast(static_cast<const bf16*>(p.bias)[at % p.w.O]) : 0.f;
  wait_predecessor();
  float sum = 0.f;
#pragma unroll 4
  for (int i = 0; i < parts; ++i) sum += planes[i * all + at];
  static_cast<bf16*>(p.y)[at] = from_float_fast<bf16>(sum + bias);
}

}  // namespace

int mx_few_sm90(const MxLinearParams& p, const MxFused& config, void* workspace, Stream stream) {
  auto* planes = static_cast<float*>(workspace);
  const bool vectors = can_vectorize(p.x, p.x_pitch, sizeof(bf16));
  const int error = with_bool(p.s && p.b_dtype == DType::kF32, [&](auto wide) {
    using B = std::conditional_t<wide.value, float, bf16>;
    return with_bool(p.T > 8, [&](auto more) {
      constexpr int kTokens = more.value ? 16 : 8;
      constexpr size_t kSmem = smem_bytes<unsigned char>(kMxMostSteps * kChunks * kChunkBytes<kTokens>) +
                               smem_bytes<unsigned char>(kCodesBytes);
      return launch("mx_few", mx_few_kernel<B, kTokens>, grid_of(ceil_div(p.w.O, int64_t{kMxTile}), config.parts),
                    dim3(kFewThreads), kSmem, stream, p, planes, config.steps, vectors);
    });
  });
  if (error) return error;
  return launch("mx_sum", mx_sum_kernel, grid_of_threads(p.T * p.w.O), dim3(kBlockThreads), 0, stream,
                LaunchOptions{.after_predecessor = true}, p, static_cast<const float*>(planes), config.parts);
}

}  // namespace lrk
