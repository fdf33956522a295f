// SPDX-License-Identifier: Apache-2.0
// The schedule: blocks of a cluster, fibers that take turns, and where all of a cluster meet.
#include "worker.h"

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace lrk::emu {

__thread Worker* t_worker = nullptr;

namespace {

// Every fiber lives here: it runs its thread of one block, then sleeps until the next block wakes it.
void fiber_main() {
  Worker& w = *t_worker;
  Context::arrived(w.current->context);
  for (;;) {
    w.launch->body(w.launch->context);
    w.finish_thread();
    w.current->state = State::kDone;
    ++w.done;
    --w.cluster->left;
    w.cluster->meet_if_all_have_come();
    w.go_on();
  }
}

}  // namespace

// A thread runs until it waits. The ascending and descending schedules stay in one warp as long as it can go on, so a warp
// runs as far ahead of the others as barriers let it, and a block ahead of its cluster; random ones also change blocks, warps
// and order of lanes at every stop.

Fiber* Worker::pick() {
  if (!ready_warps) return nullptr;
  int warp = current ? static_cast<int>(current->tid / 32) : descending ? 31 - __builtin_clz(ready_warps) : 0;
  if (!(ready_warps >> warp & 1) || (random && (draw() & 3) == 0)) {
    if (random) {
      const int turn = static_cast<int>(draw() >> 11 & 31);
      const uint32_t turned = ready_warps >> turn | (turn ? ready_warps << (32 - turn) : 0);
      warp = (__builtin_ctz(turned) + turn) & 31;
    } else {
      warp = descending ? 31 - __builtin_clz(ready_warps) : __builtin_ctz(ready_warps);
    }
  }
  uint32_t& ready = warps[warp].ready;
  int lane;
  if (random) {
    const int turn = static_cast<int>(draw() >> 7 & 31);
    lane = (__builtin_ctz(ready >> turn | (turn ? ready << (32 - turn) : 0)) + turn) & 31;
  } else {
    lane = descending ? 31 - __builtin_clz(ready) : __builtin_ctz(ready);
  }
  ready &= ~(1u << lane);
  if (!ready) ready_warps &= ~(1u << warp);
  return &fibers[warp * 32 + lane];
}

Fiber* Cluster::pick(int rank) {
  const int count = static_cast<int>(blocks.size());
  Worker& here = *blocks[static_cast<size_t>(rank)];
  if (count > 1 && here.random && (here.draw() & 3) == 0) rank = static_cast<int>(here.draw() % blocks.size());
  for (int i = 0; i < count; ++i)
    if (Fiber* f = blocks[static_cast<size_t>((rank + i) % count)]->pick()) return f;
  return nullptr;
}

bool Cluster::land_one(int rank) {
  for (size_t i = 0; i < blocks.size(); ++i)
    if (blocks[(static_cast<size_t>(rank) + i) % blocks.size()]->land_one()) return true;
  return false;
}

void Cluster::enter(Fiber& f) {
  t_worker = f.block;
  f.block->current = &f;
  blockIdx = f.block->index;
  threadIdx = f.index;
}

void Worker::go_on() {
  Fiber* from = current;
  if (random && (draw() & 7) == 0) cluster->land_one(rank);
  Fiber* to = cluster->pick(rank);
  while (!to && cluster->left && cluster->land_one(rank)) to = cluster->pick(rank);
  if (to == from) return;
  ++cluster->switches;
  if (!to) {
    if (cluster->left) report_deadlock();
    from->context.switch_to(cluster->main);  // run_blocks resumes; this fiber wakes in the next block
    return;
  }
  cluster->enter(*to);
  from->context.switch_to(to->context);
}

Worker::Worker() {
  void* p = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    std::perror("emulator: mmap of shared memory");
    std::abort();
  }
  arena = static_cast<unsigned char*>(p);
}
Worker::~Worker() {
  ASAN_UNPOISON_MEMORY_REGION(arena, kArenaBytes);
  munmap(arena, kArenaBytes);
}

void Worker::prepare(Launch& l, Cluster& c, int rank_there) {
  launch = &l;
  cluster = &c;
  rank = rank_there;
  threads = static_cast<int>(l.block.x * l.block.y * l.block.z);
  for (int t = 0; t < threads; ++t) {
    const uint32_t u = static_cast<uint32_t>(t);
    fibers[t].block = this;
    fibers[t].tid = u;
    fibers[t].id = static_cast<uint32_t>(rank) * ids() + u;
    fibers[t].index = {u % l.block.x, u / l.block.x % l.block.y, u / l.block.x / l.block.y};
  }
  random = l.schedule > 1;
  descending = l.schedule == 1;
  copy_early = descending;
}

