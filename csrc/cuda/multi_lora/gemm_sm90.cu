// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias + the sum over slots of D(S B) and dx = dy W + the like, by the mainloop of sm_90a with its tail of pages.
// Blocks as of lora/gemm_sm90.cu.
#include "gemm_sm90.cuh"
#include "multi_lora/gemm.cuh"

namespace lrk {
namespace {

using sm90::Gemm, sm90::Tail;

template <class T, bool kAlongN, bool kDropout, int kTileN>
using PageGemm = Gemm<T, kAlongN ? Major::kMN : Major::kK, Tail::kPages, kDropout, kTileN>;
template <class T, bool kAlongN, bool kDropout, int kTileN>
__global__ void __launch_bounds__(sm90::kThreads, 1)
    multi_lora_gemm_kernel(const __grid_constant__ sm90::GemmParams p) {
  sm90::run_block<PageGemm<T, kAlongN, kDropout, kTileN>>(p);
}

template <class T, bool kAlongN, bool kDropout, int kTileN>
int run_gemm(const sm90::GemmParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(sm90::blocks_of(p.tiles)));
  return launch("multi_lora_gemm", multi_lora_gemm_kernel<T, kAlongN, kDropout, kTileN>, grid, dim3(sm90::kThreads),
                PageGemm<T, kAlongN, kDropout, kTileN>::kSmem, stream,
                LaunchOptions{.cluster = p.tiles.cluster, .after_predecessor = true}, p);
}

}  // namespace

int multi_lora_gemm_sm90(const MultiLoraGemmParams& p, const PageLists& lists, const GemmTiles& tiles, Stream stream) {
  const Adapters& d = p.adapters;
  const bool along_n = p.w.stride_n == 1;
  sm90::GemmParams g{.M = static_cast<int32_t>(d.T),
                     .N = static_cast<int32_t>(p.N),
                     .steps = static_cast<int32_t>(ceil_div(p.K, int64_t{kTileK})),
                     .tiles = tiles,
                     .bias = p.bias,
                     .seed = d.seed,
                     .pages = {lists.entries, lists.counts, lists.owners, p.s, lists.capacity,
                               static_cast<int32_t>(d.K), static_cast<int32_t>(kPageRanks * d.M), d.dropout_p}};
  int error = sm90::map_operands(&g.a, &g.b, {p.x, d.T, p.K, p.x_pitch},
                                 {p.w.data, p.K, p.N, along_n ? p.w.stride_r : p.w.stride_n}, along_n, tiles.tile_n);
  if (!error) error = make_tensor_map(&g.u, {p.pool, 2, 2, {p.N, d.P}, {2 * p.N}, {64, kPageK}, Swizzle::k128});
  if (!error) error = sm90::map_result(&g.y, p.y, d.T, p.N);
  if (error) return error;
  return with_bool(tiles.tile_n == 256, [&](auto wide) {
    constexpr int kTileN = decltype(wide)::value ? 256 : 128;
    if (!along_n) return d.dropout_p ? kInvalidConfiguration : run_gemm<bf16, false, false, kTileN>(g, stream);
    return d.dropout_p ? run_gemm<bf16, true, true, kTileN>(g, stream) : run_gemm<bf16, true, false, kTileN>(g, stream);
  });
}

}  // namespace lrk
