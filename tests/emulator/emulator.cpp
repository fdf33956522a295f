// SPDX-License-Identifier: Apache-2.0
// Launches, faults, barriers and shared memory. See emulator.h.
#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>

#include "worker.h"

namespace lrk::emu {

Settings g_settings;
namespace {

constexpr int kLaunchFailure = 719, kInvalidValue = 1;  // cudaErrorLaunchFailure, cudaErrorInvalidValue

std::mutex g_mutex;
std::string g_report;
std::set<std::string> g_launched;
std::vector<std::unique_ptr<Cluster>> g_idle;

std::string format(const char* f, ...) {
  char text[1024];
  va_list a;
  va_start(a, f);
  std::vsnprintf(text, sizeof text, f, a);
  va_end(a);
  return text;
}
std::string text_of(uint3 v) { return format("(%u, %u, %u)", v.x, v.y, v.z); }

void report(const std::string& text) {
  std::lock_guard<std::mutex> lock(g_mutex);
  if (g_report.empty()) g_report = text;  // the first one is the cause, later ones its echo
  std::fprintf(stderr, "%s\n", text.c_str());
}

std::atomic<int64_t>* setting(const std::string& name) {
  Settings& s = g_settings;
  const std::map<std::string, std::atomic<int64_t>*> all = {{"schedule", &s.schedule},
                                                            {"threads", &s.threads},
                                                            {"max_shared", &s.max_shared},
                                                            {"arch", &s.arch},
                                                            {"multiprocessors", &s.multiprocessors},
                                                            {"switches", &s.switches},
                                                            {"blocks", &s.blocks},
                                                            {"launches", &s.launches}};
  const auto it = all.find(name);
  return it == all.end() ? nullptr : it->second;
}

const bool g_environment_read = [] {
  for (const char* name : {"schedule", "threads", "max_shared", "arch"}) {
    std::string variable = "LRK_EMU_";
    for (const char* c = name; *c; ++c) variable += static_cast<char>(*c >= 'a' && *c <= 'z' ? *c - 32 : *c);
    if (const char* value = std::getenv(variable.c_str())) setting(name)->store(std::atoll(value));
  }
  return true;
}();

#if defined(__SANITIZE_ADDRESS__)
// ASan and UBSan say what went wrong and on which line; this adds which CUDA thread it was. Each has a runtime of its own:
// ASan's ends the process through a callback, UBSan's (with abort_on_error, see build.py) through SIGABRT.
extern "C" void __sanitizer_set_death_callback(void (*)());
void say_place() {
  const char* place = current_place();
  if (*place) std::fprintf(stderr, "emulator: sanitizer stopped %s\n", place);
}
const bool g_death_note = [] {
  __sanitizer_set_death_callback(say_place);
  std::signal(SIGABRT, [](int) {
    say_place();
    std::_Exit(1);
  });
  return true;
}();
#endif

std::string thread_list(const std::vector<uint32_t>& tids) {
  std::string text;
  for (size_t i = 0, j; i < tids.size(); i = j) {
    for (j = i + 1; j < tids.size() && tids[j] == tids[j - 1] + 1;) ++j;
    if (text.size() > 120) return text + ", ...";
    text += (text.empty() ? "" : ", ") + (j - i > 1 ? format("%u-%u", tids[i], tids[j - 1]) : format("%u", tids[i]));
  }
  return text;
}

}  // namespace

int launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t smem, int cluster,
           bool after_predecessor, Body body, void* context) {
  if (static_cast<int64_t>(smem) > g_settings.max_shared) return refuse(kernel, grid, block, smem, kInvalidValue);
  ++g_settings.launches;
  Launch l;
  l.kernel = kernel;
  l.function = function;
  l.grid = grid;
  l.block = block;
  l.smem = smem;
  l.body = body;
  l.context = context;
  l.schedule = g_settings.schedule;
  l.cluster = cluster;
  l.after_predecessor = after_predecessor;
  l.clusters = uint64_t{grid.x} * grid.y * grid.z / static_cast<uint64_t>(cluster);
  l.factor = 1;
  l.offset = 0;
  if (l.schedule == 1) {
    l.factor = l.offset = l.clusters - 1;  // the last first
  } else if (l.schedule > 1) {
    l.offset = static_cast<uint64_t>(l.schedule) * 7919 % l.clusters;
    l.factor = std::max<uint64_t>(1, static_cast<uint64_t>(static_cast<double>(l.clusters) * 0.618));
    while (std::gcd(l.factor, l.clusters) != 1) ++l.factor;
  }
  const int64_t wanted = std::min<int64_t>(g_tracking ? 1 : g_settings.threads.load(),
                                           static_cast<int64_t>(std::min<uint64_t>(l.clusters, 256)));
  std::vector<std::unique_ptr<Cluster>> workers;
  {
    std::lock_guard<std::mutex> lock(g_mutex);
    g_launched.insert(format("%s %u %zu", kernel, block.x * block.y * block.z, smem));
    while (static_cast<int64_t>(workers.size()) < std::max<int64_t>(wanted, 1) && !g_idle.empty()) {
      workers.push_back(std::move(g_idle.back()));
      g_idle.pop_back();
    }
  }
  while (static_cast<int64_t>(workers.size()) < std::max<int64_t>(wanted, 1))
    workers.push_back(std::make_unique<Cluster>());
  if (g_counting) l.chosen = track_launch(l);
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < workers.size(); ++i) helpers.emplace_back([&, i] { workers[i]->run(l); });
  workers[0]->run(l);
  for (std::thread& t : helpers) t.join();
  if (g_counting) track_launch_end();
  if (l.after_predecessor && !l.waited && !l.failed) {  // its end would say nothing of what came before it
    l.failed = true;
    report(format("emulator: kernel %s is launched after_predecessor and calls no wait_predecessor", kernel));
  }
  std::lock_guard<std::mutex> lock(g_mutex);
  for (auto& w : workers) g_idle.push_back(std::move(w));
  return l.failed ? kLaunchFailure : 0;
}

