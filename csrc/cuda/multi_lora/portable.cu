// SPDX-License-Identifier: Apache-2.0
// Multi-LoRA on CUDA, sm_80 and up: three products over the tiles of a plan, rows of one adapter each. Rows of x, y and S
// and ranks of a pool are gathered through lists in shared memory; the rest is products.cuh's.
// Occupancy plan: blocks of 128 threads, at least two on an SM.
#include "cuda/epilogue.cuh"
#include "cuda/products.cuh"
#include "rows.cuh"

namespace lrk {
namespace {

static_assert(kPlanRows == kCudaTokens, "a tile of the plan is one of the products");

// S's rank `at`, counted through the slices at hand.
template <class F>
__device__ __forceinline__ void store_s(const MultiLoraShrinkParams& p, int64_t row, int64_t k, int64_t at, float v) {
  using S = TypeOfS<F>;
  static_cast<S*>(p.s)[s_at(p.adapters, row, k) + at] = from_float_fast<S>(scale_of(p, row, k) * v);
}

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
  const RowTile tile = plan_tile(d, blockIdx.x / G, blockIdx.x % G, rows);
  if (!tile.count) return;
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
      store_s<F>(p, row, tile.k, at, v);
    }
  });
}

template <class F>
__global__ __launch_bounds__(kBlockThreads, 8) void multi_lora_sum_kernel(MultiLoraShrinkParams p, const float* partial,
                                                                          int64_t chunks) {
  const int64_t K = p.adapters.K, all = all_ranks(p.adapters), count = p.adapters.T * K * all, i = grid_thread();
  if (i >= count) return;
  store_s<F>(p, i / all / K, i / all % K, i % all, sum_partial(partial + i, chunks, count));
}

// ---- Y, one slot. Block (tile, n tile): rows of `to` = rows of `from` + D(S pool), `from` null for zeros.

template <class X, class F, class To>
__global__ __launch_bounds__(kBlockThreads, 2) void multi_lora_expand_kernel(MultiLoraExpandParams p, Vectorize vec,
                                                                             int64_t k, To* to, int64_t to_pitch,
                                                                             const To* from, int64_t from_pitch) {
  using Product = Expand<X, F, true>;
  Smem smem;
  const Product product(smem);
  const Lists<kExpandK> lists(smem);
  int32_t *rows = lists.rows, *ranks = lists.ranks;
  const Adapters& d = p.adapters;
  const int64_t R = kPageRanks * d.M, n0 = int64_t{blockIdx.y} * kBN;
  const RowTile tile = plan_tile(d, k, blockIdx.x, rows);
  if (!tile.count || (tile.adapter == kAbsent && to == from)) return;
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
      ss.fetch(Gathered<S>{static_cast<const S*>(p.s) + s_at(d, 0, k) + r, d.K * d.L * R, rows, end - r, vec.s, ranks});
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
    if (dropout.threshold) drop(v, dropout, seed, row * d.K + k, n);
    Words8<To> words = {};
    if (from) words = load_row(from + row * from_pitch + n, p.N - n, vec.x);
    finish_row(to + row * to_pitch + n, words, p.N - n, vec.x,
               [&](float base, int i) { return unknown ? not_a_number() : base + dropout.keep_scale * v.v[i]; });
  });
}

// Y = base + acc [T, N], the sum over slots.
template <class X>
__global__ __launch_bounds__(kBlockThreads) void multi_lora_finish_kernel(MultiLoraExpandParams p, const float* acc) {
  const int64_t i = grid_thread(), row = i / p.N, n = i % p.N;
  if (row >= p.adapters.T) return;
  const float base = to_float_fast(static_cast<const X*>(p.base)[row * p.base_pitch + n]);
  static_cast<X*>(p.y)[row * p.y_pitch + n] = from_float_fast<X>(base + acc[i]);
}

// ---- G. Block (adapter and ranks, n tile, slot and split of that adapter's rows): to partial [slot, split][P][N], or where
// there is one of them to G itself.

