// SPDX-License-Identifier: Apache-2.0
// What a kernel asks of memory, counted from its own loads and stores: the answers to worker.h's track_* calls in the place
// of track.cpp. Counts only, no time; tools/roofline.py makes a time of them.
//
// Lanes of a warp run one after the other, so each lane's accesses are kept until its warp meets or its block does, and what
// the lanes did at one place in their n-th passage there is one request. A request of global memory is 32-byte sectors of
// 128-byte lines; one of shared memory takes a wavefront for every word that a bank has to give beyond its first.
//
// A large grid is sampled: its first two waves of blocks and its last one, where a wave is what the chip holds at once. The
// second stands for all between, by what single clusters of theirs, run beforehand, ask beside its own. The blocks of a wave then
// pass through the caches in step, a request of each warp at a time: an L1 for each SM, and the chip's L2 for all.
//
// A box that is copied is one request, which goes past L1; one for several blocks of a cluster is asked for once. What it brings
// into shared memory, and what wgmma reads there, is counted in bytes.
#include "traffic.h"

#include <link.h>
#include <pthread.h>

#include <unordered_map>

#include "cache.h"

namespace lrk::emu {

bool g_tracking = false;
const bool g_counting = true;

namespace {

constexpr int kStep = 4;  // requests of a warp that pass while a line is on its way: who asks meanwhile waits as long

// ---- what is counted

constexpr const char* kScratch = "scratch";  // memory that nobody declared: results and workspace

struct Hit {    // one lane's access
  uint64_t at;  // address; of shared memory the offset in its arena
  int32_t pc;   // distance from track_access
  uint16_t bytes;
  uint8_t piece;  // of 16 bytes, of a wider access
  bool write, shared, async;
  uint32_t place() const { return static_cast<uint32_t>(pc) << 2 ^ piece; }
};

struct Touch {  // one line of one request, on its way to the caches
  uint64_t line;
  uint32_t step;
  uint16_t operand, site;
  uint8_t mask;
  bool write, past_l1, last;  // last: of its request
};

struct Block {
  std::vector<Touch> touches;
  double requests = 0, multiplied = 0;
};

struct Wave {  // of clusters
  uint64_t first, count;
  double weight;  // waves that it stands for
};

struct Chip {
  int64_t sms = 132, l1 = 256 << 10, l2 = 50 << 20;
  int64_t (*resident)(int64_t function, int64_t threads, int64_t smem) = nullptr;
} g_chip;

std::vector<Operand> g_operands{{kScratch, 0, 0}};
std::vector<Record> g_records;
Cache g_l2;
std::vector<Cache> g_l1;

// Of the launch at hand.
std::vector<Wave> g_waves;
size_t g_wave;
std::vector<uint64_t> g_probes;   // clusters still to be run for the number of their requests alone, the last one first
double g_asked[2];                // requests of probes in the second wave, and in those that it stands for
std::vector<Block> g_blocks;      // of the wave so far
size_t g_begun, g_size, g_warps;  // the first of the cluster at hand, its blocks, warps of each
std::vector<std::vector<Hit>> g_hits;   // by thread of the cluster
std::vector<uint32_t> g_step;           // by warp of the cluster
std::map<int32_t, uint16_t> g_site_of;  // pc -> index
std::vector<Site*> g_sites;
std::vector<std::vector<uint32_t>> g_of_warp;  // requests of a cluster, by site
std::unordered_map<uint64_t, uint8_t> g_seen;  // sectors of lines
uint64_t g_wave_clock = 0;
const unsigned char *g_stack_low, *g_stack_high, *g_image_low, *g_image_high;

void find_image() {
  const auto look = [](dl_phdr_info* info, size_t, void*) {
    const uintptr_t me = reinterpret_cast<uintptr_t>(&track_access);
    uintptr_t low = ~uintptr_t{0}, high = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i)
      if (info->dlpi_phdr[i].p_type == PT_LOAD) {
        low = std::min(low, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
        high = std::max(high, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
      }
    if (me < low || me >= high) return 0;
    g_image_low = reinterpret_cast<const unsigned char*>(low);
    g_image_high = reinterpret_cast<const unsigned char*>(high);
    return 1;
  };
  dl_iterate_phdr(look, nullptr);
}

void find_stack() {  // of the thread that launches: a kernel's parameters lie there
  pthread_attr_t attributes;
  void* low;
  size_t bytes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &bytes);
  pthread_attr_destroy(&attributes);
  g_stack_low = static_cast<const unsigned char*>(low);
  g_stack_high = g_stack_low + bytes;
}

template <class... Vectors>
bool among(const unsigned char* c, const Vectors&... all) {
  const auto in = [c](const auto& v) {
    const auto* first = reinterpret_cast<const unsigned char*>(&v);
    return c >= first && c < first + sizeof v;
  };
  return (in(all) || ...);
}
bool is_index(const unsigned char* c) { return among(c, threadIdx, blockIdx, blockDim, gridDim); }

constexpr uint64_t kProbes = 32;

double weight() { return g_probes.empty() ? g_waves[g_wave].weight : 0; }

Block& block_of(uint32_t warp) { return g_blocks[g_begun + warp / g_warps]; }

uint16_t site_at(int32_t pc, const Site& as) {
  const auto [it, fresh] = g_site_of.try_emplace(pc, static_cast<uint16_t>(g_sites.size()));
  if (fresh) {
    Site& site = g_records.back().sites[pc];
    site = as;
    g_sites.push_back(&site);
    g_of_warp.emplace_back(g_size * g_warps);
  }
  return it->second;
}
uint16_t site_of(const Hit& h) {
  return site_at(h.pc, {.shared = h.shared, .write = h.write, .async = h.async, .bytes = h.bytes});
}

// A device's allocations start a line: each operand gets a range of addresses of its own, in the upper half.
constexpr uint64_t kOnDevice = uint64_t{1} << 63;
constexpr int kRange = 44;
uint64_t on_device(uint64_t at) {
  for (size_t i = 1; i < g_operands.size(); ++i)
    if (at - g_operands[i].base < g_operands[i].bytes) return kOnDevice | i << kRange | (at - g_operands[i].base);
  return at;
}
uint16_t operand_of(uint64_t at) {
  return at & kOnDevice ? static_cast<uint16_t>((at & ~kOnDevice) >> kRange) : uint16_t{0};
}

// ---- requests

struct LaneHit {
  Hit hit;
  int lane;
};

// 16 bytes a lane go eight lanes at a time, 8 bytes sixteen, less all at once. Lanes that read one word share it.
void count_shared(Site& site, const std::vector<LaneHit>& hits) {
  const int together = hits[0].hit.bytes >= 16 ? 8 : hits[0].hit.bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += together) {
    uint64_t words[128];
    size_t count = 0;
    for (const LaneHit& h : hits)
      if (h.lane >= first && h.lane < first + together)
        for (uint64_t word = h.hit.at / 4; word <= (h.hit.at + h.hit.bytes - 1) / 4; ++word) words[count++] = word;
    if (!count) continue;
    std::sort(words, words + count);
    count = static_cast<size_t>(std::unique(words, words + count) - words);
    int of_bank[32] = {}, most = 0;
    for (size_t i = 0; i < count; ++i) most = std::max(most, ++of_bank[words[i] % 32]);
    site.wavefronts += weight() * most;
    site.ideal += weight() * static_cast<double>((count + 31) / 32);
  }
}

// A request that asks for these sectors, in their order.
void ask(uint16_t index, uint64_t at, const uint64_t* sectors, size_t count, double used, uint32_t warp, bool past_l1) {
  Site& site = *g_sites[index];
  const uint16_t operand = operand_of(at);
  Block& block = block_of(warp);
  const uint32_t step = g_step[warp]++;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t line = sectors[i] / (kLine / kSector);
    const auto bit = static_cast<uint8_t>(1u << sectors[i] % (kLine / kSector));
    if (i && block.touches.back().line == line) {
      block.touches.back().mask |= bit;
    } else {
      block.touches.push_back({line, step, operand, index, bit, site.write, past_l1, false});
      site.lines += weight();
    }
  }
  if (count) block.touches.back().last = true;
  site.sectors += weight() * static_cast<double>(count);
  site.used += weight() * used;
  Operand& o = g_records.back().operands[operand];
  o.requests += weight();
  o.sectors += weight() * static_cast<double>(count);
  o.used += weight() * used;
}

