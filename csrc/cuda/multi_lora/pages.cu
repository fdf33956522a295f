// SPDX-License-Identifier: Apache-2.0
// Multi-LoRA on CUDA, sm_80 and up, where x and the factors share a 16-bit type: shrink and expand with their operands
// swapped. M of mma m16n8k16 is the 16 ranks of a page (shrink) or 16 columns of N (expand), and its N 8 rows of a tile of
// the plan, so that one row of an adapter does not pay for 64. A pool's fragments come straight from global memory, 16 bytes
// a lane: which index of a sum is which k of a fragment is free as long as both operands agree. Lane = 4 g + t, ptx.cuh's.
#include "cuda/epilogue.cuh"
#include "cuda/products.cuh"
#include "pages.cuh"
#include "rows.cuh"

namespace lrk {
namespace {

// kPlain of a kernel: operands are aligned and their rows whole vectors, and there is no dropout.
template <bool kPlain>
__device__ __forceinline__ Dropout dropout_at(const Adapters& d, int64_t adapter) {
  return kPlain ? Dropout{} : dropout_of(d, adapter);
}

// ---- S. Block (slot and tile, pages, 8 kTiles of its rows). A warp takes every eighth step of N; their sums are added in
// order: a function of N and R alone. 8 rows leave registers for all of a step's loads of the pool, more read it less often.

constexpr int kShrinkThreads = 256, kShrinkWarps = kShrinkThreads / kWarpThreads;
constexpr int kFragment = 4 * kWarpThreads;  // floats of a 16 x 8 result
template <int kPages, int kTiles>
constexpr int kShrinkFloats = kShrinkWarps * kPages * kTiles * kFragment;

template <class X, int kPages, int kTiles, bool kPlain>
__global__ __launch_bounds__(kShrinkThreads, kPlain ? 2 : 1) void multi_lora_page_shrink_kernel(MultiLoraShrinkParams p,
                                                                                                Vectorize vec) {
  constexpr int kStep = 256 / kPages, kPart = kTiles == 1 ? kStep : kStep / 2;  // of a step, held at a time
  constexpr int kWindows = kPart / 32;  // a lane has 16 bytes of each window of 32 columns
  static_assert(kPages == 1 || kPages == 2);
  Smem smem;
  float* parts = smem.take<float>(kShrinkFloats<kPages, kTiles>);
  const Adapters& d = p.adapters;
  const int64_t G = plan_layout(d.T, d.A).G, page0 = int64_t{blockIdx.y} * kPages;
  const PlanTile tile =
      tile_of(d, blockIdx.x / G, blockIdx.x % G).part(static_cast<int>(blockIdx.z) * 8 * kTiles, 8 * kTiles);
  if (tile.count <= 0) return;
  const int g = lane_id() / 4, t = lane_id() % 4;
  int32_t rows[kTiles];
  Page pages[kPages];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) rows[j] = tile.row(d, 8 * j + g);
#pragma unroll
  for (int q = 0; q < kPages; ++q) pages[q] = page_of(d, tile.adapter, page0 + q);
  const Dropout dropout = dropout_at<kPlain>(d, tile.adapter);
  const uint64_t seed = seed_of(dropout, d.seed);

