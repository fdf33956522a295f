// SPDX-License-Identifier: Apache-2.0
// LoRA on CUDA, sm_80 and up: four products over the tiles of products.cuh, the rescale pass and the sum of partial sums.
// Occupancy plan: blocks of 128 threads, at least two on an SM (255 registers), four for 16-bit shrink up to rank 16
// (128 registers). Shared memory stays under 48 KB but in shrink_wgrad, which holds a [64, 256] tile of dY: 46 to 96 KB.
#include "cuda/epilogue.cuh"
#include "cuda/products.cuh"

namespace lrk {
namespace {

template <class X>
constexpr int kUnroll = sizeof(X) == 4 ? 1 : 4;  // fp32 steps are long as they are, and more would spill

// kPlain of a kernel: operands are aligned and their rows whole vectors, and there is neither dropout nor what DoRA adds.
// Launchers choose it, so that its code is what it runs and fits an SM's instruction cache.
template <bool kPlain>
__device__ __forceinline__ Dropout dropout_of(const Dropout& d) {
  return kPlain ? Dropout{} : d;
}

template <class F, bool kPlain>
__device__ __forceinline__ Slab<F, kPlain> factor_slab(const Factor& u, bool n_contig, int64_t r, int64_t n, int64_t R,
                                                       int64_t N, bool vectorize) {
  if (n_contig) return slab<F, kPlain>(u.data, u.stride_r, r, n, R, N, vectorize);
  return slab<F, kPlain>(u.data, u.stride_n, n, r, N, R, vectorize);
}

// ---- S[T, R] = scale * D(X) U^T. Block (t tile, r tile, span of N); more than one plane: to partial [plane][T][R].

template <class X, class F, int kRanks>
constexpr int kShrinkBlocks =  // on an SM; where X is two terms, registers hold fewer
    kRanks == kCudaFewRanks && sizeof(X) == 2 && Math<X, F>::kXTerms == 1 ? 4 : 2;

template <class X, class F, int kRanks, bool kNContig, bool kPlain>
__global__ __launch_bounds__(kBlockThreads,
                             kShrinkBlocks<X, F, kRanks>) void lora_shrink_kernel(LoraShrinkParams p, Vectorize vec,
                                                                                  ShrinkSplit split, float* partial) {
  using Product = Shrink<X, F, kRanks, kNContig>;
  Smem smem;
  const Product product(smem);
  const int64_t t0 = int64_t{blockIdx.x} * kCudaTokens, r0 = int64_t{blockIdx.y} * kRanks;
  const Dropout dropout = dropout_of<kPlain>(p.dropout);
  const uint64_t seed = seed_of(dropout, p.seed);
  const int planes = split.span / split.plane;
  const int64_t columns = int64_t{split.plane} * kCudaChunk;
#pragma unroll 1
  for (int i = 0; i < planes; ++i) {
    const int64_t plane = int64_t{blockIdx.z} * planes + i, begin = plane * columns,
                  end = begin + columns < p.N ? begin + columns : p.N;
    if (begin >= end) return;
    typename Product::Sum sum = {};
    product.template run<kUnroll<X>>(
        sum, begin, end, [&](int64_t n) { return slab<X, kPlain>(p.x, p.x_pitch, t0, n, p.T, p.N, vec.x); },
        [&](int64_t n) { return factor_slab<F, kPlain>(p.u, kNContig, r0, n, p.R, p.N, vec.u); },
        [&](auto& stage, int64_t n) { stage.put(product.tx, dropout, seed, t0, n); },
        [](float before, float chunk) { return before + chunk; });
    for_each_element(sum, t0 + warp_id() * 16, r0, [&](int64_t t, int64_t r, float v) {
      if (t >= p.T || r >= p.R) return;
      store_sum(partial, (plane * p.T + t) * p.R + r, static_cast<TypeOfS<F>*>(p.s) + t * p.R + r, p.scale, v);
    });
  }
}

// ---- Y[T, N] = c * base + bias + scale * D(S U). Block (t tile, n tile).

template <class X>
constexpr bool kEarlyBase = sizeof(X) == 2;

template <class X, class F, bool kNContig, bool kPlain>
__global__ __launch_bounds__(kBlockThreads, 2) void lora_expand_kernel(LoraExpandParams p, Vectorize vec) {
  using Product = Expand<X, F, kNContig>;
  Smem smem;
  const Product product(smem);
  const int64_t t0 = int64_t{blockIdx.x} * kCudaTokens, n0 = int64_t{blockIdx.y} * kBN;
  using S = typename Product::S;
  const auto s_slab = [&](int r) { return slab<S, kPlain>(p.s, p.R, t0, r, p.T, p.R, vec.s); };
  Stage<S, typename Product::TileS> ss;
  Stage<F, typename Product::TileU> su;
  ss.fetch(s_slab(0));
  su.fetch(factor_slab<F, kPlain>(p.u, kNContig, 0, n0, p.R, p.N, vec.u));
  const X *base = static_cast<const X*>(p.base), *bias = static_cast<const X*>(p.bias);
  Words8<X> from[kBN / 16] = {};  // of base: under way while the product is made, where registers hold both
  const auto fetch_base = [&] {
    for_each_place<kBN / 8>(warp_id() * 16, [&](int i, int row, int col) {
      const int64_t t = t0 + row, n = n0 + col;
      if (base && t < p.T) from[i] = load_row<kPlain>(base + t * p.base_pitch + n, p.N - n, vec.x);
    });
  };
  if (kEarlyBase<X>) fetch_base();
  typename Product::Sum acc = {};
  for (int r = 0; r < p.R; r += kExpandK) {
    sync_threads();
    ss.put(product.ts);
    su.put(product.tu);
    sync_threads();
    if (r + kExpandK < p.R) {
      ss.fetch(s_slab(r + kExpandK));
      su.fetch(factor_slab<F, kPlain>(p.u, kNContig, r + kExpandK, n0, p.R, p.N, vec.u));
    }
    product.multiply(acc, p.R - r);
  }
  if (!kEarlyBase<X>) fetch_base();
  const Dropout dropout = dropout_of<kPlain>(p.dropout);
  const uint64_t seed = seed_of(dropout, p.seed);
  for_each_row(acc, warp_id() * 16, [&](int i, int row, int col, Vec8<float>& v) {
    const int64_t t = t0 + row, n = n0 + col;
    if (t >= p.T || n >= p.N) return;
    if (dropout.threshold) drop(v, dropout, seed, t, n);
    finish_row<kPlain>(static_cast<X*>(p.y) + t * p.y_pitch + n, from[i], p.N - n, vec.x, [&](float sum, int j) {
      if constexpr (!kPlain) {
        if (p.base_scale && n + j < p.N) sum *= p.base_scale[n + j];
        if (bias && n + j < p.N) sum += to_float_fast(bias[n + j]);
      }
      return sum + p.scale * v.v[j];
    });
  });
}

// ---- dZ[T, N] = c * dY, and per split of kRescaleRows tokens the sum of dY * base. Block (split, kRescaleCols columns): a
// lane has 8 columns, the four warps share the rows.

constexpr int kRescaleCols = kWarpThreads * 8;

template <class X>
__global__ __launch_bounds__(kBlockThreads) void lora_rescale_kernel(LoraRescaleParams p, bool vectorize,
                                                                     float* partial) {
  constexpr int kCols = kRescaleCols;
  Smem smem;
  float* sums = smem.take<float>(kWarps * kCols);  // [warp][column]
  const int warp = warp_id(), lane = lane_id();
  const int64_t n = int64_t{blockIdx.y} * kCols + lane * 8, t0 = int64_t{blockIdx.x} * kRescaleRows;
  const int64_t last = t0 + kRescaleRows < p.T ? t0 + kRescaleRows : p.T;
  float c[8], sum[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i] = n + i < p.N ? p.base_scale[n + i] : 0.f;
  for (int64_t t = t0 + warp; t < last && n < p.N; t += kWarps) {
    const Words8<X> dy = load_row(static_cast<const X*>(p.dy) + t * p.dy_pitch + n, p.N - n, vectorize);
    if (partial) {
      const Vec8<float> b = floats(load_row(static_cast<const X*>(p.base) + t * p.base_pitch + n, p.N - n, vectorize));
      const Vec8<float> d = floats(dy);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += d.v[i] * b.v[i];
    }
    if (!p.dz) continue;
    finish_row(static_cast<X*>(p.dz) + t * p.N + n, dy, p.N - n, vectorize, [&](float d, int i) { return c[i] * d; });
  }
  if (!partial) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[warp * kCols + lane * 8 + i] = sum[i];
  sync_threads();
  for (int i = static_cast<int>(threadIdx.x); i < kCols; i += kBlockThreads) {
    const int64_t col = int64_t{blockIdx.y} * kCols + i;
    float total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += sums[w * kCols + i];
    if (col < p.N) partial[int64_t{blockIdx.x} * p.N + col] = total;
  }
}

// ---- G[R, N] = scale * S^T D(X). Block (split of T, n tile, r tile); more than one split: to partial [split][R][N].

template <class F>
__device__ __forceinline__ void store_wgrad(const LoraWgradParams& p, float* partial, int64_t split, int64_t r,
                                            int64_t n, float v) {
  if (r >= p.R || n >= p.N) return;
  F* g = static_cast<F*>(p.g) + r * p.g_stride_r + n * p.g_stride_n;
  store_sum(partial, (split * p.R + r) * p.N + n, g, p.scale, v);
}

template <class X, class F, int kRanks, bool kPlain>
__global__ __launch_bounds__(kBlockThreads, 2) void lora_wgrad_kernel(LoraWgradParams p, Vectorize vec,
                                                                      float* partial) {
  using Product = Wgrad<X, F, kRanks>;
  Smem smem;
  const Product product(smem);
  const int64_t n0 = int64_t{blockIdx.y} * Product::kCols, r0 = int64_t{blockIdx.z} * kRanks;
  const int64_t length = split_tokens(p.T, kCudaSplit), begin = blockIdx.x * length;
  const int64_t end = begin + length < p.T ? begin + length : p.T;
  const Dropout dropout = dropout_of<kPlain>(p.dropout);
  const uint64_t seed = seed_of(dropout, p.seed);
  using S = typename Product::S;
  const auto s_slab = [&](int64_t t) { return slab<S, kPlain>(p.s, p.R, t, r0, end, p.R, vec.s); };
  const auto x_slab = [&](int64_t t) { return slab<X, kPlain>(p.x, p.x_pitch, t, n0, end, p.N, vec.x); };
  Stage<S, typename Product::TileS> ss;
  Stage<X, typename Product::TileX> sx;
  ss.fetch(s_slab(begin));
  sx.fetch(x_slab(begin));
  typename Product::Sum acc = {};
  for (int64_t t = begin; t < end; t += kCudaTokens) {
    sync_threads();
    ss.put(product.ts);
    sx.put(product.tx, dropout, seed, t, n0);
    sync_threads();
    if (t + kCudaTokens < end) {
      ss.fetch(s_slab(t + kCudaTokens));
      sx.fetch(x_slab(t + kCudaTokens));
    }
    product.template multiply<kCudaTokens / 16>(acc);
  }
  for_each_element(acc, r0 + product.rank0(), n0 + product.col0(),
                   [&](int64_t r, int64_t n, float v) { store_wgrad<F>(p, partial, blockIdx.x, r, n, v); });
}

// ---- dS and dB in one pass over dY. Block (split of T, chunk of N), up to kCudaFewRanks ranks, U = B [N, R].
// Partial sums of dS to s_partial [chunk][T][R], of dB as wgrad does.

template <class X, class F, bool kPlain>
struct ShrinkWgrad {
  using S = TypeOfS<F>;
  using TileX = TileOfX<X, S, kCudaTokens, kCudaChunk>;
  using TileU = TileOfU<X, S, kCudaFewRanks, kCudaChunk, false>;
  using TileS = TileOfF<X, S, kCudaTokens, kCudaFewRanks>;
  static constexpr int kWarpN = kCudaChunk / kWarps;
  static constexpr int kParts = kPlain && sizeof(X) == 2 ? 1 : 4;  // of a tile of dY, where registers hold no more
  static constexpr size_t kBytes = TileX::kBytes + TileU::kBytes + TileS::kBytes;
};

template <class X, class F, bool kPlain>
__global__ __launch_bounds__(kBlockThreads, 2) void lora_shrink_wgrad_kernel(LoraShrinkWgradParams both, Vectorize vec,
                                                                             float* s_partial, float* g_partial) {
  using Product = ShrinkWgrad<X, F, kPlain>;
  using TileX = typename Product::TileX;
  using TileU = typename Product::TileU;
  using TileS = typename Product::TileS;
  const LoraShrinkParams& p = both.shrink;
  Smem smem;
  const auto tx = take_tile<TileX>(smem);
  const auto tu = take_tile<TileU>(smem);
  const auto ts = take_tile<TileS>(smem);

  const int64_t length = split_tokens(p.T, kCudaSplit), begin = blockIdx.x * length;
  const int64_t end = begin + length < p.T ? begin + length : p.T, n0 = int64_t{blockIdx.y} * kCudaChunk;
  const int col0 = warp_id() * Product::kWarpN;
  Stage<F, TileU> su;
  su.fetch(factor_slab<F, kPlain>(p.u, false, 0, n0, p.R, p.N, vec.u));
  su.put(tu);
  Stage<typename Product::S, TileS> ss;
  Stage<X, TileX, Product::kParts> sx;
  const auto fetch = [&](int64_t t) {
    ss.fetch(slab<typename Product::S, kPlain>(both.wgrad.s, p.R, t, 0, end, p.R, vec.s));
    sx.fetch(slab<X, kPlain>(p.x, p.x_pitch, t, n0, end, p.N, vec.x));
  };
  fetch(begin);
  float db[Product::kWarpN / 8][4] = {};  // rows: ranks; columns n0 + col0 ..
  for (int64_t t = begin; t < end; t += kCudaTokens) {
    sync_threads();
    ss.put(ts);
    sx.put(tx);
#pragma unroll
    for (int part = 1; part < Product::kParts; ++part) {
      sx.fetch(slab<X, kPlain>(p.x, p.x_pitch, t, n0, end, p.N, vec.x), part);
      sx.put(tx, part);
    }
    sync_threads();
    if (t + kCudaTokens < end) fetch(t + kCudaTokens);
    float ds[kCudaFewRanks / 8][4] = {};
#pragma unroll(kUnroll<X>)
    for (int k = 0; k < kCudaChunk; k += 16)
      mma_step(ds, Operand<TileX, true>{tx}, Operand<TileU, false>{tu}, warp_id() * 16, 0, k);
#pragma unroll(kUnroll<X>)
    for (int k = 0; k < kCudaTokens; k += 16)
      mma_step(db, Operand<TileS, false>{ts}, Operand<TileX, false>{tx}, 0, col0, k);
    for_each_element(ds, t + warp_id() * 16, 0, [&](int64_t row, int64_t r, float v) {
      if (row < end && r < p.R) s_partial[(int64_t{blockIdx.y} * p.T + row) * p.R + r] = v;
    });
  }
  for_each_element(db, 0, n0 + col0,
                   [&](int64_t r, int64_t n, float v) { store_wgrad<F>(both.wgrad, g_partial, blockIdx.x, r, n, v); });
}

// ---- out[i, j] = scale * sum of partial [count][rows][cols], groups of `group` before their sums.

template <class F>
__global__ __launch_bounds__(kBlockThreads) void lora_sum_kernel(const float* partial, int64_t count, int64_t group,
                                                                 int64_t rows, int64_t cols, float scale, F* out,
                                                                 int64_t stride_i, int64_t stride_j) {
  const int64_t at = grid_thread();
  if (at >= rows * cols) return;
  float sum = 0.f, part = 0.f;
  int64_t left = group;
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) {
    part += partial[at + i * rows * cols];
    const bool last = --left == 0 || i + 1 == count;
    sum += last ? part : 0.f;
    if (last) part = 0.f, left = group;
  }
  out[at / cols * stride_i + at % cols * stride_j] = from_float_fast<F>(scale * sum);
}

template <class F>
int sum_to(void* out, int64_t stride_i, int64_t stride_j, const float* partial, int64_t count, int64_t group,
           int64_t rows, int64_t cols, float scale, Stream stream) {
  return launch("lora_sum", lora_sum_kernel<F>, grid_of_threads(rows * cols), dim3(kBlockThreads), 0, stream, partial,
                count, group, rows, cols, scale, static_cast<F*>(out), stride_i, stride_j);
}

// ---- launchers

bool in_eights(int64_t columns) { return columns % 8 == 0; }
int64_t pitch_of(const Factor& u) { return u.stride_n == 1 ? u.stride_r : u.stride_n; }

// Kept elements are scaled once, in the fp32 result, where the mask is a plain select in the operand.
template <class Params>
Params with_dropout_scale(Params p) {
  if (p.dropout.threshold) p.scale *= p.dropout.keep_scale;
  return p;
}

}  // namespace

