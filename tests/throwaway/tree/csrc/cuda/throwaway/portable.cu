// SPDX-License-Identifier: Apache-2.0
// The throwaway family on CUDA, sm_80 and up: a thread for each element.
#include "cuda/tile.cuh"
#include "throwaway.h"

namespace lrk {
namespace {

template <class X>
__global__ __launch_bounds__(kBlockThreads) void throwaway_kernel(ThrowawayParams p) {
  const int64_t i = int64_t{blockIdx.x} * kBlockThreads + threadIdx.x, t = i / p.N, n = i % p.N;
  if (t >= p.T) return;
  static_cast<X*>(p.y)[i] = from_float<X>(p.gain[n] * to_float(static_cast<const X*>(p.x)[t * p.pitch + n]));
}

}  // namespace

int throwaway_cuda(const ThrowawayParams& p, void*, Stream stream) {
  if (!p.T || !p.N) return 0;
  return with_float(p.dtype, [&]<class X>(X) {
    return launch("throwaway", throwaway_kernel<X>, grid_of_threads(p.T * p.N), dim3(kBlockThreads), 0, stream, p);
  });
}

}  // namespace lrk
