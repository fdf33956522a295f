// SPDX-License-Identifier: Apache-2.0
// Warp-wide operations and asynchronous copies. Every lane brings its arguments to the meeting; the last one computes.
#include "../../csrc/common.h"
#include "fragments.h"
#include "worker.h"

namespace lrk::emu {

void sync_warp(Where at) {
  if (skipped(at)) return;
  const WarpOp op = [](void* const(&)[32]) {
    if (g_tracking) track_sync_warp(t_worker->current->tid / 32);
  };
  meet_warp("sync_warp", nullptr, op, at);
}

// The memory order of a warp is renewed by sync_warp alone: shuffles and mma exchange registers, and promise no more.
namespace {

struct Shuffle {
  uint64_t value, result;
  int source;
};
struct Vote {
  bool b;
  uint32_t result;
};
struct Reduce {
  uint32_t v, result;
  uint32_t (*combine)(const void*, uint32_t, uint32_t);
  const void* f;
};
struct LoadMatrix {
  int matrices;
  bool transposed;
  uint16_t row[8];  // what this lane's address points at
  uint32_t* r;
};
struct Mma {
  float* d;
  const uint32_t *a, *b;
};

template <class T>
T& of(void* const (&lanes)[32], int lane) {
  return *static_cast<T*>(lanes[lane]);
}

// 16-bit element i of a fragment in 32-bit registers: the low half comes first.
inline uint16_t element(const uint32_t* r, int i) { return static_cast<uint16_t>(r[i / 2] >> i % 2 * 16); }

template <class T>
void mma(void* const (&lanes)[32]) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& m = of<Mma>(lanes, lane);
    for (int i = 0; i < 8; ++i) {
      const Coord at = mma_16816_a(lane, i);
      a[at.row][at.col] = to_float(T{element(m.a, i)});
    }
    for (int i = 0; i < 4; ++i) {
      const Coord at = mma_16816_b(lane, i);
      b[at.row][at.col] = to_float(T{element(m.b, i)});
      const Coord ct = mma_16816_c(lane, i);
      c[ct.row][ct.col] = m.d[i];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Coord ct = mma_16816_c(lane, i);
      of<Mma>(lanes, lane).d[i] = c[ct.row][ct.col];
    }
  }
}

}  // namespace

uint64_t shuffle(const char* name, uint64_t value, int source_lane, Where at) {
  Shuffle s{value, 0, source_lane};
  meet_warp(
      name, &s,
      [](void* const(&lanes)[32]) {
        for (int i = 0; i < 32; ++i)
          of<Shuffle>(lanes, i).result = of<Shuffle>(lanes, of<Shuffle>(lanes, i).source).value;
      },
      at);
  return s.result;
}

uint32_t ballot(bool b, Where at) {
  Vote v{b, 0};
  meet_warp(
      "vote", &v,
      [](void* const(&lanes)[32]) {
        uint32_t mask = 0;
        for (int i = 0; i < 32; ++i) mask |= static_cast<uint32_t>(of<Vote>(lanes, i).b) << i;
        for (int i = 0; i < 32; ++i) of<Vote>(lanes, i).result = mask;
      },
      at);
  return v.result;
}

uint32_t reduce(const char* name, uint32_t mask, uint32_t v, uint32_t (*combine)(const void*, uint32_t, uint32_t),
                const void* f, Where at) {
  if (mask != kAllLanes) fault(at, "%s: mask %#x, only whole warps are emulated", name, mask);
  Reduce r{v, 0, combine, f};
  meet_warp(
      name, &r,
      [](void* const(&lanes)[32]) {
        const Reduce& first = of<Reduce>(lanes, 0);
        uint32_t sum = first.v;
        for (int i = 1; i < 32; ++i) sum = first.combine(first.f, sum, of<Reduce>(lanes, i).v);
        for (int i = 0; i < 32; ++i) of<Reduce>(lanes, i).result = sum;
      },
      at);
  return r.result;
}

