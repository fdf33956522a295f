// SPDX-License-Identifier: Apache-2.0
// Multi-LoRA on the CPU: the plan, then its tiles, rows of one adapter each, through the loops of the LoRA family. The
// caller has checked that every adapter of the plan, every page and every rank exists.
#include "multi_lora.h"

#include <cstring>

#include "factor.h"

namespace lrk {
namespace LRK_ISA {
namespace {

// Up to kPageRanks ranks that lie in one page: rows row.. of the pool are ranks rank.. of a slice.
struct RankRun {
  int64_t row, rank;
  int32_t slice, ranks;

  Factor factor(const void* pool, int64_t N, size_t size) const {
    return {
        .data = static_cast<const char*>(pool) + row * N * static_cast<int64_t>(size), .stride_r = N, .stride_n = 1};
  }
};

// The runs of an adapter, in order of slices and ranks, `most` ranks each.
void runs_of(const Adapters& d, int64_t adapter, int most, std::vector<RankRun>& out) {
  out.clear();
  for (int32_t l = d.first; l < d.first + d.slices; ++l) {
    const int32_t* pages = d.pages + (adapter * d.L + l) * d.M;
    const int64_t rank = d.ranks[adapter * d.L + l];
    for (int64_t r = 0; r < rank; r += most) {
      const int64_t page = pages[r / kPageRanks], in_page = r % kPageRanks;
      out.push_back({page * kPageRanks + in_page, r, l,
                     static_cast<int32_t>(std::min<int64_t>({most, rank - r, kPageRanks - in_page}))});
    }
  }
}

// Rows of one adapter in slot k; adapter -1: rows without one.
struct RowTile {
  const int32_t* rows;
  int32_t count;
  int64_t adapter, k;
};
std::vector<RowTile> tiles_of(const Adapters& d, int64_t k) {
  const PlanLayout at = plan_layout(d.T, d.A);
  const int32_t *plan = d.plan + k * at.length, *tile = plan + at.tiles;
  std::vector<RowTile> tiles;
  for (int64_t i = 0; i < at.G && tile[2 * i + 1] < d.T; ++i) {
    const int32_t group = tile[2 * i], start = tile[2 * i + 1];
    const int32_t count = std::min<int32_t>(kPlanRows, plan[at.begin + group + 1] - start);
    tiles.push_back({plan + start, count, group - 1, k});
  }
  return tiles;
}

Dropout dropout_of(const Adapters& d, int64_t adapter) {
  return d.dropout_p ? make_dropout(d.dropout_p[adapter]) : Dropout{};
}
uint64_t seed_of(const Adapters& d) { return d.dropout_p ? static_cast<uint64_t>(*d.seed) : 0; }

int64_t ranks_of(const Adapters& d) { return kPageRanks * d.M; }

// Where S has rank r of the slot and slice of a row.
int64_t s_offset(const Adapters& d, int64_t row, int64_t k, const RankRun& p) {
  return ((row * d.K + k) * d.L + p.slice) * ranks_of(d) + p.rank;
}

// tile[count][kPitch] = D(x) of rows first .. of a tile, columns n0 ..
template <class X>
void load_rows(const Adapters& d, const RowTile& rows, int first, int count, const X* x, int64_t pitch, int64_t n0,
               int n, const Dropout& dropout, float* tile) {
  for (int r = 0; r < count; ++r) {
    const int64_t row = rows.rows[first + r];
    load_row(x + row * pitch + n0, n, dropout, seed_of(d), row * d.K + rows.k, n0, tile + r * kPitch);
  }
}

// A tile of rows against the runs [begin, end) of its adapter, kCpuRanks ranks at most.
struct ShrinkTask {
  RowTile tile;
  size_t begin, end;
};

template <class X, class F>
void shrink(const MultiLoraShrinkParams& p) {
  const Adapters& d = p.adapters;
  using S = TypeOfS<F>;
  const X* x = static_cast<const X*>(p.x);
  S* s = static_cast<S*>(p.s);
  const int64_t slot = d.L * ranks_of(d), T = d.T;
  for (int64_t i = 0; i < T * d.K; ++i)  // of the slices at hand
    std::memset(static_cast<void*>(s + i * slot + d.first * ranks_of(d)), 0, d.slices * ranks_of(d) * sizeof(S));

  const int most = cpu_page_ranks(T * d.K);
  std::vector<ShrinkTask> tasks;
  std::vector<RankRun> runs, one;
  for (int64_t k = 0; k < d.K; ++k)
    for (const RowTile& tile : tiles_of(d, k)) {
      if (tile.adapter < 0) continue;
      runs_of(d, tile.adapter, most, one);
      const size_t at = runs.size(), block = most < kPageRanks ? 1 : kCpuRanks / kPageRanks;
      runs.insert(runs.end(), one.begin(), one.end());
      for (size_t i = at; i < runs.size(); i += block) tasks.push_back({tile, i, std::min(i + block, runs.size())});
    }
  if (tasks.empty()) return;
  const int64_t share = cpu_grain(T * d.K / static_cast<int64_t>(tasks.size()), p.N, most);
  parallel_for(static_cast<int64_t>(tasks.size()), share, [&](int64_t first, int64_t last) {
    alignas(64) float tile[kCpuTokens * kPitch], u_tile[kCpuRanks * kPitch], acc[kPlanRows * kCpuRanks];
    for (int64_t i = first; i < last; ++i) {
      const ShrinkTask& task = tasks[i];
      const RowTile& rows = task.tile;
      const Dropout dropout = dropout_of(d, rows.adapter);
      const int count = static_cast<int>(task.end - task.begin);
      std::fill_n(acc, int64_t{rows.count} * kCpuRanks, 0.f);
      for (int64_t n0 = 0; n0 < p.N; n0 += kChunk) {
        const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - n0));
        View u[kCpuRanks / kPageRanks];
        for (int j = 0; j < count; ++j) {
          const RankRun& run = runs[task.begin + j];
          u[j] =
              factor_tile<F>(run.factor(p.pool, p.N, sizeof(F)), 0, run.ranks, n0, n, u_tile + j * kPageRanks * kPitch);
        }
        for (int t = 0; t < rows.count; t += kCpuTokens) {
          const int m = std::min(kCpuTokens, rows.count - t);
          load_rows(d, rows, t, m, x, p.x_pitch, n0, n, dropout, tile);
          for (int j = 0; j < count; ++j)
            dot_tiles({tile, kPitch}, m, u[j], runs[task.begin + j].ranks, n, acc + t * kCpuRanks + j * kPageRanks,
                      kCpuRanks);
        }
      }
      for (int t = 0; t < rows.count; ++t) {
        const int64_t row = rows.rows[t];
        const float scale = p.scales ? p.scales[row * d.K + rows.k] : 1.f;
        for (int j = 0; j < count; ++j) {
          const RankRun& run = runs[task.begin + j];
          S* out = s + s_offset(d, row, rows.k, run);
          for (int r = 0; r < run.ranks; ++r) out[r] = from_float<S>(scale * acc[t * kCpuRanks + j * kPageRanks + r]);
        }
      }
    }
  });
}

// out[r][0..ranks) = the run's ranks of S in rows[r], fp32 at pitch `pitch`.
template <class S>
void gather_s(const Adapters& d, const void* s, const RowTile& tile, int first, int count, const RankRun& run,
              float* out, int64_t pitch) {
  for (int t = 0; t < count; ++t) {
    const S* src = static_cast<const S*>(s) + s_offset(d, tile.rows[first + t], tile.k, run);
    for (int r = 0; r < run.ranks; ++r) out[t * pitch + r] = to_float(src[r]);
  }
}

// to[i] = from[i] + sums[i]; from may be null, for zeros.
template <class To, class From>
void add_row(To* to, const From* from, const float* sums, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, from ? load(from + i) + load(sums + i) : load(sums + i));
  for (; i < n; ++i) to[i] = from_float<To>(from ? to_float(from[i]) + sums[i] : sums[i]);
}

