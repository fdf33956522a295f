// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias + S B^T of many rows by the mainloop of sm_90a, operands swapped: rows of W are M, rows of x its N. A box of codes
// lies where a box of A would; consumers decode it into the registers of wgmma's A operand while the products of the step
// before are under way. The tail is B and S, whose boxes are those of any A and B.
#include "codes.cuh"
#include "cuda/gemm_sm90.cuh"
#include "linear.cuh"

namespace lrk {
namespace {

using namespace sm90;

constexpr int kCodesRow = kTileK / 2;  // bytes of a row of a box, swizzled, so that 8 rows' halves meet all banks
static_assert(kCodesRow == span_of(Swizzle::k32) && kTileK == 2 * kMxBlock);

struct MxGemmParams : GemmParams {
  MxWeight w;
};

template <int kTileN>
struct MxGemm : Gemm<bf16, Major::kK, Tail::kColumns, false, kTileN> {
  using Base = Gemm<bf16, Major::kK, Tail::kColumns, false, kTileN>;
  using Base::p, Base::a, Base::ring, Base::full, Base::consumer, Base::own_row;
  static constexpr int kSums = Base::kSums, kA = 2 * Base::kA;  // kA in bytes
  static constexpr uint32_t kStageBytes = kTileM * kCodesRow + 2 * Base::kB;

  const MxWeight& w;

  __device__ __forceinline__ MxGemm(Smem& smem, const MxGemmParams& params) : Base(smem, params), w(params.w) {}

  __device__ __forceinline__ void produce() {
    bool waited = false;
    this->each_tile([&](const GemmTile& tile) {
      this->fetch(p.a, p.b, tile, p.steps, kCodesRow, kStageBytes);
      if (!waited) wait_predecessor();  // who makes S and B's terms
      waited = true;
      this->fetch(p.s, p.u, tile, p.tail_steps);
    });
  }

  // Of rows g and g + 8, the two blocks of a step, loaded a step ahead. What lies past a row's end keeps those before, whose
  // codes are zeros: where one is NaN the row is.
  struct Scales {
    const uint8_t* rows[2];
    int left;  // blocks
    uint32_t bytes[2][2];
    __device__ __forceinline__ void load() {
#pragma unroll
      for (int below = 0; below < 2; ++below) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (i < left) bytes[below][i] = rows[below][i];
        rows[below] += 2;
      }
      left -= 2;
    }
    __device__ __forceinline__ bool large() const {
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) most = bytes[i / 2][i % 2] > most ? bytes[i / 2][i % 2] : most;
      return any_lane(most > kOneProduct);
    }
  };
  // halves: where the stage has this lane's row g, 32 codes each.
  template <bool kLarge>
  static __device__ __forceinline__ void decode(uint32_t (&to)[kProducts][4], const unsigned char* const (&halves)[2],
                                                int stage, const Scales& scales) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int below = 0; below < 2; ++below)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t words[4];
        load_16(words, halves[i] + stage * kA + 8 * below * kCodesRow);
        const uint32_t byte = scales.bytes[below][i];
        const Scale scale = kLarge ? Scale(byte) : Scale::small(byte);
