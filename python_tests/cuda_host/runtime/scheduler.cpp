// Runs the blocks of a launch: warp after warp, until every thread has exited.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "runtime.h"

namespace cuda_host {

thread_local Thread* current_thread __attribute__((tls_model("initial-exec"))) = nullptr;
Launch current_launch;

namespace {

std::mutex launch_mutex;  // static __shared__ memory is one set per process
std::string violation;    // the first of this launch
thread_local std::string pending_error;
thread_local bool in_launch = false;
Thread threads[kMaxThreads];
int refused_with = 0;  // a cudaError_t
int attributes_refused_with = 0;
thread_local int last_error = 0;  // of a call that failed, until cudaGetLastError() takes it
bool last_first = false;          // the order of blocks, of a block's warps and of a warp's lanes

void run_ready_lanes(Thread* warp, int lanes) {
  for (int i = 0; i < lanes && !has_violation(); ++i) {
    Thread& thread = warp[last_first ? lanes - 1 - i : i];
    if (thread.state == State::ready) run_fiber(thread);
  }
}

// Runs a warp until all its lanes have exited or wait at a block barrier.
void run_warp(Thread* warp, int lanes) {
  while (!has_violation()) {
    run_ready_lanes(warp, lanes);
    if (has_violation()) return;
    bool progress = false;
    const Thread* stuck = nullptr;
    for (int lane = 0; lane < lanes && !has_violation(); ++lane) {
      if (warp[lane].state != State::in_warp_collective) continue;
      if (resolve_collective(warp, lanes, warp[lane]))
        progress = true;
      else if (stuck == nullptr)
        stuck = &warp[lane];
    }
    if (progress || has_violation()) continue;
    if (stuck == nullptr) return;
    report_stuck(warp, lanes, *stuck);
  }
}

void fiber_entry() {
  current_launch.entry(current_launch.arguments);
  Thread& thread = *current_thread;
  thread.state = State::exited;
  suspend_fiber(thread);
}

void run_block() {
  const dim3 shape = current_launch.block;
  const int count = current_launch.thread_count;
  int number = 0;
  for (unsigned z = 0; z < shape.z; ++z)
    for (unsigned y = 0; y < shape.y; ++y)
      for (unsigned x = 0; x < shape.x; ++x, ++number) {
        Thread& thread = threads[number];
        thread.stack_low = fiber_stacks() + static_cast<size_t>(number) * kStackBytes;
        thread.index = {x, y, z};
        thread.number = number;
        thread.warp_epoch = 0;
        thread.state = State::ready;
        start_fiber(thread, &fiber_entry);
      }
  begin_block_memory();
  poison_dynamic_shared_memory();
  const int warps = (count + kWarp - 1) / kWarp;
  do {
    for (int i = 0; i < warps && !has_violation(); ++i) {
      const int first = (last_first ? warps - 1 - i : i) * kWarp;
      run_warp(threads + first, std::min(kWarp, count - first));
    }
  } while (!has_violation() && resolve_barrier(threads, count));
  end_block_traffic();
}

std::string invalid_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t size = uint64_t{block.x} * block.y * block.z;
  if (size == 0 || size > kMaxThreads || block.z > 64)
    return "block of " + triple({block.x, block.y, block.z});
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    return "grid of " + triple({grid.x, grid.y, grid.z});
  if (shared_bytes > kMaxSharedBytes)
    return std::to_string(shared_bytes) + " bytes of dynamic shared memory";
  return "";
}

}  // namespace

bool has_violation() { return !violation.empty(); }

std::string triple(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string thread_name(int number) { return triple(threads[number].index); }

std::string site_name(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

void report(const std::string& kind, const std::string& detail) {
  // What a thread does with a value that nobody wrote is a consequence of it.
  if (const std::string cause = kind == "race" ? "" : take_unwritten(); !cause.empty())
    return report("uninitialised shared memory", cause);
  Thread* const thread = current_thread;
  if (!in_launch) {
    pending_error = "cuda-host: " + kind + " in host code: " + detail;
    return;
  }
  if (violation.empty()) {
    violation = "cuda-host: " + kind + " in kernel " + current_launch.kernel + ", block " +
                triple(current_launch.block_index);
    if (thread != nullptr) violation += ", thread " + triple(thread->index);
    violation += ": " + detail;
  }
  if (thread != nullptr) suspend_fiber(*thread);
}

uint3 thread_index() { return current_thread->index; }
uint3 block_index() { return current_launch.block_index; }
uint3 block_dimensions() {
  return {current_launch.block.x, current_launch.block.y, current_launch.block.z};
}
uint3 grid_dimensions() {
  return {current_launch.grid.x, current_launch.grid.y, current_launch.grid.z};
}

void trap(Site site) {
  report("trap", "__trap at " + site_name(site));
  __builtin_unreachable();
}

void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Entry entry,
            const void* arguments, size_t argument_bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  if (!pending_error.empty() || refused_with != 0) return;
  violation.clear();
  current_launch = {kernel_name(kernel),
                    grid,
                    block,
                    {},
                    shared_bytes,
                    entry,
                    arguments,
                    argument_bytes,
                    threads,
                    static_cast<int>(block.x * block.y * block.z)};
  const std::string invalid = invalid_configuration(grid, block, shared_bytes);
  if (!invalid.empty()) {
    pending_error = "cuda-host: invalid launch of kernel " + current_launch.kernel + ": " + invalid;
    return;
  }
  begin_launch_regions();
  begin_launch_memory();
  in_launch = true;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && !has_violation(); ++i) {
    const uint64_t block_number = last_first ? blocks - 1 - i : i;
    current_launch.block_index = {static_cast<unsigned>(block_number % grid.x),
                                  static_cast<unsigned>(block_number / grid.x % grid.y),
                                  static_cast<unsigned>(block_number / grid.x / grid.y)};
    run_block();
  }
  in_launch = false;
  pending_error = violation;
}

void raise_pending_error() {
  if (pending_error.empty()) return;
  const std::string error = std::move(pending_error);
  pending_error.clear();
  throw std::runtime_error(error);
}

int refusal() { return refused_with; }

int set_attribute() {
  if (attributes_refused_with != 0) last_error = attributes_refused_with;
  return attributes_refused_with;
}

int take_last_error() {
  const int error = refused_with != 0 ? refused_with : last_error;
  last_error = 0;
  return error;
}

}  // namespace cuda_host

// Later launches run their last block, warp and lane first: a right kernel gives the same bits.
extern "C" __attribute__((visibility("default"))) void cuda_host_set_last_first(int value) {
  cuda_host::last_first = value != 0;
}

// Later launches run nothing and report this cudaError_t, as on a GPU that the build doesn't fit.
extern "C" __attribute__((visibility("default"))) void cuda_host_refuse_launches(int error) {
  cuda_host::refused_with = error;
}

// Later calls of cudaFuncSetAttribute fail with this cudaError_t; 0: they succeed.
extern "C" __attribute__((visibility("default"))) void cuda_host_refuse_attributes(int error) {
  cuda_host::attributes_refused_with = error;
}
