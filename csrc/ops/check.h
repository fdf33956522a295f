// SPDX-License-Identifier: Apache-2.0
// What every glue file needs from torch, all of it on the stable ABI (target 2.11): refusals, device and stream, scratch
// memory, and run(), the one way from an op to a kernel.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <iterator>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "common.h"

// The torch namespace of the ops. tests/emulator builds the same glue as lrkern_emulated, over the CUDA kernels on the CPU.
#if !defined(LRK_NAMESPACE)
#define LRK_NAMESPACE lrkern
#endif

// An op: its schema and lrk::ops::name, for every backend, so that what is no dense cpu or cuda tensor is refused in words of
// ours.
#define LRK_OP(name, schema)                                               \
  STABLE_TORCH_LIBRARY_FRAGMENT(LRK_NAMESPACE, m) { m.def(#name schema); } \
  STABLE_TORCH_LIBRARY_IMPL(LRK_NAMESPACE, CompositeExplicitAutograd, m) { m.impl(#name, TORCH_BOX(&lrk::ops::name)); }

extern "C" {
#if defined(LRK_EMULATE)
const char* lrk_emulator_report();
#endif
// Weak: one _C.so serves torch with and without CUDA, where these are absent.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
__attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t err, const char* file, const char* function,
                                                              uint32_t line, bool include_device_assertions,
                                                              char** error_msg);
__attribute__((weak)) void torch_c10_cuda_free_error_msg(char* error_msg);
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                        AtenTensorHandle mat2, double beta, double alpha);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
}

namespace lrk::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream out;
  out << "lrkern::" << op << ": ";
  (out << ... << args);
  throw std::runtime_error(out.str());
}

// As torch names its dtypes, in the order of ScalarType, whose numbers are part of the stable ABI.
inline std::string name_of(ScalarType t) {
  static constexpr const char* names[] = {"uint8",
                                          "int8",
                                          "int16",
                                          "int32",
                                          "int64",
                                          "float16",
                                          "float32",
                                          "float64",
                                          "complex32",
                                          "complex64",
                                          "complex128",
                                          "bool",
                                          "qint8",
                                          "quint8",
                                          "qint32",
                                          "bfloat16",
                                          "quint4x2",
                                          "quint2x4",
                                          "bits1x8",
                                          "bits2x4",
                                          "bits4x2",
                                          "bits8",
                                          "bits16",
                                          "float8_e5m2",
                                          "float8_e4m3fn",
                                          "float8_e5m2fnuz",
                                          "float8_e4m3fnuz",
                                          "uint16",
                                          "uint32",
                                          "uint64",
                                          "uint1",
                                          "uint2",
                                          "uint3",
                                          "uint4",
                                          "uint5",
                                          "uint6",
                                          "uint7",
                                          "int1",
                                          "int2",
                                          "int3",
                                          "int4",
                                          "int5",
                                          "int6",
                                          "int7",
                                          "float8_e8m0fnu",
                                          "float4_e2m1fn_x2"};
  const size_t i = static_cast<size_t>(t);
  return i < std::size(names) ? names[i] : "of a dtype that lrkern does not know";
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  switch (t.device().type()) {
    case torch::headeronly::DeviceType::Meta: return "meta";
    case torch::headeronly::DeviceType::MPS: return "mps";
    case torch::headeronly::DeviceType::XPU: return "xpu";
    case torch::headeronly::DeviceType::HPU: return "hpu";
    default: return "device type " + std::to_string(static_cast<int>(t.device().type()));
  }
}
// Which side of the contract a tensor goes to.
inline bool on_cuda(const char* op, const Tensor& t) {
#if defined(LRK_EMULATE)
  (void)op, (void)t;
  return true;
#else
  if (t.is_cpu()) return false;
  if (!t.is_cuda()) fail(op, "runs on cpu and cuda tensors, got ", device_name(t));
#if !defined(LRK_WITH_CUDA)
  fail(op, "got a cuda tensor, but this build of lrkern has no CUDA code; build it where nvcc is on PATH");
#endif
  return true;
#endif
}

// A launcher, or null in a build without CUDA code.
#if defined(LRK_WITH_CUDA) || defined(LRK_EMULATE)
#define LRK_IF_CUDA(f) f
#else
#define LRK_IF_CUDA(f) static_cast<decltype(&f)>(nullptr)
#endif

// Where a tensor is: what choices are made for and, while this lives, its device as the current one, and its stream.
struct DeviceScope {
  Target target = kCpu;
  Stream stream = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;

  DeviceScope(const char* op, const Tensor& t) {
    if (!on_cuda(op, t)) return;
#if !defined(LRK_EMULATE)
    guard.emplace(t.get_device_index());
    void* raw = nullptr;
    if (!aoti_torch_get_current_cuda_stream ||
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &raw) != AOTI_TORCH_SUCCESS)
      fail(op, "torch gave no CUDA stream for ", device_name(t));
    stream = static_cast<Stream>(raw);
#endif
    int32_t (*arch)() = LRK_IF_CUDA(cuda_arch);
    target = {Device::kCUDA, arch ? arch() : 0};
  }
};

