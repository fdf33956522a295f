// SPDX-License-Identifier: Apache-2.0
// Multi-LoRA on CUDA, sm_80 and up: three products over the tiles of a plan, rows of one adapter each. Rows of x, y and S
// and ranks of a pool are gathered through lists in shared memory; the rest is products.cuh's. Shrink and expand of 16-bit
// factors of x's type are pages.cu's.
// Occupancy plan: blocks of 128 threads, at least two on an SM.
#include "cuda/epilogue.cuh"
#include "cuda/products.cuh"
#include "pages.cuh"
#include "rows.cuh"

namespace lrk {
namespace {

static_assert(kPlanRows == kCudaTokens, "a tile of the plan is one of the products");

// ---- S. Block (slot and tile, ranks, chunk of N): all chunks, or one, its sum to partial [chunk][T][K][slices R].

template <class X, class F, int kRanks>
__global__ __launch_bounds__(kBlockThreads, 2) void multi_lora_shrink_kernel(MultiLoraShrinkParams p, Vectorize vec,
                                                                             float* partial) {
  using Product = Shrink<X, F, kRanks, true>;
  Smem smem;
  const Product product(smem);
  const Lists<kRanks> lists(smem);
  int32_t *rows = lists.rows, *ranks = lists.ranks;
  const Adapters& d = p.adapters;
  const int64_t G = plan_layout(d.T, d.A).G, r0 = int64_t{blockIdx.y} * kRanks, all = all_ranks(d);
  const PlanTile tile = plan_tile(d, blockIdx.x / G, blockIdx.x % G, rows);
  if (tile.count <= 0) return;
  fill_ranks(d, tile.adapter, r0, all, kRanks, ranks);
  sync_threads();

  const int64_t begin = int64_t{blockIdx.z} * kCudaChunk;
  const int64_t end = partial && begin + kCudaChunk < p.N ? begin + kCudaChunk : p.N;
  const Dropout dropout = dropout_of(d, tile.adapter);
  const uint64_t seed = seed_of(dropout, d.seed);
  const auto mask_row = [&](int r) { return int64_t{rows[r]} * d.K + tile.k; };
  typename Product::Sum sum = {};
  if (any_present(ranks, kRanks))
    product.template run<1>(
        sum, begin, end,
        [&](int64_t n) { return Gathered<X>{static_cast<const X*>(p.x) + n, p.x_pitch, rows, p.N - n, vec.x}; },
        [&](int64_t n) { return Gathered<F>{static_cast<const F*>(p.pool) + n, p.N, ranks, p.N - n, vec.u}; },
        [&](auto& stage, int64_t n) { stage.put_rows(product.tx, dropout, seed, mask_row, n); },
        // rounded: the same bits with partial sums and without
        [&](float before, float chunk) { return before + mul_rn(dropout.keep_scale, chunk); });
  for_each_element(sum, warp_id() * 16, 0, [&](int64_t t, int64_t r, float v) {
    const int64_t row = rows[t], at = r0 + r;
    if (row < 0 || at >= all) return;
    if (ranks[r] < 0) v = ranks[r] == kUnknown ? not_a_number() : 0.f;
    if (partial) {
      partial[((blockIdx.z * d.T + row) * d.K + tile.k) * all + at] = v;
    } else {
      store_s<F>(p, row * d.K + tile.k, at, v);
    }
  });
}

// Rows of all ranks at hand, as many as a block has threads for.
LRK_HD unsigned sum_rows(unsigned all) { return all < kBlockThreads ? kBlockThreads / all : 1; }

template <class F>
__global__ __launch_bounds__(kBlockThreads, 8) void multi_lora_sum_kernel(MultiLoraShrinkParams p, const float* partial,
                                                                          int64_t chunks) {
  const unsigned all = static_cast<unsigned>(all_ranks(p.adapters)), threads = kBlockThreads / sum_rows(all);
  const int64_t rows = p.adapters.T * p.adapters.K, row = int64_t{blockIdx.x} * sum_rows(all) + threadIdx.x / threads;
  if (row >= rows || threadIdx.x / threads >= sum_rows(all)) return;
  for (unsigned at = threadIdx.x % threads; at < all; at += threads)
    store_s<F>(p, row, at, sum_partial(partial + row * all + at, chunks, rows * all));
}

// ---- Y, one slot. Block (tile, n tile): rows of `to` = rows of `from` + D(S pool), `from` null for zeros.

template <class X, class F, class To>
__global__ __launch_bounds__(kBlockThreads, 2) void multi_lora_expand_kernel(MultiLoraExpandParams p, Vectorize vec,
                                                                             SlotRows<To> out) {
  using Product = Expand<X, F, true>;
  Smem smem;
  const Product product(smem);
  const Lists<kExpandK> lists(smem);
  int32_t *rows = lists.rows, *ranks = lists.ranks;
  const Adapters& d = p.adapters;
  const int64_t R = kPageRanks * d.M, n0 = int64_t{blockIdx.y} * kBN;
  const PlanTile tile = plan_tile(d, out.k, blockIdx.x, rows);
  if (tile.count <= 0 || (tile.adapter == kAbsent && out.to == out.from)) return;
  bool unknown = tile.adapter == kUnknown;
  typename Product::Sum acc = {};
  for (int64_t l = 0; l < d.slices && tile.adapter >= 0; ++l) {
    const int64_t rank = d.ranks[tile.adapter * d.L + d.first + l], end = (l + 1) * R;
    for (int64_t r = l * R; r < end && r - l * R < rank; r += kExpandK) {
      fill_ranks(d, tile.adapter, r, end, kExpandK, ranks);
      sync_threads();
      unknown = unknown || any(ranks, kExpandK, [](int32_t row) { return row == kUnknown; });
      using S = typename Product::S;
      Stage<S, typename Product::TileS> ss;
      Stage<F, typename Product::TileU> su;
      ss.fetch(
          Gathered<S>{static_cast<const S*>(p.s) + s_at(d, 0, out.k) + r, d.K * d.L * R, rows, end - r, vec.s, ranks});
      su.fetch(Gathered<F>{static_cast<const F*>(p.pool) + n0, p.N, ranks, p.N - n0, vec.u});
      ss.put(product.ts);
      su.put(product.tu);
      sync_threads();
      product.multiply(acc, rank - (r - l * R));
    }
  }
  sync_threads();  // rows is read below even where no loop ran
  const Dropout dropout = dropout_of(d, tile.adapter);
  const uint64_t seed = seed_of(dropout, d.seed);
  for_each_row(acc, warp_id() * 16, [&](int, int t, int col, Vec8<float>& v) {
    const int64_t row = rows[t], n = n0 + col;
    if (row < 0 || n >= p.N) return;
    if (dropout.threshold) drop(v, dropout, seed, row * d.K + out.k, n);
    Words8<To> words = {};
    if (out.from) words = load_row(out.from + row * out.from_pitch + n, p.N - n, vec.x);
    finish_row(out.to + row * out.to_pitch + n, words, p.N - n, vec.x,
               [&](float base, int i) { return unknown ? not_a_number() : base + dropout.keep_scale * v.v[i]; });
  });
}

// Y = base + acc [T, N], the sum over slots. Block (row, kFinishCols columns).
constexpr int kFinishCols = 8 * kBlockThreads;

template <class X>
__global__ __launch_bounds__(kBlockThreads) void multi_lora_finish_kernel(MultiLoraExpandParams p, Vectorize vec,
                                                                          const float* acc) {
  const int64_t row = blockIdx.x, n = int64_t{blockIdx.y} * kFinishCols + threadIdx.x * 8;
  if (n >= p.N) return;
  const auto base = load_row(static_cast<const X*>(p.base) + row * p.base_pitch + n, p.N - n, vec.x);
  const Vec8<float> sum = floats(load_row(acc + row * p.N + n, p.N - n, vec.s));
  finish_row(static_cast<X*>(p.y) + row * p.y_pitch + n, base, p.N - n, vec.x,
             [&](float v, int i) { return v + sum.v[i]; });
}

// ---- G. Block (adapter and ranks, n tile, part of that adapter's rows): to a plane [ranks at hand][N] of partial sums, or
// where the adapter has one part to G itself.

template <class X, class F, int kRanks>
__global__ __launch_bounds__(kBlockThreads, 2) void multi_lora_wgrad_kernel(MultiLoraWgradParams p, Vectorize vec,
                                                                            float* partial) {
  using Product = Wgrad<X, F, kRanks>;
  Smem smem;
  const Product product(smem);
  const Lists<kRanks> lists(smem);
  int32_t *rows = lists.rows, *ranks = lists.ranks;
  const Adapters& d = p.adapters;
  const int64_t all = all_ranks(d), rank_blocks = ceil_div(all, int64_t{kRanks});
  const int64_t adapter = blockIdx.x / rank_blocks, r0 = blockIdx.x % rank_blocks * kRanks;
  const Parts parts = parts_of(d, adapter);
  if (blockIdx.z >= parts.count) return;
  fill_ranks(d, adapter, r0, all, kRanks, ranks);
  sync_threads();
  if (!any_present(ranks, kRanks)) return;

  const int64_t n0 = int64_t{blockIdx.y} * Product::kCols;
  const Dropout dropout = dropout_of(d, adapter);
  const uint64_t seed = seed_of(dropout, d.seed);
  typename Product::Sum acc = {};
  for (int64_t k = 0; k < d.K; ++k) {
    const int32_t* order = order_of(d, k);
    const Span span = parts.of(rows_of(d, k, adapter), blockIdx.z);
    for (int64_t t = span.begin; t < span.end; t += kPlanRows) {
      fill_rows(d, order, t, static_cast<int32_t>(span.end - t < kPlanRows ? span.end - t : kPlanRows), rows);
      sync_threads();
      using S = typename Product::S;
      Stage<S, typename Product::TileS> ss;
      Stage<X, typename Product::TileX> sx;
      ss.fetch(Gathered<S>{static_cast<const S*>(p.s) + s_at(d, 0, k) + r0, s_at(d, 1, 0) - s_at(d, 0, 0), rows,
                           all - r0, vec.s});
      sx.fetch(Gathered<X>{static_cast<const X*>(p.x) + n0, p.x_pitch, rows, p.N - n0, vec.x});
      ss.put(product.ts);
      sx.put_rows(product.tx, dropout, seed, [&](int r) { return int64_t{rows[r]} * d.K + k; }, n0);
      sync_threads();
      product.template multiply<1>(acc);
    }
  }
  float* plane = parts.count > 1 ? partial + parts.plane(blockIdx.z) * all * p.N : nullptr;
  for_each_element(acc, product.rank0(), n0 + product.col0(), [&](int64_t r, int64_t col, float v) {
    if (ranks[r] < 0 || col >= p.N) return;
    store_sum(plane, (r0 + r) * p.N + col, static_cast<F*>(p.g) + ranks[r] * p.N + col, 1.f,
              mul_rn(dropout.keep_scale, v));
  });
}

// Block (adapter and kPageRanks ranks, kSumCols columns): the partial sums of an adapter of several parts, in order.
constexpr int kSumCols = 4 * kBlockThreads;
template <class F>
__global__ __launch_bounds__(kBlockThreads) void multi_lora_wgrad_sum_kernel(MultiLoraWgradParams p,
                                                                             const float* partial) {
  const Adapters& d = p.adapters;
  Smem smem;
  int32_t* ranks = smem.take<int32_t>(kPageRanks);
  const unsigned pages = static_cast<unsigned>(d.slices * d.M);
  const int64_t adapter = blockIdx.x / pages, first = blockIdx.x % pages * kPageRanks, all = all_ranks(d);
  const Parts parts = parts_of(d, adapter);
  if (parts.count < 2) return;
  fill_ranks(d, adapter, first, all, kPageRanks, ranks);
  sync_threads();
#pragma unroll(1)
  for (int r = 0; r < kPageRanks && ranks[r] >= 0; ++r) {
    F* g = static_cast<F*>(p.g) + ranks[r] * p.N;
#pragma unroll(1)
    for (int64_t col = int64_t{blockIdx.y} * kSumCols + threadIdx.x, i = 0; i < 4 && col < p.N;
         ++i, col += kBlockThreads) {
      float sum = 0.f;
      for (int64_t s = 0; s < parts.count; ++s) sum += partial[(parts.plane(s) * all + first + r) * p.N + col];
      g[col] = from_float_fast<F>(sum);
    }
  }
}

}  // namespace

int multi_lora_shrink_cuda(const MultiLoraShrinkParams& p, void* workspace, Stream stream) {
  if (shrinks_by_pages(p.dtype, p.factor_dtype)) return page_shrink(p, stream);
  const Adapters& d = p.adapters;
  const int64_t all = all_ranks(d), G = plan_layout(d.T, d.A).G;
  const ShrinkConfig config = choose_multi_lora_shrink(d.T, d.K, p.N, all, cuda_target());
  float* partial = config.split ? static_cast<float*>(workspace) : nullptr;
  const Vectorize vec{.x = can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      .u = can_vectorize(p.pool, p.N, size_of(p.factor_dtype))};
  return with_float(p.dtype, [&]<class X>(X) {
    using F = float;
    const int error = with_ranks(all, [&](auto ranks) {
      return launch("multi_lora_shrink", multi_lora_shrink_kernel<X, F, ranks.value>,
                    grid_of(d.K * G, ceil_div(all, ranks.value), partial ? config.chunks : 1), dim3(kBlockThreads),
                    Shrink<X, F, ranks.value, true>::kBytes + Lists<ranks.value>::kBytes, stream, p, vec, partial);
    });
    if (error || !partial) return error;
    return launch("multi_lora_sum", multi_lora_sum_kernel<F>,
                  grid_of(ceil_div(d.T * d.K, sum_rows(static_cast<unsigned>(all))), 1), dim3(kBlockThreads), 0, stream,
                  p, partial, config.chunks);
  });
}

int multi_lora_expand_cuda(const MultiLoraExpandParams& p, void* workspace, Stream stream) {
  const Adapters& d = p.adapters;
  float* acc = static_cast<float*>(workspace);
  return with_types(p.dtype, p.factor_dtype, [&]<class X, class F>(X, F) {
    const auto slot = [&]<class To>(const SlotRows<To>& out) {
      if constexpr (by_pages<X, F>) {
        return page_expand<X>(p, out, stream);
      } else {
        const size_t size = sizeof(To);
        const Vectorize vec{
            .x = can_vectorize(out.to, out.to_pitch, size) && can_vectorize(out.from, out.from_pitch, size),
            .u = can_vectorize(p.pool, p.N, sizeof(F)),
            .s = can_vectorize(p.s, kPageRanks, sizeof(TypeOfS<F>))};
        return launch("multi_lora_expand", multi_lora_expand_kernel<X, F, To>,
                      grid_of(plan_layout(d.T, d.A).G, ceil_div(p.N, kBN)), dim3(kBlockThreads),
                      Expand<X, F, true>::kBytes + Lists<kExpandK>::kBytes, stream, p, vec, out);
      }
    };
    if (d.K == 1)
      return slot(SlotRows<X>{0, static_cast<X*>(p.y), static_cast<const X*>(p.base), p.y_pitch, p.base_pitch});
    int error = 0;
    for (int64_t k = 0; k < d.K && !error; ++k) error = slot(SlotRows<float>{k, acc, k ? acc : nullptr, p.N, p.N});
    if (error) return error;
    const Vectorize vec{.x = can_vectorize(p.y, p.y_pitch, sizeof(X)) && can_vectorize(p.base, p.base_pitch, sizeof(X)),
                        .s = can_vectorize(acc, p.N, sizeof(float))};
    return launch("multi_lora_finish", multi_lora_finish_kernel<X>, grid_of(d.T, ceil_div(p.N, kFinishCols)),
                  dim3(kBlockThreads), 0, stream, p, vec, acc);
  });
}

int multi_lora_wgrad_cuda(const MultiLoraWgradParams& p, void* workspace, Stream stream) {
  const Adapters& d = p.adapters;
  const int64_t all = all_ranks(d), windows = part_windows(d.T);
  float* partial = windows > 1 ? static_cast<float*>(workspace) : nullptr;  // else every adapter has one part
  const Vectorize vec{.x = can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      .s = can_vectorize(p.s, kPageRanks, size_of(s_dtype(p.factor_dtype)))};
  if (!d.A || !all) return 0;
  return with_types(p.dtype, p.factor_dtype, [&]<class X, class F>(X, F) {
    const int error = with_ranks(all, [&](auto ranks) {
      using Product = Wgrad<X, F, ranks.value>;
      return launch("multi_lora_wgrad", multi_lora_wgrad_kernel<X, F, ranks.value>,
                    grid_of(d.A * ceil_div(all, ranks.value), ceil_div(p.N, Product::kCols), windows),
                    dim3(kBlockThreads), Product::kBytes + Lists<ranks.value>::kBytes, stream, p, vec, partial);
    });
    if (error || !partial) return error;
    return launch("multi_lora_wgrad_sum", multi_lora_wgrad_sum_kernel<F>,
                  grid_of(d.A * all / kPageRanks, ceil_div(p.N, kSumCols)), dim3(kBlockThreads),
                  smem_bytes<int32_t>(kPageRanks), stream, p, partial);
  });
}

}  // namespace lrk
