// SPDX-License-Identifier: Apache-2.0
// Tiles and fragments the low-rank kernels share. A block is 128 threads, four warps. Shared memory holds operands in the
// direction global memory has them; ldmatrix transposes where mma wants the other one.
//
// What a product of an activation X and a factor F multiplies, in terms of one element type:
//   X, F of one 16-bit type   one term each, mma.sync                        exact products, fp32 sums
//   bf16 X, fp32 F            X one bf16 term, F = hi + lo in bf16            ~2^-17 of |F|
//   f16 X, fp32 F             X = hi + lo in bf16 (exact), F = hi + lo        ~2^-17 of |F|
//   fp32 X, fp32 F            fp32 FMA in the same fragment layout            as fp32
// S is fp32 beside fp16 F (lora.h): its products are those of fp32 F, and an fp16 U or X beside it two exact bf16 terms.
#pragma once

#include <type_traits>

#include "launch.cuh"
#include "ptx.cuh"
#include "rng.h"

namespace lrk {

constexpr int kBlockThreads = 128, kWarpThreads = 32, kWarps = kBlockThreads / kWarpThreads;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpThreads; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarpThreads; }
__device__ __forceinline__ int64_t grid_thread() { return int64_t{blockIdx.x} * kBlockThreads + threadIdx.x; }
inline dim3 grid_of_threads(int64_t count) { return grid_of(ceil_div(count, kBlockThreads), 1); }

template <class Elem_, int kXTerms_, int kFTerms_>
struct Terms {
  using Elem = Elem_;
  static constexpr int kXTerms = kXTerms_, kFTerms = kFTerms_;
};
template <class X, class F>
struct Math;  // no other pair of types has a product
template <class T>
struct Math<T, T> : Terms<T, 1, 1> {};
template <>
struct Math<bf16, float> : Terms<bf16, 1, 2> {};
template <>
struct Math<f16, float> : Terms<bf16, 2, 2> {};

template <class T>
struct alignas(16) Vec8 {  // 8 consecutive columns: one 128-bit access at 16 bits, two at 32; one dropout block
  T v[8];
};
template <class T>
struct Words8 {  // the same in registers, between a load and what uses it (load_16)
  uint32_t w[sizeof(T) / 2][4];
};
template <class T>
__device__ __forceinline__ Vec8<T> elements(const Words8<T>& v) {
  return bit_cast<Vec8<T>>(v);
}
template <class T>
__device__ __forceinline__ Words8<T> rounded(const Vec8<float>& v) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Words8<T>>(v);
  } else {
    Words8<T> r;
#pragma unroll
    for (int i = 0; i < 4; ++i) r.w[0][i] = pack_fast<T>(v.v[2 * i], v.v[2 * i + 1]);
    return r;
  }
}
template <class T>
__device__ __forceinline__ Vec8<float> floats(const Words8<T>& v) {
  const Vec8<T> e = elements(v);
  Vec8<float> f;
#pragma unroll
  for (int j = 0; j < 8; ++j) f.v[j] = to_float_fast(e.v[j]);
  return f;
}

inline bool can_vectorize(const void* p, int64_t pitch, size_t elem) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && pitch * static_cast<int64_t>(elem) % 16 == 0;
}

// A [kRows, kCols] operand in shared memory, kTerms of it. 16 bytes of padding a row keep ldmatrix free of conflicts.
template <class Elem_, int kRows_, int kCols_, int kTerms_>
struct Tile {
  using Elem = Elem_;
  static constexpr int kRows = kRows_, kCols = kCols_, kTerms = kTerms_;
  static constexpr int kPitch = kCols + 16 / static_cast<int>(sizeof(Elem));
  static constexpr int kTerm = kRows * kPitch, kElems = kTerms * kTerm;  // elements of one term, of all
  static constexpr size_t kBytes = smem_bytes<Elem>(kElems);
  Elem* data;
};
template <class Tile>
__device__ __forceinline__ Tile take_tile(Smem& smem) {
  return {smem.take<typename Tile::Elem>(Tile::kElems)};
}

