// SPDX-License-Identifier: Apache-2.0
// Random bases on CUDA, sm_80 and up. A thread generates a piece of a row at a time, at most 16 columns of one Philox
// block, and keeps it in registers; nothing goes through shared memory. Blocks of a 1- or 2-bit distribution hold 8 or 4
// pieces, for each of which another thread makes the block anew: sums over 128 columns would not fit a thread's registers,
// and stores of neighbours would lie far apart.
// Occupancy plan: blocks of 128 threads; on an SM at least four (128 registers) where a thread holds kBasisSums sums of
// each column, three (168 registers) where it holds kRows kTokens dot products.
#include "basis.h"
#include "tile.cuh"

namespace lrk {
namespace {

constexpr int kLanes = 32, kWarps = kBlockThreads / kLanes;
constexpr int kFillRows = 4;  // fill: rows a thread writes
constexpr int kRows = 4;      // dot, transposed matmul: rows of U that a warp multiplies by
constexpr int kTokens = 8;    // the same: rows of G or x; kRows kTokens sums, one for each lane
static_assert(kRows * kTokens == kLanes, "reduce_lanes leaves each lane with one sum");

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kLanes; }

// ---- pieces: piece i of a row is columns i kColumns .. (i + 1) kColumns

template <Distribution D>
constexpr int kColumns = block_columns(D) < 16 ? block_columns(D) : 16;

template <Distribution D>
__device__ __forceinline__ void generate(const BasisStream& u, uint32_t tensor, uint32_t basis, int64_t row,
                                         int64_t piece, float (&v)[kColumns<D>]) {
  constexpr int kPieces = block_columns(D) / kColumns<D>, kBits = 128 / kPieces;  // of a block
  Philox block = basis_block(u.seed, u.tag(), tensor, basis, row, piece / kPieces);
  if (kPieces > 1) {  // bits of the piece to the front: words are registers, which no variable can index
    const int bit = static_cast<int>(piece % kPieces) * kBits;
    const uint32_t low = bit < 32 ? block.v[0] : block.v[1], high = bit < 96 ? block.v[2] : block.v[3];
    block.v[0] = (bit < 64 ? low : high) >> (bit % 32);
  }
#pragma unroll
  for (int j = 0; j < kColumns<D>; ++j) v[j] = basis_value<D>(block, j);
}

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {  // one access
  T v[N];
};
template <class T, int N>
constexpr int kPack = 16 / sizeof(T) < N ? 16 / sizeof(T) : N;

template <class T, int N>
__device__ __forceinline__ void store_aligned(T* p, const float (&v)[N]) {
#pragma unroll
  for (int j = 0; j < N; j += kPack<T, N>) {
    Pack<T, kPack<T, N>> pack;
#pragma unroll
    for (int i = 0; i < kPack<T, N>; ++i) pack.v[i] = from_float_fast<T>(v[j + i]);
    *reinterpret_cast<Pack<T, kPack<T, N>>*>(p + j) = pack;
  }
}
template <int N>
__device__ __forceinline__ void load_aligned(const float* p, float (&v)[N]) {
#pragma unroll
  for (int j = 0; j < N; j += kPack<float, N>) {
    const auto pack = *reinterpret_cast<const Pack<float, kPack<float, N>>*>(p + j);
#pragma unroll
    for (int i = 0; i < kPack<float, N>; ++i) v[j + i] = pack.v[i];
  }
}

// Columns first .. first + N of a row, as far as they are in 0 .. cols. With `vectorize` those inside are aligned.
template <class T, int N>
__device__ __forceinline__ void store_columns(T* row, int64_t first, int64_t cols, const float (&v)[N],
                                              bool vectorize) {
  if (vectorize && first >= 0 && first + N <= cols) return store_aligned(row + first, v);
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (first + j >= 0 && first + j < cols) row[first + j] = from_float_fast<T>(v[j]);
}
template <int N>
__device__ __forceinline__ void load_columns(const float* row, int64_t first, int64_t cols, float (&v)[N],
                                             bool vectorize) {
  if (vectorize && first + N <= cols) return load_aligned(row + first, v);
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = first + j < cols ? row[first + j] : 0.f;
}

// ---- the two sums

// sum[t] += Σ_i c_i[t] U_i for t < count, in order: coef(i, c) and elements(i, v) bring coefficients and the piece of U_i.
template <int N, class Elements, class Coef>
__device__ __forceinline__ void weighted_sum(int64_t begin, int64_t end, int count, const Elements& elements,
                                             const Coef& coef, float (&sum)[kBasisSums][N]) {
#pragma unroll(1)
  for (int64_t i = begin; i < end; ++i) {
    float c[kBasisSums], v[N];
    coef(i, c);  // first: what it reads arrives while the piece is made
    elements(i, v);
#pragma unroll
    for (int t = 0; t < kBasisSums; ++t)
      if (t < count) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum[t][j] += c[t] * v[j];
      }
  }
}

