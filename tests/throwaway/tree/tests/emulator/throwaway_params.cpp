// SPDX-License-Identifier: Apache-2.0
// Runs the launcher of csrc/throwaway.h over the emulator; a product has the very bits of one rounding.
#include "params.h"
#include "throwaway.h"

namespace {

using namespace lrk;

struct Case {
  DType type;
  int64_t T, N, pad;
  std::string text() const { return words(lrk::name_of(type), " T=", T, " N=", N, " pad=", pad); }
};

Case draw_case() {
  const DType types[] = {DType::kF32, DType::kF16, DType::kBF16};
  return {types[draw() % 3], pick({0, 1, 3, 70}), pick({0, 1, 33, 130}), pick({0, 3})};
}

ThrowawayParams params_of(const void* x, const float* gain, void* y, int64_t T, int64_t N, int64_t pitch, DType type) {
  return {.x = x, .gain = gain, .y = y, .T = T, .N = N, .pitch = pitch, .dtype = type};
}

std::string judge(const Case& c, const std::vector<int>& schedules) {
  Matrix x(c.type, c.T, c.N, c.pad, 0, true), gain(DType::kF32, 1, c.N, 0, 0, true), y(c.type, c.T, c.N, 0, 0, false);
  const ThrowawayParams p = params_of(x.data(), gain.floats(), y.data(), c.T, c.N, x.pitch, c.type);
  const std::string wrong = run_schedules(schedules, {&y}, {y}, [&] { return throwaway_cuda(p, nullptr, nullptr); });
  Error error;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t n = 0; n < c.N; ++n) {
      const double want = gain.at(0, n) * x.at(t, n);
      error.add(y.at(t, n), want, std::fabs(want), c.type, false);
    }
  return wrong.empty() ? error.verdict() : wrong;
}

void huge(int& code, Error& error) {
  const int64_t pitch = (int64_t{1} << 31) + 5;
  bf16* x = reserve(pitch + 2);
  bf16 y[4] = {};
  const float gain[2] = {2.f, 3.f};
  x[pitch] = from_float<bf16>(1.5f), x[pitch + 1] = from_float<bf16>(2.5f);
  code |= throwaway_cuda(params_of(x, gain, y, 2, 2, pitch, DType::kBF16), nullptr, nullptr);
  error.add(to_float(y[2]), 3.0, 3.0, DType::kBF16, false);
  error.add(to_float(y[3]), 7.5, 7.5, DType::kBF16, false);
}

}  // namespace

int main(int argc, char** argv) { return lrk::run_program(argc, argv, draw_case, judge, huge); }
