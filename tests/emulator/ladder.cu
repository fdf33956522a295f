// SPDX-License-Identifier: Apache-2.0
// Kernels whose measured times are public, from slow to fast, to hold the traffic model against (tests/tools/test_ladder.py):
// the steps of S. Boehm's worklog "How to Optimize a CUDA Matmul Kernel for cuBLAS-like Performance" with its tile sizes;
// the transposes of NVIDIA's "An Efficient Matrix Transpose in CUDA C/C++"; copies with some loads in flight. C = A B, all
// [n, n] row-major fp32; `depth` of the k are multiplied, as all steps of k cost alike.
#include <string>

#include "launch.cuh"
#include "ptx.cuh"

namespace lrk {
namespace {

struct Gemm {
  const float *a, *b;
  float* c;
  int n, depth;
};
struct Copy {
  const float* from;
  float* to;
  int n;
};

__device__ __forceinline__ float4& vector_at(float* p) { return *reinterpret_cast<float4*>(p); }
__device__ __forceinline__ float4 vector_at(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Neighbours in a warp have neighbouring rows of A and C.
__global__ void __launch_bounds__(1024) gemm_naive_kernel(Gemm p) {
  const int row = static_cast<int>(blockIdx.x * 32 + threadIdx.x),
            col = static_cast<int>(blockIdx.y * 32 + threadIdx.y);
  float sum = 0.f;
  for (int k = 0; k < p.depth; ++k) sum += p.a[row * p.n + k] * p.b[k * p.n + col];
  p.c[row * p.n + col] = sum;
}

// Neighbours have neighbouring columns.
__global__ void __launch_bounds__(1024) gemm_coalesced_kernel(Gemm p) {
  const int row = static_cast<int>(blockIdx.x * 32 + threadIdx.x / 32),
            col = static_cast<int>(blockIdx.y * 32 + threadIdx.x % 32);
  float sum = 0.f;
  for (int k = 0; k < p.depth; ++k) sum += p.a[row * p.n + k] * p.b[k * p.n + col];
  p.c[row * p.n + col] = sum;
}

__global__ void __launch_bounds__(1024) gemm_shared_kernel(Gemm p) {
  constexpr int kTile = 32;
  Smem smem;
  float *as = smem.take<float>(kTile * kTile), *bs = smem.take<float>(kTile * kTile);
  const int x = static_cast<int>(threadIdx.x) % kTile, y = static_cast<int>(threadIdx.x) / kTile;
  const float *a = p.a + blockIdx.x * kTile * p.n, *b = p.b + blockIdx.y * kTile;
  float sum = 0.f;
  for (int k0 = 0; k0 < p.depth; k0 += kTile) {
    as[y * kTile + x] = a[y * p.n + x];
    bs[y * kTile + x] = b[y * p.n + x];
    sync_threads();
    a += kTile;
    b += kTile * p.n;
    for (int k = 0; k < kTile; ++k) sum += as[y * kTile + k] * bs[k * kTile + x];
    sync_threads();
  }
  p.c[(blockIdx.x * kTile + y) * p.n + blockIdx.y * kTile + x] = sum;
}

// A thread has eight rows of a column.
__global__ void __launch_bounds__(512) gemm_column_kernel(Gemm p) {
  constexpr int kTile = 64, kDepth = 8, kRows = 8;
  Smem smem;
  float *as = smem.take<float>(kTile * kDepth), *bs = smem.take<float>(kTile * kDepth);
  const int t = static_cast<int>(threadIdx.x), col = t % kTile, row = t / kTile * kRows;
  const float *a = p.a + blockIdx.y * kTile * p.n, *b = p.b + blockIdx.x * kTile;
  float sum[kRows] = {};
  for (int k0 = 0; k0 < p.depth; k0 += kDepth) {
    as[t] = a[t / kDepth * p.n + t % kDepth];
    bs[t] = b[t / kTile * p.n + t % kTile];
    sync_threads();
    a += kDepth;
    b += kDepth * p.n;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const float right = bs[k * kTile + col];
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i] += as[(row + i) * kDepth + k] * right;
    }
    sync_threads();
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) p.c[(blockIdx.y * kTile + row + i) * p.n + blockIdx.x * kTile + col] = sum[i];
}

// A thread has a square of 8 by 8. With kVectors global memory is read four floats at a time, and A's tile is turned.
template <bool kVectors>
__global__ void __launch_bounds__(256) gemm_square_kernel(Gemm p) {
  constexpr int kTile = 128, kDepth = 8, kSide = 8, kThreads = 256;
  Smem smem;
  float *as = smem.take<float>(kTile * kDepth), *bs = smem.take<float>(kTile * kDepth);
  const int t = static_cast<int>(threadIdx.x), col = t % (kTile / kSide) * kSide, row = t / (kTile / kSide) * kSide;
  const float *a = p.a + blockIdx.y * kTile * p.n, *b = p.b + blockIdx.x * kTile;
  float sum[kSide][kSide] = {};
  for (int k0 = 0; k0 < p.depth; k0 += kDepth) {
    if constexpr (kVectors) {
      const int r = t / (kDepth / 4), k = t % (kDepth / 4) * 4;
      const float4 v = vector_at(a + r * p.n + k);
      as[k * kTile + r] = v.x;
      as[(k + 1) * kTile + r] = v.y;
      as[(k + 2) * kTile + r] = v.z;
      as[(k + 3) * kTile + r] = v.w;
      vector_at(bs + t * 4) = vector_at(b + t / (kTile / 4) * p.n + t % (kTile / 4) * 4);
    } else {
#pragma unroll
      for (int j = 0; j < kTile * kDepth / kThreads; ++j) {
        const int i = t + j * kThreads;
        as[i] = a[i / kDepth * p.n + i % kDepth];
        bs[i] = b[i / kTile * p.n + i % kTile];
      }
    }
    sync_threads();
    a += kDepth;
    b += kDepth * p.n;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float left[kSide], right[kSide];
#pragma unroll
      for (int i = 0; i < kSide; ++i) left[i] = kVectors ? as[k * kTile + row + i] : as[(row + i) * kDepth + k];
#pragma unroll
      for (int j = 0; j < kSide; ++j) right[j] = bs[k * kTile + col + j];
#pragma unroll
      for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int j = 0; j < kSide; ++j) sum[i][j] += left[i] * right[j];
    }
    sync_threads();
  }