inline void check_launch(const char* op, int code) {
  if (code == 0) return;
  std::string text = "CUDA error " + std::to_string(code);
#if defined(LRK_EMULATE)
  text += std::string(": ") + lrk_emulator_report();
#endif
  char* message = nullptr;
  if (torch_c10_cuda_check_msg && torch_c10_cuda_free_error_msg) {
    torch_c10_cuda_check_msg(code, __FILE__, op, __LINE__, false, &message);
    if (message) {
      text = message;
      torch_c10_cuda_free_error_msg(message);
    }
  }
  fail(op, "kernel launch failed: ", text);
}

// Scratch of small CPU calls, one per calling thread: an allocation costs a microsecond, as much as such a call.
struct alignas(64) SmallScratch {
  char bytes[1 << 18];
};
inline void* small_scratch() {
  static thread_local std::unique_ptr<SmallScratch> scratch;
  if (!scratch) scratch.reset(new SmallScratch);
  return scratch->bytes;
}

// The functions of a kernel, as run() takes them.
#define LRK_RUN(name) name##_workspace, name##_cpu, LRK_IF_CUDA(name##_cuda)

// Of one that has no entry point for the CPU: its choice does not fit there.
#define LRK_RUN_CUDA(name) name##_workspace, static_cast<decltype(&name##_cpu)>(nullptr), LRK_IF_CUDA(name##_cuda)

// Kernels of sm_100a and sm_120a are in a build that found CUTLASS.
#if defined(LRK_CUTLASS)
constexpr bool kCutlass = true;
#else
constexpr bool kCutlass = false;
#endif

// Kernels for one architecture that no GPU was seen to run yet are taken where LRKERN_FUSED asks for them: "1" where their
// choice says that they pay, "all" wherever they fit. Read at each call, since selftest and tests turn it.
template <class Config>
bool takes_fused(const Config& config) {
  const char* wanted = config.fits ? std::getenv("LRKERN_FUSED") : nullptr;
  const std::string_view word = wanted ? wanted : "";
  return word == "all" || (word == "1" && config.pays);
}

// Runs one kernel of a contract on the device of `t`, with its scratch memory from torch's allocator.
template <class P>
void run(const char* op, const Tensor& t, const P& p, size_t (*workspace)(const P&, Target),
         void (*cpu)(const P&, void*), int (*cuda)(const P&, void*, Stream)) {
  const DeviceScope at(op, t);
  const bool is_cpu = at.target.device == Device::kCPU;
  const size_t bytes = workspace(p, at.target);
  OptTensor scratch;
  void* ws = nullptr;
  if (is_cpu && bytes <= sizeof(SmallScratch)) {
    ws = small_scratch();
  } else if (bytes) {
    scratch = torch::stable::new_empty(t, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    ws = scratch->mutable_data_ptr();
  }
  if (is_cpu) return cpu(p, ws);
  check_launch(op, cuda(p, ws, at.stream));
}

}  // namespace lrk::ops
