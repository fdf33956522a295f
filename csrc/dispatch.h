// SPDX-License-Identifier: Apache-2.0
// From a value at run time to a type: launchers and entry points choose an instance by calling f with a tag. constexpr, so
// that kernels may call it too.
#pragma once

#include <type_traits>

#include "rng.h"

namespace lrk {

template <class F>
constexpr auto with_float(DType t, const F& f) {
  if (t == DType::kF32) return f(float{});
  return t == DType::kF16 ? f(f16{}) : f(bf16{});
}
// f(x tag, factor tag): factors are fp32 or of x's dtype.
template <class F>
auto with_types(DType x, DType factor, const F& f) {
  return with_float(x, [&](auto xt) { return factor == DType::kF32 ? f(xt, float{}) : f(xt, xt); });
}
template <class F>
auto with_bool(bool b, const F& f) {
  return b ? f(std::true_type{}) : f(std::false_type{});
}

// f(the distribution as an integral_constant).
template <class F>
constexpr auto with_distribution(Distribution d, const F& f) {
  switch (d) {
    case Distribution::kUniform16: return f(std::integral_constant<Distribution, Distribution::kUniform16>{});
    case Distribution::kUniform32: return f(std::integral_constant<Distribution, Distribution::kUniform32>{});
    case Distribution::kSign: return f(std::integral_constant<Distribution, Distribution::kSign>{});
    case Distribution::kTernary6: return f(std::integral_constant<Distribution, Distribution::kTernary6>{});
    case Distribution::kTernary4: return f(std::integral_constant<Distribution, Distribution::kTernary4>{});
    default: return f(std::integral_constant<Distribution, Distribution::kUniform8>{});
  }
}

}  // namespace lrk
