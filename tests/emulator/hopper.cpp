// SPDX-License-Identifier: Apache-2.0
// See hopper.h. Semantics from the PTX ISA.
#include "hopper.h"

#include "fragments.h"
#include "worker.h"

namespace lrk::emu {

namespace {

constexpr int64_t kMaxBytes = (1 << 20) - 1;  // of a phase
constexpr int kRegisters = 65536;             // of a multiprocessor

// ---- mbarriers -------------------------------------------------------------------------------------------------------------

// Blocks take the same pieces of shared memory, so that a place is the same in all.
template <class T>
T* place_in(const Worker& w, T* p) {
  return reinterpret_cast<T*>(w.arena + (reinterpret_cast<unsigned char*>(p) - t_worker->arena));
}

// Of the mbarrier at b's place in block w of the cluster.
BarrierState& state_in(Worker& w, Mbarrier* b, const char* what, Where at) {
  require_shared(b, sizeof *b, 8, what, at);
  Mbarrier* there = place_in(w, b);
  if (w.done == w.threads) fault(at, "%s: block %d of the cluster has ended (sync_cluster is missing?)", what, w.rank);
  for (BarrierState& s : w.mbarriers) {
    if (s.at != there) continue;
    if (g_tracking && !g_counting) track_access(there, sizeof *b, Access::kAtomic, __builtin_return_address(0));
    return s;
  }
  if (&w == t_worker) fault(at, "%s: nobody has made this mbarrier", what);
  fault(at, "%s: block %d of the cluster has not made this mbarrier (sync_cluster is missing?)", what, w.rank);
}
BarrierState& state_of(Mbarrier* b, const char* what, Where at) { return state_in(*t_worker, b, what, at); }

Worker& block_of(int rank, const char* what, Where at) {
  const std::vector<Worker*>& blocks = t_worker->cluster->blocks;
  if (rank < 0 || rank >= static_cast<int>(blocks.size()))
    fault(at, "%s: no block %d in a cluster of %zu", what, rank, blocks.size());
  return *blocks[static_cast<size_t>(rank)];
}

void complete(Worker& w, BarrierState& s) {
  if (s.arrived < s.expected || s.bytes != 0) return;
  ++s.phase;
  s.arrived = 0;
  s.over = s.arriving;  // which goes on growing: later phases come after this one
  for (Fiber* f : s.waiting) w.wake(*f);
  s.waiting.clear();
}

}  // namespace

void mbarrier_init(Mbarrier* b, int count, Where at) {
  if (skipped(at)) return;
  Worker& w = *t_worker;
  require_shared(b, sizeof *b, 8, "mbarrier_init", at);
  if (count < 1 || count > kMaxBytes) fault(at, "mbarrier_init: %d arrivals", count);
  for (const BarrierState& s : w.mbarriers)
    if (s.at == b) fault(at, "mbarrier_init: this mbarrier is in use");
  if (g_tracking && !g_counting) track_access(b, sizeof *b, Access::kWrite, __builtin_return_address(0));
  w.mbarriers.push_back(
      {b, static_cast<uint32_t>(count), 0, 0, 0, w.current->tid, false, w.cluster->new_engine(), {}, {}, {}});
}

// The bytes are those that copies will land on it, of its present phase.
namespace {
void arrive(Worker& w, Mbarrier* b, uint32_t expected_bytes, Where at) {
  BarrierState& s = state_in(w, b, "mbarrier_arrive", at);
  if (s.arrived == s.expected) fault(at, "mbarrier_arrive: all %u of this phase have arrived", s.expected);
  s.bytes += expected_bytes;
  if (s.bytes > kMaxBytes) fault(at, "mbarrier_arrive: %lld bytes in one phase", static_cast<long long>(s.bytes));
  if (g_tracking) {
    const uint32_t epoch = track_release(&s.arriving);
    if (&w != t_worker) w.sent.emplace_back(t_worker->current->id, epoch);
  }
  ++s.arrived;
  complete(w, s);
}
}  // namespace
void mbarrier_arrive(Mbarrier* b, uint32_t expected_bytes, Where at) {
  if (!skipped(at)) arrive(*t_worker, b, expected_bytes, at);
}
void mbarrier_arrive_at(Mbarrier* b, int rank, Where at) {
  if (!skipped(at)) arrive(block_of(rank, "mbarrier_arrive_at", at), b, 0, at);
}

// Until the phase of this parity is over: that before the present one, if it is of the other parity.
void mbarrier_wait(Mbarrier* b, uint32_t parity, Where at) {
  if (skipped(at)) return;
  Worker& w = *t_worker;
  if (parity > 1) fault(at, "mbarrier_wait: parity %u", parity);
  for (;;) {
    BarrierState& s = state_of(b, "mbarrier_wait", at);
    if ((s.phase & 1) != parity) {
      if (g_tracking) track_acquire(s.over);
      return;
    }
    Fiber& f = *w.current;
    s.waiting.push_back(&f);
    f.state = State::kAtBarrier;
    f.waits_in = "mbarrier_wait";
    f.at = at;
    w.go_on();
  }
}

void fence_mbarrier_init(Where at) {
  if (skipped(at)) return;
  for (BarrierState& s : t_worker->mbarriers) s.fenced |= s.maker == t_worker->current->tid;
}
void fence_async(Where at) {
  if (!skipped(at) && g_tracking) track_fence_async();
}

// ---- boxes -----------------------------------------------------------------------------------------------------------------

int64_t bytes_of(const TensorBox& t) {
  int64_t n = t.item;
  for (int i = 0; i < t.rank; ++i) n *= t.box[i];
  return n;
}

namespace {

// Of each 16 bytes of the box: where they lie in shared memory from its start, and where in global memory, of which so many
// bytes, from the first that lies in the matrix on.
template <class Visit>
void each_chunk(const TensorBox& t, const BoxAt& box, uint32_t start, const Visit& visit) {
  const int64_t row = int64_t{t.box[0]} * t.item, width = t.size[0] * t.item, left = int64_t{box.at[0]} * t.item;
  const int64_t rows = t.rank > 1 ? t.box[1] : 1, sheets = t.rank > 2 ? t.box[2] : 1;
  for (int64_t z = 0; z < sheets; ++z) {
    for (int64_t y = 0; y < rows; ++y) {
      const int64_t at_y = t.rank > 1 ? box.at[1] + y : 0, at_z = t.rank > 2 ? box.at[2] + z : 0;
      const bool inside =
          at_y >= 0 && at_z >= 0 && (t.rank < 2 || at_y < t.size[1]) && (t.rank < 3 || at_z < t.size[2]);
      const auto* line = static_cast<const unsigned char*>(t.base) + (inside && t.rank > 1 ? at_y * t.pitch[0] : 0) +
                         (inside && t.rank > 2 ? at_z * t.pitch[1] : 0);
      for (int64_t c = 0; c < row; c += 16) {
        const int64_t from = std::max<int64_t>(left + c, 0), to = std::min(left + c + 16, width);
        const uint32_t linear = start + static_cast<uint32_t>((z * rows + y) * row + c);
        visit(swizzled(linear, t.swizzle) - start, line + from, from - (left + c),
              inside ? std::max<int64_t>(to - from, 0) : 0);
      }
    }
  }
}

void check_box(const TensorMap& map, const void* smem, int rank, const char* what, Where at) {
  const TensorBox& t = map.box;
  if (const char* why = refusal_of(t)) fault(at, "%s: %s", what, why);
  if (t.rank != rank) fault(at, "%s: %d coordinates in a map of rank %d", what, rank, t.rank);
  if (reinterpret_cast<uintptr_t>(&map) % 64) fault(at, "%s: the map is not 64-byte aligned", what);
  require_shared(smem, static_cast<size_t>(bytes_of(t)), 128, what, at);
  const uint32_t start = shared_window(smem), pattern = 8 * span_of(t.swizzle);
  if (t.swizzle != Swizzle::kNone && start % pattern)
    fault(at, "%s: the box begins %u bytes into the swizzle's pattern of %u", what, start % pattern, pattern);
}

uint32_t window_of(const BulkCopy& c) { return static_cast<uint32_t>(c.smem - c.block->arena); }

void track_global_part(const BulkCopy& c, Access access, const void* pc) {
  std::vector<Span> rows;
  each_chunk(c.map.box, c.box, window_of(c), [&](uint32_t, const unsigned char* p, int64_t, int64_t n) {
    if (n <= 0) return;
    if (!rows.empty() && static_cast<const unsigned char*>(rows.back().p) + rows.back().bytes == p) {
      rows.back().bytes += static_cast<size_t>(n);
    } else {
      rows.push_back({p, static_cast<size_t>(n)});
    }
  });
  track_box(c, rows, access, pc);
}

void land(BulkCopy& c) {
  Worker& w = *c.block;
  const TensorBox& t = c.map.box;
  each_chunk(t, c.box, window_of(c), [&](uint32_t to, const unsigned char* from, int64_t skip, int64_t n) {
    unsigned char chunk[16] = {};
    if (n > 0) std::memcpy(chunk + skip, from, static_cast<size_t>(n));
    std::memcpy(c.smem + to, chunk, 16);
  });
  BarrierState& s = w.mbarriers[static_cast<size_t>(c.barrier)];
  if (g_tracking) {
    track_engine_landed(c.smem, static_cast<size_t>(bytes_of(t)));
    track_engine_over(&s.arriving, c.engine, c.epoch);
  }
  s.bytes -= bytes_of(t);
  complete(w, s);
}

void read_shared(BulkCopy& c) {
  const auto bytes = static_cast<size_t>(bytes_of(c.map.box));
  if (c.read.empty()) c.read.assign(c.smem, c.smem + bytes);
}
void write_global(BulkCopy& c) {
  read_shared(c);
  each_chunk(c.map.box, c.box, window_of(c), [&](uint32_t from, const unsigned char* to, int64_t skip, int64_t n) {
    if (n > 0) std::memcpy(const_cast<unsigned char*>(to), c.read.data() + from + skip, static_cast<size_t>(n));
  });
}

}  // namespace

namespace {
// Into one block: where a box goes to several, it lands in each when it likes.
void load_into(Worker& w, void* smem, const TensorMap& map, Mbarrier* b, BoxAt from, bool again, const void* pc,
               Where at) {
  BarrierState& s = state_in(w, b, "bulk_load", at);
  if (!s.fenced) fault(at, "bulk_load: no fence_mbarrier_init after the mbarrier's making, by its maker");
  const int index = static_cast<int>(&s - w.mbarriers.data());
  auto* to = static_cast<unsigned char*>(place_in(w, static_cast<unsigned char*>(smem)));
  BulkCopy c{map, from, &w, to, t_worker->current->tid, s.engine, 0, index, 0, again, {}};
  if (g_tracking) {
    c.epoch = track_engine_begin(s.engine);
    track_global_part(c, Access::kRead, pc);
    track_engine_access(c.engine, c.epoch, to, static_cast<size_t>(bytes_of(map.box)), Access::kWrite, pc);
    if (&w != t_worker) w.sent.emplace_back(c.engine, c.epoch);
  }
  if (w.acts_now()) {
    land(c);
  } else {
    w.loads.push_back(c);
  }
}
}  // namespace

void bulk_load(void* smem, const TensorMap& map, Mbarrier* b, int rank, BoxAt from, Where at) {
  if (skipped(at)) return;
  check_box(map, smem, rank, "bulk_load", at);
  load_into(*t_worker, smem, map, b, from, false, __builtin_return_address(0), at);
}
void bulk_load_multicast(void* smem, const TensorMap& map, Mbarrier* b, BoxAt from, uint16_t blocks, Where at) {
  if (skipped(at)) return;
  check_box(map, smem, 2, "bulk_load_multicast", at);
  if (blocks == 0) fault(at, "bulk_load_multicast: to no block");
  for (int rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1)
      load_into(block_of(rank, "bulk_load_multicast", at), smem, map, b, from, blocks & ((1 << rank) - 1),
                __builtin_return_address(0), at);
}

void bulk_store(const TensorMap& map, const void* smem, int rank, BoxAt to, Where at) {
  if (skipped(at)) return;
  Worker& w = *t_worker;
  Fiber& f = *w.current;
  check_box(map, smem, rank, "bulk_store", at);
  auto* from = static_cast<unsigned char*>(const_cast<void*>(smem));
  BulkCopy c{map, to, &w, from, f.tid, 0, 0, -1, f.bulk_group, false, {}};
  const auto mine = std::find_if(w.stores.begin(), w.stores.end(), [&](const BulkCopy& s) { return s.tid == f.tid; });
  c.engine = mine == w.stores.end() ? w.cluster->new_engine() : mine->engine;
  if (g_tracking) {
    const void* pc = __builtin_return_address(0);
    c.epoch = track_engine_begin(c.engine);
    track_engine_access(c.engine, c.epoch, smem, static_cast<size_t>(bytes_of(map.box)), Access::kRead, pc);
    track_global_part(c, Access::kWrite, pc);
  }
  if (w.acts_now()) write_global(c);
  w.stores.push_back(std::move(c));
}

void bulk_commit(Where at) {
  if (!skipped(at)) ++t_worker->current->bulk_group;
}

// Until at most so many of this thread's groups have still to read shared memory, or to write global memory too.
void bulk_wait(int groups_left, bool read_only, Where at) {
  if (skipped(at)) return;
  Worker& w = *t_worker;
  Fiber& f = *w.current;
  Known done;
  for (size_t i = 0; i < w.stores.size();) {
    BulkCopy& c = w.stores[i];
    if (c.tid != f.tid || c.group >= f.bulk_group - groups_left) {
      ++i;
      continue;
    }
    read_shared(c);
    if (g_tracking) track_engine_over(&done, c.engine, c.epoch);
    if (read_only) {
      c.group = -1;  // awaited
      ++i;
    } else {
      write_global(c);
      w.stores.erase(w.stores.begin() + static_cast<ptrdiff_t>(i));
    }
  }
  if (g_tracking && done) track_acquire(done);
}

// ---- wgmma -----------------------------------------------------------------------------------------------------------------
// Each of the four warps of a group multiplies its 16 rows of the 64; nothing makes the four meet.

uint32_t shared_window(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - t_worker->arena);
}

