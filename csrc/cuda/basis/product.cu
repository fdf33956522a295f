// SPDX-License-Identifier: Apache-2.0
// x U and x U^T of many tokens on tensor cores, for what no plain GEMM takes: x and the result of different types, or vectors
// that fp16 may not hold. A block makes its tile of U in shared memory, k after k, while products of the tile before run, so
// that U never is in memory and only x and the result move.
//
// Terms, summed in fp32 over k in order:   U of 8 bits or fewer is one exact bf16 (and fp16) term, of 16 bits two, of 32 two
// to 2^-17. x of a type with tensor cores is itself, and in_scale then goes into U, hi + lo to 2^-17; else in_scale (.) x is
// two bf16 terms in scratch memory: fp32 to 2^-17, fp16 without in_scale exactly. lo * lo is left out.
//
// Tiles hold vectors of 8 elements, swizzled so that 8 lanes which store or ldmatrix reads together meet no bank twice.
#include "cuda/epilogue.cuh"
#include "strips.cuh"

namespace lrk {
namespace {

constexpr int kTileT = 128, kTileK = 32, kTileX = kTileT * kTileK;  // tokens, k, elements of x
constexpr int kStages = 4;                                          // tiles of x that arrive or are read
constexpr int kWarpT = 32, kWarpN = 64;

// Tiles 256 columns wide would halve what x U reads again of x, but their threads have 128 registers and spill on sm_80.
template <class Elem_, int kXTerms_, int kUTerms_, bool kUniform8_, bool kTransposed_>
struct ProductShape {
  using Elem = Elem_;
  static constexpr int kXTerms = kXTerms_, kUTerms = kUTerms_;
  static constexpr bool kUniform8 = kUniform8_, kTransposed = kTransposed_;
  static constexpr int kTileN = 128, kTileU = kTileN * kTileK, kStage = kXTerms * kTileX;
  static constexpr int kThreads = kTileT / kWarpT * (kTileN / kWarpN) * kWarpThreads;
  static constexpr int kBlocks = 1;  // on an SM: 128 registers would spill
  static_assert(kThreads == kTileU / 16, "a thread makes 16 columns of a tile");
  static constexpr int kTiles = kStages * kStage + 2 * kUTerms * kTileU;
  static_assert(kTiles * sizeof(Elem) >= kTileT * kTileN / 2 * sizeof(float), "half of the sums take the tiles' place");
  static constexpr size_t kBytes = smem_bytes<Elem>(kTiles) + smem_bytes<float>(2 * kTileK);
};

// x as terms [T, M] in memory, rows `pitch` and terms `plane` elements apart.
struct ProductX {
  const void* data;
  int64_t pitch, plane;
};

// Where vector `vec` of a row is, in elements: rows of kTileK along k, or of kCols along n, vectors 2 i before 2 i + 1.
template <bool kKContig, int kCols = kTileK>
__device__ __forceinline__ int place(int row, int vec) {
  return row * kCols + 8 * (kKContig ? vec ^ (row >> 1 & 3) : (vec % 2 * (kCols / 16) + vec / 2) ^ (row & 7));
}

template <class T, int N = 8>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Words {  // N elements, as registers hold them
  uint32_t w[N * sizeof(T) / 4];
};
template <class T, int N>
__device__ __forceinline__ float element(const Words<T, N>& v, int i) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<float>(v.w[i]);
  } else {
    return to_float_fast(T{static_cast<uint16_t>(v.w[i / 2] >> (i % 2 * 16))});
  }
}
template <class T, int N = 8>
__device__ __forceinline__ Words<T, N> words_of(const float* v) {
  Words<T, N> out;
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 4); ++i) {
    if constexpr (sizeof(T) == 4) {
      out.w[i] = bit_cast<uint32_t>(v[i]);
    } else {
      out.w[i] = pack_fast<T>(v[2 * i], v[2 * i + 1]);
    }
  }
  return out;
}
// v = hi + lo: what is left of v is its lo, 0 beside inf and nan.
template <int N>
__device__ __forceinline__ void take_hi(const Words<bf16, N>& hi, float* v) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float rest = v[i] - element(hi, i);
    v[i] = rest == rest ? rest : 0.f;
  }
}

