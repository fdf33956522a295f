// SPDX-License-Identifier: Apache-2.0
// One planted error for each tool of compute-sanitizer: tools/gpu.py believes a tool that finds nothing in our kernels
// only where it finds the error here.  planted memcheck|racecheck|synccheck|initcheck
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace lrk {

__global__ void planted(int which, int* p, int n) {
  __shared__ int turn[64];
  const int t = static_cast<int>(threadIdx.x);
  if (which == 0) p[n + t] = t;  // out of bounds
  if (which == 1) {
    turn[t] = t;
    p[t] = turn[63 - t];  // no barrier
  }
  if (which == 2 && t % 32 < 16) __syncthreads();  // half a warp
  if (which == 3) p[t] = p[t] + 1;                 // nobody wrote it
}

}  // namespace lrk

int main(int argc, char** argv) {
  const char* const tools[] = {"memcheck", "racecheck", "synccheck", "initcheck"};
  int which = 0, *p = nullptr;
  while (argc == 2 && which < 4 && std::strcmp(argv[1], tools[which]) != 0) ++which;
  if (argc != 2 || which == 4) return std::fprintf(stderr, "usage: planted TOOL\n"), 2;
  cudaError_t error = cudaMalloc(&p, 64 * sizeof(int));
  if (!error && which != 3) error = cudaMemset(p, 0, 64 * sizeof(int));
  if (!error) lrk::planted<<<1, 64>>>(which, p, 64);
  if (!error) error = cudaDeviceSynchronize();
  std::printf("planted %s: %s\n", argv[1], cudaGetErrorString(error));
  return error != cudaSuccess;
}
