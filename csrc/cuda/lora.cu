// SPDX-License-Identifier: Apache-2.0
// LoRA on CUDA, sm_80 and up: four products over the tiles of tile.cuh, the rescale pass, and the sum of partial results.
// Occupancy plan: blocks of 128 threads, at least two on an SM (255 registers), four for 16-bit shrink up to rank 16
// (128 registers). Shared memory stays under 48 KB but in shrink_wgrad, which holds a [64, 256] tile of dY: 46 to 96 KB.
#include "lora.h"
#include "tile.cuh"

namespace lrk {
namespace {

constexpr int kBM = 64;          // rows of T per tile
constexpr int kBK = 64;          // shrink: columns of N per step; divides kCudaChunk
constexpr int kBN = 128;         // expand, and wgrad up to 16 ranks: columns of N per block
constexpr int kExpandK = 32;     // expand: ranks per step
constexpr int kFusedRanks = 16;  // shrink_wgrad

template <class X>
constexpr int kUnroll = sizeof(X) == 4 ? 1 : 4;  // fp32 steps are long as they are, and more would spill

struct Vectorize {  // where 128-bit accesses are aligned
  bool x, u, s;
};

template <class F>
__device__ __forceinline__ Slab<F> factor_slab(const Factor& u, bool n_contig, int64_t r, int64_t n, int64_t R,
                                               int64_t N, bool vectorize) {
  const F* data = static_cast<const F*>(u.data) + r * u.stride_r + n * u.stride_n;
  if (n_contig) return {data, u.stride_r, R - r, N - n, vectorize};
  return {data, u.stride_n, N - n, R - r, vectorize};
}

// A tile of U: [ranks, columns] where n is contiguous, [columns, ranks] where r is.
template <class M, int kRanks, int kCols, bool kNContig>
using FactorTile = Tile<typename M::Elem, kNContig ? kRanks : kCols, kNContig ? kCols : kRanks, M::kFTerms>;

// ---- S[T, R] = scale * D(X) U^T. Block (t tile, r tile), all chunks; or (.., chunk), its sum to planes [chunk][T][R].

template <class X, int kRanks>
constexpr int kShrinkBlocks = kRanks == 16 && sizeof(X) == 2 ? 4 : 2;  // on an SM

template <class X, class F, int kRanks, bool kNContig>
__global__ __launch_bounds__(kBlockThreads, kShrinkBlocks<X, kRanks>) void shrink_kernel(LoraShrinkParams p,
                                                                                         Vectorize vec, float* planes) {
  using M = Math<X, F>;
  using TX = Tile<typename M::Elem, kBM, kBK, M::kXTerms>;
  using TU = FactorTile<M, kRanks, kBK, kNContig>;
  constexpr int kTilesN = kRanks / 8;
  Smem smem;
  const TX tx{smem.take<typename M::Elem>(TX::kElems)};
  const TU tu{smem.take<typename M::Elem>(TU::kElems)};
  const Operand<TX, true> a{tx};
  const Operand<TU, kNContig> b{tu};

  const int64_t t0 = int64_t{blockIdx.x} * kBM, r0 = int64_t{blockIdx.y} * kRanks;
  const int64_t begin = int64_t{blockIdx.z} * kCudaChunk;
  const int64_t end = planes && begin + kCudaChunk < p.N ? begin + kCudaChunk : p.N;
  const uint64_t seed = p.dropout.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const int warp = static_cast<int>(threadIdx.x) / 32;

  const auto x_slab = [&](int64_t n) {
    return Slab<X>{static_cast<const X*>(p.x) + t0 * p.x_pitch + n, p.x_pitch, p.T - t0, p.N - n, vec.x};
  };
  Stage<X, TX> sx;
  Stage<F, TU> su;
  sx.fetch(x_slab(begin));
  su.fetch(factor_slab<F>(p.u, kNContig, r0, begin, p.R, p.N, vec.u));
  float acc[kTilesN][4] = {}, sum[kTilesN][4] = {};  // this chunk, the chunks before it
  for (int64_t n = begin; n < end; n += kBK) {
    sync_threads();  // the tiles have been read
    sx.put(tx, p.dropout, seed, t0, n);
    su.put(tu);
    sync_threads();
    if (n + kBK < end) {
      sx.fetch(x_slab(n + kBK));
      su.fetch(factor_slab<F>(p.u, kNContig, r0, n + kBK, p.R, p.N, vec.u));
    }
#pragma unroll(kUnroll<X>)
    for (int k = 0; k < kBK; k += 16) mma_step(acc, a, b, warp * 16, 0, k);
    if ((n + kBK) % kCudaChunk == 0 || n + kBK >= end) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[j][e] += acc[j][e];
          acc[j][e] = 0.f;
        }
    }
  }
  for_each_element(sum, t0 + warp * 16, r0, [&](int64_t t, int64_t r, float v) {
    if (t >= p.T || r >= p.R) return;
    if (planes) {
      planes[(int64_t{blockIdx.z} * p.T + t) * p.R + r] = v;
    } else {
      static_cast<F*>(p.s)[t * p.R + r] = from_float_fast<F>(p.scale * v);
    }
  });
}