// 16 columns of a row of U.
template <Distribution Dist>
__device__ __forceinline__ void generate16(const BasisStream& u, uint32_t basis, int64_t row, int64_t group,
                                           float (&v)[16]) {
  constexpr int N = kColumns<Dist>;
#pragma unroll
  for (int i = 0; i < 16 / N; ++i) {
    float part[N];
    generate<Dist>(u, u.tensor, basis, row, group * (16 / N) + i, part);
#pragma unroll
    for (int j = 0; j < N; ++j) v[i * N + j] = part[j];
  }
}

// The part of U's tiles that a thread makes: 16 columns of one row of each, times the scale of their k.
template <class Shape>
struct Maker {
  using Elem = typename Shape::Elem;
  static constexpr int kGroups = (Shape::kTransposed ? kTileK : Shape::kTileN) / 16;  // of a row of the tile
  const BasisMatmulParams& p;
  int at, g;  // row and group in the tile
  int64_t group;
  uint32_t basis, row;  // rows of a basis are 2^32 at most
  Words<Elem> words[Shape::kUTerms][2];

  __device__ __forceinline__ Maker(const BasisMatmulParams& params, int64_t n0) : p(params) {
    at = static_cast<int>(threadIdx.x) / kGroups, g = static_cast<int>(threadIdx.x) % kGroups;
    const int64_t q = Shape::kTransposed ? n0 + at : at;
    group = Shape::kTransposed ? g : n0 / 16 + g;
    basis = p.u.basis0 + static_cast<uint32_t>(q / p.R), row = static_cast<uint32_t>(q % p.R);
  }
  // Those of the next tile. bases, rows: by how much kTileK rows go on; scale [kTileK], or null.
  __device__ __forceinline__ void make(uint32_t bases, uint32_t rows, const float* scale) {
    float v[16];
    if constexpr (Shape::kUniform8) {
      generate16<Distribution::kUniform8>(p.u, basis, row, group, v);
    } else {
      with_distribution(p.u.distribution, [&](auto d) { generate16<decltype(d)::value>(p.u, basis, row, group, v); });
    }
    if (Shape::kUTerms == 2 && scale) {
#pragma unroll
      for (int j = 0; j < 16; ++j) v[j] *= scale[Shape::kTransposed ? g * 16 + j : at];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      words[0][h] = words_of<Elem>(v + 8 * h);
      if constexpr (Shape::kUTerms == 2) {
        take_hi(words[0][h], v + 8 * h);
        words[1][h] = words_of<Elem>(v + 8 * h);
      }
    }
    if (Shape::kTransposed) {
      group += kGroups;
    } else {
      const auto R = static_cast<uint32_t>(p.R);
      const bool ends = row > R - 1 - rows;
      basis += bases + ends, row += rows - (ends ? R : 0);
    }
  }
  __device__ __forceinline__ void store(Elem* tile) const {
    constexpr int kCols = Shape::kTransposed ? kTileK : Shape::kTileN;
#pragma unroll
    for (int term = 0; term < Shape::kUTerms; ++term)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<Words<Elem>*>(tile + term * Shape::kTileU + place<Shape::kTransposed, kCols>(at, 2 * g + h)) =
            words[term][h];
  }
};

