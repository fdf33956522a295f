// SPDX-License-Identifier: Apache-2.0
// g++ -fsanitize=thread calls __tsan_read4(address) and its kin before each access. We do not link that sanitizer: the
// calls are answered here, and go on to what the build is for: track.cpp or traffic.cpp.
#include "worker.h"

#define LRK_HOOK(NAME, BYTES, WRITE, ALIGNED) \
  extern "C" void NAME(const void* p) { lrk::emu::track_plain(p, BYTES, WRITE, ALIGNED, __builtin_return_address(0)); }
LRK_HOOK(__tsan_read1, 1, false, true)
LRK_HOOK(__tsan_read2, 2, false, true)
LRK_HOOK(__tsan_read4, 4, false, true)
LRK_HOOK(__tsan_read8, 8, false, true)
LRK_HOOK(__tsan_read16, 16, false, true)
LRK_HOOK(__tsan_write1, 1, true, true)
LRK_HOOK(__tsan_write2, 2, true, true)
LRK_HOOK(__tsan_write4, 4, true, true)
LRK_HOOK(__tsan_write8, 8, true, true)
LRK_HOOK(__tsan_write16, 16, true, true)
LRK_HOOK(__tsan_unaligned_read2, 2, false, false)
LRK_HOOK(__tsan_unaligned_read4, 4, false, false)
LRK_HOOK(__tsan_unaligned_read8, 8, false, false)
LRK_HOOK(__tsan_unaligned_read16, 16, false, false)
LRK_HOOK(__tsan_unaligned_write2, 2, true, false)
LRK_HOOK(__tsan_unaligned_write4, 4, true, false)
LRK_HOOK(__tsan_unaligned_write8, 8, true, false)
LRK_HOOK(__tsan_unaligned_write16, 16, true, false)
LRK_HOOK(__tsan_vptr_read, 8, false, false)
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_read_range(const void* p, size_t n) {
  lrk::emu::track_plain(p, n, false, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(const void* p, size_t n) {
  lrk::emu::track_plain(p, n, true, false, __builtin_return_address(0));
}
// Of launchers, which share what they have asked of a device.
extern "C" int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
extern "C" void __tsan_atomic32_store(volatile int* p, int v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() { lrk::emu::g_tracking = true; }  // run by a constructor in every instrumented object