// sum[r, t] += <U_r, X_t> over a piece of each for t < count: elements(r, v) and load(t, x) bring them.
template <int N, class Elements, class Load>
__device__ __forceinline__ void add_dots(int count, const Elements& elements, const Load& load, float (&sum)[kLanes]) {
  float v[kRows][N];
#pragma unroll
  for (int r = 0; r < kRows; ++r) elements(r, v[r]);
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
    if (t < count) {
      float x[N];
      load(t, x);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < N; ++j) sum[r * kTokens + t] += v[r][j] * x[j];
    }
}

// Lane i gets the sum over lanes of sum[i]: at each step a lane hands over the half that it is not going to hold. Steps
// are instances, as a loop whose inner bound shrinks is not unrolled, and sums would leave the registers.
template <int kHalf = kLanes / 2>
__device__ __forceinline__ float reduce_lanes(float (&sum)[kLanes]) {
  const bool upper = lane_of_thread() & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float mine = upper ? sum[i + kHalf] : sum[i], other = upper ? sum[i] : sum[i + kHalf];
    sum[i] = mine + shfl_xor(other, kHalf);
  }
  if constexpr (kHalf > 1) return reduce_lanes<kHalf / 2>(sum);
  return sum[0];
}

// ---- fill. Warp (kFillRows rows, 32 pieces).

template <Distribution D>
__global__ __launch_bounds__(kBlockThreads) void basis_fill_kernel(BasisFillParams p, bool vectorize) {
  constexpr int N = kColumns<D>;
  const int64_t first_piece = p.c0 / N, groups = ceil_div(ceil_div(p.c0 + p.C, N) - first_piece, kLanes);
  const int64_t piece = first_piece + blockIdx.x % groups * kLanes + lane_of_thread(), c = piece * N - p.c0;
  const int64_t begin = (blockIdx.x / groups * kWarps + warp_of_thread()) * kFillRows;
  const int64_t end = begin + kFillRows < p.Q ? begin + kFillRows : p.Q;
  int64_t basis = (p.q0 + begin) / p.R, row = (p.q0 + begin) % p.R;
  for (int64_t q = begin; q < end; ++q) {
    float v[N];
    generate<D>(p.u, p.u.tensor, p.u.basis0 + static_cast<uint32_t>(basis), row, piece, v);
    const float scale = p.row_scale ? p.scale * p.row_scale[q] : p.scale;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const bool scaled = p.col_scale && c + j >= 0 && c + j < p.C;
      v[j] *= scaled ? p.col_scale[c + j] * scale : scale;
    }
    const int64_t at = q * p.C;
    if (p.dtype == DType::kF32) {
      store_columns(static_cast<float*>(p.out) + at, c, p.C, v, vectorize);
    } else if (p.dtype == DType::kF16) {
      store_columns(static_cast<f16*>(p.out) + at, c, p.C, v, vectorize);
    } else {
      store_columns(static_cast<bf16*>(p.out) + at, c, p.C, v, vectorize);
    }
    if (++row == p.R) row = 0, ++basis;
  }
}

// ---- combine. Warp (kBasisSums layers, row, 32 pieces), split of K and segment by y and z.

// Warps that a row takes are as many as its widest segment needs.
template <Distribution D>
int64_t groups_of(const BasisSegments& s) {
  int64_t widest = 0;
  for (int i = 0; i < s.count; ++i) widest = max(widest, s.begin[i + 1] - s.begin[i]);
  return ceil_div(widest, kLanes * kColumns<D>);
}
bool segments_aligned(const BasisSegments& s) {
  bool aligned = true;
  for (int i = 0; i <= s.count; ++i) aligned = aligned && s.begin[i] % 4 == 0;
  return aligned;
}

