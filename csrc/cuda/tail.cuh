// SPDX-License-Identifier: Apache-2.0
// The low-rank product as more columns of a bf16 GEMM: Y += S' [T, columns] U' [columns, N]. A factor that is
// not bf16 is taken apart: v = hi + lo in bf16, and
//   S U = [S_hi, S_hi, S_lo] [U_hi, U_lo, U_hi]^T
// leaves out lo lo, 2^-16 of the result. What is not finite goes into the first product alone, so that it meets no zero.
#pragma once

#include "gemm.h"
#include "place.cuh"

namespace lrk {

struct GemmTail {
  const bf16 *s, *u;  // [T, columns]; of U' the layout of W
  int64_t s_pitch, u_pitch;
  int32_t columns;
};

struct TermsOf {
  const void* from;  // [rows, R] elements at row * stride_row + r * stride_r
  int64_t stride_row, stride_r, rows;
  bf16* to;       // at row * to_row + column * to_column
  int64_t pitch;  // to_row where columns are contiguous, else to_column
};

// Column `c` of [first, second, third], each of R: hi, hi, lo of S, hi, lo, hi of U.
template <class F, bool kThree, bool kOfS>
__device__ __forceinline__ bf16 term(const TermsOf& t, int64_t row, int c, int R) {
  const int block = kThree ? c / R : 0, r = c - block * R;
  if (block > (kThree ? 2 : 0) || r >= R) return bf16{0};
  const float v = to_float_fast(static_cast<const F*>(t.from)[row * t.stride_row + r * t.stride_r]);
  const bf16 hi = from_float_fast<bf16>(v);
  if (block == 0) return hi;
  const float rounded = to_float_fast(hi);
  if (!(rounded - rounded == 0.f)) return bf16{0};
  return block == (kOfS ? 1 : 2) ? hi : from_float_fast<bf16>(v - rounded);
}

// A thread writes 8 elements next to each other: of a row of S', of a row of U' [N, columns] or of a column of U' [columns, N].
template <class S, class U, bool kThree>
__device__ __forceinline__ void write_terms(const TermsOf& s, const TermsOf& u, int R, int columns, bool along_n) {
  const int64_t vectors = columns / 8, of_s = s.rows * vectors;
  int64_t at = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  Vec8<bf16> v;
  if (at < of_s) {
    const int64_t row = at / vectors;
    const int c = static_cast<int>(at % vectors) * 8;
#pragma unroll
    for (int j = 0; j < 8; ++j) v.v[j] = term<S, kThree, true>(s, row, c + j, R);
    store_16(s.to + row * s.pitch + c, bit_cast<Words8<bf16>>(v).w[0]);
    return;
  }
  at -= of_s;
  if (at >= u.rows * vectors) return;
  const int64_t across = along_n ? u.rows / 8 : vectors, line = at / across;
  const int first = static_cast<int>(at % across) * 8;
  if (along_n) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v.v[j] = term<U, kThree, false>(u, first + j, static_cast<int>(line), R);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) v.v[j] = term<U, kThree, false>(u, line, first + j, R);
  }
  store_16(u.to + line * u.pitch + first, bit_cast<Words8<bf16>>(v).w[0]);
}

// S and U themselves where they are bf16 and lie so; else S' and U' are written to the workspace (tail_bytes) by a kernel of the
// family: run(tags of S, of U, whether of three terms, the grid, what write_terms takes).
template <class Run>
int make_tail(const LowRankProduct& p, void* workspace, GemmTail* tail, const Run& run) {
  if (!workspace) {
    *tail = {static_cast<const bf16*>(p.s), static_cast<const bf16*>(p.u), p.R, p.along_n ? p.stride_r : p.stride_n,
             p.R};
    return 0;
  }
  const bool three = p.factor_dtype != DType::kBF16;
  const auto columns = static_cast<int32_t>(tail_columns(p.R, p.factor_dtype));
  auto* to = static_cast<bf16*>(workspace);
  *tail = {to, to + p.T * columns, columns, p.along_n ? p.N : columns, columns};
  const TermsOf s{p.s, p.R, 1, p.T, to, columns};
  const TermsOf u{p.u, p.stride_n, p.stride_r, p.N, to + p.T * columns, tail->u_pitch};
  const dim3 grid = grid_of(ceil_div((p.T + p.N) * (columns / 8), int64_t{kBlockThreads}), 1);
  return with_float(p.factor_dtype, [&]<class F>(F of) {
    if (!three) return run(bf16{}, bf16{}, std::false_type{}, grid, s, u, p.R, columns, p.along_n);
    if constexpr (std::is_same_v<F, bf16>) {
      return kInvalidConfiguration;
    } else {
      return run(float{}, of, std::true_type{}, grid, s, u, p.R, columns, p.along_n);
    }
  });
}

}  // namespace lrk
