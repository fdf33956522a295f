// SPDX-License-Identifier: Apache-2.0
// What the kernels of a GEMM with many adapters hand each other.
#pragma once

#include "multi_lora.h"

namespace lrk {

static_assert(kPageK == kPageRanks);

// The workspace, in this order: a tile's entries and their number, and each row's adapter in each slot.
struct PageLists {
  PageEntry* entries;  // [tiles of M, capacity]
  int32_t* counts;     // [tiles of M]
  int32_t* owners;     // [K, T]
  int32_t capacity;
};
inline PageLists page_lists(const Adapters& d, const GemmTiles& tiles, void* workspace) {
  const int64_t capacity = page_capacity(d, tiles);
  auto* entries = static_cast<PageEntry*>(workspace);
  auto* counts = reinterpret_cast<int32_t*>(entries + tiles.m * capacity);
  return {entries, counts, counts + tiles.m, static_cast<int32_t>(capacity)};
}

// cudaError_t values. Tiled: with the tiles at hand, not those that the choice takes.
int multi_lora_gemm_tiled(const MultiLoraGemmParams& p, void* workspace, const GemmTiles& tiles, Stream stream);
int multi_lora_gemm_sm90(const MultiLoraGemmParams& p, const PageLists& lists, const GemmTiles& tiles, Stream stream);

}  // namespace lrk
