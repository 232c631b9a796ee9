// Runs the blocks of a launch, and decides when a collective has all the threads it needs.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

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
bool last_first = false;  // the order of blocks, of a block's warps and of a warp's lanes

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::shuffle:
      return "__shfl_sync";
    case Collective::shuffle_xor:
      return "__shfl_xor_sync";
    case Collective::shuffle_up:
      return "__shfl_up_sync";
    case Collective::shuffle_down:
      return "__shfl_down_sync";
    case Collective::ballot:
      return "__ballot_sync";
    case Collective::any:
      return "__any_sync";
    case Collective::all:
      return "__all_sync";
    default:
      return "__syncwarp";
  }
}

bool is_shuffle(Collective kind) { return kind <= Collective::shuffle_down; }

std::string hex(unsigned value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

// Where a thread that doesn't take part in a collective is instead.
std::string whereabouts(const Thread& thread) {
  switch (thread.state) {
    case State::in_warp_collective:
      return "waits in " + std::string(name_of(static_cast<Collective>(thread.kind))) +
             " with mask " + hex(thread.mask) + " at " + site_name(thread.site);
    case State::in_block_barrier:
      return "waits in __syncthreads at " + site_name(thread.site);
    case State::exited:
      return "has exited";
    default:
      return "runs on";
  }
}

bool is_same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

bool at_same_collective(const Thread& a, const Thread& b) {
  return b.state == State::in_warp_collective && a.kind == b.kind && a.mask == b.mask &&
         is_same(a.site, b.site);
}

// The lane of its warp that a shuffle reads; its own where CUDA says the value stays.
int source_lane(const Thread& thread) {
  const int lane = thread.number % kWarp, first = lane / thread.width * thread.width,
            end = first + thread.width;
  int source = lane;
  switch (static_cast<Collective>(thread.kind)) {
    case Collective::shuffle:
      return first + (thread.operand & (thread.width - 1));
    case Collective::shuffle_xor:
      source = lane ^ thread.operand;
      return source < end ? source : lane;
    case Collective::shuffle_up:
      source = lane - thread.operand;
      return source >= first ? source : lane;
    default:
      source = lane + thread.operand;
      return source < end ? source : lane;
  }
}

std::string collective_name(const Thread& thread) {
  return std::string(name_of(static_cast<Collective>(thread.kind))) + " at " +
         site_name(thread.site) + " by thread " + thread_name(thread.number) + " with mask " +
         hex(thread.mask);
}

// The warp's lanes that wait in the same collective as `first`; reports what makes it undefined.
bool resolve_collective(Thread* warp, int lanes, Thread& first) {
  const Collective kind = static_cast<Collective>(first.kind);
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((first.mask >> lane & 1u) == 0) continue;
    if (lane >= lanes) {
      if (!is_shuffle(kind)) continue;
      report("inactive lane", collective_name(first) + ": the mask names lane " +
                                  std::to_string(lane) + ", but the warp has only " +
                                  std::to_string(lanes) + " threads");
      return false;
    }
    const Thread& other = warp[lane];
    if (at_same_collective(first, other)) continue;
    if (other.state == State::exited && !is_shuffle(kind)) continue;
    return false;
  }
  unsigned ballot = 0, members = 0;
  uint16_t epoch = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    if ((first.mask >> lane & 1u) == 0 || warp[lane].state != State::in_warp_collective) continue;
    members |= 1u << lane;
    ballot |= static_cast<unsigned>(warp[lane].value & 1u) << lane;
    epoch = std::max(epoch, warp[lane].warp_epoch);
  }
  uint64_t values[kWarp] = {};
  for (int lane = 0; lane < lanes; ++lane) values[lane] = warp[lane].value;
  for (int lane = 0; lane < lanes; ++lane) {
    if ((members >> lane & 1u) == 0) continue;
    Thread& thread = warp[lane];
    if (is_shuffle(kind)) {
      const int source = source_lane(thread);
      if ((members >> source & 1u) == 0) {
        report("inactive lane", collective_name(thread) + " reads lane " + std::to_string(source) +
                                    ", which is not in the mask");
        return false;
      }
      thread.value = values[source];
    } else if (kind == Collective::ballot) {
      thread.value = ballot;
    } else if (kind == Collective::any) {
      thread.value = ballot != 0;
    } else if (kind == Collective::all) {
      thread.value = ballot == members;
    } else {
      thread.warp_epoch = static_cast<uint16_t>(epoch + 1);
    }
    thread.state = State::ready;
  }
  return true;
}

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
    for (int lane = 0; lane < lanes; ++lane) {
      if ((stuck->mask >> lane & 1u) == 0 || at_same_collective(*stuck, warp[lane])) continue;
      report("inactive lane", collective_name(*stuck) + ": lane " + std::to_string(lane) +
                                  " of the mask does not take part: it " + whereabouts(warp[lane]));
      return;
    }
  }
}