namespace {

const unsigned char* element(uint64_t bits, uint32_t row, uint32_t k, Major major) {
  return t_worker->arena + address_of(unpacked(bits), row, k, major);
}
float value(const unsigned char* p, bool is_bf16) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return is_bf16 ? to_float(bf16{bits}) : to_float(f16{bits});
}

void multiply(const Product& p, uint32_t warp) {
  const WgmmaCall& call = p.lanes[0];
  float a[16][16];
  for (int row = 0; !call.a && row < 16; ++row)
    for (int k = 0; k < 16; ++k) {
      const uint32_t of_64 = warp % 4 * 16 + static_cast<uint32_t>(row);
      a[row][k] = value(element(call.a_descriptor, of_64, static_cast<uint32_t>(k), call.a_major), call.bf16);
    }
  for (int lane = 0; call.a && lane < 32; ++lane)
    for (int i = 0; i < 8; ++i) {
      const Coord at = mma_16816_a(lane, i);
      const auto half = static_cast<uint16_t>(p.lanes[lane].a[i / 2] >> i % 2 * 16);
      a[at.row][at.col] = call.bf16 ? to_float(bf16{half}) : to_float(f16{half});
    }
  float b[256][16];
  for (int col = 0; col < call.n; ++col)
    for (int k = 0; k < 16; ++k)
      b[col][k] = value(element(call.b_descriptor, static_cast<uint32_t>(col), static_cast<uint32_t>(k), call.b_major),
                        call.bf16);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < call.n / 2; ++i) {
      const Coord at = wgmma_c(lane, i);
      float& d = p.lanes[lane].d[i];
      float sum = call.add ? d : 0.f;
      for (int k = 0; k < 16; ++k) sum += a[at.row][k] * b[at.col][k];
      d = sum;
    }
}

