// SPDX-License-Identifier: Apache-2.0
// A cache as traffic.cpp knows it: lines of four sectors, 16 ways, the least recently used way goes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lrk::emu {

constexpr uint64_t kSector = 32, kLine = 128;  // bytes

struct Cache {
  struct Way {
    uint64_t line = ~uint64_t{0};
    uint64_t used = 0, filled = 0;  // a clock; when the line's last sector came
    uint8_t valid = 0, dirty = 0;   // sectors
  };
  static constexpr uint64_t kWays = 16;
  std::vector<Way> ways;
  uint64_t sets = 0, clock = 0;

  void resize(uint64_t bytes) {
    sets = std::max<uint64_t>(1, bytes / kLine / kWays);
    ways.assign(sets * kWays, Way{});
  }
  Way* find(uint64_t line) {
    Way* set = set_of(line);
    for (uint64_t i = 0; i < kWays; ++i)
      if (set[i].line == line) {
        set[i].used = ++clock;
        return set + i;
      }
    return nullptr;
  }
  Way* take(uint64_t line) {  // the line's way, emptied of another line where there was none
    if (Way* way = find(line)) return way;
    Way* set = set_of(line);
    Way* oldest = std::min_element(set, set + kWays, [](const Way& a, const Way& b) { return a.used < b.used; });
    *oldest = Way{};
    oldest->line = line;
    oldest->used = ++clock;
    return oldest;
  }

 private:
  Way* set_of(uint64_t line) { return &ways[(line * 0x9E3779B97F4A7C15u >> 20) % sets * kWays]; }
};

inline int sectors_in(uint8_t mask) { return __builtin_popcount(mask); }

}  // namespace lrk::emu