// All warps have stopped: ends the interval, then releases the barrier, or reports the threads that
// never reach it.
bool resolve_barrier(int count) {
  end_barrier_interval();
  if (has_violation()) return false;
  const Thread* waiting = nullptr;
  for (int i = 0; i < count && waiting == nullptr; ++i)
    if (threads[i].state == State::in_block_barrier) waiting = &threads[i];
  if (waiting == nullptr) return false;
  int predicates = 0;
  for (int i = 0; i < count; ++i) {
    const Thread& thread = threads[i];
    const bool together = thread.state == State::in_block_barrier && thread.kind == waiting->kind &&
                          is_same(thread.site, waiting->site);
    if (!together) {
      report("divergent barrier", "__syncthreads at " + site_name(waiting->site) + " by thread " +
                                      thread_name(waiting->number) + " is not reached by thread " +
                                      thread_name(i) + ", which " + whereabouts(thread));
      return false;
    }
    predicates += thread.value != 0;
  }
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    const Barrier kind = static_cast<Barrier>(thread.kind);
    thread.value = static_cast<uint64_t>(kind == Barrier::count ? predicates
                                         : kind == Barrier::any ? predicates != 0
                                                                : predicates == count);
    thread.warp_epoch = 0;
    thread.state = State::ready;
  }
  return true;
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
  const int warps = (count + kWarp - 1) / kWarp;
  do {
    for (int i = 0; i < warps && !has_violation(); ++i) {
      const int first = (last_first ? warps - 1 - i : i) * kWarp;
      run_warp(threads + first, std::min(kWarp, count - first));
    }
  } while (!has_violation() && resolve_barrier(count));
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

// "gkt::launch<...>(...) [with auto Kernel = NAME; ...]" -> NAME
std::string kernel_name(const std::string& name) {
  const std::string marker = "auto Kernel = ";
  const size_t begin = name.find(marker);
  if (begin == std::string::npos) return name;
  size_t end = begin + marker.size();
  for (int depth = 0; end < name.size() && !(depth == 0 && (name[end] == ';' || name[end] == ']'));
       ++end)
    depth += (name[end] == '[') - (name[end] == ']');
  return name.substr(begin + marker.size(), end - begin - marker.size());
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
void* dynamic_shared_memory() { return shared_arena(); }

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int operand, int width,
                         Site site) {
  Thread& thread = *current_thread;
  thread.kind = static_cast<int>(kind);
  thread.mask = mask;
  thread.value = value;
  thread.operand = operand;
  thread.width = width;
  thread.site = site;
  if ((mask >> (thread.number % kWarp) & 1u) == 0)
    report("inactive lane", collective_name(thread) + ": the calling lane is not in the mask");
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0)
    report("invalid argument", collective_name(thread) + ": width is " + std::to_string(width) +
                                   "; it must be a power of two up to 32");
  thread.state = State::in_warp_collective;
  suspend_fiber(thread);
  return thread.value;
}

int block_barrier(Barrier kind, int predicate, Site site) {
  Thread& thread = *current_thread;
  thread.kind = static_cast<int>(kind);
  thread.value = predicate != 0;
  thread.site = site;
  thread.state = State::in_block_barrier;
  suspend_fiber(thread);
  return static_cast<int>(thread.value);
}

// The lanes that would run together if the warp's threads never diverged.
unsigned active_mask() {
  const int first = current_thread->number / kWarp * kWarp;
  unsigned mask = 0;
  for (int i = first; i < std::min(first + kWarp, current_launch.thread_count); ++i)
    if (threads[i].state != State::exited) mask |= 1u << (i - first);
  return mask;
}

void trap(Site site) {
  report("trap", "__trap at " + site_name(site));
  __builtin_unreachable();
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, Entry entry,
            const void* arguments, size_t argument_bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  if (!pending_error.empty()) return;
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

}  // namespace cuda_host

// Later launches run their last block, warp and lane first: a right kernel gives the same bits.
extern "C" __attribute__((visibility("default"))) void cuda_host_set_last_first(int value) {
  cuda_host::last_first = value != 0;
}