// ---- Y[T, N] = c * base + bias + scale * D(S U). Block (t tile, n tile).

template <class X, class F, bool kNContig>
__global__ __launch_bounds__(kBlockThreads, 2) void expand_kernel(LoraExpandParams p, Vectorize vec) {
  using M = Math<X, F>;
  using TS = Tile<typename M::Elem, kBM, kExpandK, M::kFTerms>;
  using TU = FactorTile<M, kExpandK, kBN, kNContig>;
  constexpr int kTilesN = kBN / 8;
  Smem smem;
  const TS ts{smem.take<typename M::Elem>(TS::kElems)};
  const TU tu{smem.take<typename M::Elem>(TU::kElems)};
  const Operand<TS, true> a{ts};
  const Operand<TU, !kNContig> b{tu};  // k is the rank here

  const int64_t t0 = int64_t{blockIdx.x} * kBM, n0 = int64_t{blockIdx.y} * kBN;
  const int lane = lane_id(), m = static_cast<int>(threadIdx.x) / 32 * 16;
  const auto s_slab = [&](int r) {
    return Slab<F>{static_cast<const F*>(p.s) + t0 * p.R + r, p.R, p.T - t0, p.R - r, vec.s};
  };
  Stage<F, TS> ss;
  Stage<F, TU> su;
  ss.fetch(s_slab(0));
  su.fetch(factor_slab<F>(p.u, kNContig, 0, n0, p.R, p.N, vec.u));
  float acc[kTilesN][4] = {};
  for (int r = 0; r < p.R; r += kExpandK) {
    sync_threads();
    ss.put(ts);
    su.put(tu);
    sync_threads();
    if (r + kExpandK < p.R) {
      ss.fetch(s_slab(r + kExpandK));
      su.fetch(factor_slab<F>(p.u, kNContig, r + kExpandK, n0, p.R, p.N, vec.u));
    }
#pragma unroll
    for (int k = 0; k < kExpandK; k += 16)
      if (r + k < p.R) mma_step(acc, a, b, m, 0, k);
  }
  const uint64_t seed = p.dropout.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const X *base = static_cast<const X*>(p.base), *bias = static_cast<const X*>(p.bias);
#pragma unroll
  for (int j0 = 0; j0 < kTilesN; j0 += 4)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v[8];
      gather_row(v, acc, j0, h);
      const int64_t t = t0 + m + lane / 4 + h * 8, n = n0 + (j0 + lane % 4) * 8;
      if (t >= p.T || n >= p.N) continue;
      if (p.dropout.threshold) {
        const Philox block = dropout_block(seed, t, n / kDropoutBlock);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (bits16(block, i) < p.dropout.threshold) v[i] = 0.f;
      }
      Vec8<X> out = {};
      if (base) out = load_vec(Slab<X>{base + t * p.base_pitch + n, 0, 1, p.N - n, vec.x}, 0, 0);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float sum = to_float_fast(out.v[i]);
        if (p.base_scale && n + i < p.N) sum *= p.base_scale[n + i];
        if (bias && n + i < p.N) sum += to_float_fast(bias[n + i]);
        out.v[i] = from_float_fast<X>(sum + p.scale * v[i]);
      }
      store_row(static_cast<X*>(p.y) + t * p.y_pitch + n, out, p.N - n, vec.x);
    }
}

// ---- dZ[T, N] = c * dY, and per segment of kRescaleRows tokens the sum of dY * base. Block (segment, 256 columns): a lane
// has 8 columns, the four warps share the rows.