#pragma unroll
  for (int i = 0; i < kSide; ++i)
#pragma unroll
    for (int j = 0; j < kSide; j += 4)
      vector_at(p.c + (blockIdx.y * kTile + row + i) * p.n + blockIdx.x * kTile + col + j) =
          make_float4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]);
}

// A warp has 64 by 64, in four pieces of 64 by 16 of which a thread has 8 by 4.
__global__ void __launch_bounds__(128) gemm_warp_kernel(Gemm p) {
  constexpr int kTile = 128, kDepth = 16, kWarp = 64, kPieces = 4, kPiece = kWarp / kPieces, kM = 8, kN = 4;
  Smem smem;
  float *as = smem.take<float>(kTile * kDepth), *bs = smem.take<float>(kTile * kDepth);
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  const int row = warp / 2 * kWarp + lane / (kPiece / kN) * kM, col = warp % 2 * kWarp + lane % (kPiece / kN) * kN;
  const float *a = p.a + blockIdx.y * kTile * p.n, *b = p.b + blockIdx.x * kTile;
  float sum[kM][kPieces * kN] = {};
  for (int k0 = 0; k0 < p.depth; k0 += kDepth) {
#pragma unroll
    for (int j = 0; j < kTile * kDepth / 4 / 128; ++j) {
      const int i = t + j * 128;
      const int r = i / (kDepth / 4), k = i % (kDepth / 4) * 4;
      const float4 v = vector_at(a + r * p.n + k);
      as[k * kTile + r] = v.x;
      as[(k + 1) * kTile + r] = v.y;
      as[(k + 2) * kTile + r] = v.z;
      as[(k + 3) * kTile + r] = v.w;
      vector_at(bs + i * 4) = vector_at(b + i / (kTile / 4) * p.n + i % (kTile / 4) * 4);
    }
    sync_threads();
    a += kDepth;
    b += kDepth * p.n;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float left[kM], right[kPieces * kN];
#pragma unroll
      for (int i = 0; i < kM; ++i) left[i] = as[k * kTile + row + i];
#pragma unroll
      for (int j = 0; j < kPieces * kN; ++j) right[j] = bs[k * kTile + col + j / kN * kPiece + j % kN];
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kPieces * kN; ++j) sum[i][j] += left[i] * right[j];
    }
    sync_threads();
  }
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < kPieces * kN; j += kN)
      vector_at(p.c + (blockIdx.y * kTile + row + i) * p.n + blockIdx.x * kTile + col + j / kN * kPiece) =
          make_float4(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]);
}

// Tiles of 32 by 32, eight rows at a time.
constexpr int kTurn = 32, kTurnRows = 8;
__global__ void __launch_bounds__(kTurn* kTurnRows) transpose_naive_kernel(Copy p) {
  const int x = static_cast<int>(blockIdx.x * kTurn + threadIdx.x),
            y = static_cast<int>(blockIdx.y * kTurn + threadIdx.y);
#pragma unroll
  for (int j = 0; j < kTurn; j += kTurnRows) p.to[x * p.n + y + j] = p.from[(y + j) * p.n + x];
}
template <int kPitch>
__global__ void __launch_bounds__(kTurn* kTurnRows) transpose_shared_kernel(Copy p) {
  Smem smem;
  float* tile = smem.take<float>(kTurn * kPitch);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int column = static_cast<int>(blockIdx.x) * kTurn, row = static_cast<int>(blockIdx.y) * kTurn;
#pragma unroll
  for (int j = 0; j < kTurn; j += kTurnRows) tile[(y + j) * kPitch + x] = p.from[(row + y + j) * p.n + column + x];
  sync_threads();
#pragma unroll
  for (int j = 0; j < kTurn; j += kTurnRows) p.to[(column + y + j) * p.n + row + x] = tile[x * kPitch + y + j];
}