// To planes [split][T][R][W], or where there is one split to the result itself.
template <Distribution D>
__global__ __launch_bounds__(kBlockThreads, 4) void basis_combine_kernel(const __grid_constant__ BasisCombineParams p,
                                                                         int64_t groups, float* planes,
                                                                         bool vectorize) {
  constexpr int N = kColumns<D>;
  const BasisSegments& s = p.segments;
  const int segment = static_cast<int>(blockIdx.z);
  const int64_t W = s.begin[s.count], K = s.first[s.count], c0 = s.begin[segment], k0 = s.first[segment];
  const int64_t width = s.begin[segment + 1] - c0, bases = s.first[segment + 1] - k0;
  const int64_t blocks = ceil_div(p.R * groups, kWarps), l0 = blockIdx.x / blocks * kBasisSums;
  const int64_t item = blockIdx.x % blocks * kWarps + warp_of_thread();
  const int64_t row = item / groups, piece = item % groups * kLanes + lane_of_thread(), c = piece * N;
  if (row >= p.R || c >= width) return;
  const int count = static_cast<int>(p.T - l0 < kBasisSums ? p.T - l0 : kBasisSums);
  const int64_t length = ceil_div(bases, int64_t{gridDim.y}), begin = blockIdx.y * length;
  const int64_t end = begin + length < bases ? begin + length : bases;
  const float* coef = p.coef + l0 * K + k0;
  float sum[kBasisSums][N] = {};
  weighted_sum(
      begin, end, count,
      [&](int64_t k, float (&v)[N]) {
        generate<D>(p.u, p.u.tensor + static_cast<uint32_t>(segment), p.u.basis0 + static_cast<uint32_t>(k), row, piece,
                    v);
      },
      [&](int64_t k, float (&c)[kBasisSums]) {
#pragma unroll
        for (int t = 0; t < kBasisSums; ++t) c[t] = t < count ? coef[t * K + k] : 0.f;
      },
      sum);
  float base[N] = {};
  if (!planes && p.base) load_columns(p.base + row * W + c0, c, width, base, vectorize);
  const float scale = planes ? 1.f : s.scale[segment];
  float* out = planes ? planes + blockIdx.y * p.T * p.R * W : p.out;
#pragma unroll
  for (int t = 0; t < kBasisSums; ++t)
    if (t < count) {
#pragma unroll
      for (int j = 0; j < N; ++j) sum[t][j] = base[j] + scale * sum[t][j];
      store_columns(out + ((l0 + t) * p.R + row) * W + c0, c, width, sum[t], vectorize);
    }
}

__device__ __forceinline__ float sum_planes(const float* planes, int64_t count, int64_t pitch) {
  float sum = 0.f;
  for (int64_t i = 0; i < count; ++i) sum += planes[i * pitch];
  return sum;
}

// Thread (one of T R W).
__global__ __launch_bounds__(kBlockThreads) void basis_combine_sum_kernel(const __grid_constant__ BasisCombineParams p,
                                                                          const float* planes, int64_t splits) {
  const BasisSegments& s = p.segments;
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x, W = s.begin[s.count], size = p.R * W;
  if (i >= p.T * size) return;
  int segment = 0;
  while (i % W >= s.begin[segment + 1]) ++segment;
  const float sum = sum_planes(planes + i, splits, p.T * size), base = p.base ? p.base[i % size] : 0.f;
  p.out[i] = base + s.scale[segment] * sum;
}

// ---- dot. Warp (kTokens layers, kRows bases), split of rows and pieces and segment by y and z; to planes
// [split][T][ΣK].

int64_t most_bases(const BasisSegments& s) {
  int64_t most = 0;
  for (int i = 0; i < s.count; ++i) most = max(most, s.first[i + 1] - s.first[i]);
  return most;
}

