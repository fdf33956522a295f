// SPDX-License-Identifier: Apache-2.0
// Multi-LoRA on CUDA, sm_80 and up: the plan, and three products over its tiles, rows of one adapter each. Rows of x, y and
// S and ranks of a pool are gathered through row lists in shared memory; the rest is tile.cuh's.
// Occupancy plan: blocks of 128 threads, at least two on an SM.
#include "multi_lora.cuh"
#include "multi_lora.h"

namespace lrk {
namespace {

constexpr int kBK = 64;       // shrink: columns of N per step; divides kCudaChunk
constexpr int kBN = 128;      // expand: columns of N per block
constexpr int kExpandK = 32;  // expand: ranks per step
constexpr int kPlanThreads = 256;

struct Vectorize {  // where 128-bit accesses are aligned
  bool x, pool, s;
};

// ---- the plan. One block per slot.

// out[0..n] = running sum of value(i), by all threads; `sums` [kPlanThreads] is shared.
template <class Value>
__device__ __forceinline__ void running_sum(int64_t n, int32_t* out, int32_t* sums, const Value& value) {
  const int64_t share = ceil_div(n, int64_t{kPlanThreads}), first = share * threadIdx.x;
  const int64_t last = first + share < n ? first + share : n;
  int32_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += value(i);
  sums[threadIdx.x] = sum;
  sync_threads();
  int32_t before = 0;
  for (unsigned i = 0; i < threadIdx.x; ++i) before += sums[i];
  for (int64_t i = first; i < last; ++i) {
    const int32_t v = value(i);
    out[i] = before;
    before += v;
  }
  if (last == n && first <= n && (first < n || threadIdx.x == 0)) out[n] = before;
  sync_threads();
}

__global__ __launch_bounds__(kPlanThreads) void plan_kernel(MultiLoraPlanParams p, int32_t* counts) {
  Smem smem;
  int32_t *sums = smem.take<int32_t>(kPlanThreads), *groups = smem.take<int32_t>(kPlanThreads);
  const PlanLayout at = plan_layout(p.T, p.A);
  const int64_t k = blockIdx.x, thread = threadIdx.x;
  int32_t *order = p.plan + k * at.length, *begin = order + at.begin, *tiles = order + at.tiles;
  int32_t* count = counts + k * (p.A + 3);  // of each group, then where its next row goes, then its first tile
  const auto group_of = [&](int64_t t) {
    const int32_t a = p.index[t * p.K + k];
    return a < 0 ? 0 : a < p.A ? a + 1 : static_cast<int32_t>(p.A) + 1;
  };
  for (int64_t g = thread; g < p.A + 2; g += kPlanThreads) count[g] = 0;
  sync_threads();
  for (int64_t t = thread; t < p.T; t += kPlanThreads) atomicAdd(count + group_of(t), 1);
  sync_threads();
  running_sum(p.A + 2, begin, sums, [&](int64_t g) { return count[g]; });
  for (int64_t g = thread; g < p.A + 2; g += kPlanThreads) count[g] = begin[g];
  for (int64_t t0 = 0; t0 < p.T; t0 += kPlanThreads) {  // in order, so that rows of a group stay ascending
    const int64_t t = t0 + thread;
    const int32_t mine = t < p.T ? group_of(t) : kAbsent;
    groups[thread] = mine;
    sync_threads();
    int32_t before = 0, after = 0;
    for (int i = 0; i < kPlanThreads; ++i) {
      before += i < thread && groups[i] == mine;
      after += i > thread && groups[i] == mine;
    }
    const int32_t start = t < p.T ? count[mine] : 0;
    if (t < p.T) order[start + before] = static_cast<int32_t>(t);
    sync_threads();
    if (t < p.T && !after) count[mine] = start + before + 1;
  }
  // Tiles of group g start at count[g] in the list.
  const auto tiles_of = [&](int64_t g) { return ceil_div(begin[g + 1] - begin[g], kPlanRows); };
  running_sum(p.A + 2, count, sums, tiles_of);
  const int32_t used = count[p.A + 2];
  for (int64_t g = thread; g < p.A + 2; g += kPlanThreads)
    for (int32_t i = 0; i < tiles_of(g); ++i) {
      tiles[2 * (count[g] + i)] = static_cast<int32_t>(g);
      tiles[2 * (count[g] + i) + 1] = begin[g] + i * kPlanRows;
    }
  for (int64_t i = used + thread; i < at.G; i += kPlanThreads) {
    tiles[2 * i] = 0;
    tiles[2 * i + 1] = static_cast<int32_t>(p.T);
  }
}

// S's rank `at`, counted through the slices at hand.
template <class F>
__device__ __forceinline__ void store_s(const MultiLoraShrinkParams& p, int64_t row, int64_t k, int64_t at, float v) {
  const Adapters& d = p.adapters;
  const int64_t R = kPageRanks * d.M;
  const float scale = p.scales ? p.scales[row * d.K + k] : 1.f;
  static_cast<F*>(p.s)[((row * d.K + k) * d.L + d.first) * R + at] = from_float_fast<F>(scale * v);
}

// ---- S. Block (slot and tile, ranks, chunk of N): all chunks, or one, its sum to planes [chunk][T][K][slices R].

template <class X, class F, int kRanks>
__global__ __launch_bounds__(kBlockThreads, 2) void multi_shrink_kernel(MultiLoraShrinkParams p, Vectorize vec,
                                                                        float* planes) {
  using M = Math<X, F>;
  using TX = Tile<typename M::Elem, kPlanRows, kBK, M::kXTerms>;
  using TU = Tile<typename M::Elem, kRanks, kBK, M::kFTerms>;
  constexpr int kTilesN = kRanks / 8;
  Smem smem;
  const TX tx{smem.take<typename M::Elem>(TX::kElems)};
  const TU tu{smem.take<typename M::Elem>(TU::kElems)};
  int32_t *rows = smem.take<int32_t>(kPlanRows), *ranks = smem.take<int32_t>(kRanks);
  const Operand<TX, true> a{tx};
  const Operand<TU, true> b{tu};

  const Adapters& d = p.adapters;
  const int64_t G = plan_layout(d.T, d.A).G, r0 = int64_t{blockIdx.y} * kRanks, all = d.slices * d.M * kPageRanks;
  const RowTile tile = plan_tile(d, blockIdx.x / G, blockIdx.x % G, rows);
  if (!tile.count) return;
  fill_ranks(d, tile.adapter, r0, all, kRanks, ranks);
  sync_threads();

  const int64_t begin = int64_t{blockIdx.z} * kCudaChunk;
  const int64_t end = planes && begin + kCudaChunk < p.N ? begin + kCudaChunk : p.N;
  const Dropout dropout = dropout_of(d, tile.adapter);
  const uint64_t seed = dropout.threshold ? static_cast<uint64_t>(*d.seed) : 0;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float acc[kTilesN][4] = {}, sum[kTilesN][4] = {};  // this chunk, the chunks before it
  if (any_rank(ranks, kRanks)) {
    const auto x_rows = [&](int64_t n) {
      return Gathered<X>{static_cast<const X*>(p.x) + n, p.x_pitch, rows, p.N - n, vec.x};
    };
    const auto u_rows = [&](int64_t n) {
      return Gathered<F>{static_cast<const F*>(p.pool) + n, p.N, ranks, p.N - n, vec.pool};
    };
    const auto mask_row = [&](int r) { return int64_t{rows[r]} * d.K + tile.k; };
    Stage<X, TX> sx;
    Stage<F, TU> su;
    sx.fetch(x_rows(begin));
    su.fetch(u_rows(begin));
    for (int64_t n = begin; n < end; n += kBK) {
      sync_threads();  // the tiles have been read
      sx.put_rows(tx, dropout, seed, mask_row, n);
      su.put(tu);
      sync_threads();
      if (n + kBK < end) {
        sx.fetch(x_rows(n + kBK));
        su.fetch(u_rows(n + kBK));
      }
#pragma unroll(1)
      for (int k = 0; k < kBK; k += 16) mma_step(acc, a, b, warp * 16, 0, k);
      if ((n + kBK) % kCudaChunk == 0 || n + kBK >= end) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sum[j][e] += mul_rn(dropout.keep_scale, acc[j][e]);  // the same bits with planes and without
            acc[j][e] = 0.f;
          }
      }
    }
  }
  for_each_element(sum, warp * 16, 0, [&](int64_t t, int64_t r, float v) {
    const int64_t row = rows[t], at = r0 + r;
    if (row < 0 || at >= all) return;
    if (ranks[r] < 0) v = ranks[r] == kUnknown ? not_a_number() : 0.f;
    if (planes) {
      planes[((blockIdx.z * d.T + row) * d.K + tile.k) * all + at] = v;
    } else {
      store_s<F>(p, row, tile.k, at, v);
    }
  });
}

