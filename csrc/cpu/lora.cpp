// SPDX-License-Identifier: Apache-2.0
// LoRA on the CPU. Compiled once per instruction set; the baseline copy also holds the entry points that choose one.
#include "lora.h"

#include <algorithm>

#include "tile.h"

namespace lrk {
namespace LRK_ISA {
namespace {

static_assert(kChunk == kCpuChunk, "workspace sizes follow kCpuChunk");

constexpr int kTileRows = 24;   // tokens per fp32 tile: 48 KB
constexpr int kRankBlock = 64;  // shrink: ranks per task, so that one token with a large rank still has tasks to share;
                                // expand: ranks summed at a time

int64_t tile_rows(int64_t T) { return std::min<int64_t>(T, kTileRows); }

// Tasks of `work` multiply-adds that a thread takes at once: some 10 us, below which a second thread costs more than it
// brings.
int64_t grain(int64_t work) { return std::max<int64_t>(1, 262144 / std::max<int64_t>(1, work)); }

template <class F>
void with_float(DType t, const F& f) {
  if (t == DType::kF32) return f(float{});
  if (t == DType::kF16) return f(f16{});
  f(bf16{});
}

template <class F>
inline void transpose_4x4(const F* src, int64_t src_pitch, float* dst, int64_t dst_pitch) {
  v4f rows[4];
  for (int i = 0; i < 4; ++i) {
    const F* p = src + i * src_pitch;
    rows[i] = v4f{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  transpose(rows);
  for (int i = 0; i < 4; ++i) store_as(dst + i * dst_pitch, rows[i]);
}

// Packs U [R, N] into fp32 tiles [chunk][R][kChunk], zero-padded to kBlock columns.
template <class F>
void pack_factor(const Factor& u, int32_t R, int64_t N, float* packed) {
  if (!R) return;
  const F* data = static_cast<const F*>(u.data);
  const int64_t chunks = ceil_div(N, kChunk), pieces = R > 64 ? 8 : 1, step = ceil_div(R, pieces);
  parallel_for(chunks * pieces, std::max<int64_t>(1, 32768 / (kChunk * step)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / pieces, r0 = task % pieces * step, r1 = std::min<int64_t>(R, r0 + step);
      const int64_t n = std::min<int64_t>(kChunk, N - c * kChunk);
      float* tile = packed + c * R * kChunk;
      if (r0 >= r1) continue;
      if (u.stride_n == 1) {
        load_tile(data + r0 * u.stride_r, u.stride_r, 0, static_cast<int>(r1 - r0), c * kChunk, static_cast<int>(n),
                  Dropout{}, 0, tile + r0 * kChunk);
        continue;
      }
      const F* src = data + c * kChunk * u.stride_n;
      int64_t r = r0;
      for (; r + 4 <= r1; r += 4) {  // 4 x 4 blocks, so that loads and stores are vectors
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) transpose_4x4(src + i * u.stride_n + r, u.stride_n, tile + r * kChunk + i, kChunk);
        for (; i < n; ++i)
          for (int64_t j = r; j < r + 4; ++j) tile[j * kChunk + i] = to_float(src[i * u.stride_n + j]);
      }
      for (; r < r1; ++r)
        for (int64_t i = 0; i < n; ++i) tile[r * kChunk + i] = to_float(src[i * u.stride_n + r]);
      for (r = r0; r < r1; ++r)
        for (int64_t i = n; i < round_up(n, kBlock); ++i) tile[r * kChunk + i] = 0.f;
    }
  });
}

template <class F>
void load_floats(const F* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

template <class X, class F>
void shrink(const LoraShrinkParams& p, float* packed) {
  pack_factor<F>(p.u, p.R, p.N, packed);
  const X* x = static_cast<const X*>(p.x);
  F* s = static_cast<F*>(p.s);
  const uint64_t seed = p.dropout.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const int64_t rank_blocks = ceil_div(p.R, kRankBlock), tasks = ceil_div(p.T, kTileRows) * rank_blocks;
  parallel_for(tasks, grain(tile_rows(p.T) * p.N * std::min<int64_t>(p.R, kRankBlock)),
               [&](int64_t begin, int64_t end) {
                 alignas(64) float tile[kTileRows * kChunk], acc[kTileRows * kRankBlock];
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t t0 = task / rank_blocks * kTileRows, r0 = task % rank_blocks * kRankBlock;
                   const int rows = static_cast<int>(std::min<int64_t>(kTileRows, p.T - t0));
                   const int ranks = static_cast<int>(std::min<int64_t>(kRankBlock, p.R - r0));
                   std::fill_n(acc, rows * kRankBlock, 0.f);
                   for (int64_t c = 0; c * kChunk < p.N; ++c) {
                     const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - c * kChunk));
                     load_tile(x, p.x_pitch, t0, rows, c * kChunk, n, p.dropout, seed, tile);
                     dot_tiles(tile, rows, packed + (c * p.R + r0) * kChunk, ranks, n, acc, kRankBlock);
                   }
                   for (int t = 0; t < rows; ++t)
                     for (int r = 0; r < ranks; ++r)
                       s[(t0 + t) * p.R + r0 + r] = from_float<F>(p.scale * acc[t * kRankBlock + r]);
                 }
               });
}

// y = c base + bias + scale add, one row of a tile.
template <bool kScaled, class X>
inline void finish_row(X* y, const X* base, const float* c, const X* bias, const float* add, float scale, int n) {
  const auto at = [&](int i, auto width) {
    const auto get = [&](const auto* p) {
      if constexpr (width.value == 1) {
        return to_float(p[i]);
      } else {
        return load(p + i);
      }
    };
    auto v = scale * get(add);
    if (bias) v += get(bias);
    if (base) {
      if constexpr (kScaled) {
        v += get(base) * get(c);
      } else {
        v += get(base);
      }
    }
    return v;
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, at(i, std::integral_constant<int, kLanes>{}));
  for (; i < n; ++i) y[i] = from_float<X>(at(i, std::integral_constant<int, 1>{}));
}

template <class X, class F>
void expand(const LoraExpandParams& p, float* packed) {
  pack_factor<F>(p.u, p.R, p.N, packed);
  X* y = static_cast<X*>(p.y);
  const X *base = static_cast<const X*>(p.base), *bias = static_cast<const X*>(p.bias);
  const F* s = static_cast<const F*>(p.s);
  const uint64_t seed = p.dropout.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const int64_t chunks = ceil_div(p.N, kChunk), tasks = ceil_div(p.T, kTileRows) * chunks;
  parallel_for(tasks, grain(tile_rows(p.T) * std::min<int64_t>(p.N, kChunk) * p.R), [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kTileRows * kChunk], sf[kTileRows * kMaxRank], mask[kChunk];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t0 = task / chunks * kTileRows, c = task % chunks;
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, p.T - t0));
      const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - c * kChunk));
      load_floats(s + t0 * p.R, rows * static_cast<int64_t>(p.R), sf);
      const float* u = packed + c * p.R * kChunk;
      outer_tiles<false>(sf, p.R, 1, u, std::min<int64_t>(p.R, kRankBlock), rows, n, tile);
      for (int64_t r = kRankBlock; r < p.R; r += kRankBlock)
        outer_tiles<true>(sf + r, p.R, 1, u + r * kChunk, std::min<int64_t>(p.R - r, kRankBlock), rows, n, tile);
      for (int t = 0; t < rows; ++t) {
        const int64_t col = c * kChunk;
        float* add = tile + t * kChunk;
        if (p.dropout.threshold) {
          dropout_row(p.dropout, seed, t0 + t, col, n, mask);
          for (int i = 0; i < n; ++i) add[i] = mask[i] != 0.f ? add[i] * mask[i] : 0.f;
        }
        X* dst = y + (t0 + t) * p.y_pitch + col;
        const X* src = base ? base + (t0 + t) * p.base_pitch + col : nullptr;
        const X* b = bias ? bias + col : nullptr;
        if (p.base_scale) {
          finish_row<true>(dst, src, p.base_scale + col, b, add, p.scale, n);
        } else {
          finish_row<false>(dst, src, nullptr, b, add, p.scale, n);
        }
      }
    }
  });
}