void count_global(uint16_t index, const std::vector<LaneHit>& hits, uint32_t warp) {
  uint64_t sectors[64], starts[32];
  size_t count = 0, lanes = 0;
  for (const LaneHit& h : hits) {
    starts[lanes++] = h.hit.at;
    for (uint64_t s = h.hit.at / kSector; s <= (h.hit.at + h.hit.bytes - 1) / kSector; ++s) sectors[count++] = s;
  }
  std::sort(sectors, sectors + count);
  count = static_cast<size_t>(std::unique(sectors, sectors + count) - sectors);
  std::sort(starts, starts + lanes);
  const auto distinct = static_cast<size_t>(std::unique(starts, starts + lanes) - starts);
  ask(index, hits[0].hit.at, sectors, count, static_cast<double>(distinct * hits[0].hit.bytes), warp, false);
}

Site& one_more(uint16_t index, uint32_t warp) {
  g_sites[index]->requests += weight();
  ++g_of_warp[index][warp];
  block_of(warp).requests += 1;
  return *g_sites[index];
}
void count_request(const std::vector<LaneHit>& hits, uint32_t warp, bool whole) {
  const uint16_t index = site_of(hits[0].hit);
  Site& site = one_more(index, warp);
  site.lanes += weight() * static_cast<double>(hits.size());
  if (!whole) site.split += weight();
  if (hits[0].hit.shared) {
    count_shared(site, hits);
  } else {
    count_global(index, hits, warp);
  }
}

