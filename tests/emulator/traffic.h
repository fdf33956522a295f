// SPDX-License-Identifier: Apache-2.0
// What traffic.cpp counts, and its text.
#pragma once

#include <map>

#include "worker.h"

namespace lrk::emu {

struct Operand {
  std::string name;
  uintptr_t base, bytes;
  double requests = 0, sectors = 0, used = 0, l2 = 0, dram = 0;  // used: bytes asked for
  double unique = 0;  // bytes of different sectors, read and written; of blocks that ran
};
enum Level { kL1, kL2, kDram, kLevels };

struct Site {  // a place in the code; sums over all blocks of the grid
  bool shared = false, write = false, async = false, box = false;
  uint32_t bytes = 0;                         // of a lane
  double longest = 0;                         // requests of the warp that makes most of them in its block
  double requests = 0, lanes = 0, split = 0;  // split: requests that not all lanes of their warp took part in
  double used = 0, sectors = 0, lines = 0;    // global
  double wavefronts = 0, ideal = 0;           // shared
  double from[kLevels] = {};                  // global reads, by the furthest level that had to answer
};

struct BlockSum {
  double weight, requests, multiplied;
};

struct Record {
  std::string kernel;
  ptrdiff_t function;
  dim3 grid, block;
  size_t smem;
  int64_t resident;  // blocks on an SM
  uint64_t blocks, run;
  double barriers = 0, products = 0, l2 = 0, dram = 0, written = 0;  // instructions of warps; bytes; written: of dram
  double copies = 0, waits = 0;                      // bytes of a thread under way at its waits, and waits
  double multiplied = 0;                             // by wgmma: multiply-adds
  double operands_read = 0, landed = 0, stored = 0;  // bytes of shared memory: wgmma's operands; boxes loaded, stored
  std::vector<BlockSum> per_block{};
  std::map<int32_t, Site> sites{};  // by pc
  std::vector<Operand> operands{};
};

const char* anchor();                  // of distances in the code
ptrdiff_t offset_of(const void* p);    // in this library or program
std::string text_of(const Record& r);  // JSON

}  // namespace lrk::emu