template <class X>
void rescale(const LoraRescaleParams& p, float* planes) {
  const X *dy = static_cast<const X*>(p.dy), *base = static_cast<const X*>(p.base);
  X* dz = static_cast<X*>(p.dz);
  const int64_t chunks = ceil_div(p.N, kChunk), segments = ceil_div(p.T, kRescaleRows);
  parallel_for(chunks * segments, grain(std::min<int64_t>(p.T, kRescaleRows) * std::min<int64_t>(p.N, kChunk)),
               [&](int64_t begin, int64_t end) {
                 alignas(64) float sum[kChunk];
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t segment = task / chunks, col = task % chunks * kChunk;
                   const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - col));
                   const int64_t last = std::min<int64_t>(p.T, (segment + 1) * kRescaleRows);
                   std::fill_n(sum, n, 0.f);
                   for (int64_t t = segment * kRescaleRows; t < last; ++t) {
                     const X* d = dy + t * p.dy_pitch + col;
                     if (p.dc) {
                       const X* b = base + t * p.base_pitch + col;
                       int i = 0;
                       for (; i + kLanes <= n; i += kLanes) store(sum + i, load(sum + i) + load(d + i) * load(b + i));
                       for (; i < n; ++i) sum[i] += to_float(d[i]) * to_float(b[i]);
                     }
                     if (!dz) continue;
                     X* z = dz + t * p.N + col;
                     const float* c = p.base_scale + col;
                     int i = 0;
                     for (; i + kLanes <= n; i += kLanes) store(z + i, load(c + i) * load(d + i));
                     for (; i < n; ++i) z[i] = from_float<X>(c[i] * to_float(d[i]));
                   }
                   if (p.dc) std::copy_n(sum, n, planes + segment * p.N + col);
                 }
               });
  if (!p.dc) return;
  std::fill_n(p.dc, p.N, 0.f);
  for (int64_t k = 0; k < segments; ++k)
    for (int64_t i = 0; i < p.N; ++i) p.dc[i] += planes[k * p.N + i];
}

