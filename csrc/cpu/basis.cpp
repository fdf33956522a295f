// SPDX-License-Identifier: Apache-2.0
// Random bases on the CPU. kLanes blocks of one row are generated at a time; element j of each of them makes a plane, a
// vector, so that sums run over planes and only what comes in or goes out is put into the order of columns.
#include "basis.h"

#include <algorithm>
#include <cstring>

#include "factor.h"
#include "philox.h"

namespace lrk {
namespace LRK_ISA {
namespace {

constexpr int kBatch = 16;  // blocks of rows generated before they are used; their sums are rounded apart from the rest

[[gnu::always_inline]] inline void generate(const BasisStream& u, const Group& group, int64_t basis, int64_t row,
                                            vu (&c)[4]) {
  generate(u.seed, u.tag() | (u.basis0 + static_cast<uint32_t>(basis)), u.tensor, group, row, c);
}

// ---- columns to planes and back: element (lane, j) of a group is column lane * E + j, and element lane of plane j

template <Distribution Dist, bool kBack>
void reorder(const float* from, float* to) {
  constexpr int E = block_columns(Dist);
  const auto in_columns = [](int i, int j) { return i * E + j; };
  const auto in_planes = [](int i, int j) { return j * kLanes + i; };
  if constexpr (E % kLanes == 0) {
    for (int j = 0; j < E; j += kLanes) {
      vf block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + (kBack ? in_planes(0, j + i) : in_columns(i, j)));
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(to + (kBack ? in_columns(i, j) : in_planes(0, j + i)), block[i]);
    }
  } else {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < E; ++j)
        to[kBack ? in_columns(i, j) : in_planes(i, j)] = from[kBack ? in_planes(i, j) : in_columns(i, j)];
  }
}
template <Distribution Dist>
void to_columns(const float* planes, float* columns) {
  reorder<Dist, true>(planes, columns);
}
template <Distribution Dist>
void to_planes(const float* columns, int64_t n, float* planes) {
  if (n >= kSpan<Dist>) return reorder<Dist, false>(columns, planes);
  alignas(64) float padded[kSpan<Dist>];
  std::fill(std::copy_n(columns, std::max<int64_t>(n, 0), padded), padded + kSpan<Dist>, 0.f);
  reorder<Dist, false>(padded, planes);
}

// ---- the two sums, over a batch of blocks w[n][4]

// acc[t][plane] += Σ_i coef[t][i] w[i], rows t of coefficients and of sums `pitch` apart; coefficients hold the unit.
template <Distribution Dist, int M>
void axpy(const vu (*w)[4], int n, const float* coef, int64_t pitch, float* acc, int64_t acc_pitch) {
  for (int j = 0; j < block_columns(Dist); j += kTogether) {
    vf sum[M][kTogether] = {};
    for (int i = 0; i < n; ++i) {
      vf v[kTogether];
      Planes<Dist>::at(w[i], j, v);
      for (int t = 0; t < M; ++t) {
        const vf c = splat(coef[t * pitch + i]);
        for (int p = 0; p < kTogether; ++p) sum[t][p] += c * v[p];
      }
    }
    for (int t = 0; t < M; ++t)
      for (int p = 0; p < kTogether; ++p) {
        float* at = acc + t * acc_pitch + (j + p) * kLanes;
        store(at, load(at) + sum[t][p]);
      }
  }
}
template <Distribution Dist>
void axpy(const vu (*w)[4], int n, int64_t rows, const float* coef, int64_t pitch, float* acc) {
  int64_t t = 0;
  for (; t + kTogether <= rows; t += kTogether)
    axpy<Dist, kTogether>(w, n, coef + t * pitch, pitch, acc + t * kSpan<Dist>, kSpan<Dist>);
  for (; t < rows; ++t) axpy<Dist, 1>(w, n, coef + t * pitch, pitch, acc + t * kSpan<Dist>, kSpan<Dist>);
}

// out[t][i] += Σ_planes w[i] x[t], in units.
template <Distribution Dist, int M>
void dot(const vu (*w)[4], int n, const float* x, int64_t x_pitch, float* out, int64_t pitch) {
  for (int i = 0; i < n; ++i) {
    vf sum[M][kTogether] = {};
    for (int j = 0; j < block_columns(Dist); j += kTogether) {
      vf v[kTogether];
      Planes<Dist>::at(w[i], j, v);
      for (int t = 0; t < M; ++t)
        for (int p = 0; p < kTogether; ++p) sum[t][p] += v[p] * load(x + t * x_pitch + (j + p) * kLanes);
    }
    for (int t = 0; t < M; ++t) {
      const v4f s = sum_lanes(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
      out[t * pitch + i] += (s[0] + s[1]) + (s[2] + s[3]);
    }
  }
}
template <Distribution Dist>
void dot(const vu (*w)[4], int n, int64_t rows, const float* x, int64_t x_pitch, float* out, int64_t pitch) {
  int64_t t = 0;
  for (; t + kTogether <= rows; t += kTogether)
    dot<Dist, kTogether>(w, n, x + t * x_pitch, x_pitch, out + t * pitch, pitch);
  for (; t < rows; ++t) dot<Dist, 1>(w, n, x + t * x_pitch, x_pitch, out + t * pitch, pitch);
}

// Multiply-adds that a thread takes at once: some 10 us of work.
int64_t grain_of(int64_t per_item) { return std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, per_item)); }