int lora_shrink_cuda(const LoraShrinkParams& params, void* workspace, Stream stream) {
  const LoraShrinkParams p = with_dropout_scale(params);
  const ShrinkSplit split = choose_lora_shrink(p.T, p.N, p.R, cuda_target());
  float* partial = split.planes > 1 ? static_cast<float*>(workspace) : nullptr;
  const Vectorize vec{.x = can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      .u = can_vectorize(p.u.data, pitch_of(p.u), size_of(p.factor_dtype))};
  const bool plain = vec.x && vec.u && in_eights(p.N) && (p.u.stride_n == 1 || in_eights(p.R)) && !p.dropout.threshold;
  return with_types(p.dtype, p.factor_dtype, [&]<class X, class F>(X, F) {
    const auto run = [&](auto ranks, auto n_contig, auto plain) {
      return launch("lora_shrink", lora_shrink_kernel<X, F, ranks.value, n_contig.value, plain.value>,
                    grid_of(ceil_div(p.T, kCudaTokens), ceil_div(p.R, ranks.value), ceil_div(split.chunks, split.span)),
                    dim3(kBlockThreads), Shrink<X, F, ranks.value, n_contig.value>::kBytes, stream, p, vec, split,
                    partial);
    };
    const int error = with_bool(plain, [&](auto plain) {
      const auto with_layout = [&](auto ranks) {
        return with_bool(p.u.stride_n == 1, [&](auto n_contig) { return run(ranks, n_contig, plain); });
      };
      if constexpr (sizeof(X) == 4 && !plain.value) {  // registers do not hold the slow ways beside 64 ranks in fp32
        return with_layout(std::integral_constant<int, kCudaFewRanks>{});
      } else {
        return with_ranks(p.R, with_layout);
      }
    });
    if (error || !partial) return error;
    return sum_to<TypeOfS<F>>(p.s, p.R, 1, partial, split.planes, split.plane == 1 ? kShrinkGroup : 1, p.T, p.R,
                              p.scale, stream);
  });
}