int refuse(const char* kernel, dim3 grid, dim3 block, size_t smem, int error) {
  report(format(
      "emulator: launch of %s is over the limits: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory",
      kernel, grid.x, grid.y, grid.z, block.x, block.y, block.z, smem));
  return error;
}

// ---- faults ------------------------------------------------------------------------------------------------------------

std::string Worker::place(const Fiber& f) const {
  return format("kernel %s, block %s, thread %s", launch->kernel, text_of(index).c_str(), text_of(f.index).c_str());
}

const char* current_place() {
  static thread_local std::string text;
  Worker* w = t_worker;
  text = w && w->launch && w->current ? w->place(*w->current) : std::string();
  return text.c_str();
}

void fault(Where at, const char* f, ...) {
  char text[1024];
  va_list a;
  va_start(a, f);
  std::vsnprintf(text, sizeof text, f, a);
  va_end(a);
  Worker& w = *t_worker;
  w.launch->failed = true;
  report(std::string("emulator: ") + text + "\n  " + w.place(*w.current) +
         (at.file ? format(", at %s:%d", at.file, at.line) : ""));
  w.current->context.switch_to(w.cluster->main);
  std::abort();  // not reached: a failed launch wakes no fiber again
}

void Worker::report_deadlock() {
  launch->failed = true;
  const Fiber* first = nullptr;
  bool in_phase = false, in_warp_op = false;
  std::string who, phases;
  for (const Worker* w : cluster->blocks) {
    const std::string of = cluster->blocks.size() > 1 ? " of block " + text_of(w->index) : "";
    std::map<std::string, std::vector<uint32_t>> groups;
    for (int t = 0; t < threads; ++t) {
      const Fiber& f = w->fibers[t];
      if (f.state == State::kInWarpOp ? !in_warp_op : f.state == State::kAtBarrier && !first) first = &f;
      in_warp_op |= f.state == State::kInWarpOp;
      groups[f.state == State::kDone ? "have returned"
                                     : format("wait in %s at %s:%d", f.waits_in, f.at.file, f.at.line)]
          .push_back(static_cast<uint32_t>(t));
    }
    for (const auto& g : groups) who += "\n  threads " + thread_list(g.second) + of + " " + g.first;
    for (const BarrierState& b : w->mbarriers) {
      if (b.waiting.empty()) continue;
      in_phase = true;
      phases +=
          format("\n  mbarrier %td%s: in phase %u %u of %u have arrived, %lld bytes are to come",
                 &b - w->mbarriers.data(), of.c_str(), b.phase, b.arrived, b.expected, static_cast<long long>(b.bytes));
    }
  }
  std::string text = "emulator: deadlock: ";
  text += in_phase     ? "a phase of an mbarrier that is never over"
          : in_warp_op ? "a warp-wide call by an incomplete warp"
                       : "divergent barrier";
  report(text + "\n  " + first->block->place(*first) + format(", at %s:%d", first->at.file, first->at.line) + who +
         phases);
}