// G = scale * the sum of the planes [segment][chunk][R][kChunk], segment by segment.
template <class F>
void reduce_planes(const LoraWgradParams& p, const float* planes) {
  F* g = static_cast<F*>(p.g);
  const int64_t segment = wgrad_segment(p.T, kCpuSegment), segments = ceil_div(p.T, segment);
  const int64_t chunks = ceil_div(p.N, kChunk), plane = chunks * p.R * kChunk;
  parallel_for(chunks * p.R, 64, [&](int64_t begin, int64_t end) {
    alignas(64) float sum[kChunk];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t c = row / p.R, r = row % p.R;
      const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - c * kChunk));
      std::fill_n(sum, n, 0.f);
      for (int64_t k = 0; k < segments; ++k) {
        const float* src = planes + k * plane + row * kChunk;
        for (int i = 0; i < n; ++i) sum[i] += src[i];
      }
      F* dst = g + r * p.g_stride_r + c * kChunk * p.g_stride_n;
      for (int i = 0; i < n; ++i) dst[i * p.g_stride_n] = from_float<F>(p.scale * sum[i]);
    }
  });
}

// One task of wgrad: a chunk of N and a segment of T, read once. Where kShrink, the same tile also gives its part of
// dS, partial[chunk][T][R].
template <bool kShrink, class X, class F>
void wgrad_planes(const LoraWgradParams& p, float* planes, const float* packed, float* partial) {
  const X* x = static_cast<const X*>(p.x);
  const F* s = static_cast<const F*>(p.s);
  const uint64_t seed = p.dropout.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const int64_t segment = wgrad_segment(p.T, kCpuSegment), segments = ceil_div(p.T, segment);
  const int64_t chunks = ceil_div(p.N, kChunk), plane = chunks * p.R * kChunk;
  const int64_t tokens = std::min<int64_t>(p.T, segment);
  parallel_for(chunks * segments, grain(tokens * std::min<int64_t>(p.N, kChunk) * p.R),
               [&](int64_t begin, int64_t end) {
                 alignas(64) float tile[kTileRows * kChunk], sf[kTileRows * kMaxRank];
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t c = task % chunks, k = task / chunks, last = std::min<int64_t>(p.T, (k + 1) * segment);
                   const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - c * kChunk));
                   float* g = planes + k * plane + c * p.R * kChunk;
                   for (int64_t t0 = k * segment; t0 < last; t0 += kTileRows) {
                     const int rows = static_cast<int>(std::min<int64_t>(kTileRows, last - t0));
                     load_tile(x, p.x_pitch, t0, rows, c * kChunk, n, p.dropout, seed, tile);
                     load_floats(s + t0 * p.R, rows * static_cast<int64_t>(p.R), sf);
                     if (t0 == k * segment) {
                       outer_tiles<false>(sf, 1, p.R, tile, rows, p.R, n, g);
                     } else {
                       outer_tiles<true>(sf, 1, p.R, tile, rows, p.R, n, g);
                     }
                     if constexpr (kShrink) {
                       float* ds = partial + (c * p.T + t0) * p.R;
                       std::fill_n(ds, rows * static_cast<int64_t>(p.R), 0.f);
                       dot_tiles(tile, rows, packed + c * p.R * kChunk, p.R, n, ds, p.R);
                     }
                   }
                 }
               });
}