// ---- fill

template <Distribution Dist>
void fill(const BasisFillParams& p) {
  constexpr int E = block_columns(Dist);
  const int64_t first = p.c0 / E, last = ceil_div(p.c0 + p.C, E), groups = ceil_div(last - first, kLanes);
  parallel_for(p.Q, grain_of(p.C), [&](int64_t q_begin, int64_t q_end) {
    alignas(64) float planes[kSpan<Dist>], columns[kSpan<Dist>];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = first + g * kLanes;
      const Group group(block);
      const int64_t begin = std::max(block * E, p.c0), end = std::min((block + kLanes) * E, p.c0 + p.C);
      for (int64_t q = q_begin; q < q_end; ++q) {
        vu w[4];
        generate(p.u, group, (p.q0 + q) / p.R, (p.q0 + q) % p.R, w);
        for (int j = 0; j < E; j += kTogether) {
          vf v[kTogether];
          Planes<Dist>::at(w, j, v);
          for (int i = 0; i < kTogether; ++i) store(planes + (j + i) * kLanes, v[i] * Planes<Dist>::unit);
        }
        to_columns<Dist>(planes, columns);
        const float s = p.row_scale ? p.scale * p.row_scale[q] : p.scale;
        const float* from = columns + (begin - block * E);
        const float* scale = p.col_scale ? p.col_scale + (begin - p.c0) : nullptr;
        with_float(p.dtype, [&](auto tag) {
          using T = decltype(tag);
          T* out = static_cast<T*>(p.out) + q * p.C + (begin - p.c0);
          const int64_t n = end - begin;
          int64_t i = 0;
          for (; i + kLanes <= n; i += kLanes)
            store(out + i, load(from + i) * (scale ? load(scale + i) * s : splat(s)));
          for (; i < n; ++i) out[i] = from_float<T>(from[i] * (scale ? scale[i] * s : s));
        });
      }
    }
  });
}

// ---- combine, and matmul that is not transposed

// out[t][columns of group g] (+)= Σ_q coef[t][q] U[at(q)] over q in [begin, end), rows of coefficients `pitch` apart.
template <Distribution Dist, class At>
void combine_group(const BasisStream& u, int64_t g, int64_t begin, int64_t end, int64_t rows, const float* coef,
                   int64_t pitch, float* acc, const At& at) {
  const Group group(g * kLanes);
  std::fill_n(acc, rows * kSpan<Dist>, 0.f);
  vu w[kBatch][4];
  for (int64_t q = begin; q < end; q += kBatch) {
    const int n = static_cast<int>(std::min<int64_t>(kBatch, end - q));
    for (int i = 0; i < n; ++i) {
      const auto [basis, row] = at(q + i);
      generate(u, group, basis, row, w[i]);
    }
    axpy<Dist>(w, n, rows, coef + q, pitch, acc);
  }
}

struct Place {
  int64_t basis, row;
};

BasisStream of_segment(BasisStream u, int s) {
  u.tensor += static_cast<uint32_t>(s);
  return u;
}

