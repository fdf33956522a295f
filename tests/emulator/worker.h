// SPDX-License-Identifier: Apache-2.0
// The emulator's inner state: one Cluster per host thread runs the blocks of one cluster at a time, a Worker each. Shared by
// emulator.cpp, cluster.cpp, warp_ops.cpp, hopper.cpp and those who follow accesses only.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "hopper.h"

namespace lrk::emu {

constexpr int kMaxFibers = 1024, kMaxWarps = kMaxFibers / 32, kMaxPieces = 64, kBarriers = 16;
constexpr uint32_t kAllLanes = 0xffffffffu;

using Known = std::shared_ptr<const std::vector<uint32_t>>;  // by thread and engine: the last epoch that is over

struct Settings {
  std::atomic<int64_t> schedule{0}, threads{1}, max_shared{227 * 1024}, arch{80};
  std::atomic<int64_t> multiprocessors{4};  // few, so that small problems keep blocks busy for more than one tile
  std::atomic<int64_t> switches{0}, blocks{0}, launches{0};
};
extern Settings g_settings;
bool skipped(Where at);  // whether LRK_EMU_SKIP names this barrier or wait

struct PendingCopy {
  void* to;
  int group;
  alignas(16) unsigned char data[16];
};

enum class State : uint8_t { kRunning, kAtBarrier, kInWarpOp, kDone };

struct Cluster;
struct Worker;

struct Fiber {
  Context context;
  Worker* block;
  uint32_t tid, id;  // in its block; in its cluster, where engines follow all threads
  uint3 index;
  State state;
  uint8_t barrier;       // where state is kAtBarrier
  const char* waits_in;  // name of the call it waits in
  Where at;
  std::vector<PendingCopy> copies;  // cp.async that have not landed
  int copy_group;
  int bulk_group;  // of its bulk stores, the one not committed yet
};

struct Warp {
  uint32_t exist, ready;  // lanes
  uint32_t arrived;       // lanes waiting in the pending warp-wide call
  const char* op;
  Where at;
  void* arguments[32];
};

struct Barrier {
  int arrived, expected;
  Where at;
  uint32_t first, waiting[kMaxWarps];  // thread that came first; lanes that wait
};

struct BarrierState {  // of an Mbarrier
  Mbarrier* at;
  uint32_t expected, arrived, phase;
  int64_t bytes;  // expected less landed, of this phase
  uint32_t maker;
  bool fenced;           // since its making, by its maker
  uint32_t engine;       // what lands on it
  Known arriving, over;  // known to those who have arrived in this phase, and in all before
  std::vector<Fiber*> waiting;
};
struct Span {
  const void* p;
  size_t bytes;
};
struct BulkCopy {  // a box under way
  TensorMap map;
  BoxAt box;
  Worker* block;  // whose shared memory it is
  unsigned char* smem;
  uint32_t tid, engine, epoch;
  int barrier, group;               // a load's, a store's
  bool again;                       // another block of the cluster has it from the same load
  std::vector<unsigned char> read;  // what a store has read so far: nothing, or all
};
struct Product {  // a wgmma under way, of a warp
  WgmmaCall lanes[32];
  int group;
};
struct Products {
  std::vector<Product> under_way;
  int group;
  bool fenced;                      // since the last wait
  uint32_t engine, epoch;           // the last product's
  std::vector<uint32_t> committed;  // by group: the last epoch
};

struct Piece {
  unsigned char* data;
  size_t bytes;
};

struct Launch {
  const char* kernel;
  const void* function;
  dim3 grid, block;
  size_t smem;
  Body body;
  void* context;
  int64_t schedule;
  int cluster;
  bool after_predecessor;
  uint64_t clusters, factor, offset;  // their order: i -> (i * factor + offset) mod clusters
  std::vector<uint64_t> chosen;       // these alone, where there are any
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false}, waited{false};  // waited: wait_predecessor was called
};

struct Worker {  // of a block
  Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  int rank = 0;      // in its cluster
  uint3 index = {};  // in its grid
  Stacks stacks{kMaxFibers};
  Fiber fibers[kMaxFibers];
  int started = 0;  // fibers whose stack holds a live fiber_main
  int threads = 0, done = 0;
  Fiber* current = nullptr;
  Warp warps[kMaxWarps];
  uint32_t ready_warps = 0;
  Barrier barriers[kBarriers];
  std::vector<BarrierState> mbarriers;
  std::vector<BulkCopy> loads, stores;
  Products products[kMaxWarps];
  std::vector<std::pair<uint32_t, uint32_t>> sent;  // by other blocks: thread or engine, its epoch
  Known leaving;                                    // to its threads that have returned
  int free_registers = 0, registers[kMaxWarps];
  std::vector<Fiber*> want_registers;

  unsigned char* arena = nullptr;
  size_t arena_used = 0;
  Piece pieces[kMaxPieces];
  uint32_t piece_count = 0;

