// SPDX-License-Identifier: Apache-2.0
// The mainloop of sm_90a: D[M, N] = A[M, K] B[K, N] + S[M, R] U[R, N] in one kernel, where the second product, the tail, is
// more steps of the same K loop with tensor maps of its own.
//
// A block has a warpgroup that fills a ring of stages with boxes of kTileK columns of A and B, and two that multiply 64 rows
// each. Two blocks of a cluster have neighbouring rows and the same columns: each fetches half of B's box for both. Blocks
// stay and take tile after tile, so that the next tile's stages fill while this one's results leave.
//
//   kColumns   S [M, R] and U are matrices of bf16, read as A and B are
//   kPages     S [M, slots, R] and U's rows belong to adapters (multi_lora.h). A list for each tile names the pages of 16 rows of
//              U that rows of the tile want; the producer writes S's part of a page with zeros where a row has another adapter.
//              Zero times NaN is NaN: a page that is not finite is not multiplied but added to its own rows.
//
// A row's bits depend on its own values: K is walked in order, rows of others add zeros.
#pragma once

#include "cuda/launch_sm90.cuh"
#include "page_tail.h"
#include "place.cuh"

namespace lrk::sm90 {

constexpr int kGroup = 128, kConsumers = 2, kThreads = (1 + kConsumers) * kGroup;
constexpr int kProducerRegisters = 48, kConsumerRegisters = 232;
constexpr int kBoth = 1 + kConsumers;  // the named barrier of all consumers; each has one of its own before it
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 512);
constexpr int kProducts = kTileK / 16;                              // of a step
constexpr uint32_t kRowBytes = 2 * kTileK, kBrick = 8 * kRowBytes;  // rows of a swizzled box
constexpr uint32_t kHalfColumns = 128;                              // of a tile that leave at once
static_assert(kRowBytes == span_of(Swizzle::k128));

enum class Tail { kColumns, kPages };

struct GemmParams {
  TensorMap a{}, b{};     // boxes of kTileK x kTileM; of B see Gemm::kBoxes
  TensorMap s{}, u{};     // the tail's, alike; of pages u is the pool, boxes of 64 columns x 16 rows
  TensorMap y{}, base{};  // stores: boxes of 64 columns x 64 rows
  int32_t M = 0, N = 0;
  int32_t steps = 0, tail_steps = 0;  // of kTileK
  int32_t tail_products = 0;          // in the tail's last step: the others are zeros
  GemmTiles tiles{};
  const float* column_scale = nullptr;  // of A B alone; null for ones
  const void* bias = nullptr;           // [N] of A's type, or null
  bool keeps_base = false;              // A B alone goes to base
  Dropout dropout{};                    // of S U
  const int64_t* seed = nullptr;
  PageTail pages{};
};

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t turn = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, turn ^= 1;
  }
};

// T: of A, B and the result; the tail is bf16. kMajor: whether B's memory runs along K or along N; pages always run along N.
// kDropout: the tail comes first, is masked, and the rest is added to it.
template <class T, Major kMajor, Tail kTail, bool kDropout, int kTileN>
struct Gemm {
  static constexpr Major kTailMajor = kTail == Tail::kPages ? Major::kMN : kMajor;
  static constexpr int kStages = kTileN == 256 ? 4 : 6, kSums = kTileN / 2;
  static constexpr int kA = kTileM * kTileK, kB = kTileN * kTileK, kOut = 64 * kHalfColumns;  // elements
  static constexpr uint32_t kStageBytes = 2 * (kA + kB), kPageBytes = 2 * kTileN * kPageK;
  // Boxes of B in a stage, which the blocks of a cluster share out: kTileK x kTileN / 2 of rows along K, 64 x kTileK along N.
  static constexpr int box_rows(Major major) { return major == Major::kK ? kTileN / 2 : kTileK; }
  static constexpr int boxes(Major major) { return major == Major::kK ? 2 : kTileN / 64; }
  static constexpr size_t kSmem = smem_bytes<T>(kStages * kA) + smem_bytes<T>(kStages * kB) +
                                  smem_bytes<T>(kConsumers * kOut) + 2 * smem_bytes<Mbarrier>(kStages) +
                                  (kTail == Tail::kPages ? smem_bytes<uint32_t>(2 * kConsumers * 4) : 0);

