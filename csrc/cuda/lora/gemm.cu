// SPDX-License-Identifier: Apache-2.0
// Base product and low-rank product in one GEMM: what comes before the kernels that architectures have of their own, on any of
// them. A factor that is not bf16 is taken apart: v = hi + lo in bf16, and
//   S U = [S_hi, S_hi, S_lo] [U_hi, U_lo, U_hi]^T
// leaves out lo lo, 2^-16 of the result. What is not finite goes into the first product alone, so that it meets no zero.
#include "lora/tail.cuh"
#include "place.cuh"

namespace lrk {
namespace {

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
__global__ void __launch_bounds__(kBlockThreads)
    lora_terms_kernel(TermsOf s, TermsOf u, int R, int columns, bool along_n) {
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
#pragma unroll
  for (int j = 0; j < 8; ++j)
    v.v[j] = along_n ? term<U, kThree, false>(u, first + j, static_cast<int>(line), R)
                     : term<U, kThree, false>(u, line, first + j, R);
  store_16(u.to + line * u.pitch + first, bit_cast<Words8<bf16>>(v).w[0]);
}

}  // namespace

int lora_tail(const LoraGemmParams& p, void* workspace, Stream stream, LoraTail* tail) {
  const bool along_n = p.w.stride_n == 1;
  if (!workspace) {
    *tail = {static_cast<const bf16*>(p.s), static_cast<const bf16*>(p.u.data), p.R,
             along_n ? p.u.stride_r : p.u.stride_n, p.R};
    return 0;
  }
  const bool three = p.factor_dtype != DType::kBF16;
  const auto columns = static_cast<int32_t>(lora_tail_columns(p.R, p.factor_dtype));
  auto* to = static_cast<bf16*>(workspace);
  *tail = {to, to + p.T * columns, columns, along_n ? p.N : columns, columns};
  const TermsOf s{p.s, p.R, 1, p.T, to, columns};
  const TermsOf u{p.u.data, p.u.stride_n, p.u.stride_r, p.N, to + p.T * columns, tail->u_pitch};
  const dim3 grid = grid_of(ceil_div((p.T + p.N) * (columns / 8), int64_t{kBlockThreads}), 1);
  return with_float(p.factor_dtype, [&](auto of) {
    using F = decltype(of);
    if (!three) {
      return launch("lora_terms", lora_terms_kernel<bf16, bf16, false>, grid, dim3(kBlockThreads), 0, stream, s, u, p.R,
                    columns, along_n);
    }
    if constexpr (std::is_same_v<F, bf16>) {
      return kInvalidConfiguration;
    } else {
      return launch("lora_terms", lora_terms_kernel<float, F, true>, grid, dim3(kBlockThreads), 0, stream, s, u, p.R,
                    columns, along_n);
    }
  });
}

int lora_gemm_cuda(const LoraGemmParams& p, void* workspace, Stream stream) {
  const Target target = cuda_target();
  const GemmConfig config = choose_lora_gemm(shape_of(p), is_plain(p), target);
  if (!config.fits) return kInvalidConfiguration;
  LoraTail tail{};
  if (p.R) {
    if (const int error = lora_tail(p, workspace, stream, &tail)) return error;
  }
  if (target.arch == 100) {
#if defined(LRK_CUTLASS)
    return lora_gemm_sm100(p, tail, stream);
#else
    return kInvalidConfiguration;
#endif
  }
  return lora_gemm_sm90(p, tail, gemm_tiles(p.T, p.N, config.tile_n, config.cluster), stream);
}

}  // namespace lrk
