// SPDX-License-Identifier: Apache-2.0
// What _C.so says of itself, and the thread pool its CPU kernels run on.
#include "check.h"

#if !defined(LRK_CUDA_ARCHS)
#define LRK_CUDA_ARCHS ""
#endif

namespace lrk::ops {
namespace {

void torch_runner(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* ctx) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { body(b, e, ctx); });
}

const bool g_bound = [] {
  g_parallel_runner = torch_runner;
  g_parallel_threads = [] { return static_cast<int64_t>(torch::stable::get_num_threads()); };
  return true;
}();

std::string build_info() {
  (void)g_bound;
#if defined(LRK_WITH_CUDA)
  constexpr const char* with_cuda = "true";
#else
  constexpr const char* with_cuda = "false";
#endif
  std::ostringstream out;
  out << "{\"target_abi\": \"" << (TORCH_TARGET_VERSION >> 56) << '.' << ((TORCH_TARGET_VERSION >> 48) & 0xff)
      << "\", \"with_cuda\": " << with_cuda << ", \"cuda_archs\": \"" << LRK_CUDA_ARCHS << "\", \"cpu_isa\": \""
      << lrk::name_of(cpu_isa()) << "\", \"compiler\": \"" << __VERSION__ << "\"}";
  return out.str();
}

}  // namespace
}  // namespace lrk::ops

LRK_OP(build_info, "() -> str")