template <class T>
__device__ __forceinline__ void load_words(Words8<T>& v, const T* p) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) load_16(v.w[i], p + i * 16 / sizeof(T));
}
template <class T>
__device__ __forceinline__ void store_words(T* p, const Words8<T>& v) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) store_16(p + i * 16 / sizeof(T), v.w[i]);
}
template <class T>
__device__ __forceinline__ void put_words(T* smem, const Words8<T>& v) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) store_shared_16(smem + i * 16 / sizeof(T), v.w[i]);
}

// The first `left` of 8 columns, zeros behind them. kPlain: the launcher knows that columns come in aligned eights; the
// ways around that stay out of the kernel.
template <bool kPlain = false, class Src>
__device__ __forceinline__ Words8<Src> load_row(const Src* p, int64_t left, bool vectorize) {
  Words8<Src> v = {};
  const int count = left < 8 ? static_cast<int>(left) : 8;
  if (kPlain ? count > 0 : vectorize && count == 8) {
    load_words(v, p);
    return v;
  }
  if (kPlain) return v;
  using Bits = std::conditional_t<sizeof(Src) == 4, uint32_t, uint16_t>;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    constexpr int kOfWord = 4 / sizeof(Src);
    const int word = j / kOfWord;
    if (j < count) v.w[word / 4][word % 4] |= uint32_t{bit_cast<Bits>(p[j])} << j % kOfWord * 16;
  }
  return v;
}
template <bool kPlain = false, class Dst>
__device__ __forceinline__ void store_row(Dst* p, const Words8<Dst>& v, int64_t left, bool vectorize) {
  if (kPlain || (vectorize && left >= 8)) {
    store_words(p, v);
    return;
  }
  const Vec8<Dst> e = elements(v);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < left) p[i] = e.v[i];
}

// The global matrix a tile is cut from: [rows, cols] still to come from its corner on, cols contiguous. As tiles are shorter
// than kSlab, more than that need not be told apart, and counts stay in one register.
constexpr int kSlab = 1024;
template <class Src, bool kPlain>
struct Slab {
  const Src* data;
  int64_t pitch;
  int rows, cols;
  bool vectorize;
};
// What a matrix [rows, cols] has from (row, col) on.
template <class Src, bool kPlain>
__device__ __forceinline__ Slab<Src, kPlain> slab(const void* data, int64_t pitch, int64_t row, int64_t col,
                                                  int64_t rows, int64_t cols, bool vectorize) {
  const auto clamp = [](int64_t n) { return static_cast<int>(n < kSlab ? n : kSlab); };
  return {static_cast<const Src*>(data) + row * pitch + col, pitch, clamp(rows - row), clamp(cols - col), vectorize};
}
template <class Src, bool kPlain>
__device__ __forceinline__ Words8<Src> load_vec(const Slab<Src, kPlain>& s, int r, int c) {
  return load_row<kPlain>(s.data + r * s.pitch + c, r < s.rows ? s.cols - c : 0, s.vectorize);
}

__device__ __forceinline__ uint64_t seed_of(const Dropout& d, const int64_t* seed) {
  return d.threshold ? static_cast<uint64_t>(*seed) : 0;
}
template <class Src>
__device__ __forceinline__ void drop(Vec8<Src>& v, const Dropout& d, uint64_t seed, int64_t row, int64_t col) {
  const Philox block = dropout_block(seed, row, col / kDropoutBlock);
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (bits16(block, j) < d.threshold) v.v[j] = Src{};
}

// Stores one vector as the terms of its tile: itself, or hi = bf16(v) and lo = bf16(v - hi), lo = 0 beside inf and nan.
template <class Src, class Elem, int kRows, int kCols, int kTerms>
__device__ __forceinline__ void store_vec(const Tile<Elem, kRows, kCols, kTerms>& tile, int r, int c,
                                          const Words8<Src>& v) {
  Elem* dst = tile.data + r * tile.kPitch + c;
  if constexpr (kTerms == 1) {
    put_words(dst, bit_cast<Words8<Elem>>(v));
  } else {
    Vec8<float> f = floats(v);
    const Words8<Elem> hi = rounded<Elem>(f);
    const Vec8<float> first = floats(hi);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float rest = f.v[j] - first.v[j];
      f.v[j] = rest == rest ? rest : 0.f;
    }
    put_words(dst, hi);
    put_words(dst + tile.kTerm, rounded<Elem>(f));
  }
}

