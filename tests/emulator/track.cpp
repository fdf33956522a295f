// SPDX-License-Identifier: Apache-2.0
// Exact checks of every load and store. Kernels compiled with g++ -fsanitize=thread call __tsan_read4(address) and its
// kin before each access; we do not link that sanitizer but answer the calls here. Each byte of shared memory and of
// declared global memory remembers who wrote and who read it last, and two accesses of different threads, one of them a
// write, must have a barrier between them. "Between" is a vector clock per thread, so named barriers, __syncwarp and
// mbarriers count for just the threads that meet. What the hardware does by itself after a call (a bulk copy, a wgmma that
// reads shared memory) counts as a thread of its own, an engine, which meets others where it is waited for. Found on the
// first run whatever the schedule: races, reads of what nothing wrote, reads of a copy's destination before the wait,
// reads of a thread's writes by the async proxy without its fence, blocks that lean on another block of the launch (clusters
// on another cluster), and what a launch does before wait_predecessor to the memory of the launch before.
#include <dlfcn.h>

#include "worker.h"

namespace lrk::emu {

bool g_tracking = false;
const bool g_counting = false;

namespace {

struct Mark {
  uint32_t serial = 0;         // cluster that did it: 0 nobody, 1 the host before the launch
  uint32_t epoch = 0;          // of the thread or engine
  int32_t pc = 0;              // distance from track_access
  uint16_t id = 0;             // engines follow the threads
  uint16_t fences : 15 = 0;    // of the async proxy, by the thread until then
  uint16_t in_flight : 1 = 0;  // a copy that no wait has covered
};
struct Byte {
  Mark write, read[2], atomic[2];  // atomics need no order among themselves, only with plain loads and stores
  Mark engines[8];                 // that read it: the warps of two warpgroups
  Mark before;                     // a read by a launch that may still be under way
};
struct Region {
  const unsigned char* base;
  size_t bytes;
  std::vector<Byte> shadow;
};

std::vector<Region> g_regions;  // global memory
std::vector<Byte*> g_shared;    // of each block of a cluster: one per byte of its arena
// From g_overlapped on launches may still be under way where nobody has waited for them.
uint32_t g_serial = 1, g_first_of_launch = 2, g_overlapped = 2;
uint32_t g_predecessor;  // the engine that stands for them

// A thread knows of every thread and engine the last epoch that is over; those who met share what they know.
struct Clock {
  Known known;
  uint32_t epoch = 1;                 // its own, over where others learn of it
  std::vector<uint32_t> fenced = {};  // the epoch of each of its fences of the async proxy
};
std::vector<Clock> g_clock;  // threads, then engines
Known g_nothing;

uint32_t known(const Known& k, size_t id) { return id < k->size() ? (*k)[id] : 0; }
void learn(std::vector<uint32_t>& all, const Known& k) {
  if (all.size() < k->size()) all.resize(k->size());
  for (size_t i = 0; i < k->size(); ++i) all[i] = std::max(all[i], (*k)[i]);
}
void learn(std::vector<uint32_t>& all, size_t id, uint32_t epoch) {
  if (all.size() <= id) all.resize(id + 1);
  all[id] = std::max(all[id], epoch);
}

int32_t pack_pc(const void* pc) {
  return static_cast<int32_t>(static_cast<const char*>(pc) - reinterpret_cast<const char*>(&track_access));
}

// The source line of a return address, innermost first, wrappers left out. A report costs a process; there is one.
std::string line_of(const void* pc) {
  Dl_info info;
  if (!pc || !dladdr(pc, &info)) return "?";
  char command[512], line[512];
  std::snprintf(command, sizeof command, "addr2line -ie '%s' %#tx 2>/dev/null", info.dli_fname,
                static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1);
  std::string found;
  if (FILE* f = popen(command, "r")) {
    while (found.empty() && std::fgets(line, sizeof line, f)) {
      line[std::strcspn(line, " \n")] = 0;
      if (!std::strstr(line, "emulated_ptx") && !std::strstr(line, "launch.cuh") && !std::strstr(line, "emulator.h"))
        found = std::strncmp(line, "./", 2) ? line : line + 2;
    }
    pclose(f);
  }
  return found.empty() ? "?" : found;
}

[[noreturn]] void found(const char* what, const void* pc, const std::string& other) {
  fault(Where{}, "%s\n  access at %s%s%s", what, line_of(pc).c_str(), other.empty() ? "" : "\n  ", other.c_str());
}

bool is_engine(uint32_t id) { return id >= t_worker->cluster->ids(); }
bool before_launch(const Mark& m) { return m.serial < g_first_of_launch; }

std::string text_of(const Mark& m, const char* did) {
  const void* pc = reinterpret_cast<const char*>(&track_access) + m.pc;
  if (before_launch(m)) return "the launch before " + std::string(did) + " it at " + line_of(pc);
  const uint32_t each = t_worker->ids();
  std::string who = is_engine(m.id) ? "the hardware" : "thread " + std::to_string(m.id % each);
  if (!is_engine(m.id) && m.id / each != static_cast<uint32_t>(t_worker->rank))
    who += " of block " + std::to_string(m.id / each) + " of the cluster";
  return (m.serial == g_serial ? "" : "another block's ") + who + " " + did +
         (is_engine(m.id) ? " it for " : " it at ") + line_of(pc);
}

// Did the access of `m` happen before now, as thread `id` sees it?
bool ordered(const Mark& m, uint32_t id) {
  if (m.serial != g_serial)
    return m.serial < g_overlapped || (before_launch(m) && known(g_clock[id].known, g_predecessor));
  return m.id == id || m.epoch <= known(g_clock[id].known, m.id);
}

Mark mark_of(uint32_t id, const void* pc) {
  Mark m{g_serial, g_clock[id].epoch, pack_pc(pc), static_cast<uint16_t>(id)};
  m.fences = static_cast<uint16_t>(g_clock[id].fenced.size() & 0x7fff);
  return m;
}

// in: the block whose shared memory p is, or null.
Byte* shadow_of(const void* p, size_t bytes, Worker** in) {
  const auto* c = static_cast<const unsigned char*>(p);
  for (Worker* w : t_worker->cluster->blocks) {
    *in = w;
    if (c >= w->arena && c < w->arena + kArenaBytes) return g_shared[static_cast<size_t>(w->rank)] + (c - w->arena);
  }
  *in = nullptr;
  for (Region& r : g_regions)
    if (c >= r.base && c + bytes <= r.base + r.bytes) return &r.shadow[static_cast<size_t>(c - r.base)];
  return nullptr;  // a thread's own variables, or memory nobody declared: AddressSanitizer's business
}

void note_engine(Mark (&marks)[8], const Mark& me) {
  for (Mark& m : marks) {
    if (m.serial == me.serial && m.id != me.id) continue;
    m = me;
    return;
  }
  fault(Where{}, "the tracker knows no more than eight engines that read one byte");
}

// This launch's marks take the places of the one before.
void keep_before(Byte& b) {
  const auto keep = [&b](const Mark& m) {
    if (m.serial >= g_overlapped && before_launch(m)) b.before = m;
  };
  for (int i = 0; i < 2; ++i) {
    keep(b.read[i]);
    keep(b.atomic[i]);
  }
  keep(b.engines[0]);
}

// Two marks of different warps: a third thread's write then meets at least one that is not itself.
void note(Mark (&marks)[2], const Mark& me) {
  const auto stale = [&](const Mark& m) { return m.serial != me.serial || m.id == me.id; };
  if (stale(marks[0])) {
    marks[0] = me;
  } else if (stale(marks[1]) || marks[0].id / 32 != me.id / 32) {
    marks[1] = me;
  } else {
    marks[0] = me;
  }
}

}  // namespace

void track_global(const void* p, size_t bytes, bool written) {
  Region r{static_cast<const unsigned char*>(p), bytes, std::vector<Byte>(bytes)};
  if (written)
    for (Byte& b : r.shadow) b.write.serial = 1;
  g_regions.push_back(std::move(r));
}
void forget_global() { g_regions.clear(); }

void track_block_start(Cluster& c) {
  while (g_shared.size() < c.blocks.size())
    g_shared.push_back(static_cast<Byte*>(std::calloc(kArenaBytes, sizeof(Byte))));
  ++g_serial;
  const Launch& l = *c.blocks[0]->launch;
  if (l.next == 1) {
    g_first_of_launch = g_serial;
    if (!l.after_predecessor) g_overlapped = g_serial;
  }
  if (!g_nothing) g_nothing = std::make_shared<const std::vector<uint32_t>>();
  g_clock.assign(c.ids(), Clock{g_nothing});
  g_predecessor = c.new_engine();
}

std::vector<uint64_t> track_launch(const Launch&) { return {}; }
void track_launch_end() {}
void track_product(uint32_t) {}

namespace {
void meet(const std::vector<uint32_t>& met) {
  std::vector<uint32_t> all;
  const Known* last = nullptr;
  for (const uint32_t t : met) {
    if (!last || *last != g_clock[t].known) learn(all, g_clock[t].known);
    last = &g_clock[t].known;
    learn(all, t, g_clock[t].epoch++);
  }
  const Known joint = std::make_shared<const std::vector<uint32_t>>(std::move(all));
  for (const uint32_t t : met) g_clock[t].known = joint;
}
}  // namespace
void track_barrier(const uint32_t* lanes_per_warp) {
  const uint32_t first = t_worker->fibers[0].id;
  std::vector<uint32_t> met;
  for (uint32_t w = 0; w < kMaxWarps; ++w)
    for (uint32_t lanes = lanes_per_warp[w]; lanes; lanes &= lanes - 1)
      met.push_back(first + 32 * w + static_cast<uint32_t>(__builtin_ctz(lanes)));
  meet(met);
}
void track_sync_cluster(const std::vector<Fiber*>& all) {
  std::vector<uint32_t> met;
  for (const Fiber* f : all) met.push_back(f->id);
  std::sort(met.begin(), met.end());  // neighbours have mostly learnt alike
  meet(met);
}
void track_sync_warp(uint32_t warp) {
  uint32_t lanes[kMaxWarps] = {};
  lanes[warp] = t_worker->warps[warp].exist;
  track_barrier(lanes);
}
void track_meeting(uint32_t) {}  // shuffles and mma exchange registers, and order no memory

namespace {

// What the current thread's own write needs before the async proxy may see it: a fence by its writer, which whoever begins
// the operation knows of.
void require_fence(const Mark& m, uint32_t id, const void* pc) {
  if (m.serial != g_serial || is_engine(m.id)) return;
  const std::vector<uint32_t>& fenced = g_clock[m.id].fenced;
  if (m.fences < fenced.size() && (m.id == id || fenced[m.fences] <= known(g_clock[id].known, m.id))) return;
  found("no fence_async between a write and the async proxy", pc, text_of(m, "wrote"));
}

// An access by `me`, begun by thread id, whose knowledge counts.
void check_access(const void* p, size_t bytes, Access access, const Mark& me, uint32_t id, bool async, const void* pc) {
  Worker* w;
  Byte* b = shadow_of(p, bytes, &w);
  if (!b) return;
  const bool shared = w != nullptr;
  if (shared) {
    const Piece* piece = w->piece_at(p);
    const auto* c = static_cast<const unsigned char*>(p);
    if (!piece || c < piece->data || c + bytes > piece->data + piece->bytes)
      found(access != Access::kRead ? "write out of bounds of shared memory" : "read out of bounds of shared memory",
            pc,
            piece ? "at byte offset " + std::to_string(c - piece->data) + " of piece " +
                        std::to_string(piece - w->pieces) + " (" + std::to_string(piece->bytes) + " bytes)"
                  : "");
  }
  for (size_t i = 0; i < bytes; ++i, ++b) {
    const Mark& last = b->write;
    const bool written = shared ? last.serial == g_serial : last.serial != 0;
    if (written && last.serial == g_serial && last.in_flight)
      found(is_engine(last.id) ? "a bulk copy has not been waited for" : "cp.async has not been waited for", pc,
            text_of(last, "copies to"));
    const auto require_order = [&](const Mark& m, const char* did, const char* race) {
      if (m.serial == 0 || (shared && m.serial != g_serial) || ordered(m, id)) return;
      const std::string where = shared ? "race in shared memory: " : "race in global memory: ";
      found(before_launch(m)       ? "the launch before may not be over: no wait_predecessor"
            : m.serial != g_serial ? "blocks of one launch depend on each other through global memory"
                                   : (where + race).c_str(),
            pc, text_of(m, did));
    };
    if (g_overlapped != g_first_of_launch) keep_before(*b);
    require_order(last, "wrote", "no barrier between two accesses");
    if (async) require_fence(last, id, pc);
    if (access != Access::kWrite && !written)
      found(shared ? "read of shared memory that nothing wrote" : "read of global memory that nothing wrote", pc, "");
    if (access != Access::kAtomic)
      for (const Mark& m : b->atomic) require_order(m, "updates", "no barrier between two accesses");
    if (access == Access::kRead) {
      if (async) {
        note_engine(b->engines, me);
      } else {
        note(b->read, me);
      }
      continue;
    }
    require_order(b->before, "reads", "");
    for (const Mark& m : b->read) require_order(m, "reads", "written before the readers' barrier");
    for (const Mark& m : b->engines) {
      if (!m.serial) break;
      require_order(m, "reads", "written before the readers' barrier");
    }
    if (access == Access::kAtomic) {
      note(b->atomic, me);
      continue;
    }
    b->write = me;
    b->read[0] = b->read[1] = b->atomic[0] = b->atomic[1] = b->before = Mark{};
    for (Mark& m : b->engines) {
      if (!m.serial) break;
      m = Mark{};
    }
  }
}

}  // namespace

void track_access(const void* p, size_t bytes, Access access, const void* pc) {
  Worker* w = t_worker;
  if (!w || !w->current) return;
  const uint32_t id = w->current->id;
  check_access(p, bytes, access, mark_of(id, pc), id, false, pc);
}

void track_copy_issued(void* to, const void* pc) {
  track_access(to, 16, Access::kWrite, pc);
  Worker* in;
  Byte* b = shadow_of(to, 16, &in);
  for (int i = 0; i < 16; ++i) b[i].write.in_flight = true;
}
void track_copy_wait(size_t) {}
void track_copy_landed(void* to) {
  const uint32_t id = t_worker->current->id;
  Worker* in;
  Byte* b = shadow_of(to, 16, &in);
  for (int i = 0; i < 16; ++i) {
    b[i].write.in_flight = false;
    b[i].write.epoch = g_clock[id].epoch;  // only from here on does a barrier publish it
  }
}

// ---- single threads that meet, and engines ------------------------------------------------------------------------------

namespace {
template <class Learn>
void widen(Known* to, const Learn& learn_more) {
  std::vector<uint32_t> all = *to ? **to : std::vector<uint32_t>();
  learn_more(all);
  *to = std::make_shared<const std::vector<uint32_t>>(std::move(all));
}
}  // namespace

uint32_t track_release(Known* to) {
  const uint32_t id = t_worker->current->id;
  Clock& me = g_clock[id];
  widen(to, [&](auto& all) {
    learn(all, me.known);
    learn(all, id, me.epoch);
  });
  return me.epoch++;
}
bool track_covers(const Known& k, uint32_t id, uint32_t epoch) { return epoch <= known(k, id); }
void track_wait_predecessor() {
  Clock& me = g_clock[t_worker->current->id];
  widen(&me.known, [](auto& all) { learn(all, g_predecessor, 1); });
}
void track_acquire(const Known& from) {
  Clock& me = g_clock[t_worker->current->id];
  // Lanes that wait one after the other mostly knew the same and learn the same: then they share what comes of it.
  static Known knew, learnt, result;
  if (knew != me.known || learnt != from || !result) {
    knew = result = me.known;
    learnt = from;
    if (from) widen(&result, [&](auto& all) { learn(all, from); });
  }
  me.known = result;
}

uint32_t track_engine_begin(uint32_t engine) {
  while (g_clock.size() <= engine) g_clock.push_back({g_nothing, 0});
  return ++g_clock[engine].epoch;
}
void track_engine_over(Known* to, uint32_t engine, uint32_t epoch) {
  widen(to, [&](auto& all) { learn(all, engine, epoch); });
}

void track_engine_access(uint32_t engine, uint32_t epoch, const void* p, size_t bytes, Access access, const void* pc) {
  track_engine_access_for(t_worker->current->id, engine, epoch, p, bytes, access, pc);
}
bool track_knows_alike(uint32_t id, uint32_t other) { return g_clock[id].known == g_clock[other].known; }
void track_engine_access_for(uint32_t id, uint32_t engine, uint32_t epoch, const void* p, size_t bytes, Access access,
                             const void* pc) {
  Mark me = mark_of(id, pc);
  me.id = static_cast<uint16_t>(engine);
  me.epoch = epoch;
  me.in_flight = access == Access::kWrite;
  check_access(p, bytes, access, me, id, true, pc);
}
void track_engine_landed(const void* p, size_t bytes) {
  Worker* in;
  Byte* b = shadow_of(p, bytes, &in);
  for (size_t i = 0; i < bytes; ++i) b[i].write.in_flight = false;
}
void track_box(const BulkCopy& c, const std::vector<Span>& rows, Access access, const void* pc) {
  for (const Span& row : rows) track_engine_access(c.engine, c.epoch, row.p, row.bytes, access, pc);
}
void track_wgmma(int, bool) {}
void track_fence_async() {
  Clock& me = g_clock[t_worker->current->id];
  me.fenced.push_back(me.epoch);
}

void track_plain(const void* p, size_t bytes, bool write, bool aligned, const void* pc) {
  Worker* w = t_worker;
  if (!w || !w->current) return;
  if (aligned && reinterpret_cast<uintptr_t>(p) % bytes) found("misaligned access", pc, "");
  track_access(p, bytes, write ? Access::kWrite : Access::kRead, pc);
}

}  // namespace lrk::emu
