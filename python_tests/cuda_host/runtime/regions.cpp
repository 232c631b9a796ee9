// What an address is: shared memory, a constant, a local variable, a buffer; and which source line
// a call came from.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runtime.h"

namespace cuda_host {
namespace {

constexpr size_t kArenaBytes = 2 * kMaxSharedBytes;

struct Range {
  uintptr_t begin = 0, end = 0;
  std::string name;
  bool contains(uintptr_t address) const { return address >= begin && address < end; }
};

// The last range that begins at or before the address; null when none does.
const Range* last_before(const std::vector<Range>& sorted, uintptr_t address) {
  const auto next =
      std::upper_bound(sorted.begin(), sorted.end(), address,
                       [](uintptr_t value, const Range& range) { return value < range.begin; });
  return next == sorted.begin() ? nullptr : &*std::prev(next);
}

void sort(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
}

// This shared library, its functions, and their static variables: `__shared__` ones are among its
// zero-initialised data.
struct Image {
  uintptr_t base = 0;
  Range all, zeroed;
  std::vector<Range> variables, functions;
  std::string path;
};

int find_image(dl_phdr_info* info, size_t, void* opaque) {
  Image& image = *static_cast<Image*>(opaque);
  Range all, zeroed;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (all.end == 0) all.begin = begin;
    all.end = begin + header.p_memsz;
    if ((header.p_flags & PF_W) != 0) zeroed = {begin + header.p_filesz, all.end, ""};
  }
  if (!all.contains(reinterpret_cast<uintptr_t>(&find_image))) return 0;
  image.base = info->dlpi_addr;
  image.all = all;
  image.zeroed = zeroed;
  return 1;
}

std::string demangled(const std::string& symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string name = status == 0 ? text : symbol;
  std::free(text);
  return name;
}

// Functions and their static variables, from the symbol table of the library's file. build.py has
// put a red zone, a symbol of its own, behind each variable.
void read_symbols(Image& image) {
  std::ifstream file(image.path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() < sizeof(ElfW(Ehdr)))
    throw std::runtime_error("cuda-host: can't read " + image.path);
  const auto at = [&](size_t offset) { return bytes.data() + offset; };
  const auto& header = *reinterpret_cast<const ElfW(Ehdr)*>(at(0));
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(at(header.e_shoff));
  for (int i = 0; i < header.e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(at(sections[i].sh_offset));
    const char* names = at(sections[sections[i].sh_link].sh_offset);
    for (size_t j = 0; j < sections[i].sh_size / sizeof(ElfW(Sym)); ++j) {
      const char* name = names + symbols[j].st_name;
      const uintptr_t begin = image.base + symbols[j].st_value;
      const Range range{begin, begin + symbols[j].st_size, name};
      const int type = ELF64_ST_TYPE(symbols[j].st_info);
      if (type == STT_FUNC && symbols[j].st_size != 0)
        image.functions.push_back(range);
      else if (type == STT_OBJECT && std::strncmp(name, "_ZZ", 3) == 0 &&
               std::strstr(name, ".redzone") == nullptr && image.zeroed.contains(begin))
        image.variables.push_back(range);
    }
  }
  sort(image.functions);
  sort(image.variables);
}

const Image& image() {
  static const Image found = [] {
    Image result;
    dl_iterate_phdr(&find_image, &result);
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&find_image), &info) != 0) result.path = info.dli_fname;
    read_symbols(result);
    return result;
  }();
  return found;
}

struct Regions {
  const Image* library = nullptr;
  uintptr_t arena = 0;
  Range stacks;
  void* (*asan_region_is_poisoned)(void*, size_t) = nullptr;
};
Regions regions;
thread_local Range host_stack;
std::vector<Range> buffers;  // sorted; empty: any mapped address may be accessed

// "gkt::kernel<float>(...)::tile" -> "tile"; other names stay.
std::string short_name(const Range& range) {
  const std::string name = demangled(range.name);
  const size_t scope = name.rfind("::");
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

std::string offset_text(uintptr_t address, const Range& range) {
  return "byte " + std::to_string(address - range.begin) + " of " + short_name(range) + " of " +
         std::to_string(range.end - range.begin) + " bytes";
}

Range find_host_stack() {
  pthread_attr_t attributes;
  void* low = nullptr;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) return {};
  pthread_attr_getstack(&attributes, &low, &bytes);
  pthread_attr_destroy(&attributes);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(low);
  return {begin, begin + bytes, ""};
}

}  // namespace

