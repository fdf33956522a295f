// SPDX-License-Identifier: Apache-2.0
// The LoRA family: contract of the skinny products that, beside the base GEMM, make up LoRA and DoRA.
// T tokens, I in, O out, R rank; N stands for I or O. Row pitches are in elements; the last dimension is contiguous.
//
//   shrink   S[T, R]   = scale * D(X)[T, N] U[R, N]^T        S = s D(x) A^T       dS = s dY B
//   expand   Y[T, N]   = c * base + bias + scale * D(S[T, R] U[R, N])             y += S B^T   dx += D(dS A)
//   wgrad    G[R, N]   = scale * S[T, R]^T D(X)[T, N]        dA = dS^T D(x)       dB^T = S^T dY
//   shrink_wgrad       dS and dB in one pass over dY
//   rescale  dZ[T, N]  = c * dY,  dc[N] = sum over T of dY * base                 backward of c * base
//
// and of the two together, on architectures that have a kernel for it:
//
//   gemm     Y[T, N]   = c * X[T, K] W[K, N] + bias + D(S[T, R] U[R, N])          y = x W^T + S B^T, dx = dz W + D(dS A)
//
// D multiplies by the dropout mask of (row, column) times keep_scale, or is the identity. Everything accumulates in fp32
// and rounds once. N is reduced in chunks of a fixed length, added in order: one row's bits do not depend on T.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "rng.h"

