// Memory that a kernel fills for the first time: with 4 KiB pages the kernel's page faults can cost
// several times the writes themselves.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gkt {

// Asks for huge pages in a large fresh buffer, before its first use. A hint: it may change nothing.
inline void prefer_huge_pages(void* buffer, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(buffer) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(buffer) + bytes) & ~(kHugePage - 1);
  constexpr uintptr_t kLarge = uintptr_t{16}
                               << 20;  // smaller ones are often recycled, faults and all
  if (end > begin && bytes >= kLarge)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)buffer;
  (void)bytes;
#endif
}

}  // namespace gkt
