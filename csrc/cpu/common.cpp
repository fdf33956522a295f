// SPDX-License-Identifier: Apache-2.0
#include "common.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace lrk {

ParallelRunner g_parallel_runner = nullptr;
int64_t (*g_parallel_threads)() = nullptr;

namespace {

CpuIsa detect_isa() {
  CpuIsa best = CpuIsa::kBaseline;
#if defined(LRK_HAVE_AVX)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = CpuIsa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      best = CpuIsa::kAvx512;
  }
#endif
  if (const char* wanted = std::getenv("LRKERN_CPU_ISA")) {
    for (CpuIsa isa : {CpuIsa::kBaseline, CpuIsa::kAvx2, CpuIsa::kAvx512})
      if (!strcmp(wanted, name_of(isa)) && isa < best) best = isa;
  }
  return best;
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = detect_isa();
  return isa;
}

}  // namespace lrk