// What one place reads or writes of shared memory in passages that follow one another, side by side in an aligned 16 bytes,
// is one access, as nvcc makes one of a loop that it unrolls.
void merge(std::vector<Hit>& hits) {
  size_t kept = 0;
  for (const Hit& h : hits) {
    Hit* last = kept ? &hits[kept - 1] : nullptr;
    if (last && h.shared && last->shared && h.pc == last->pc && h.at == last->at + last->bytes &&
        h.at / 16 == last->at / 16) {
      last->bytes = static_cast<uint16_t>(last->bytes + h.bytes);
    } else {
      hits[kept++] = h;
    }
  }
  hits.resize(kept);
}

void flush(uint32_t warp) {
  std::vector<Hit>* lanes = g_hits.data() + warp * 32;
  for (int i = 0; i < 32; ++i) merge(lanes[i]);
  const size_t length = lanes[0].size();
  bool alike = length > 0;
  for (int i = 1; i < 32 && alike; ++i) {
    alike = lanes[i].size() == length;
    for (size_t n = 0; n < length && alike; ++n) alike = lanes[i][n].place() == lanes[0][n].place();
  }
  std::vector<LaneHit> hits;
  if (alike) {
    for (size_t n = 0; n < length; ++n) {
      hits.clear();
      for (int i = 0; i < 32; ++i) hits.push_back({lanes[i][n], i});
      count_request(hits, warp, true);
    }
  } else {  // lanes went different ways: their n-th passages of a place go together
    std::map<std::pair<uint32_t, uint32_t>, size_t> known;  // (place, passage) -> group
    std::vector<std::vector<LaneHit>> groups;
    for (int i = 0; i < 32; ++i) {
      std::unordered_map<uint32_t, uint32_t> passages;
      for (const Hit& h : lanes[i]) {
        const auto [it, fresh] = known.try_emplace({h.place(), passages[h.place()]++}, groups.size());
        if (fresh) groups.emplace_back();
        groups[it->second].push_back({h, i});
      }
    }
    for (const auto& group : groups) count_request(group, warp, group.size() == 32);
  }
  for (int i = 0; i < 32; ++i) lanes[i].clear();
}

// ---- a wave through the caches

void pass(Record& r, const Touch& t, uint64_t sm, Level& furthest) {
  const double scale = weight() * static_cast<double>(kSector);
  const uint64_t now = g_wave_clock + t.step / kStep;
  Operand& operand = r.operands[t.operand];
  uint8_t& seen = g_seen[2 * t.line + t.write];
  operand.unique += static_cast<double>(kSector) * sectors_in(t.mask & static_cast<uint8_t>(~seen));
  seen |= t.mask;
  uint8_t asked = t.mask;
  if (t.write && !t.past_l1) g_l1[sm].find(t.line);
  if (!t.write && !t.past_l1) {
    Cache::Way* near = g_l1[sm].take(t.line);
    if (near->filled == now + 1 && near->valid & asked) furthest = std::max(furthest, kL2);  // on its way
    asked &= static_cast<uint8_t>(~near->valid);
    near->valid |= t.mask;
    if (!asked) return;
    near->filled = now + 1;
  }
  r.l2 += scale * sectors_in(asked);
  operand.l2 += scale * sectors_in(asked);
  Cache::Way* far = g_l2.take(t.line);
  uint8_t beyond;
  if (t.write) {
    beyond = asked & static_cast<uint8_t>(~far->dirty);  // goes to memory once, when it leaves
    far->dirty |= asked;
    far->valid |= asked;
    r.written += scale * sectors_in(beyond);
  } else {
    beyond = asked & static_cast<uint8_t>(~far->valid);
    furthest = std::max(furthest, beyond || far->filled == now + 1 ? kDram : kL2);
    if (beyond) far->filled = now + 1;
    far->valid |= asked;
  }
  r.dram += scale * sectors_in(beyond);
  operand.dram += scale * sectors_in(beyond);
}

