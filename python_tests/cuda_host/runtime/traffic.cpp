// Counts global memory accesses by source line, and the 32-byte sectors that a warp's lanes touch
// together: what a profiler would say about coalescing.
#include <algorithm>
#include <bitset>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "runtime.h"

namespace cuda_host {

bool counting_traffic = false;

namespace {

constexpr uintptr_t kSector = 32, kPage = 4096;

struct Counts {
  uint64_t accesses = 0, bytes = 0, sectors = 0, most_of_a_thread = 0;
  void add(const Counts& other) {
    accesses += other.accesses;
    bytes += other.bytes;
    sectors += other.sectors;
    most_of_a_thread = std::max(most_of_a_thread, other.most_of_a_thread);
  }
};

using Line = std::tuple<std::string, int, uint32_t>;  // kernel, kind, site
std::map<Line, Counts> lines;
// Bytes touched at all, by kernel and kind.
std::map<std::pair<std::string, int>, std::unordered_map<uintptr_t, std::bitset<kPage>>> touched;

// Within a block: how often each thread ran each site, and the sectors of each warp-wide request.
std::map<std::pair<uint32_t, int>, uint32_t> occurrences;
std::map<std::tuple<uint32_t, int, uint32_t, int>, std::vector<uintptr_t>> requests;

const char* name_of(int kind) {
  return kind == static_cast<int>(Kind::read)    ? "read"
         : kind == static_cast<int>(Kind::write) ? "write"
                                                 : "atomic update";
}

std::string report_traffic() {
  std::string text;
  const auto append = [&](const std::string& kernel, const std::string& line, int kind,
                          const Counts& counts, uint64_t distinct) {
    text += kernel + "\t" + line + "\t" + name_of(kind) + "\t" + std::to_string(counts.accesses) +
            "\t" + std::to_string(counts.bytes) + "\t" + std::to_string(counts.sectors * kSector) +
            "\t" + std::to_string(distinct) + "\t" + std::to_string(counts.most_of_a_thread) + "\n";
  };
  std::map<std::pair<std::string, int>, Counts> totals;
  for (const auto& [line, counts] : lines) {
    const auto& [kernel, kind, site] = line;
    append(kernel, source_line(site), kind, counts, 0);
    totals[{kernel, kind}].add(counts);
  }
  for (const auto& [key, counts] : totals) {
    uint64_t distinct = 0;
    for (const auto& page : touched[key]) distinct += page.second.count();
    append(key.first, "", key.second, counts, distinct);
  }
  return text;
}

}  // namespace

void count_access(uintptr_t address, size_t bytes, Kind kind, uint32_t site, const Thread& thread) {
  const int number = static_cast<int>(kind), warp = thread.number / kWarp;
  Counts& counts = lines[{current_launch.kernel, number, site}];
  counts.accesses += 1;
  counts.bytes += bytes;
  auto& pages = touched[{current_launch.kernel, number}];
  for (uintptr_t i = address; i < address + bytes; ++i) pages[i / kPage].set(i % kPage);
  const uint32_t occurrence = occurrences[{site, thread.number}]++;
  counts.most_of_a_thread = std::max<uint64_t>(counts.most_of_a_thread, occurrence + 1);
  auto& sectors = requests[{site, warp, occurrence, number}];
  for (uintptr_t sector = address / kSector; sector <= (address + bytes - 1) / kSector; ++sector)
    if (std::find(sectors.begin(), sectors.end(), sector) == sectors.end())
      sectors.push_back(sector);
}

void end_block_traffic() {
  for (const auto& [request, sectors] : requests)
    lines[{current_launch.kernel, std::get<3>(request), std::get<0>(request)}].sectors +=
        sectors.size();
  requests.clear();
  occurrences.clear();
}

}  // namespace cuda_host

// Starts counting from nothing (1), or ends it (0) and returns one line of text per source line:
// kernel, line, kind, accesses, bytes, bytes of sectors, distinct bytes, most accesses of a thread
// in a line, separated by tabs.
extern "C" __attribute__((visibility("default"))) const char* cuda_host_count_traffic(int on) {
  static std::string text;
  text = on != 0 ? "" : cuda_host::report_traffic();
  cuda_host::counting_traffic = on != 0;
  cuda_host::lines.clear();
  cuda_host::touched.clear();
  return text.c_str();
}
