// Fibers: a stack per CUDA thread and a switch between it and the scheduler's stack.
#include <sys/mman.h>

#include <stdexcept>

#include "runtime.h"

#if !defined(__x86_64__) || defined(CUDA_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_host {

uintptr_t fiber_stacks() {
  static const uintptr_t stacks = [] {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
      throw std::runtime_error("cuda-host: no memory for the fibers' stacks");
    // A stack that overflows hits its lowest page, not its neighbour.
    for (int i = 0; i < kMaxThreads; ++i)
      mprotect(static_cast<char*>(memory) + i * kStackBytes, 4096, PROT_NONE);
    return reinterpret_cast<uintptr_t>(memory);
  }();
  return stacks;
}

#if defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)

// Saves the callee-saved registers of the System V ABI on the old stack and takes them from the
// new.
asm(R"(
.text
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
  popq %rcx
  jmpq *%rcx
.size cuda_host_switch, . - cuda_host_switch
)");
extern "C" void cuda_host_switch(void** save, void* load) __attribute__((visibility("hidden")));

static void* scheduler_stack_pointer = nullptr;

void start_fiber(Thread& thread, void (*entry)()) {
  // Different tops keep the stacks out of the same cache sets.
  const size_t colour = static_cast<size_t>(thread.number) * 832 % (kStackBytes / 4);
  void** top = reinterpret_cast<void**>(thread.stack_low + kStackBytes - 56 - colour);
  *top = nullptr;  // where a call would leave its return address
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

void run_fiber(Thread& thread) {
  thread.accesses = 0;
  current_thread = &thread;
  cuda_host_switch(&scheduler_stack_pointer, thread.stack_pointer);
  current_thread = nullptr;
}

void suspend_fiber(Thread& thread) {
  cuda_host_switch(&thread.stack_pointer, scheduler_stack_pointer);
}

#else

static ucontext_t scheduler_context;
static ucontext_t contexts[kMaxThreads];

void start_fiber(Thread& thread, void (*entry)()) {
  ucontext_t& context = contexts[thread.number];
  getcontext(&context);
  context.uc_stack.ss_sp = reinterpret_cast<void*>(thread.stack_low);
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void run_fiber(Thread& thread) {
  thread.accesses = 0;
  current_thread = &thread;
  swapcontext(&scheduler_context, &contexts[thread.number]);
  current_thread = nullptr;
}

void suspend_fiber(Thread& thread) { swapcontext(&contexts[thread.number], &scheduler_context); }

#endif

}  // namespace cuda_host