void end_wave() {
  Record& r = g_records.back();
  uint32_t steps = 0;
  for (const Block& b : g_blocks) {
    r.per_block.push_back({weight(), b.requests, b.multiplied});
    for (const Touch& t : b.touches) steps = std::max(steps, t.step + 1);
  }
  for (Block& b : g_blocks)  // warps of a block ran one after the other
    std::stable_sort(b.touches.begin(), b.touches.end(),
                     [](const Touch& x, const Touch& y) { return x.step < y.step; });
  for (Cache& c : g_l1) std::fill(c.ways.begin(), c.ways.end(), Cache::Way{});
  std::vector<size_t> next(g_blocks.size(), 0);
  for (uint32_t step = 0; step < steps; ++step)
    for (size_t i = 0; i < g_blocks.size(); ++i) {
      const std::vector<Touch>& touches = g_blocks[i].touches;
      Level furthest = kL1;
      for (size_t& n = next[i]; n < touches.size() && touches[n].step == step; ++n) {
        const Touch& t = touches[n];
        pass(r, t, i % static_cast<uint64_t>(g_chip.sms), furthest);
        if (!t.last) continue;
        if (!t.write) g_sites[t.site]->from[furthest] += weight();
        furthest = kL1;
      }
    }
  g_wave_clock += steps / kStep + 2;
  g_blocks.clear();
}

void end_cluster() {
  if (g_blocks.empty()) return;
  for (uint32_t warp = 0; warp < g_size * g_warps; ++warp) flush(warp);
  if (!g_probes.empty()) {
    for (const Block& b : g_blocks) g_asked[g_probes.back() >= g_waves[1].first + g_waves[1].count] += b.requests;
    g_probes.pop_back();
    if (g_probes.empty() && g_asked[0] > 0) g_waves[1].weight = 1 + (g_waves[1].weight - 1) * g_asked[1] / g_asked[0];
    g_blocks.clear();
    for (auto& of : g_of_warp) std::fill(of.begin(), of.end(), 0u);
    return;
  }
  for (size_t i = 0; i < g_sites.size(); ++i) {
    std::vector<uint32_t>& of = g_of_warp[i];
    for (auto w = of.begin(); w != of.end(); w += static_cast<ptrdiff_t>(g_warps))
      g_sites[i]->longest += weight() * *std::max_element(w, w + static_cast<ptrdiff_t>(g_warps));
    std::fill(of.begin(), of.end(), 0u);
  }
  if (g_blocks.size() == g_size * g_waves[g_wave].count) {
    end_wave();
    ++g_wave;
  }
}

void add(const void* p, size_t bytes, bool write, bool async, const void* pc) {
  Worker* w = t_worker;
  if (!w || !w->current || bytes == 0) return;
  const auto* c = static_cast<const unsigned char*>(p);
  const bool shared = c >= w->arena && c < w->arena + kArenaBytes;
  // A thread's own variables and its index are registers, parameters and constants come from a cache of their own.
  if (!shared && (is_index(c) || w->stacks.hold(c) || (c >= g_stack_low && c < g_stack_high) ||
                  (c >= g_image_low && c < g_image_high)))
    return;
  const uint64_t at = shared ? static_cast<uint64_t>(c - w->arena) : on_device(reinterpret_cast<uint64_t>(c));
  const auto place = static_cast<int32_t>(static_cast<const char*>(pc) - anchor());
  std::vector<Hit>& hits = g_hits[w->current->id];
  for (size_t done = 0; done < bytes; done += 16)
    hits.push_back({at + done, place, static_cast<uint16_t>(std::min<size_t>(16, bytes - done)),
                    static_cast<uint8_t>(done / 16), write, shared, async});
}

}  // namespace

