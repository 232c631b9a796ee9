// The runtime behind ../include: one fiber per CUDA thread, warps of 32 run in order, blocks one
// after another. memory.cpp judges every load and store, collective.cpp every barrier, shuffle and
// vote.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda_host.h"

namespace cuda_host {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a block
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxSharedBytes = 163 * 1024;  // of a block on sm_80, the smallest of the targets

enum class State { ready, in_warp_collective, in_block_barrier, exited };

struct Thread {
  void* stack_pointer = nullptr;
  uintptr_t stack_low = 0;
  uint3 index = {};
  int number = 0;
  uint16_t warp_epoch = 0;  // counts the __syncwarp since the block's last barrier
  uint32_t accesses = 0;    // since it was last resumed
  State state = State::exited;
  // The collective it waits in, and the result it gets.
  int kind = 0;
  unsigned mask = 0;
  uint64_t value = 0;
  int operand = 0, width = 0;
  Site site = {};
  const void* caller = nullptr;
};

struct Launch {
  std::string kernel;
  dim3 grid, block;
  uint3 block_index = {};
  size_t shared_bytes = 0;
  Entry entry = nullptr;
  const void* arguments = nullptr;
  size_t argument_bytes = 0;
  Thread* threads = nullptr;
  int thread_count = 0;
};

// The running CUDA thread and its launch; null outside of kernels.
extern thread_local Thread* current_thread __attribute__((tls_model("initial-exec")));
extern Launch current_launch;

// Records the first violation of a launch, then leaves the running fiber for good if there is one.
void report(const std::string& kind, const std::string& detail);
bool has_violation();
std::string triple(uint3 index);
std::string thread_name(int number);
std::string site_name(Site site);

// fiber.cpp
uintptr_t fiber_stacks();  // kMaxThreads stacks of kStackBytes each, one after another
void start_fiber(Thread& thread, void (*entry)());
void run_fiber(Thread& thread);  // from the scheduler, until the fiber suspends
void suspend_fiber(Thread& thread);

// collective.cpp
// Completes the warp collective that `first` waits in, if all lanes of its mask do.
bool resolve_collective(Thread* warp, int lanes, Thread& first);
void report_stuck(const Thread* warp, int lanes, const Thread& stuck);
// All warps have stopped: ends the interval, then releases the barrier or reports who never reaches
// it.
bool resolve_barrier(Thread* threads, int count);

// regions.cpp
enum class Kind { read, write, atomic };
enum class Space { global, shared, constant };
void begin_launch_regions();
void poison_dynamic_shared_memory();
// What the accessed memory is; sets `violation` where the running thread may not access it.
Space classify(uintptr_t address, size_t bytes, Kind kind, std::string& violation);
std::string region_name(uintptr_t address, Space space);
std::string kernel_name(const void* function);
uint32_t site_of(const void* return_address);  // an offset into this library
// "FILE:LINE", and " from FILE:LINE" where that was inlined.
std::string source_line(uint32_t site);

// memory.cpp
void begin_launch_memory();
void begin_block_memory();
void end_barrier_interval();
std::string take_unwritten();  // the text of a read of unwritten shared memory, if any
void judge(const void* address, size_t bytes, Kind kind, const void* return_address);

// traffic.cpp
extern bool counting_traffic;
void count_access(uintptr_t address, size_t bytes, Kind kind, uint32_t site, const Thread& thread);
void end_block_traffic();

}  // namespace cuda_host