// acc += a warp's rows m.. of x's tile times its columns n.. of U's.
template <class Shape>
__device__ __forceinline__ void multiply(float (&acc)[2][8][4], const typename Shape::Elem* tx,
                                         const typename Shape::Elem* tu, int m, int n) {
  const int lane = lane_id(), r = lane % 8, second = lane / 8 & 1, fourth = lane / 16;
#pragma unroll
  for (int k = 0; k < kTileK; k += 16) {
    uint32_t a[Shape::kXTerms][2][4];
#pragma unroll
    for (int t = 0; t < Shape::kXTerms; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ldmatrix_x4(a[t][i], tx + t * kTileX + (m + 16 * i) * kTileK + place<true>(r + 8 * second, k / 8 + fourth));
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int tb = 0; tb < Shape::kUTerms; ++tb) {
        uint32_t b[4];
        if constexpr (Shape::kTransposed) {
          ldmatrix_x4(b, tu + tb * Shape::kTileU + (n + 16 * j) * kTileK + place<true>(r + 8 * fourth, k / 8 + second));
        } else {
          ldmatrix_x4_trans(b, tu + tb * Shape::kTileU + k * Shape::kTileN +
                                   place<false, Shape::kTileN>(r + 8 * second, n / 8 + 2 * j + fourth));
        }
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int ta = 0; ta + tb < 2 && ta < Shape::kXTerms; ++ta)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma_16816(acc[i][2 * j], a[ta][i], b0, typename Shape::Elem{});
            mma_16816(acc[i][2 * j + 1], a[ta][i], b1, typename Shape::Elem{});
          }
      }
  }
}

// A warp's part of the result goes through shared memory, `sums` [16, kWarpN], 16 rows at a time: a lane then has four columns
// of every other row. Eight columns of four rows change places, so that neither side meets a bank twice.
constexpr int kSums = 16 * kWarpN;
__device__ __forceinline__ int place_sum(int row, int col) { return row * kWarpN + (col ^ 8 * (row & 3)); }

// out = base + out_scale (.) sums for rows t.. and columns n.. of it.
template <class T>
__device__ __forceinline__ void store_sums(const BasisMatmulParams& p, int64_t N, const float* sums, int64_t t,
                                           int64_t n, bool vectorize) {
  if (vectorize && n + kWarpN <= N) {
    constexpr int kTogether = 8 / sizeof(T);  // rows of a lane whose base is on its way at a time
    const int col = lane_id() % 16 * 4, row = lane_id() / 16;
    T* out = static_cast<T*>(p.out) + (t + row) * p.out_pitch + n + col;
    float scale[4] = {1.f, 1.f, 1.f, 1.f};
    if (p.out_scale) load_aligned(p.out_scale + n + col, scale);
#pragma unroll(1)
    for (int first = row; first < 16; first += 2 * kTogether, out += 2 * kTogether * p.out_pitch) {
      Words<T, 4> base[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (p.add && t + first + 2 * i < p.T)
          base[i] = *reinterpret_cast<const Words<T, 4>*>(out + 2 * i * p.out_pitch);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        float v[4];
        load_aligned(sums + place_sum(first + 2 * i, col), v);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = (p.add ? element(base[i], e) : 0.f) + scale[e] * v[e];
        if (t + first + 2 * i < p.T) *reinterpret_cast<Words<T, 4>*>(out + 2 * i * p.out_pitch) = words_of<T, 4>(v);
      }
    }
  } else {
#pragma unroll(1)
    for (int i = lane_id(); i < kSums; i += kWarpThreads) {
      const int row = i / kWarpN, col = i % kWarpN;
      if (t + row >= p.T || n + col >= N) continue;
      T* out = static_cast<T*>(p.out) + (t + row) * p.out_pitch + n + col;
      const float scale = p.out_scale ? p.out_scale[n + col] : 1.f;
      *out = from_float_fast<T>((p.add ? to_float_fast(*out) : 0.f) + scale * sums[place_sum(row, col)]);
    }
  }
}
__device__ __forceinline__ void store_product(const BasisMatmulParams& p, int64_t N, const float (&acc)[2][8][4],
                                              float* sums, int64_t t, int64_t n, bool vectorize) {
#pragma unroll(1)
  for (int i = 0; i < 2; ++i) {
    sync_warp();  // the rows before have been read
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float pair[2] = {i ? acc[1][j][2 * h] : acc[0][j][2 * h],
                               i ? acc[1][j][2 * h + 1] : acc[0][j][2 * h + 1]};
        store_aligned(sums + place_sum(lane_id() / 4 + 8 * h, 8 * j + lane_id() % 4 * 2), pair);
      }
    sync_warp();
    with_float(p.out_dtype, [&]<class T>(T) { store_sums<T>(p, N, sums, t + 16 * i, n, vectorize); });
  }
}

