// Judges every load and store of a kernel: bounds, uninitialised shared memory, races. Kernels are
// compiled with -fsanitize=thread, whose calls (__tsan_read4, ...) end here instead of in libtsan.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
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
constexpr size_t kArenaBytes = 2 * kMaxSharedBytes;

enum class Kind { read, write, atomic };
enum class Space { global, shared };

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

struct Image {
  uintptr_t begin = 0, end = 0, bss_begin = 0, bss_end = 0;
};

int find_image(dl_phdr_info* info, size_t, void* opaque) {
  Image& image = *static_cast<Image*>(opaque);
  const uintptr_t here = reinterpret_cast<uintptr_t>(&find_image);
  Image found;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (found.end == 0) found.begin = begin;
    found.end = begin + header.p_memsz;
    if ((header.p_flags & PF_W) != 0) {
      found.bss_begin = begin + header.p_filesz;
      found.bss_end = begin + header.p_memsz;
    }
  }
  if (here < found.begin || here >= found.end) return 0;
  image = found;
  return 1;
}

// This shared library. Static __shared__ variables are its zero-initialised data.
const Image& image() {
  static const Image found = [] {
    Image result;
    dl_iterate_phdr(&find_image, &result);
    return result;
  }();
  return found;
}

uintptr_t host_stack_low = 0, host_stack_high = 0, arena = 0;

struct Buffer {
  uintptr_t begin, end;
};
std::vector<Buffer> buffers;  // sorted; empty: any mapped address may be accessed

using RegionIsPoisoned = void* (*)(void*, size_t);
RegionIsPoisoned asan_region_is_poisoned() {
  static const auto function =
      reinterpret_cast<RegionIsPoisoned>(dlsym(RTLD_DEFAULT, "__asan_region_is_poisoned"));
  return function;
}

const char* name_of(Kind kind) {
  return kind == Kind::read ? "read" : kind == Kind::write ? "write" : "atomic update";
}

std::string hex(uintptr_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "%#zx", static_cast<size_t>(value));
  return text;
}

std::string access_name(Kind kind, uintptr_t address, size_t bytes, uint32_t site) {
  return std::string(name_of(kind)) + " of " + std::to_string(bytes) + " bytes at " + hex(address) +
         " (" + source_line(site) + ")";
}

// Outside of what this thread may access: the reason; empty otherwise. Sets the memory's space.
std::string reason_against(uintptr_t address, size_t bytes, Kind kind, Space& space) {
  space = Space::global;
  const uintptr_t end = address + bytes;
  if (address >= arena && address < arena + kArenaBytes) {
    space = Space::shared;
    if (end <= arena + current_launch.shared_bytes) return "";
    return "offset " + std::to_string(address - arena) + " of dynamic shared memory, which has " +
           std::to_string(current_launch.shared_bytes) + " bytes";
  }
  const Image& library = image();
  if (address >= library.begin && address < library.end) {
    if (address >= library.bss_begin && end <= library.bss_end) {
      space = Space::shared;
      return "";
    }
    return kind == Kind::read ? "" : "constant memory";
  }
  if (address - fiber_stacks() < kMaxThreads * kStackBytes)
    return "local memory of thread " +
           thread_name(static_cast<int>((address - fiber_stacks()) / kStackBytes));
  if (address >= host_stack_low && address < host_stack_high)
    return "a local variable of host code";
  if (!buffers.empty()) {
    auto next = std::upper_bound(
        buffers.begin(), buffers.end(), address,
        [](uintptr_t value, const Buffer& buffer) { return value < buffer.begin; });
    if (next == buffers.begin()) return "before the first of the buffers given to the kernel";
    const Buffer& buffer = *std::prev(next);
    if (end > buffer.end)
      return "byte " + std::to_string(address - buffer.begin) + " of a buffer of " +
             std::to_string(buffer.end - buffer.begin) + " bytes";
  }
  if (const auto poisoned = asan_region_is_poisoned())
    if (poisoned(reinterpret_cast<void*>(address), bytes) != nullptr)
      return "no live allocation (AddressSanitizer)";
  return "";
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
  const char* const where = space == Space::shared ? "shared" : "global";
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
    report("race", access_name(kind, address, bytes, site) + " in " + where + " memory, which " +
                       other_access(cell.write, "wrote") + " without a barrier between");
  if (kind == Kind::read) {
    add_reader(cell.read, thread, site);
    return;
  }
  if (conflicts_with_readers(cell.read, thread))
    report("race", access_name(kind, address, bytes, site) + " in " + where + " memory, which " +
                       other_access(cell.read, "read") + " without a barrier between");
  cell.write = {interval, site,
                static_cast<uint16_t>(thread.number | (kind == Kind::atomic ? kAtomic : 0)),
                thread.warp_epoch};
}

