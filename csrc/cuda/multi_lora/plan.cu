// SPDX-License-Identifier: Apache-2.0
// Multi-LoRA on CUDA, sm_80 and up, what has no product in it: the plan, and an embedding's rows of a pool.
#include "rows.cuh"

namespace lrk {
namespace {

constexpr int kPlanThreads = 256;

// ---- the plan. One block per slot.

constexpr int kPlanWarps = kPlanThreads / kWarpThreads;

// out[0..n] = running sum of value(i), by all threads; `sums` [kPlanWarps] is shared.
template <class Value>
__device__ __forceinline__ void running_sum(int64_t n, int32_t* out, int32_t* sums, const Value& value) {
  const int64_t share = ceil_div(n, int64_t{kPlanThreads}), first = share * threadIdx.x;
  const int64_t last = first + share < n ? first + share : n;
  int32_t sum = 0;
#pragma unroll(1)
  for (int64_t i = first; i < last; ++i) sum += value(i);
  int32_t upto = sum;  // of this thread and those before it, in its warp
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    const int32_t other = shfl_up(upto, step);
    if (lane_id() >= step) upto += other;
  }
  if (lane_id() == kWarpThreads - 1) sums[warp_id()] = upto;
  sync_threads();
  int32_t before = upto - sum;
  for (int w = 0; w < warp_id(); ++w) before += sums[w];
#pragma unroll(1)
  for (int64_t i = first; i < last; ++i) {
    const int32_t v = value(i);
    out[i] = before;
    before += v;
  }
  if (last == n && first <= n && (first < n || threadIdx.x == 0)) out[n] = before;
  sync_threads();
}

__global__ __launch_bounds__(kPlanThreads) void multi_lora_plan_kernel(MultiLoraPlanParams p, int32_t* counts) {
  Smem smem;
  int32_t *sums = smem.take<int32_t>(kPlanWarps), *groups = smem.take<int32_t>(kPlanThreads);
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
    const int count_here = static_cast<int>(p.T - t0 < kPlanThreads ? p.T - t0 : kPlanThreads);
    int32_t before = 0, after = 0;
    for (int i = 0; i < count_here; ++i) {
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

// ---- embeddings. Block (slot and tile, ranks).

template <class F>
__global__ __launch_bounds__(kBlockThreads) void multi_lora_gather_kernel(MultiLoraGatherParams p) {
  Smem smem;
  const Lists<kPageRanks> lists(smem);
  const Adapters& d = p.adapters;
  const int64_t G = plan_layout(d.T, d.A).G, r0 = int64_t{blockIdx.y} * kPageRanks;
  const PlanTile tile = plan_tile(d, blockIdx.x / G, blockIdx.x % G, lists.rows);
  if (tile.count <= 0) return;
  fill_ranks(d, tile.adapter, r0, all_ranks(d), kPageRanks, lists.ranks);
  sync_threads();
  for (int i = static_cast<int>(threadIdx.x); i < tile.count * kPageRanks; i += kBlockThreads) {
    const int64_t row = lists.rows[i / kPageRanks];
    const int32_t from = lists.ranks[i % kPageRanks];
    if (row < 0) continue;
    const int64_t id = p.ids[row];
    float v = 0.f;
    if (from == kUnknown || id < 0 || id >= p.N) {
      v = from == kAbsent ? 0.f : not_a_number();
    } else if (from >= 0) {
      v = scale_of(p, row, tile.k) * to_float_fast(static_cast<const F*>(p.pool)[from * p.N + id]);
    }
    using S = TypeOfS<F>;
    static_cast<S*>(p.s)[s_at(d, row, tile.k) + r0 + i % kPageRanks] = from_float_fast<S>(v);
  }
}

// Block (adapter and a page's ranks, parts of the vocabulary): each thread has one rank and one part, so that it adds to
// columns of its own, rows in order. All look through the rows together, kBlockThreads at a time.
constexpr int kScatterParts = 128, kBlockParts = kBlockThreads / kPageRanks;

template <class F>
__global__ __launch_bounds__(kBlockThreads) void multi_lora_scatter_kernel(MultiLoraScatterParams p) {
  Smem smem;
  int32_t* ranks = smem.take<int32_t>(kPageRanks);
  int32_t *rows = smem.take<int32_t>(kBlockThreads), *part_of = smem.take<int32_t>(kBlockThreads);
  int64_t* ids = smem.take<int64_t>(kBlockThreads);
  const Adapters& d = p.adapters;
  const unsigned pages = static_cast<unsigned>(d.slices * d.M);
  const int64_t adapter = blockIdx.x / pages, first = int64_t{blockIdx.x % pages} * kPageRanks;
  fill_ranks(d, adapter, first, all_ranks(d), kPageRanks, ranks);
  sync_threads();
  if (!any_present(ranks, kPageRanks)) return;
  const int thread = static_cast<int>(threadIdx.x), r = thread % kPageRanks;
  const int part = static_cast<int>(blockIdx.y) * kBlockParts + thread / kPageRanks;
  for (int64_t k = 0; k < d.K; ++k) {
    const int32_t* order = order_of(d, k);
    const Span span = rows_of(d, k, adapter);
    for (int64_t t = span.begin; t < span.end; t += kBlockThreads) {
      const int64_t row = t + thread < span.end ? order[t + thread] : kAbsent;
      const int64_t id = row >= 0 && row < d.T ? p.ids[row] : -1;
      rows[thread] = static_cast<int32_t>(row);
      ids[thread] = id;
      part_of[thread] = id >= 0 && id < p.N ? static_cast<int32_t>(id % kScatterParts) : kAbsent;
      sync_threads();
#pragma unroll(1)
      for (int i = 0; i < kBlockThreads && ranks[r] >= 0; ++i) {
        if (part_of[i] != part) continue;
        const auto v = static_cast<const TypeOfS<F>*>(p.s)[s_at(d, rows[i], k) + first + r];
        p.g[ranks[r] * p.N + ids[i]] += to_float_fast(v);
      }
      sync_threads();
    }
  }
}

}  // namespace

int multi_lora_plan_cuda(const MultiLoraPlanParams& p, void* workspace, Stream stream) {
  return launch("multi_lora_plan", multi_lora_plan_kernel, grid_of(p.K, 1), dim3(kPlanThreads),
                smem_bytes<int32_t>(kPlanWarps) + smem_bytes<int32_t>(kPlanThreads), stream, p,
                static_cast<int32_t*>(workspace));
}

int multi_lora_gather_cuda(const MultiLoraGatherParams& p, void*, Stream stream) {
  const Adapters& d = p.adapters;
  return with_float(p.factor_dtype, [&](auto f) {
    return launch("multi_lora_gather", multi_lora_gather_kernel<decltype(f)>,
                  grid_of(d.K * plan_layout(d.T, d.A).G, d.slices * d.M), dim3(kBlockThreads),
                  Lists<kPageRanks>::kBytes, stream, p);
  });
}

int multi_lora_scatter_cuda(const MultiLoraScatterParams& p, void*, Stream stream) {
  const Adapters& d = p.adapters;
  if (!d.A || !d.M) return 0;
  return with_float(p.factor_dtype, [&](auto f) {
    return launch(
        "multi_lora_scatter", multi_lora_scatter_kernel<decltype(f)>,
        grid_of(d.A * d.slices * d.M, kScatterParts / kBlockParts), dim3(kBlockThreads),
        smem_bytes<int32_t>(kPageRanks) + 2 * smem_bytes<int32_t>(kBlockThreads) + smem_bytes<int64_t>(kBlockThreads),
        stream, p);
  });
}

}  // namespace lrk
