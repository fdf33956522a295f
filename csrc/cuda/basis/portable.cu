// SPDX-License-Identifier: Apache-2.0
// Random bases on CUDA, sm_80 and up, over the strips of strips.cuh; nothing goes through shared memory.
// Occupancy plan: blocks of 128 threads; on an SM at least four (128 registers) where a thread holds kBasisSums sums of
// each column, three (168 registers) where it holds kRows kTokens dot products, but two of the transposed matmul, whose grid
// is no larger.
#include "cuda/epilogue.cuh"
#include "strips.cuh"

namespace lrk {
namespace {

constexpr int kFillRows = 4;  // fill: rows a thread writes

// ---- fill. Warp (kFillRows rows, 32 strips).

template <Distribution Dist>
__global__ __launch_bounds__(kBlockThreads, 6) void basis_fill_kernel(BasisFillParams p, bool vectorize) {
  constexpr int N = kColumns<Dist>;
  const int64_t first_strip = p.c0 / N, groups = ceil_div(ceil_div(p.c0 + p.C, N) - first_strip, kWarpThreads);
  const int64_t strip = first_strip + blockIdx.x % groups * kWarpThreads + lane_id(), c = strip * N - p.c0;
  const int64_t begin = (blockIdx.x / groups * kWarps + warp_id()) * kFillRows;
  const int64_t end = begin + kFillRows < p.Q ? begin + kFillRows : p.Q;
  int64_t basis = (p.q0 + begin) / p.R, row = (p.q0 + begin) % p.R;
  float by[N];  // a column's scale, loaded for all rows at once
#pragma unroll
  for (int j = 0; j < N; ++j) by[j] = p.col_scale && c + j >= 0 && c + j < p.C ? p.col_scale[c + j] : 1.f;
  for (int64_t q = begin; q < end; ++q) {
    float v[N];
    generate<Dist>(p.u, p.u.tensor, p.u.basis0 + static_cast<uint32_t>(basis), row, strip, v);
    const float scale = p.row_scale ? p.scale * p.row_scale[q] : p.scale;
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] *= by[j] * scale;
    with_float(p.dtype, [&]<class T>(T) { store_columns(static_cast<T*>(p.out) + q * p.C, c, p.C, v, vectorize); });
    if (++row == p.R) row = 0, ++basis;
  }
}

// ---- combine. Warp (kBasisSums rows of coefficients, row of the result, 32 strips), split of K by y, segment by z.

// The longest of the segments that bounds [count + 1] delimit.
int64_t longest(const int64_t* bounds, int count) {
  int64_t most = 0;
  for (int i = 0; i < count; ++i) most = max(most, bounds[i + 1] - bounds[i]);
  return most;
}
bool segments_aligned(const BasisSegments& s) {
  bool aligned = true;
  for (int i = 0; i <= s.count; ++i) aligned = aligned && s.begin[i] % 4 == 0;
  return aligned;
}

// To partial [split][T][R][W], or where there is one split to the result itself.
template <Distribution Dist, int kCount>
__global__ __launch_bounds__(kBlockThreads, 4) void basis_combine_kernel(const __grid_constant__ BasisCombineParams p,
                                                                         int64_t groups, float* partial,
                                                                         bool vectorize) {
  constexpr int N = kColumns<Dist>;
  const BasisSegments& s = p.segments;
  const int segment = static_cast<int>(blockIdx.z);
  const int64_t W = s.begin[s.count], K = s.first[s.count], c0 = s.begin[segment], k0 = s.first[segment];
  const int64_t width = s.begin[segment + 1] - c0, bases = s.first[segment + 1] - k0;
  const int64_t blocks = ceil_div(p.R * groups, kWarps), t0 = blockIdx.x / blocks * kCount;
  const int64_t item = blockIdx.x % blocks * kWarps + warp_id();
  const int64_t row = item / groups, strip = item % groups * kWarpThreads + lane_id(), c = strip * N;
  if (row >= p.R || c >= width) return;
  const int count = static_cast<int>(p.T - t0 < kCount ? p.T - t0 : kCount);
  const int64_t length = ceil_div(bases, int64_t{gridDim.y}), begin = blockIdx.y * length;
  const int64_t end = begin + length < bases ? begin + length : bases;
  const float* coef = p.coef + t0 * K + k0;
  float sum[kCount][N] = {};
  weighted_sum(
      begin, end,
      [&](int64_t k, float (&v)[N]) {
        generate<Dist>(p.u, p.u.tensor + static_cast<uint32_t>(segment), p.u.basis0 + static_cast<uint32_t>(k), row,
                       strip, v);
      },
      [&](int64_t k, float (&c)[kCount]) {
#pragma unroll
        for (int t = 0; t < kCount; ++t) c[t] = t < count ? coef[t * K + k] : 0.f;
      },
      sum);
  float base[N] = {};
  if (!partial && p.base) load_columns(p.base + row * W + c0, c, width, base, vectorize);
  const float scale = partial ? 1.f : s.scale[segment];
  float* out = partial ? partial + blockIdx.y * p.T * p.R * W : p.out;
#pragma unroll
  for (int t = 0; t < kCount; ++t)
    if (t < count) {
#pragma unroll
      for (int j = 0; j < N; ++j) sum[t][j] = base[j] + scale * sum[t][j];
      store_columns(out + ((t0 + t) * p.R + row) * W + c0, c, width, sum[t], vectorize);
    }
}

// Thread (one of T R W).
__global__ __launch_bounds__(kBlockThreads) void basis_combine_sum_kernel(const __grid_constant__ BasisCombineParams p,
                                                                          const float* partial, int64_t splits) {
  const BasisSegments& s = p.segments;
  const int64_t i = grid_thread(), W = s.begin[s.count], size = p.R * W;
  if (i >= p.T * size) return;
  int segment = 0;
  while (i % W >= s.begin[segment + 1]) ++segment;
  const float sum = sum_partial(partial + i, splits, p.T * size), base = p.base ? p.base[i % size] : 0.f;
  p.out[i] = base + s.scale[segment] * sum;
}

// ---- dot. Warp (kTokens matrices G, kRows bases), split of rows and strips by y, segment by z; to partial
// [split][T][ΣK].

template <Distribution Dist, int kCount>
__global__ __launch_bounds__(kBlockThreads, 3) void basis_dot_kernel(const __grid_constant__ BasisDotParams p,
                                                                     int64_t blocks, float* partial, bool vectorize) {
  constexpr int N = kColumns<Dist>;
  const BasisSegments& s = p.segments;
  const int segment = static_cast<int>(blockIdx.z);
  const int64_t W = s.begin[s.count], K = s.first[s.count], c0 = s.begin[segment], width = s.begin[segment + 1] - c0;
  const int64_t bases = s.first[segment + 1] - s.first[segment];
  const int64_t t0 = blockIdx.x / blocks * kCount, k0 = (blockIdx.x % blocks * kWarps + warp_id()) * kRows;
  if (k0 >= bases) return;
  const int count = static_cast<int>(p.T - t0 < kCount ? p.T - t0 : kCount);
  const int64_t groups = ceil_div(width, kWarpThreads * N), length = ceil_div(p.R * groups, int64_t{gridDim.y});
  const int64_t begin = blockIdx.y * length, end = begin + length < p.R * groups ? begin + length : p.R * groups;
  float sum[kWarpThreads] = {};
  int64_t row = groups ? begin / groups : 0, group = (groups ? begin % groups : 0) - 1;
  add_dots<kCount, N>(
      begin, end,
      [&](int64_t, int r, float (&v)[N]) {  // also of bases past the last: what they add up to is not stored
        if (r == 0 && ++group == groups) group = 0, ++row;
        generate<Dist>(p.u, p.u.tensor + static_cast<uint32_t>(segment), p.u.basis0 + static_cast<uint32_t>(k0 + r),
                       row, group * kWarpThreads + lane_id(), v);
      },
      [&](int64_t, int t, float (&x)[N]) {  // some row again where there are fewer: its sums are not stored
        const int64_t strip = group * kWarpThreads + lane_id();
        load_columns(p.g + ((t0 + (t < count ? t : 0)) * p.R + row) * W + c0, strip * N, width, x, vectorize);
      },
      sum);
  const float total = reduce_lanes(sum);
  const int64_t k = k0 + lane_id() / kTokens, t = t0 + lane_id() % kTokens;
  if (k < bases && t < t0 + count) partial[(blockIdx.y * p.T + t) * K + s.first[segment] + k] = total;
}

// Thread (one of T ΣK).
__global__ __launch_bounds__(kBlockThreads) void basis_dot_sum_kernel(const __grid_constant__ BasisDotParams p,
                                                                      const float* partial, int64_t splits) {
  const BasisSegments& s = p.segments;
  const int64_t i = grid_thread(), K = s.first[s.count];
  if (i >= p.T * K) return;
  int segment = 0;
  while (i % K >= s.first[segment + 1]) ++segment;
  p.out[i] = s.scale[segment] * sum_partial(partial + i, splits, p.T * K);
}

// ---- matmul

// x in fp32, times in_scale: transposed [T, width], zeros behind C, else [tile, Q, kBasisSums tokens].
__global__ __launch_bounds__(kBlockThreads) void basis_matmul_x_kernel(BasisMatmulParams p, BasisMatmulLayout at,
                                                                       float* x) {
  const int64_t i = grid_thread();
  if (i >= at.x) return;
  const int64_t t = p.transposed ? i / at.width : i / kBasisSums / p.Q * kBasisSums + i % kBasisSums;
  const int64_t n = p.transposed ? i % at.width : i / kBasisSums % p.Q;
  float v = 0.f;
  if (t < p.T && n < (p.transposed ? p.C : p.Q)) {
    const int64_t at = t * p.x_pitch + n;
    v = with_float(p.x_dtype, [&]<class T>(T) { return to_float_fast(static_cast<const T*>(p.x)[at]); });
    if (p.in_scale) v *= p.in_scale[n];
  }
  x[i] = v;
}

__device__ __forceinline__ void emit(const BasisMatmulParams& p, int64_t t, int64_t n, float sum) {
  const float v = p.out_scale ? p.out_scale[n] * sum : sum;
  with_float(p.out_dtype, [&]<class T>(T) {
    T* out = static_cast<T*>(p.out) + t * p.out_pitch + n;
    *out = from_float_fast<T>(p.add ? to_float_fast(*out) + v : v);
  });
}

// x U. Thread (kBasisSums tokens, strip), split of Q by y: to partial [split][T][width].
template <Distribution Dist, int kCount>
__global__ __launch_bounds__(kBlockThreads, 4) void basis_matmul_kernel(BasisMatmulParams p, BasisMatmulLayout at,
                                                                        const float* x, float* partial) {
  constexpr int N = kColumns<Dist>;
  const int64_t blocks = ceil_div(at.width / N, kBlockThreads), t0 = blockIdx.x / blocks * kCount;
  const int64_t strip = blockIdx.x % blocks * kBlockThreads + threadIdx.x;
  if (strip * N >= at.width) return;
  const int count = static_cast<int>(p.T - t0 < kCount ? p.T - t0 : kCount);
  const int64_t length = ceil_div(p.Q, at.splits), begin = blockIdx.y * length;
  const int64_t end = begin + length < p.Q ? begin + length : p.Q;
  const float* mine = x + t0 / kBasisSums * p.Q * kBasisSums;  // one token: of four, three are zeros
  int64_t basis = begin / p.R, row = begin % p.R;
  float sum[kCount][N] = {};
  weighted_sum(
      begin, end,
      [&](int64_t, float (&v)[N]) {
        generate<Dist>(p.u, p.u.tensor, p.u.basis0 + static_cast<uint32_t>(basis), row, strip, v);
        if (++row == p.R) row = 0, ++basis;
      },
      [&](int64_t q, float (&c)[kCount]) { load_aligned(mine + q * kBasisSums, c); }, sum);
#pragma unroll
  for (int t = 0; t < kCount; ++t)
    if (t < count) store_aligned(partial + (blockIdx.y * p.T + t0 + t) * at.width + strip * N, sum[t]);
}

// Thread (token, column of the result).
__global__ __launch_bounds__(kBlockThreads) void basis_matmul_sum_kernel(BasisMatmulParams p, BasisMatmulLayout at,
                                                                         const float* partial) {
  const int64_t N = p.transposed ? p.Q : p.C, pitch = p.transposed ? p.Q : at.width;
  const int64_t i = grid_thread(), t = i / N, n = i % N;
  if (t >= p.T) return;
  emit(p, t, n, sum_partial(partial + t * pitch + n, at.splits, p.T * pitch));
}

// x U^T. Warp (kTokens tokens, kRows rows), split of the columns by y: to partial [split][T][Q] where there are some. The
// order of a sum is the same for every T.
template <Distribution Dist, int kCount>
__global__ __launch_bounds__(kBlockThreads, 2) void basis_matmul_transposed_kernel(BasisMatmulParams p,
                                                                                   BasisMatmulLayout at, const float* x,
                                                                                   float* partial) {
  constexpr int N = kColumns<Dist>;
  const int64_t blocks = ceil_div(p.Q, kWarps * kRows), t0 = blockIdx.x / blocks * kCount;
  const int64_t q0 = (blockIdx.x % blocks * kWarps + warp_id()) * kRows;
  if (q0 >= p.Q) return;
  const int count = static_cast<int>(p.T - t0 < kCount ? p.T - t0 : kCount);
  uint32_t basis[kRows], row[kRows];  // also of rows past the last: what they add up to is not stored
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    basis[r] = p.u.basis0 + static_cast<uint32_t>((q0 + r) / p.R);
    row[r] = static_cast<uint32_t>((q0 + r) % p.R);
  }
  float sum[kWarpThreads] = {};
  const int64_t steps = at.width / (kWarpThreads * N), length = ceil_div(steps, at.splits), begin = blockIdx.y * length;
  const int64_t end = begin + length < steps ? begin + length : steps;
  const auto strip = [](int64_t step) { return step * kWarpThreads + lane_id(); };
  add_dots<kCount, N>(
      begin, end,
      [&](int64_t i, int r, float (&v)[N]) { generate<Dist>(p.u, p.u.tensor, basis[r], row[r], strip(i), v); },
      [&](int64_t i, int t, float (&v)[N]) {
        load_aligned(x + (t0 + (t < count ? t : 0)) * at.width + strip(i) * N, v);
      },
      sum);
  const float total = reduce_lanes(sum);
  const int64_t q = q0 + lane_id() / kTokens, t = t0 + lane_id() % kTokens;
  if (q >= p.Q || t >= t0 + count) return;
  if (at.splits > 1) {
    partial[(blockIdx.y * p.T + t) * p.Q + q] = total;
  } else {
    emit(p, t, q, total);
  }
}

}  // namespace