  float acc[2][kTiles][4] = {};  // two chains of products: of both pages, or of one page's even and odd ones
#pragma unroll(1)
  for (int64_t at = warp_id() * kStep, part = 0; at < p.N; part = part + kPart < kStep ? part + kPart : 0) {
    const int64_t n = at + part + 8 * t;
    if (part + kPart == kStep) at += kShrinkWarps * kStep;
    Words8<X> u[kPages][kWindows][2];  // rows g and g + 8 of a page
#pragma unroll
    for (int q = 0; q < kPages; ++q)
#pragma unroll
      for (int w = 0; w < kWindows; ++w)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = g + 8 * h;
          const X* from = static_cast<const X*>(p.pool) + (pages[q].row + r) * p.N + n + 32 * w;
          u[q][w][h] = load_row<kPlain>(from, r < pages[q].there() ? p.N - n - 32 * w : 0, vec.u);
        }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (8 * j >= tile.count) continue;
      Words8<X> v[kWindows];
#pragma unroll
      for (int w = 0; w < kWindows; ++w) {
        const X* from = static_cast<const X*>(p.x) + rows[j] * p.x_pitch + n + 32 * w;
        v[w] = load_row<kPlain>(from, rows[j] < 0 ? 0 : p.N - n - 32 * w, vec.x);
        if (dropout.threshold) {
          Vec8<X> e = elements(v[w]);
          drop(e, dropout, seed, int64_t{rows[j]} * d.K + tile.k, n + 32 * w);
          v[w] = bit_cast<Words8<X>>(e);
        }
      }
#pragma unroll
      for (int w = 0; w < kWindows; ++w)
#pragma unroll
        for (int s = 0; s < 2; ++s) {  // columns 4 s .. 4 s + 3 of each lane's 8 are k 2 t, 2 t + 1, 2 t + 8, 2 t + 9
          const uint32_t b[2] = {v[w].w[0][2 * s], v[w].w[0][2 * s + 1]};
#pragma unroll
          for (int q = 0; q < kPages; ++q) {
            const auto &low = u[q][w][0].w[0], &high = u[q][w][1].w[0];
            const uint32_t a[4] = {low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]};
            mma_16816(acc[kPages == 2 ? q : s][j], a, b, X{});
          }
        }
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if (8 * j >= tile.count) continue;
#pragma unroll
    for (int q = 0; q < kPages; ++q) {
      uint32_t words[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        words[e] = bit_cast<uint32_t>(kPages == 2 ? acc[q][j][e] : acc[0][j][e] + acc[1][j][e]);
      store_shared_16(parts + ((warp_id() * kPages + q) * kTiles + j) * kFragment + 4 * lane_id(), words);
    }
  }
  // A warp adds up one fragment.
  const int q = warp_id() / kTiles, j = warp_id() % kTiles;
  const Page page = page_of(d, tile.adapter, page0 + q);
  sync_threads();
  if (q >= kPages || 8 * j >= tile.count || page0 + q >= all_pages(d)) return;
  float sum[4] = {};
#pragma unroll
  for (int w = 0; w < kShrinkWarps; ++w) {
    uint32_t words[4];
    load_16(words, parts + ((w * kPages + q) * kTiles + j) * kFragment + 4 * lane_id());
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += bit_cast<float>(words[e]);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int32_t row = tile.row(d, 8 * j + 2 * t + e % 2);
    const int r = g + e / 2 * 8;
    if (row < 0) continue;
    float v = mul_rn(dropout.keep_scale, sum[e]);
    if (page.unknown || r >= page.ranks) v = r < page.ranks ? not_a_number() : 0.f;
    store_s<X>(p, row * d.K + tile.k, (page0 + q) * kPageRanks + r, v);
  }
}

// ---- Y, one slot. Block (tile, columns). A warp takes kWindows windows of 64 columns and kTiles times 8 rows at a time,
// kPages pages of U in its registers. Lane (g, t) loads columns 8 g .. 8 g + 7 of a window of ranks 4 t .. 4 t + 3, and has
// the same columns of rows 2 t and 2 t + 1 of the result: row g of the m-tile m is column 8 g + 2 m, row g + 8 the next one.

template <class X>
struct ExpandTerms {  // beside S in fp32 an fp16 U is two bf16 terms, exactly
  using S = TypeOfS<X>;
  using Elem = bf16;
  static constexpr int kTerms = sizeof(S) / 2;
};
// A pair of numbers as the terms hi, lo of each.
__device__ __forceinline__ void split_pair(uint32_t (&terms)[2], float a, float b) {
  terms[0] = pack_fast<bf16>(a, b);
  const float ra = a - bit_cast<float>(terms[0] << 16), rb = b - bit_cast<float>(terms[0] & 0xffff0000u);
  terms[1] = pack_fast<bf16>(ra == ra ? ra : 0.f, rb == rb ? rb : 0.f);  // 0 beside inf and nan
}
__device__ __forceinline__ void pair_terms(uint32_t (&terms)[1], uint32_t pair, bf16) { terms[0] = pair; }
__device__ __forceinline__ void pair_terms(uint32_t (&terms)[2], uint32_t pair, f16) {
  const auto at = [&](int i) { return to_float_fast(f16{static_cast<uint16_t>(pair >> 16 * i)}); };
  split_pair(terms, at(0), at(1));
}

// Four ranks of a row of S as the two pairs of a B fragment; zeros from `left` on.
template <bool kPlain>
__device__ __forceinline__ void load_ranks(uint32_t (&b)[1][2], const bf16* s, int left, bool vectorize) {
  uint64_t pairs = 0;
  if (kPlain || vectorize) {
    if (left > 0) pairs = *reinterpret_cast<const uint64_t*>(s);
    if (left < 4) pairs &= left > 0 ? (uint64_t{1} << 16 * left) - 1 : 0;
  } else {
    for (int i = 0; i < left && i < 4; ++i) pairs |= uint64_t{s[i].bits} << 16 * i;
  }
  b[0][0] = static_cast<uint32_t>(pairs);
  b[0][1] = static_cast<uint32_t>(pairs >> 32);
}
template <bool kPlain>
__device__ __forceinline__ void load_ranks(uint32_t (&b)[2][2], const float* s, int left, bool vectorize) {
  uint32_t words[4] = {};
  if (kPlain || vectorize) {
    if (left > 0) load_16(words, s);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < left) words[i] = bit_cast<uint32_t>(s[i]);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t terms[2];
    const auto at = [&](int i) { return i < left ? bit_cast<float>(words[i]) : 0.f; };
    split_pair(terms, at(2 * h), at(2 * h + 1));
    b[0][h] = terms[0];
    b[1][h] = terms[1];
  }
}