template <class F>
__global__ __launch_bounds__(kBlockThreads) void multi_sum_kernel(MultiLoraShrinkParams p, const float* planes,
                                                                  int64_t chunks) {
  const Adapters& d = p.adapters;
  const int64_t all = d.slices * d.M * kPageRanks, count = d.T * d.K * all;
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.f;
  for (int64_t c = 0; c < chunks; ++c) sum += planes[c * count + i];
  store_s<F>(p, i / all / d.K, i / all % d.K, i % all, sum);
}

// ---- Y, one slot. Block (tile, n tile): rows of `to` = rows of `from` + D(S pool), `from` null for zeros.

template <class T>
struct RowMatrix {
  T* data;
  int64_t pitch;
};

template <class X, class F, class To>
__global__ __launch_bounds__(kBlockThreads, 2) void multi_expand_kernel(MultiLoraExpandParams p, Vectorize vec,
                                                                        int64_t k, RowMatrix<To> to,
                                                                        RowMatrix<const To> from) {
  using M = Math<X, F>;
  using TS = Tile<typename M::Elem, kPlanRows, kExpandK, M::kFTerms>;
  using TU = Tile<typename M::Elem, kExpandK, kBN, M::kFTerms>;
  constexpr int kTilesN = kBN / 8;
  Smem smem;
  const TS ts{smem.take<typename M::Elem>(TS::kElems)};
  const TU tu{smem.take<typename M::Elem>(TU::kElems)};
  int32_t *rows = smem.take<int32_t>(kPlanRows), *ranks = smem.take<int32_t>(kExpandK);
  const Operand<TS, true> a{ts};
  const Operand<TU, false> b{tu};  // k is the rank here

  const Adapters& d = p.adapters;
  const int64_t R = kPageRanks * d.M, n0 = int64_t{blockIdx.y} * kBN;
  const RowTile tile = plan_tile(d, k, blockIdx.x, rows);
  if (!tile.count || (tile.adapter == kAbsent && to.data == from.data)) return;
  const int lane = lane_id(), m = static_cast<int>(threadIdx.x) / 32 * 16;
  bool unknown = tile.adapter == kUnknown;
  float acc[kTilesN][4] = {};
  for (int64_t l = 0; l < d.slices && tile.adapter >= 0; ++l) {
    const int64_t rank = d.ranks[tile.adapter * d.L + d.first + l], end = (l + 1) * R;
    for (int64_t r = l * R; r < end && r - l * R < rank; r += kExpandK) {
      fill_ranks(d, tile.adapter, r, end, kExpandK, ranks);
      sync_threads();
      unknown = unknown || any_rank(ranks, kExpandK, true);
      Stage<F, TS> ss;
      Stage<F, TU> su;
      ss.fetch(Gathered<F>{static_cast<const F*>(p.s) + (k * d.L + d.first) * R + r, d.K * d.L * R, rows, end - r,
                           vec.s, ranks});
      su.fetch(Gathered<F>{static_cast<const F*>(p.pool) + n0, p.N, ranks, p.N - n0, vec.pool});
      ss.put(ts);
      su.put(tu);
      sync_threads();
#pragma unroll
      for (int kk = 0; kk < kExpandK; kk += 16)
        if (r - l * R + kk < rank) mma_step(acc, a, b, m, 0, kk);
    }
  }
  sync_threads();  // rows is read below even where no loop ran
  const Dropout dropout = dropout_of(d, tile.adapter);
  const uint64_t seed = dropout.threshold ? static_cast<uint64_t>(*d.seed) : 0;
#pragma unroll
  for (int j0 = 0; j0 < kTilesN; j0 += 4)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float v[8];
      gather_row(v, acc, j0, h);
      const int64_t row = rows[m + lane / 4 + h * 8], n = n0 + (j0 + lane % 4) * 8;
      if (row < 0 || n >= p.N) continue;
      if (dropout.threshold) {
        const Philox block = dropout_block(seed, row * d.K + k, n / kDropoutBlock);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (bits16(block, i) < dropout.threshold) v[i] = 0.f;
      }
      Vec8<To> out = {};
      if (from.data) {
        const Slab<To> slab{from.data + row * from.pitch + n, 0, 1, p.N - n, vec.x};
        out = load_vec(slab, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
        out.v[i] = from_float_fast<To>(unknown ? not_a_number() : to_float_fast(out.v[i]) + dropout.keep_scale * v[i]);
      store_row(to.data + row * to.pitch + n, out, p.N - n, vec.x);
    }
}

// Y = base + acc [T, N], the sum over slots.
template <class X>
__global__ __launch_bounds__(kBlockThreads) void multi_finish_kernel(MultiLoraExpandParams p, const float* acc) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x, row = i / p.N, n = i % p.N;
  if (row >= p.adapters.T) return;
  const float base = to_float_fast(static_cast<const X*>(p.base)[row * p.base_pitch + n]);
  static_cast<X*>(p.y)[row * p.y_pitch + n] = from_float_fast<X>(base + acc[i]);
}

