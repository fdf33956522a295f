// SPDX-License-Identifier: Apache-2.0
// Base product and many adapters in one GEMM: the lists of page_tail.h, one for each tile of rows, from the plan.
#include "multi_lora/gemm.cuh"
#include "multi_lora/rows.cuh"

namespace lrk {
namespace {

// The first of order[begin, end), which ascend, that is not below `row`.
__device__ __forceinline__ int64_t first_from(const int32_t* order, Span span, int32_t row) {
  while (span.begin < span.end) {
    const int64_t middle = (span.begin + span.end) / 2;
    if (order[middle] < row) {
      span.begin = middle + 1;
    } else {
      span.end = middle;
    }
  }
  return span.begin;
}

// Block: a tile of `rows` rows. A thread takes an adapter of 128 at a time; group A is of unknown ones.
__global__ void __launch_bounds__(kBlockThreads) multi_lora_lists_kernel(Adapters d, PageLists lists, int rows) {
  Smem smem;
  int32_t* sums = smem.take<int32_t>(kBlockThreads / 32);
  const int t = static_cast<int>(threadIdx.x);
  const int64_t top = int64_t{blockIdx.x} * rows, end = top + rows < d.T ? top + rows : d.T;
  PageEntry* entries = lists.entries + int64_t{blockIdx.x} * lists.capacity;
  int32_t count = 0;
  for (int64_t k = 0; k < d.K; ++k) {
    const int32_t* order = order_of(d, k);
    int32_t* owners = lists.owners + k * d.T;
    for (int64_t row = top + t; row < end; row += kBlockThreads) owners[row] = kNobody;
    sync_threads();
    for (int64_t first = 0; first <= d.A; first += kBlockThreads) {
      const int64_t adapter = first + t, pages = all_pages(d);
      const Span span = adapter <= d.A ? rows_of(d, k, adapter) : Span{0, 0};
      int64_t at = first_from(order, span, static_cast<int32_t>(top));
      const bool here = at < span.end && order[at] < end;
      bool unknown = adapter == d.A;
      int32_t wants = 0;
      for (int64_t q = 0; here && !unknown && q < pages; ++q) {
        const Page page = page_of(d, adapter, q);
        unknown = page.unknown;
        wants += page.ranks > 0;
      }
      if (unknown) wants = 0;
      for (; here && at < span.end && order[at] < end; ++at)
        if (order[at] >= top) owners[order[at]] = unknown ? kNobodyKnows : static_cast<int32_t>(adapter);

      int32_t before = wants;  // of those up to this thread, then without it
      for (int delta = 1; delta < 32; delta *= 2) {
        const int32_t other = shfl_up(before, delta);
        if (lane_id() >= delta) before += other;
      }
      if (lane_id() == 31) sums[warp_id()] = before;
      sync_threads();
      before -= wants;
      int32_t all = 0;
      for (int w = 0; w < kBlockThreads / 32; ++w) {
        if (w < warp_id()) before += sums[w];
        all += sums[w];
      }
      sync_threads();
      int32_t to = count + before;
      for (int64_t q = 0; wants && q < pages; ++q) {
        const Page page = page_of(d, adapter, q);
        if (page.ranks <= 0 || to >= lists.capacity) continue;
        entries[to++] = {static_cast<int32_t>(page.row / kPageRanks), static_cast<int32_t>(adapter),
                         static_cast<int32_t>(k), static_cast<int32_t>((k * pages + q) * kPageRanks), page.ranks};
      }
      count += all;
    }
  }
  if (t == 0) lists.counts[blockIdx.x] = count < lists.capacity ? count : lists.capacity;
}

}  // namespace

int multi_lora_gemm_cuda(const MultiLoraGemmParams& p, void* workspace, Stream stream) {
  const GemmConfig config = choose_multi_lora_gemm(shape_of(p), cuda_target());
  if (!config.fits) return kInvalidConfiguration;
  return multi_lora_gemm_tiled(p, workspace, gemm_tiles(p.adapters.T, p.N, config.tile_n, config.cluster), stream);
}

int multi_lora_gemm_tiled(const MultiLoraGemmParams& p, void* workspace, const GemmTiles& tiles, Stream stream) {
  const Adapters& d = p.adapters;
  const PageLists lists = page_lists(d, tiles, workspace);
  if (const int error = launch("multi_lora_lists", multi_lora_lists_kernel, grid_of(tiles.m, 1), dim3(kBlockThreads),
                               smem_bytes<int32_t>(kBlockThreads / 32), stream, d, lists, tiles.cluster * kTileM))
    return error;
  return multi_lora_gemm_sm90(p, lists, tiles, stream);
}

}  // namespace lrk