// Block (kTileT tokens, kTileN columns of the result), columns first, so that neighbours read the same x.
template <class Elem, int kXTerms, int kUTerms, bool kUniform8, bool kTransposed>
__global__ __launch_bounds__(
    ProductShape<Elem, kXTerms, kUTerms, kUniform8, kTransposed>::kThreads,
    ProductShape<Elem, kXTerms, kUTerms, kUniform8,
                 kTransposed>::kBlocks) void basis_product_kernel(const __grid_constant__ BasisMatmulParams p,
                                                                  ProductX x, const float* in_scale, bool vectorize) {
  using Shape = ProductShape<Elem, kXTerms, kUTerms, kUniform8, kTransposed>;
  const int64_t N = kTransposed ? p.Q : p.C;
  const uint32_t tile_t = blockIdx.y, tile_n = blockIdx.x;
  const int64_t left_t = p.T - int64_t{tile_t} * kTileT;
  const int tokens = left_t < kTileT ? static_cast<int>(left_t) : kTileT;  // of the block
  const int M = static_cast<int>(kTransposed ? p.C : p.Q), thread = static_cast<int>(threadIdx.x);
  Smem smem;
  Elem *tx = smem.take<Elem>(Shape::kTiles), *tu = tx + kStages * Shape::kStage;
  float* scales = smem.take<float>(2 * kTileK);

  const int x_row = thread / 4, x_vec = thread % 4;  // a thread's vectors lie kThreads / 4 rows apart
  const Elem* from = static_cast<const Elem*>(x.data) + (int64_t{tile_t} * kTileT + x_row) * x.pitch + x_vec * 8;
  const auto fetch = [&](int step) {  // x's next tile, zeros past its ends
    const int left = 2 * (M - step * kTileK - x_vec * 8), bytes = left < 0 ? 0 : left < 16 ? left : 16;
    Elem* to = tx + step % kStages * Shape::kStage;
#pragma unroll
    for (int i = 0; i < kTileX / 8 / Shape::kThreads; ++i) {
      const int row = i * (Shape::kThreads / 4);
#pragma unroll
      for (int term = 0; term < kXTerms; ++term)
        cp_async_16_zfill(to + term * kTileX + place<true>(x_row + row, x_vec), from + row * x.pitch + term * x.plane,
                          x_row + row < tokens ? bytes : 0);
    }
    from += kTileK;
    cp_async_commit();
  };
  const bool scaled = kUTerms == 2 && in_scale, brings = scaled && thread < kTileK;
  const auto scale_of = [&](int step) {  // of k = thread
    const int k = step * kTileK + thread;
    return k < M ? in_scale[k] : 0.f;
  };

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  if (brings) {
    scales[thread] = scale_of(0);
    scales[kTileK + thread] = scale_of(1);
  }
  if (scaled) sync_threads();
  const auto bases = static_cast<uint32_t>(kTileK / p.R), rows = static_cast<uint32_t>(kTileK % p.R);
  Maker<Shape> u(p, int64_t{tile_n} * Shape::kTileN);
  u.make(bases, rows, scaled ? scales : nullptr);
  u.store(tu);
  float acc[2][8][4] = {};
  const int m = warp_id() % (kTileT / kWarpT) * kWarpT, n = warp_id() / (kTileT / kWarpT) * kWarpN;
  const int steps = ceil_div(M, kTileK);
#pragma unroll(1)
  for (int step = 0; step < steps; ++step) {
    const int now = step & 1, next = 1 - now;
    cp_async_wait<kStages - 2>();
    sync_threads();  // tiles of this step are there, those of the step before have been read
    fetch(step + kStages - 1);
    const float later = brings ? scale_of(step + 2) : 0.f;
    u.make(bases, rows, scaled ? scales + next * kTileK : nullptr);  // past the end too, which nobody reads
    u.store(tu + next * kUTerms * Shape::kTileU);
    multiply<Shape>(acc, tx + step % kStages * Shape::kStage, tu + now * kUTerms * Shape::kTileU, m, n);
    if (brings) scales[now * kTileK + thread] = later;
  }
  cp_async_wait<0>();
  sync_threads();  // all tiles have been read, and nothing more arrives: sums go in their place
  store_product(p, N, acc, reinterpret_cast<float*>(tx) + warp_id() * kSums, int64_t{tile_t} * kTileT + m,
                int64_t{tile_n} * Shape::kTileN + n, vectorize);
}

