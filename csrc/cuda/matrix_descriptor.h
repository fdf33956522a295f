// SPDX-License-Identifier: Apache-2.0
// The 64-bit words by which wgmma finds its operands in shared memory, made and read: the kernels make them, the emulator
// reads them, and tests hold both against cute's layouts.
#pragma once

#include "tensor_map.h"

namespace lrk {

// Operands are tiles [rows, K] of 16-bit elements, rows being M of A and N of B. K-major: K is contiguous, as in x W^T.
// MN-major: the rows are, as in dY W. A row of memory is a swizzle's span long; 8 of them are a brick.
//   stride   K-major: bytes from 8 rows to the next 8.      MN-major: from 8 of K to the next 8.
//   leading  K-major: from 8 of K to the next, kNone only.  MN-major: from one span of rows to the next.
// For MN-major without a swizzle the two change places.
enum class Major : int { kK = 0, kMN = 1 };
struct MatrixDescriptor {
  uint32_t start;  // address in shared memory: below 2^18, a multiple of 16
  uint32_t leading, stride;
  Swizzle swizzle;
};

LRK_HD constexpr uint64_t packed(const MatrixDescriptor& d) {
  const uint64_t kind = d.swizzle == Swizzle::kNone ? 0 : 4 - static_cast<uint64_t>(d.swizzle);  // 128 is 1, 64 2, 32 3
  return (d.start >> 4 & 0x3fffu) | uint64_t{d.leading >> 4 & 0x3fffu} << 16 | uint64_t{d.stride >> 4 & 0x3fffu} << 32 |
         kind << 62;
}
LRK_HD constexpr MatrixDescriptor unpacked(uint64_t bits) {
  const int kind = static_cast<int>(bits >> 62);
  return {static_cast<uint32_t>(bits & 0x3fff) << 4, static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4, kind ? static_cast<Swizzle>(4 - kind) : Swizzle::kNone};
}

// Where element (row, k) of a 16-wide step of K lies.
LRK_HD constexpr uint32_t address_of(const MatrixDescriptor& d, uint32_t row, uint32_t k, Major major) {
  const uint32_t span = span_of(d.swizzle);
  uint32_t at = d.start;
  if (major == Major::kK) {
    at += row / 8 * d.stride + row % 8 * span;
    at += d.swizzle == Swizzle::kNone ? k / 8 * d.leading + k % 8 * 2 : k * 2;
  } else if (d.swizzle == Swizzle::kNone) {
    at += row % 8 * 2 + row / 8 * d.stride + k % 8 * 16 + k / 8 * d.leading;
  } else {
    at += row % (span / 2) * 2 + row / (span / 2) * d.leading + k % 8 * span + k / 8 * d.stride;
  }
  return swizzled(at, d.swizzle);
}

}  // namespace lrk