int basis_fill_cuda(const BasisFillParams& p, void*, Stream stream) {
  if (!p.Q || !p.C) return 0;
  return with_distribution(p.u.distribution, [&](auto d) {
    constexpr Distribution Dist = decltype(d)::value;
    constexpr int N = kColumns<Dist>;
    const bool vectorize = p.c0 % N == 0 && can_vectorize(p.out, p.C, size_of(p.dtype));
    const int64_t groups = ceil_div(ceil_div(p.c0 + p.C, N) - p.c0 / N, kWarpThreads);
    return launch("basis_fill", basis_fill_kernel<Dist>, grid_of(groups * ceil_div(p.Q, kWarps * kFillRows), 1),
                  dim3(kBlockThreads), 0, stream, p, vectorize);
  });
}

int basis_combine_cuda(const BasisCombineParams& p, void* workspace, Stream stream) {
  const BasisSegments& s = p.segments;
  const int64_t W = s.begin[s.count], splits = choose_basis_combine_splits(p.R, W, s.first[s.count], cuda_target());
  if (!p.T || !p.R || !W) return 0;
  float* partial = splits > 1 ? static_cast<float*>(workspace) : nullptr;
  const bool vectorize = segments_aligned(s) && can_vectorize(partial ? partial : p.out, W, sizeof(float)) &&
                         can_vectorize(p.base, W, sizeof(float));
  const int error = with_distribution(p.u.distribution, [&](auto d) {
    constexpr Distribution Dist = decltype(d)::value;
    const int64_t groups = ceil_div(longest(s.begin, s.count), kWarpThreads * kColumns<Dist>);  // warps of a row
    return with_rows<kBasisSums>(p.T, [&](auto rows) {
      return launch("basis_combine", basis_combine_kernel<Dist, rows>,
                    grid_of(ceil_div(p.R * groups, kWarps) * ceil_div(p.T, int64_t{rows}), splits, s.count),
                    dim3(kBlockThreads), 0, stream, p, groups, partial, vectorize);
    });
  });
  if (error || !partial) return error;
  return launch("basis_combine_sum", basis_combine_sum_kernel, grid_of_threads(p.T * p.R * W), dim3(kBlockThreads), 0,
                stream, p, partial, splits);
}