  const GemmParams& p;
  T *a, *b, *out;           // [stage], [stage], [consumer]
  Mbarrier *full, *empty;   // [stage]
  uint32_t* odd = nullptr;  // [2][warp of the consumers]
  int odd_turn = 0;
  int rank;  // in the cluster
  Ring<kStages> ring;
  int before = -1;  // a consumer's stage whose products are under way

  explicit __device__ __forceinline__ Gemm(Smem& smem, const GemmParams& params)
      : p(params),
        a(smem.take<T>(kStages * kA)),
        b(smem.take<T>(kStages * kB)),
        out(smem.take<T>(kConsumers * kOut)),
        full(smem.take<Mbarrier>(kStages)),
        empty(smem.take<Mbarrier>(kStages)),
        rank(cluster_rank()) {
    if constexpr (kTail == Tail::kPages) odd = smem.take<uint32_t>(2 * kConsumers * 4);
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        mbarrier_init(full + s, 1);
        mbarrier_init(empty + s, p.tiles.cluster * kConsumers * 4);
      }
      fence_mbarrier_init();
    }
    meet();
  }
  // All threads of the cluster: before the first copy into another block's memory, and after the last.
  __device__ __forceinline__ void meet() const {
    if (p.tiles.cluster > 1) {
      sync_cluster();
    } else {
      sync_threads();
    }
  }

  template <class F>  // f(tile): the cluster's tiles, one after the other
  __device__ __forceinline__ void each_tile(const F& f) const {
    const int cluster = p.tiles.cluster, blocks = static_cast<int>(gridDim.x);
    for (int i = static_cast<int>(blockIdx.x) / cluster; i < p.tiles.count; i += blocks / cluster)
      f(tile_at(p.tiles, i, rank));
  }
  __device__ __forceinline__ int page_count(const GemmTile& tile) const { return shfl(p.pages.counts[tile.m], 0); }
  __device__ __forceinline__ const PageEntry* page_entries(const GemmTile& tile) const {
    return p.pages.entries + int64_t{tile.m} * p.pages.capacity;
  }

  // ---- the producer: one warp

  __device__ __forceinline__ void produce() {
    bool waited = false;
    each_tile([&](const GemmTile& tile) {
      const auto tail = [&] {
        if (!waited) wait_predecessor();  // who makes S; A and B are older
        waited = true;
        if constexpr (kTail == Tail::kPages) {
          fetch_pages(tile);
        } else {
          fetch(p.s, p.u, tile, p.tail_steps);
        }
      };
      if constexpr (kDropout) tail();
      fetch(p.a, p.b, tile, p.steps);
      if constexpr (!kDropout) tail();
    });
  }

  // span: of a step along K in A's own elements, kTileM of which are the box.
  __device__ __forceinline__ void fetch(const TensorMap& of_a, const TensorMap& of_b, const GemmTile& tile, int steps,
                                        int span = kTileK, uint32_t bytes = kStageBytes) {
    for (int step = 0; step < steps; ++step, ring.next()) {
      const int s = ring.stage, k = step * kTileK;
      mbarrier_wait(empty + s, ring.turn ^ 1);
      if (lane_id() == 0) {
        mbarrier_arrive_expect(full + s, bytes);
        bulk_load(a + s * kA, of_a, full + s, step * span, tile.row);
        constexpr int kBoxes = boxes(kMajor), kBox = kB / kBoxes;
        for_each_share(kBoxes, [&](int i) {
          const int n = tile.col + i * (kTileN / kBoxes);
          bulk_share(b + s * kB + i * kBox, of_b, full + s, kMajor == Major::kK ? k : n, kMajor == Major::kK ? n : k);
        });
      }
    }
  }
  template <class F>
  __device__ __forceinline__ void for_each_share(int boxes, const F& f) const {
    const int share = boxes / p.tiles.cluster;
    for (int i = rank * share; i < (rank + 1) * share; ++i) f(i);
  }
  __device__ __forceinline__ void bulk_share(void* smem, const TensorMap& map, Mbarrier* at, int x, int y) const {
    if (p.tiles.cluster > 1) {
      bulk_load_multicast(smem, map, at, x, y, 3);
    } else {
      bulk_load(smem, map, at, x, y);
    }
  }

  // Page j of a stage: S's at columns 16 j of the stage's A, U's [16, kTileN] at j kPageBytes of its B.
  __device__ __forceinline__ void fetch_pages(const GemmTile& tile) {
    const int count = page_count(tile);
    const PageEntry* entries = page_entries(tile);
    for (int first = 0; first < count; first += kProducts, ring.next()) {
      const int s = ring.stage, pages = count - first < kProducts ? count - first : kProducts;
      mbarrier_wait(empty + s, ring.turn ^ 1);
      for (int j = 0; j < pages; ++j) copy_s(a + s * kA, tile, entries[first + j], j);
      fence_async();
      sync_warp();
      if (lane_id() == 0) {
        mbarrier_arrive_expect(full + s, static_cast<uint32_t>(pages) * kPageBytes);
        for (int j = 0; j < pages; ++j)
          for_each_share(kTileN / 64, [&](int i) {
            bulk_share(b + s * kB + (j * kTileN + i * 64) * kPageK, p.u, full + s, tile.col + i * 64,
                       entries[first + j].page * kPageK);
          });
      }
    }
  }
  __device__ __forceinline__ void copy_s(T* to, const GemmTile& tile, const PageEntry& entry, int j) const {
    const PageTail& g = p.pages;
    const T* from = static_cast<const T*>(g.s) + entry.s_at;
    const int32_t* owners = g.owners + int64_t{entry.slot} * p.M;
#pragma unroll 2
    for (int row = lane_id(); row < kTileM; row += 32) {
      const int t = tile.row + row;
      uint32_t w[2][4] = {};
      if (t < p.M && owners[t] == entry.adapter) {
        load_16(w[0], from + int64_t{t} * g.slots * g.R);
        load_16(w[1], from + int64_t{t} * g.slots * g.R + 8);
      }
      for (int half = 0; half < 2; ++half)
        store_shared_16(reinterpret_cast<unsigned char*>(to) + swizzled_row(row, 2 * j + half), w[half]);
    }
  }
  // Where 16-byte chunk c of a row of a box lies.
  static __device__ __forceinline__ int swizzled_row(int row, int c) {
    return row * static_cast<int>(kRowBytes) + ((c ^ row % 8) << 4);
  }

  // ---- the consumers: warpgroups of 64 rows. Sum 4 j + i of a lane 4 g + t of warp w is row 16 w + g + 8 (i / 2), column
  // 8 j + 2 t + i mod 2.

  __device__ __forceinline__ int consumer() const { return static_cast<int>(threadIdx.x) / kGroup - 1; }
  __device__ __forceinline__ int own_row() const { return warp_id() % 4 * 16 + lane_id() / 4; }

  __device__ __forceinline__ uint64_t a_word(int s, int product) const {
    return packed({shared_address(a + s * kA + consumer() * 64 * kTileK) + static_cast<uint32_t>(product) * 32, 16,
                   kBrick, Swizzle::k128});
  }
  template <Major kOf>
  __device__ __forceinline__ uint64_t b_word(int s, int product) const {
    const uint32_t at = shared_address(b + s * kB), k = static_cast<uint32_t>(product);
    if constexpr (kOf == Major::kK) return packed({at + k * 32, 16, kBrick, Swizzle::k128});
    return packed({at + k * 2 * kBrick, kTileK * kRowBytes, kBrick, Swizzle::k128});
  }
  __device__ __forceinline__ uint64_t page_word(int s, int j) const {
    return packed({shared_address(b + s * kB) + static_cast<uint32_t>(j) * kPageBytes, kPageK * kRowBytes, kBrick,
                   Swizzle::k128});
  }

  __device__ __forceinline__ void consume() {
    float sum[kSums];
    const auto step = [&](const auto& products) {
      mbarrier_wait(full + ring.stage, ring.turn);
      wgmma_fence(sum);
      products(ring.stage);
      go_on(sum);
    };
    if constexpr (kTail == Tail::kPages) wait_predecessor();  // the lists
    each_tile([&](const GemmTile& tile) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] = 0.f;
      const auto tail = [&] {
        if constexpr (kTail == Tail::kPages) {
          add_pages(sum, tile, step);
        } else {
          for (int i = 0; i < p.tail_steps; ++i) {
            const int products = i + 1 < p.tail_steps ? kProducts : p.tail_products;
            step([&](int s) {
#pragma unroll 1
              for (int k = 0; k < products; ++k)
                wgmma<bf16, kTileN, Major::kK, kTailMajor>(sum, a_word(s, k), b_word<kTailMajor>(s, k), true);
            });
          }
        }
      };
      if constexpr (kDropout) {
        tail();
        drain(sum);
        drop(sum, tile);
      }
      for (int i = 0; i < p.steps; ++i)
        step([&](int s) {
#pragma unroll
          for (int k = 0; k < kProducts; ++k)
            wgmma<T, kTileN, Major::kK, kMajor>(sum, a_word(s, k), b_word<kMajor>(s, k), true);
        });
      if constexpr (!kDropout) {
        if (kTail == Tail::kColumns && (p.column_scale || p.keeps_base)) {
          drain(sum);
          if (p.keeps_base) store(p.base, sum, tile);
          if (p.column_scale) scale_columns(sum, tile);
        }
        tail();
      }
      drain(sum);
      if (p.bias) add_bias(sum, tile);
      if constexpr (kTail == Tail::kPages) blank(sum, tile);
      store(p.y, sum, tile);
    });
    if (threadIdx.x % kGroup == 0) bulk_wait_read<0>();
  }
  // The stage's products are under way from here on, those of the stage before are over.
  __device__ __forceinline__ void go_on(float (&sum)[kSums]) {
    wgmma_commit();
    wgmma_wait<1>(sum);
    release(before);
    before = ring.stage;
    ring.next();
  }
  __device__ __forceinline__ void drain(float (&sum)[kSums]) {
    wgmma_wait<0>(sum);
    release(before);
    before = -1;
  }
  // By a lane for each block whose copies end in this block's stage, and whose stage this block's copies end in.
  __device__ __forceinline__ void release(int stage) const {
    if (stage < 0) return;
    sync_warp();  // where lanes read of the stage themselves
    if (lane_id() < p.tiles.cluster) mbarrier_arrive_at(empty + stage, lane_id());
  }

  template <class Step>
  __device__ __forceinline__ void add_pages(float (&sum)[kSums], const GemmTile& tile, const Step& step) {
    const int count = page_count(tile);
    for (int first = 0; first < count; first += kProducts) {
      const int pages = count - first < kProducts ? count - first : kProducts;
      mbarrier_wait(full + ring.stage, ring.turn);
      if (const uint32_t not_finite = not_finite_pages(ring.stage, pages)) {
        drain(sum);
#pragma unroll 1
        for (int j = 0; j < pages; ++j)
          if (not_finite >> j & 1) add_to_owners(sum, tile, page_entries(tile)[first + j], ring.stage, j);
        sync_named(kBoth, kConsumers * kGroup);
#pragma unroll 1
        for (int j = 0; j < pages; ++j)
          if (not_finite >> j & 1) clear_page(ring.stage, j);
        fence_async();
        sync_named(kBoth, kConsumers * kGroup);
      }
      step([&](int s) {
#pragma unroll 1
        for (int j = 0; j < pages; ++j)
          wgmma<bf16, kTileN, Major::kK, Major::kMN>(sum, a_word(s, j), page_word(s, j), true);
      });
    }
  }
  // f(16 bytes of page j): all of it, by the consumers together.
  template <class F>
  __device__ __forceinline__ void each_vector(int s, int j, const F& f) const {
    constexpr int kAtOnce = kConsumers * kGroup;
#pragma unroll
    for (int i = 0; i < kTileN * kPageK / 8 / kAtOnce; ++i)
      f(b + s * kB + j * kTileN * kPageK + (i * kAtOnce + static_cast<int>(threadIdx.x) - kGroup) * 8);
  }
  // A bit for each page of the stage that has an element which is not finite, in these columns. Who reads the words of one turn
  // may be late by a turn: they alternate, through the tiles.
  __device__ __forceinline__ uint32_t not_finite_pages(int s, int pages) {
    odd_turn ^= 1;
    uint32_t found = 0;
#pragma unroll 1
    for (int j = 0; j < pages; ++j) {
      uint32_t here = 0;
      each_vector(s, j, [&](const T* at) {
        uint32_t w[4];
        load_16(w, at);
#pragma unroll
        for (int q = 0; q < 4; ++q) here |= ((w[q] & 0x7fff7fffu) + 0x00800080u) & 0x80008000u;  // exponents of ones
      });
      if (any_lane(here != 0)) found |= 1u << j;
    }
    uint32_t* all = odd + odd_turn * kConsumers * 4;
    if (lane_id() == 0) all[warp_id() - kGroup / 32] = found;
    sync_named(kBoth, kConsumers * kGroup);
    found = 0;
#pragma unroll
    for (int w = 0; w < kConsumers * 4; ++w) found |= all[w];
    return found;
  }
  __device__ __forceinline__ void clear_page(int s, int j) const {
    constexpr uint32_t kZeros[4] = {};
    each_vector(s, j, [&](T* at) { store_shared_16(at, kZeros); });
  }
  // A product of warps, of which rows of other adapters take nothing; rows of the page past its ranks count as zeros.
  __device__ __forceinline__ void add_to_owners(float (&sum)[kSums], const GemmTile& tile, const PageEntry& entry,
                                                int s, int j) const {
    const auto* rows = reinterpret_cast<const unsigned char*>(a + s * kA);
    const auto* page = reinterpret_cast<const unsigned char*>(b + s * kB) + static_cast<uint32_t>(j) * kPageBytes;
    const int32_t* owners = p.pages.owners + int64_t{entry.slot} * p.M;
    bool owns[2];
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int t = tile.row + consumer() * 64 + own_row() + 8 * below;
      owns[below] = t < p.M && owners[t] == entry.adapter;
    }
    const auto keep = [&](int r) {  // ranks r and r + 1
      return r + 1 < entry.ranks ? 0xffffffffu : r < entry.ranks ? 0xffffu : 0u;
    };
    const uint32_t keeps[2] = {keep(lane_id() % 4 * 2), keep(lane_id() % 4 * 2 + 8)};
    const int lane_16 = lane_id() % 16;
    uint32_t of_s[4];
    ldmatrix_x4(of_s, rows + swizzled_row(consumer() * 64 + warp_id() % 4 * 16 + lane_16, 2 * j + lane_id() / 16));
    // Each thread's results by way of memory of its own: a loop that is not unrolled cannot name registers of the sums.
    constexpr int kAtOnce = kOut * 2 / 4 / kGroup;  // sums
    auto* mine = reinterpret_cast<float*>(out + consumer() * kOut) + threadIdx.x % kGroup;
    if (threadIdx.x % kGroup == 0) bulk_wait_read<0>();
    sync_named(1 + consumer(), kGroup);
