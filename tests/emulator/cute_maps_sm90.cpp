// SPDX-License-Identifier: Apache-2.0
// Oracle: cute's layouts of wgmma's operands and results against fragments.h and csrc/cuda/matrix_descriptor.h.
#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "../../csrc/cuda/matrix_descriptor.h"
#include "fragments.h"

using namespace cute;
using T = cutlass::bfloat16_t;
int g_differ = 0;

void said(const char* name, int elements, int differ) {
  std::printf("%s: %d elements, %d differ\n", name, elements, differ);
  g_differ += differ;
}

template <class Layout, class Mine>
void compare(const char* name, Layout layout, int values, const Mine& mine) {
  int differ = 0;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < values; ++i) {
      const int index = layout(t, i);
      const lrk::emu::Coord at = mine(t % 32, i);
      differ += index % 64 != at.row + t / 32 * 16 || index / 64 != at.col;
    }
  said(name, 128 * values, differ);
}

// A tile of 128 rows and 64 of K, as a GEMM's stage: each step of 16 by the descriptor that cute makes of it.
template <GMMA::Major kMajor, class Atom>
void compare_tile(const char* name, Atom atom, lrk::Swizzle swizzle) {
  alignas(1024) static T memory[128 * 64];
  const auto layout = tile_to_shape(atom, Shape<_128, _64>{});
  const auto place = as_position_independent_swizzle_layout(layout);
  const auto tensor = make_tensor(make_smem_ptr(memory), layout);
  constexpr lrk::Major major = kMajor == GMMA::Major::K ? lrk::Major::kK : lrk::Major::kMN;
  int differ = 0;
  for (int step = 0; step < 4; ++step) {
    const auto part = local_tile(tensor, Shape<_128, _16>{}, make_coord(0, step));
    const auto* start = reinterpret_cast<const unsigned char*>(raw_pointer_cast(part.data()));
    const auto offset = static_cast<uint32_t>(start - reinterpret_cast<const unsigned char*>(memory));
    const uint64_t bits = static_cast<uint64_t>(SM90::GMMA::make_gmma_desc<kMajor>(part)) |
                          offset >> 4;  // on the host cute knows no address
    const lrk::MatrixDescriptor d = lrk::unpacked(bits);
    differ += d.swizzle != swizzle || lrk::packed(d) != bits || d.start != offset;
    for (uint32_t row = 0; row < 128; ++row)
      for (uint32_t k = 0; k < 16; ++k) {
        const auto want = static_cast<uint32_t>(place(static_cast<int>(row), 16 * step + static_cast<int>(k))) * 2;
        differ += lrk::address_of(d, row, k, major) != want;
      }
  }
  said(name, 128 * 64, differ);
}

int main() {
  using lrk::Swizzle;
  constexpr auto K = GMMA::Major::K, MN = GMMA::Major::MN;
  compare("wgmma c, N 8", MMA_Traits<SM90_64x8x16_F32BF16BF16_SS<K, K>>::CLayout{}, 4, lrk::emu::wgmma_c);
  compare("wgmma c, N 256", MMA_Traits<SM90_64x256x16_F32BF16BF16_SS<K, K>>::CLayout{}, 128, lrk::emu::wgmma_c);
  compare("wgmma a", MMA_Traits<SM90_64x64x16_F32BF16BF16_RS<K, K>>::ALayout{}, 8, lrk::emu::mma_16816_a);
  compare_tile<K>("K-major", GMMA::Layout_K_INTER_Atom<T>{}, Swizzle::kNone);
  compare_tile<K>("K-major 32", GMMA::Layout_K_SW32_Atom<T>{}, Swizzle::k32);
  compare_tile<K>("K-major 64", GMMA::Layout_K_SW64_Atom<T>{}, Swizzle::k64);
  compare_tile<K>("K-major 128", GMMA::Layout_K_SW128_Atom<T>{}, Swizzle::k128);
  compare_tile<MN>("MN-major", GMMA::Layout_MN_INTER_Atom<T>{}, Swizzle::kNone);
  compare_tile<MN>("MN-major 32", GMMA::Layout_MN_SW32_Atom<T>{}, Swizzle::k32);
  compare_tile<MN>("MN-major 64", GMMA::Layout_MN_SW64_Atom<T>{}, Swizzle::k64);
  compare_tile<MN>("MN-major 128", GMMA::Layout_MN_SW128_Atom<T>{}, Swizzle::k128);
  return g_differ != 0;
}
