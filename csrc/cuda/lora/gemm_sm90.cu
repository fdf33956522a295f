// SPDX-License-Identifier: Apache-2.0
// y = c x W^T + bias + D(S B^T) and dx = dz W + D(dS A) by the mainloop of sm_90a: the tail is [S' U'] of tail.cuh. A block of
// 384 threads has an SM to itself: 168 registers a thread, moved between warpgroups, and 224 KB.
#include "gemm_sm90.cuh"
#include "lora/tail.cuh"

namespace lrk {
namespace {

using sm90::Gemm, sm90::Tail;

template <class T, bool kAlongN, bool kDropout, int kTileN>
using LoraGemm = Gemm<T, kAlongN ? Major::kMN : Major::kK, Tail::kColumns, kDropout, kTileN>;
template <class T, bool kAlongN, bool kDropout, int kTileN>
__global__ void __launch_bounds__(sm90::kThreads, 1) lora_gemm_kernel(const __grid_constant__ sm90::GemmParams p) {
  sm90::run_block<LoraGemm<T, kAlongN, kDropout, kTileN>>(p);
}

template <class T, bool kAlongN, bool kDropout, int kTileN>
int run_gemm(const sm90::GemmParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(sm90::blocks_of(p.tiles)));
  return launch("lora_gemm", lora_gemm_kernel<T, kAlongN, kDropout, kTileN>, grid, dim3(sm90::kThreads),
                LoraGemm<T, kAlongN, kDropout, kTileN>::kSmem, stream,
                LaunchOptions{.cluster = p.tiles.cluster, .after_predecessor = p.tail_steps > 0}, p);
}

}  // namespace

int lora_gemm_sm90(const LoraGemmParams& p, const GemmTail& tail, const GemmTiles& tiles, Stream stream) {
  const bool along_n = p.w.stride_n == 1;
  sm90::GemmParams g{.M = static_cast<int32_t>(p.T),
                     .N = static_cast<int32_t>(p.N),
                     .steps = static_cast<int32_t>(ceil_div(p.K, int64_t{kTileK})),
                     .tail_steps = ceil_div(tail.columns, kTileK),
                     .tail_products = ceil_div((tail.columns + kTileK - 1) % kTileK + 1, 16),
                     .tiles = tiles,
                     .column_scale = p.base_scale,
                     .bias = p.bias,
                     .keeps_base = p.base != nullptr,
                     .dropout = p.dropout,
                     .seed = p.seed};
  int error = sm90::map_operands(&g.a, &g.b, {p.x, p.T, p.K, p.x_pitch},
                                 {p.w.data, p.K, p.N, along_n ? p.w.stride_r : p.w.stride_n}, along_n, tiles.tile_n);
  if (!error && tail.columns)
    error = sm90::map_operands(&g.s, &g.u, {tail.s, p.T, tail.columns, tail.s_pitch},
                               {tail.u, tail.columns, p.N, tail.u_pitch}, along_n, tiles.tile_n);
  if (!error) error = sm90::map_result(&g.y, p.y, p.T, p.N);
  if (!error && p.base) error = sm90::map_result(&g.base, p.base, p.T, p.N);
  if (error) return error;
  const bool dropout = p.dropout.threshold && tail.columns;
  if (dropout && (p.base || p.base_scale)) return kInvalidConfiguration;  // of no op: the mask is the backward's
  return with_bool(p.dtype == DType::kBF16, [&](auto is_bf16) {
    using T = std::conditional_t<decltype(is_bf16)::value, bf16, f16>;
    return with_bool(tiles.tile_n == 256, [&](auto wide) {
      constexpr int kTileN = decltype(wide)::value ? 256 : 128;
      if (!along_n) return dropout ? kInvalidConfiguration : run_gemm<T, false, false, kTileN>(g, stream);
      return dropout ? run_gemm<T, true, true, kTileN>(g, stream) : run_gemm<T, true, false, kTileN>(g, stream);
    });
  });
}

}  // namespace lrk