void Worker::start_block(uint64_t number) {
  rng = (static_cast<uint64_t>(launch->schedule) + 1) * 0x9E3779B97F4A7C15u ^ (number + 1) * 0xD1B54A32D192ED03u;
  done = 0;
  ready_warps = 0;
  for (int b = 0; b < kBarriers; ++b) barriers[b] = Barrier{};
  ASAN_UNPOISON_MEMORY_REGION(arena, arena_used);
  arena_used = 0;
  piece_count = 0;
  start_hopper();
  for (int w = 0; w * 32 < threads; ++w) {
    const int lanes = std::min(32, threads - w * 32);
    warps[w].exist = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
    warps[w].arrived = warps[w].ready = 0;
    make_ready(w, warps[w].exist);
  }
  for (int t = 0; t < threads; ++t) {
    fibers[t].state = State::kRunning;
    fibers[t].copies.clear();
    fibers[t].copy_group = fibers[t].bulk_group = 0;
    if (t >= started) fibers[t].context.start(stacks.low(t), Stacks::kSize, Stacks::color(t), fiber_main);
  }
  started = std::max(started, threads);
  current = nullptr;
}

void Cluster::run_blocks(uint64_t number) {
  const Launch& l = *blocks[0]->launch;
  const auto size = static_cast<uint64_t>(l.cluster), across = l.grid.x / size;
  left = 0;
  engines = 0;
  waiting.clear();
  for (Worker* w : blocks) {
    const auto rank = static_cast<uint64_t>(w->rank);
    w->index = {static_cast<uint32_t>(number % across * size + rank), static_cast<uint32_t>(number / across % l.grid.y),
                static_cast<uint32_t>(number / across / l.grid.y)};
    w->start_block(number * size + rank);
    left += w->threads;
  }
  if (g_tracking) track_block_start(*this);
  Fiber* first = pick(blocks[0]->descending ? l.cluster - 1 : 0);
  enter(*first);
  main.switch_to(first->context);
  for (Worker* w : blocks) {
    if (!l.failed) w->finish_block();
    if (!l.failed) w->check_redzones();
  }
}

void Cluster::run(Launch& l) {
  Worker* outer = t_worker;
  main.mark_native();
  const auto size = static_cast<size_t>(l.cluster);
  while (pool.size() < size) pool.push_back(std::make_unique<Worker>());
  blocks.clear();
  for (size_t i = 0; i < size; ++i) {
    blocks.push_back(pool[i].get());
    blocks[i]->prepare(l, *this, static_cast<int>(i));
  }
  blockDim = l.block;
  gridDim = l.grid;
  switches = 0;
  int64_t ran = 0;
  const uint64_t count = l.chosen.empty() ? l.clusters : l.chosen.size();
  for (uint64_t i; !l.failed && (i = l.next.fetch_add(1)) < count; ran += l.cluster) {
    const auto number = static_cast<unsigned __int128>(i) * l.factor + l.offset;
    run_blocks(l.chosen.empty() ? static_cast<uint64_t>(number % l.clusters) : l.chosen[i]);
  }
  for (Worker* w : blocks) {
    if (l.failed) w->started = 0;  // fibers were left in the middle of a kernel
    ASAN_UNPOISON_MEMORY_REGION(w->arena, kArenaBytes);
    w->launch = nullptr;
    w->current = nullptr;
  }
  g_settings.switches += switches;
  g_settings.blocks += ran;
  t_worker = outer;
}

// ---- what a cluster's blocks have in common ----------------------------------------------------------------------------

int cluster_rank() { return t_worker->rank; }

void sync_cluster(Where at) {
  if (skipped(at)) return;
  Worker& w = *t_worker;
  Fiber& f = *w.current;
  w.cluster->waiting.push_back(&f);
  f.state = State::kAtBarrier;
  f.waits_in = "sync_cluster";
  f.at = at;
  w.cluster->meet_if_all_have_come();
  w.go_on();
}
// Those who have returned are not waited for, and tell nothing of what they did.
void Cluster::meet_if_all_have_come() {
  if (waiting.empty() || static_cast<int>(waiting.size()) < left) return;
  if (g_tracking) track_sync_cluster(waiting);
  for (Fiber* f : waiting) f->block->wake(*f);
  waiting.clear();
}

void wait_predecessor(Where at) {
  if (skipped(at)) return;
  t_worker->launch->waited = true;
  if (g_tracking) track_wait_predecessor();
}

}  // namespace lrk::emu
