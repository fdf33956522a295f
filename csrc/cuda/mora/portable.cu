// SPDX-License-Identifier: Apache-2.0
// MoRA on CUDA, sm_80 and up: streams without products. A thread has kWidth neighbouring slots or columns of one row: eight
// where all sizes and addresses are of whole vectors, else one.
#include "cuda/place.cuh"
#include "mora.h"

namespace lrk {
namespace {

template <int kWidth>
struct Columns {
  float v[kWidth] = {};

  template <class T>
  __device__ __forceinline__ void load(const T* p) {
    if constexpr (kWidth == 8) {
      Words8<T> w;
      load_words(w, p);
      const Vec8<float> f = floats(w);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] = f.v[i];
    } else {
      v[0] = to_float_fast(*p);
    }
  }
  template <class T>
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kWidth == 8) {
      Vec8<float> f;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) f.v[i] = v[i];
      store_words(p, rounded<T>(f));
    } else {
      *p = from_float_fast<T>(v[0]);
    }
  }
  template <class T>
  __device__ __forceinline__ void add(const T* p) {
    Columns other;
    other.load(p);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] += other.v[i];
  }
};

// (v, other) turned by the angles at c and s; other keeps what it had where it is not wanted.
template <int kWidth>
__device__ __forceinline__ Columns<kWidth> turned(const Columns<kWidth>& v, const Columns<kWidth>& other,
                                                  const Columns<kWidth>& c, const Columns<kWidth>& s, float sign) {
  Columns<kWidth> r;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) r.v[i] = v.v[i] * c.v[i] + sign * (other.v[i] * s.v[i]);
  return r;
}

// The slot of a pair's first half.
__device__ __forceinline__ int pair_slot(int pair, int rank) { return pair / (rank / 2) * rank + pair % (rank / 2); }

// ---- cos and sin of every chunk

__global__ __launch_bounds__(kBlockThreads) void mora_rotation_kernel(MoraRotationParams p) {
  const int64_t at = grid_thread(), half = p.rank / 2, count = p.chunks * half;
  if (at >= count) return;
  const Turn turn = mora_turn(static_cast<double>(at / half) * mora_frequency(at % half, p.rank));
  p.table[at] = static_cast<float>(turn.cos);
  p.table[count + at] = static_cast<float>(turn.sin);
}

// ---- H[T, P] = R F x

template <class X, int kWidth>
__device__ __forceinline__ Columns<kWidth> sum_of(const MoraMap& m, const X* x, int slot) {
  Columns<kWidth> sum;
  if (m.blocks) {
    for (int i = m.begin(slot), last = m.begin(slot + 1); i < last; ++i) sum.add(x + i);
    return sum;
  }
  int k = slot;
  constexpr int kAhead = 4;  // loads under way together
  for (; k + (kAhead - 1) * m.slots < m.extent && k + (kAhead - 1) * m.slots < m.features; k += kAhead * m.slots) {
    Columns<kWidth> next[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) next[i].load(x + k + i * m.slots);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum.v[j] += next[i].v[j];
  }
  for (; k < m.extent; k += m.slots) sum.add(x + (k < m.features ? k : k % m.features));
  return sum;
}

template <class X, class H, int kWidth, bool kTurns>
__global__ __launch_bounds__(kBlockThreads, 8) void mora_fold_kernel(MoraFoldParams p, int shift) {
  const Place at(shift);
  const int first = at.group * kWidth, slot = kTurns ? pair_slot(first, p.rank) : first;
  if (at.row >= p.T || slot >= p.map.slots) return;
  const X* x = static_cast<const X*>(p.x) + at.row * p.x_pitch;
  H* h = static_cast<H*>(p.h) + at.row * p.map.slots + slot;
  const Columns<kWidth> a = sum_of<X, kWidth>(p.map, x, slot);
  if constexpr (kTurns) {
    const int half = p.rank / 2;
    const Columns<kWidth> b = sum_of<X, kWidth>(p.map, x, slot + half);
    Columns<kWidth> c, s;
    c.load(p.rotation + first);
    s.load(p.rotation + p.map.slots / 2 + first);
    turned(a, b, c, s, -1.f).store(h);
    turned(b, a, c, s, 1.f).store(h + half);
  } else {
    a.store(h);
  }
}

// ---- Y[T, N] = base + F^T R^T H