// Splits of a slot's rows; each adapter fills the first ones.
LRK_HD int64_t splits_of(const Adapters& d) { return ceil_div(d.T, split_tokens(d.T, kCudaSplit)); }

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
  const int64_t k = blockIdx.z / splits_of(d), length = split_tokens(d.T, kCudaSplit);
  const Span span = rows_of(d, k, adapter);
  const int64_t begin = span.begin + blockIdx.z % splits_of(d) * length;
  const int64_t end = begin + length < span.end ? begin + length : span.end;
  if (begin >= end) return;
  fill_ranks(d, adapter, r0, all, kRanks, ranks);
  sync_threads();
  if (!any_present(ranks, kRanks)) return;

  const int64_t n0 = int64_t{blockIdx.y} * Product::kCols;
  const Dropout dropout = dropout_of(d, adapter);
  const uint64_t seed = seed_of(dropout, d.seed);
  const int32_t* order = order_of(d, k);
  typename Product::Sum acc = {};
  for (int64_t t = begin; t < end; t += kPlanRows) {
    fill_rows(d, order, t, static_cast<int32_t>(end - t < kPlanRows ? end - t : kPlanRows), rows);
    sync_threads();
    using S = typename Product::S;
    Stage<S, typename Product::TileS> ss;
    Stage<X, typename Product::TileX> sx;
    ss.fetch(Gathered<S>{static_cast<const S*>(p.s) + s_at(d, 0, k) + r0, s_at(d, 1, 0) - s_at(d, 0, 0), rows, all - r0,
                         vec.s});
    sx.fetch(Gathered<X>{static_cast<const X*>(p.x) + n0, p.x_pitch, rows, p.N - n0, vec.x});
    ss.put(product.ts);
    sx.put_rows(product.tx, dropout, seed, [&](int r) { return int64_t{rows[r]} * d.K + k; }, n0);
    sync_threads();
    product.template multiply<1>(acc);
  }
  for_each_element(acc, product.rank0(), n0 + product.col0(), [&](int64_t r, int64_t col, float v) {
    if (ranks[r] < 0 || col >= p.N) return;
    const int64_t at = ranks[r] * p.N + col;
    store_sum(partial, blockIdx.z * d.P * p.N + at, static_cast<F*>(p.g) + at, 1.f, mul_rn(dropout.keep_scale, v));
  });
}

// Block (adapter and kPageRanks ranks, columns): the partial sums that its rows filled, slot by slot.
template <class F>
__global__ __launch_bounds__(kBlockThreads) void multi_lora_wgrad_sum_kernel(MultiLoraWgradParams p,
                                                                             const float* partial) {
  const Adapters& d = p.adapters;
  Smem smem;
  int32_t* ranks = smem.take<int32_t>(kPageRanks);
  const unsigned pages = static_cast<unsigned>(d.slices * d.M);
  const int64_t adapter = blockIdx.x / pages;
  const int64_t col = int64_t{blockIdx.y} * kBlockThreads + threadIdx.x, length = split_tokens(d.T, kCudaSplit);
  fill_ranks(d, adapter, blockIdx.x % pages * kPageRanks, all_ranks(d), kPageRanks, ranks);
  sync_threads();
  if (col >= p.N) return;
  for (int r = 0; r < kPageRanks; ++r) {
    float sum = 0.f;
    bool used = false;
    for (int64_t k = 0; k < d.K && ranks[r] >= 0; ++k) {
      const Span span = rows_of(d, k, adapter);
      const float* v = partial + (k * splits_of(d) * d.P + ranks[r]) * p.N + col;
      for (int64_t t = span.begin; t < span.end; t += length, v += d.P * p.N) {
        sum += *v;
        used = true;
      }
    }
    if (used) static_cast<F*>(p.g)[ranks[r] * p.N + col] = from_float_fast<F>(sum);
  }
}

}  // namespace

