// SPDX-License-Identifier: Apache-2.0
// Which element of a tile each lane holds, for the warp-wide instructions: the PTX manual's figures as functions.
// cute_maps.cpp evaluates cute's layouts over the same signatures and a test compares them element by element.
#pragma once

namespace lrk::emu {

struct Coord {
  int row, col;
};
constexpr bool operator==(Coord a, Coord b) { return a.row == b.row && a.col == b.col; }

// mma.m16n8k16 with 16-bit A and B: element `i` of lane's fragment (16-bit element for A, B; fp32 for C).
constexpr Coord mma_16816_a(int lane, int i) {  // 8 elements; A is [M = 16, K = 16]
  return {lane / 4 + 8 * (i / 2 % 2), lane % 4 * 2 + i % 2 + 8 * (i / 4)};
}
constexpr Coord mma_16816_b(int lane, int i) {  // 4 elements; B is [K = 16, N = 8]
  return {lane % 4 * 2 + i % 2 + 8 * (i / 2), lane / 4};
}
constexpr Coord mma_16816_c(int lane, int i) {  // 4 elements; C is [M = 16, N = 8]
  return {lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2};
}

// ldmatrix: 16-bit element `i` of lane's destination registers comes from matrix i / 2, at this place of its 8x8.
// The row's address was passed by lane 8 * (i / 2) + row.
constexpr Coord ldmatrix_element(int lane, int i, bool transposed) {
  const int across = lane % 4 * 2 + i % 2, along = lane / 4;
  return transposed ? Coord{across, along} : Coord{along, across};
}

// wgmma: of a warp's 16 rows, any N. A in registers is that of mma_16816.
constexpr Coord wgmma_c(int lane, int i) { return {lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2}; }

}  // namespace lrk::emu
