// How many rows the means of group_knowledge_loss count, and whether every class index is one: a
// block leaves its share behind, and whoever needs the numbers adds up the shares.
#pragma once

#include "common.cuh"
#include "gkt_abi.h"

namespace gkt {
namespace {

using Params = gkt_group_knowledge_loss_params;

constexpr int kThreads = 128;
constexpr int kMaxCountBlocks = 256;

__device__ int64_t row_offset(const Params& p, const int64_t* strides, uint32_t row) {
  int64_t offset = 0;
  for (int d = p.row_dims - 1; d > 0; --d) {
    const uint32_t size = static_cast<uint32_t>(p.row_sizes[d]);
    offset += static_cast<int64_t>(row % size) * strides[d];
    row /= size;
  }
  return offset + static_cast<int64_t>(row) * strides[0];
}

// Of some rows: those whose class index isn't ignore_index, those of them that subnets have, those
// whose class index is out of range, and the largest such index.
struct ClassIndices {
  int64_t counted, in_share, wrong, index;
};

// All threads of the block must call it.
__device__ inline ClassIndices add_up(ClassIndices own, int64_t* scratch) {
  return {block_reduce(own.counted, Sum(), int64_t{0}, scratch),
          block_reduce(own.in_share, Sum(), int64_t{0}, scratch),
          block_reduce(own.wrong, Sum(), int64_t{0}, scratch),
          block_reduce(own.index, Max(), int64_t{INT64_MIN}, scratch)};
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const Params p, uint32_t rows, ClassIndices* shares) {
  __shared__ int64_t scratch[kMaxWarps];
  ClassIndices own{0, 0, 0, INT64_MIN};
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < rows;
       row += int64_t{gridDim.x} * kThreads) {
    const int64_t offset = row_offset(p, p.targets_row_strides, static_cast<uint32_t>(row));
    const int64_t index = static_cast<const int64_t*>(p.targets)[offset];
    if (index == p.ignore_index) continue;
    own.counted += 1;
    own.in_share += row < p.subnet_rows ? 1 : 0;
    if (index >= 0 && index < p.classes) continue;
    own.wrong += 1;
    own.index = index > own.index ? index : own.index;
  }
  own = add_up(own, scratch);
  if (threadIdx.x == 0) shares[blockIdx.x] = own;
}

// What the sums are divided by: NaN where a class index is wrong, so that all that depends on them
// is NaN too.
struct CountedRows {
  double ce, kd, subnet_ce;
  ClassIndices indices;
};

// All threads of the block must call it.
__device__ inline CountedRows count_rows(const Params& p, uint32_t rows, const ClassIndices* shares,
                                         int share_count, int64_t* scratch) {
  ClassIndices own{0, 0, 0, INT64_MIN};
  for (int i = static_cast<int>(threadIdx.x); i < share_count; i += kThreads) {
    const ClassIndices share = shares[i];
    own.counted += share.counted;
    own.in_share += share.in_share;
    own.wrong += share.wrong;
    own.index = share.index > own.index ? share.index : own.index;
  }
  const ClassIndices all =
      share_count > 0 ? add_up(own, scratch) : ClassIndices{rows, p.subnet_rows, 0, INT64_MIN};
  const double invalid = all.wrong > 0 ? NAN : 0.0;
  const int64_t distilled = p.distill_ignored ? p.subnet_rows : all.in_share;
  return {static_cast<double>(all.counted) + invalid, static_cast<double>(distilled) + invalid,
          static_cast<double>(all.in_share) + invalid, all};
}

// The blocks that count; none where the targets are probabilities, of which every row counts.
inline int count_blocks(const Params& p, int64_t rows) {
  constexpr int64_t kRowsPerThread = 4;
  const int64_t blocks = (rows + kThreads * kRowsPerThread - 1) / (kThreads * kRowsPerThread);
  if (p.probabilities) return 0;
  return static_cast<int>(blocks < kMaxCountBlocks ? blocks : kMaxCountBlocks);
}

}  // namespace
}  // namespace gkt
