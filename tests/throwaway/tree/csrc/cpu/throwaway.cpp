// SPDX-License-Identifier: Apache-2.0
// The throwaway family on the CPU.
#include "throwaway.h"

#include "factor.h"

namespace lrk {
namespace LRK_ISA {
namespace {

template <class X>
void gain(const ThrowawayParams& p) {
  parallel_for(p.T, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const X* x = static_cast<const X*>(p.x) + t * p.pitch;
      X* y = static_cast<X*>(p.y) + t * p.N;
      for (int64_t n = 0; n < p.N; ++n) y[n] = from_float<X>(p.gain[n] * to_float(x[n]));
    }
  });
}

}  // namespace
}  // namespace LRK_ISA

LRK_CPU_ENTRY(throwaway, ThrowawayParams, with_float(p.dtype, [&]<class X>(X) { gain<X>(p); }))

}  // namespace lrk
