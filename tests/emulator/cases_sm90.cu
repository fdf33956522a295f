// SPDX-License-Identifier: Apache-2.0
// A small healthy GEMM in the manner of sm_90 and, switch by switch, the mistakes the emulator must catch; see cases.cu.
//
// c [M, N] = a [M, K] b [N, K]^T in bf16. Blocks walk over tiles; a producer thread copies boxes of K into a ring of stages,
// two warpgroups multiply 64 rows each, one from shared memory and one with A in registers, and each stores its tile through
// shared memory. In a pair, a cluster of two, tiles lie one below the other, and each block loads half of their b for both.
#include <string>

#include "launch_sm90.cuh"
#include "memory.h"

namespace {

using namespace lrk;

// clang-format off
enum Bug {
  kNone, kPair, kBare, kShortExpect, kLongExpect, kEarlyRelease, kDoubleArrive, kWrongParity, kReadEarly, kRegistersOver,
  kBoxOffset, kUnmade, kBeyond, kNobodyWaits, kRegisterTouched, kElectedWait,
  kNoFirstSync, kNoLastSync, kOwnRelease, kSameHalf, kThirdBlock, kBugs  // of pairs
};
const char* const kNames[] = {
  "none", "pair", "bare", "short_expect", "long_expect", "early_release", "double_arrive", "wrong_parity", "read_early",
  "registers_over", "box_offset", "unmade", "beyond", "nobody_waits", "register_touched", "elected_wait",
  "no_first_sync", "no_last_sync", "own_release", "same_half", "third_block"};
constexpr int cluster_of(int bug) { return bug == kPair || bug >= kNoFirstSync ? 2 : 1; }
// clang-format on

constexpr int kM = 300, kN = 100, kK = 200, kTileM = 128, kTileN = 64, kTileK = 64, kStages = 4, kThreads = 384,
              kBlocks = 4;
constexpr uint32_t kStageBytes = (kTileM + kTileN) * kTileK * 2;

struct P {
  TensorMap a, b, c;
};

// [rows, cols]; pitch: elements, a multiple of 8.
struct Matrix {
  int rows, cols, pitch;
  bf16* values;
  Matrix(int r, int c, bf16* v = nullptr)
      : rows(r), cols(c), pitch((c + 7) / 8 * 8 + 8), values(v ? v : visible<bf16>(size())) {}
  size_t size() const { return static_cast<size_t>((rows - 1) * pitch + cols); }
  bf16& at(int i, int j) { return values[i * pitch + j]; }
  int map(TensorMap* m, int box_rows, Swizzle swizzle) {
    return make_tensor_map(m, {values, 2, 2, {cols, rows}, {pitch * 2}, {64, box_rows}, swizzle});
  }
};

template <int kBug>
__global__ void __launch_bounds__(kThreads, 1) gemm(const __grid_constant__ P p) {
  Smem smem;
  bf16* a = smem.take<bf16>(kStages * kTileM * kTileK);
  bf16* b = smem.take<bf16>(kStages * kTileN * kTileK);
  bf16* c = smem.take<bf16>(kTileM * kTileN);
  Mbarrier* full = smem.take<Mbarrier>(kStages);
  Mbarrier* empty = smem.take<Mbarrier>(kStages);
  const int t = static_cast<int>(threadIdx.x), group = t / 128, lane = t % 32;
  constexpr int kSteps = (kK + kTileK - 1) / kTileK, kCluster = cluster_of(kBug), kPart = kTileN / kCluster;
  const int rank = cluster_rank();
  // Tiles of a column follow each other; there may be one below the last row for a pair's second block.
  constexpr int kRows = (kM + kTileM * kCluster - 1) / kTileM / kCluster * kCluster;
  constexpr int kTiles = kRows * ((kN + kTileN - 1) / kTileN);
  const int first = static_cast<int>(blockIdx.x), stride = static_cast<int>(gridDim.x);

  if (t == 0) {
    for (int s = 0; s < kStages; ++s) {
      if (kBug != kUnmade || s) mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, kBug == kOwnRelease ? 8 : 8 * kCluster);
    }
    fence_mbarrier_init();
  }
  if constexpr (kCluster > 1 && kBug != kNoFirstSync) {
    sync_cluster();
  } else {
    sync_threads();
  }