template <Distribution D>
__global__ __launch_bounds__(kBlockThreads, 3) void basis_dot_kernel(const __grid_constant__ BasisDotParams p,
                                                                     int64_t blocks, float* planes, bool vectorize) {
  constexpr int N = kColumns<D>;
  const BasisSegments& s = p.segments;
  const int segment = static_cast<int>(blockIdx.z);
  const int64_t W = s.begin[s.count], K = s.first[s.count], c0 = s.begin[segment], width = s.begin[segment + 1] - c0;
  const int64_t bases = s.first[segment + 1] - s.first[segment];
  const int64_t l0 = blockIdx.x / blocks * kTokens, k0 = (blockIdx.x % blocks * kWarps + warp_of_thread()) * kRows;
  if (k0 >= bases) return;
  const int count = static_cast<int>(p.T - l0 < kTokens ? p.T - l0 : kTokens);
  const int64_t groups = ceil_div(width, kLanes * N), length = ceil_div(p.R * groups, int64_t{gridDim.y});
  const int64_t begin = blockIdx.y * length, end = begin + length < p.R * groups ? begin + length : p.R * groups;
  int64_t row = groups ? begin / groups : 0, group = groups ? begin % groups : 0;
  float sum[kLanes] = {};
#pragma unroll(1)
  for (int64_t i = begin; i < end; ++i) {
    const int64_t piece = group * kLanes + lane_of_thread();
    add_dots<N>(
        count,
        [&](int r, float (&v)[N]) {  // also of bases past the last: what they add up to is not stored
          generate<D>(p.u, p.u.tensor + static_cast<uint32_t>(segment), p.u.basis0 + static_cast<uint32_t>(k0 + r), row,
                      piece, v);
        },
        [&](int t, float (&x)[N]) {
          load_columns(p.g + ((l0 + t) * p.R + row) * W + c0, piece * N, width, x, vectorize);
        },
        sum);
    if (++group == groups) group = 0, ++row;
  }
  const float total = reduce_lanes(sum);
  const int64_t k = k0 + lane_of_thread() / kTokens, l = l0 + lane_of_thread() % kTokens;
  if (k < bases && l < p.T) planes[(blockIdx.y * p.T + l) * K + s.first[segment] + k] = total;
}

// Thread (one of T ΣK).
__global__ __launch_bounds__(kBlockThreads) void basis_dot_sum_kernel(const __grid_constant__ BasisDotParams p,
                                                                      const float* planes, int64_t splits) {
  const BasisSegments& s = p.segments;
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x, K = s.first[s.count];
  if (i >= p.T * K) return;
  int segment = 0;
  while (i % K >= s.first[segment + 1]) ++segment;
  p.out[i] = s.scale[segment] * sum_planes(planes + i, splits, p.T * K);
}

// ---- matmul

__device__ __forceinline__ float load_any(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(p)[i];
  if (dtype == DType::kF16) return to_float_fast(static_cast<const f16*>(p)[i]);
  return to_float_fast(static_cast<const bf16*>(p)[i]);
}

// x in fp32, times in_scale. It meets columns: [T, width], zeros behind C. It meets rows: [tile, Q, kBasisSums tokens].
__global__ __launch_bounds__(kBlockThreads) void basis_matmul_x_kernel(BasisMatmulParams p, BasisMatmulLayout at,
                                                                       float* x) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  if (i >= at.x) return;
  const int64_t t = p.transposed ? i / at.width : i / kBasisSums / p.Q * kBasisSums + i % kBasisSums;
  const int64_t n = p.transposed ? i % at.width : i / kBasisSums % p.Q;
  float v = 0.f;
  if (t < p.T && n < (p.transposed ? p.C : p.Q)) {
    v = load_any(p.x, p.x_dtype, t * p.x_pitch + n);
    if (p.in_scale) v *= p.in_scale[n];
  }
  x[i] = v;
}

template <class T>
__device__ __forceinline__ void emit_as(const BasisMatmulParams& p, int64_t i, float v) {
  T* out = static_cast<T*>(p.out) + i;
  *out = from_float_fast<T>(p.add ? to_float_fast(*out) + v : v);
}
__device__ __forceinline__ void emit(const BasisMatmulParams& p, int64_t t, int64_t n, float sum) {
  const float v = p.out_scale ? p.out_scale[n] * sum : sum;
  const int64_t i = t * p.out_pitch + n;
  if (p.out_dtype == DType::kF32) return emit_as<float>(p, i, v);
  if (p.out_dtype == DType::kF16) return emit_as<f16>(p, i, v);
  emit_as<bf16>(p, i, v);
}