// ---- G. Block (adapter and ranks, n tile, slot and segment of that adapter's rows): to planes [slot, segment][P][N], or
// where there is one of them to G itself.

// Segments of a slot's rows; each adapter fills the first ones.
__host__ __device__ __forceinline__ int64_t segments_of(const Adapters& d) {
  return ceil_div(d.T, split_tokens(d.T, kCudaSplit));
}

struct Span {
  int64_t begin, end;
};
__device__ __forceinline__ Span rows_of(const Adapters& d, int64_t k, int64_t adapter) {
  const PlanLayout at = plan_layout(d.T, d.A);
  const int32_t* begin = d.plan + k * at.length + at.begin + 1 + adapter;
  return {begin[0] < 0 ? 0 : begin[0], begin[1] > d.T ? d.T : begin[1]};
}

template <int kRanks>
constexpr int kWgradN = kRanks == 16 ? kBN : kBN / 2;  // its accumulators grow with the ranks

template <class X, class F, int kRanks>
__global__ __launch_bounds__(kBlockThreads, 2) void multi_wgrad_kernel(MultiLoraWgradParams p, Vectorize vec,
                                                                       float* planes) {
  using M = Math<X, F>;
  using TS = Tile<typename M::Elem, kPlanRows, kRanks, M::kFTerms>;
  using TX = Tile<typename M::Elem, kPlanRows, kWgradN<kRanks>, M::kXTerms>;
  constexpr int kWarpsM = kRanks / 16, kWarpN = kWgradN<kRanks> / (4 / kWarpsM), kTilesN = kWarpN / 8;
  Smem smem;
  const TS ts{smem.take<typename M::Elem>(TS::kElems)};
  const TX tx{smem.take<typename M::Elem>(TX::kElems)};
  int32_t *rows = smem.take<int32_t>(kPlanRows), *ranks = smem.take<int32_t>(kRanks);
  const Operand<TS, false> a{ts};  // k runs over rows: both operands have it across theirs
  const Operand<TX, false> b{tx};

  const Adapters& d = p.adapters;
  const int64_t R = kPageRanks * d.M, all = d.slices * R, rank_blocks = ceil_div(all, int64_t{kRanks});
  const int64_t adapter = blockIdx.x / rank_blocks, r0 = blockIdx.x % rank_blocks * kRanks;
  const int64_t k = blockIdx.z / segments_of(d), segment = split_tokens(d.T, kCudaSplit);
  const Span span = rows_of(d, k, adapter);
  const int64_t begin = span.begin + blockIdx.z % segments_of(d) * segment;
  const int64_t end = begin + segment < span.end ? begin + segment : span.end;
  if (begin >= end) return;
  fill_ranks(d, adapter, r0, all, kRanks, ranks);
  sync_threads();
  if (!any_rank(ranks, kRanks)) return;

  const int64_t n0 = int64_t{blockIdx.y} * kWgradN<kRanks>;
  const Dropout dropout = dropout_of(d, adapter);
  const uint64_t seed = dropout.threshold ? static_cast<uint64_t>(*d.seed) : 0;
  const int32_t* order = d.plan + k * plan_layout(d.T, d.A).length;
  const int warp = static_cast<int>(threadIdx.x) / 32, m = warp % kWarpsM * 16, n = warp / kWarpsM * kWarpN;
  float acc[kTilesN][4] = {};
  for (int64_t t = begin; t < end; t += kPlanRows) {
    fill_rows(d, order, t, static_cast<int32_t>(end - t < kPlanRows ? end - t : kPlanRows), rows);
    sync_threads();
    Stage<F, TS> ss;
    Stage<X, TX> sx;
    ss.fetch(
        Gathered<F>{static_cast<const F*>(p.s) + (k * d.L + d.first) * R + r0, d.K * d.L * R, rows, all - r0, vec.s});
    sx.fetch(Gathered<X>{static_cast<const X*>(p.x) + n0, p.x_pitch, rows, p.N - n0, vec.x});
    ss.put(ts);
    sx.put_rows(tx, dropout, seed, [&](int r) { return int64_t{rows[r]} * d.K + k; }, n0);
    sync_threads();
#pragma unroll(1)
    for (int kk = 0; kk < kPlanRows; kk += 16) mma_step(acc, a, b, m, n, kk);
  }
  for_each_element(acc, m, n0 + n, [&](int64_t r, int64_t col, float v) {
    if (ranks[r] < 0 || col >= p.N) return;
    v = mul_rn(dropout.keep_scale, v);
    if (planes) {
      planes[(blockIdx.z * d.P + ranks[r]) * p.N + col] = v;
    } else {
      static_cast<F*>(p.g)[ranks[r] * p.N + col] = from_float_fast<F>(v);
    }
  });
}