template <class X>
__global__ __launch_bounds__(kBlockThreads) void rescale_kernel(LoraRescaleParams p, bool vectorize, float* planes) {
  constexpr int kWarps = kBlockThreads / 32, kCols = 32 * 8;
  Smem smem;
  float* sums = smem.take<float>(kWarps * kCols);  // [warp][column]
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_id();
  const int64_t n = int64_t{blockIdx.y} * kCols + lane * 8, t0 = int64_t{blockIdx.x} * kRescaleRows;
  const int64_t last = t0 + kRescaleRows < p.T ? t0 + kRescaleRows : p.T;
  float c[8], sum[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) c[i] = n + i < p.N ? p.base_scale[n + i] : 0.f;
  for (int64_t t = t0 + warp; t < last && n < p.N; t += kWarps) {
    Vec8<X> d = load_vec(Slab<X>{static_cast<const X*>(p.dy) + t * p.dy_pitch + n, 0, 1, p.N - n, vectorize}, 0, 0);
    if (planes) {
      const X* base = static_cast<const X*>(p.base) + t * p.base_pitch + n;
      const Vec8<X> b = load_vec(Slab<X>{base, 0, 1, p.N - n, vectorize}, 0, 0);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += to_float_fast(d.v[i]) * to_float_fast(b.v[i]);
    }
    if (!p.dz) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) d.v[i] = from_float_fast<X>(c[i] * to_float_fast(d.v[i]));
    store_row(static_cast<X*>(p.dz) + t * p.N + n, d, p.N - n, vectorize);
  }
  if (!planes) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[warp * kCols + lane * 8 + i] = sum[i];
  sync_threads();
  for (int i = static_cast<int>(threadIdx.x); i < kCols; i += kBlockThreads) {
    const int64_t col = int64_t{blockIdx.y} * kCols + i;
    float total = 0.f;
    for (int w = 0; w < kWarps; ++w) total += sums[w * kCols + i];
    if (col < p.N) planes[int64_t{blockIdx.x} * p.N + col] = total;
  }
}

// ---- G[R, N] = scale * S^T D(X). Block (segment of T, n tile, r tile); more than one segment: to planes [segment][R][N].

template <class F>
__device__ __forceinline__ void store_wgrad(const LoraWgradParams& p, float* planes, int64_t segment, int64_t r,
                                            int64_t n, float v) {
  if (r >= p.R || n >= p.N) return;
  if (planes) {
    planes[(segment * p.R + r) * p.N + n] = v;
  } else {
    static_cast<F*>(p.g)[r * p.g_stride_r + n * p.g_stride_n] = from_float_fast<F>(p.scale * v);
  }
}

template <int kRanks>
constexpr int kWgradN = kRanks == 16 ? kBN : kBN / 2;  // its accumulators grow with the ranks

template <class X, class F, int kRanks>
__global__ __launch_bounds__(kBlockThreads, 2) void wgrad_kernel(LoraWgradParams p, Vectorize vec, float* planes) {
  using M = Math<X, F>;
  using TS = Tile<typename M::Elem, kBM, kRanks, M::kFTerms>;
  using TX = Tile<typename M::Elem, kBM, kWgradN<kRanks>, M::kXTerms>;
  constexpr int kWarpsM = kRanks / 16, kWarpN = kWgradN<kRanks> / (4 / kWarpsM), kTilesN = kWarpN / 8;
  Smem smem;
  const TS ts{smem.take<typename M::Elem>(TS::kElems)};
  const TX tx{smem.take<typename M::Elem>(TX::kElems)};
  const Operand<TS, false> a{ts};  // k runs over tokens: both operands have it across their rows
  const Operand<TX, false> b{tx};

  const int64_t n0 = int64_t{blockIdx.y} * kWgradN<kRanks>, r0 = int64_t{blockIdx.z} * kRanks;
  const int64_t segment = split_tokens(p.T, kCudaSplit), begin = blockIdx.x * segment;
  const int64_t end = begin + segment < p.T ? begin + segment : p.T;
  const uint64_t seed = p.dropout.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const int warp = static_cast<int>(threadIdx.x) / 32, m = warp % kWarpsM * 16, n = warp / kWarpsM * kWarpN;
  const auto s_slab = [&](int64_t t) {
    return Slab<F>{static_cast<const F*>(p.s) + t * p.R + r0, p.R, end - t, p.R - r0, vec.s};
  };
  const auto x_slab = [&](int64_t t) {
    return Slab<X>{static_cast<const X*>(p.x) + t * p.x_pitch + n0, p.x_pitch, end - t, p.N - n0, vec.x};
  };
  Stage<F, TS> ss;
  Stage<X, TX> sx;
  ss.fetch(s_slab(begin));
  sx.fetch(x_slab(begin));
  float acc[kTilesN][4] = {};
  for (int64_t t = begin; t < end; t += kBM) {
    sync_threads();
    ss.put(ts);
    sx.put(tx, p.dropout, seed, t, n0);
    sync_threads();
    if (t + kBM < end) {
      ss.fetch(s_slab(t + kBM));
      sx.fetch(x_slab(t + kBM));
    }
#pragma unroll
    for (int k = 0; k < kBM; k += 16) mma_step(acc, a, b, m, n, k);
  }
  for_each_element(acc, r0 + m, n0 + n,
                   [&](int64_t r, int64_t col, float v) { store_wgrad<F>(p, planes, blockIdx.x, r, col, v); });
}