template <class X, class F>
void wgrad(const LoraWgradParams& p, float* planes) {
  wgrad_planes<false, X, F>(p, planes, nullptr, nullptr);
  reduce_planes<F>(p, planes);
}

template <class X, class F>
void shrink_wgrad(const LoraShrinkWgradParams& both, float* workspace) {
  const LoraShrinkParams& p = both.shrink;
  const int64_t chunks = ceil_div(p.N, kChunk);
  float* packed = workspace;
  float* partial = packed + chunks * p.R * kChunk;
  float* planes = partial + round_up(chunks * p.T * p.R, 16);
  pack_factor<F>(p.u, p.R, p.N, packed);
  wgrad_planes<true, X, F>(both.wgrad, planes, packed, partial);
  reduce_planes<F>(both.wgrad, planes);
  F* s = static_cast<F*>(p.s);
  const int64_t count = p.T * p.R;
  parallel_for(count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0.f;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[c * count + i];
      s[i] = from_float<F>(p.scale * sum);
    }
  });
}

// Calls f(x tag, factor tag): the factors are fp32 or of x's dtype.
template <class F>
void with_types(DType x, DType factor, const F& f) {
  with_float(x, [&](auto xt) {
    if (factor == DType::kF32) return f(xt, float{});
    f(xt, xt);
  });
}

}  // namespace

void lora_shrink(const LoraShrinkParams& p, float* workspace) {
  with_types(p.dtype, p.factor_dtype, [&](auto x, auto f) { shrink<decltype(x), decltype(f)>(p, workspace); });
}
void lora_expand(const LoraExpandParams& p, float* workspace) {
  with_types(p.dtype, p.factor_dtype, [&](auto x, auto f) { expand<decltype(x), decltype(f)>(p, workspace); });
}
void lora_wgrad(const LoraWgradParams& p, float* workspace) {
  with_types(p.dtype, p.factor_dtype, [&](auto x, auto f) { wgrad<decltype(x), decltype(f)>(p, workspace); });
}
void lora_shrink_wgrad(const LoraShrinkWgradParams& p, float* workspace) {
  with_types(p.shrink.dtype, p.shrink.factor_dtype,
             [&](auto x, auto f) { shrink_wgrad<decltype(x), decltype(f)>(p, workspace); });
}

void lora_rescale(const LoraRescaleParams& p, float* workspace) {
  with_float(p.dtype, [&](auto x) { rescale<decltype(x)>(p, workspace); });
}

}  // namespace LRK_ISA

#if defined(LRK_ISA_ENTRY)
// The entry points, in the baseline copy only.
#define LRK_DECLARE(isa)                                                    \
  namespace isa {                                                           \
  void lora_shrink(const LoraShrinkParams& p, float* workspace);            \
  void lora_expand(const LoraExpandParams& p, float* workspace);            \
  void lora_wgrad(const LoraWgradParams& p, float* workspace);              \
  void lora_shrink_wgrad(const LoraShrinkWgradParams& p, float* workspace); \
  void lora_rescale(const LoraRescaleParams& p, float* workspace);          \
  }
#if defined(LRK_HAVE_AVX2)
LRK_DECLARE(avx2)
#define LRK_AVX2(call) \
  if (cpu_isa() == CpuIsa::kAvx2) return avx2::call;
#else
#define LRK_AVX2(call)
#endif
#if defined(LRK_HAVE_AVX512)
LRK_DECLARE(avx512)
#define LRK_AVX512(call) \
  if (cpu_isa() == CpuIsa::kAvx512) return avx512::call;
#else
#define LRK_AVX512(call)
#endif
#define LRK_BY_ISA(call) \
  LRK_AVX512(call)       \
  LRK_AVX2(call)         \
  baseline::call

void lora_shrink_cpu(const LoraShrinkParams& p, void* ws) { LRK_BY_ISA(lora_shrink(p, static_cast<float*>(ws))); }
void lora_expand_cpu(const LoraExpandParams& p, void* ws) { LRK_BY_ISA(lora_expand(p, static_cast<float*>(ws))); }
void lora_wgrad_cpu(const LoraWgradParams& p, void* ws) { LRK_BY_ISA(lora_wgrad(p, static_cast<float*>(ws))); }
void lora_shrink_wgrad_cpu(const LoraShrinkWgradParams& p, void* ws) {
  LRK_BY_ISA(lora_shrink_wgrad(p, static_cast<float*>(ws)));
}
void lora_rescale_cpu(const LoraRescaleParams& p, void* ws) { LRK_BY_ISA(lora_rescale(p, static_cast<float*>(ws))); }
#endif

}  // namespace lrk