// Pages times windows that a warp's registers hold: two where each is two terms, or beside the slow ways.
template <class X>
constexpr int held_of(bool plain) {
  return plain && ExpandTerms<X>::kTerms == 1 ? 4 : 2;
}

template <class X, class To, int kPages, bool kPlain>
__global__ __launch_bounds__(kBlockThreads, 2) void multi_lora_page_expand_kernel(MultiLoraExpandParams p,
                                                                                  Vectorize vec, SlotRows<To> out) {
  using Terms = ExpandTerms<X>;
  using S = typename Terms::S;
  constexpr int kWindows = held_of<X>(kPlain) / kPages, kTiles = kPages == 1 ? 1 : 2, kTerms = Terms::kTerms;
  const Adapters& d = p.adapters;
  const PlanTile tile = tile_of(d, out.k, blockIdx.x);
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t n = (int64_t{blockIdx.y} * kWarps + warp_id()) * 64 * kWindows + 8 * g;
  if (tile.count <= 0 || n - 8 * g >= p.N || (tile.adapter == kAbsent && out.to == out.from)) return;
  const int64_t pages_here = tile.adapter >= 0 ? all_pages(d) : 0;
  Page pages[kPages];
  const auto find_pages = [&](int64_t first) {
#pragma unroll
    for (int q = 0; q < kPages; ++q) pages[q] = page_of(d, tile.adapter, first + q);
  };
  find_pages(0);
  const Dropout dropout = dropout_at<kPlain>(d, tile.adapter);
  const uint64_t seed = seed_of(dropout, d.seed);
  bool unknown = tile.adapter == kUnknown;

#pragma unroll(1)
  for (int first = 0; first < tile.count; first += 8 * kTiles) {
    int32_t to_rows[kTiles][2], s_rows[kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      s_rows[j] = tile.row(d, first + 8 * j + g);
#pragma unroll
      for (int e = 0; e < 2; ++e) to_rows[j][e] = tile.row(d, first + 8 * j + 2 * t + e);
    }
    Words8<To> from[kTiles][kWindows][2] = {};
    if (out.from) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int w = 0; w < kWindows; ++w)
            from[j][w][e] = load_row<kPlain>(out.from + to_rows[j][e] * out.from_pitch + n + 64 * w,
                                             to_rows[j][e] < 0 ? 0 : p.N - n - 64 * w, vec.x);
    }
    float acc[kTiles][kWindows][4][4] = {};
#pragma unroll(1)
    for (int64_t page0 = 0; page0 < pages_here; page0 += kPages) {
      Words8<X> u[kPages][kWindows][4];
      uint32_t b[kPages][kTiles][kTerms][2];
#pragma unroll
      for (int q = 0; q < kPages; ++q)
#pragma unroll
        for (int w = 0; w < kWindows; ++w)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = 4 * t + i;
            const X* at = static_cast<const X*>(p.pool) + (pages[q].row + r) * p.N + n + 64 * w;
            u[q][w][i] = load_row<kPlain>(at, r < pages[q].there() ? p.N - n - 64 * w : 0, vec.u);
          }
#pragma unroll
      for (int q = 0; q < kPages; ++q)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          const S* at = static_cast<const S*>(p.s) + s_at(d, s_rows[j], out.k) + (page0 + q) * kPageRanks + 4 * t;
          load_ranks<kPlain>(b[q][j], at, s_rows[j] < 0 ? 0 : pages[q].there() - 4 * t, vec.s);
        }
