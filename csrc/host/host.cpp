// SPDX-License-Identifier: Apache-2.0
// The Python module lrkern._host: what the shared headers compute, on numpy arrays, and the choices of policy/ in
// words. For tests and for people; nothing in ops or nn imports it. No tensors, no launches.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "basis.h"
#include "lora.h"

namespace py = pybind11;
using namespace py::literals;

namespace lrk {
namespace {

using Counters = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

void check(bool ok, const std::string& message) {
  if (!ok) throw py::value_error("lrkern._host." + message);
}

py::dict build_info() {
  return py::dict(
      "version"_a = LRK_VERSION, "compiler"_a = __VERSION__, "with_cuda"_a = LRK_WITH_CUDA != 0,
      "cuda_archs"_a = LRK_CUDA_ARCHS,
      "target_abi"_a = std::to_string(LRK_TORCH_TARGET >> 56) + "." + std::to_string((LRK_TORCH_TARGET >> 48) & 0xff));
}

// ---- rng.h

Counters philox(const Counters& counter, uint64_t key, int rounds) {
  const py::ssize_t n = counter.ndim();
  check(n >= 1 && counter.shape(n - 1) == 4, "philox4x32: counter must have shape [..., 4]");
  check(rounds == 7 || rounds == 10, "philox4x32: rounds must be 7 or 10, got " + std::to_string(rounds));
  Counters out(std::vector<py::ssize_t>(counter.shape(), counter.shape() + n));
  const auto* in = reinterpret_cast<const Philox*>(counter.data());
  auto* result = reinterpret_cast<Philox*>(out.mutable_data());
  for (py::ssize_t i = 0; i < counter.size() / 4; ++i)
    result[i] = rounds == 7 ? philox4x32<7>(in[i], key) : philox4x32<10>(in[i], key);
  return out;
}

py::array_t<bool> dropout_mask(int64_t seed, int64_t rows, int64_t cols, double p, int64_t row0, int64_t col0) {
  constexpr int64_t kLimit = int64_t{1} << 32;  // rows, and blocks of a row, are 32-bit words of the counter
  check(seed >= 0, "dropout_mask: seed must be in [0, 2^63)");
  check(p >= 0 && p <= 1, "dropout_mask: p must be in [0, 1], got " + std::to_string(p));
  check(rows >= 0 && row0 >= 0 && row0 <= kLimit - rows, "dropout_mask: rows must stay below 2^32");
  check(cols >= 0 && col0 >= 0 && col0 <= kLimit * kDropoutBlock - cols, "dropout_mask: columns must stay below 2^35");
  const uint32_t threshold = make_dropout(p).threshold;
  py::array_t<bool> mask({rows, cols});
  bool* keep = mask.mutable_data();
  for (int64_t row = row0; row < row0 + rows; ++row) {
    for (int64_t col = col0; col < col0 + cols;) {
      const Philox block = dropout_block(static_cast<uint64_t>(seed), row, col / kDropoutBlock);
      do {
        *keep++ = bits16(block, static_cast<int>(col % kDropoutBlock)) >= threshold;
      } while (++col % kDropoutBlock && col < col0 + cols);
    }
  }
  return mask;
}

// ---- common.h

template <class T>
uint16_t bits_from_float(float x) {
  return from_float<T>(x).bits;
}
template <class T>
float float_from_bits(uint16_t bits) {
  return to_float(T{bits});
}

// ---- policy/

DType dtype_named(const std::string& name) {
  for (DType t : {DType::kF32, DType::kF16, DType::kBF16})
    if (name == name_of(t)) return t;
  throw py::value_error("lrkern._host.explain: dtype must be float32, float16 or bfloat16, got " + name);
}
Device device_named(const std::string& name) {
  check(name == "cpu" || name == "cuda", "explain: device must be cpu or cuda, got " + name);
  return name == "cpu" ? Device::kCPU : Device::kCUDA;
}

py::dict explain_lora_backward(int64_t T, int64_t O, int32_t R, const std::string& dtype, const std::string& device) {
  const BackwardConfig c = choose_lora_backward({T, O, R, dtype_named(dtype)}, {device_named(device), 80});
  const std::string saved = std::to_string(c.saved_bytes), paid = std::to_string(c.paid_bytes);
  const std::string why =
      c.fused ? "dS and dB in one pass over dY: it is read once less (" + saved +
                    " bytes), for partial sums of dS written and read (" + paid + " bytes)"
      : c.paid_bytes < c.saved_bytes
          ? "dS and dB in two passes over dY: rank " + std::to_string(R) + " is over what the fused kernel holds"
          : "dS and dB in two passes over dY: partial sums of dS (" + paid +
                " bytes) would cost no less than the read of dY saved (" + saved + " bytes)";
  return py::dict("fused"_a = c.fused, "saved_bytes"_a = c.saved_bytes, "paid_bytes"_a = c.paid_bytes, "why"_a = why);
}

py::dict explain_lora_shrink(int64_t T, int64_t N, int32_t R) {
  const ShrinkConfig c = choose_lora_shrink(T, N, R, {Device::kCUDA, 80});
  const std::string chunks = std::to_string(c.chunks) + (c.chunks == 1 ? " chunk" : " chunks");
  const std::string why =
      c.split ? chunks +
                    " of N in blocks of their own, added in order by a second kernel: the rows alone leave the GPU idle"
              : "each block walks the " + chunks + " of N of its rows";
  return py::dict("split"_a = c.split, "chunks"_a = c.chunks, "why"_a = why);
}

py::dict explain_basis_matmul(int64_t T, int64_t Q, int64_t C, bool transposed, const std::string& device) {
  const BasisMatmulConfig c = choose_basis_matmul(T, Q, C, transposed, {device_named(device), 80});
  const std::string piece = std::to_string(c.rows) + " x " + std::to_string(c.cols);
  const std::string why =
      c.scratch
          ? "U is generated once, " + piece + " at a time in scratch memory, for a plain GEMM: many tokens share it"
          : "U stays in registers: for so few tokens writing it and reading it back costs more";
  return py::dict("scratch"_a = c.scratch, "rows"_a = c.rows, "cols"_a = c.cols, "why"_a = why);
}

py::object explain(const std::string& choice, const py::kwargs& shape) {
  if (choice == "lora_backward") {
    return py::cpp_function(explain_lora_backward, py::name("explain lora_backward"), "T"_a, "O"_a, "R"_a,
                            "dtype"_a = "float32", "device"_a = "cuda")(**shape);
  }
  if (choice == "lora_shrink") {
    return py::cpp_function(explain_lora_shrink, py::name("explain lora_shrink"), "T"_a, "N"_a, "R"_a)(**shape);
  }
  if (choice == "basis_matmul") {
    return py::cpp_function(explain_basis_matmul, py::name("explain basis_matmul"), "T"_a, "Q"_a, "C"_a,
                            "transposed"_a = false, "device"_a = "cuda")(**shape);
  }
  throw py::value_error("lrkern._host.explain: choice must be lora_backward, lora_shrink or basis_matmul, got " +
                        choice);
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "The functions of lrkern's shared headers on numpy arrays, and its choices explained.";
  m.def("build_info", build_info, "What this module was built for.");
  m.def("philox4x32", philox, "counter"_a, "key"_a, "rounds"_a = 10,
        "Philox4x32 of uint32 counters [..., 4] under a 64-bit key.");
  m.def("dropout_mask", dropout_mask, "seed"_a, "rows"_a, "cols"_a, "p"_a, "row0"_a = 0, "col0"_a = 0,
        "True where dropout keeps element (row0 + i, col0 + j) of x.");
  m.def("f16_from_float", py::vectorize(bits_from_float<f16>), "float32 -> bits of float16, to nearest even.");
  m.def("bf16_from_float", py::vectorize(bits_from_float<bf16>), "float32 -> bits of bfloat16, to nearest even.");
  m.def("f16_to_float", py::vectorize(float_from_bits<f16>), "bits of float16 -> float32.");
  m.def("bf16_to_float", py::vectorize(float_from_bits<bf16>), "bits of bfloat16 -> float32.");
  m.def("explain", explain, "choice"_a,
        "Which way a kernel would take for a shape, and why: explain('lora_backward', T=4096, O=4096, R=16).");
}

}  // namespace
}  // namespace lrk