void check_operand(uint64_t bits, uint32_t rows, Major major, const char* which, Where at) {
  const Worker& w = *t_worker;
  for (uint32_t row = 0; row < rows; row += rows - 1)
    for (uint32_t k : {0u, 15u}) {
      const unsigned char* p = element(bits, row, k, major);
      const Piece* piece = w.piece_at(p);
      if (!piece || p < piece->data || p + 2 > piece->data + piece->bytes)
        fault(at, "wgmma: element (%u, %u) of %s lies outside of shared memory", row, k, which);
    }
  const MatrixDescriptor d = unpacked(bits);
  const uint32_t pattern = 8 * span_of(d.swizzle), along = major == Major::kMN ? 0 : d.start % span_of(d.swizzle);
  if (d.swizzle != Swizzle::kNone && (d.start - along) % pattern)
    fault(at, "wgmma: %s begins %u bytes into the swizzle's pattern of %u", which, (d.start - along) % pattern,
          pattern);
}

// By the warp of the current thread: each of its lanes must know that the operand is there.
void track_operand(const Products& mine, uint64_t bits, uint32_t first, uint32_t rows, Major major, const void* pc) {
  const uint32_t lane_0 = t_worker->current->id / 32 * 32;
  for (uint32_t id = lane_0; id < lane_0 + 32; ++id) {
    bool seen = false;
    for (uint32_t t = lane_0; t < id; ++t) seen |= track_knows_alike(t, id);
    for (uint32_t row = first; !seen && row < first + rows; ++row)
      for (uint32_t k = 0; k < 16; ++k)
        track_engine_access_for(id, mine.engine, mine.epoch, element(bits, row, k, major), 2, Access::kRead, pc);
  }
}

}  // namespace