int basis_dot_cuda(const BasisDotParams& p, void* workspace, Stream stream) {
  const BasisSegments& s = p.segments;
  const int64_t W = s.begin[s.count], K = s.first[s.count], splits = choose_basis_dot_splits(p.T, K, cuda_target());
  if (!p.T || !K) return 0;
  float* partial = static_cast<float*>(workspace);
  const bool vectorize = segments_aligned(s) && can_vectorize(p.g, W, sizeof(float));
  const int64_t blocks = ceil_div(longest(s.first, s.count), kWarps * kRows);
  const int error = with_distribution(p.u.distribution, [&](auto d) {
    return with_rows<kTokens>(p.T, [&](auto rows) {
      return launch("basis_dot", basis_dot_kernel<decltype(d)::value, rows>,
                    grid_of(blocks * ceil_div(p.T, int64_t{rows}), splits, s.count), dim3(kBlockThreads), 0, stream, p,
                    blocks, partial, vectorize);
    });
  });
  if (error) return error;
  return launch("basis_dot_sum", basis_dot_sum_kernel, grid_of_threads(p.T * K), dim3(kBlockThreads), 0, stream, p,
                partial, splits);
}

int basis_matmul_cuda(const BasisMatmulParams& p, void* workspace, Stream stream) {
  const BasisMatmulLayout at = basis_matmul_layout(p, cuda_target());
  if (!p.T || !(p.transposed ? p.Q : p.C)) return 0;
  float *x = static_cast<float*>(workspace), *partial = x + at.x;
  int error = 0;
  if (at.x)
    error = launch("basis_matmul_x", basis_matmul_x_kernel, grid_of_threads(at.x), dim3(kBlockThreads), 0, stream, p,
                   at, x);
  if (error) return error;
  error = with_distribution(p.u.distribution, [&](auto d) {
    constexpr Distribution Dist = decltype(d)::value;
    if (!p.Q) return 0;  // no terms, no partial
    if (p.transposed)
      return with_rows<kTokens>(p.T, [&](auto rows) {
        return launch("basis_matmul_transposed", basis_matmul_transposed_kernel<Dist, rows>,
                      grid_of(ceil_div(p.Q, kWarps * kRows) * ceil_div(p.T, int64_t{rows}), at.splits),
                      dim3(kBlockThreads), 0, stream, p, at, x, partial);
      });
    return with_rows<kBasisSums>(p.T, [&](auto rows) {
      return launch(
          "basis_matmul", basis_matmul_kernel<Dist, rows>,
          grid_of(ceil_div(at.width / kColumns<Dist>, kBlockThreads) * ceil_div(p.T, int64_t{rows}), at.splits),
          dim3(kBlockThreads), 0, stream, p, at, x, partial);
    });
  });
  if (error || (p.transposed && at.splits <= 1)) return error;
  const int64_t outputs = p.T * (p.transposed ? p.Q : p.C);
  return launch("basis_matmul_sum", basis_matmul_sum_kernel, grid_of_threads(outputs), dim3(kBlockThreads), 0, stream,
                p, at, partial);
}

}  // namespace lrk
