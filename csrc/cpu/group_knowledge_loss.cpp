// group_knowledge_loss on the CPU: tiles of rows over the threads, and the C entry.
#include <algorithm>
#include <type_traits>

#include "cpu/group_knowledge_loss_tile.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gkt {

GKT_FOR_EACH_ISA(size_t group_knowledge_loss_scratch(const gkt_group_knowledge_loss_params& params);
                 void group_knowledge_loss_run(const gkt_group_knowledge_loss_params& params,
                                               const GroupKnowledgeLossPlan& plan);)

namespace GKT_ISA {
namespace {

// A line of rows: where it lies in all dimensions but the innermost. The divisions are done once
// for all tensors.
class Line {
 public:
  Line(const Params& p, int64_t line) : dims_(p.row_dims - 1) {
    for (int d = dims_ - 1; d >= 0; --d) {
      indices_[d] = line % p.row_sizes[d];
      line /= p.row_sizes[d];
    }
  }

  // Of its row `row` in a tensor with these strides.
  int64_t offset(const int64_t* strides, int64_t row) const {
    int64_t offset = row * strides[dims_];
    for (int d = 0; d < dims_; ++d) offset += indices_[d] * strides[d];
    return offset;
  }

 private:
  const int dims_;
  int64_t indices_[GKT_MAX_ROW_DIMS];
};

template <class TileType>
void run(const Params& p, const GroupKnowledgeLossPlan& plan) {
  const int inner = p.row_dims - 1;
  constexpr int64_t kRows = TileType::kRows;
  const int64_t tiles_inside = (p.row_sizes[inner] + kRows - 1) / kRows;
  int64_t tiles = tiles_inside;
  for (int d = 0; d < inner; ++d) tiles *= p.row_sizes[d];
  parallel_for(plan.chunks, plan.threads, [&](int64_t begin, int64_t end, int thread) {
    TileType tile(p, plan, thread);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* sums = plan.sums + chunk * (p.streams + 1);
      const int64_t last = tiles * (chunk + 1) / plan.chunks;
      for (int64_t t = tiles * chunk / plan.chunks; t < last; ++t) {
        const int64_t outer = t / tiles_inside, row = t % tiles_inside * kRows;
        const Line line(p, outer);
        const auto offset = [&](const int64_t* strides) { return line.offset(strides, row); };
        const int64_t count = std::min(p.row_sizes[inner] - row, kRows);
        const int64_t in_share = p.subnet_rows - (outer * p.row_sizes[inner] + row);
        tile.run({offset(p.full.row_strides), offset(p.full.gradient_row_strides),
                  static_cast<int>(count)},
                 {offset(p.subnets.row_strides), offset(p.subnets.gradient_row_strides),
                  static_cast<int>(std::clamp(in_share, int64_t{0}, count))},
                 offset(p.targets_row_strides), sums);
      }
    }
    finish_streaming();
  });
}

// With few classes a vector of them is mostly unused lanes and reductions.
template <class T>
bool rows_in_lanes(const Params& p) {
  constexpr int64_t kFewClasses = 8 * kLanes<typename ArithmeticOf<T>::type>;
  const int inner = p.row_dims - 1;
  return p.classes < kFewClasses || (p.full.row_strides[inner] == 1 && p.full.class_stride != 1);
}

// Calls body(tile type) for the dtype and the arrangement of the problem.
template <class Body>
void dispatch(const Params& p, const Body& body) {
  const auto arrange = [&](auto* dtype) {
    using T = std::remove_pointer_t<decltype(dtype)>;
    if (rows_in_lanes<T>(p))
      body(static_cast<Tile<T, true>*>(nullptr));
    else
      body(static_cast<Tile<T, false>*>(nullptr));
  };
  switch (p.dtype) {
    case GKT_FLOAT64:
      return arrange(static_cast<double*>(nullptr));
    case GKT_BFLOAT16:
      return arrange(static_cast<bfloat16*>(nullptr));
    case GKT_FLOAT16:
      return arrange(static_cast<float16*>(nullptr));
    default:
      return arrange(static_cast<float*>(nullptr));
  }
}

}  // namespace

size_t group_knowledge_loss_scratch(const Params& p) {
  size_t bytes = 0;
  dispatch(p, [&](auto* tile) { bytes = std::remove_pointer_t<decltype(tile)>::scratch_bytes(p); });
  return bytes;
}

void group_knowledge_loss_run(const Params& p, const GroupKnowledgeLossPlan& plan) {
  dispatch(p, [&](auto* tile) { run<std::remove_pointer_t<decltype(tile)>>(p, plan); });
}

}  // namespace GKT_ISA
}  // namespace gkt

#if defined(GKT_ISA_baseline)

#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/pages.h"
#include "guard.h"

