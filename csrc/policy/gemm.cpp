// SPDX-License-Identifier: Apache-2.0
// GEMMs of our own: where one is taken, and its tiles.
#include "gemm.h"

#include "choice.h"
#include "tuned.h"

namespace lrk {

Answer explain(const GemmConfig& c, const GemmShape& s) {
  const GemmTiles tiles = c.fits ? gemm_tiles(s.T, s.N, c.tile_n, c.cluster) : GemmTiles{};
  return {{{"fits", c.fits},
           {"pays", c.pays},
           {"tile_n", int64_t{c.tile_n}},
           {"cluster", int64_t{c.cluster}},
           {"tiles", int64_t{tiles.count} * tiles.cluster}},
          text(c.pays ? "base product and low-rank term in one kernel where LRKERN_FUSED=1: "
                      : "the base product, then the low-rank term: ",
               c.why)};
}

// bf16 factors that lie as W does, in whole vectors, are read as they are.
size_t tail_bytes(const LowRankProduct& p) {
  const bool alike = (p.along_n ? p.stride_n : p.stride_r) == 1;
  const bool direct = p.factor_dtype == DType::kBF16 && alike && whole_vectors(p.s, p.R) &&
                      whole_vectors(p.u, p.along_n ? p.stride_r : p.stride_n);
  return direct ? 0 : (p.T + p.N) * tail_columns(p.R, p.factor_dtype) * sizeof(bf16);
}

GemmConfig choose_gemm(const GemmShape& s, Target target) {
  const auto no = [](const char* why) { return GemmConfig{false, false, 0, 0, why}; };
  if (target.device != Device::kCUDA || target.arch != 90) return no("kernels of their own are of sm_90a");
  if (s.dtype == DType::kF32) return no("its products are of 16 bits, x has 32");
  if (!s.aligned || s.K % 8 || s.N % 8) return no("rows of x, W and y are not whole vectors of 16 bytes");
  if (!s.T || !s.N || !s.K || s.T > kMaxGemmSide || s.N > kMaxGemmSide || s.K > kMaxGemmSide)
    return no("sizes lie in 1..2^30");
  if (ceil_div(s.T, int64_t{kTileM}) * ceil_div(s.N, int64_t{128}) > kMaxGemmSide)
    return no("there are over 2^30 tiles");
  const int32_t cluster = s.T > kTileM ? 2 : 1, sms = tuned(target.arch).sms;
  // Rounds of tiles, each as long as its columns and a store of them.
  const auto cost = [&](int32_t tile_n) {
    return ceil_div(int64_t{gemm_tiles(s.T, s.N, tile_n, cluster).count} * cluster, int64_t{sms}) * (tile_n + 16);
  };
  const int32_t tile_n = cost(128) < cost(256) ? 128 : 256;
  const int64_t tiles = int64_t{gemm_tiles(s.T, s.N, tile_n, cluster).count} * cluster;
  if (2 * tiles < sms) return {true, false, tile_n, cluster, "tiles of 128 rows are too few for half of the GPU"};
  return {true, true, tile_n, cluster, "x and y go through memory once less"};
}

}  // namespace lrk