  if (group == 0) {
    fewer_registers<40>();
    int step = 0;
    const auto stage_of = [&] {
      const int s = step % kStages;
      const uint32_t turn = static_cast<uint32_t>(step++ / kStages % 2);
      mbarrier_wait(empty + s, kBug == kWrongParity ? turn : turn ^ 1);  // bug: wrong_parity
      return s;
    };
    for (int tile = first; t == 0 && tile < kTiles; tile += stride) {
      const int row_0 = tile % kRows * kTileM, col_0 = tile / kRows * kTileN;
      for (int k = 0; k < kSteps; ++k) {
        const int s = stage_of();
        constexpr uint32_t kBytes = kBug == kShortExpect  ? kStageBytes / 2
                                    : kBug == kLongExpect ? kStageBytes + 16
                                                          : kStageBytes;
        if constexpr (kBug == kBare) {
          mbarrier_arrive(full + s);
        } else {
          mbarrier_arrive_expect(full + s, kBytes);
        }
        constexpr int kOffset = kBug == kBoxOffset ? 64 : 0;
        bulk_load(a + s * kTileM * kTileK + kOffset, p.a, full + s, k * kTileK, row_0);  // bug: box_offset unmade
        bf16* bs = b + s * kTileN * kTileK;
        if constexpr (kCluster == 1) {
          bulk_load(bs, p.b, full + s, k * kTileK, col_0);
        } else {
          const int part = kBug == kSameHalf ? 0 : rank * kPart;
          bulk_load_multicast(bs + part * kTileK, p.b, full + s, k * kTileK, col_0 + part, 0b11);  // bug: same_half
        }
      }
    }
    if constexpr (kBug == kNobodyWaits) {
      if (t == 0) {
        const int s = stage_of();
        mbarrier_arrive_expect(full + s, kStageBytes / 3);
        bulk_load(b + s * kTileN * kTileK, p.b, full + s, 0, 0);
      }
    }
  } else {
    more_registers<kBug == kRegistersOver ? 256 : 232>();  // bug: registers_over

    bf16* mine = c + (group - 1) * 64 * kTileN;
    const auto release = [&](int s) {
      if constexpr (kCluster == 1 || kBug == kOwnRelease) {
        if (lane == 0) mbarrier_arrive(empty + s);
      } else {
        if (lane < kCluster) mbarrier_arrive_at(empty + s, lane + (kBug == kThirdBlock));  // bug: third_block
      }
    };
    int step = 0;
    const auto multiply = [&](float (&d)[kTileN / 2], auto registers) {
      constexpr bool kRegisters = decltype(registers)::value;
      for (int i = 0; i < kSteps; ++i, ++step) {
        const int s = step % kStages;
        if constexpr (kBug == kElectedWait) {
          if (lane == 0) mbarrier_wait(full + s, step / kStages % 2);
          shfl(0, 0);  // which makes lanes meet, and orders no memory
        } else {
          mbarrier_wait(full + s, step / kStages % 2);
        }
        const bf16 *as = a + (s * kTileM + (group - 1) * 64) * kTileK, *bs = b + s * kTileN * kTileK;
        uint32_t fragments[4][4];
        for (int k = 0; kRegisters && k < 4; ++k) {
          const int row = t % 128 / 32 * 16 + lane % 16, chunk = 2 * k + lane / 16;
          ldmatrix_x4(fragments[k], as + row * kTileK + (chunk ^ row % 8) * 8);
        }
        wgmma_fence(d);
        for (uint32_t k = 0; k < 4; ++k) {
          const auto word = [&](const bf16* tile) {
            return packed({shared_address(tile) + k * 32 + (kBug == kBeyond ? 16 * 8192 : 0), 16, 1024, Swizzle::k128});
          };
          if constexpr (!kRegisters) {
            wgmma<bf16, kTileN>(d, word(as), word(bs), i + static_cast<int>(k) > 0);  // bug: beyond elected_wait
          } else {
            wgmma<bf16, kTileN>(d, fragments[k], word(bs), i + static_cast<int>(k) > 0);
          }
        }
        wgmma_commit();
        if constexpr (kBug == kRegisterTouched) fragments[0][0] = 0;
        if constexpr (kBug == kEarlyRelease) release(s);
        if constexpr (kBug == kReadEarly) {
          if (i == kSteps - 1) mine[t % 128] = from_float<bf16>(d[0]);
        }
        wgmma_wait<0>(d);
        if constexpr (kBug == kRegisterTouched) {
          if (fragments[0][0]) d[0] += 1;
        }
        sync_warp();  // the other lanes' ldmatrix too
        if constexpr (kBug != kEarlyRelease) release(s);
        if constexpr (kBug == kDoubleArrive) {
          if (lane == 1) mbarrier_arrive(empty + s);  // bug: double_arrive
        }
      }
    };
    for (int tile = first; tile < kTiles; tile += stride) {
      const int row_0 = tile % kRows * kTileM, col_0 = tile / kRows * kTileN;
      float d[kTileN / 2] = {};
      if (group == 1) {
        multiply(d, std::false_type{});
      } else {
        multiply(d, std::true_type{});
      }
      sync_named(group, 128);  // the tile before has been read
      if constexpr (kBug != kReadEarly) {
        for (int i = 0; i < kTileN / 2; ++i) {
          const int row = t % 128 / 32 * 16 + lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
          mine[row * kTileN + col] = from_float<bf16>(d[i]);
        }
      } else {
        for (int i = 128 + t % 128; i < 64 * kTileN; i += 128) mine[i] = bf16{0};
      }
      fence_async();
      sync_named(group, 128);
      if (t % 128 == 0) {
        bulk_store(p.c, mine, col_0, row_0 + (group - 1) * 64);
        bulk_commit();
        bulk_wait_read<0>();
      }
    }
  }
  if constexpr (kCluster > 1 && kBug != kNoLastSync) sync_cluster();  // the other block's arrivals have come
}

