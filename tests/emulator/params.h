// SPDX-License-Identifier: Apache-2.0
// What the <family>_params.cpp programs share: random matrices whose allocations are exact to the byte, so that
// AddressSanitizer sees the first element too many, and whose padding and outputs start as NaN; an error against its bound;
// a main that runs random cases under several thread schedules.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>
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

// A matrix in an allocation of its own: `offset` elements in front, and between rows, are NaN; the last row ends the block.
struct Matrix {
  DType type;
  int64_t rows, cols, pitch;
  std::vector<unsigned char> bytes, fresh;
  size_t offset;

  Matrix(DType t, int64_t r, int64_t c, int64_t pad, int64_t shift, bool filled)
      : type(t), rows(r), cols(c), pitch(c + pad), offset(static_cast<size_t>(shift) * size_of(t)) {
    bytes.assign(offset + static_cast<size_t>((r - 1) * pitch + c) * size_of(t), 0xff);
    bytes.shrink_to_fit();
    for (int64_t i = 0; filled && i < r; ++i)
      for (int64_t j = 0; j < c; ++j) store(t, data(), i * pitch + j, draw_value());
    fresh = bytes;
    emu::track_global(bytes.data(), bytes.size(), filled);
  }
  void* data() { return bytes.data() + offset; }
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
  void add(double got, double want, double magnitude, DType out, bool split) {
    const double ulp = out == DType::kF32 ? 6e-8 : out == DType::kF16 ? 4.9e-4 : 3.95e-3;
    // Sums in fp32 of terms of the given total magnitude; two bf16 terms hold an fp32 factor to 2^-16.
    const double bound =
        ulp * std::fabs(want) + (split ? 2e-5 : 1.5e-6) * magnitude + (out == DType::kF16 ? 6e-8 : 1e-30);
    const double ratio = std::fabs(got - want) / bound;
    worst = ratio <= worst ? worst : std::isnan(ratio) ? 1e30 : ratio;
  }
};

// main of a program:  CASES SEED SCHEDULE...  a line for each random case that fails;  or  huge
template <class RunCase, class RunHuge>
int run_program(int argc, char** argv, const RunCase& run_case, const RunHuge& run_huge) {
  if (argc == 2 && std::string(argv[1]) == "huge") return run_huge() ? 0 : 1;
  if (argc < 4) return std::fprintf(stderr, "usage: %s CASES SEED SCHEDULE... | huge\n", argv[0]), 2;
  const int cases = std::atoi(argv[1]);
  g_rng = std::strtoull(argv[2], nullptr, 10);
  std::vector<int> schedules;
  for (int i = 3; i < argc; ++i) schedules.push_back(std::atoi(argv[i]));
  int failed = 0;
  for (int i = 0; i < cases && failed < 5; ++i) failed += !run_case(schedules);
  std::printf("%d cases, %d failed, %lld switches\n", cases, failed,
              static_cast<long long>(lrk_emulator_get("switches")));
  return failed ? 1 : 0;
}

}  // namespace lrk