#pragma unroll
        for (int q = 0; q < 4; ++q) to[2 * i + q / 2][2 * (q % 2) + below] = neighbours_of<kLarge>(words[q], t, scale);
      }
  }

  __device__ __forceinline__ void consume() {
    float sum[kSums];
    uint32_t even[kProducts][4], odd[kProducts][4];
    const int row = consumer() * 64 + own_row(), swapped = row / 4 % 2;
    const auto* box = reinterpret_cast<const unsigned char*>(a) + row * kCodesRow;
    const unsigned char* const halves[2] = {box + 16 * swapped, box + 16 * (1 - swapped)};
    const uint64_t x = this->template b_word<Major::kK>(0, 0);
    this->each_tile([&](const GemmTile& tile) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] = 0.f;
      const int64_t o = tile.row + row, G = w.G(), last = w.O - 1;
      Scales scales{{w.scales + (o < last ? o : last) * G, w.scales + (o + 8 < last ? o + 8 : last) * G},
                    static_cast<int>(G),
                    {}};
      scales.load();
      const auto step = [&](uint32_t (&codes)[kProducts][4]) {
        mbarrier_wait(full + ring.stage, ring.turn);
        if (scales.large()) {
          decode<true>(codes, halves, ring.stage, scales);
        } else {
          decode<false>(codes, halves, ring.stage, scales);
        }
        scales.load();
        wgmma_fence(sum, codes);
        const uint64_t at = x + static_cast<uint32_t>(ring.stage) * (2 * Base::kB / 16);
#pragma unroll
        for (int k = 0; k < kProducts; ++k) wgmma<bf16, kTileN>(sum, codes[k], at + 32 / 16 * k, true);
        this->go_on(sum);
      };
      for (int pairs = p.steps / 2; pairs > 0; --pairs) {
        step(even);
        step(odd);
      }
      this->drain(sum);
      for (int i = p.steps / 2 * 2; i < p.steps; ++i) {
        step(even);
        this->drain(sum);
      }
      for (int i = 0; i < p.tail_steps; ++i) {
        mbarrier_wait(full + ring.stage, ring.turn);
        wgmma_fence(sum);
#pragma unroll 1
        for (int k = 0; k < (i + 1 < p.tail_steps ? kProducts : p.tail_products); ++k)
          wgmma<bf16, kTileN>(sum, this->a_word(ring.stage, k), this->template b_word<Major::kK>(ring.stage, k), true);
        this->go_on(sum);
      }
      this->drain(sum);
      if (p.bias) add_bias(sum, o);
      store(sum, tile);
    });
    if (threadIdx.x % kGroup == 0) bulk_wait_read<0>();
  }

  __device__ __forceinline__ void add_bias(float (&sum)[kSums], int64_t o) const {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t row = o + 8 * below;
      const float v = row < w.O ? to_float_fast(static_cast<const bf16*>(p.bias)[row]) : 0.f;
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        if (i / 2 % 2 == below) sum[i] += v;
    }
  }

  // Rows of y are columns of the tile: two neighbouring rows of W meet in one of the two lanes that have them, for one of two
  // tokens each. Boxes of 64 rows of W x 64 tokens, swizzled.
  __device__ __forceinline__ void store(const float (&sum)[kSums], const GemmTile& tile) const {
    bf16* mine = this->out + consumer() * Base::kOut;
    auto* bytes = reinterpret_cast<unsigned char*>(mine);
    const bool elected = threadIdx.x % kGroup == 0;
    const int g = lane_id() / 4, upper = g % 2, token = 2 * (lane_id() % 4) + upper;
#pragma unroll
    for (int half = 0; half < kTileN / static_cast<int>(kHalfColumns); ++half) {
      if (elected) bulk_wait_read<0>();
      sync_named(1 + consumer(), kGroup);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const float* v = sum + 4 * (16 * half + j) + 2 * below;
          const float other = shfl_xor(upper ? v[0] : v[1], 4);
          const uint32_t word = upper ? pack_fast<bf16>(other, v[1]) : pack_fast<bf16>(v[0], other);
          const int row = 8 * j + token, chunk = warp_id() % 4 * 2 + below;
          *reinterpret_cast<uint32_t*>(bytes + Base::swizzled_row(row, chunk) + g / 2 * 4) = word;
        }
      }
      fence_async();
      sync_named(1 + consumer(), kGroup);
      if (elected) {
        for (int i = 0; i < 2; ++i)
          bulk_store(p.y, mine + i * 64 * 64, tile.row + consumer() * 64,
                     tile.col + half * static_cast<int>(kHalfColumns) + 64 * i);
        bulk_commit();
      }
    }
  }
};

template <int kTileN>
__global__ void __launch_bounds__(kThreads, 1) mx_gemm_kernel(const __grid_constant__ MxGemmParams p) {
  run_block<MxGemm<kTileN>>(p);
}

}  // namespace

int mx_gemm_sm90(const MxLinearParams& p, const GemmTail& tail, const GemmTiles& tiles, Stream stream) {
  MxGemmParams g{{.M = static_cast<int32_t>(p.w.O),
                  .N = static_cast<int32_t>(p.T),
                  .steps = static_cast<int32_t>(ceil_div(p.w.K, int64_t{kTileK})),
                  .tail_steps = ceil_div(tail.columns, kTileK),
                  .tail_products = ceil_div((tail.columns + kTileK - 1) % kTileK + 1, 16),
                  .tiles = tiles,
                  .bias = p.bias},
                 p.w};
  const int64_t pitch = p.w.G() * kMxBytes;
  TensorMap none;
  int error =
      map_operands(&none, &g.b, {p.x, p.T, p.w.K, p.x_pitch}, {p.x, p.w.K, p.T, p.x_pitch}, false, tiles.tile_n);
  if (!error)
    error = make_tensor_map(&g.a, {p.w.codes, 1, 2, {pitch, p.w.O}, {pitch}, {kCodesRow, kTileM}, Swizzle::k32});
  if (!error && tail.columns)
    error = map_operands(&g.s, &g.u, {tail.u, p.w.O, tail.columns, tail.u_pitch},
                         {tail.s, tail.columns, p.T, tail.s_pitch}, false, tiles.tile_n);
  if (!error) error = map_result(&g.y, p.y, p.T, p.w.O);
  if (error) return error;
  const bool made = tail.columns && tail.s != p.s;  // by the launch before, which x and the codes are older than
  return with_bool(tiles.tile_n == 256, [&](auto wide) {
    constexpr int kTileN = decltype(wide)::value ? 256 : 128;
    return launch("mx_gemm", mx_gemm_kernel<kTileN>, dim3(static_cast<unsigned>(blocks_of(tiles))), dim3(kThreads),
                  MxGemm<kTileN>::kSmem, stream, LaunchOptions{.cluster = tiles.cluster, .after_predecessor = made}, g);
  });
}

}  // namespace lrk