// One slot: rows of `to` = rows of `from` + D(S pool). Rows without an adapter are copied where `copy` asks for it.
template <class F, class To, class From>
void expand_slot(const MultiLoraExpandParams& p, int64_t k, To* to, int64_t to_pitch, const From* from,
                 int64_t from_pitch, bool copy) {
  const Adapters& d = p.adapters;
  std::vector<RowTile> tiles = tiles_of(d, k);
  if (!copy)
    tiles.erase(tiles.begin(),
                std::find_if(tiles.begin(), tiles.end(), [](const RowTile& t) { return t.adapter >= 0; }));
  if (tiles.empty()) return;
  const int64_t count = static_cast<int64_t>(tiles.size()), chunks = ceil_div(p.N, kChunk);
  const int64_t share = cpu_grain(d.T / count, std::min<int64_t>(p.N, kChunk), kPageRanks);
  parallel_for(chunks * count, share, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kPlanRows * kPitch], u_tile[kPageRanks * kPitch], s_rows[kPlanRows * kPageRanks];
    std::vector<RankRun> runs;
    for (int64_t i = begin; i < end; ++i) {
      const RowTile& tile = tiles[i % count];
      const int64_t n0 = i / count * kChunk;
      const int n = static_cast<int>(std::min<int64_t>(kChunk, p.N - n0)), m = tile.count;
      runs.clear();
      if (tile.adapter >= 0) runs_of(d, tile.adapter, kPageRanks, runs);
      const Dropout dropout = tile.adapter >= 0 ? dropout_of(d, tile.adapter) : Dropout{};
      const auto to_row = [&](int t) { return to + tile.rows[t] * to_pitch + n0; };
      const auto from_row = [&](int t) { return from ? from + tile.rows[t] * from_pitch + n0 : nullptr; };
      const auto view = [&](const RankRun& run) {
        const Factor u = run.factor(p.pool, p.N, sizeof(F));
        gather_s<TypeOfS<F>>(d, p.s, tile, 0, m, run, s_rows, kPageRanks);
        return factor_tile<F>(u, 0, run.ranks, n0, n, u_tile);
      };
      if (runs.size() == 1 && n % kBlock == 0 && !dropout.threshold) {  // sums go from registers to their rows
        const View u = view(runs[0]);
        for (int m0 = 0; m0 < m; m0 += kOuterRows)
          with_count<kOuterRows>(std::min(m - m0, kOuterRows), [&](auto M) {
            for (int c = 0; c < n; c += kBlock) {
              Ahead none;
              outer_tile<M.value>(s_rows + m0 * kPageRanks, kPageRanks, 1, u.at(0, c), runs[0].ranks, none,
                                  [&](int r, int v, vf sum) {
                                    const int col = c + v * kLanes;
                                    const From* add = from_row(m0 + r);
                                    store(to_row(m0 + r) + col, add ? load(add + col) + sum : sum);
                                  });
            }
          });
        continue;
      }
      if (runs.empty()) std::fill_n(sums, int64_t{m} * kPitch, 0.f);
      for (size_t j = 0; j < runs.size(); ++j) {
        const View u = view(runs[j]);
        outer_tiles(j > 0, s_rows, kPageRanks, 1, u, runs[j].ranks, m, n, sums);
      }
      for (int t = 0; t < m; ++t) {
        float* row = sums + t * kPitch;
        drop(dropout, seed_of(d), tile.rows[t] * d.K + k, n0, n, row);
        add_row(to_row(t), from_row(t), row, n);
      }
    }
  });
}

