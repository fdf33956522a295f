// SPDX-License-Identifier: Apache-2.0
// LoRA on the CPU. Compiled once per instruction set; the baseline copy also holds the entry points that choose one.
#include "lora.h"

#include "factor.h"

namespace lrk {
namespace LRK_ISA {
namespace {

constexpr int kRun = 10;  // shrink: tiles a thread takes through all of N at once

// S's rows [t0, t0 + rows) of ranks [r0, r0 + ranks) as fp32: S itself, or in `tile` [rows][ranks].
template <class S>
View s_tile(const void* s, int64_t R, int64_t t0, int rows, int64_t r0, int ranks, float* tile) {
  const S* src = static_cast<const S*>(s) + t0 * R + r0;
  if constexpr (sizeof(S) == 4) return {src, R};
  for (int t = 0; t < rows; ++t)
    for (int r = 0; r < ranks; ++r) tile[t * ranks + r] = to_float(src[t * R + r]);
  return {tile, ranks};
}

// Tasks are (outer, inner) pairs, numbered outer by outer. Calls f(outer, first inner, count) for every run of at most
// `most` of them with one outer in [begin, end): what depends on outer alone is made once a run, by the thread that needs
// it, since data another core has written is dear.
template <class F>
void for_each_run(int64_t begin, int64_t end, int64_t inner, int64_t most, const F& f) {
  while (begin < end) {
    const int64_t first = begin % inner, count = std::min({most, inner - first, end - begin});
    f(begin / inner, first, count);
    begin += count;
  }
}

template <class X, class F>
void shrink(const LoraShrinkParams& p) {
  using S = TypeOfS<F>;
  const X* x = static_cast<const X*>(p.x);
  S* s = static_cast<S*>(p.s);
  const uint64_t seed = p.dropout.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const CpuTasks tasks = choose_lora_cpu_shrink(p.T, p.N, p.R);
  const int64_t tiles = ceil_div(p.T, kCpuTokens), block = tasks.ranks;
  const bool few = p.T <= kFewRows;
  parallel_for(tasks.count, tasks.grain, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kCpuTokens * kPitch], u_tile[kCpuRanks * kPitch], acc[kRun * kCpuTokens * kCpuRanks];
    for_each_run(begin, end, tiles, kRun, [&](int64_t rank_block, int64_t first, int64_t count) {
      const int64_t r0 = rank_block * block, t0 = first * kCpuTokens;
      const int64_t rows = std::min<int64_t>(count * kCpuTokens, p.T - t0);
      const int ranks = static_cast<int>(std::min<int64_t>(block, p.R - r0));
      std::fill_n(acc, rows * kCpuRanks, 0.f);
      for (int64_t n0 = 0; n0 < p.N; n0 += kChunk) {
        const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - n0));
        const View u = factor_tile<F>(p.u, r0, ranks, n0, n, u_tile);
        for (int64_t t = 0; t < rows; t += kCpuTokens) {
          const int m = static_cast<int>(std::min<int64_t>(kCpuTokens, rows - t));
          if (few) {
            const View rows_x = tile_of(x, p.x_pitch, t0 + t, m, n0, n, p.dropout, seed, tile);
            dot_tiles(rows_x, m, u, ranks, n, acc + t * kCpuRanks, kCpuRanks);
            continue;
          }
          load_tile(x, p.x_pitch, t0 + t, m, n0, n, p.dropout, seed, tile);
          const bool wraps = t + kCpuTokens >= rows;  // then the first tile of the next chunk
          const int64_t next = wraps ? 0 : t + kCpuTokens, next_n0 = wraps ? n0 + kChunk : n0;
          dot_tiles({tile, kPitch}, m, u, ranks, n, acc + t * kCpuRanks, kCpuRanks,
                    Ahead::of(x + (t0 + next) * p.x_pitch + next_n0, p.x_pitch,
                              next_n0 < p.N ? std::min<int64_t>(kCpuTokens, rows - next) : 0,
                              std::min<int64_t>(kChunk, p.N - next_n0)));
        }
      }
      for (int64_t t = 0; t < rows; ++t)
        for (int r = 0; r < ranks; ++r) s[(t0 + t) * p.R + r0 + r] = from_float<S>(p.scale * acc[t * kCpuRanks + r]);
    });
  });
}

