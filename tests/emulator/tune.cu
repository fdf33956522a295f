// SPDX-License-Identifier: Apache-2.0
// What a GPU takes where the model of docs/perf.md has constants, a JSON object a line (tools/tune.py):
//   tune latency       cycles of a dependent load from shared memory, L1, L2 and DRAM
//   tune ladder        the steps of ladder.cu
//   tune sweep         lora_shrink with every span of chunks that it can be split in, bits compared; which constants of
//                      policy/tuned.h would have chosen best
// `small` after it: sizes that the emulator can run, where times mean nothing.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "ladder.cu"
#include "lora.h"

// The launcher asks the choice, which is this program's: splits of the same kernels, without compiling them again.
namespace lrk {
ShrinkSplit g_split;
}
#define choose_lora_shrink chosen_lora_shrink
#include "policy/lora.cpp"
#undef choose_lora_shrink
namespace lrk {
ShrinkSplit choose_lora_shrink(int64_t, int64_t, int32_t, Target) { return g_split; }
}  // namespace lrk

namespace lrk {
namespace {

#if defined(LRK_EMULATE)
void* device_memory(size_t bytes) { return std::aligned_alloc(128, (bytes + 127) / 128 * 128); }
void device_free(void* p) { std::free(p); }
int copy_bytes(void* to, const void* from, size_t bytes) { return std::memcpy(to, from, bytes), 0; }
int finish() { return 0; }
#else
void* device_memory(size_t bytes) {
  void* p = nullptr;
  return cudaMalloc(&p, bytes) == cudaSuccess ? p : nullptr;
}
void device_free(void* p) { cudaFree(p); }
int copy_bytes(void* to, const void* from, size_t bytes) { return cudaMemcpy(to, from, bytes, cudaMemcpyDefault); }
int finish() { return cudaDeviceSynchronize(); }
#endif

int failed(int error, const char* what) {
  if (error) std::fprintf(stderr, "tune: CUDA error %d in %s\n", error, what);
  return error;
}

// Memory of the device, of `count` T; empty where there is not enough.
template <class T>
struct Array {
  T* data;
  size_t count;
  explicit Array(size_t n) : data(static_cast<T*>(device_memory(n * sizeof(T)))), count(n) {}
  ~Array() { device_free(data); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
};

// Microseconds of one of `times` calls, which follow each other without a wait.
template <class Call>
double us_of(int times, const Call& call) {
  int error = call();
  if (!error) error = finish();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < times && !error; ++i) error = call();
  if (!error) error = finish();
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  return failed(error, "a timed call") ? -1.0 : took.count() / times;
}

// ---- latency

// One thread follows a chain through memory; the second round finds it in the cache it fits.
__global__ void chase_kernel(const uint32_t* next, uint32_t steps, long long* out) {
  uint32_t at = 0;
  for (uint32_t i = 0; i < steps; ++i) at = next[at];
  const long long start = clock64();
  for (uint32_t i = 0; i < steps; ++i) at = next[at];
  out[0] = clock64() - start;
  out[1] = at;
}
__global__ void chase_shared_kernel(const uint32_t* next, uint32_t count, uint32_t steps, long long* out) {
  Smem smem;
  uint32_t* chain = smem.take<uint32_t>(4096);
  for (uint32_t i = 0; i < count; ++i) chain[i] = next[i];
  uint32_t at = 0;
  const long long start = clock64();
  for (uint32_t i = 0; i < steps; ++i) at = chain[at];
  out[0] = clock64() - start;
  out[1] = at;
}

// A chain over all lines of `bytes`, in an order that no prefetcher guesses: an odd step modulo a power of two.
int chase(const char* level, size_t bytes, uint32_t most, bool shared) {
  constexpr uint32_t kLine = 32;  // words
  const auto lines = static_cast<uint32_t>(bytes / 4 / kLine);
  std::vector<uint32_t> chain(lines * size_t{kLine});
  const uint32_t step = (lines / 8 * 5) | 1;
  for (uint32_t i = 0; i < lines; ++i)
    chain[size_t{i} * kLine] = static_cast<uint32_t>((i + uint64_t{step}) % lines) * kLine;
  Array<uint32_t> next(chain.size());
  Array<long long> out(2);
  if (!next.data || !out.data) return failed(2, level);
  const uint32_t steps = lines < most ? lines : most;
  long long got[2] = {};
  int error = copy_bytes(next.data, chain.data(), chain.size() * 4);
  if (!error)
    error = shared
                ? launch("chase_shared", chase_shared_kernel, dim3(1), dim3(1), smem_bytes<uint32_t>(4096), nullptr,
                         static_cast<const uint32_t*>(next.data), static_cast<uint32_t>(chain.size()), steps, out.data)
                : launch("chase", chase_kernel, dim3(1), dim3(1), 0, nullptr, static_cast<const uint32_t*>(next.data),
                         steps, out.data);
  if (!error) error = finish();
  if (!error) error = copy_bytes(got, out.data, sizeof got);
  if (failed(error, level)) return error;
  const uint32_t expected =
      chain.empty() ? 0 : static_cast<uint32_t>(uint64_t{step} * steps * (shared ? 1 : 2) % lines) * kLine;
  if (got[1] != expected) return failed(999, "a chain that led elsewhere");
  std::printf("{\"tune\": \"latency\", \"level\": \"%s\", \"bytes\": %zu, \"cycles\": %.1f}\n", level, bytes,
              static_cast<double>(got[0]) / steps);
  return 0;
}

int latency(bool small) {
  const size_t kb = 1024, mb = kb * kb;
  int error = chase("shared", 16 * kb, 1 << 12, true);
  if (!error) error = chase("l1", 16 * kb, 1 << 12, false);
  if (!error) error = chase("l2", small ? 64 * kb : 4 * mb, 1 << 15, false);
  if (!error) error = chase("dram", small ? 128 * kb : 1024 * mb, 1 << 16, false);  // of a chain no cache holds
  return error;
}

// ---- ladder

int ladder(bool small) {
  const int n = small ? 128 : 4096;
  Array<float> a(size_t(n) * n), b(size_t(n) * n), c(size_t(n) * n);
  if (!a.data || !b.data || !c.data) return failed(2, "memory");
  std::vector<float> values(size_t(n) * n);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * 2654435761u % 1024) / 512.f - 1.f;
  if (int error = copy_bytes(a.data, values.data(), values.size() * 4)) return failed(error, "copy");
  if (int error = copy_bytes(b.data, values.data(), values.size() * 4)) return failed(error, "copy");
  std::vector<float> first, got(values.size());
  for (const char* step : {"gemm_naive", "gemm_coalesced", "gemm_shared", "gemm_column", "gemm_square", "gemm_vectors",
                           "gemm_warp", "transpose_naive", "transpose_shared", "transpose_padded"}) {
    const bool gemm = !std::strncmp(step, "gemm", 4);
    const double us = us_of(small ? 1 : 10, [&] { return lrk_ladder(step, a.data, b.data, c.data, n, n); });
    if (us < 0) return 1;
    if (int error = copy_bytes(got.data(), c.data, got.size() * 4)) return failed(error, step);
    bool right = true;
    if (gemm) {  // sums of one order: close to each other
      if (first.empty()) first = got;
      for (size_t i = 0; i < got.size(); ++i)
        right = right && std::abs(got[i] - first[i]) < 1e-3f * static_cast<float>(n);
    } else {
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) right = right && got[size_t(i) * n + j] == values[size_t(j) * n + i];
    }
    std::printf("{\"tune\": \"ladder\", \"step\": \"%s\", \"n\": %d, \"us\": %.2f, \"right\": %s}\n", step, n, us,
                right ? "true" : "false");
  }
  const int vectors = small ? 1 << 10 : 1 << 22;  // 16 bytes each; copies write n vectors of c
  if (size_t(vectors) * 4 > c.count) return failed(2, "copies");
  for (const char* step : {"copy_1", "copy_2", "copy_4", "copy_8"})
    for (int blocks : {small ? 4 : 132, small ? 8 : 132 * 8}) {
      const double us =
          us_of(small ? 1 : 20, [&] { return lrk_ladder(step, a.data, b.data, c.data, vectors, blocks); });
      if (us < 0) return 1;
      std::printf(
          "{\"tune\": \"ladder\", \"step\": \"%s\", \"n\": %d, \"blocks\": %d, \"us\": %.2f, \"right\": true}\n", step,
          vectors, blocks, us);
    }
  return 0;
}

