// SPDX-License-Identifier: Apache-2.0
// Choices between kernels, and limits, for people: each file of policy/ registers by what it chooses, where the numbers
// come from, and an answer in facts and words. lrkern._host lists them and names none.
#pragma once

#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "common.h"

namespace lrk {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

using Value = std::variant<bool, int64_t, std::string>;

// What a choice is asked about, by name.
struct Question {
  std::map<std::string, Value> values;

  int64_t operator[](const char* name) const { return std::get<int64_t>(values.at(name)); }
  bool flag(const char* name) const { return std::get<bool>(values.at(name)); }
  DType dtype(const char* of = "dtype") const {
    const std::string& name = std::get<std::string>(values.at(of));
    for (DType t : {DType::kF32, DType::kF16, DType::kBF16})
      if (name == name_of(t)) return t;
    throw std::invalid_argument(
        text("lrkern._host.explain: ", of, " must be float32, float16 or bfloat16, got ", name));
  }
  Target target() const {
    const std::string& name = std::get<std::string>(values.at("device"));
    if (name != "cpu" && name != "cuda")
      throw std::invalid_argument("lrkern._host.explain: device must be cpu or cuda, got " + name);
    return name == "cpu" ? kCpu : Target{Device::kCUDA, static_cast<int32_t>((*this)["arch"])};
  }
  bool cpu() const { return target().device == Device::kCPU; }
};

struct Answer {
  std::vector<std::pair<const char*, Value>> facts;
  std::string why;
};

struct Choice {
  const char *rule, *numbers;                             // numbers: the measurement or count that set them
  std::map<std::string, std::optional<Value>> arguments;  // with their defaults
  Answer (*answer)(const Question&);
};
inline std::map<std::string, Choice>& choices() {
  static std::map<std::string, Choice> all;
  return all;
}
inline std::map<std::string, int64_t>& limits() {
  static std::map<std::string, int64_t> all;
  return all;
}

// A variable of this type in a file of policy/ registers a choice or a limit.
struct Registered {
  Registered(const char* name, Choice c) {
    c.arguments.insert({{"device", "cuda"}, {"arch", int64_t{80}}});
    choices()[name] = std::move(c);
  }
  Registered(const char* limit, int64_t value) { limits()[limit] = value; }
};

struct GemmConfig;
struct GemmShape;
Answer explain(const GemmConfig& config, const GemmShape& shape);  // policy/gemm.cpp

}  // namespace lrk
