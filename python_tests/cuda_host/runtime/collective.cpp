// Barriers, shuffles and votes: decides when one has all the threads it needs, and what is
// undefined.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "runtime.h"

namespace cuda_host {
namespace {

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

// The source line of the collective a thread waits in, with the line that it was inlined into.
std::string line_of(const Thread& thread) {
  const std::string line = source_line(site_of(thread.caller));
  return line.rfind("offset", 0) == 0 ? site_name(thread.site) : line;
}

// Where a thread that doesn't take part in a collective is instead.
std::string whereabouts(const Thread& thread) {
  switch (thread.state) {
    case State::in_warp_collective:
      return "waits in " + std::string(name_of(static_cast<Collective>(thread.kind))) +
             " with mask " + hex(thread.mask) + " at " + line_of(thread);
    case State::in_block_barrier:
      return "waits in __syncthreads at " + line_of(thread);
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
  return std::string(name_of(static_cast<Collective>(thread.kind))) + " at " + line_of(thread) +
         " by thread " + thread_name(thread.number) + " with mask " + hex(thread.mask);
}

}  // namespace

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

void report_stuck(const Thread* warp, int lanes, const Thread& stuck) {
  for (int lane = 0; lane < lanes; ++lane) {
    if ((stuck.mask >> lane & 1u) == 0 || at_same_collective(stuck, warp[lane])) continue;
    report("inactive lane", collective_name(stuck) + ": lane " + std::to_string(lane) +
                                " of the mask does not take part: it " + whereabouts(warp[lane]));
    return;
  }
}

bool resolve_barrier(Thread* threads, int count) {
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
      report("divergent barrier", "__syncthreads at " + line_of(*waiting) + " by thread " +
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

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int operand, int width,
                         Site site) {
  Thread& thread = *current_thread;
  thread.kind = static_cast<int>(kind);
  thread.mask = mask;
  thread.value = value;
  thread.operand = operand;
  thread.width = width;
  thread.site = site;
  thread.caller = __builtin_return_address(0);
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
  thread.caller = __builtin_return_address(0);
  thread.state = State::in_block_barrier;
  suspend_fiber(thread);
  return static_cast<int>(thread.value);
}

// The lanes that would run together if the warp's threads never diverged.
unsigned active_mask() {
  const int first = current_thread->number / kWarp * kWarp;
  const Thread* threads = current_launch.threads;
  unsigned mask = 0;
  for (int i = first; i < std::min(first + kWarp, current_launch.thread_count); ++i)
    if (threads[i].state != State::exited) mask |= 1u << (i - first);
  return mask;
}

}  // namespace cuda_host