// ---- dS and dB in one pass over dY. Block (segment of T, chunk of N), up to kFusedRanks ranks, U = B [N, R].
// Partial sums of dS to s_planes [chunk][T][R], of dB as wgrad does.

template <class X, class F>
__global__ __launch_bounds__(kBlockThreads, 2) void shrink_wgrad_kernel(LoraShrinkWgradParams both, Vectorize vec,
                                                                        float* s_planes, float* g_planes) {
  using M = Math<X, F>;
  using TX = Tile<typename M::Elem, kBM, kCudaChunk, M::kXTerms>;
  using TU = FactorTile<M, kFusedRanks, kCudaChunk, false>;
  using TS = Tile<typename M::Elem, kBM, kFusedRanks, M::kFTerms>;
  constexpr int kWarpN = kCudaChunk / 4;
  const LoraShrinkParams& p = both.shrink;
  Smem smem;
  const TX tx{smem.take<typename M::Elem>(TX::kElems)};
  const TU tu{smem.take<typename M::Elem>(TU::kElems)};
  const TS ts{smem.take<typename M::Elem>(TS::kElems)};

  const int64_t segment = split_tokens(p.T, kCudaSplit), begin = blockIdx.x * segment;
  const int64_t end = begin + segment < p.T ? begin + segment : p.T, n0 = int64_t{blockIdx.y} * kCudaChunk;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  Stage<F, TU> su;
  su.fetch(factor_slab<F>(p.u, false, 0, n0, p.R, p.N, vec.u));
  su.put(tu);
  float db[kWarpN / 8][4] = {};  // rows: ranks; columns n0 + warp * kWarpN ..
  for (int64_t t = begin; t < end; t += kBM) {
    Stage<F, TS> ss;
    ss.fetch(Slab<F>{static_cast<const F*>(both.wgrad.s) + t * p.R, p.R, end - t, p.R, vec.s});
    sync_threads();
    ss.put(ts);
    const Slab<X> slab{static_cast<const X*>(p.x) + t * p.x_pitch + n0, p.x_pitch, end - t, p.N - n0, vec.x};
#pragma unroll(kUnroll<X>)
    for (int at = static_cast<int>(threadIdx.x); at < kBM * kCudaChunk / 8; at += kBlockThreads)
      store_vec(tx, at / (kCudaChunk / 8), at % (kCudaChunk / 8) * 8,
                load_vec(slab, at / (kCudaChunk / 8), at % (kCudaChunk / 8) * 8));
    sync_threads();
    float ds[kFusedRanks / 8][4] = {};
#pragma unroll(kUnroll<X>)
    for (int k = 0; k < kCudaChunk; k += 16)
      mma_step(ds, Operand<TX, true>{tx}, Operand<TU, false>{tu}, warp * 16, 0, k);
#pragma unroll(kUnroll<X>)
    for (int k = 0; k < kBM; k += 16) mma_step(db, Operand<TS, false>{ts}, Operand<TX, false>{tx}, 0, warp * kWarpN, k);
    for_each_element(ds, t + warp * 16, 0, [&](int64_t row, int64_t r, float v) {
      if (row < end && r < p.R) s_planes[(int64_t{blockIdx.y} * p.T + row) * p.R + r] = v;
    });
  }
  for_each_element(db, 0, n0 + warp * kWarpN, [&](int64_t r, int64_t col, float v) {
    store_wgrad<F>(both.wgrad, g_planes, blockIdx.x, r, col, v);
  });
}