template <Distribution Dist>
void combine(const BasisCombineParams& p, float* workspace) {
  const BasisSegments& s = p.segments;
  const int64_t W = s.begin[s.count], K = s.first[s.count];
  float* coef = workspace;  // times scale and unit
  for (int i = 0; i < s.count; ++i)
    for (int64_t l = 0; l < p.T; ++l)
      for (int64_t k = s.first[i]; k < s.first[i + 1]; ++k)
        coef[l * K + k] = p.coef[l * K + k] * (s.scale[i] * Planes<Dist>::unit);
  struct Task {
    int segment;
    int64_t row, group;
  };
  std::vector<Task> tasks;
  for (int i = 0; i < s.count; ++i)
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t g = 0; g < ceil_div(s.begin[i + 1] - s.begin[i], kSpan<Dist>); ++g) tasks.push_back({i, r, g});
  parallel_for(static_cast<int64_t>(tasks.size()), grain_of(kSpan<Dist> * K), [&](int64_t first, int64_t last) {
    constexpr int64_t kMost = std::max(1, 8192 / kSpan<Dist>);  // layers whose sums stay in the nearest cache
    alignas(64) float acc[kMost * kSpan<Dist>], columns[kSpan<Dist>];
    for (int64_t i = first; i < last; ++i) {
      const Task& task = tasks[i];
      const int64_t c0 = task.group * kSpan<Dist>, begin = s.begin[task.segment] + c0;
      const int64_t n = std::min<int64_t>(kSpan<Dist>, s.begin[task.segment + 1] - begin);
      for (int64_t l0 = 0; l0 < p.T; l0 += kMost) {
        const int64_t m = std::min(kMost, p.T - l0), k0 = s.first[task.segment];
        combine_group<Dist>(of_segment(p.u, task.segment), task.group, 0, s.first[task.segment + 1] - k0, m,
                            coef + l0 * K + k0, K, acc, [&](int64_t k) { return Place{k, task.row}; });
        for (int64_t l = 0; l < m; ++l) {
          to_columns<Dist>(acc + l * kSpan<Dist>, columns);
          float* out = p.out + ((l0 + l) * p.R + task.row) * W + begin;
          const float* base = p.base ? p.base + task.row * W + begin : nullptr;
          for (int64_t c = 0; c < n; ++c) out[c] = base ? base[c] + columns[c] : columns[c];
        }
      }
    }
  });
}

// ---- dot

template <Distribution Dist>
void dot(const BasisDotParams& p, float* workspace) {
  const BasisSegments& s = p.segments;
  const int64_t W = s.begin[s.count], K = s.first[s.count], out_size = p.T * K;
  const int64_t splits = choose_basis_dot_splits(p.T, K, kCpu);
  std::fill_n(workspace, splits * out_size, 0.f);
  // A split of the rows of all segments, fixed by the shape, sums into a copy of the result of its own.
  const int64_t rows = p.R * s.count;
  parallel_for(splits, grain_of(p.R * W * K / splits), [&](int64_t first, int64_t last) {
    float* planes = thread_scratch(static_cast<size_t>(p.T * kSpan<Dist>));
    for (int64_t split = first; split < last; ++split) {
      float* out = workspace + split * out_size;
      for (int64_t i = 0; i < rows; ++i) {
        const int segment = static_cast<int>(i / p.R);
        const int64_t row = i % p.R, width = s.begin[segment + 1] - s.begin[segment];
        const int64_t groups = ceil_div(width, kSpan<Dist>);
        for (int64_t g = 0; g < groups; ++g) {
          if ((i * groups + g) % splits != split) continue;
          for (int64_t l = 0; l < p.T; ++l)
            to_planes<Dist>(p.g + (l * p.R + row) * W + s.begin[segment] + g * kSpan<Dist>, width - g * kSpan<Dist>,
                            planes + l * kSpan<Dist>);
          const BasisStream u = of_segment(p.u, segment);
          const Group group(g * kLanes);
          vu w[kBatch][4];
          for (int64_t k = s.first[segment]; k < s.first[segment + 1]; k += kBatch) {
            const int n = static_cast<int>(std::min<int64_t>(kBatch, s.first[segment + 1] - k));
            for (int j = 0; j < n; ++j) generate(u, group, k + j - s.first[segment], row, w[j]);
            dot<Dist>(w, n, p.T, planes, kSpan<Dist>, out + k, K);
          }
        }
      }
    }
  });
  for (int i = 0; i < s.count; ++i)
    for (int64_t l = 0; l < p.T; ++l)
      for (int64_t k = s.first[i]; k < s.first[i + 1]; ++k) {
        float sum = 0.f;
        for (int64_t split = 0; split < splits; ++split) sum += workspace[split * out_size + l * K + k];
        p.out[l * K + k] = sum * (s.scale[i] * Planes<Dist>::unit);
      }
}

// ---- matmul

float at(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kF16) return to_float(static_cast<const f16*>(data)[i]);
  return to_float(static_cast<const bf16*>(data)[i]);
}