// Block (adapter and kPageRanks ranks, columns): the planes that its rows filled, slot by slot.
template <class F>
__global__ __launch_bounds__(kBlockThreads) void multi_wgrad_sum_kernel(MultiLoraWgradParams p, const float* planes) {
  const Adapters& d = p.adapters;
  Smem smem;
  int32_t* ranks = smem.take<int32_t>(kPageRanks);
  const unsigned pages = static_cast<unsigned>(d.slices * d.M);
  const int64_t adapter = blockIdx.x / pages;
  const int64_t col = int64_t{blockIdx.y} * kBlockThreads + threadIdx.x, segment = split_tokens(d.T, kCudaSplit);
  fill_ranks(d, adapter, blockIdx.x % pages * kPageRanks, int64_t{pages} * kPageRanks, kPageRanks, ranks);
  sync_threads();
  if (col >= p.N) return;
  for (int r = 0; r < kPageRanks; ++r) {
    float sum = 0.f;
    bool used = false;
    for (int64_t k = 0; k < d.K && ranks[r] >= 0; ++k) {
      const Span span = rows_of(d, k, adapter);
      const float* plane = planes + (k * segments_of(d) * d.P + ranks[r]) * p.N + col;
      for (int64_t t = span.begin; t < span.end; t += segment, plane += d.P * p.N) {
        sum += *plane;
        used = true;
      }
    }
    if (used) static_cast<F*>(p.g)[ranks[r] * p.N + col] = from_float_fast<F>(sum);
  }
}