// Global to registers to shared memory, in two halves so that the loads of the next tile fly while this one is multiplied.
// Of a tile that is staged in kParts, one at a time.
template <class Src, class Tile, int kParts = 1>
struct Stage {
  static_assert(Tile::kRows % kParts == 0);
  static constexpr int kRows = Tile::kRows / kParts, kPerRow = Tile::kCols / 8, kCount = kRows * kPerRow;
  static constexpr int kVecs = (kCount + kBlockThreads - 1) / kBlockThreads;
  static_assert(kCount % kBlockThreads == 0 || kVecs == 1, "threads share a tile evenly, or hold one vector at most");
  Words8<Src> v[kVecs];

  template <class Rows>  // a Slab, or what else load_vec takes
  __device__ __forceinline__ void fetch(const Rows& s, int part = 0) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int at = i * kBlockThreads + static_cast<int>(threadIdx.x);
      if (at < kCount) v[i] = load_vec(s, part * kRows + at / kPerRow, at % kPerRow * 8);
    }
  }
  // mask_row(r), col0: of the tile's row r and its first column in the dropout mask.
  template <class MaskRow>
  __device__ __forceinline__ void put_rows(const Tile& tile, const Dropout& d, uint64_t seed, const MaskRow& mask_row,
                                           int64_t col0, int part = 0) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int at = i * kBlockThreads + static_cast<int>(threadIdx.x);
      const int r = part * kRows + at / kPerRow, c = at % kPerRow * 8;
      if (at >= kCount) continue;
      if (d.threshold) {
        Vec8<Src> e = elements(v[i]);
        drop(e, d, seed, mask_row(r), col0 + c);
        v[i] = bit_cast<Words8<Src>>(e);
      }
      store_vec(tile, r, c, v[i]);
    }
  }
  __device__ __forceinline__ void put(const Tile& tile, const Dropout& d, uint64_t seed, int64_t row0, int64_t col0) {
    put_rows(tile, d, seed, [row0](int r) { return row0 + r; }, col0);
  }
  __device__ __forceinline__ void put(const Tile& tile, int part = 0) {
    put_rows(tile, Dropout{}, 0, [](int) { return int64_t{0}; }, 0, part);
  }
};

// A tile as an operand of C[m, n] += A[m, k] B[k, n]. kKContig: its rows run along k, else along m (or n).
template <class Tile_, bool kKContig_>
struct Operand {
  using Tile = Tile_;
  static constexpr bool kKContig = kKContig_;
  Tile tile;
};

// The four 8x8 matrices whose corners the lanes name, eight lanes each, as (i, k) of an operand.
template <class Op>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], const Op& op, int term, int i, int k) {
  const int row = (Op::kKContig ? i : k) + lane_id() % 8, col = Op::kKContig ? k : i;
  const auto* at = op.tile.data + term * Op::Tile::kTerm + row * Op::Tile::kPitch + col;
  if constexpr (Op::kKContig) {
    ldmatrix_x4(r, at);
  } else {
    ldmatrix_x4_trans(r, at);
  }
}
// A fragment of mma m16n8k16 at (m, k); matrices in register order: (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8).
template <class Op>
__device__ __forceinline__ void fragment_a(uint32_t (&r)[4], const Op& op, int term, int m, int k) {
  load_fragment(r, op, term, m + (lane_id() / 8 & 1) * 8, k + lane_id() / 16 * 8);
}
// B fragments of two neighbouring n-tiles at (k, n): (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8).
template <class Op>
__device__ __forceinline__ void fragment_b(uint32_t (&r)[4], const Op& op, int term, int n, int k) {
  load_fragment(r, op, term, n + lane_id() / 16 * 8, k + (lane_id() / 8 & 1) * 8);
}