std::vector<uint64_t> track_launch(const Launch& l) {
  if (!g_image_low) find_image();
  find_stack();
  Record r{l.kernel, offset_of(l.function), l.grid, l.block, l.smem, 1, l.clusters * static_cast<uint64_t>(l.cluster),
           0};
  const int64_t threads = int64_t{l.block.x} * l.block.y * l.block.z;
  if (g_chip.resident)
    r.resident = std::max<int64_t>(1, g_chip.resident(r.function, threads, static_cast<int64_t>(l.smem)));
  r.operands = g_operands;
  g_size = static_cast<size_t>(l.cluster);
  g_warps = static_cast<size_t>((threads + 31) / 32);
  g_hits.resize(g_size * g_warps * 32);
  g_step.resize(g_size * g_warps);
  const uint64_t slots = std::max<uint64_t>(1, static_cast<uint64_t>(g_chip.sms * r.resident) / g_size);
  const uint64_t waves = (l.clusters + slots - 1) / slots;
  g_waves.clear();
  const auto wave = [&](uint64_t i, double stands_for) {
    const uint64_t first = i * slots;
    g_waves.push_back({first, std::min(slots, l.clusters - first), stands_for});
  };
  wave(0, 1);
  if (waves > 2) wave(1, static_cast<double>(waves - 2));
  if (waves > 1) wave(waves - 1, 1);
  g_wave = 0;
  g_site_of.clear();
  g_sites.clear();
  g_of_warp.clear();
  g_seen.clear();
  if (g_l2.ways.empty()) g_l2.resize(static_cast<uint64_t>(g_chip.l2));
  g_l1.resize(static_cast<size_t>(g_chip.sms));
  for (Cache& c : g_l1)
    c.resize(
        static_cast<uint64_t>(std::max<int64_t>(g_chip.l1 - r.resident * static_cast<int64_t>(l.smem + 1024), 4096)));
  std::vector<uint64_t> chosen;
  g_probes.clear();
  g_asked[0] = g_asked[1] = 0;
  if (waves > 3) {  // an equal number of either kind
    const auto spread = [&](uint64_t first, uint64_t count) {
      for (uint64_t i = 0; i < kProbes; ++i) chosen.push_back(first + (2 * i + 1) * count / (2 * kProbes));
    };
    spread(slots, slots);
    spread(2 * slots, (waves - 3) * slots);
    g_probes.assign(chosen.rbegin(), chosen.rend());
  }
  for (const Wave& w : g_waves)
    for (uint64_t i = 0; i < w.count; ++i) chosen.push_back(w.first + i);
  r.run = chosen.size() * g_size;
  g_records.push_back(std::move(r));
  return chosen;
}
void track_launch_end() { end_cluster(); }

void track_block_start(Cluster&) {
  end_cluster();
  g_begun = g_blocks.size();
  g_blocks.resize(g_begun + g_size);
  std::fill(g_step.begin(), g_step.end(), 0u);
}
namespace {
uint32_t warp_here(uint32_t warp) { return t_worker->fibers[0].id / 32 + warp; }  // of the cluster
void in_step(const std::vector<uint32_t>& warps) {
  uint32_t last = 0;
  for (const uint32_t w : warps) {
    flush(w);
    last = std::max(last, g_step[w]);
  }
  for (const uint32_t w : warps) g_step[w] = last;
}
}  // namespace
void track_barrier(const uint32_t* lanes_per_warp) {
  g_records.back().barriers += weight();
  std::vector<uint32_t> warps;
  for (uint32_t w = 0; w < kMaxWarps; ++w)
    if (lanes_per_warp[w]) warps.push_back(warp_here(w));
  in_step(warps);
}
void track_sync_cluster(const std::vector<Fiber*>& met) {
  std::vector<uint32_t> warps;
  for (const Fiber* f : met)
    if (f->tid % 32 == 0) warps.push_back(f->id / 32);
  in_step(warps);
}
void track_meeting(uint32_t warp) { flush(warp_here(warp)); }