// ---- embeddings. Block (slot and tile, ranks).

template <class F>
__global__ __launch_bounds__(kBlockThreads) void multi_gather_kernel(MultiLoraGatherParams p) {
  Smem smem;
  int32_t *rows = smem.take<int32_t>(kPlanRows), *ranks = smem.take<int32_t>(kPageRanks);
  const Adapters& d = p.adapters;
  const int64_t G = plan_layout(d.T, d.A).G, r0 = int64_t{blockIdx.y} * kPageRanks;
  const int64_t R = kPageRanks * d.M, all = d.slices * R;
  const RowTile tile = plan_tile(d, blockIdx.x / G, blockIdx.x % G, rows);
  if (!tile.count) return;
  fill_ranks(d, tile.adapter, r0, all, kPageRanks, ranks);
  sync_threads();
  for (int i = static_cast<int>(threadIdx.x); i < tile.count * kPageRanks; i += kBlockThreads) {
    const int64_t row = rows[i / kPageRanks];
    const int32_t from = ranks[i % kPageRanks];
    if (row < 0) continue;
    const int64_t id = p.ids[row];
    float v = 0.f;
    if (from == kUnknown || id < 0 || id >= p.N) {
      v = from == kAbsent ? 0.f : not_a_number();
    } else if (from >= 0) {
      v = (p.scales ? p.scales[row * d.K + tile.k] : 1.f) *
          to_float_fast(static_cast<const F*>(p.pool)[from * p.N + id]);
    }
    static_cast<F*>(p.s)[((row * d.K + tile.k) * d.L + d.first) * R + r0 + i % kPageRanks] = from_float_fast<F>(v);
  }
}