int lora_expand_cuda(const LoraExpandParams& params, void*, Stream stream) {
  const LoraExpandParams p = with_dropout_scale(params);
  const size_t size = size_of(p.dtype), factor = size_of(p.factor_dtype);
  const Vectorize vec{.x = can_vectorize(p.y, p.y_pitch, size) && can_vectorize(p.base, p.base_pitch, size),
                      .u = can_vectorize(p.u.data, pitch_of(p.u), factor),
                      .s = can_vectorize(p.s, p.R, size_of(s_dtype(p.factor_dtype)))};
  const bool plain =
      vec.x && vec.u && vec.s && in_eights(p.N) && in_eights(p.R) && !p.dropout.threshold && !p.base_scale && !p.bias;
  return with_types(p.dtype, p.factor_dtype, [&]<class X, class F>(X, F) {
    const auto run = [&](auto n_contig, auto plain) {
      return launch("lora_expand", lora_expand_kernel<X, F, n_contig.value, plain.value>,
                    grid_of(ceil_div(p.T, kCudaTokens), ceil_div(p.N, kBN)), dim3(kBlockThreads),
                    Expand<X, F, n_contig.value>::kBytes, stream, p, vec);
    };
    return with_bool(p.u.stride_n == 1,
                     [&](auto n_contig) { return with_bool(plain, [&](auto plain) { return run(n_contig, plain); }); });
  });
}

