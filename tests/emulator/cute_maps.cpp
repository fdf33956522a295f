// SPDX-License-Identifier: Apache-2.0
// The oracle of fragments.h: cute's MMA_Traits and Copy_Traits layouts, evaluated on the host (headers of the nvidia-cutlass
// wheel). Prints one line per map with the number of elements that differ.
#include <cstdio>
// The order is cute's: its headers lean on what these two bring in.
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/tensor.hpp>

#include "fragments.h"

using lrk::emu::Coord;

static int g_differ = 0;

// cute numbers the elements of a tile column-major: row + rows * column.
template <class Layout>
void compare(const char* name, Layout layout, int values, int rows, Coord (*mine)(int, int), bool swap) {
  int differ = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < values; ++i) {
      const int index = layout(lane, i);
      const Coord cute_at = swap ? Coord{index / rows, index % rows} : Coord{index % rows, index / rows};
      differ += !(cute_at == mine(lane, i));
    }
  }
  std::printf("%s: %d elements, %d differ\n", name, 32 * values, differ);
  g_differ += differ;
}

template <class Op>
void compare_mma(const char* name) {
  using Traits = cute::MMA_Traits<Op>;
  std::printf("%s\n", name);
  compare("  a", typename Traits::ALayout{}, 8, 16, lrk::emu::mma_16816_a, false);
  compare("  b", typename Traits::BLayout{}, 4, 8, lrk::emu::mma_16816_b, true);  // cute's B is [N, K], ours [K, N]
  compare("  c", typename Traits::CLayout{}, 4, 16, lrk::emu::mma_16816_c, false);
}

// A copy's Src and Dst layouts send (lane, bit) to the bit of the data moved: where both agree, that source bit lands.
template <class Op>
void compare_ldmatrix(const char* name, int matrices, bool transposed) {
  using Traits = cute::Copy_Traits<Op>;
  typename Traits::SrcLayout source;
  typename Traits::DstLayout destination;
  int differ = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2 * matrices; ++i) {
      const Coord at = lrk::emu::ldmatrix_element(lane, i, transposed);
      for (int bit = 0; bit < 16; ++bit) {
        const int landed = destination(lane, 16 * i + bit);
        differ += landed != static_cast<int>(source(8 * (i / 2) + at.row, 16 * at.col + bit));
      }
    }
  }
  std::printf("%s: %d elements, %d bits differ\n", name, 64 * matrices, differ);
  g_differ += differ;
}

int main() {
  compare_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("mma m16n8k16 bf16");
  compare_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("mma m16n8k16 f16");
  compare_ldmatrix<cute::SM75_U32x4_LDSM_N>("ldmatrix x4", 4, false);
  compare_ldmatrix<cute::SM75_U32x2_LDSM_N>("ldmatrix x2", 2, false);
  compare_ldmatrix<cute::SM75_U16x8_LDSM_T>("ldmatrix x4 trans", 4, true);
  compare_ldmatrix<cute::SM75_U16x4_LDSM_T>("ldmatrix x2 trans", 2, true);
  return g_differ != 0;
}
