// SPDX-License-Identifier: Apache-2.0
// Random bases that exist only as a seed (rng.h, docs/rng.md). Contract of four kernels; what they share is a stack of
// matrices U_k [R, C] = U [K R, C], whose row q is row q % R of basis q / R, regenerated wherever it is read.
//
//   fill     out[Q, C] = row_scale (.) U[q0 .. q0 + Q, c0 .. c0 + C] (.) col_scale
//   combine  out[T, R, W] = base + scale Σ_k coef[T, k] U_k       W: segments of widths side by side, a tensor id each
//   dot      out[T, k] = scale <G[T], U_k>                         its adjoint
//   matmul   out[T, C] = base + out_scale (.) ((in_scale (.) x[T, Q]) U)      or, transposed,
//            out[T, Q] = base + out_scale (.) ((in_scale (.) x[T, C]) U^T)
//
// Elements are exact in fp32, so U's bits are the same on every device. Sums run in fp32 in an order that follows from
// T, R, W, K, Q and C alone: not from threads, and for matmul not from T or the other rows.
#pragma once

#include "rng.h"

namespace lrk {

// Which elements: c2 and c3 of the counter, but for the basis.
struct BasisStream {
  uint64_t seed;
  uint32_t tensor, basis0;  // the first basis of the stack
  Method method;
  Distribution distribution;

  LRK_HD constexpr uint32_t tag() const { return stream_tag(method, distribution); }
};

struct BasisFillParams {
  BasisStream u;
  void* out;               // [Q, C] dtype, contiguous
  const float* row_scale;  // [Q], or null
  const float* col_scale;  // [C], or null
  int64_t R, q0, c0, Q, C;
  float scale;
  DType dtype;
};

constexpr int kMaxSegments = 4;

// Segment s has columns begin[s] .. begin[s + 1] of W and coefficients first[s] .. first[s + 1] of ΣK; tensor u.tensor + s.
struct BasisSegments {
  int32_t count;
  int64_t begin[kMaxSegments + 1], first[kMaxSegments + 1];
  float scale[kMaxSegments];
};

struct BasisCombineParams {
  BasisStream u;
  BasisSegments segments;
  const float* coef;  // [T, ΣK]
  const float* base;  // [R, W], or null
  float* out;         // [T, R, W]
  int64_t T, R;
};

struct BasisDotParams {
  BasisStream u;
  BasisSegments segments;
  const float* g;  // [T, R, W]
  float* out;      // [T, ΣK]
  int64_t T, R;
};

struct BasisMatmulParams {
  BasisStream u;
  const void* x;           // [T, Q], transposed [T, C]
  void* out;               // [T, C], transposed [T, Q]
  const float* in_scale;   // [Q] or [C], or null
  const float* out_scale;  // [C] or [Q], or null
  int64_t T, R, Q, C, x_pitch, out_pitch;
  bool transposed, add;  // add: out is the base, in place
  DType x_dtype, out_dtype;
};

// Sums that have few outputs and many terms fall into splits, fixed by the shape, whose partial sums are added in order.
// dot: of the rows and columns; matmul: of Q, transposed on CUDA: of C; combine on CUDA: of K.
int64_t choose_basis_dot_splits(int64_t T, int64_t K, Target target);
int64_t choose_basis_matmul_splits(int64_t Q, int64_t C, Target target);
int64_t choose_basis_transposed_splits(int64_t Q, int64_t C, Target target);
int64_t choose_basis_combine_splits(int64_t R, int64_t W, int64_t K, Target target);

// CUDA: columns of a block that a thread makes at a time, at most; rows of coefficients, or tokens, whose sums over rows of
// U it holds; and what matmul has in its workspace, in floats: x in fp32, and partial sums [splits][T][width]; transposed x
// of rows `width` apart, and [splits][T][Q] where splits are more than one.
constexpr int64_t kBasisColumns = 16, kBasisSums = 4;
struct BasisMatmulLayout {
  int64_t x, width, splits;
};
BasisMatmulLayout basis_matmul_layout(const BasisMatmulParams& p, Target target);

// matmul for many tokens: U is generated once, into scratch memory of the nearest large cache, for a plain GEMM, some rows
// or columns at a time so that no sum is cut. For few tokens it never leaves the registers.
struct BasisMatmulConfig {
  bool scratch;
  int64_t rows, cols;  // of U in scratch at a time
};
BasisMatmulConfig choose_basis_matmul(int64_t T, int64_t Q, int64_t C, bool transposed, Target target);

// matmul for many tokens on CUDA where no GEMM of one type does it: x and out of different types, or an fp16 x with vectors,
// whose products may leave fp16's range. Each sum is one chain over its terms, whatever T. x is read where it lies, or first
// made two bf16 terms [T, width] in the workspace. Q and C are not zero. There is no kernel of the CPU, which has fp32 GEMMs.
bool choose_basis_product(const BasisMatmulParams& p, Target target);
struct BasisProductLayout {
  bool direct;
  int64_t width;
};
BasisProductLayout basis_product_layout(const BasisMatmulParams& p);
size_t basis_product_workspace(const BasisMatmulParams& p, Target target);
int basis_product_cuda(const BasisMatmulParams& p, void* workspace, Stream stream);

// RandLoRA's x (Λ A Γ)^T B^T for T tokens of fp32: by vectors, in the registers of matmul; by the factors, two GEMMs over
// panels of Q rows; or merged into the base weight. lrkern.functional.randlora_way says the same in Python.
enum class RandLoraWay { kVector, kFactors, kMerged };
RandLoraWay choose_randlora(int64_t T, int64_t I, int64_t O);

LRK_KERNEL(basis_fill, BasisFillParams)
LRK_KERNEL(basis_combine, BasisCombineParams)
LRK_KERNEL(basis_dot, BasisDotParams)
LRK_KERNEL(basis_matmul, BasisMatmulParams)

}  // namespace lrk