void wgmma(const WgmmaCall& call, Where at) {
  if (skipped(at)) return;
  Worker& w = *t_worker;
  if (call.n < 8 || call.n > 256 || call.n % 8) fault(at, "wgmma: N %d", call.n);
  if (w.threads % 128) fault(at, "wgmma: a block of %d threads has no whole warpgroups", w.threads);
  struct Meeting {
    WgmmaCall call;
    Where at;
    const void* pc;
  } mine{call, at, __builtin_return_address(0)};
  meet_warp(
      "wgmma", &mine,
      [](void* const(&lanes)[32]) {
        const auto of = [&](int lane) -> const Meeting& { return *static_cast<const Meeting*>(lanes[lane]); };
        const WgmmaCall& first = of(0).call;
        const Where at = of(0).at;
        Worker& w = *t_worker;
        const uint32_t warp = w.current->tid / 32;
        Products& all = w.products[warp];
        Product p;
        for (int i = 0; i < 32; ++i) {
          p.lanes[i] = of(i).call;
          if (p.lanes[i].a_descriptor != first.a_descriptor || p.lanes[i].b_descriptor != first.b_descriptor)
            fault(at, "wgmma: lane %d has other descriptors than lane 0", i);
        }
        if (!all.fenced) fault(at, "wgmma: no wgmma_fence since the last wait");
        if (!first.a) check_operand(first.a_descriptor, 64, first.a_major, "A", at);
        check_operand(first.b_descriptor, static_cast<uint32_t>(first.n), first.b_major, "B", at);
        if (g_counting) return track_wgmma(first.n, !first.a);
        if (g_tracking) {
          if (!all.engine) all.engine = w.cluster->new_engine();
          all.epoch = track_engine_begin(all.engine);
          if (!first.a) track_operand(all, first.a_descriptor, warp % 4 * 16, 16, first.a_major, of(0).pc);
          track_operand(all, first.b_descriptor, 0, static_cast<uint32_t>(first.n), first.b_major, of(0).pc);
        }
        p.group = all.group;
        all.under_way.push_back(p);
        // One after the other: what comes later may add to the same registers.
        if (w.acts_now()) {
          for (const Product& each : all.under_way) multiply(each, warp);
          all.under_way.clear();
        }
      },
      at);
}

