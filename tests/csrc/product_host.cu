// SPDX-License-Identifier: Apache-2.0
// What CUTLASS says on the host of the kernels that mx_matmul dispatches to: whether they take what the choice says they take,
// and where they read scales. -DARCH=100 or 120.
#include <cstdio>

#if ARCH == 100
#include "mx/product_sm100.cuh"
#else
#include "mx/product_sm120.cuh"
#endif
// after CUTLASS
#include "policy/gemm.cpp"
#include "policy/mx.cpp"

using namespace lrk;

#if ARCH == 100
template <bool kWide>
using Kernel = typename ProductSm100<kWide>::Kernel;
#else
template <bool kWide>
using Kernel = typename ProductSm120<kWide>::Kernel;
#endif

int g_wrong = 0;

template <bool kWide>
void fits() {
  alignas(16) static uint8_t memory[16];
  int taken = 0, refused = 0;
  for (int64_t T : {1, 2, 63, 64, 127, 128, 129, 1000, 4096, 8388480, 8388481})
    for (int64_t O : {7, 8, 64, 100, 128, 136, 4096, 14336, 8388480, 8388488})
      for (int64_t K : {32, 64, 96, 128, 160, 256, 384, 416, 4096, 11008, 14336, 33, 40})
        for (int32_t R : {0, 8, 16, 24, 64, 72, 128, 512, 1, 4, 20}) {
          const MxProductConfig config =
              choose_mx_product({T, O, K, R, kWide, DType::kBF16, true}, {Device::kCUDA, ARCH});
          const MxProductParams p{.a = memory,
                                  .a_scales = memory,
                                  .b = memory,
                                  .b_scales = memory,
                                  .y = memory,
                                  .bias = memory,
                                  .s = memory,
                                  .u = memory,
                                  .T = T,
                                  .O = O,
                                  .K = K,
                                  .R = R,
                                  .wide = kWide,
                                  .alpha = 1.f};
          const bool can = product_fits<Kernel<kWide>>(product_arguments<Kernel<kWide>>(p, {memory, memory}));
          const bool sides =
              T <= kMxProductSide && O <= kMxProductSide;  // of a launch, which CUTLASS does not ask here
          if (config.fits != (can && sides))
            ++g_wrong, std::printf("T=%ld O=%ld K=%ld R=%d: %d, %d\n", T, O, K, R, config.fits, can);
          ++(config.fits ? taken : refused);
        }
  using Mainloop = typename Kernel<kWide>::CollectiveMainloop;
  std::printf("bits %d: %d taken, %d refused, %d stages, %d bytes of shared memory, %d threads\n", kWide ? 8 : 4, taken,
              refused, Mainloop::DispatchPolicy::Stages, Kernel<kWide>::SharedStorageSize,
              Kernel<kWide>::MaxThreadsPerBlock);
}

// Rows of A and of B, and blocks.
void layouts() {
  using Config = typename Kernel<false>::CollectiveMainloop::Sm1xxBlkScaledConfig;
  int places = 0;
  for (int T : {1, 31, 128, 129, 300, 513})
    for (int O : {8, 128, 200, 1024})
      for (int G : {1, 3, 4, 5, 13, 64}) {
        const auto shape = cute::make_shape(T, O, G * kMxBlock, 1);
        const auto a = Config::tile_atom_to_shape_SFA(shape), b = Config::tile_atom_to_shape_SFB(shape);
        g_wrong += cute::cosize(cute::filter_zeros(a)) != swizzled_bytes(T, G);
        g_wrong += cute::cosize(cute::filter_zeros(b)) != swizzled_bytes(O, G);
        for (int g = 0; g < G; ++g) {
          for (int t = 0; t < T; ++t, ++places)
            g_wrong += a(cute::make_coord(t, g * kMxBlock + t % kMxBlock, 0)) != swizzled_scale(t, g, G);
          for (int o = 0; o < O; ++o, ++places)
            g_wrong += b(cute::make_coord(o, g * kMxBlock + o % kMxBlock, 0)) != swizzled_scale(o, g, G);
        }
      }
  std::printf("layouts: %d places, %d wrong\n", places, g_wrong);
}

int main() {
  layouts();
  fits<false>();
  fits<true>();
  return g_wrong != 0;
}
