// Judges every load and store of a kernel: bounds, uninitialised shared memory, races.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runtime.h"

namespace cuda_host {
namespace {

constexpr uintptr_t kPageBytes = 4096;
constexpr size_t kCachedPages = 1024;
constexpr size_t kMaxShadowBytes = size_t{512} << 20;
constexpr uint32_t kMaxAccesses = 1u << 26;  // of a thread between two collectives: an endless loop
// Flags beside a thread's number (below 1024) in a record.
constexpr uint16_t kNumber = 0x3ff, kManyLanes = 0x400, kManyWarps = 0x800, kManyBlocks = 0x1000,
                   kAtomic = 0x2000;

// Who accessed a cell last: `interval` counts barriers over all blocks and launches.
struct Access {
  uint32_t interval = 0;
  uint32_t site = 0;
  uint16_t thread = 0;
  uint16_t epoch = 0;
};

struct Cell {
  Access write, read;
};

// Shadow of one page: a cell per 4 bytes, or per byte once a smaller piece was accessed.
struct Page {
  uintptr_t number = 0;
  uint32_t checked_in = 0;  // the launch that found it mapped
  int shift = 2;
  std::unique_ptr<Cell[]> cells{new Cell[kPageBytes >> 2]};

  void split() {
    std::unique_ptr<Cell[]> bytes(new Cell[kPageBytes]);
    for (size_t i = 0; i < kPageBytes; ++i) bytes[i] = cells[i >> 2];
    cells = std::move(bytes);
    shift = 0;
  }
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
Page* page_cache[kCachedPages];
size_t shadow_bytes = 0;

uint32_t interval = 0, launch_first = 0, block_first = 0;
std::vector<uint32_t> block_starts;  // first interval of each block of this launch, as they ran
std::vector<uint3> block_indices;

// Ordering between blocks: a block that fences and then updates an atomic releases what it wrote; a
// block that updates an atomic later acquires it.
std::vector<uint32_t> released;
uint32_t atomic_clock = 0, acquired = 0;
bool fenced = false;

// The first read of shared memory that nobody had written. Reported at the end of the interval: a
// thread that writes the bytes until then makes it a race.
std::string unwritten;

const char* name_of(Kind kind) {
  return kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic update";
}

std::string access_name(Kind kind, uintptr_t address, size_t bytes, uint32_t site) {
  char text[32];
  std::snprintf(text, sizeof text, "%#zx", static_cast<size_t>(address));
  return std::string(name_of(kind)) + " of " + std::to_string(bytes) + " bytes at " + text + " (" +
         source_line(site) + ")";
}

Page* find_page(uintptr_t number) {
  Page*& cached = page_cache[number % kCachedPages];
  if (cached != nullptr && cached->number == number && cached->checked_in == launch_first)
    return cached;
  auto& page = pages[number];
  if (page == nullptr) {
    page = std::make_unique<Page>();
    page->number = number;
    shadow_bytes += sizeof(Cell) * (kPageBytes >> 2);
  }
  if (page->checked_in != launch_first) {
    if (msync(reinterpret_cast<void*>(number * kPageBytes), kPageBytes, MS_ASYNC) != 0)
      return nullptr;
    page->checked_in = launch_first;
  }
  return cached = page.get();
}

bool is_other_block(const Access& earlier) {
  return earlier.interval >= launch_first && earlier.interval < block_first;
}

size_t block_of(const Access& access) {
  return static_cast<size_t>(
             std::upper_bound(block_starts.begin(), block_starts.end(), access.interval) -
             block_starts.begin()) -
         1;
}

bool is_released(const Access& earlier) {
  const uint32_t time = released[block_of(earlier)];
  return time != 0 && time <= acquired;
}

// Whether nothing orders `earlier` (of this launch) before what `thread` does now.
bool is_unordered(const Access& earlier, const Thread& thread) {
  if (earlier.interval < launch_first) return false;
  if (earlier.interval < block_first) return !is_released(earlier);
  if (earlier.interval < interval) return false;
  const int number = earlier.thread & kNumber;
  if (number == thread.number) return false;
  return number / kWarp != thread.number / kWarp || earlier.epoch >= thread.warp_epoch;
}

bool conflicts_with_readers(const Access& read, const Thread& thread) {
  if (is_unordered(read, thread)) return true;
  if (read.interval < launch_first) return false;
  if ((read.thread & kManyBlocks) != 0) return true;
  if (read.interval != interval) return false;
  return (read.thread & kManyWarps) != 0 ||
         ((read.thread & kManyLanes) != 0 && read.epoch >= thread.warp_epoch);
}

void add_reader(Access& read, const Thread& thread, uint32_t site) {
  Access mine{interval, site, static_cast<uint16_t>(thread.number), thread.warp_epoch};
  if (read.interval >= launch_first) {
    mine.thread |= read.thread & kManyBlocks;
    if (is_other_block(read)) mine.thread |= is_released(read) ? 0 : kManyBlocks;
    if (read.interval == interval) {
      mine.thread |= read.thread & kManyWarps;
      const int number = read.thread & kNumber;
      if (number / kWarp != thread.number / kWarp) mine.thread |= kManyWarps;
      if (read.epoch >= thread.warp_epoch) {
        mine.thread |= read.thread & kManyLanes;
        if (number != thread.number) mine.thread |= kManyLanes;
      }
    }
  }
  read = mine;
}

std::string other_access(const Access& earlier, const char* verb) {
  std::string who = "thread " + thread_name(earlier.thread & kNumber);
  if (is_other_block(earlier)) who += " of block " + triple(block_indices[block_of(earlier)]);
  return who + " " + verb + " (" + source_line(earlier.site) + ")";
}

void judge_cell(Cell& cell, Space space, Kind kind, uintptr_t address, size_t bytes, uint32_t site,
                Thread& thread) {
  if (space == Space::shared) {  // every block has its own
    if (cell.write.interval < block_first) {
      cell.write = {};
      if (kind != Kind::write && unwritten.empty())
        unwritten = "thread " + thread_name(thread.number) + ", " +
                    access_name(kind, address, bytes, site) +
                    ", which no thread of the block wrote";
    }
    if (cell.read.interval < block_first) cell.read = {};
  }
  const bool atomics = kind == Kind::atomic && (cell.write.thread & kAtomic) != 0;
  if (!atomics && is_unordered(cell.write, thread))
    report("race", access_name(kind, address, bytes, site) + " in " + region_name(address, space) +
                       ", which " + other_access(cell.write, "wrote") +
                       " without a barrier between");
  if (kind == Kind::read) {
    add_reader(cell.read, thread, site);
    return;
  }
  if (conflicts_with_readers(cell.read, thread))
    report("race", access_name(kind, address, bytes, site) + " in " + region_name(address, space) +
                       ", which " + other_access(cell.read, "read") + " without a barrier between");
  cell.write = {interval, site,
                static_cast<uint16_t>(thread.number | (kind == Kind::atomic ? kAtomic : 0)),
                thread.warp_epoch};
}

}  // namespace

void judge(const void* pointer, size_t bytes, Kind kind, const void* return_address) {
  Thread* const thread = current_thread;
  if (thread == nullptr) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - thread->stack_low < kStackBytes) return;
  if (address - reinterpret_cast<uintptr_t>(current_launch.arguments) <
      current_launch.argument_bytes)
    return;
  const uint32_t site = site_of(return_address);
  if (++thread->accesses > kMaxAccesses)
    report("endless loop", access_name(kind, address, bytes, site));
  std::string violation;
  const Space space = classify(address, bytes, kind, violation);
  if (!violation.empty())
    report("out of bounds", access_name(kind, address, bytes, site) + ": " + violation);
  if (space == Space::constant) return;
  if (counting_traffic && space == Space::global) count_access(address, bytes, kind, site, *thread);
  uintptr_t position = address;
  const uintptr_t end = address + bytes;
  while (position < end) {
    Page* const page = find_page(position / kPageBytes);
    if (page == nullptr)
      report("out of bounds", access_name(kind, address, bytes, site) + ": no memory is there");
    const uintptr_t stop = std::min(end, (position / kPageBytes + 1) * kPageBytes);
    if (page->shift != 0 && ((position | stop) & 3) != 0) {
      page->split();
      shadow_bytes += sizeof(Cell) * kPageBytes;
    }
    const uintptr_t first = position % kPageBytes >> page->shift,
                    last = (stop - 1) % kPageBytes >> page->shift;
    for (uintptr_t i = first; i <= last; ++i)
      judge_cell(page->cells[i], space, kind, address, bytes, site, *thread);
    position = stop;
  }
}

void begin_launch_memory() {
  if (shadow_bytes > kMaxShadowBytes) {
    pages.clear();
    std::fill(page_cache, page_cache + kCachedPages, nullptr);
    shadow_bytes = 0;
  }
  launch_first = ++interval;
  block_starts.clear();
  block_indices.clear();
  released.clear();
  atomic_clock = 0;
}

void begin_block_memory() {
  block_first = ++interval;
  block_starts.push_back(interval);
  block_indices.push_back(current_launch.block_index);
  released.push_back(0);
  unwritten.clear();
  acquired = 0;
  fenced = false;
}

void end_barrier_interval() {
  if (!unwritten.empty()) report("uninitialised shared memory", std::exchange(unwritten, ""));
  ++interval;
}

std::string take_unwritten() { return std::exchange(unwritten, ""); }

void memory_fence() { fenced = true; }

void atomic_access(const void* address, size_t bytes, bool is_float) {
  if (is_float) report("order-dependent sum", "atomic update of a floating-point number");
  judge(address, bytes, Kind::atomic, __builtin_return_address(0));
  acquired = ++atomic_clock;
  if (fenced) released.back() = atomic_clock;
}

}  // namespace cuda_host