// ---- meeting points ------------------------------------------------------------------------------------------------------

bool skipped(Where at) {
  static const std::string skip = std::getenv("LRK_EMU_SKIP") ? std::getenv("LRK_EMU_SKIP") : "";
  static const int line = std::atoi(skip.substr(skip.find(':') + 1).c_str());
  return at.line == line && skip == format("%s:%d", at.file, at.line);
}

void barrier(int id, int count, Where at) {
  if (skipped(at)) return;
  Worker& w = *t_worker;
  Fiber& f = *w.current;
  if (id < 0 || id >= kBarriers || count < 0 || count % 32)
    fault(at, "barrier %d of %d threads does not exist", id, count);
  if (count == 0) count = w.threads;
  Barrier& b = w.barriers[id];
  const int warp = static_cast<int>(f.tid / 32);
  if (b.arrived == 0) {
    b.expected = count;
    b.at = at;
    b.first = f.tid;
  } else if (id == 0 && (b.at.line != at.line || std::strcmp(b.at.file, at.file))) {
    fault(at, "divergent barrier: thread %u waits in sync_threads at %s:%d", b.first, b.at.file, b.at.line);
  } else if (b.expected != count) {
    fault(at, "barrier %d is awaited by %d threads here and by %d at %s:%d", id, count, b.expected, b.at.file,
          b.at.line);
  }
  b.waiting[warp] |= 1u << f.tid % 32;
  if (++b.arrived < count) {
    f.state = State::kAtBarrier;
    f.waits_in = id == 0 ? "sync_threads" : "sync_named";
    f.at = at;
    w.go_on();
    return;
  }
  if (g_tracking) track_barrier(b.waiting);
  for (int i = 0; i < kMaxWarps; ++i) {
    if (!b.waiting[i]) continue;
    for (uint32_t lanes = b.waiting[i]; lanes; lanes &= lanes - 1)
      w.fibers[i * 32 + __builtin_ctz(lanes)].state = State::kRunning;
    w.make_ready(i, b.waiting[i]);
    b.waiting[i] = 0;
  }
  b.arrived = 0;
  w.go_on();  // the last to come is one of those made ready: all have the same chance to be next
}

void meet_warp(const char* name, void* arguments, WarpOp op, Where at) {
  Worker& w = *t_worker;
  Fiber& f = *w.current;
  const int index = static_cast<int>(f.tid / 32), lane = static_cast<int>(f.tid % 32);
  Warp& warp = w.warps[index];
  if (warp.arrived == 0) {
    warp.op = name;
    warp.at = at;
  } else if (warp.at.line != at.line || std::strcmp(warp.op, name) || std::strcmp(warp.at.file, at.file)) {
    fault(at, "divergent warp: this lane calls %s, lane %d waits in %s at %s:%d", name, __builtin_ctz(warp.arrived),
          warp.op, warp.at.file, warp.at.line);
  }
  warp.arguments[lane] = arguments;
  warp.arrived |= 1u << lane;
  if (warp.arrived != kAllLanes) {
    f.state = State::kInWarpOp;
    f.waits_in = name;
    f.at = at;
    w.go_on();
    return;
  }
  warp.arrived = 0;
  if (g_tracking) track_meeting(static_cast<uint32_t>(index));
  op(warp.arguments);
  for (int i = 0; i < 32; ++i) w.fibers[index * 32 + i].state = State::kRunning;
  if (w.random && (w.draw() & 1)) {
    w.make_ready(index, kAllLanes);
    w.go_on();
  } else {
    w.make_ready(index, kAllLanes & ~(1u << lane));
  }
}

// ---- shared memory -----------------------------------------------------------------------------------------------------
// The first thread that asks for a piece makes it; the others must ask for the same. Redzones are poisoned under ASan and
// hold a pattern otherwise, which is checked when the block ends.

