// SPDX-License-Identifier: Apache-2.0
// See traffic.h.
#include <dlfcn.h>

#include <sstream>

#include "traffic.h"

namespace lrk::emu {

const char* anchor() { return reinterpret_cast<const char*>(&track_access); }

ptrdiff_t offset_of(const void* p) {  // in this library or program
  Dl_info info;
  dladdr(reinterpret_cast<const void*>(&track_access), &info);
  return static_cast<const char*>(p) - static_cast<const char*>(info.dli_fbase);
}

std::string text_of(const Record& r) {
  std::ostringstream s;
  s.precision(10);
  const auto all = [&s](const char* name, const auto& list, const auto& each) {
    s << ", \"" << name << "\": [";
    const char* comma = "";
    for (const auto& item : list) {
      s << comma;
      each(item);
      comma = ", ";
    }
    s << "]";
  };
  s << "{\"kernel\": \"" << r.kernel << "\", \"function\": " << r.function << ", \"grid\": [" << r.grid.x << ", "
    << r.grid.y << ", " << r.grid.z << "], \"threads\": " << r.block.x * r.block.y * r.block.z
    << ", \"smem\": " << r.smem << ", \"resident\": " << r.resident << ", \"blocks\": " << r.blocks
    << ", \"run\": " << r.run << ", \"barriers\": " << r.barriers << ", \"products\": " << r.products
    << ", \"l2\": " << r.l2 << ", \"dram\": " << r.dram << ", \"written\": " << r.written
    << ", \"copies\": " << r.copies << ", \"waits\": " << r.waits << ", \"multiplied\": " << r.multiplied
    << ", \"operands_read\": " << r.operands_read << ", \"landed\": " << r.landed << ", \"stored\": " << r.stored;
  // Of one kind for all blocks: products where there are any.
  all("per_block", r.per_block, [&](const BlockSum& b) {
    s << "[" << b.weight << ", " << (r.multiplied > 0 ? b.multiplied : b.requests) << "]";
  });
  all("sites", r.sites, [&](const auto& entry) {
    const Site& site = entry.second;
    s << "{\"at\": " << offset_of(anchor() + entry.first) << ", \"shared\": " << site.shared
      << ", \"write\": " << site.write << ", \"async\": " << site.async << ", \"box\": " << site.box
      << ", \"bytes\": " << site.bytes << ", \"requests\": " << site.requests << ", \"longest\": " << site.longest
      << ", \"lanes\": " << site.lanes << ", \"split\": " << site.split << ", \"used\": " << site.used
      << ", \"sectors\": " << site.sectors << ", \"lines\": " << site.lines << ", \"wavefronts\": " << site.wavefronts
      << ", \"ideal\": " << site.ideal << ", \"from\": [" << site.from[kL1] << ", " << site.from[kL2] << ", "
      << site.from[kDram] << "]}";
  });
  all("operands", r.operands, [&](const Operand& o) {
    s << "{\"name\": \"" << o.name << "\", \"bytes\": " << o.bytes << ", \"requests\": " << o.requests
      << ", \"sectors\": " << o.sectors << ", \"used\": " << o.used << ", \"l2\": " << o.l2 << ", \"dram\": " << o.dram
      << ", \"unique\": " << o.unique << "}";
  });
  s << "}";
  return s.str();
}

}  // namespace lrk::emu