namespace {
// A lane of a warp-wide call that only counts.
template <class Op>
void once_a_warp(const char* name, Where at, const Op& op) {
  const Op* mine = &op;
  meet_warp(
      name, &mine,
      [](void* const(&lanes)[32]) {
        (**static_cast<const Op**>(lanes[0]))(t_worker->products[t_worker->current->tid / 32]);
      },
      at);
}
}  // namespace

void wgmma_fence(Where at) {
  if (!skipped(at)) once_a_warp("wgmma_fence", at, [](Products& all) { all.fenced = true; });
}
void wgmma_commit(Where at) {
  if (!skipped(at))
    once_a_warp("wgmma_commit", at, [](Products& all) {
      ++all.group;
      all.committed.push_back(all.epoch);
    });
}

void wgmma_wait(int groups_left, Where at) {
  if (skipped(at)) return;
  const auto wait = [&](Products& all) {
    const auto due = [&](const Product& p) { return p.group < all.group - groups_left; };
    for (const Product& p : all.under_way)
      if (due(p)) multiply(p, t_worker->current->tid / 32);
    std::erase_if(all.under_way, due);
    all.fenced = false;
  };
  once_a_warp("wgmma_wait", at, wait);
  const Products& all = t_worker->products[t_worker->current->tid / 32];
  if (!g_tracking || all.group <= groups_left) return;
  Known done;
  track_engine_over(&done, all.engine, all.committed[static_cast<size_t>(all.group - groups_left - 1)]);
  track_acquire(done);
}

