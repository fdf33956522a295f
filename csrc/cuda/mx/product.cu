// SPDX-License-Identifier: Apache-2.0
// Products of two packed operands: scales into the layout of the units that multiply by them, on any architecture, and then the
// kernel of the one at hand.
#include "cuda/tile.cuh"
#include "product.cuh"

namespace lrk {
namespace {

struct Scales {
  const uint8_t* from;  // [rows, G]
  uint8_t* to;          // swizzled_bytes(rows, G), zeros where there is no scale
  int64_t rows, G;
  LRK_HD constexpr int64_t words() const { return swizzled_bytes(rows, G) / 4; }
};

// A thread has four blocks of a row, of the first operand or the second.
__global__ __launch_bounds__(kBlockThreads) void mx_swizzle_kernel(Scales first, Scales second) {
  int64_t at = grid_thread();
  const bool behind = at >= first.words();
  const Scales s = behind ? second : first;
  if (behind) at -= first.words();
  if (at >= s.words()) return;
  const int64_t groups = ceil_div(s.G, int64_t{4}), row = at / groups, g = at % groups * 4;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row < s.rows && g + i < s.G) word |= uint32_t{s.from[row * s.G + g + i]} << 8 * i;
  *reinterpret_cast<uint32_t*>(s.to + swizzled_scale(row, g, s.G)) = word;
}

}  // namespace

int mx_swizzle_cuda(const MxProductParams& p, void* workspace, Stream stream) {
  auto* bytes = static_cast<uint8_t*>(workspace);
  const Scales a{p.a_scales, bytes, p.T, p.G()}, b{p.b_scales, bytes + swizzled_bytes(p.T, p.G()), p.O, p.G()};
  return launch("mx_swizzle", mx_swizzle_kernel, grid_of_threads(a.words() + b.words()), dim3(kBlockThreads), 0, stream,
                a, b);
}

int mx_product_cuda(const MxProductParams& p, void* workspace, Stream stream) {
  if (const int error = mx_swizzle_cuda(p, workspace, stream)) return error;
#if defined(LRK_CUTLASS)
  const auto* scales = static_cast<const uint8_t*>(workspace);
  const SwizzledScales both{scales, scales + swizzled_bytes(p.T, p.G())};
  const int32_t arch = cuda_target().arch;
  if (arch == 100) return mx_product_sm100(p, both, stream);
  if (arch == 120) return mx_product_sm120(p, both, stream);
#endif
  return kInvalidConfiguration;
}

}  // namespace lrk