int multi_lora_shrink_cuda(const MultiLoraShrinkParams& p, void* workspace, Stream stream) {
  const Adapters& d = p.adapters;
  const int64_t all = all_ranks(d), G = plan_layout(d.T, d.A).G;
  const ShrinkConfig config = choose_multi_lora_shrink(d.T, d.K, p.N, cuda_target());
  float* partial = config.split ? static_cast<float*>(workspace) : nullptr;
  const Vectorize vec{.x = can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      .u = can_vectorize(p.pool, p.N, size_of(p.factor_dtype))};
  return with_types(p.dtype, p.factor_dtype, [&]<class X, class F>(X, F) {
    const int error = with_ranks(all, [&](auto ranks) {
      return launch("multi_lora_shrink", multi_lora_shrink_kernel<X, F, ranks.value>,
                    grid_of(d.K * G, ceil_div(all, ranks.value), partial ? config.chunks : 1), dim3(kBlockThreads),
                    Shrink<X, F, ranks.value, true>::kBytes + Lists<ranks.value>::kBytes, stream, p, vec, partial);
    });
    if (error || !partial) return error;
    return launch("multi_lora_sum", multi_lora_sum_kernel<F>, grid_of_threads(d.T * d.K * all), dim3(kBlockThreads), 0,
                  stream, p, partial, config.chunks);
  });
}

int multi_lora_expand_cuda(const MultiLoraExpandParams& p, void* workspace, Stream stream) {
  const Adapters& d = p.adapters;
  const size_t factor = size_of(p.factor_dtype);
  float* acc = static_cast<float*>(workspace);
  return with_types(p.dtype, p.factor_dtype, [&]<class X, class F>(X, F) {
    const auto slot = [&]<class To>(int64_t k, To* to, int64_t to_pitch, const To* from, int64_t from_pitch) {
      const size_t size = sizeof(To);
      const Vectorize vec{.x = can_vectorize(to, to_pitch, size) && can_vectorize(from, from_pitch, size),
                          .u = can_vectorize(p.pool, p.N, factor),
                          .s = can_vectorize(p.s, kPageRanks, size_of(s_dtype(p.factor_dtype)))};
      return launch("multi_lora_expand", multi_lora_expand_kernel<X, F, To>,
                    grid_of(plan_layout(d.T, d.A).G, ceil_div(p.N, kBN)), dim3(kBlockThreads),
                    Expand<X, F, true>::kBytes + Lists<kExpandK>::kBytes, stream, p, vec, k, to, to_pitch, from,
                    from_pitch);
    };
    if (d.K == 1) return slot(0, static_cast<X*>(p.y), p.y_pitch, static_cast<const X*>(p.base), p.base_pitch);
    int error = 0;
    for (int64_t k = 0; k < d.K && !error; ++k) error = slot(k, acc, p.N, k ? acc : nullptr, p.N);
    if (error) return error;
    return launch("multi_lora_finish", multi_lora_finish_kernel<X>, grid_of_threads(d.T * p.N), dim3(kBlockThreads), 0,
                  stream, p, acc);
  });
}

int multi_lora_wgrad_cuda(const MultiLoraWgradParams& p, void* workspace, Stream stream) {
  const Adapters& d = p.adapters;
  const int64_t all = all_ranks(d), splits = d.K * splits_of(d);
  float* partial = splits > 1 ? static_cast<float*>(workspace) : nullptr;
  const Vectorize vec{.x = can_vectorize(p.x, p.x_pitch, size_of(p.dtype)),
                      .s = can_vectorize(p.s, kPageRanks, size_of(s_dtype(p.factor_dtype)))};
  if (!d.A || !all) return 0;
  return with_types(p.dtype, p.factor_dtype, [&]<class X, class F>(X, F) {
    const int error = with_ranks(all, [&](auto ranks) {
      using Product = Wgrad<X, F, ranks.value>;
      return launch("multi_lora_wgrad", multi_lora_wgrad_kernel<X, F, ranks.value>,
                    grid_of(d.A * ceil_div(all, ranks.value), ceil_div(p.N, Product::kCols), splits),
                    dim3(kBlockThreads), Product::kBytes + Lists<ranks.value>::kBytes, stream, p, vec, partial);
    });
    if (error || !partial) return error;
    return launch("multi_lora_wgrad_sum", multi_lora_wgrad_sum_kernel<F>,
                  grid_of(d.A * all / kPageRanks, ceil_div(p.N, kBlockThreads)), dim3(kBlockThreads),
                  smem_bytes<int32_t>(kPageRanks), stream, p, partial);
  });
}

}  // namespace lrk