#pragma unroll
    for (int first = 0; first < kSums; first += kAtOnce) {
#pragma unroll 1
      for (int i = 0; i < kAtOnce; i += 4) {
        const int n = (first + i) / 4;
        uint32_t of_u[2];
        ldmatrix_x2_trans(of_u, page + n / 8 * kPageK * static_cast<int>(kRowBytes) + swizzled_row(lane_16, n % 8));
        of_u[0] &= keeps[0], of_u[1] &= keeps[1];
        float d[4] = {};
        mma_16816(d, of_s, of_u, bf16{});
#pragma unroll
        for (int q = 0; q < 4; ++q) mine[(i + q) * kGroup] = d[q];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (owns[i / 2 % 2]) sum[first + i] += mine[i * kGroup];
    }
  }
  // Rows whose adapter or page nobody knows.
  __device__ __forceinline__ void blank(float (&sum)[kSums], const GemmTile& tile) const {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int t = tile.row + consumer() * 64 + own_row() + 8 * below;
      bool unknown = false;
      for (int k = 0; k < p.pages.slots && t < p.M; ++k)
        unknown = unknown || p.pages.owners[int64_t{k} * p.M + t] == kNobodyKnows;
      if (!unknown) continue;
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        if (i / 2 % 2 == below) sum[i] = not_a_number();
    }
  }

  // f(i, n): sum i of a lane is of column n, and sum i + 2 too, of the row 8 below.
  template <class F>
  __device__ __forceinline__ void each_column(const GemmTile& tile, const F& f) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int n = tile.col + i / 4 * 8 + lane_id() % 4 * 2 + i % 2;
      if (i / 2 % 2 == 0 && n < p.N) f(i, n);
    }
  }
  __device__ __forceinline__ void scale_columns(float (&sum)[kSums], const GemmTile& tile) const {
    each_column(tile, [&](int i, int n) {
      const float c = p.column_scale[n];
      sum[i] *= c;
      sum[i + 2] *= c;
    });
  }
  __device__ __forceinline__ void add_bias(float (&sum)[kSums], const GemmTile& tile) const {
    each_column(tile, [&](int i, int n) {
      const float v = to_float_fast(static_cast<const T*>(p.bias)[n]);
      sum[i] += v;
      sum[i + 2] += v;
    });
  }
  // The mask's blocks have 8 columns of a row: each of the four lanes of those columns draws every fourth block for all of them.
  __device__ __forceinline__ void drop(float (&sum)[kSums], const GemmTile& tile) const {
    const auto seed = static_cast<uint64_t>(*p.seed);
    const int quad = lane_id() % 4;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int row = tile.row + consumer() * 64 + own_row() + 8 * below;
      Dropout d = p.dropout;
      if constexpr (kTail == Tail::kPages) {
        const int32_t owner = row < p.M ? p.pages.owners[row] : kNobody;
        d = owner >= 0 ? make_dropout(p.pages.dropout_p[owner]) : Dropout{};
      }
#pragma unroll
      for (int first = 0; first < kTileN / 8; first += 4) {
        const Philox mine = dropout_block(seed, row, tile.col / kDropoutBlock + first + quad);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          uint32_t bits = 0;
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            const uint32_t word = shfl(mine.v[w], lane_id() - quad + q);
            if (w == quad) bits = word;
          }
          float* pair = sum + 4 * (first + q) + 2 * below;
          pair[0] = (bits & 0xffffu) < d.threshold ? 0.f : pair[0] * d.keep_scale;
          pair[1] = bits >> 16 < d.threshold ? 0.f : pair[1] * d.keep_scale;
        }
      }
    }
  }

  // A consumer's 64 rows, rounded, by way of shared memory: boxes of 64 columns, swizzled so that a warp's writes meet all banks.
  __device__ __forceinline__ void store(const TensorMap& to, const float (&sum)[kSums], const GemmTile& tile) const {
    T* mine = out + consumer() * kOut;
    auto* bytes = reinterpret_cast<unsigned char*>(mine);
    const bool elected = threadIdx.x % kGroup == 0;
    const int row = opaque(own_row());
#pragma unroll
    for (int half = 0; half < kTileN / static_cast<int>(kHalfColumns); ++half) {
      if (elected) bulk_wait_read<0>();
      sync_named(1 + consumer(), kGroup);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float* v = sum + 4 * (16 * half + j);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int at = j / 8 * 64 * static_cast<int>(kRowBytes) + swizzled_row(row + 8 * below, j % 8);
          *reinterpret_cast<uint32_t*>(bytes + at + lane_id() % 4 * 4) = pack_fast<T>(v[2 * below], v[2 * below + 1]);
        }
      }
      fence_async();
      sync_named(1 + consumer(), kGroup);
      if (elected) {
        for (int i = 0; i < 2; ++i)
          bulk_store(to, mine + i * 64 * 64, tile.col + half * static_cast<int>(kHalfColumns) + 64 * i,
                     tile.row + consumer() * 64);
        bulk_commit();
      }
    }
  }
};

