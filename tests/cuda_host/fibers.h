// The threads of a block as fibers: each has a stack, and runs until it waits for others.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#include <vector_types.h>

#include "sanitizers.h"

namespace cuda_host {

enum class State { kReady, kWaiting, kDone };

struct AsyncCopy {
  void* destination;
  const void* source;
  unsigned bytes;
  unsigned filled;  // bytes copied; the others are zero
};

struct Thread {
  uint3 index{};  // threadIdx
  unsigned linear = 0;
  unsigned lane = 0;
  unsigned warp = 0;
  State state = State::kDone;
  const char* waits_in = "";

  // cp.async: not committed yet, and committed groups that nobody has waited for.
  std::vector<AsyncCopy> uncommitted_copies;
  std::vector<std::vector<AsyncCopy>> copy_groups;

  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan_fiber = nullptr;  // ThreadSanitizer's
};

// Saves the callee-saved registers and the stack pointer of one fiber, takes those of another.
extern "C" void cuda_host_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.pushsection .text
.weak cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
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
  ret
.popsection
)");

inline Thread launching_thread;  // the one that called `launch`
inline Thread* current = &launching_thread;

inline void switch_to(Thread* next, [[maybe_unused]] bool for_good = false) {
  Thread* self = current;
  if (next == self) return;
  current = next;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, next->stack,
                                 next->stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  constexpr unsigned kNoSynchronisation = 1;
  __tsan_switch_to_fiber(next->tsan_fiber, kNoSynchronisation);
#endif
  cuda_host_switch(&self->stack_pointer, next->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self->fake_stack, &bottom, &bytes);
#endif
}

// A new fiber's first instruction is in `entry`, which must not return.
inline Thread* new_fiber(void (*entry)(), size_t number) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr size_t kBytes = 512 * 1024;
#else
  constexpr size_t kBytes = 256 * 1024;
#endif
  constexpr size_t kPage = 4096;
  auto* thread = new Thread;
  void* memory = mmap(nullptr, kBytes + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) abort();
  thread->stack = static_cast<char*>(memory) + kPage;
  thread->stack_bytes = kBytes;
  // Stacks begin at different offsets: at equal ones they would share the sets of the cache.
  const size_t offset = number * 832 % 16384;
  auto** top = reinterpret_cast<void**>(thread->stack + kBytes - offset);
  *--top = nullptr;  // the entry finds its stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  thread->stack_pointer = top;
#if defined(__SANITIZE_THREAD__)
  thread->tsan_fiber = __tsan_create_fiber(0);
#endif
  return thread;
}

}  // namespace cuda_host
