// SPDX-License-Identifier: Apache-2.0
// MoRA on the CPU: a row at a time, its slots and its columns in fp32 in the first-level cache.
#include "mora.h"

#include "factor.h"

namespace lrk {
namespace LRK_ISA {
namespace {

// f(column, slot, length) of runs of neighbours, in the order of positions.
template <class F>
void for_each_run(const MoraMap& m, const F& f) {
  for (int32_t k = 0; k < m.extent;) {
    const int32_t column = k % m.features, slot = k % m.slots;
    const int32_t length = std::min({m.features - column, m.slots - slot, m.extent - k});
    f(column, slot, length);
    k += length;
  }
}

// f(i, vector or scalar tag) over [0, n).
template <class F>
void for_each_lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, vf{});
  for (; i < n; ++i) f(i, float{});
}
template <class T>
vf get(const T* p, vf) {
  return load(p);
}
template <class T>
float get(const T* p, float) {
  return to_float(*p);
}
template <class T>
void put(T* p, vf v) {
  store(p, v);
}
template <class T>
void put(T* p, float v) {
  *p = from_float<T>(v);
}
template <bool kAdd, class T>
void move(float* to, const T* from, int64_t n) {
  for_each_lanes(n, [&](int64_t i, auto lanes) {
    put(to + i, kAdd ? get(to + i, lanes) + get(from + i, lanes) : get(from + i, lanes));
  });
}

// to = R from, or R^T from, chunk by chunk.
template <bool kTransposed, class From, class To>
void rotate(const float* table, int64_t slots, int64_t rank, const From* from, To* to) {
  const int64_t half = rank / 2;
  for (int64_t i = 0; i < slots; i += rank) {
    const float *c = table + i / 2, *s = c + slots / 2;
    for_each_lanes(half, [&](int64_t p, auto lanes) {
      const auto a = get(from + i + p, lanes), b = get(from + i + half + p, lanes);
      const auto cos = get(c + p, lanes), sin = kTransposed ? -get(s + p, lanes) : get(s + p, lanes);
      put(to + i + p, a * cos - b * sin);
      put(to + i + half + p, b * cos + a * sin);
    });
  }
}

int64_t grain(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

// Each chunk by turning the one before it; one in kFresh anew, since an error in a turn is one in all that follow.
void rotation(const MoraRotationParams& p) {
  constexpr int64_t kFresh = 64;
  const int64_t half = p.rank / 2, count = p.chunks * half;
  parallel_for(half, grain(p.chunks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double frequency = mora_frequency(i, p.rank);
      const Turn step = mora_turn(frequency);
      Turn turn = {1, 0};
      for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
        if (chunk % kFresh == 0) turn = mora_turn(static_cast<double>(chunk) * frequency);
        p.table[chunk * half + i] = static_cast<float>(turn.cos);
        p.table[count + chunk * half + i] = static_cast<float>(turn.sin);
        turn = {turn.cos * step.cos - turn.sin * step.sin, turn.sin * step.cos + turn.cos * step.sin};
      }
    }
  });
}

template <class X, class H>
void fold(const MoraFoldParams& p) {
  const MoraMap& m = p.map;
  parallel_for(p.T, grain(m.features), [&](int64_t begin, int64_t end) {
    float* sums = thread_scratch(m.slots);
    const auto finish = [&](const auto* from, H* h) {
      if (p.rotation) return rotate<false>(p.rotation, m.slots, p.rank, from, h);
      for_each_lanes(m.slots, [&](int64_t i, auto lanes) { put(h + i, get(from + i, lanes)); });
    };
    for (int64_t t = begin; t < end; ++t) {
      const X* x = static_cast<const X*>(p.x) + t * p.x_pitch;
      H* h = static_cast<H*>(p.h) + t * m.slots;
      if (m.blocks) {
        for (int32_t slot = 0; slot < m.slots; ++slot) {
          float sum = 0.f;
          for (int32_t i = m.begin(slot), last = m.begin(slot + 1); i < last; ++i) sum += to_float(x[i]);
          h[slot] = from_float<H>(sum);
        }
        continue;
      }
      if (m.extent == m.slots && m.slots <= m.features) {  // a column each
        finish(x, h);
        continue;
      }
      std::fill_n(sums, m.slots, 0.f);
      for_each_run(m, [&](int32_t column, int32_t slot, int32_t n) { move<true>(sums + slot, x + column, n); });
      finish(sums, h);
    }
  });
}

template <class Y, class H>
void unfold(const MoraUnfoldParams& p) {
  const MoraMap& m = p.map;
  parallel_for(p.T, grain(m.features), [&](int64_t begin, int64_t end) {
    float *row = thread_scratch(m.features + m.slots), *turned = row + m.features;
    for (int64_t t = begin; t < end; ++t) {
      const H* h = static_cast<const H*>(p.h) + t * m.slots;
      Y* y = static_cast<Y*>(p.y) + t * p.y_pitch;
      const Y* base = p.base ? static_cast<const Y*>(p.base) + t * p.base_pitch : nullptr;
      // y's columns from `column` on are what base has and `from`, or base alone.
      const auto write = [&](int64_t column, const auto* from, int64_t n) {
        for_each_lanes(n, [&](int64_t i, auto lanes) {
          const auto sum = from ? get(from + i, lanes) : decltype(lanes){};
          put(y + column + i, base ? get(base + column + i, lanes) + sum : sum);
        });
      };
      const auto spread = [&](const auto* from) {
        if (m.extent <= m.features) {  // a slot each
          for_each_run(m, [&](int32_t column, int32_t slot, int32_t n) { write(column, from + slot, n); });
          if (y != base) write(m.extent, static_cast<const float*>(nullptr), m.features - m.extent);
          return;
        }
        std::fill_n(row, m.features, 0.f);
        for_each_run(m, [&](int32_t column, int32_t slot, int32_t n) { move<true>(row + column, from + slot, n); });
        write(0, row, m.features);
      };
      if (m.blocks) {
        for (int32_t slot = 0; slot < m.slots; ++slot)
          std::fill(row + m.begin(slot), row + m.begin(slot + 1), to_float(h[slot]));
        write(0, row, m.features);
      } else if (p.rotation) {
        rotate<true>(p.rotation, m.slots, p.rank, h, turned);
        spread(turned);
      } else {
        spread(h);
      }
    }
  });
}

}  // namespace
}  // namespace LRK_ISA

LRK_CPU_ENTRY(mora_rotation, MoraRotationParams, rotation(p))
LRK_CPU_ENTRY(mora_fold, MoraFoldParams,
              with_types(p.dtype, p.h_dtype, [&](auto x, auto h) { fold<decltype(x), decltype(h)>(p); }))
LRK_CPU_ENTRY(mora_unfold, MoraUnfoldParams,
              with_types(p.dtype, p.h_dtype, [&](auto y, auto h) { unfold<decltype(y), decltype(h)>(p); }))

}  // namespace lrk