// out[t][n] = (add ? out : 0) + out_scale * value
void emit(const BasisMatmulParams& p, int64_t t, int64_t n0, int64_t n, const float* values) {
  with_float(p.out_dtype, [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(p.out) + t * p.out_pitch + n0;
    for (int64_t i = 0; i < n; ++i) {
      const float v = p.out_scale ? values[i] * p.out_scale[n0 + i] : values[i];
      out[i] = from_float<T>(p.add ? to_float(out[i]) + v : v);
    }
  });
}

template <Distribution Dist>
void matmul(const BasisMatmulParams& p, float* workspace) {
  const int64_t N = p.transposed ? p.C : p.Q, groups = ceil_div(p.C, kSpan<Dist>);
  const int64_t pitch = p.transposed ? groups * kSpan<Dist> : N;
  float* x = workspace;  // fp32, times in_scale; as planes where it meets columns
  for (int64_t t = 0; t < p.T; ++t) {
    float* row = x + t * pitch;
    float* flat = p.transposed ? thread_scratch(static_cast<size_t>(N)) : row;
    for (int64_t i = 0; i < N; ++i) {
      const float v = at(p.x, p.x_dtype, t * p.x_pitch + i);
      flat[i] = (p.in_scale ? v * p.in_scale[i] : v) * Planes<Dist>::unit;
    }
    if (p.transposed)
      for (int64_t g = 0; g < groups; ++g)
        to_planes<Dist>(flat + g * kSpan<Dist>, p.C - g * kSpan<Dist>, row + g * kSpan<Dist>);
  }
  float* sums = x + p.T * pitch;
  const auto place = [&](int64_t q) { return Place{q / p.R, q % p.R}; };
  if (p.transposed) {  // sums [T][Q]
    std::fill_n(sums, p.T * p.Q, 0.f);
    parallel_for(ceil_div(p.Q, kBatch), grain_of(kBatch * p.C), [&](int64_t first, int64_t last) {
      vu w[kBatch][4];
      for (int64_t b = first; b < last; ++b) {
        const int64_t q0 = b * kBatch;
        const int n = static_cast<int>(std::min<int64_t>(kBatch, p.Q - q0));
        for (int64_t g = 0; g < groups; ++g) {
          const Group group(g * kLanes);
          for (int i = 0; i < n; ++i) {
            const Place at = place(q0 + i);
            generate(p.u, group, at.basis, at.row, w[i]);
          }
          dot<Dist>(w, n, p.T, x + g * kSpan<Dist>, pitch, sums + q0, p.Q);
        }
      }
    });
    for (int64_t t = 0; t < p.T; ++t) emit(p, t, 0, p.Q, sums + t * p.Q);
    return;
  }
  // Few groups leave threads idle: the sum over Q falls into splits, fixed by the shape, which are added in order.
  const int64_t splits = choose_basis_matmul_splits(p.Q, p.C, kCpu), length = round_up(ceil_div(p.Q, splits), kBatch);
  const int64_t width = groups * kSpan<Dist>;
  parallel_for(groups * splits, grain_of(length * kSpan<Dist>), [&](int64_t first, int64_t last) {
    float* acc = thread_scratch(static_cast<size_t>(p.T * kSpan<Dist>));
    for (int64_t i = first; i < last; ++i) {
      const int64_t g = i / splits, split = i % splits;
      combine_group<Dist>(p.u, g, std::min(split * length, p.Q), std::min((split + 1) * length, p.Q), p.T, x, pitch,
                          acc, place);
      for (int64_t t = 0; t < p.T; ++t)
        to_columns<Dist>(acc + t * kSpan<Dist>, sums + (split * p.T + t) * width + g * kSpan<Dist>);
    }
  });
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t split = 1; split < splits; ++split)
      for (int64_t c = 0; c < p.C; ++c) sums[t * width + c] += sums[(split * p.T + t) * width + c];
    emit(p, t, 0, p.C, sums + t * width);
  }
}

}  // namespace
}  // namespace LRK_ISA

LRK_CPU_ENTRY(basis_fill, BasisFillParams, with_distribution(p.u.distribution, [&](auto d) { fill<d.value>(p); }))
LRK_CPU_ENTRY(basis_combine, BasisCombineParams,
              with_distribution(p.u.distribution, [&](auto d) { combine<d.value>(p, workspace); }))
LRK_CPU_ENTRY(basis_dot, BasisDotParams,
              with_distribution(p.u.distribution, [&](auto d) { dot<d.value>(p, workspace); }))
LRK_CPU_ENTRY(basis_matmul, BasisMatmulParams,
              with_distribution(p.u.distribution, [&](auto d) { matmul<d.value>(p, workspace); }))

}  // namespace lrk