// Block (adapter and a page's ranks): each thread has one rank and one part of the vocabulary, so that it adds to columns
// of its own, rows in order.
template <class F>
__global__ __launch_bounds__(kBlockThreads) void multi_scatter_kernel(MultiLoraScatterParams p) {
  constexpr int kParts = kBlockThreads / kPageRanks;
  Smem smem;
  int32_t* ranks = smem.take<int32_t>(kPageRanks);
  const Adapters& d = p.adapters;
  const unsigned pages = static_cast<unsigned>(d.slices * d.M);
  const int64_t adapter = blockIdx.x / pages, first = int64_t{blockIdx.x % pages} * kPageRanks, R = kPageRanks * d.M;
  fill_ranks(d, adapter, first, int64_t{pages} * kPageRanks, kPageRanks, ranks);
  sync_threads();
  const int r = static_cast<int>(threadIdx.x) % kPageRanks, part = static_cast<int>(threadIdx.x) / kPageRanks;
  if (ranks[r] < 0) return;
  for (int64_t k = 0; k < d.K; ++k) {
    const int32_t* order = d.plan + k * plan_layout(d.T, d.A).length;
    const Span span = rows_of(d, k, adapter);
    for (int64_t t = span.begin; t < span.end; ++t) {
      const int64_t row = order[t], id = row >= 0 && row < d.T ? p.ids[row] : -1;
      if (id < 0 || id >= p.N || id % kParts != part) continue;
      const F v = static_cast<const F*>(p.s)[((row * d.K + k) * d.L + d.first) * R + first + r];
      p.g[ranks[r] * p.N + id] += to_float_fast(v);
    }
  }
}

}  // namespace

int multi_lora_gather_cuda(const MultiLoraGatherParams& p, void*, Stream stream) {
  const Adapters& d = p.adapters;
  return with_float(p.factor_dtype, [&](auto f) {
    return launch("multi_lora_gather", multi_gather_kernel<decltype(f)>,
                  grid_of(d.K * plan_layout(d.T, d.A).G, d.slices * d.M), dim3(kBlockThreads),
                  smem_bytes<int32_t>(kPlanRows) + smem_bytes<int32_t>(kPageRanks), stream, p);
  });
}

int multi_lora_scatter_cuda(const MultiLoraScatterParams& p, void*, Stream stream) {
  const Adapters& d = p.adapters;
  if (!d.A || !d.M) return 0;
  return with_float(p.factor_dtype, [&](auto f) {
    return launch("multi_lora_scatter", multi_scatter_kernel<decltype(f)>, grid_of(d.A * d.slices * d.M, 1),
                  dim3(kBlockThreads), smem_bytes<int32_t>(kPageRanks), stream, p);
  });
}

int multi_lora_plan_cuda(const MultiLoraPlanParams& p, void* workspace, Stream stream) {
  return launch("multi_lora_plan", plan_kernel, grid_of(p.K, 1), dim3(kPlanThreads),
                2 * smem_bytes<int32_t>(kPlanThreads), stream, p, static_cast<int32_t*>(workspace));
}

int multi_lora_shrink_cuda(const MultiLoraShrinkParams& p, void* workspace, Stream stream) {
  const Adapters& d = p.adapters;
  const int64_t all = d.slices * d.M * kPageRanks, G = plan_layout(d.T, d.A).G;
  const ShrinkConfig config = choose_multi_lora_shrink(d.T, d.K, p.N, cuda_target());
  float* planes = config.split ? static_cast<float*>(workspace) : nullptr;
  const Vectorize vec{can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      can_vectorize(p.pool, p.N, size_of(p.factor_dtype)), false};
  return with_types(p.dtype, p.factor_dtype, [&](auto xt, auto ft) {
    using X = decltype(xt);
    using F = decltype(ft);
    using M = Math<X, F>;
    const int error = with_bool(all <= 16, [&](auto small) {
      constexpr int kRanks = small.value ? 16 : 64;
      using TX = Tile<typename M::Elem, kPlanRows, kBK, M::kXTerms>;
      using TU = Tile<typename M::Elem, kRanks, kBK, M::kFTerms>;
      return launch("multi_lora_shrink", multi_shrink_kernel<X, F, kRanks>,
                    grid_of(d.K * G, ceil_div(all, kRanks), planes ? config.chunks : 1), dim3(kBlockThreads),
                    TX::kBytes + TU::kBytes + smem_bytes<int32_t>(kPlanRows) + smem_bytes<int32_t>(kRanks), stream, p,
                    vec, planes);
    });
    if (error || !planes) return error;
    return launch("multi_lora_sum", multi_sum_kernel<F>, grid_of(ceil_div(d.T * d.K * all, kBlockThreads), 1),
                  dim3(kBlockThreads), 0, stream, p, static_cast<const float*>(planes), int64_t{config.chunks});
  });
}