// Several slots are summed in fp32, slot by slot, so that y is rounded once: acc [T, N].
template <class X, class F>
void expand(const MultiLoraExpandParams& p, float* acc) {
  const Adapters& d = p.adapters;
  X* y = static_cast<X*>(p.y);
  const X* base = static_cast<const X*>(p.base);
  if (d.K == 1) return expand_slot<F>(p, 0, y, p.y_pitch, base, p.base_pitch, base != y);
  for (int64_t k = 0; k < d.K; ++k) expand_slot<F>(p, k, acc, p.N, k ? acc : static_cast<float*>(nullptr), p.N, k == 0);
  parallel_for(d.T, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, p.N)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t n0 = 0; n0 < p.N; n0 += kChunk)
        add_row(y + t * p.y_pitch + n0, base + t * p.base_pitch + n0, acc + t * p.N + n0,
                static_cast<int>(std::min<int64_t>(kChunk, p.N - n0)));
  });
}

// All rows of an adapter against its runs [begin, end), kCpuRanks ranks at most.
struct WgradTask {
  int64_t adapter;
  size_t begin, end;
};

template <class X, class F>
void wgrad(const MultiLoraWgradParams& p) {
  const Adapters& d = p.adapters;
  const PlanLayout at = plan_layout(d.T, d.A);
  const auto rows_of = [&](int64_t adapter, int64_t k) {
    const int32_t *plan = d.plan + k * at.length, *begin = plan + at.begin + 1 + adapter;
    return RowTile{plan + begin[0], begin[1] - begin[0], adapter, k};
  };
  std::vector<WgradTask> tasks;
  std::vector<RankRun> runs, one;
  for (int64_t a = 0; a < d.A; ++a) {
    bool used = false;
    for (int64_t k = 0; k < d.K; ++k) used = used || rows_of(a, k).count;
    if (!used) continue;
    runs_of(d, a, kPageRanks, one);
    const size_t from = runs.size(), block = kCpuRanks / kPageRanks;
    runs.insert(runs.end(), one.begin(), one.end());
    for (size_t i = from; i < runs.size(); i += block) tasks.push_back({a, i, std::min(i + block, runs.size())});
  }
  if (tasks.empty()) return;
  const int64_t blocks = ceil_div(p.N, kWgradCols), count = static_cast<int64_t>(tasks.size());
  const int64_t share = cpu_grain(d.T * d.K / count, std::min<int64_t>(p.N, kWgradCols), kPageRanks);
  parallel_for(blocks * count, share, [&](int64_t first, int64_t last) {
    alignas(64) float tile[kCpuTokens * kPitch], s_rows[kCpuTokens * kCpuRanks];
    float *sum = thread_scratch(2 * kCpuRanks * kPitch), *total = sum + kCpuRanks * kPitch;  // [ranks][kPitch]
    for (int64_t i = first; i < last; ++i) {
      const WgradTask& task = tasks[i / blocks];
      const int64_t n0 = i % blocks * kWgradCols;
      const int n = static_cast<int>(std::min<int64_t>(kWgradCols, p.N - n0));
      const int ranks = static_cast<int>(task.end - task.begin) * kPageRanks;
      const Dropout dropout = dropout_of(d, task.adapter);
      std::fill_n(total, ranks * kPitch, 0.f);
      std::fill_n(s_rows, kCpuTokens * kCpuRanks, 0.f);  // ranks a page lacks
      int tiles = 0;
      const auto add_split = [&] {
        for (int64_t e = 0; e < int64_t{ranks} * kPitch; ++e) total[e] += sum[e];
        tiles = 0;
      };
      for (int64_t k = 0; k < d.K; ++k) {
        const RowTile rows = rows_of(task.adapter, k);
        for (int t = 0; t < rows.count; t += kCpuTokens) {
          const int m = std::min(kCpuTokens, rows.count - t);
          load_rows(d, rows, t, m, static_cast<const X*>(p.x), p.x_pitch, n0, n, dropout, tile);
          for (size_t j = task.begin; j < task.end; ++j)
            gather_s<TypeOfS<F>>(d, p.s, rows, t, m, runs[j], s_rows + (j - task.begin) * kPageRanks, kCpuRanks);
          outer_tiles(tiles > 0, s_rows, 1, kCpuRanks, {tile, kPitch}, m, ranks, n, sum);
          if (++tiles == kCpuSplitRows / kCpuTokens) add_split();
        }
      }
      if (tiles) add_split();
      for (size_t j = task.begin; j < task.end; ++j)
        for (int r = 0; r < runs[j].ranks; ++r) {
          F* g = static_cast<F*>(p.g) + (runs[j].row + r) * p.N + n0;
          const float* from = total + ((j - task.begin) * kPageRanks + r) * kPitch;
          for (int c = 0; c < n; ++c) g[c] = from_float<F>(from[c]);
        }
    }
  });
}

