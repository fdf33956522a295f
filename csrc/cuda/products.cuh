// SPDX-License-Identifier: Apache-2.0
// The skinny products of low-rank factors: the tiles of a block, and the bytes of shared memory they take, for kernel and
// launcher alike. T rows of X, N columns, R ranks of a factor U [R, N].
#pragma once

#include "lora.h"
#include "tile.cuh"

namespace lrk {

constexpr int kBK = 64;  // shrink: columns of N per step
static_assert(kCudaChunk % kBK == 0, "shrink's steps end where a chunk does");
constexpr int kBN = 128;      // expand, and wgrad of few ranks: columns of N per block
constexpr int kExpandK = 32;  // expand: ranks per step

struct Vectorize {  // where 128-bit accesses are aligned
  bool x = false, u = false, s = false;
};

// f(the ranks of a block, as a constant)
template <class F>
int with_ranks(int64_t R, const F& f) {
  if (R <= kCudaFewRanks) return f(std::integral_constant<int, kCudaFewRanks>{});
  return f(std::integral_constant<int, kCudaRanks>{});
}

// Tiles of activations, and of what has the factor's type: S, and U, [ranks, columns] where n is contiguous, [columns, ranks]
// where r is.
template <class X, class F, int kRows, int kCols>
using TileOfX = Tile<typename Math<X, F>::Elem, kRows, kCols, Math<X, F>::kXTerms>;
template <class X, class F, int kRows, int kCols>
using TileOfF = Tile<typename Math<X, F>::Elem, kRows, kCols, Math<X, F>::kFTerms>;
template <class X, class F, int kRanks, int kCols, bool kNContig>
using TileOfU = TileOfF<X, F, kNContig ? kRanks : kCols, kNContig ? kCols : kRanks>;

// S[t, r] = sum over n of X[t, n] U[r, n].
template <class X, class F, int kRanks, bool kNContig>
struct Shrink {
  using TileX = TileOfX<X, F, kCudaTokens, kBK>;
  using TileU = TileOfU<X, F, kRanks, kBK, kNContig>;
  using Sum = float[kRanks / 8][4];
  static constexpr size_t kBytes = TileX::kBytes + TileU::kBytes;

  TileX tx;
  TileU tu;
  explicit __device__ __forceinline__ Shrink(Smem& smem) : tx(take_tile<TileX>(smem)), tu(take_tile<TileU>(smem)) {}

  // Columns begin .. end, chunk by chunk: sum = add(sum, that of a chunk). x(n) and u(n) are what load_vec takes of columns
  // from n on; put(stage, n) stores X's tile.
  template <int kUnroll, class XRows, class URows, class Put, class Add>
  __device__ __forceinline__ void run(Sum& sum, int64_t begin, int64_t end, const XRows& x, const URows& u,
                                      const Put& put, const Add& add) const {
    Stage<X, TileX> sx;
    Stage<F, TileU> su;
    sx.fetch(x(begin));
    su.fetch(u(begin));
    Sum acc = {};  // this chunk; `sum` has the chunks before it
    for (int64_t n = begin; n < end; n += kBK) {
      sync_threads();  // the tiles have been read
      put(sx, n);
      su.put(tu);
      sync_threads();
      if (n + kBK < end) {
        sx.fetch(x(n + kBK));
        su.fetch(u(n + kBK));
      }
#pragma unroll(kUnroll)
      for (int k = 0; k < kBK; k += 16)
        mma_step(acc, Operand<TileX, true>{tx}, Operand<TileU, kNContig>{tu}, warp_id() * 16, 0, k);
      if ((n + kBK) % kCudaChunk == 0 || n + kBK >= end) {
#pragma unroll
        for (int j = 0; j < kRanks / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sum[j][e] = add(sum[j][e], acc[j][e]);
            acc[j][e] = 0.f;
          }
      }
    }
  }
};

// Y[t, n] = sum over r of S[t, r] U[r, n]. Beside S in fp32 an fp16 U is two bf16 terms, exactly.
template <class X, class F, bool kNContig>
struct Expand {
  using S = TypeOfS<F>;
  using TileS = TileOfF<X, S, kCudaTokens, kExpandK>;
  using TileU = TileOfU<X, S, kExpandK, kBN, kNContig>;
  using Sum = float[kBN / 8][4];
  static constexpr size_t kBytes = TileS::kBytes + TileU::kBytes;

  TileS ts;
  TileU tu;
  explicit __device__ __forceinline__ Expand(Smem& smem) : ts(take_tile<TileS>(smem)), tu(take_tile<TileU>(smem)) {}

  // The first `ranks` of the tiles, all of them or fewer.
  __device__ __forceinline__ void multiply(Sum& sum, int64_t ranks) const {
#pragma unroll
    for (int k = 0; k < kExpandK; k += 16)  // k is the rank here
      if (k < ranks) mma_step(sum, Operand<TileS, true>{ts}, Operand<TileU, !kNContig>{tu}, warp_id() * 16, 0, k);
  }
};

// G[r, n] = sum over t of S[t, r] X[t, n].
template <class X, class F, int kRanks>
struct Wgrad {
  static constexpr int kCols = kRanks == kCudaFewRanks ? kBN : kBN / 2;  // its accumulators grow with the ranks
  static constexpr int kWarpsM = kRanks / 16, kWarpN = kCols / (kWarps / kWarpsM);
  using S = TypeOfS<F>;
  using TileS = TileOfF<X, S, kCudaTokens, kRanks>;
  using TileX = TileOfX<X, S, kCudaTokens, kCols>;
  using Sum = float[kWarpN / 8][4];
  static constexpr size_t kBytes = TileS::kBytes + TileX::kBytes;

  TileS ts;
  TileX tx;
  explicit __device__ __forceinline__ Wgrad(Smem& smem) : ts(take_tile<TileS>(smem)), tx(take_tile<TileX>(smem)) {}

  // A warp's part of the block.
  static __device__ __forceinline__ int rank0() { return warp_id() % kWarpsM * 16; }
  static __device__ __forceinline__ int col0() { return warp_id() / kWarpsM * kWarpN; }

  template <int kUnroll>
  __device__ __forceinline__ void multiply(Sum& sum) const {
#pragma unroll(kUnroll)
    for (int k = 0; k < kCudaTokens; k += 16)  // k runs over t: both operands have it across their rows
      mma_step(sum, Operand<TileS, false>{ts}, Operand<TileX, false>{tx}, rank0(), col0(), k);
  }
};

}  // namespace lrk