int lora_rescale_cuda(const LoraRescaleParams& p, void* workspace, Stream stream) {
  float* partial = p.dc ? static_cast<float*>(workspace) : nullptr;
  const size_t size = size_of(p.dtype);
  const bool vectorize = can_vectorize(p.dy, p.dy_pitch, size) && can_vectorize(p.dz, p.N, size) &&
                         (!p.dc || can_vectorize(p.base, p.base_pitch, size));
  const int64_t splits = ceil_div(p.T, kRescaleRows);
  const int error = with_float(p.dtype, [&](auto x) {
    return launch("lora_rescale", lora_rescale_kernel<decltype(x)>, grid_of(splits, ceil_div(p.N, kRescaleCols)),
                  dim3(kBlockThreads), smem_bytes<float>(kWarps * kRescaleCols), stream, p, vectorize, partial);
  });
  if (error || !partial) return error;
  return sum_to<float>(p.dc, p.N, 1, partial, splits, 1, 1, p.N, 1.f, stream);
}

int lora_wgrad_cuda(const LoraWgradParams& params, void* workspace, Stream stream) {
  const LoraWgradParams p = with_dropout_scale(params);
  const int64_t splits = ceil_div(p.T, split_tokens(p.T, kCudaSplit));
  float* partial = splits > 1 ? static_cast<float*>(workspace) : nullptr;
  const Vectorize vec{.x = can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      .s = can_vectorize(p.s, p.R, size_of(s_dtype(p.factor_dtype)))};
  const bool plain = vec.x && vec.s && in_eights(p.N) && in_eights(p.R) && !p.dropout.threshold;
  return with_types(p.dtype, p.factor_dtype, [&]<class X, class F>(X, F) {
    const auto run = [&](auto ranks, auto plain) {
      using Product = Wgrad<X, F, ranks.value>;
      return launch("lora_wgrad", lora_wgrad_kernel<X, F, ranks.value, plain.value>,
                    grid_of(splits, ceil_div(p.N, Product::kCols), ceil_div(p.R, ranks.value)), dim3(kBlockThreads),
                    Product::kBytes, stream, p, vec, partial);
    };
    const int error =
        with_ranks(p.R, [&](auto ranks) { return with_bool(plain, [&](auto plain) { return run(ranks, plain); }); });
    if (error || !partial) return error;
    return sum_to<F>(p.g, p.g_stride_r, p.g_stride_n, partial, splits, 1, p.R, p.N, p.scale, stream);
  });
}

