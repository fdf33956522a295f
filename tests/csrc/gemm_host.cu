// SPDX-License-Identifier: Apache-2.0
// What CUTLASS says on the host of the kernels that LoRA's ops dispatch to on sm_100a: whether they take what the choice says
// they take.
#include <cstdio>

#include "lora/gemm_sm100.cuh"
// after CUTLASS
#include "policy/gemm.cpp"
#include "policy/lora.cpp"

using namespace lrk;

int g_wrong = 0;

template <class T, bool kAlongN>
void fits(DType dtype) {
  using Gemm = LoraGemmSm100<T, kAlongN>;
  alignas(16) static uint8_t memory[16];
  int taken = 0, refused = 0;
  for (int64_t tokens : {1, 2, 64, 127, 128, 129, 1000, 8192, 8388480, 8388481})
    for (int64_t N : {7, 8, 64, 100, 128, 136, 4096, 14336, 8388480, 8388488})
      for (int64_t K : {8, 16, 64, 72, 128, 1000, 4096, 14336, 33, 20})
        for (int32_t R : {0, 1, 8, 16, 24, 64, 72, 128, 512})
          for (DType factor : {dtype, DType::kF32}) {
            const GemmShape shape{tokens, N, K, R, dtype, factor, true};
            const GemmConfig config = choose_lora_gemm(shape, true, {Device::kCUDA, 100});
            LoraGemmParams p{};
            p.y = memory, p.bias = memory, p.x = memory, p.T = tokens, p.N = N, p.K = K, p.x_pitch = K;
            p.w = {memory, kAlongN ? N : 1, kAlongN ? 1 : K};
            const int32_t columns = R ? static_cast<int32_t>(tail_columns(R, factor)) : 0;
            auto* of = reinterpret_cast<const bf16*>(memory);
            const bool can = Gemm::fits(Gemm::arguments(p, {of, of, columns, kAlongN ? N : columns, columns}));
            const int64_t m = ceil_div(tokens, int64_t{128}), n = ceil_div(N, int64_t{128});
            const bool sides =
                m <= kMaxTiles && n <= kMaxTiles && m * n <= kMaxGemmSide;  // of a launch, not asked of CUTLASS
            if (config.fits != (can && sides))
              ++g_wrong, std::printf("T=%ld N=%ld K=%ld R=%d: %d, %d\n", tokens, N, K, R, config.fits, can);
            ++(config.fits ? taken : refused);
            g_wrong += choose_lora_gemm(shape, false, {Device::kCUDA, 100}).fits;
          }
  std::printf("%s along %s: %d taken, %d refused, %d stages, %d bytes of shared memory, %d threads\n", name_of(dtype),
              kAlongN ? "N" : "K", taken, refused, Gemm::Main::DispatchPolicy::Stages, Gemm::Kernel::SharedStorageSize,
              Gemm::Kernel::MaxThreadsPerBlock);
}

int main() {
  fits<bf16, false>(DType::kBF16);
  fits<bf16, true>(DType::kBF16);
  fits<f16, false>(DType::kF16);
  fits<f16, true>(DType::kF16);
  return g_wrong != 0;
}