// What position k of H has, turned back.
template <class H, int kWidth, bool kTurns>
__device__ __forceinline__ Columns<kWidth> value_of(const MoraUnfoldParams& p, const H* h, int slot) {
  Columns<kWidth> v;
  v.load(h + slot);
  if constexpr (kTurns) {
    const int half = p.rank / 2, place = slot % p.rank, pair = slot / p.rank * half + place % half;
    Columns<kWidth> other, c, s;
    other.load(h + slot + (place < half ? half : -half));
    c.load(p.rotation + pair);
    s.load(p.rotation + p.map.slots / 2 + pair);
    return turned(v, other, c, s, place < half ? 1.f : -1.f);
  }
  return v;
}

template <class Y, class H, int kWidth, bool kTurns>
__global__ __launch_bounds__(kBlockThreads, 8) void mora_unfold_kernel(MoraUnfoldParams p, int shift) {
  const Place at(shift);
  const int column = at.group * kWidth;
  const MoraMap& m = p.map;
  if (at.row >= p.T || column >= m.features) return;
  const H* h = static_cast<const H*>(p.h) + at.row * m.slots;
  Columns<kWidth> sum, base;
  if (p.base) base.load(static_cast<const Y*>(p.base) + at.row * p.base_pitch + column);
  if (m.blocks) {
    sum.load(h + m.slot_of(column));
  } else {
    for (int k = column; k < m.extent; k += m.features) {
      const Columns<kWidth> v = value_of<H, kWidth, kTurns>(p, h, k % m.slots);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum.v[i] += v.v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.v[i] += base.v[i];
  sum.store(static_cast<Y*>(p.y) + at.row * p.y_pitch + column);
}

// ---- launchers

bool in_eights(int64_t n) { return n % 8 == 0; }
bool of_vectors(const MoraMap& m, const float* rotation, int64_t rank) {
  return !m.blocks && in_eights(m.features) && in_eights(m.slots) && in_eights(m.extent) &&
         (!rotation || in_eights(rank / 2));
}

// f(width, shift, grid) for rows of `columns` columns.
template <class F>
int with_width(bool vectors, int64_t T, int64_t columns, const F& f) {
  return with_bool(vectors, [&](auto eight) {
    constexpr int kWidth = eight.value ? 8 : 1;
    const PlaceGrid at = place_grid(T, ceil_div(columns, kWidth));
    return f(std::integral_constant<int, kWidth>{}, at.shift, at.grid);
  });
}

}  // namespace

int mora_rotation_cuda(const MoraRotationParams& p, void*, Stream stream) {
  return launch("mora_rotation", mora_rotation_kernel, grid_of_threads(p.chunks * (p.rank / 2)), dim3(kBlockThreads), 0,
                stream, p);
}

int mora_fold_cuda(const MoraFoldParams& p, void*, Stream stream) {
  const bool vectors = of_vectors(p.map, p.rotation, p.rank) && can_vectorize(p.x, p.x_pitch, size_of(p.dtype)) &&
                       can_vectorize(p.h, p.map.slots, size_of(p.h_dtype));
  return with_types(p.dtype, p.h_dtype, [&]<class X, class H>(X, H) {
    return with_bool(p.rotation != nullptr, [&](auto turns) {
      const int64_t columns = turns.value ? p.map.slots / 2 : p.map.slots;
      return with_width(vectors, p.T, columns, [&](auto width, int shift, dim3 grid) {
        return launch("mora_fold", mora_fold_kernel<X, H, width.value, turns.value>, grid, dim3(kBlockThreads), 0,
                      stream, p, shift);
      });
    });
  });
}

int mora_unfold_cuda(const MoraUnfoldParams& p, void*, Stream stream) {
  const size_t size = size_of(p.dtype);
  const bool vectors = of_vectors(p.map, p.rotation, p.rank) && can_vectorize(p.y, p.y_pitch, size) &&
                       can_vectorize(p.base, p.base_pitch, size) && can_vectorize(p.h, p.map.slots, size_of(p.h_dtype));
  return with_types(p.dtype, p.h_dtype, [&]<class Y, class H>(Y, H) {
    return with_bool(p.rotation != nullptr, [&](auto turns) {
      return with_width(vectors, p.T, p.map.features, [&](auto width, int shift, dim3 grid) {
        return launch("mora_unfold", mora_unfold_kernel<Y, H, width.value, turns.value>, grid, dim3(kBlockThreads), 0,
                      stream, p, shift);
      });
    });
  });
}

}  // namespace lrk