void* shared_piece(SharedCursor* cursor, size_t bytes, size_t padded_bytes, Where at) {
  Worker& w = *t_worker;
  const uint32_t i = cursor->index++;
  cursor->bytes += padded_bytes;
  if (cursor->bytes > w.launch->smem)
    fault(at, "shared memory: %zu bytes taken, the launch has %zu", cursor->bytes, w.launch->smem);
  if (i >= kMaxPieces) fault(at, "shared memory: more than %d pieces", kMaxPieces);
  if (i < w.piece_count) {
    if (w.pieces[i].bytes != bytes)
      fault(at, "shared memory: piece %u has %zu bytes in another thread, %zu here", i, w.pieces[i].bytes, bytes);
    return w.pieces[i].data;
  }
  // As far from a multiple of kWindow as on the device, where pieces lie end to end: swizzles depend on it.
  unsigned char* red = w.arena + w.arena_used;
  const size_t offset = (cursor->bytes - padded_bytes) % kWindow;
  const size_t front = kRedzone + (offset + 2 * kWindow - (w.arena_used + kRedzone) % kWindow) % kWindow;
  const size_t rounded = (bytes + 127) / 128 * 128;
  Piece& piece = w.pieces[w.piece_count++];
  piece = {red + front, bytes};
  w.arena_used += front + rounded + kRedzone;
  if (w.arena_used > kArenaBytes) fault(at, "shared memory: the emulator's arena is full");
  std::memset(red, kRedByte, front);
  std::memset(piece.data, kFresh, bytes);
  std::memset(piece.data + bytes, kRedByte, rounded - bytes + kRedzone);
  ASAN_POISON_MEMORY_REGION(red, front);
  ASAN_POISON_MEMORY_REGION(piece.data + bytes, rounded - bytes + kRedzone);
  return piece.data;
}

const Piece* Worker::piece_at(const void* p) const {
  const auto* c = static_cast<const unsigned char*>(p);
  for (uint32_t i = 0; i < piece_count; ++i)
    if (c >= pieces[i].data - kRedzone && c < pieces[i].data + pieces[i].bytes + kRedzone) return &pieces[i];
  return nullptr;
}

void require_shared(const void* p, size_t bytes, size_t alignment, const char* what, Where at) {
  const auto* c = static_cast<const unsigned char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fault(at, "%s: shared address %p is not %zu-byte aligned", what, p, alignment);
  const Piece* piece = t_worker->piece_at(p);
  if (!piece) fault(at, "%s: %p is not shared memory of this block", what, p);
  if (c < piece->data || c + bytes > piece->data + piece->bytes)
    fault(at, "%s: out of bounds of shared piece %td (%zu bytes) at byte offset %td", what, piece - t_worker->pieces,
          piece->bytes, c - piece->data);
}

void Worker::check_redzones() {
#if !defined(__SANITIZE_ADDRESS__)
  for (uint32_t i = 0; i < piece_count; ++i) {
    const Piece& piece = pieces[i];
    const unsigned char* end = i + 1 < piece_count ? pieces[i + 1].data : arena + arena_used;
    for (const unsigned char* c = i ? piece.data + piece.bytes : arena; c < end; ++c) {
      if (c == piece.data) c += piece.bytes;
      if (c >= end || *c == kRedByte) continue;
      launch->failed = true;
      report(format(
          "emulator: out of bounds write to shared memory, at byte offset %td of piece %u (%zu bytes)\n  kernel %s, block %s",
          c - piece.data, i, piece.bytes, launch->kernel, text_of(index).c_str()));
      return;
    }
  }
#endif
}

}  // namespace lrk::emu

extern "C" int64_t lrk_emulator_get(const char* name) {
  const auto* s = lrk::emu::setting(name);
  return s ? s->load() : -1;
}
extern "C" int lrk_emulator_set(const char* name, int64_t value) {
  auto* s = lrk::emu::setting(name);
  if (s) s->store(value);
  return s ? 0 : -1;
}
extern "C" const char* lrk_emulator_report() {
  static thread_local std::string text;
  std::lock_guard<std::mutex> lock(lrk::emu::g_mutex);
  text = lrk::emu::g_report;
  return text.c_str();
}
extern "C" const char* lrk_emulator_launched() {
  static thread_local std::string text;
  std::lock_guard<std::mutex> lock(lrk::emu::g_mutex);
  text.clear();
  for (const std::string& line : lrk::emu::g_launched) text += line + "\n";
  lrk::emu::g_launched.clear();
  return text.c_str();
}
extern "C" void lrk_emulator_clear() {
  std::lock_guard<std::mutex> lock(lrk::emu::g_mutex);
  lrk::emu::g_report.clear();
}