void judge(const void* pointer, size_t bytes, Kind kind, const void* return_address) {
  Thread* const thread = current_thread;
  if (thread == nullptr) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - thread->stack_low < kStackBytes) return;
  if (address - reinterpret_cast<uintptr_t>(current_launch.arguments) <
      current_launch.argument_bytes)
    return;
  const uint32_t site =
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) - 1 - image().begin);
  if (++thread->accesses > kMaxAccesses)
    report("endless loop", access_name(kind, address, bytes, site));
  Space space;
  const std::string reason = reason_against(address, bytes, kind, space);
  if (!reason.empty())
    report("out of bounds", access_name(kind, address, bytes, site) + ": " + reason);
  const Image& library = image();
  if (space == Space::global && address >= library.begin && address < library.end)
    return;  // constants
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

}  // namespace

void begin_launch_memory() {
  if (arena == 0) {
    void* memory =
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    arena = reinterpret_cast<uintptr_t>(memory);
  }
  if (shadow_bytes > kMaxShadowBytes) {
    pages.clear();
    std::fill(page_cache, page_cache + kCachedPages, nullptr);
    shadow_bytes = 0;
  }
  pthread_attr_t attributes;
  void* low = nullptr;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &low, &bytes);
    pthread_attr_destroy(&attributes);
  }
  host_stack_low = reinterpret_cast<uintptr_t>(low);
  host_stack_high = host_stack_low + bytes;
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
  // All bits set: NaN in every floating-point format, should a read escape the recorder.
  std::fill_n(reinterpret_cast<unsigned char*>(arena), current_launch.shared_bytes, 0xff);
}

void end_barrier_interval() {
  if (!unwritten.empty()) report("uninitialised shared memory", std::exchange(unwritten, ""));
  ++interval;
}

std::string take_unwritten() { return std::exchange(unwritten, ""); }

void* shared_arena() { return reinterpret_cast<void*>(arena); }

void memory_fence() { fenced = true; }

void atomic_access(const void* address, size_t bytes, bool is_float) {
  if (is_float) report("order-dependent sum", "atomic update of a floating-point number");
  judge(address, bytes, Kind::atomic, __builtin_return_address(0));
  acquired = ++atomic_clock;
  if (fenced) released.back() = atomic_clock;
}

std::string source_line(uint32_t site) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&find_image), &info) == 0) return "unknown";
  // addr2line of binutils; a sanitizer preloaded into this process isn't meant for it.
  const std::string command = "env -u LD_PRELOAD addr2line -s -e '" + std::string(info.dli_fname) +
                              "' " + hex(site) + " 2>/dev/null";
  std::string line;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char text[512];
    if (std::fgets(text, sizeof text, pipe) != nullptr) line = text;
    pclose(pipe);
  }
  line = line.substr(0, line.find_first_of(" \n"));
  return line.empty() || line[0] == '?' ? "offset " + hex(site) : line;
}

}  // namespace cuda_host

extern "C" {

// The only memory that later launches may access, besides shared and local memory; none: any.
__attribute__((visibility("default"))) void cuda_host_set_buffers(const uintptr_t* begins,
                                                                  const size_t* sizes, int count) {
  cuda_host::buffers.clear();
  for (int i = 0; i < count; ++i) cuda_host::buffers.push_back({begins[i], begins[i] + sizes[i]});
  std::sort(
      cuda_host::buffers.begin(), cuda_host::buffers.end(),
      [](const cuda_host::Buffer& a, const cuda_host::Buffer& b) { return a.begin < b.begin; });
}

#define CUDA_HOST_HOOKS(bytes)                                                       \
  void __tsan_read##bytes(void* p) {                                                 \
    cuda_host::judge(p, bytes, cuda_host::Kind::read, __builtin_return_address(0));  \
  }                                                                                  \
  void __tsan_write##bytes(void* p) {                                                \
    cuda_host::judge(p, bytes, cuda_host::Kind::write, __builtin_return_address(0)); \
  }                                                                                  \
  void __tsan_unaligned_read##bytes(void* p) {                                       \
    cuda_host::judge(p, bytes, cuda_host::Kind::read, __builtin_return_address(0));  \
  }                                                                                  \
  void __tsan_unaligned_write##bytes(void* p) {                                      \
    cuda_host::judge(p, bytes, cuda_host::Kind::write, __builtin_return_address(0)); \
  }
CUDA_HOST_HOOKS(1)
CUDA_HOST_HOOKS(2)
CUDA_HOST_HOOKS(4)
CUDA_HOST_HOOKS(8)
CUDA_HOST_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  cuda_host::judge(p, bytes, cuda_host::Kind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  cuda_host::judge(p, bytes, cuda_host::Kind::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Atomics of the C++ library in host code; kernels use CUDA's.
#define CUDA_HOST_ATOMICS(bits)                                                                    \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {               \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t value, int) {        \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                                \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t value, \
                                                 int) {                                            \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                         \
  }
CUDA_HOST_ATOMICS(8)
CUDA_HOST_ATOMICS(32)
CUDA_HOST_ATOMICS(64)
}