// ---- registers -------------------------------------------------------------------------------------------------------------

void set_registers(int count, bool more, Where at) {
  if (skipped(at)) return;
  if (count < 24 || count > 256 || count % 8) fault(at, "set_registers: %d a thread", count);
  Worker& w = *t_worker;
  const uint32_t warp = w.current->tid / 32;
  sync_warp(at);
  if (w.current->tid % 32) {
    sync_warp(at);
    return;
  }
  if (more ? count < w.registers[warp] : count > w.registers[warp])
    fault(at, "set_registers: %s to %d, this warp has %d", more ? "more" : "less", count, w.registers[warp]);
  while ((count - w.registers[warp]) * 32 > w.free_registers) {
    Fiber& f = *w.current;
    w.want_registers.push_back(&f);
    f.state = State::kAtBarrier;
    f.waits_in = "set_registers";
    f.at = at;
    w.go_on();
  }
  w.free_registers -= (count - w.registers[warp]) * 32;
  w.registers[warp] = count;
  for (Fiber* f : w.want_registers) w.wake(*f);
  w.want_registers.clear();
  sync_warp(at);
}

// ---- a block's begin and end -------------------------------------------------------------------------------------------------

void Worker::start_hopper() {
  mbarriers.clear();
  loads.clear();
  stores.clear();
  want_registers.clear();
  sent.clear();
  leaving = nullptr;
  const int each = std::min(kRegisters / threads / 8 * 8, 248);
  free_registers = kRegisters - each * threads;
  for (int i = 0; i < kMaxWarps; ++i) {
    products[i] = {};
    registers[i] = each;
  }
}

bool Worker::land_one() {
  if (loads.empty()) return false;
  const size_t i = random ? static_cast<size_t>(draw() % loads.size()) : 0;
  BulkCopy c = std::move(loads[i]);
  loads.erase(loads.begin() + static_cast<ptrdiff_t>(i));
  land(c);
  return true;
}

void Worker::finish_thread() {
  for (const BulkCopy& c : stores)
    if (c.tid == current->tid && c.group >= 0)
      fault(Where{}, "a bulk store may still read shared memory when its thread returns: bulk_wait_read is missing");
  if (done == threads - 1 && !loads.empty())
    fault(Where{}, "a bulk load is under way when the block ends: nobody waits for it");
  const Products& mine = products[current->tid / 32];
  if (!mine.under_way.empty()) fault(Where{}, "a wgmma is under way when its thread returns: wgmma_wait is missing");
  if (!g_tracking || cluster->blocks.size() == 1) return;
  track_release(&leaving);
  for (const auto& [id, epoch] : sent)
    if (done == threads - 1 && !track_covers(leaving, id, epoch))
      fault(Where{},
            "a block ends and knows not whether all that was sent to it has come: sync_cluster, or a wait, is missing");
}

void Worker::finish_block() {
  for (BulkCopy& c : stores) write_global(c);
}

}  // namespace lrk::emu