// Of each row: columns of the pool, `N` apart from rank to rank, are a load a rank; nothing to vectorise.
template <class F>
void gather(const MultiLoraGatherParams& p) {
  using S = TypeOfS<F>;
  const Adapters& d = p.adapters;
  S* s = static_cast<S*>(p.s);
  std::memset(static_cast<void*>(s), 0, d.T * d.K * d.L * ranks_of(d) * sizeof(S));
  for (int64_t k = 0; k < d.K; ++k) {
    const std::vector<RowTile> tiles = tiles_of(d, k);
    parallel_for(static_cast<int64_t>(tiles.size()), 8, [&](int64_t begin, int64_t end) {
      std::vector<RankRun> runs;
      for (int64_t i = begin; i < end; ++i) {
        const RowTile& tile = tiles[i];
        if (tile.adapter < 0) continue;
        runs_of(d, tile.adapter, kPageRanks, runs);
        for (int t = 0; t < tile.count; ++t) {
          const int64_t row = tile.rows[t], id = p.ids[row];
          const float scale = p.scales ? p.scales[row * d.K + k] : 1.f;
          for (const RankRun& run : runs) {
            const F* from = static_cast<const F*>(p.pool) + run.row * p.N + id;
            S* to = s + s_offset(d, row, k, run);
            for (int r = 0; r < run.ranks; ++r) to[r] = from_float<S>(scale * to_float(from[r * p.N]));
          }
        }
      }
    });
  }
}