namespace gkt {

namespace {

constexpr int64_t kMaxChunks = 256;
constexpr int64_t kLogitsPerThread = 16384;  // fewer are done sooner than a thread wakes up

struct Free {
  void operator()(char* pointer) const { std::free(pointer); }
};

int64_t count_rows(const gkt_group_knowledge_loss_params& p) {
  int64_t rows = 1;
  for (int d = 0; d < p.row_dims; ++d) rows *= p.row_sizes[d];
  return rows;
}

// Rows that the means of cross entropies count.
struct CountedRows {
  int64_t full = 0, subnets = 0;
};

// Rows whose class index is not ignore_index; checks that those lie in [0, classes).
CountedRows count_class_indices(const gkt_group_knowledge_loss_params& p, int64_t rows) {
  const int inner = p.row_dims - 1;
  const int64_t size = p.row_sizes[inner], stride = p.targets_row_strides[inner];
  CountedRows counted;
  for (int64_t outer = 0; outer * size < rows; ++outer) {
    const int64_t* targets = static_cast<const int64_t*>(p.targets) +
                             baseline::Line(p, outer).offset(p.targets_row_strides, 0);
    int64_t wrong = 0;
    const auto count = [&](int64_t begin, int64_t end) {
      int64_t total = 0;
      for (int64_t j = begin; j < end; ++j) {
        const int64_t target = targets[j * stride];
        const int64_t counts = target != p.ignore_index;
        total += counts;
        wrong += counts & (static_cast<uint64_t>(target) >= static_cast<uint64_t>(p.classes));
      }
      return total;
    };
    const int64_t in_share = std::clamp(p.subnet_rows - outer * size, int64_t{0}, size);
    const int64_t own = count(0, in_share);
    counted.subnets += own;
    counted.full += own + count(in_share, size);
    if (wrong == 0) continue;
    for (int64_t j = 0; j < size; ++j) {
      const int64_t target = targets[j * stride];
      if (target != p.ignore_index && (target < 0 || target >= p.classes))
        throw InvalidArgument("targets has class index " + std::to_string(target) +
                              "; it must lie in [0, " + std::to_string(p.classes) +
                              ") or equal ignore_index=" + std::to_string(p.ignore_index));
    }
  }
  return counted;
}

void check(const gkt_group_knowledge_loss_params& p) {
  if (p.row_dims < 1 || p.row_dims > GKT_MAX_ROW_DIMS)
    throw InvalidArgument("row_dims is " + std::to_string(p.row_dims) + "; it must be 1 to " +
                          std::to_string(GKT_MAX_ROW_DIMS));
  if (p.classes < 1 || p.classes > INT32_MAX)
    throw InvalidArgument("logits has " + std::to_string(p.classes) +
                          " classes; it must have 1 to 2^31 - 1");
}

template <class Real>
void finish(const gkt_group_knowledge_loss_params& p, const GroupKnowledgeLossPlan& plan) {
  double loss = 0;
  for (int64_t s = 0; s <= p.streams; ++s) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
      sum += plan.sums[chunk * (p.streams + 1) + s];
    const double mean = sum / (s == 0           ? plan.ce_rows
                               : s == p.streams ? plan.subnet_ce_rows
                                                : plan.kd_rows);
    const double weight = s == 0           ? p.ce_weight
                          : s == p.streams ? (p.streams > 1 ? p.subnet_ce_weight : 0.0)
                                           : p.kd_weight;
    if (s < p.streams) static_cast<Real*>(p.terms)[s] = static_cast<Real>(mean);
    if (weight != 0) loss += weight * mean;
  }
  *static_cast<Real*>(p.loss) = static_cast<Real>(loss);
}

void group_knowledge_loss(const gkt_group_knowledge_loss_params& p, int threads) {
  check(p);
  const int64_t rows = count_rows(p);
  const CountedRows counted =
      p.probabilities ? CountedRows{rows, p.subnet_rows} : count_class_indices(p, rows);
  GroupKnowledgeLossPlan plan{};
  plan.chunks = rows < kMaxChunks ? rows : kMaxChunks;
  plan.ce_rows = static_cast<double>(counted.full);
  plan.subnet_ce_rows = static_cast<double>(counted.subnets);
  plan.kd_rows = static_cast<double>(p.distill_ignored ? p.subnet_rows : counted.subnets);
  const int64_t useful = 1 + p.streams * rows * p.classes / kLogitsPerThread;
  plan.threads = static_cast<int>(std::min({int64_t{threads}, useful, plan.chunks}));
  std::vector<double> sums(static_cast<size_t>(plan.chunks * (p.streams + 1)));
  plan.sums = sums.data();
  if (rows > 0) {
    const int64_t value_bytes = p.dtype == GKT_FLOAT64 ? 8 : p.dtype == GKT_FLOAT32 ? 4 : 2;
    const int64_t full_bytes = rows * p.classes * value_bytes;
    const int64_t subnets_bytes = (p.streams - 1) * p.subnet_rows * p.classes * value_bytes;
    plan.gradient_bytes = full_bytes + subnets_bytes;
    // Gradients are dense, whatever the order of their dimensions.
    if (p.full.gradient != nullptr)
      prefer_huge_pages(p.full.gradient, static_cast<size_t>(full_bytes));
    if (p.subnets.gradient != nullptr && p.streams > 1)
      prefer_huge_pages(p.subnets.gradient, static_cast<size_t>(subnets_bytes));
    constexpr size_t kAlignment = 64;
    plan.scratch_bytes =
        (GKT_BEST(group_knowledge_loss_scratch)(p) + kAlignment - 1) / kAlignment * kAlignment;
    const size_t bytes = plan.scratch_bytes * static_cast<size_t>(plan.threads);
    std::unique_ptr<char, Free> memory(static_cast<char*>(std::aligned_alloc(kAlignment, bytes)));
    if (memory == nullptr) throw std::bad_alloc();
    plan.scratch = memory.get();
    GKT_BEST(group_knowledge_loss_run)(p, plan);
  }
  if (p.dtype == GKT_FLOAT64)
    finish<double>(p, plan);
  else
    finish<float>(p, plan);
}

}  // namespace
}  // namespace gkt

extern "C" int gkt_group_knowledge_loss_cpu(const gkt_group_knowledge_loss_params* params,
                                            int threads) {
  return gkt::guarded([&] { gkt::group_knowledge_loss(*params, threads); });
}

#endif  // GKT_ISA_baseline