  bool descending = false, random = false, copy_early = false;
  uint64_t rng = 1;

  Worker();
  ~Worker();
  void prepare(Launch& l, Cluster& c, int rank_there);
  void start_block(uint64_t number);
  void check_redzones();
  uint32_t ids() const { return static_cast<uint32_t>((threads + 31) / 32 * 32); }  // of its threads

  uint64_t draw() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
  }
  void make_ready(int warp, uint32_t lanes) {
    warps[warp].ready |= lanes;
    ready_warps |= 1u << warp;
  }
  Fiber* pick();
  const Piece* piece_at(const void* p) const;  // the piece p lies in or in whose redzones, or null
  void go_on();                                // the current fiber waits: hand over to another, or report a deadlock
  std::string place(const Fiber& f) const;
  void report_deadlock();
  void wake(Fiber& f) {
    f.state = State::kRunning;
    make_ready(static_cast<int>(f.tid / 32), 1u << f.tid % 32);
  }
  bool acts_now() { return copy_early || (random && (draw() & 1)); }  // the hardware, or later

  // hopper.cpp
  void start_hopper();   // of a block
  bool land_one();       // the hardware does something that is due
  void finish_thread();  // the current one has returned
  void finish_block();
};

// Blocks that run together on one host thread.
struct Cluster {
  std::vector<std::unique_ptr<Worker>> pool;
  std::vector<Worker*> blocks;  // the first of the pool, by rank
  Context main;
  int left = 0;                 // threads that have not returned
  uint32_t engines = 0;         // numbered after the threads
  std::vector<Fiber*> waiting;  // in sync_cluster
  int64_t switches = 0;

  void run(Launch& l);
  Fiber* pick(int rank);         // of this block as long as it can go on
  void enter(Fiber& f);          // which runs from now on
  bool land_one(int rank);       // nobody can go on: what is due there, or else in another block
  void meet_if_all_have_come();  // in sync_cluster
  uint32_t ids() const { return static_cast<uint32_t>(blocks.size()) * blocks[0]->ids(); }
  uint32_t new_engine() { return ids() + engines++; }

 private:
  void run_blocks(uint64_t number);
};

extern __thread Worker* t_worker;

// Who follows accesses: track.cpp checks them, traffic.cpp in its place counts them.
extern bool g_tracking;        // kernels were compiled with hooks on their loads and stores
extern const bool g_counting;  // no value is wanted: products are skipped, and some blocks stand for all
std::vector<uint64_t> track_launch(const Launch& l);  // the clusters to run, in this order; none for all
void track_launch_end();
void track_block_start(Cluster& c);
void track_barrier(const uint32_t* lanes_per_warp);
void track_sync_cluster(const std::vector<Fiber*>& met);
void track_wait_predecessor();
void track_sync_warp(uint32_t warp);
void track_meeting(uint32_t warp);  // its lanes have met in any warp-wide call
void track_product(uint32_t warp);  // one lane's part of an mma
void track_plain(const void* p, size_t bytes, bool write, bool aligned, const void* pc);  // hooks.cpp calls it
enum class Access { kRead, kWrite, kAtomic };
void track_access(const void* p, size_t bytes, Access access, const void* pc);  // pc: return address into the kernel
void track_copy_issued(void* to, const void* pc);
void track_copy_wait(size_t bytes);  // so many that this thread has under way, before a wait
void track_copy_landed(void* to);
// Meetings of single threads: what the current one knows goes into a Known, or comes out of it.
uint32_t track_release(Known* to);  // its epoch until then
void track_acquire(const Known& from);
bool track_covers(const Known& k, uint32_t id, uint32_t epoch);
// What an engine does: begun by the current thread (or for it), whose knowledge must cover what was done there before;
// over once somebody learns of the epoch. Bytes written are in flight until they land.
uint32_t track_engine_begin(uint32_t engine);  // an epoch
void track_engine_over(Known* to, uint32_t engine, uint32_t epoch);
void track_engine_access(uint32_t engine, uint32_t epoch, const void* p, size_t bytes, Access access, const void* pc);
void track_engine_access_for(uint32_t id, uint32_t engine, uint32_t epoch, const void* p, size_t bytes, Access access,
                             const void* pc);
bool track_knows_alike(uint32_t id, uint32_t other);
void track_engine_landed(const void* p, size_t bytes);
void track_fence_async();
int64_t bytes_of(const TensorBox& t);
void track_box(const BulkCopy& c, const std::vector<Span>& rows, Access access,
               const void* pc);             // global memory's part
void track_wgmma(int n, bool a_in_shared);  // of a warp

constexpr size_t kRedzone = 256, kWindow = 1024, kArenaBytes = 512 * 1024;
constexpr unsigned char kFresh = 0xff;  // NaN in every float format, -1 in every integer
constexpr unsigned char kRedByte = 0xa5;

}  // namespace lrk::emu