// ---- out[i, j] = scale * sum of planes [count][rows][cols], plane by plane.

template <class F>
__global__ __launch_bounds__(kBlockThreads) void sum_planes_kernel(const float* planes, int64_t count, int64_t rows,
                                                                   int64_t cols, float scale, F* out, int64_t stride_i,
                                                                   int64_t stride_j) {
  const int64_t at = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  if (at >= rows * cols) return;
  float sum = 0.f;
  for (int64_t k = 0; k < count; ++k) sum += planes[k * rows * cols + at];
  out[at / cols * stride_i + at % cols * stride_j] = from_float_fast<F>(scale * sum);
}

template <class F>
int sum_planes(const float* planes, int64_t count, int64_t rows, int64_t cols, float scale, void* out, int64_t stride_i,
               int64_t stride_j, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(rows * cols, kBlockThreads)));
  return launch("sum_planes", sum_planes_kernel<F>, grid, dim3(kBlockThreads), 0, stream, planes, count, rows, cols,
                scale, static_cast<F*>(out), stride_i, stride_j);
}

// ---- launchers

int64_t pitch_of(const Factor& u) { return u.stride_n == 1 ? u.stride_r : u.stride_n; }

// Kept elements are scaled once, in the fp32 result, where the mask is a plain select in the operand.
float dropout_scale(float scale, const Dropout& d) { return d.threshold ? scale * d.keep_scale : scale; }

}  // namespace

int lora_shrink_cuda(const LoraShrinkParams& params, void* workspace, Stream stream) {
  LoraShrinkParams p = params;
  p.scale = dropout_scale(p.scale, p.dropout);
  const ShrinkConfig config = choose_lora_shrink(p.T, p.N, p.R, cuda_target());
  float* planes = config.split ? static_cast<float*>(workspace) : nullptr;
  const Vectorize vec{can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      can_vectorize(p.u.data, pitch_of(p.u), size_of(p.factor_dtype)), false};
  return with_types(p.dtype, p.factor_dtype, [&](auto xt, auto ft) {
    using X = decltype(xt);
    using F = decltype(ft);
    using M = Math<X, F>;
    const int error = with_bool(p.R <= 16, [&](auto small) {
      return with_bool(p.u.stride_n == 1, [&](auto n_contig) {
        constexpr int kRanks = small.value ? 16 : 64;
        using TX = Tile<typename M::Elem, kBM, kBK, M::kXTerms>;
        using TU = FactorTile<M, kRanks, kBK, n_contig.value>;
        return launch("lora_shrink", shrink_kernel<X, F, kRanks, n_contig.value>,
                      grid_of(ceil_div(p.T, kBM), ceil_div(p.R, kRanks), planes ? config.chunks : 1),
                      dim3(kBlockThreads), TX::kBytes + TU::kBytes, stream, p, vec, planes);
      });
    });
    if (error || !planes) return error;
    return sum_planes<F>(planes, config.chunks, p.T, p.R, p.scale, p.s, p.R, 1, stream);
  });
}

int lora_expand_cuda(const LoraExpandParams& params, void*, Stream stream) {
  LoraExpandParams p = params;
  p.scale = dropout_scale(p.scale, p.dropout);
  const size_t size = size_of(p.dtype);
  const Vectorize vec{can_vectorize(p.y, p.y_pitch, size) && can_vectorize(p.base, p.base_pitch, size),
                      can_vectorize(p.u.data, pitch_of(p.u), size_of(p.factor_dtype)),
                      can_vectorize(p.s, p.R, size_of(p.factor_dtype))};
  return with_types(p.dtype, p.factor_dtype, [&](auto xt, auto ft) {
    using X = decltype(xt);
    using F = decltype(ft);
    using M = Math<X, F>;
    return with_bool(p.u.stride_n == 1, [&](auto n_contig) {
      using TS = Tile<typename M::Elem, kBM, kExpandK, M::kFTerms>;
      using TU = FactorTile<M, kExpandK, kBN, n_contig.value>;
      return launch("lora_expand", expand_kernel<X, F, n_contig.value>, grid_of(ceil_div(p.T, kBM), ceil_div(p.N, kBN)),
                    dim3(kBlockThreads), TS::kBytes + TU::kBytes, stream, p, vec);
    });
  });
}

