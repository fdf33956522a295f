// SPDX-License-Identifier: Apache-2.0
// Which pages of adapters the rows of a GEMM's tile want, as lists that a kernel before it makes on the device.
#pragma once

#include "gemm.h"

namespace lrk {

constexpr int kPageK = 16;                          // rows of U in a page: one product of the tensor cores
constexpr int32_t kNobody = -1, kNobodyKnows = -2;  // of owners

struct PageEntry {  // a page that rows of an adapter want in a slot
  int32_t page, adapter, slot;
  int32_t s_at;   // where a row's S [slots, R] has its ranks
  int32_t ranks;  // the page's rows after them are not the adapter's, and S is zero there
};
struct PageTail {
  const PageEntry* entries;  // [tiles of M, capacity], in the order in which a row adds them
  const int32_t* counts;     // [tiles of M]
  const int32_t* owners;     // [slots, M]: a row's adapter, or kNobody, or kNobodyKnows: all of the row is NaN
  const void* s;             // [M, slots, R] bf16
  int32_t capacity, slots, R;
  const float* dropout_p;  // of each adapter, or null
};

}  // namespace lrk
