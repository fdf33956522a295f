// SPDX-License-Identifier: Apache-2.0
// A tensor map: what the tensor memory accelerator of sm_90 is told of a matrix (or a stack of them) in global memory and of
// the box of it that one copy moves. Made on the host, passed to the kernel as a __grid_constant__.
#pragma once

#include "../common.h"

namespace lrk {

// How a box lies in shared memory. Rows of `bytes` bytes; in groups of 8 rows, 16-byte chunk c of row r lies at chunk
// c ^ (r mod 8) of 8, or the like for 64 and 32: address bits 4.. are xored with bits 7.., by 3, 2 or 1 bits.
enum class Swizzle : int { kNone = 0, k32 = 1, k64 = 2, k128 = 3 };
LRK_HD constexpr uint32_t swizzled(uint32_t address, Swizzle s) {
  return address ^ (address >> 7 & ((1u << static_cast<int>(s)) - 1)) << 4;
}
LRK_HD constexpr uint32_t span_of(Swizzle s) { return 16u << static_cast<int>(s); }  // bytes of a row of the box

constexpr int kMaxMapRank = 3;

// What is asked for. The first dimension is contiguous.
struct TensorBox {
  const void* base = nullptr;           // 16-byte aligned
  int32_t item = 2;                     // bytes of an element: 1, 2 or 4
  int32_t rank = 2;                     // 1..kMaxMapRank
  int64_t size[kMaxMapRank] = {};       // elements, at least 1
  int64_t pitch[kMaxMapRank - 1] = {};  // bytes from one to the next of dimension 1, 2: multiples of 16
  int32_t box[kMaxMapRank] = {};        // elements, at most 256 a dimension; a row is a multiple of 16 bytes
  Swizzle swizzle = Swizzle::kNone;     // its span is the most a row of the box has
};

// Why the driver would refuse it, or null.
constexpr const char* refusal_of(const TensorBox& t) {
  if (reinterpret_cast<uintptr_t>(t.base) % 16) return "base is not 16-byte aligned";
  if (t.item != 1 && t.item != 2 && t.item != 4) return "elements have 1, 2 or 4 bytes";
  if (t.rank < 1 || t.rank > kMaxMapRank) return "rank lies in 1..3";
  for (int i = 0; i < t.rank; ++i) {
    if (t.size[i] < 1 || t.size[i] > int64_t{1} << 32) return "sizes lie in 1..2^32";
    if (t.box[i] < 1 || t.box[i] > 256) return "sides of the box lie in 1..256";
    if (i > 0 && (t.pitch[i - 1] % 16 || t.pitch[i - 1] < 1 || t.pitch[i - 1] >= int64_t{1} << 40))
      return "pitches are multiples of 16 below 2^40";
  }
  const int64_t row = int64_t{t.box[0]} * t.item;
  if (row % 16) return "rows of the box are multiples of 16 bytes";
  if (t.swizzle != Swizzle::kNone && row > span_of(t.swizzle))
    return "rows of the box are longer than the swizzle's span";
  return nullptr;
}

}  // namespace lrk