// Blocks of 128 threads, as many as are resident, walk over n vectors with kLoads of a thread under way.
template <int kLoads>
__global__ void __launch_bounds__(128) copy_kernel(Copy p) {
  const int step = static_cast<int>(gridDim.x * 128), first = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
#pragma unroll(1)
  for (int i = first; i < p.n; i += step * kLoads) {
    float4 v[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) v[j] = vector_at(p.from + int64_t{i + j * step} * 4);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) vector_at(p.to + int64_t{i + j * step} * 4) = v[j];
  }
}
// The same through shared memory, without registers: two stages of kLoads / 2.
__global__ void __launch_bounds__(128) copy_async_kernel(Copy p) {
  Smem smem;
  float* stage = smem.take<float>(4 * 128 * 4);
  const int step = static_cast<int>(gridDim.x * 128), first = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
  float* mine = stage + threadIdx.x * 4;
  for (int s = 0; s < 3; ++s) {
    cp_async_16(mine + s * 512, p.from + int64_t{first + s * step} * 4);
    cp_async_commit();
  }
#pragma unroll(1)
  for (int i = first, s = 0; i < p.n; i += step, s = (s + 1) % 4) {
    if (i + 3 * step < p.n) cp_async_16(mine + (s + 3) % 4 * 512, p.from + int64_t{i + 3 * step} * 4);
    cp_async_commit();
    cp_async_wait<3>();
    vector_at(p.to + int64_t{i} * 4) = vector_at(mine + s * 512);
  }
}

// A vector a thread; the second half of the blocks has nothing to do.
__global__ void __launch_bounds__(128) copy_half_kernel(Copy p) {
  if (blockIdx.x >= gridDim.x / 2) return;
  const int64_t i = int64_t{blockIdx.x} * 128 + threadIdx.x;
  vector_at(p.to + i * 4) = vector_at(p.from + i * 4);
}

template <class Kernel>
int run_gemm(const char* name, Kernel kernel, int tile, dim3 block, size_t floats, const Gemm& p) {
  return launch(name, kernel, dim3(p.n / tile, p.n / tile), block, 2 * smem_bytes<float>(floats), nullptr, p);
}

}  // namespace
}  // namespace lrk

// A step by its name; `count`: of gemm the depth, of copies the blocks.
extern "C" int lrk_ladder(const char* name, const float* a, const float* b, float* c, int n, int count) {
  using namespace lrk;
  const std::string step = name;
  const Gemm g{a, b, c, n, count};
  const Copy t{a, c, n};
  const dim3 turns(n / kTurn, n / kTurn), turn(kTurn, kTurnRows);
  if (step == "gemm_naive") return launch(name, gemm_naive_kernel, dim3(n / 32, n / 32), dim3(32, 32), 0, nullptr, g);
  if (step == "gemm_coalesced")
    return launch(name, gemm_coalesced_kernel, dim3(n / 32, n / 32), dim3(1024), 0, nullptr, g);
  if (step == "gemm_shared") return run_gemm(name, gemm_shared_kernel, 32, dim3(1024), 32 * 32, g);
  if (step == "gemm_column") return run_gemm(name, gemm_column_kernel, 64, dim3(512), 64 * 8, g);
  if (step == "gemm_square") return run_gemm(name, gemm_square_kernel<false>, 128, dim3(256), 128 * 8, g);
  if (step == "gemm_vectors") return run_gemm(name, gemm_square_kernel<true>, 128, dim3(256), 128 * 8, g);
  if (step == "gemm_warp") return run_gemm(name, gemm_warp_kernel, 128, dim3(128), 128 * 16, g);
  if (step == "transpose_naive") return launch(name, transpose_naive_kernel, turns, turn, 0, nullptr, t);
  if (step == "transpose_shared")
    return launch(name, transpose_shared_kernel<kTurn>, turns, turn, smem_bytes<float>(kTurn * kTurn), nullptr, t);
  if (step == "transpose_padded")
    return launch(name, transpose_shared_kernel<kTurn + 1>, turns, turn, smem_bytes<float>(kTurn * (kTurn + 1)),
                  nullptr, t);
  if (step == "copy_1") return launch(name, copy_kernel<1>, dim3(count), dim3(128), 0, nullptr, t);
  if (step == "copy_2") return launch(name, copy_kernel<2>, dim3(count), dim3(128), 0, nullptr, t);
  if (step == "copy_4") return launch(name, copy_kernel<4>, dim3(count), dim3(128), 0, nullptr, t);
  if (step == "copy_8") return launch(name, copy_kernel<8>, dim3(count), dim3(128), 0, nullptr, t);
  if (step == "copy_half") return launch(name, copy_half_kernel, dim3(count), dim3(128), 0, nullptr, t);
  if (step == "copy_async")
    return launch(name, copy_async_kernel, dim3(count), dim3(128), smem_bytes<float>(2048), nullptr, t);
  return kInvalidConfiguration;
}
