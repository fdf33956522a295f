// SPDX-License-Identifier: Apache-2.0
// What the <family>_params.cpp programs share: random matrices whose allocations are exact to the byte, so that
// AddressSanitizer sees the first element too many, and whose padding and outputs start as NaN; an error against its bound;
// a run under several thread schedules; a main. A family's program has
//
//   struct Case with text(), Case draw_case()       a random case
//   std::string judge(case, schedules)              what is wrong with its results; "" where nothing is
//   void huge(int& code, Error&)                    pitches of more than 2^31 elements, over memory of reserve()
//   int main(int argc, char** argv) { return lrk::run_program(argc, argv, draw_case, judge, huge); }
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common.h"
#include "emulator.h"

namespace lrk {

inline const Target kTarget{Device::kCUDA, cuda_arch()};  // the emulator's

inline uint64_t g_rng = 1;
inline uint64_t draw() {
  g_rng = g_rng * 6364136223846793005u + 1442695040888963407u;
  return g_rng >> 33;
}
inline int64_t pick(std::initializer_list<int64_t> of) { return of.begin()[draw() % of.size()]; }
inline double draw_value() { return static_cast<double>(draw() % 4096) / 2048.0 - 1.0; }

// One of these, or the op that LRK_PARAMS_OP names: those of one architecture are asked for so.
inline std::string draw_op(std::initializer_list<const char*> ops) {
  const char* asked = std::getenv("LRK_PARAMS_OP");
  return asked ? asked : ops.begin()[draw() % ops.size()];
}

// Types of activations and factors that may meet.
inline std::pair<DType, DType> draw_types() {
  constexpr DType f32 = DType::kF32, f16 = DType::kF16, bf16 = DType::kBF16;
  const std::pair<DType, DType> types[] = {{f32, f32}, {f16, f16}, {bf16, bf16}, {f16, f32}, {bf16, f32}};
  return types[draw() % 5];
}
template <class... Words>
std::string words(const Words&... all) {
  std::ostringstream s;
  (s << ... << all);
  return s.str();
}

inline double load(DType t, const void* p, int64_t i) {
  if (t == DType::kF32) return static_cast<const float*>(p)[i];
  if (t == DType::kF16) return to_float(static_cast<const f16*>(p)[i]);
  return to_float(static_cast<const bf16*>(p)[i]);
}
inline void store(DType t, void* p, int64_t i, double v) {
  const float f = static_cast<float>(v);
  if (t == DType::kF32) static_cast<float*>(p)[i] = f;
  if (t == DType::kF16) static_cast<f16*>(p)[i] = from_float<f16>(f);
  if (t == DType::kBF16) static_cast<bf16*>(p)[i] = from_float<bf16>(f);
}

// A matrix in an allocation of its own, with an element even where it has none: `offset` elements in front, and between rows,
// are NaN; the last row ends the block.
struct Matrix {
  DType type;
  int64_t rows, cols, pitch;
  std::vector<unsigned char> bytes, fresh;
  size_t offset;