void begin_launch_regions() {
  if (regions.arena == 0) {
    void* memory =
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("cuda-host: no memory for shared memory");
    regions.library = &image();
    regions.arena = reinterpret_cast<uintptr_t>(memory);
    regions.stacks = {fiber_stacks(), fiber_stacks() + kMaxThreads * kStackBytes, ""};
    regions.asan_region_is_poisoned = reinterpret_cast<void* (*)(void*, size_t)>(
        dlsym(RTLD_DEFAULT, "__asan_region_is_poisoned"));
  }
  if (host_stack.end == 0) host_stack = find_host_stack();
}

// All bits set: NaN in every floating-point format, should a read escape the recorder.
void poison_dynamic_shared_memory() {
  std::memset(dynamic_shared_memory(), 0xff, current_launch.shared_bytes);
}

void* dynamic_shared_memory() { return reinterpret_cast<void*>(regions.arena); }

uint32_t site_of(const void* return_address) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) - 1 -
                               regions.library->base);
}

Space classify(uintptr_t address, size_t bytes, Kind kind, std::string& violation) {
  const uintptr_t end = address + bytes;
  const Image& library = *regions.library;
  if (address >= regions.arena && address < regions.arena + kArenaBytes) {
    if (end > regions.arena + current_launch.shared_bytes)
      violation = "offset " + std::to_string(address - regions.arena) +
                  " of dynamic shared memory, which has " +
                  std::to_string(current_launch.shared_bytes) + " bytes";
    return Space::shared;
  }
  if (library.all.contains(address)) {
    if (!library.zeroed.contains(address)) {
      if (kind != Kind::read) violation = "constant memory";
      return Space::constant;
    }
    const Range* variable = last_before(library.variables, address);
    if (variable == nullptr)
      violation = "before the first shared variable";
    else if (end > variable->end)
      violation = offset_text(address, *variable);
    return Space::shared;
  }
  if (regions.stacks.contains(address)) {
    violation = "local memory of thread " +
                thread_name(static_cast<int>((address - regions.stacks.begin) / kStackBytes));
  } else if (host_stack.contains(address)) {
    violation = "a local variable of host code";
  } else if (!buffers.empty()) {
    const Range* buffer = last_before(buffers, address);
    if (buffer == nullptr)
      violation = "before the first of the buffers given to the kernel";
    else if (end > buffer->end)
      violation = offset_text(address, *buffer);
  } else if (regions.asan_region_is_poisoned != nullptr &&
             regions.asan_region_is_poisoned(reinterpret_cast<void*>(address), bytes) != nullptr) {
    violation = "no live allocation (AddressSanitizer)";
  }
  return Space::global;
}

std::string region_name(uintptr_t address, Space space) {
  if (space == Space::global) return "global memory";
  const Range* variable = last_before(regions.library->variables, address);
  if (variable == nullptr || !variable->contains(address)) return "dynamic shared memory";
  return "shared memory '" + short_name(*variable) + "'";
}

// With template arguments, without namespaces, return type and parameters.
std::string kernel_name(const void* function) {
  const Range* range = last_before(image().functions, reinterpret_cast<uintptr_t>(function));
  if (range == nullptr) return "unknown";
  std::string name = demangled(range->name);
  for (const std::string prefix : {"void ", "gkt::", "(anonymous namespace)::"})
    if (name.rfind(prefix, 0) == 0) name.erase(0, prefix.size());
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

std::string source_line(uint32_t site) {
  char offset[32];
  std::snprintf(offset, sizeof offset, "0x%x", site);
  // addr2line of binutils; a sanitizer preloaded into this process isn't meant for it.
  const std::string command = "env -u LD_PRELOAD addr2line -s -i -e '" + regions.library->path +
                              "' " + offset + " 2>/dev/null";
  std::vector<std::string> frames;  // the innermost inlined function first
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char text[512];
    while (std::fgets(text, sizeof text, pipe) != nullptr) {
      const std::string frame(text, std::strcspn(text, " \n"));
      if (frame[0] != '?' && frame.rfind("cuda_runtime.h:", 0) != 0) frames.push_back(frame);
    }
    pclose(pipe);
  }
  if (frames.empty()) return std::string("offset ") + offset;
  return frames.size() == 1 ? frames[0] : frames.front() + " from " + frames.back();
}

}  // namespace cuda_host

// The only memory that later launches may access, besides shared and local memory; none: any.
extern "C" __attribute__((visibility("default"))) void cuda_host_set_buffers(
    const uintptr_t* begins, const size_t* sizes, int count) {
  cuda_host::buffers.clear();
  for (int i = 0; i < count; ++i)
    cuda_host::buffers.push_back({begins[i], begins[i] + sizes[i], "a buffer"});
  cuda_host::sort(cuda_host::buffers);
}