template <class F>
void scatter(const MultiLoraScatterParams& p) {
  const Adapters& d = p.adapters;
  std::vector<RankRun> runs;
  std::vector<RowTile> tiles;
  for (int64_t k = 0; k < d.K; ++k) {
    tiles = tiles_of(d, k);
    // A thread has whole runs of adapters: no two of them add to one row of g.
    for (const RowTile& tile : tiles) {
      if (tile.adapter < 0) continue;
      runs_of(d, tile.adapter, kPageRanks, runs);
      parallel_for(static_cast<int64_t>(runs.size()), 4, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j)
          for (int t = 0; t < tile.count; ++t) {
            const int64_t row = tile.rows[t];
            const TypeOfS<F>* from = static_cast<const TypeOfS<F>*>(p.s) + s_offset(d, row, k, runs[j]);
            float* to = p.g + runs[j].row * p.N + p.ids[row];
            for (int r = 0; r < runs[j].ranks; ++r) to[r * p.N] += to_float(from[r]);
          }
      });
    }
  }
}

void plan(const MultiLoraPlanParams& p) {
  const PlanLayout at = plan_layout(p.T, p.A);
  for (int64_t k = 0; k < p.K; ++k) {
    int32_t *order = p.plan + k * at.length, *begin = order + at.begin, *tile = order + at.tiles;
    const auto group = [&](int64_t t) {
      const int32_t a = p.index[t * p.K + k];
      return a < 0 ? 0 : a < p.A ? a + 1 : static_cast<int32_t>(p.A) + 1;
    };
    std::fill_n(begin, p.A + 3, 0);
    for (int64_t t = 0; t < p.T; ++t) ++begin[group(t) + 1];
    for (int64_t g = 0; g < p.A + 2; ++g) begin[g + 1] += begin[g];
    for (int64_t t = 0; t < p.T; ++t) order[begin[group(t)]++] = static_cast<int32_t>(t);
    for (int64_t g = p.A + 1; g > 0; --g) begin[g] = begin[g - 1];  // each had moved on to the start of the next
    begin[0] = 0;
    for (int32_t g = 0; g < p.A + 2; ++g)
      for (int32_t start = begin[g]; start < begin[g + 1]; start += kPlanRows) {
        *tile++ = g;
        *tile++ = start;
      }
    for (; tile < order + at.length; tile += 2) {
      tile[0] = 0;
      tile[1] = static_cast<int32_t>(p.T);
    }
  }
}

}  // namespace
}  // namespace LRK_ISA

LRK_CPU_ENTRY(multi_lora_plan, MultiLoraPlanParams, plan(p))
LRK_CPU_ENTRY(multi_lora_shrink, MultiLoraShrinkParams,
              with_types(p.dtype, p.factor_dtype, [&](auto x, auto f) { shrink<decltype(x), decltype(f)>(p); }))
LRK_CPU_ENTRY(multi_lora_expand, MultiLoraExpandParams, with_types(p.dtype, p.factor_dtype, [&](auto x, auto f) {
                expand<decltype(x), decltype(f)>(p, workspace);
              }))
LRK_CPU_ENTRY(multi_lora_wgrad, MultiLoraWgradParams,
              with_types(p.dtype, p.factor_dtype, [&](auto x, auto f) { wgrad<decltype(x), decltype(f)>(p); }))
LRK_CPU_ENTRY(multi_lora_gather, MultiLoraGatherParams,
              with_float(p.factor_dtype, [&](auto f) { gather<decltype(f)>(p); }))
LRK_CPU_ENTRY(multi_lora_scatter, MultiLoraScatterParams,
              with_float(p.factor_dtype, [&](auto f) { scatter<decltype(f)>(p); }))

}  // namespace lrk