// in_scale (.) x as two bf16 terms [T, width]. Thread (4 columns of a token).
__global__ __launch_bounds__(kBlockThreads) void basis_product_x_kernel(BasisMatmulParams p, bf16* terms, int64_t width,
                                                                        bool vectorize) {
  const int64_t vecs = width / 4, i = grid_thread(), t = i / vecs, n = i % vecs * 4, M = p.transposed ? p.C : p.Q;
  if (t >= p.T) return;
  float v[4];
  with_float(p.x_dtype, [&]<class T>(T) {
    const T* x = static_cast<const T*>(p.x) + t * p.x_pitch + n;
    if (vectorize && n + 4 <= M) {
      const auto words = *reinterpret_cast<const Words<T, 4>*>(x);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = element(words, j);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = n + j < M ? to_float_fast(x[j]) : 0.f;
    }
  });
  if (p.in_scale) {
    float scale[4];
    load_columns(p.in_scale, n, M, scale, vectorize);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] *= scale[j];
  }
  const auto hi = words_of<bf16, 4>(v);
  take_hi(hi, v);
  bf16* to = terms + t * width + n;
  *reinterpret_cast<Words<bf16, 4>*>(to) = hi;
  *reinterpret_cast<Words<bf16, 4>*>(to + p.T * width) = words_of<bf16, 4>(v);
}

// f(element type, terms of x, terms of U, whether U is of 8 bits), each as a constant.
template <class F>
int with_product(const BasisMatmulParams& p, bool direct, const F& f) {
  using std::bool_constant;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  const bool uniform8 = p.u.distribution == Distribution::kUniform8;
  if (!direct)
    return uniform8 ? f(bf16{}, two, one, bool_constant<true>{}) : f(bf16{}, two, two, bool_constant<false>{});
  if (p.x_dtype == DType::kF16) return f(f16{}, one, one, bool_constant<true>{});
  if (!uniform8) return f(bf16{}, one, two, bool_constant<false>{});
  return p.in_scale ? f(bf16{}, one, two, bool_constant<true>{}) : f(bf16{}, one, one, bool_constant<true>{});
}

}  // namespace

int basis_product_cuda(const BasisMatmulParams& p, void* workspace, Stream stream) {
  if (!p.T) return 0;
  const int64_t N = p.transposed ? p.Q : p.C;
  const auto [direct, width] = basis_product_layout(p);
  ProductX x{p.x, p.x_pitch, 0};
  if (!direct) {
    x = {workspace, width, p.T * width};
    const bool vectorize = can_vectorize(p.x, p.x_pitch, size_of(p.x_dtype)) && can_vectorize(p.in_scale, 0, 4);
    const int error = launch("basis_product_x", basis_product_x_kernel, grid_of_threads(p.T * (width / 4)),
                             dim3(kBlockThreads), 0, stream, p, static_cast<bf16*>(workspace), width, vectorize);
    if (error) return error;
  }
  const bool vectorize = can_vectorize(p.out, p.out_pitch, size_of(p.out_dtype)) && can_vectorize(p.out_scale, 0, 4);
  const float* in_scale = direct ? p.in_scale : nullptr;
  return with_bool(p.transposed, [&](auto transposed) {
    return with_product(p, direct, [&]<class Elem>(Elem, auto x_terms, auto u_terms, auto uniform8) {
      using Shape = ProductShape<Elem, x_terms, u_terms, uniform8, transposed>;
      return launch("basis_product", basis_product_kernel<Elem, x_terms, u_terms, uniform8, transposed>,
                    grid_of(ceil_div(N, Shape::kTileN), ceil_div(p.T, kTileT)), dim3(Shape::kThreads), Shape::kBytes,
                    stream, p, x, in_scale, vectorize);
    });
  });
}

}  // namespace lrk