// ---- sweep

struct Point {
  int64_t T;
  int32_t R;
  std::map<int64_t, double> us;  // by span
};

int sweep(bool small) {
  const int64_t N = small ? 2560 : 4096, most = small ? 70 : 16384;
  Array<bf16> x(most * N), u(64 * N), s(most * 64);
  Array<float> scratch(ceil_div(N, kCudaChunk) * most * 64);
  if (!x.data || !u.data || !s.data || !scratch.data) return failed(2, "memory");
  std::vector<bf16> values(most * N);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = from_float<bf16>(static_cast<float>((i * 2654435761u >> 7) % 255) / 128.f - 1.f);
  if (int error = copy_bytes(x.data, values.data(), values.size() * sizeof(bf16))) return failed(error, "copy");
  if (int error = copy_bytes(u.data, values.data() + 12345, 64 * N * sizeof(bf16))) return failed(error, "copy");
  std::vector<Point> points;
  bool all_equal = true;
  for (int32_t R : {16, 64})
    for (int64_t T : small ? std::vector<int64_t>{1, 70}
                           : std::vector<int64_t>{1, 16, 64, 256, 1024, 2048, 4096, 6144, 8192, 8200, 12288, 16384}) {
      Point point{T, R, {}};
      std::vector<uint16_t> first, got(T * R);
      for (int64_t span = 1; span < ceil_div(N, kCudaChunk) + kShrinkGroup;
           span += span == 1 ? kShrinkGroup - 1 : kShrinkGroup) {
        g_split = lora_shrink_split(N, span);
        const LoraShrinkParams p{.x = x.data,
                                 .u = {.data = u.data, .stride_r = N, .stride_n = 1},
                                 .s = s.data,
                                 .T = T,
                                 .N = N,
                                 .x_pitch = N,
                                 .R = R,
                                 .dtype = DType::kBF16,
                                 .factor_dtype = DType::kBF16,
                                 .scale = 1.f,
                                 .dropout = {},
                                 .seed = nullptr};
        const double us = us_of(small ? 1 : 20, [&] { return lora_shrink_cuda(p, scratch.data, nullptr); });
        if (us < 0) return 1;
        if (int error = copy_bytes(got.data(), s.data, got.size() * 2)) return failed(error, "copy");
        if (first.empty()) first = got;
        const bool equal = got == first;
        all_equal = all_equal && equal;
        point.us[span] = us;
        std::printf("{\"tune\": \"sweep\", \"T\": %lld, \"R\": %d, \"span\": %lld, \"us\": %.2f, \"equal\": %s}\n",
                    static_cast<long long>(T), R, static_cast<long long>(span), us, equal ? "true" : "false");
      }
      points.push_back(point);
    }
  int32_t sms = tuned(0).sms;
#if !defined(LRK_EMULATE)
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, current_device());
#endif
  for (double start : {0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0}) {  // over the fastest span of each point, on average
    double over = 0;
    for (const Point& p : points) {
      double best = p.us.begin()->second;
      for (const auto& [span, us] : p.us) best = us < best ? us : best;
      over += p.us.at(lora_shrink_split(p.T, N, p.R, sms, start).span) / best;
    }
    std::printf("{\"tune\": \"start\", \"arch\": %d, \"sms\": %d, \"start\": %g, \"over_best\": %.4f}\n", cuda_arch(),
                sms, start, over / static_cast<double>(points.size()));
  }
  return all_equal ? 0 : failed(998, "a sweep whose bits differ");
}

}  // namespace
}  // namespace lrk

int main(int argc, char** argv) {
  const bool small = argc > 2 && !std::strcmp(argv[2], "small");
  if (argc > 1 && !std::strcmp(argv[1], "latency")) return lrk::latency(small) != 0;
  if (argc > 1 && !std::strcmp(argv[1], "ladder")) return lrk::ladder(small) != 0;
  if (argc > 1 && !std::strcmp(argv[1], "sweep")) return lrk::sweep(small) != 0;
  return std::fprintf(stderr, "usage: tune latency|ladder|sweep [small]\n"), 2;
}