int lora_rescale_cuda(const LoraRescaleParams& p, void* workspace, Stream stream) {
  float* planes = p.dc ? static_cast<float*>(workspace) : nullptr;
  const size_t size = size_of(p.dtype);
  const bool vectorize = can_vectorize(p.dy, p.dy_pitch, size) && can_vectorize(p.dz, p.N, size) &&
                         (!p.dc || can_vectorize(p.base, p.base_pitch, size));
  const int64_t segments = ceil_div(p.T, kRescaleRows);
  const int error = with_float(p.dtype, [&](auto xt) {
    return launch("lora_rescale", rescale_kernel<decltype(xt)>, grid_of(segments, ceil_div(p.N, 256)),
                  dim3(kBlockThreads), smem_bytes<float>(kBlockThreads * 8), stream, p, vectorize, planes);
  });
  if (error || !planes) return error;
  return sum_planes<float>(planes, segments, 1, p.N, 1.f, p.dc, p.N, 1, stream);
}

int lora_wgrad_cuda(const LoraWgradParams& params, void* workspace, Stream stream) {
  LoraWgradParams p = params;
  p.scale = dropout_scale(p.scale, p.dropout);
  const int64_t segments = ceil_div(p.T, split_tokens(p.T, kCudaSplit));
  float* planes = segments > 1 ? static_cast<float*>(workspace) : nullptr;
  const Vectorize vec{can_vectorize(p.x, p.x_pitch, size_of(p.dtype)), false,
                      can_vectorize(p.s, p.R, size_of(p.factor_dtype))};
  return with_types(p.dtype, p.factor_dtype, [&](auto xt, auto ft) {
    using X = decltype(xt);
    using F = decltype(ft);
    using M = Math<X, F>;
    const int error = with_bool(p.R <= 16, [&](auto small) {
      constexpr int kRanks = small.value ? 16 : 64;
      using TS = Tile<typename M::Elem, kBM, kRanks, M::kFTerms>;
      using TX = Tile<typename M::Elem, kBM, kWgradN<kRanks>, M::kXTerms>;
      return launch("lora_wgrad", wgrad_kernel<X, F, kRanks>,
                    grid_of(segments, ceil_div(p.N, kWgradN<kRanks>), ceil_div(p.R, kRanks)), dim3(kBlockThreads),
                    TS::kBytes + TX::kBytes, stream, p, vec, planes);
    });
    if (error || !planes) return error;
    return sum_planes<F>(planes, segments, p.R, p.N, p.scale, p.g, p.g_stride_r, p.g_stride_n, stream);
  });
}

int lora_shrink_wgrad_cuda(const LoraShrinkWgradParams& both, void* workspace, Stream stream) {
  const LoraShrinkParams& p = both.shrink;
  const LoraWgradParams& g = both.wgrad;
  if (p.R > kFusedRanks || p.u.stride_r != 1) return kInvalidConfiguration;  // choose_lora_backward does not ask for it
  const ShrinkWgradLayout at = shrink_wgrad_layout(both);
  float *s_planes = static_cast<float*>(workspace), *g_planes = at.splits > 1 ? s_planes + at.db : nullptr;
  const Vectorize vec{can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      can_vectorize(p.u.data, p.u.stride_n, size_of(p.factor_dtype)),
                      can_vectorize(g.s, p.R, size_of(p.factor_dtype))};
  return with_types(p.dtype, p.factor_dtype, [&](auto xt, auto ft) {
    using X = decltype(xt);
    using F = decltype(ft);
    using M = Math<X, F>;
    using TX = Tile<typename M::Elem, kBM, kCudaChunk, M::kXTerms>;
    using TU = FactorTile<M, kFusedRanks, kCudaChunk, false>;
    using TS = Tile<typename M::Elem, kBM, kFusedRanks, M::kFTerms>;
    int error =
        launch("lora_shrink_wgrad", shrink_wgrad_kernel<X, F>, grid_of(at.splits, at.chunks), dim3(kBlockThreads),
               TX::kBytes + TU::kBytes + TS::kBytes, stream, both, vec, s_planes, g_planes);
    if (!error) error = sum_planes<F>(s_planes, at.chunks, p.T, p.R, p.scale, p.s, p.R, 1, stream);
    if (!error && g_planes)
      error = sum_planes<F>(g_planes, at.splits, p.R, p.N, g.scale, g.g, g.g_stride_r, g.g_stride_n, stream);
    return error;
  });
}

}  // namespace lrk