// What expand adds to: c base + bias of one row, from its column n0 on.
template <class X>
struct AddendRow {
  const X* base;            // or null
  const float* base_scale;  // or null
  const X* bias;            // or null

  template <class P>
  static auto get(const P* p, std::integral_constant<int, 1>) {
    return to_float(*p);
  }
  template <class P>
  static auto get(const P* p, std::integral_constant<int, kLanes>) {
    return load(p);
  }
  Ahead ahead(int64_t pitch, int64_t rows, int64_t n) const { return base ? Ahead::of(base, pitch, rows, n) : Ahead{}; }
  // The row's columns i.. (kWidth of them) plus v.
  template <int kWidth, class V>
  V plus(V v, int i) const {
    constexpr std::integral_constant<int, kWidth> width;
    if (bias) v += get(bias + i, width);
    if (base) v += base_scale ? get(base_scale + i, width) * get(base + i, width) : get(base + i, width);
    return v;
  }
};

template <class X, class F>
void expand(const LoraExpandParams& p) {
  const uint64_t seed = p.dropout.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const bool few = p.T <= kFewRows;
  const int64_t cols = few ? kFewCols : kChunk, tiles = ceil_div(p.T, kCpuTokens), chunks = ceil_div(p.N, cols);
  const int64_t task = cpu_grain(std::min<int64_t>(p.T, kCpuTokens), std::min(p.N, cols), p.R);
  const auto y_at = [&](int64_t t, int64_t n) { return static_cast<X*>(p.y) + t * p.y_pitch + n; };
  const auto addend = [&](int64_t t, int64_t n) {
    return AddendRow<X>{p.base ? static_cast<const X*>(p.base) + t * p.base_pitch + n : nullptr,
                        p.base_scale ? p.base_scale + n : nullptr,
                        p.bias ? static_cast<const X*>(p.bias) + n : nullptr};
  };
  parallel_for(chunks * tiles, task, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kCpuTokens * kPitch], s_rows[kCpuTokens * kMaxRank];
    float* u_tile = thread_scratch(p.R * kPitch);
    for_each_run(begin, end, tiles, tiles, [&](int64_t chunk, int64_t first, int64_t count) {
      const int64_t n0 = chunk * cols, last = std::min<int64_t>((first + count) * kCpuTokens, p.T);
      const int n = static_cast<int>(std::min(cols, p.N - n0));
      const View u = factor_tile<F>(p.u, 0, p.R, n0, n, u_tile);
      for (int64_t t0 = first * kCpuTokens; t0 < last; t0 += kCpuTokens) {
        const int rows = static_cast<int>(std::min<int64_t>(kCpuTokens, last - t0));
        const View s = s_tile<TypeOfS<F>>(p.s, p.R, t0, rows, 0, p.R, s_rows);
        if (p.R <= kCpuRanks && n % kBlock == 0 && !p.dropout.threshold) {  // sums go from registers to y
          for (int i = 0; i < n; i += kBlock)  // these columns of the factor stay in L1 for all rows
            for (int m0 = 0; m0 < rows; m0 += kOuterRows)
              with_count<kOuterRows>(std::min(rows - m0, kOuterRows), [&](auto M) {
                const bool wraps = m0 + M.value >= rows;  // then the first rows of the next columns
                const int64_t next = t0 + (wraps ? 0 : m0 + M.value), ahead_n = n0 + i + (wraps ? kBlock : 0);
                const int64_t left = std::min<int64_t>(kOuterRows, t0 + rows - next);
                Ahead lines = few || ahead_n >= p.N ? Ahead{} : addend(next, ahead_n).ahead(p.base_pitch, left, kBlock);
                outer_tile<M.value>(s.at(m0).data, s.pitch, 1, u.at(0, i), p.R, lines, [&](int m, int v, vf sums) {
                  const int64_t t = t0 + m0 + m, col = n0 + i + v * kLanes;
                  store(y_at(t, col), addend(t, col).template plus<kLanes>(p.scale * sums, 0));
                });
              });
          continue;
        }
        int64_t r = 0;
        do {
          const int64_t ranks = std::min<int64_t>(p.R - r, kCpuRanks);
          outer_tiles(r > 0, s.data + r, s.pitch, 1, u.at(r), ranks, rows, n, tile);
        } while ((r += kCpuRanks) < p.R);
        for (int t = 0; t < rows; ++t) {
          float* sums = tile + t * kPitch;
          drop(p.dropout, seed, t0 + t, n0, n, sums);
          X* y = y_at(t0 + t, n0);
          const AddendRow<X> add = addend(t0 + t, n0);
          int i = 0;
          for (; i + kLanes <= n; i += kLanes) store(y + i, add.template plus<kLanes>(p.scale * load(sums + i), i));
          for (; i < n; ++i) y[i] = from_float<X>(add.template plus<1>(p.scale * sums[i], i));
        }
      }
    });
  });
}

