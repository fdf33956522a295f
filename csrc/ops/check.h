// SPDX-License-Identifier: Apache-2.0
// What every glue file needs from torch, all of it on the stable ABI (target 2.11): checks that speak, rows of a tensor,
// allocation, device and stream. Messages read `lrkern::op: argument must ..., got ...`.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"

// The torch namespace of the ops. tests/emulator builds the same glue as lrkern_emulated, over the CUDA kernels on the CPU.
#if !defined(LRK_NAMESPACE)
#define LRK_NAMESPACE lrkern
#endif

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

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ']';
  return out.str();
}

inline std::string name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "ScalarType " + std::to_string(static_cast<int>(t));
  }
}

inline DType float_dtype(const char* op, const char* arg, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kF32;
    case ScalarType::Half: return DType::kF16;
    case ScalarType::BFloat16: return DType::kBF16;
    default: fail(op, arg, " must be float32, float16 or bfloat16, got ", name_of(t.scalar_type()));
  }
}

// Shape letters beside sizes: check_shape("lora_shrink", "a", a, "[R, I]", {r, i}); -1 takes any size.
inline void check_shape(const char* op, const char* arg, const Tensor& t, const char* letters,
                        const std::vector<int64_t>& sizes) {
  bool ok = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; ok && i < sizes.size(); ++i) ok = sizes[i] < 0 || t.size(i) == sizes[i];
  if (ok) return;
  std::ostringstream want;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i) want << ", ";
    if (sizes[i] < 0) {
      want << '*';
    } else {
      want << sizes[i];
    }
  }
  fail(op, arg, " must have shape ", letters, " = [", want.str(), "], got ", shape_of(t));
}

inline void check_dtype(const char* op, const char* arg, const Tensor& t, ScalarType want) {
  if (t.scalar_type() != want) fail(op, arg, " must be ", name_of(want), ", got ", name_of(t.scalar_type()));
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "device type " + std::to_string(static_cast<int>(t.device().type()));
}
inline void check_device(const char* op, const char* arg, const Tensor& t, const Tensor& like, const char* like_arg) {
  if (t.device() != like.device())
    fail(op, arg, " must be on the device of ", like_arg, " (", device_name(like), "), got ", device_name(t));
}

inline void check_strided(const char* op, const char* arg, const Tensor& t) {
  if (t.layout() != torch::headeronly::Layout::Strided)
    fail(op, arg, " must be a dense strided tensor, got another layout");
}

inline float check_finite(const char* op, const char* arg, double v) {
  if (!std::isfinite(v) || !std::isfinite(static_cast<float>(v))) fail(op, arg, " must be finite in float32, got ", v);
  return static_cast<float>(v);
}

inline Tensor as_contiguous(const Tensor& t) {  // a call through the dispatcher only where it has something to do
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A tensor [..., N] as T rows of N contiguous elements, `pitch` apart. Other strides are copied once.
struct Rows {
  Tensor tensor;
  int64_t T, N, pitch;
};
inline Rows rows_of(const char* op, const char* arg, const Tensor& t) {
  if (t.dim() < 1) fail(op, arg, " must have at least one dimension, got a scalar");
  const int64_t d = t.dim(), N = t.size(d - 1), T = N ? t.numel() / N : [&] {
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < d; ++i) rows *= t.size(i);
    return rows;
  }();
  if (T >= int64_t{1} << 32) fail(op, arg, " must have fewer than 2^32 rows, got ", T);
  bool ok = N <= 1 || t.stride(d - 1) == 1;
  int64_t pitch = N, span = 0;  // span: the stride one more step of the next outer dimension must have
  for (int64_t i = d - 2; ok && i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (!span) {
      pitch = t.stride(i);
      span = pitch * t.size(i);
      ok = pitch >= N;
    } else {
      ok = t.stride(i) == span;
      span *= t.size(i);
    }
  }
  if (ok || !t.numel()) return {t, T, N, pitch};
  return {as_contiguous(t), T, N, N};
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

struct CudaScope {  // current device and stream for the length of a launch
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  Stream stream = nullptr;
  CudaScope(const char* op, const Tensor& t) {
#if !defined(LRK_EMULATE)
    guard.emplace(t.get_device_index());
    void* raw = nullptr;
    if (!aoti_torch_get_current_cuda_stream ||
        aoti_torch_get_current_cuda_stream(t.get_device_index(), &raw) != AOTI_TORCH_SUCCESS)
      fail(op, "torch gave no CUDA stream for ", device_name(t));
    stream = static_cast<Stream>(raw);
#else
    (void)op, (void)t;
#endif
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

// A launcher, or null in a build without CUDA code.
#if defined(LRK_WITH_CUDA) || defined(LRK_EMULATE)
#define LRK_LAUNCHER(f) f
inline Target current_cuda() { return {Device::kCUDA, cuda_arch()}; }
#else
#define LRK_LAUNCHER(f) static_cast<decltype(&f)>(nullptr)
inline Target current_cuda() { return {Device::kCUDA, 0}; }
#endif

// What a choice about `t` is made for.
inline Target target_of(const char* op, const Tensor& t) {
  if (!on_cuda(op, t)) return kCpu;
  const CudaScope scope(op, t);
  return current_cuda();
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

// Runs one kernel of a contract on the device of `t`, with its scratch memory from torch's allocator.
template <class P>
void run(const char* op, const Tensor& t, const P& p, size_t (*workspace)(const P&, Target),
         void (*cpu)(const P&, void*), int (*cuda)(const P&, void*, Stream)) {
  const bool is_cuda = on_cuda(op, t);
  std::optional<CudaScope> scope;
  if (is_cuda) scope.emplace(op, t);
  const size_t bytes = workspace(p, is_cuda ? current_cuda() : kCpu);
  OptTensor scratch;
  void* ws = nullptr;
  if (!is_cuda && bytes <= sizeof(SmallScratch)) {
    ws = small_scratch();
  } else if (bytes) {
    scratch = torch::stable::new_empty(t, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    ws = scratch->mutable_data_ptr();
  }
  if (!is_cuda) return cpu(p, ws);
  check_launch(op, cuda(p, ws, scope->stream));
}

}  // namespace lrk::ops