// x U. Thread (kBasisSums tokens, piece), split of Q by y: to planes [split][T][width].
template <Distribution D>
__global__ __launch_bounds__(kBlockThreads, 4) void basis_matmul_kernel(BasisMatmulParams p, BasisMatmulLayout at,
                                                                        const float* x, float* planes) {
  constexpr int N = kColumns<D>;
  const int64_t blocks = ceil_div(at.width / N, kBlockThreads), tile = blockIdx.x / blocks, t0 = tile * kBasisSums;
  const int64_t piece = blockIdx.x % blocks * kBlockThreads + threadIdx.x;
  if (piece * N >= at.width) return;
  const int count = static_cast<int>(p.T - t0 < kBasisSums ? p.T - t0 : kBasisSums);
  const int64_t length = ceil_div(p.Q, at.splits), begin = blockIdx.y * length;
  const int64_t end = begin + length < p.Q ? begin + length : p.Q;
  const float* mine = x + tile * p.Q * kBasisSums;
  int64_t basis = begin / p.R, row = begin % p.R;
  float sum[kBasisSums][N] = {};
  weighted_sum(
      begin, end, count,
      [&](int64_t, float (&v)[N]) {
        generate<D>(p.u, p.u.tensor, p.u.basis0 + static_cast<uint32_t>(basis), row, piece, v);
        if (++row == p.R) row = 0, ++basis;
      },
      [&](int64_t q, float (&c)[kBasisSums]) { load_aligned(mine + q * kBasisSums, c); }, sum);
#pragma unroll
  for (int t = 0; t < kBasisSums; ++t)
    if (t < count) store_aligned(planes + (blockIdx.y * p.T + t0 + t) * at.width + piece * N, sum[t]);
}

// Thread (token, column).
__global__ __launch_bounds__(kBlockThreads) void basis_matmul_sum_kernel(BasisMatmulParams p, BasisMatmulLayout at,
                                                                         const float* planes) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x, t = i / p.C, c = i % p.C;
  if (t >= p.T) return;
  emit(p, t, c, sum_planes(planes + t * at.width + c, at.splits, p.T * at.width));
}

// x U^T. Warp (kTokens tokens, kRows rows), all columns. The order of a sum is the same for every T.
template <Distribution D>
__global__ __launch_bounds__(kBlockThreads, 3) void basis_matmul_transposed_kernel(BasisMatmulParams p,
                                                                                   BasisMatmulLayout at,
                                                                                   const float* x) {
  constexpr int N = kColumns<D>;
  const int64_t blocks = ceil_div(p.Q, kWarps * kRows), t0 = blockIdx.x / blocks * kTokens;
  const int64_t q0 = (blockIdx.x % blocks * kWarps + warp_of_thread()) * kRows;
  if (q0 >= p.Q) return;
  const int count = static_cast<int>(p.T - t0 < kTokens ? p.T - t0 : kTokens);
  uint32_t basis[kRows], row[kRows];  // also of rows past the last: what they add up to is not stored
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    basis[r] = p.u.basis0 + static_cast<uint32_t>((q0 + r) / p.R);
    row[r] = static_cast<uint32_t>((q0 + r) % p.R);
  }
  float sum[kLanes] = {};
#pragma unroll(1)
  for (int64_t piece = lane_of_thread(); piece * N < at.width; piece += kLanes)
    add_dots<N>(
        count, [&](int r, float (&v)[N]) { generate<D>(p.u, p.u.tensor, basis[r], row[r], piece, v); },
        [&](int t, float (&v)[N]) { load_aligned(x + (t0 + t) * at.width + piece * N, v); }, sum);
  const float total = reduce_lanes(sum);
  const int64_t q = q0 + lane_of_thread() / kTokens, t = t0 + lane_of_thread() % kTokens;
  if (q < p.Q && t < p.T) emit(p, t, q, total);
}

// ---- launchers

dim3 grid_over(int64_t elements) { return grid_of(ceil_div(elements, kBlockThreads), 1); }

}  // namespace

int basis_fill_cuda(const BasisFillParams& p, void*, Stream stream) {
  if (!p.Q || !p.C) return 0;
  return with_distribution(p.u.distribution, [&](auto d) {
    constexpr Distribution D = decltype(d)::value;
    constexpr int N = kColumns<D>;
    const bool vectorize = p.c0 % N == 0 && can_vectorize(p.out, p.C, size_of(p.dtype));
    const int64_t groups = ceil_div(ceil_div(p.c0 + p.C, N) - p.c0 / N, kLanes);
    return launch("basis_fill", basis_fill_kernel<D>, grid_of(groups * ceil_div(p.Q, kWarps * kFillRows), 1),
                  dim3(kBlockThreads), 0, stream, p, vectorize);
  });
}