// Blocks may run on several host threads, so atomics are atomic on the host too.
uint64_t atomic_load(void* p, size_t bytes, Where at) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fault(at, "atomic: address %p is not %zu-byte aligned", p, bytes);
  if (g_tracking) track_access(p, bytes, Access::kAtomic, __builtin_return_address(0));
  if (bytes == 4) return __atomic_load_n(static_cast<uint32_t*>(p), __ATOMIC_SEQ_CST);
  return __atomic_load_n(static_cast<uint64_t*>(p), __ATOMIC_SEQ_CST);
}
bool atomic_swap(void* p, size_t bytes, uint64_t* old, uint64_t v) {
  constexpr int kOrder = __ATOMIC_SEQ_CST;
  if (bytes == 8) return __atomic_compare_exchange_n(static_cast<uint64_t*>(p), old, v, false, kOrder, kOrder);
  uint32_t word = static_cast<uint32_t>(*old);
  const bool done =
      __atomic_compare_exchange_n(static_cast<uint32_t*>(p), &word, static_cast<uint32_t>(v), false, kOrder, kOrder);
  *old = word;
  return done;
}

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Where at) {
  LoadMatrix m{matrices, transposed, {}, r};
  const int lane = static_cast<int>(t_worker->current->tid % 32);
  if (lane < 8 * matrices) {  // the other lanes' addresses are ignored
    require_shared(row, 16, 16, "ldmatrix", at);
    if (g_tracking) track_access(row, 16, Access::kRead, __builtin_return_address(0));
    if (!g_counting) std::memcpy(m.row, row, 16);
  }
  if (g_counting) {
    for (int k = 0; k < matrices; ++k) r[k] = 0;
    return;
  }
  meet_warp(
      "ldmatrix", &m,
      [](void* const(&lanes)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
          const LoadMatrix& to = of<LoadMatrix>(lanes, lane);
          for (int k = 0; k < to.matrices; ++k) {
            to.r[k] = 0;
            for (int half = 0; half < 2; ++half) {
              const Coord at = ldmatrix_element(lane, 2 * k + half, to.transposed);
              to.r[k] |= static_cast<uint32_t>(of<LoadMatrix>(lanes, 8 * k + at.row).row[at.col]) << 16 * half;
            }
          }
        }
      },
      at);
}

void mma_16816(float* d, const uint32_t* a, const uint32_t* b, MmaType type, Where at) {
  Mma m{d, a, b};
  if (g_counting) return track_product(t_worker->current->tid / 32);
  if (type == MmaType::kF16) {
    meet_warp("mma_16816 f16", &m, mma<f16>, at);
  } else {
    meet_warp("mma_16816 bf16", &m, mma<bf16>, at);
  }
}

// The hardware may move the bytes at any moment between the call and the wait. Schedules cover the two ends: at the wait
// (who forgets to wait reads old data) and at the call (who refills a buffer too early destroys data in use).
void cp_async(void* smem, const void* gmem, int bytes, Where at) {
  Worker& w = *t_worker;
  Fiber& f = *w.current;
  if (bytes < 0 || bytes > 16) fault(at, "cp_async: %d bytes", bytes);
  require_shared(smem, 16, 16, "cp_async", at);
  if (reinterpret_cast<uintptr_t>(gmem) % 16) fault(at, "cp_async: global address %p is not 16-byte aligned", gmem);
  PendingCopy c{smem, f.copy_group, {}};
  if (bytes > 0) {
    if (g_tracking) track_access(gmem, static_cast<size_t>(bytes), Access::kRead, __builtin_return_address(0));
    std::memcpy(c.data, gmem, static_cast<size_t>(bytes));
  }
  if (g_tracking) track_copy_issued(smem, __builtin_return_address(0));
  if (w.copy_early || (w.random && (w.draw() & 1))) std::memcpy(c.to, c.data, 16);
  f.copies.push_back(c);
}

void cp_async_commit() { ++t_worker->current->copy_group; }

void cp_async_wait(int groups_left, Where at) {
  if (skipped(at)) return;
  Fiber& f = *t_worker->current;
  size_t kept = 0;
  if (g_tracking) track_copy_wait(f.copies.size() * sizeof(PendingCopy::data));
  for (PendingCopy& c : f.copies) {
    // A copy that was never committed belongs to no group yet, so no wait covers it.
    if (c.group < f.copy_group - groups_left) {
      std::memcpy(c.to, c.data, 16);
      if (g_tracking) track_copy_landed(c.to);
    } else {
      f.copies[kept++] = c;
    }
  }
  f.copies.resize(kept);
}

}  // namespace lrk::emu
