// SPDX-License-Identifier: Apache-2.0
// The products of multi-LoRA where x and the factors share a 16-bit type, as serving has them (pages.cu).
#pragma once

#include <type_traits>

#include "multi_lora.h"

namespace lrk {

template <class X, class F>
constexpr bool by_pages = std::is_same_v<X, F> && sizeof(X) == 2;

// to [T, N] = from + D(S pool) of slot k, from null for zeros. To: x's type, or float where slots are summed.
template <class To>
struct SlotRows {
  int64_t k;
  To* to;
  const To* from;
  int64_t to_pitch, from_pitch;
};

int page_shrink(const MultiLoraShrinkParams& p, Stream stream);
template <class X, class To>
int page_expand(const MultiLoraExpandParams& p, const SlotRows<To>& rows, Stream stream);

}  // namespace lrk