#pragma unroll
      for (int q = 0; q < kPages; ++q) {
        unknown = unknown || pages[q].unknown;
#pragma unroll
        for (int w = 0; w < kWindows; ++w)
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            uint32_t a[kTerms][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // (rank pair, column): i % 2 the column's half of a word, i / 2 the pair
              const uint32_t x = u[q][w][i / 2 * 2].w[0][m], y = u[q][w][i / 2 * 2 + 1].w[0][m];
              uint32_t terms[kTerms];
              pair_terms(terms, i % 2 ? x >> 16 | (y & 0xffff0000u) : (x & 0xffffu) | y << 16, X{});
#pragma unroll
              for (int c = 0; c < kTerms; ++c) a[c][i] = terms[c];
            }
#pragma unroll
            for (int j = 0; j < kTiles; ++j)
#pragma unroll
              for (int ca = 0; ca < kTerms; ++ca)
#pragma unroll
                for (int cb = 0; ca + cb < 2 && cb < kTerms; ++cb)  // lo * lo is below the error of the rest
                  mma_16816(acc[j][w][m], a[ca], b[q][j][cb], typename Terms::Elem{});
          }
      }
      if (pages_here > kPages) find_pages(page0 + kPages < pages_here ? page0 + kPages : 0);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int w = 0; w < kWindows; ++w) {
          const int64_t row = to_rows[j][e], col = n + 64 * w;
          if (row < 0 || col >= p.N) continue;
          Vec8<float> v;
#pragma unroll
          for (int i = 0; i < 8; ++i) v.v[i] = acc[j][w][i / 2][i % 2 * 2 + e];
          if (dropout.threshold) drop(v, dropout, seed, row * d.K + out.k, col);
          finish_row<kPlain>(
              out.to + row * out.to_pitch + col, from[j][w][e], p.N - col, vec.x,
              [&](float base, int i) { return unknown ? not_a_number() : base + dropout.keep_scale * v.v[i]; });
        }
  }
}

template <class F>
int with_16_bits(DType t, const F& f) {
  return t == DType::kF16 ? f(f16{}) : f(bf16{});
}
// f(pages that a block or warp holds at once, as a constant)
template <int kMany, class F>
int with_pages(int64_t pages, const F& f) {
  if (pages == 1) return f(std::integral_constant<int, 1>{});
  return f(std::integral_constant<int, kMany>{});
}

}  // namespace

int page_shrink(const MultiLoraShrinkParams& p, Stream stream) {
  const Adapters& d = p.adapters;
  const int64_t pages = all_pages(d), most = d.T < kPlanRows ? d.T : kPlanRows;
  const Vectorize vec{.x = can_vectorize(p.x, p.x_pitch, 2), .u = can_vectorize(p.pool, p.N, 2)};
  const auto run = [&](auto x, auto held, auto tiles, auto plain) {
    return launch("multi_lora_page_shrink",
                  multi_lora_page_shrink_kernel<decltype(x), held.value, tiles.value, plain.value>,
                  grid_of(d.K * plan_layout(d.T, d.A).G, ceil_div(pages, held.value), ceil_div(most, 8 * tiles.value)),
                  dim3(kShrinkThreads), smem_bytes<float>(kShrinkFloats<held.value, tiles.value>), stream, p, vec);
  };
  constexpr std::integral_constant<int, kFewPageRows / 8> few;
  constexpr std::integral_constant<int, kManyPageRows / 8> many;
  const bool plain = vec.x && vec.u && p.N % 8 == 0 && !d.dropout_p;
  const int32_t rows = choose_multi_lora_page_shrink(d.T, d.K, cuda_target()).rows;
  return with_16_bits(p.dtype, [&](auto x) {
    return with_pages<2>(pages, [&](auto held) {
      if (!plain) return run(x, held, many, std::false_type{});
      return rows == kFewPageRows ? run(x, held, few, std::true_type{}) : run(x, held, many, std::true_type{});
    });
  });
}

template <class X, class To>
int page_expand(const MultiLoraExpandParams& p, const SlotRows<To>& out, Stream stream) {
  const Adapters& d = p.adapters;
  const Vectorize vec{
      .x = can_vectorize(out.to, out.to_pitch, sizeof(To)) && can_vectorize(out.from, out.from_pitch, sizeof(To)),
      .u = can_vectorize(p.pool, p.N, 2),
      .s = can_vectorize(p.s, kPageRanks, sizeof(TypeOfS<X>))};
  const auto run = [&](auto pages, auto plain) {
    constexpr int64_t cols = 64 * kWarps * (held_of<X>(plain.value) / pages.value);
    return launch("multi_lora_page_expand", multi_lora_page_expand_kernel<X, To, pages.value, plain.value>,
                  grid_of(plan_layout(d.T, d.A).G, ceil_div(p.N, cols)), dim3(kBlockThreads), 0, stream, p, vec, out);
  };
  if constexpr (std::is_same_v<X, To>)
    if (vec.x && vec.u && vec.s && p.N % 8 == 0 && !d.dropout_p)
      return with_pages<held_of<X>(true)>(all_pages(d), [&](auto pages) { return run(pages, std::true_type{}); });
  return run(std::integral_constant<int, 1>{}, std::false_type{});
}
template int page_expand<bf16, bf16>(const MultiLoraExpandParams&, const SlotRows<bf16>&, Stream);
template int page_expand<bf16, float>(const MultiLoraExpandParams&, const SlotRows<float>&, Stream);
template int page_expand<f16, f16>(const MultiLoraExpandParams&, const SlotRows<f16>&, Stream);
template int page_expand<f16, float>(const MultiLoraExpandParams&, const SlotRows<float>&, Stream);

}  // namespace lrk