// It comes after all that its block has asked for so far: a ring holds copies and their users together.
void track_box(const BulkCopy& c, const std::vector<Span>& rows, Access access, const void* pc) {
  const uint32_t warp = t_worker->current->id / 32,
                 first = warp / static_cast<uint32_t>(g_warps) * static_cast<uint32_t>(g_warps);
  g_step[warp] = *std::max_element(g_step.begin() + first, g_step.begin() + first + static_cast<ptrdiff_t>(g_warps));
  Record& r = g_records.back();
  (access == Access::kWrite ? r.stored : r.landed) += weight() * static_cast<double>(bytes_of(c.map.box));
  if (access == Access::kRead && c.again) return;
  const auto place = static_cast<int32_t>(static_cast<const char*>(pc) - anchor());
  const uint16_t site = site_at(place, {.write = access == Access::kWrite, .async = true, .box = true});
  one_more(site, warp);
  std::vector<uint64_t> sectors;
  double used = 0;
  uint64_t at = 0;
  for (const Span& row : rows) {
    at = on_device(reinterpret_cast<uint64_t>(row.p));
    for (uint64_t s = at / kSector; s <= (at + row.bytes - 1) / kSector; ++s) sectors.push_back(s);
    used += static_cast<double>(row.bytes);
  }
  ask(site, at, sectors.data(), sectors.size(), used, warp, true);
}
void track_wgmma(int n, bool a_in_shared) {
  Record& r = g_records.back();
  const double multiplied = 16.0 * n * 16;  // a quarter of the warpgroup's; b is read once for its four warps
  r.multiplied += weight() * multiplied;
  r.operands_read += weight() * (16.0 * n * 2 / 4 + (a_in_shared ? 16.0 * 16 * 2 : 0.0));
  block_of(t_worker->current->id / 32).multiplied += multiplied;
}
void track_wait_predecessor() {}
void track_sync_warp(uint32_t) {}
void track_product(uint32_t) { g_records.back().products += weight() / 32; }

void track_access(const void* p, size_t bytes, Access access, const void* pc) {
  add(p, bytes, access != Access::kRead, false, pc);
}
void track_plain(const void* p, size_t bytes, bool write, bool, const void* pc) { add(p, bytes, write, false, pc); }
void track_copy_issued(void* to, const void* pc) { add(to, 16, true, true, pc); }
void track_copy_wait(size_t bytes) {
  g_records.back().copies += weight() * static_cast<double>(bytes);
  g_records.back().waits += weight();
}
void track_copy_landed(void*) {}
uint32_t track_release(Known*) { return 0; }
bool track_covers(const Known&, uint32_t, uint32_t) { return true; }
void track_acquire(const Known&) {}
uint32_t track_engine_begin(uint32_t) { return 0; }
void track_engine_over(Known*, uint32_t, uint32_t) {}
void track_engine_access(uint32_t, uint32_t, const void*, size_t, Access, const void*) {}
void track_engine_access_for(uint32_t, uint32_t, uint32_t, const void*, size_t, Access, const void*) {}
bool track_knows_alike(uint32_t, uint32_t) { return true; }
void track_engine_landed(const void*, size_t) {}
void track_fence_async() {}
void track_global(const void*, size_t, bool) {}
void forget_global() {}

}  // namespace lrk::emu

// For ctypes. A chip: its SMs, bytes of L1 and shared memory of each, bytes of L2, and who says how many blocks of a kernel
// an SM holds.
extern "C" void lrk_traffic_chip(int64_t sms, int64_t l1, int64_t l2, int64_t (*resident)(int64_t, int64_t, int64_t)) {
  lrk::emu::g_chip = {sms, l1, l2, resident};
  lrk::emu::g_settings.multiprocessors = sms;
}
// Forgets what was counted and declared, and empties the caches.
extern "C" void lrk_traffic_begin() {
  lrk::emu::g_operands.resize(1);
  lrk::emu::g_records.clear();
  lrk::emu::g_l2.ways.clear();
}
extern "C" void lrk_traffic_operand(const char* name, const void* p, size_t bytes) {
  lrk::emu::g_operands.push_back({name, reinterpret_cast<uintptr_t>(p), bytes});
}
// A JSON list of the launches since.
extern "C" const char* lrk_traffic_report() {
  static std::string text;
  text = "[";
  for (const auto& r : lrk::emu::g_records) text += (text.size() > 1 ? ",\n" : "") + lrk::emu::text_of(r);
  return (text += "]").c_str();
}