// What a block does. Kernels are named for their families and pass on their parameters.
template <class Gemm, class Params>
__device__ __forceinline__ void run_block(const Params& p) {
  Smem smem;
  Gemm gemm(smem, p);
  if (threadIdx.x < kGroup) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x < 32) gemm.produce();
  } else {
    more_registers<kConsumerRegisters>();
    gemm.consume();
  }
  if (p.tiles.cluster > 1) sync_cluster();
}

// ---- for launchers

// Blocks that stay: as many as the GPU has places for.
inline int blocks_of(const GemmTiles& tiles) {
  const int places = multiprocessors() / tiles.cluster;
  return (tiles.count < places ? tiles.count : places > 0 ? places : 1) * tiles.cluster;
}

struct Operand2d {
  const void* data;
  int64_t rows, cols, pitch;  // of the matrix [M, K], or [K, N]; pitch: elements between what is not contiguous
};
// A cudaError_t value.
inline int map_operands(TensorMap* of_a, TensorMap* of_b, const Operand2d& a, const Operand2d& b, bool along_n,
                        int tile_n) {
  const int error =
      make_tensor_map(of_a, {a.data, 2, 2, {a.cols, a.rows}, {2 * a.pitch}, {kTileK, kTileM}, Swizzle::k128});
  if (error) return error;
  if (along_n)
    return make_tensor_map(of_b, {b.data, 2, 2, {b.cols, b.rows}, {2 * b.pitch}, {64, kTileK}, Swizzle::k128});
  return make_tensor_map(of_b, {b.data, 2, 2, {b.rows, b.cols}, {2 * b.pitch}, {kTileK, tile_n / 2}, Swizzle::k128});
}
inline int map_result(TensorMap* map, void* data, int64_t M, int64_t N) {
  return make_tensor_map(map, {data, 2, 2, {N, M}, {2 * N}, {64, 64}, Swizzle::k128});
}

}  // namespace lrk::sm90