int basis_combine_cuda(const BasisCombineParams& p, void* workspace, Stream stream) {
  const BasisSegments& s = p.segments;
  const int64_t W = s.begin[s.count], splits = choose_basis_combine_splits(p.R, W, s.first[s.count], cuda_target());
  if (!p.T || !p.R || !W) return 0;
  float* planes = splits > 1 ? static_cast<float*>(workspace) : nullptr;
  const bool vectorize = segments_aligned(s) && can_vectorize(planes ? planes : p.out, W, sizeof(float)) &&
                         can_vectorize(p.base, W, sizeof(float));
  const int error = with_distribution(p.u.distribution, [&](auto d) {
    constexpr Distribution D = decltype(d)::value;
    const int64_t groups = groups_of<D>(s);
    return launch("basis_combine", basis_combine_kernel<D>,
                  grid_of(ceil_div(p.R * groups, kWarps) * ceil_div(p.T, kBasisSums), splits, s.count),
                  dim3(kBlockThreads), 0, stream, p, groups, planes, vectorize);
  });
  if (error || !planes) return error;
  return launch("basis_combine_sum", basis_combine_sum_kernel, grid_over(p.T * p.R * W), dim3(kBlockThreads), 0, stream,
                p, static_cast<const float*>(planes), splits);
}

int basis_dot_cuda(const BasisDotParams& p, void* workspace, Stream stream) {
  const BasisSegments& s = p.segments;
  const int64_t W = s.begin[s.count], K = s.first[s.count], splits = choose_basis_dot_splits(p.T, K, cuda_target());
  if (!p.T || !K) return 0;
  float* planes = static_cast<float*>(workspace);
  const bool vectorize = segments_aligned(s) && can_vectorize(p.g, W, sizeof(float));
  const int64_t blocks = ceil_div(most_bases(s), kWarps * kRows);
  const int error = with_distribution(p.u.distribution, [&](auto d) {
    return launch("basis_dot", basis_dot_kernel<decltype(d)::value>,
                  grid_of(blocks * ceil_div(p.T, kTokens), splits, s.count), dim3(kBlockThreads), 0, stream, p, blocks,
                  planes, vectorize);
  });
  if (error) return error;
  return launch("basis_dot_sum", basis_dot_sum_kernel, grid_over(p.T * K), dim3(kBlockThreads), 0, stream, p,
                static_cast<const float*>(planes), splits);
}

int basis_matmul_cuda(const BasisMatmulParams& p, void* workspace, Stream stream) {
  const BasisMatmulLayout at = basis_matmul_layout(p, cuda_target());
  if (!p.T || !(p.transposed ? p.Q : p.C)) return 0;
  float *x = static_cast<float*>(workspace), *planes = x + at.x;
  int error = 0;
  if (at.x)
    error = launch("basis_matmul_x", basis_matmul_x_kernel, grid_over(at.x), dim3(kBlockThreads), 0, stream, p, at, x);
  if (error) return error;
  error = with_distribution(p.u.distribution, [&](auto d) {
    constexpr Distribution D = decltype(d)::value;
    if (!p.Q) return 0;  // no terms, no planes
    if (p.transposed)
      return launch("basis_matmul_transposed", basis_matmul_transposed_kernel<D>,
                    grid_of(ceil_div(p.Q, kWarps * kRows) * ceil_div(p.T, kTokens), 1), dim3(kBlockThreads), 0, stream,
                    p, at, static_cast<const float*>(x));
    return launch("basis_matmul", basis_matmul_kernel<D>,
                  grid_of(ceil_div(at.width / kColumns<D>, kBlockThreads) * ceil_div(p.T, kBasisSums), at.splits),
                  dim3(kBlockThreads), 0, stream, p, at, static_cast<const float*>(x), planes);
  });
  if (error || p.transposed) return error;
  return launch("basis_matmul_sum", basis_matmul_sum_kernel, grid_over(p.T * p.C), dim3(kBlockThreads), 0, stream, p,
                at, static_cast<const float*>(planes));
}

}  // namespace lrk
