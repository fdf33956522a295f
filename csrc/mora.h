// SPDX-License-Identifier: Apache-2.0
// The MoRA family: how activations are folded to the side of a square matrix M [r, r] and unfolded from it. T tokens, N
// features, P slots. Row pitches are in elements; the last dimension is contiguous.
//
//   fold     H[T, P] = R F x    slot p is the sum of the columns that a map F puts there, in order, rounded once
//   unfold   Y[T, N] = base + F^T R^T H, its adjoint
//   rotation cos and sin of R, which turns chunk i of r slots by the angles i theta: (p, p + r / 2) as a pair
//
// y = base + unfold(fold(x) M^T), by the map of each side. The products with M are ATen's.
#pragma once

#include <cmath>

#include "common.h"

namespace lrk {

// Which column goes to which slot. Positions k in [0, extent) are columns k % features, more of them than there are where the
// padding is circular and fewer where chunks are dead. In cycles position k is slot k % slots; in blocks slots are
// neighbouring columns, the first features % slots of them one longer.
struct MoraMap {
  int32_t features, slots, extent;
  bool blocks;

  // The first column of a slot of blocks, and behind the last slot the end.
  LRK_HD constexpr int32_t begin(int32_t slot) const {
    const int32_t rest = features % slots;
    return slot * (features / slots) + (slot < rest ? slot : rest);
  }
  LRK_HD constexpr int32_t slot_of(int32_t column) const {
    const int32_t length = features / slots, longer = features % slots * (length + 1);
    return column < longer ? column / (length + 1) : features % slots + (column - longer) / length;
  }
};

// The maps of a type: 1 cycles in, cycles out; 2 blocks, blocks; 3 blocks, cycles; 4 cycles, blocks; 6 `chunks` chunks of r
// columns each, which are cycles that end after one round, and cycles of all of them out.
constexpr bool is_mora_type(int64_t type) { return (type >= 1 && type <= 4) || type == 6; }
constexpr MoraMap mora_input_map(int64_t type, int64_t features, int64_t rank, int64_t chunks, bool circular) {
  const int64_t padded = circular ? ceil_div(features, rank) * rank : features, slots = chunks * rank;
  const bool blocks = type == 2 || type == 3;
  const int64_t extent = blocks ? features : type == 6 && slots < padded ? slots : padded;
  return {static_cast<int32_t>(features), static_cast<int32_t>(slots), static_cast<int32_t>(slots ? extent : 0),
          blocks};
}
constexpr MoraMap mora_output_map(int64_t type, int64_t features, int64_t rank, int64_t chunks) {
  const int64_t slots = chunks * rank;
  return {static_cast<int32_t>(features), static_cast<int32_t>(slots), static_cast<int32_t>(slots ? features : 0),
          type == 2 || type == 4};
}
constexpr int64_t kMaxMoraFeatures = int64_t{1} << 28;  // and slots: positions are counted in 32 bits

// cos [chunks, r / 2], then sin. theta_p = 10000^(-2 p / r), chunk i turns by i theta_p. Made in fp64, so that all devices
// round the same numbers.
struct MoraRotationParams {
  float* table;
  int64_t chunks, rank;
};
struct Turn {
  double cos, sin;
};
LRK_HD double mora_frequency(int64_t p, int64_t rank) {  // in turns
  constexpr double kLog2Base = 13.287712379549449, kPerTurn = 0.15915494309189535;
  return kPerTurn * exp2(-2.0 * kLog2Base * static_cast<double>(p) / static_cast<double>(rank));
}
LRK_HD Turn mora_turn(double turns) {
  constexpr double kQuarter = 1.5707963267948966;
  const double x = kQuarter * (turns - rint(turns)), z = x * x;  // a quarter of the angle, at most pi / 4
  double c = 1, s = 1;
  for (int n = 16; n > 0; n -= 2) {  // Taylor's series, to 1e-17
    c = 1 - z * c / (n * (n - 1));
    s = 1 - z * s / (n * (n + 1));
  }
  s *= x;
  for (int i = 0; i < 2; ++i) {  // twice the angle, twice
    const double both = 2 * s * c;
    c = 1 - 2 * s * s;
    s = both;
  }
  return {c, s};
}

struct MoraFoldParams {
  const void* x;          // [T, N] dtype
  void* h;                // [T, P] h_dtype, contiguous
  const float* rotation;  // table of P / r chunks, or null
  int64_t T, x_pitch;
  MoraMap map;
  int32_t rank;
  DType dtype, h_dtype;
};

struct MoraUnfoldParams {
  void* y;           // [T, N] dtype
  const void* base;  // [T, N] dtype; y itself to add in place; null for zeros
  const void* h;     // [T, P] h_dtype, contiguous
  const float* rotation;
  int64_t T, y_pitch, base_pitch;
  MoraMap map;
  int32_t rank;
  DType dtype, h_dtype;
};

// Type 6 has as many slots as columns. It goes `rows` tokens at a time, so that what is between fold and product stays in the
// cache, and no second copy of x in memory.
int64_t choose_mora_rows(int64_t slots, Target target);

LRK_KERNEL(mora_rotation, MoraRotationParams)
LRK_KERNEL(mora_fold, MoraFoldParams)
LRK_KERNEL(mora_unfold, MoraUnfoldParams)

}  // namespace lrk