int multi_lora_expand_cuda(const MultiLoraExpandParams& p, void* workspace, Stream stream) {
  const Adapters& d = p.adapters;
  const size_t size = size_of(p.dtype), factor = size_of(p.factor_dtype);
  const bool pool = can_vectorize(p.pool, p.N, factor), s = can_vectorize(p.s, kPageRanks, factor);
  float* acc = static_cast<float*>(workspace);
  return with_types(p.dtype, p.factor_dtype, [&](auto xt, auto ft) {
    using X = decltype(xt);
    using F = decltype(ft);
    using M = Math<X, F>;
    using TS = Tile<typename M::Elem, kPlanRows, kExpandK, M::kFTerms>;
    using TU = Tile<typename M::Elem, kExpandK, kBN, M::kFTerms>;
    const auto slot = [&](int64_t k, auto to, auto from, bool vectorize) {
      return launch("multi_lora_expand", multi_expand_kernel<X, F, std::remove_pointer_t<decltype(to.data)>>,
                    grid_of(plan_layout(d.T, d.A).G, ceil_div(p.N, kBN)), dim3(kBlockThreads),
                    TS::kBytes + TU::kBytes + smem_bytes<int32_t>(kPlanRows) + smem_bytes<int32_t>(kExpandK), stream, p,
                    Vectorize{vectorize, pool, s}, k, to, from);
    };
    if (d.K == 1)
      return slot(0, RowMatrix<X>{static_cast<X*>(p.y), p.y_pitch},
                  RowMatrix<const X>{static_cast<const X*>(p.base), p.base_pitch},
                  can_vectorize(p.y, p.y_pitch, size) && can_vectorize(p.base, p.base_pitch, size));
    int error = 0;
    for (int64_t k = 0; k < d.K && !error; ++k)
      error = slot(k, RowMatrix<float>{acc, p.N}, RowMatrix<const float>{k ? acc : nullptr, p.N},
                   can_vectorize(acc, p.N, sizeof(float)));
    if (error) return error;
    return launch("multi_lora_finish", multi_finish_kernel<X>, grid_of(ceil_div(d.T * p.N, kBlockThreads), 1),
                  dim3(kBlockThreads), 0, stream, p, static_cast<const float*>(acc));
  });
}

int multi_lora_wgrad_cuda(const MultiLoraWgradParams& p, void* workspace, Stream stream) {
  const Adapters& d = p.adapters;
  const int64_t pages = d.slices * d.M, all = pages * kPageRanks, planes_count = d.K * segments_of(d);
  float* planes = planes_count > 1 ? static_cast<float*>(workspace) : nullptr;
  const Vectorize vec{can_vectorize(p.x, p.x_pitch, size_of(p.dtype)), false,
                      can_vectorize(p.s, kPageRanks, size_of(p.factor_dtype))};
  if (!d.A || !all) return 0;
  return with_types(p.dtype, p.factor_dtype, [&](auto xt, auto ft) {
    using X = decltype(xt);
    using F = decltype(ft);
    using M = Math<X, F>;
    const int error = with_bool(all <= 16, [&](auto small) {
      constexpr int kRanks = small.value ? 16 : 64;
      using TS = Tile<typename M::Elem, kPlanRows, kRanks, M::kFTerms>;
      using TX = Tile<typename M::Elem, kPlanRows, kWgradN<kRanks>, M::kXTerms>;
      return launch("multi_lora_wgrad", multi_wgrad_kernel<X, F, kRanks>,
                    grid_of(d.A * ceil_div(all, kRanks), ceil_div(p.N, kWgradN<kRanks>), planes_count),
                    dim3(kBlockThreads),
                    TS::kBytes + TX::kBytes + smem_bytes<int32_t>(kPlanRows) + smem_bytes<int32_t>(kRanks), stream, p,
                    vec, planes);
    });
    if (error || !planes) return error;
    return launch("multi_lora_wgrad_sum", multi_wgrad_sum_kernel<F>, grid_of(d.A * pages, ceil_div(p.N, kBlockThreads)),
                  dim3(kBlockThreads), smem_bytes<int32_t>(kPageRanks), stream, p, static_cast<const float*>(planes));
  });
}

}  // namespace lrk