namespace lrk {

// S and dS have the factors' type, but are fp32 beside fp16 factors: with a scale folded in they leave fp16's range where
// PEFT's order of the same products stays inside.
constexpr DType s_dtype(DType factor) { return factor == DType::kF16 ? DType::kF32 : factor; }
template <class F>
using TypeOfS = std::conditional_t<std::is_same_v<F, f16>, float, F>;

constexpr int kMaxRank = 512;
constexpr int kCpuChunk = 512, kCudaChunk = 256;  // columns of N summed at a time

// CUDA: tokens of a tile, and ranks of a block: the few where all of R are among them. shrink_wgrad keeps dB
// [kCudaFewRanks, kCudaChunk] in registers, so that R may not be more.
constexpr int kCudaTokens = 64, kCudaFewRanks = 16, kCudaRanks = 64;
constexpr int kShrinkGroup = 4;  // chunks of N that shrink sums before it adds up their sums

// CPU: tokens of a tile (48 KB of fp32); ranks of a task of shrink, and ranks that expand sums at a time.
constexpr int kCpuTokens = 24, kCpuRanks = 64;

// Tokens of a split of wgrad: `least`, or more where T is long, so that there are at most 16 partial sums and scratch
// memory does not grow with T. A function of T alone.
constexpr int kCpuSplit = 256, kCudaSplit = 128;
LRK_HD constexpr int64_t split_tokens(int64_t T, int64_t least) {
  const int64_t even = (T + 15) / 16, rounded = (even + 63) / 64 * 64;
  return rounded > least ? rounded : least;
}

// The small factor. U[r, n] lies at data[r * stride_r + n * stride_n]; one of the strides is 1.
// A [R, I] is (I, 1); B [O, R] read as U[R, O] is (1, R).
struct Factor {
  const void* data;  // [R, N] of Params::factor_dtype
  int64_t stride_r, stride_n;
};

struct LoraShrinkParams {
  const void* x;  // [T, N] dtype
  Factor u;       // [R, N] factor_dtype
  void* s;        // [T, R] s_dtype(factor_dtype), contiguous
  int64_t T, N, x_pitch;
  int32_t R;
  DType dtype, factor_dtype;
  float scale;
  Dropout dropout;
  const int64_t* seed;  // [1] on the device of x; read only where dropout.threshold > 0
};

struct LoraExpandParams {
  void* y;                  // [T, N] dtype
  const void* base;         // [T, N] dtype; y itself to add in place; null for zeros
  const float* base_scale;  // c [N]; null for ones
  const void* bias;         // [N] dtype; null for zeros
  const void* s;            // [T, R] s_dtype(factor_dtype), contiguous
  Factor u;                 // [R, N] factor_dtype
  int64_t T, N, y_pitch, base_pitch;
  int32_t R;
  DType dtype, factor_dtype;
  float scale;
  Dropout dropout;
  const int64_t* seed;
};

struct LoraWgradParams {
  const void* s;  // [T, R] s_dtype(factor_dtype), contiguous
  const void* x;  // [T, N] dtype
  void* g;        // [R, N] factor_dtype at strides (g_stride_r, g_stride_n): dA as (I, 1), dB [O, R] as (1, R)
  int64_t g_stride_r, g_stride_n;
  int64_t T, N, x_pitch;
  int32_t R;
  DType dtype, factor_dtype;
  float scale;
  Dropout dropout;
  const int64_t* seed;
};

// dS[T, R] = scale * dY U^T and G[R, N] = S^T dY, one pass over dY. shrink.s is dS; wgrad.x is shrink.x.
struct LoraShrinkWgradParams {
  LoraShrinkParams shrink;
  LoraWgradParams wgrad;
};

struct LoraRescaleParams {
  const void* dy;           // [T, N] dtype
  const void* base;         // [T, N] dtype; read only where dc is wanted
  const float* base_scale;  // c [N]
  void* dz;                 // [T, N] dtype, contiguous, or null
  float* dc;                // [N], or null
  int64_t T, N, dy_pitch, base_pitch;
  DType dtype;
};
constexpr int kRescaleRows = 64;  // tokens of a split of dc

// On CUDA the kernel may begin while the launch before it is not over: that one may write s or u, but neither x nor w.
struct LoraGemmParams {
  void* y;                  // [T, N] dtype, contiguous
  void* base;               // [T, N] dtype, contiguous: where X W goes by itself, or null
  const float* base_scale;  // c [N]; null for ones
  const void* bias;         // [N] dtype; null for zeros
  const void* x;            // [T, K] dtype
  Factor w;                 // W[k, n] of dtype at data[k * stride_r + n * stride_n]
  const void* s;            // [T, R] s_dtype(factor_dtype), contiguous
  Factor u;                 // [R, N] factor_dtype
  int64_t T, N, K, x_pitch;
  int32_t R;
  DType dtype, factor_dtype;
  Dropout dropout;  // of the low-rank product alone
  const int64_t* seed;
};

// dS and dB: one pass over dY or two. The fused pass saves one read of dY [T, O] and pays a write and a read of partial
// sums of dS, [T, R] fp32 for each chunk of O.
struct BackwardShape {
  int64_t T, O;
  int32_t R;
  DType dtype;
};
struct BackwardConfig {
  bool fused;
  int64_t saved_bytes;  // dY bytes not read a second time
  int64_t paid_bytes;   // partial sums written and read
};
BackwardConfig choose_lora_backward(const BackwardShape& shape, Target target);

// shrink on CUDA: S is the sum, in order, of groups of kShrinkGroup chunks of N, each of them a sum in order. A block walks
// `span` chunks and writes a partial sum for each `plane` of them, a chunk or a group; a second kernel adds up the rest of
// the same tree: equal bits whatever the span.
struct ShrinkSplit {
  int32_t chunks, span, plane, planes;  // one plane: S itself
};
ShrinkSplit choose_lora_shrink(int64_t T, int64_t N, int32_t R, Target target);
ShrinkSplit lora_shrink_split(int64_t N, int64_t span);
ShrinkSplit lora_shrink_split(int64_t T, int64_t N, int32_t R, int32_t sms,
                              double start);  // what start is: policy/tuned.h

// shrink on the CPU: `ranks` of a task, fewer where there is one tile, so that threads share the rows of a factor.
struct CpuTasks {
  int64_t ranks, count, grain;  // a thread takes `grain` tasks at once
};
CpuTasks choose_lora_cpu_shrink(int64_t T, int64_t N, int64_t R);

// Tasks of `tokens` x `cols` elements against `ranks` ranks of a factor that a thread takes at once: some 3 us of work.
// Reading an element of the factor counts as 4 multiply-adds.
constexpr int64_t cpu_grain(int64_t tokens, int64_t cols, int64_t ranks) {
  const int64_t work = (tokens + 4) * cols * ranks, grain = (int64_t{1} << 16) / (work > 1 ? work : 1);
  return grain > 1 ? grain : 1;
}

// shrink_wgrad on the CPU: one pass has a task for each chunk of N; too few for the threads there are make it two passes,
// which give the same bits.
constexpr bool one_cpu_pass(int64_t N, int64_t threads) { return ceil_div(N, kCpuChunk) >= 2 * threads; }

// Scratch of shrink_wgrad on CUDA, in floats: partial sums of dS [chunks][T][R], and from `db` on those of dB
// [splits][R][N], or none where there is one split.
struct ShrinkWgradLayout {
  int64_t chunks, splits, db, floats;
};
ShrinkWgradLayout shrink_wgrad_layout(const LoraShrinkWgradParams& p);

GemmShape shape_of(const LoraGemmParams& p);
// choose_gemm, and on sm_100a a kernel by CUTLASS, of what is `plain`: without a scale of the base and without dropout.
GemmConfig choose_lora_gemm(const GemmShape& shape, bool plain, Target target);
inline bool is_plain(const LoraGemmParams& p) { return !p.base && !p.base_scale && !p.dropout.threshold; }

inline bool whole_vectors(const Factor& w) { return whole_vectors(w.data, w.stride_n == 1 ? w.stride_r : w.stride_n); }

inline LowRankProduct low_rank_of(const LoraGemmParams& p) {
  return {p.s, p.u.data, p.u.stride_r, p.u.stride_n, p.T, p.N, p.R, p.factor_dtype, p.w.stride_n == 1};
}

LRK_KERNEL(lora_shrink, LoraShrinkParams)
LRK_KERNEL(lora_expand, LoraExpandParams)
LRK_KERNEL(lora_wgrad, LoraWgradParams)
LRK_KERNEL(lora_shrink_wgrad, LoraShrinkWgradParams)
LRK_KERNEL(lora_rescale, LoraRescaleParams)
LRK_KERNEL(lora_gemm, LoraGemmParams)  // not of the CPU

}  // namespace lrk