constexpr size_t kSmem = smem_bytes<bf16>(kStages * kTileM * kTileK) + smem_bytes<bf16>(kStages * kTileN * kTileK) +
                         smem_bytes<bf16>(kTileM * kTileN) + 2 * smem_bytes<Mbarrier>(kStages);

#if defined(LRK_EMULATE)
constexpr int kCases = kBugs;
#else
constexpr int kCases = kPair + 1;
#endif
template <int kBug = 0>
int dispatch(const std::string& name, P& p, Matrix& b) {
  if constexpr (kBug < kCases) {
    if (name != kNames[kBug]) return dispatch<kBug + 1>(name, p, b);
    if (const int code = b.map(&p.b, kTileN / cluster_of(kBug), Swizzle::k128)) return code;
    return launch("gemm", gemm<kBug>, dim3(kBlocks), dim3(kThreads), kSmem, nullptr, {cluster_of(kBug)}, p);
  } else {
    std::fprintf(stderr, "no case %s\n", name.c_str());
    std::exit(2);
  }
}

int run_case(const std::string& name, Matrix& a, Matrix& b, Matrix& c) {
  P p{};
  int code = a.map(&p.a, kTileM, Swizzle::k128);
  if (!code) code = c.map(&p.c, 64, Swizzle::kNone);
  return code ? code : dispatch(name, p, b);
}

}  // namespace

// For ctypes.
extern "C" int lrk_gemm_sm90(const char* name, void* a, void* b, void* c) {
  Matrix of_a(kM, kK, static_cast<bf16*>(a)), of_b(kN, kK, static_cast<bf16*>(b)), of_c(kM, kN, static_cast<bf16*>(c));
  return run_case(name, of_a, of_b, of_c);
}

// cases_sm90 NAME [SCHEDULES]: runs, in the emulator under so many schedules (8), one line each: the launch's result, how many
// elements are wrong, and how many were written that are none. Without a name the healthy two.
int main(int argc, char** argv) {
  int faults = 0;
#if defined(LRK_EMULATE)
  const int schedules = argc > 2 ? std::atoi(argv[2]) : 8;
#else
  const int schedules = 1;
#endif
  Matrix a(kM, kK), b(kN, kK);
  const auto fill = [](Matrix& m, int seed) {  // small integers: any order, same sum
    for (int i = 0; i < m.rows; ++i)
      for (int j = 0; j < m.cols; ++j)
        m.at(i, j) = from_float<bf16>(static_cast<float>((i * 7 + j * 3 + seed) % 5 - 2));
  };
  fill(a, 0);
  fill(b, 1);
  const auto run = [&](const std::string& name, int schedule) {
    Matrix c(kM, kN);
#if defined(LRK_EMULATE)
    lrk_emulator_set("schedule", schedule);
    emu::forget_global();
    for (Matrix* m : {&a, &b, &c}) emu::track_global(m->values, m->size() * sizeof(bf16), m != &c);
#endif
    const int code = finished(run_case(name, a, b, c));
    int wrong = 0, spilt = 0;
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < kN; ++j) {
        float want = 0;
        for (int k = 0; k < kK; ++k) want += to_float(a.at(i, k)) * to_float(b.at(j, k));
        wrong += !(to_float(c.at(i, j)) == to_float(from_float<bf16>(want)));
      }
      for (int j = kN; i + 1 < kM && j < c.pitch; ++j) spilt += c.at(i, j).bits != 0xffff;
    }
    std::printf("%d %d %d %d\n", schedule, code, wrong, spilt);
    faults += code || wrong || spilt;
  };
  for (int schedule = 0; schedule < schedules; ++schedule) {
    if (argc > 1) {
      run(argv[1], schedule);
    } else {
      for (const char* name : {"none", "pair"}) run(name, schedule);
    }
  }
  return faults != 0;
}