  Matrix(DType t, int64_t r, int64_t c, int64_t pad, int64_t shift, bool filled)
      : type(t),
        rows(std::max<int64_t>(r, 1)),
        cols(std::max<int64_t>(c, 1)),
        pitch(cols + pad),
        offset(static_cast<size_t>(shift) * size_of(t)) {
    bytes.assign(offset + static_cast<size_t>((rows - 1) * pitch + cols) * size_of(t), 0xff);
    bytes.shrink_to_fit();
    for (int64_t i = 0; filled && i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) store(t, data(), i * pitch + j, draw_value());
    fresh = bytes;
    emu::track_global(bytes.data(), bytes.size(), filled);
  }
  void* data() { return bytes.data() + offset; }
  float* floats() { return static_cast<float*>(data()); }
  double at(int64_t i, int64_t j) { return load(type, data(), i * pitch + j); }
  double fresh_at(int64_t i, int64_t j) { return load(type, fresh.data() + offset, i * pitch + j); }
  bool padding_untouched() {
    Matrix& m = *this;
    for (size_t b = 0; b < m.offset; ++b)
      if (m.bytes[b] != 0xff) return false;
    for (int64_t i = 0; i + 1 < m.rows; ++i)
      for (int64_t j = m.cols * static_cast<int64_t>(size_of(type)); j < m.pitch * static_cast<int64_t>(size_of(type));
           ++j)
        if (m.bytes[m.offset + static_cast<size_t>(i * m.pitch) * size_of(type) + static_cast<size_t>(j)] != 0xff)
          return false;
    return true;
  }
};

struct Error {
  double worst = 0;  // over its bound
  void add(double got, double want, double magnitude, DType out, bool two_terms) {
    const double ulp = out == DType::kF32 ? 6e-8 : out == DType::kF16 ? 4.9e-4 : 3.95e-3;
    // Sums in fp32 of terms of the given total magnitude; two bf16 terms hold an fp32 factor to 2^-16.
    const double bound =
        ulp * std::fabs(want) + (two_terms ? 2e-5 : 1.5e-6) * magnitude + (out == DType::kF16 ? 6e-8 : 1e-30);
    const double ratio = std::fabs(got - want) / bound;
    worst = ratio <= worst ? worst : std::isnan(ratio) ? 1e30 : ratio;
  }
  std::string verdict() const { return worst <= 1.0 ? "" : words("the error is ", worst, " times its bound"); }
};

// Bytes that every schedule must leave alike.
struct Result {
  const void* data;
  size_t bytes;
  Result(const Matrix& m) : data(m.bytes.data()), bytes(m.bytes.size()) {}
  template <class T>
  Result(const std::vector<T>& v) : data(v.data()), bytes(v.size() * sizeof(T)) {}
};

// Runs call(), which returns an error code, under each schedule on matrices as they were at first; says what went wrong.
template <class Call>
std::string run_schedules(const std::vector<int>& schedules, const std::vector<Matrix*>& fresh,
                          std::initializer_list<Result> results, const Call& call) {
  std::string first;
  for (int schedule : schedules) {
    lrk_emulator_set("schedule", schedule);
    for (Matrix* m : fresh) std::copy(m->fresh.begin(), m->fresh.end(), m->bytes.begin());
    if (const int code = call()) return words("a launch returned ", code);
    std::string now;
    for (const Result& r : results) now.append(static_cast<const char*>(r.data), r.bytes);
    if (schedule == schedules[0]) first = now;
    if (first != now) return words("schedule ", schedule, " gives other bits than schedule ", schedules[0]);
  }
  return "";
}

// Memory for `count` elements that is mostly never touched.
inline bf16* reserve(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(bf16);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p != MAP_FAILED) return static_cast<bf16*>(p);
  std::printf("SKIP no address space for 2^31 elements\n");
  std::exit(0);
}

// main of a program:  CASES SEED SCHEDULE...  a line for each random case that fails;  or  huge
template <class DrawCase, class Judge, class Huge>
int run_program(int argc, char** argv, const DrawCase& draw_case, const Judge& judge, const Huge& huge) {
  if (argc == 2 && std::string(argv[1]) == "huge") {
    int code = 0;
    Error error;
    huge(code, error);
    const bool ok = code == 0 && error.worst <= 1.0;
    std::printf("%s huge pitches: code %d, error %.3g of its bound\n", ok ? "ok" : "FAIL", code, error.worst);
    return ok ? 0 : 1;
  }
  if (argc < 4) return std::fprintf(stderr, "usage: %s CASES SEED SCHEDULE... | huge\n", argv[0]), 2;
  const int cases = std::atoi(argv[1]);
  g_rng = std::strtoull(argv[2], nullptr, 10);
  std::vector<int> schedules;
  for (int i = 3; i < argc; ++i) schedules.push_back(std::atoi(argv[i]));
  int failed = 0;
  const int enough = std::getenv("LRK_EMU_SKIP") ? 1 : 5;  // a planted error has to be seen once
  for (int i = 0; i < cases && failed < enough; ++i) {
    const auto c = draw_case();
    emu::forget_global();
    const std::string wrong = judge(c, schedules);
    if (wrong.empty()) continue;
    std::printf("FAIL %s: %s\n", c.text().c_str(), wrong.c_str());
    ++failed;
  }
  std::printf("%d cases, %d failed, %lld switches\n", cases, failed,
              static_cast<long long>(lrk_emulator_get("switches")));
  return failed ? 1 : 0;
}

}  // namespace lrk