int lora_shrink_wgrad_cuda(const LoraShrinkWgradParams& both, void* workspace, Stream stream) {
  const LoraShrinkParams& p = both.shrink;
  const LoraWgradParams& g = both.wgrad;
  if (p.R > kCudaFewRanks || p.u.stride_r != 1)
    return kInvalidConfiguration;  // choose_lora_backward does not ask for it
  const ShrinkWgradLayout at = shrink_wgrad_layout(both);
  float *s_partial = static_cast<float*>(workspace), *g_partial = at.splits > 1 ? s_partial + at.db : nullptr;
  const Vectorize vec{.x = can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      .u = can_vectorize(p.u.data, p.u.stride_n, size_of(p.factor_dtype)),
                      .s = can_vectorize(g.s, p.R, size_of(s_dtype(p.factor_dtype)))};
  const bool plain = vec.x && vec.u && vec.s && in_eights(p.N) && in_eights(p.R);
  return with_types(p.dtype, p.factor_dtype, [&]<class X, class F>(X, F) {
    int error = with_bool(plain, [&](auto plain) {
      return launch("lora_shrink_wgrad", lora_shrink_wgrad_kernel<X, F, plain.value>, grid_of(at.splits, at.chunks),
                    dim3(kBlockThreads), ShrinkWgrad<X, F, plain.value>::kBytes, stream, both, vec, s_partial,
                    g_partial);
    });
    if (!error) error = sum_to<TypeOfS<F>>(p.s, p.R, 1, s_partial, at.chunks, kShrinkGroup, p.T, p.R, p.scale, stream);
    if (!error && g_partial)
      error = sum_to<F>(g.g, g.g_stride_r, g.g_stride_n, g_partial, at.splits, 1, p.R, p.N, g.scale, stream);
    return error;
  });
}

}  // namespace lrk