template <class X>
void rescale(const LoraRescaleParams& p, float* partial) {
  const X *dy = static_cast<const X*>(p.dy), *base = static_cast<const X*>(p.base);
  X* dz = static_cast<X*>(p.dz);
  const int64_t chunks = ceil_div(p.N, kChunk), splits = ceil_div(p.T, kRescaleRows);
  parallel_for(chunks * splits, cpu_grain(std::min<int64_t>(p.T, kRescaleRows), std::min<int64_t>(p.N, kChunk), 1),
               [&](int64_t begin, int64_t end) {
                 alignas(64) float sum[kChunk];
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t split = task / chunks, col = task % chunks * kChunk;
                   const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - col));
                   const int64_t last = std::min<int64_t>(p.T, (split + 1) * kRescaleRows);
                   std::fill_n(sum, n, 0.f);
                   for (int64_t t = split * kRescaleRows; t < last; ++t) {
                     const X* d = dy + t * p.dy_pitch + col;
                     if (p.dc) {
                       const X* b = base + t * p.base_pitch + col;
                       int i = 0;
                       for (; i + kLanes <= n; i += kLanes) store(sum + i, load(sum + i) + load(d + i) * load(b + i));
                       for (; i < n; ++i) sum[i] += to_float(d[i]) * to_float(b[i]);
                     }
                     if (!dz) continue;
                     X* z = dz + t * p.N + col;
                     const float* c = p.base_scale + col;
                     int i = 0;
                     for (; i + kLanes <= n; i += kLanes) store(z + i, load(c + i) * load(d + i));
                     for (; i < n; ++i) z[i] = from_float<X>(c[i] * to_float(d[i]));
                   }
                   if (p.dc) std::copy_n(sum, n, partial + split * p.N + col);
                 }
               });
  if (!p.dc) return;
  std::fill_n(p.dc, p.N, 0.f);
  for (int64_t k = 0; k < splits; ++k)
    for (int64_t i = 0; i < p.N; ++i) p.dc[i] += partial[k * p.N + i];
}

// wgrad of ranks [r0, r0 + ranks) and columns [n0, n0 + n): the sum of each split of T in order, then their sum. Where
// `u` is given, the tiles of x that it reads also go to ds [T][R], as shrink's sum over these columns.
template <class X, class F>
void wgrad_block(const LoraWgradParams& p, int64_t r0, int ranks, int64_t n0, int n, float* sums, const View* u,
                 float* ds) {
  alignas(64) float tile[kCpuTokens * kPitch], s_rows[kCpuTokens * kMaxRank];
  float *sum = sums, *total = sums + ranks * kPitch;  // [ranks][kPitch]
  const uint64_t seed = p.dropout.threshold ? static_cast<uint64_t>(*p.seed) : 0;
  const int64_t tokens = split_tokens(p.T, kCpuSplit);
  for (int64_t start = 0; start < p.T; start += tokens) {
    const int64_t last = std::min<int64_t>(p.T, start + tokens);
    for (int64_t t0 = start; t0 < last; t0 += kCpuTokens) {
      const int rows = static_cast<int>(std::min<int64_t>(kCpuTokens, last - t0));
      load_tile(static_cast<const X*>(p.x), p.x_pitch, t0, rows, n0, n, p.dropout, seed, tile);
      const View s = s_tile<TypeOfS<F>>(p.s, p.R, t0, rows, r0, ranks, s_rows), x{tile, kPitch};
      const Ahead next = Ahead::of(static_cast<const X*>(p.x) + (t0 + rows) * p.x_pitch + n0, p.x_pitch,
                                   std::min<int64_t>(kCpuTokens, p.T - t0 - rows), n);
      outer_tiles(t0 > start, s.data, 1, s.pitch, x, rows, ranks, n, sum, next);
      if (!u) continue;
      std::fill_n(ds + t0 * p.R, rows * static_cast<int64_t>(p.R), 0.f);
      dot_tiles(x, rows, *u, ranks, n, ds + t0 * p.R, p.R);
    }
    for (int64_t i = 0; i < int64_t{ranks} * kPitch; ++i) total[i] = start ? total[i] + sum[i] : sum[i];
  }
  F* g = static_cast<F*>(p.g) + r0 * p.g_stride_r + n0 * p.g_stride_n;
  for (int r = 0; r < ranks; ++r)
    for (int i = 0; i < n; ++i) g[r * p.g_stride_r + i * p.g_stride_n] = from_float<F>(p.scale * total[r * kPitch + i]);
}

