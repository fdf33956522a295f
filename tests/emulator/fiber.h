// SPDX-License-Identifier: Apache-2.0
// Fibers: a stack each and a switch of some nanoseconds (callee-saved registers only; ucontext, the fallback, makes a
// system call per switch). AddressSanitizer is told of every switch, else it would take a fiber's stack for wild memory.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(LRK_EMU_UCONTEXT)
#define LRK_EMU_ASSEMBLY
#else
#include <ucontext.h>
#endif

namespace lrk::emu {

#if !defined(LRK_EMU_ASSEMBLY)
#elif defined(__x86_64__)
// The last jump is indirect, not `ret`: the return predictor knows nothing of other stacks and would miss every time.
asm(R"(
.text
.p2align 4
.local lrk_emu_switch
.type lrk_emu_switch, @function
lrk_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size lrk_emu_switch, .-lrk_emu_switch
)");
#else
asm(R"(
.text
.p2align 4
.local lrk_emu_switch
.type lrk_emu_switch, %function
lrk_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
.size lrk_emu_switch, .-lrk_emu_switch
)");
#endif
#if defined(LRK_EMU_ASSEMBLY)
extern "C" void lrk_emu_switch(void** save, void* load);
#endif

class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // The next switch to this context calls `entry`, which must not return.
  void start(unsigned char* low, size_t size, size_t color, void (*entry)()) {
    low_ = low;
    size_ = size;
    ASAN_UNPOISON_MEMORY_REGION(low, size);  // an abandoned run leaves its frames poisoned
#if defined(__SANITIZE_ADDRESS__)
    fake_ = nullptr;
#endif
    const uintptr_t top = (reinterpret_cast<uintptr_t>(low + size) - color) & ~uintptr_t{63};
#if !defined(LRK_EMU_ASSEMBLY)
    getcontext(&uc_);
    uc_.uc_stack.ss_sp = low;
    uc_.uc_stack.ss_size = top - reinterpret_cast<uintptr_t>(low);
    uc_.uc_link = nullptr;
    makecontext(&uc_, entry, 0);
#elif defined(__x86_64__)
    void** sp = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, a null return address
    for (int i = 0; i < 8; ++i) sp[i] = nullptr;
    sp[6] = reinterpret_cast<void*>(entry);
    sp_ = sp;
#else
    void** sp = reinterpret_cast<void**>(top) - 20;
    for (int i = 0; i < 20; ++i) sp[i] = nullptr;
    sp[11] = reinterpret_cast<void*>(entry);
    sp_ = sp;
#endif
  }

  void switch_to(Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_, to.low_, to.size_);
#endif
#if defined(LRK_EMU_ASSEMBLY)
    lrk_emu_switch(&sp_, to.sp_);
#else
    swapcontext(&uc_, &to.uc_);
#endif
    arrived(*this);
  }

  // First thing on a new stack, and after each return to an old one.
  static void arrived([[maybe_unused]] Context& self) {
#if defined(__SANITIZE_ADDRESS__)
    const void* from_low;
    size_t from_size;
    __sanitizer_finish_switch_fiber(self.fake_, &from_low, &from_size);
    if (native_ && !native_->low_) {
      native_->low_ = static_cast<unsigned char*>(const_cast<void*>(from_low));
      native_->size_ = from_size;
    }
#endif
  }
  // The context of the host thread itself, whose bounds ASan tells at the first switch away from it.
  void mark_native() {
#if defined(__SANITIZE_ADDRESS__)
    native_ = this;
    low_ = nullptr;
#endif
  }

 private:
  unsigned char* low_ = nullptr;
  size_t size_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  static inline thread_local Context* native_ = nullptr;
#endif
#if defined(LRK_EMU_ASSEMBLY)
  void* sp_ = nullptr;
#else
  ucontext_t uc_;
#endif
};

// Stacks side by side, an unmapped page under each: overflow is a crash, not a neighbour's corruption.
class Stacks {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kSize = 256 * 1024;
#else
  static constexpr size_t kSize = 64 * 1024;
#endif
  explicit Stacks(int count) : bytes_(count * kStride) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("emulator: mmap of fiber stacks");
      std::abort();
    }
    base_ = static_cast<unsigned char*>(p);
    for (int i = 0; i < count; ++i) mprotect(base_ + i * kStride, kGuard, PROT_NONE);
  }
  ~Stacks() {
    ASAN_UNPOISON_MEMORY_REGION(base_, bytes_);
    munmap(base_, bytes_);
  }
  unsigned char* low(int i) const { return base_ + i * kStride + kGuard; }
  bool hold(const void* p) const {
    const auto* c = static_cast<const unsigned char*>(p);
    return c >= base_ && c < base_ + bytes_;
  }
  // Tops at one offset of their pages would all fall into the same few sets of the L1 cache.
  static size_t color(int i) { return static_cast<size_t>(i) * 320 % 4096; }

 private:
  static constexpr size_t kGuard = 64 * 1024, kStride = kSize + kGuard;  // one page, whatever its size
  unsigned char* base_;
  size_t bytes_;
};

}  // namespace lrk::emu