// acc[j] += A[m.., k..k+16) B[k..k+16, n + 8 j ..): a warp's 16 x 8 kTilesN part, in the fragment layout of mma.sync:
// lane l holds rows m + l / 4 (elements 0, 1) and that + 8 (2, 3), columns 2 (l % 4) and that + 1 of each n-tile.
template <int kTilesN, class OpA, class OpB>
__device__ __forceinline__ void mma_step(float (&acc)[kTilesN][4], const OpA& a, const OpB& b, int m, int n, int k) {
  using TA = typename OpA::Tile;
  using TB = typename OpB::Tile;
  using Elem = typename TA::Elem;
  if constexpr (sizeof(Elem) == 4) {
    const int row = m + lane_id() / 4, col = n + lane_id() % 4 * 2;
    const auto at = [](const auto& op, int i, int kk) {
      using Op = std::decay_t<decltype(op)>;
      return op.tile.data[Op::kKContig ? i * Op::Tile::kPitch + kk : kk * Op::Tile::kPitch + i];
    };
    constexpr int kSum = 4;  // products summed before they meet acc: nearer to the truth than one chain over k
#pragma unroll
    for (int kk = k; kk < k + 16; kk += kSum) {
      float a0[kSum], a1[kSum];
#pragma unroll
      for (int i = 0; i < kSum; ++i) {
        a0[i] = at(a, row, kk + i);
        a1[i] = at(a, row + 8, kk + i);
      }
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        float part[4] = {};
#pragma unroll
        for (int i = 0; i < kSum; ++i) {
          const float b0 = at(b, col + j * 8, kk + i), b1 = at(b, col + j * 8 + 1, kk + i);
          part[0] += a0[i] * b0;
          part[1] += a0[i] * b1;
          part[2] += a1[i] * b0;
          part[3] += a1[i] * b1;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][e] += part[e];
      }
    }
  } else {
    uint32_t fa[TA::kTerms][4];
#pragma unroll
    for (int t = 0; t < TA::kTerms; ++t) fragment_a(fa[t], a, t, m, k);
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
#pragma unroll
      for (int tb = 0; tb < TB::kTerms; ++tb) {
        uint32_t fb[4];
        fragment_b(fb, b, tb, n + j * 8, k);
        const uint32_t b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
#pragma unroll
        for (int ta = 0; ta + tb < 2 && ta < TA::kTerms; ++ta) {  // lo * lo is below the error of the rest
          mma_16816(acc[j], fa[ta], b0, Elem{});
          mma_16816(acc[j + 1], fa[ta], b1, Elem{});
        }
      }
    }
  }
}

// Four n-tiles of one row half (h = 0: rows l / 4, 1: + 8) change hands inside each quad of lanes: lane q of the quad gets
// the 8 consecutive columns of n-tile j0 + q, so that it can read and write them as one vector.
template <int kTilesN>
__device__ __forceinline__ void gather_row(float (&out)[8], const float (&acc)[kTilesN][4], int j0, int h) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = acc[j0 + i][2 * h + e];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float got = shfl_xor(odd ? v[i] : v[i + 1], 1);
      (odd ? v[i] : v[i + 1]) = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float got = shfl_xor(high ? v[i] : v[i + 2], 2);
      (high ? v[i] : v[i + 2]) = got;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) out[2 * i + e] = v[i];
  }
}

// f(row, column, value) for every element of a warp's part at (m, n).
template <int kTilesN, class F>
__device__ __forceinline__ void for_each_element(const float (&acc)[kTilesN][4], int64_t m, int64_t n, const F& f) {
#pragma unroll
  for (int j = 0; j < kTilesN; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) f(m + lane_id() / 4 + e / 2 * 8, n + j * 8 + lane_id() % 4 * 2 + e % 2, acc[j][e]);
}

}  // namespace lrk