template <class X, class F>
void wgrad(const LoraWgradParams& p) {
  const int64_t blocks = ceil_div(p.N, kWgradCols), rank_blocks = ceil_div(p.R, kCpuRanks);
  const int64_t task = cpu_grain(p.T, std::min<int64_t>(p.N, kWgradCols), std::min<int64_t>(p.R, kCpuRanks));
  parallel_for(blocks * rank_blocks, task, [&](int64_t begin, int64_t end) {
    float* sums = thread_scratch(2 * kCpuRanks * kPitch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i / rank_blocks * kWgradCols, r0 = i % rank_blocks * kCpuRanks;
      wgrad_block<X, F>(p, r0, static_cast<int>(std::min<int64_t>(kCpuRanks, p.R - r0)), n0,
                        static_cast<int>(std::min<int64_t>(kWgradCols, p.N - n0)), sums, nullptr, nullptr);
    }
  });
}

// partial: dS of one chunk of N each, [chunk][T][R].
template <class X, class F>
void shrink_wgrad(const LoraShrinkWgradParams& both, float* partial) {
  const LoraShrinkParams& p = both.shrink;
  const int64_t chunks = ceil_div(p.N, kChunk), count = p.T * p.R;
  if (!one_cpu_pass(p.N, parallel_threads())) {
    shrink<X, F>(p);
    wgrad<X, F>(both.wgrad);
    return;
  }
  parallel_for(chunks, cpu_grain(p.T, std::min<int64_t>(p.N, kChunk), p.R), [&](int64_t begin, int64_t end) {
    float *sums = thread_scratch(3 * p.R * kPitch), *u_tile = sums + 2 * p.R * kPitch;
    for (int64_t c = begin; c < end; ++c) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - c * kChunk));
      const View u = factor_tile<F>(p.u, 0, p.R, c * kChunk, n, u_tile);
      wgrad_block<X, F>(both.wgrad, 0, p.R, c * kChunk, n, sums, &u, partial + c * count);
    }
  });
  using S = TypeOfS<F>;
  S* s = static_cast<S*>(p.s);
  parallel_for(count, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0.f;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[c * count + i];
      s[i] = from_float<S>(p.scale * sum);
    }
  });
}

}  // namespace
}  // namespace LRK_ISA

LRK_CPU_ENTRY(lora_shrink, LoraShrinkParams,
              with_types(p.dtype, p.factor_dtype, [&](auto x, auto f) { shrink<decltype(x), decltype(f)>(p); }))
LRK_CPU_ENTRY(lora_expand, LoraExpandParams,
              with_types(p.dtype, p.factor_dtype, [&](auto x, auto f) { expand<decltype(x), decltype(f)>(p); }))
LRK_CPU_ENTRY(lora_wgrad, LoraWgradParams,
              with_types(p.dtype, p.factor_dtype, [&](auto x, auto f) { wgrad<decltype(x), decltype(f)>(p); }))
LRK_CPU_ENTRY(lora_shrink_wgrad, LoraShrinkWgradParams,
              with_types(p.shrink.dtype, p.shrink.factor_dtype,
                         [&](auto x, auto f) { shrink_wgrad<decltype(x), decltype(f)>(p, workspace); }))
LRK_CPU_ENTRY(lora_rescale, LoraRescaleParams, with_float(p.dtype, [&](auto x) { rescale<decltype(x)>(p, workspace); }))

}  // namespace lrk
