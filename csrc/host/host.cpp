// SPDX-License-Identifier: Apache-2.0
// The Python module lrkern._host: what the shared headers compute, on numpy arrays, and the choices of policy/ in
// words. For tests and for people; nothing in ops or nn imports it. No tensors, no launches.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "choice.h"
#include "dispatch.h"
#include "rng.h"

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

py::array_t<float> basis_elements(int64_t seed, int64_t method, int64_t distribution, int64_t rows, int64_t cols,
                                  int64_t basis, int64_t tensor, int64_t row0, int64_t col0) {
  const auto in = [](const char* name, int64_t value, int64_t low, int64_t end) {
    check(value >= low && value < end, std::string("basis_elements: ") + name + " must lie in [" + std::to_string(low) +
                                           ", " + std::to_string(end) + "), got " + std::to_string(value));
  };
  check(seed >= 0, "basis_elements: seed must be in [0, 2^63)");
  in("method", method, 0, 64);
  in("distribution", distribution, static_cast<int64_t>(Distribution::kUniform8),
     static_cast<int64_t>(Distribution::kTernary4) + 1);
  in("k", basis, 0, kMaxBases);
  in("tensor", tensor, 0, kMaxTensors);
  const auto dist = static_cast<Distribution>(distribution);
  check(rows >= 0 && row0 >= 0 && row0 <= kMaxRows - rows, "basis_elements: rows must stay below 2^32");
  check(cols >= 0 && col0 >= 0 && col0 <= kMaxBlocks * block_columns(dist) - cols,
        "basis_elements: columns must stay below 2^32 blocks");
  const uint32_t tag = stream_tag(static_cast<Method>(method), dist);
  py::array_t<float> out({rows, cols});
  float* element = out.mutable_data();
  with_distribution(dist, [&](auto d) {
    constexpr int kColumns = block_columns(d.value);
    for (int64_t row = row0; row < row0 + rows; ++row) {
      for (int64_t col = col0; col < col0 + cols;) {
        const Philox block = basis_block(static_cast<uint64_t>(seed), tag, static_cast<uint32_t>(tensor),
                                         static_cast<uint32_t>(basis), row, col / kColumns);
        do {
          *element++ = basis_value<d.value>(block, static_cast<int>(col % kColumns));
        } while (++col % kColumns && col < col0 + cols);
      }
    }
  });
  return out;
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

py::dict explain(const std::string& name, const py::kwargs& shape) {
  if (!choices().count(name)) {
    std::string names;
    for (const auto& [known, choice] : choices()) names += (names.empty() ? "" : ", ") + known;
    throw py::value_error("lrkern._host.explain: choice must be one of " + names + ", got " + name);
  }
  const Choice& choice = choices().at(name);
  Question question;
  for (const auto& [argument, fallback] : choice.arguments) {
    if (shape.contains(argument.c_str())) {
      question.values[argument] = shape[argument.c_str()].cast<Value>();
    } else if (fallback) {
      question.values[argument] = *fallback;
    } else {
      throw py::type_error("lrkern._host.explain: " + name + " needs " + argument);
    }
  }
  for (const auto& [argument, value] : shape)
    if (!question.values.count(argument.cast<std::string>()))
      throw py::type_error("lrkern._host.explain: " + name + " has no argument " + argument.cast<std::string>());
  const Answer answer = choice.answer(question);
  py::dict found("why"_a = answer.why);
  for (const auto& [fact, value] : answer.facts) found[fact] = value;
  return found;
}

py::dict all_limits() {
  py::dict all = py::cast(limits());
  all["dtypes"] = py::make_tuple(name_of(DType::kF32), name_of(DType::kF16), name_of(DType::kBF16));
  return all;
}

py::dict all_choices() {
  py::dict all;
  for (const auto& [name, c] : choices())
    all[py::str(name)] = py::dict("rule"_a = c.rule, "numbers"_a = c.numbers, "arguments"_a = c.arguments);
  return all;
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "The functions of lrkern's shared headers on numpy arrays, and its choices explained.";
  m.def("build_info", build_info, "What this module was built for.");
  m.def("philox4x32", philox, "counter"_a, "key"_a, "rounds"_a = 10,
        "Philox4x32 of uint32 counters [..., 4] under a 64-bit key.");
  m.def("dropout_mask", dropout_mask, "seed"_a, "rows"_a, "cols"_a, "p"_a, "row0"_a = 0, "col0"_a = 0,
        "True where dropout keeps element (row0 + i, col0 + j) of x.");
  m.def("basis_elements", basis_elements, "seed"_a, "method"_a, "distribution"_a, "rows"_a, "cols"_a, "k"_a = 0,
        "tensor"_a = 0, "row0"_a = 0, "col0"_a = 0,
        "Elements (row0 + i, col0 + j) of random basis k, methods and distributions by their numbers in rng.h.");
  m.def("f16_from_float", py::vectorize(bits_from_float<f16>), "float32 -> bits of float16, to nearest even.");
  m.def("bf16_from_float", py::vectorize(bits_from_float<bf16>), "float32 -> bits of bfloat16, to nearest even.");
  m.def("f16_to_float", py::vectorize(float_from_bits<f16>), "bits of float16 -> float32.");
  m.def("bf16_to_float", py::vectorize(float_from_bits<bf16>), "bits of bfloat16 -> float32.");
  m.def("explain", explain, "choice"_a,
        "What a choice gives for a shape, and why: explain('lora_backward', T=4096, O=4096, R=16).");
  m.def("choices", all_choices, "{name: its rule, where its numbers come from, its arguments with their defaults}.");
  m.def("limits", all_limits, "What the kernels take, by name.");
}

}  // namespace
}  // namespace lrk
