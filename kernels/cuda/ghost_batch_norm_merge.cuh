// ghost_batch_norm, between its passes: sums of chunks become statistics or gradients of
// parameters, and the coefficients of the affine maps. In double, as trees of a fixed shape: a
// block takes kMergeChannels channels, and kMergeLanes threads share the chunks of each.
#pragma once

#include "ghost_batch_norm_chunks.cuh"

namespace gkt {
namespace {

constexpr int kMergeChannels = 8;  // a sector of 32 bytes of floats
constexpr int kMergeLanes = 64;
constexpr int kMergeThreads = kMergeChannels * kMergeLanes;
constexpr int kMergeWarps = kMergeThreads / kWarpSize;
// Blocks of gradients that a multiprocessor must hold; left to itself, ptxas spills to fit one
// more.
constexpr int kMergeBlocks = 2;
constexpr int kMergeAhead = 4;  // chunks whose loads are under way together

using MergeScratch = double[kMergeWarps][kMergeChannels];

// Adds up two values over the lanes of each channel. The lanes are in `groups` groups that are
// summed apart; the sums of group g and channel c are in thread g * kMergeChannels + c. `scratch`
// is free again after the next barrier.
__device__ __forceinline__ void merge_lanes(double& first, double& second, int groups,
                                            MergeScratch (&scratch)[2]) {
  const int thread = static_cast<int>(threadIdx.x), channel = thread % kMergeChannels;
#pragma unroll
  for (int lanes = kMergeChannels; lanes < kWarpSize; lanes *= 2) {
    first += shuffle_xor(first, lanes);
    second += shuffle_xor(second, lanes);
  }
  if (thread % kWarpSize < kMergeChannels) {
    scratch[0][thread / kWarpSize][channel] = first;
    scratch[1][thread / kWarpSize][channel] = second;
  }
  __syncthreads();
  first = second = 0;
  const int warps = kMergeWarps / groups, group = thread / kMergeChannels;
  if (group < groups)
    for (int warp = group * warps; warp < (group + 1) * warps; ++warp) {
      first += scratch[0][warp][channel];
      second += scratch[1][warp][channel];
    }
}

// Statistics and coefficients (2, ghosts, channels): scale, offset. A block per ghost batch and
// kMergeChannels channels. Those of a single ghost batch are mixed into the running ones, which are
// null where none are updated.
template <class A>
__global__ void __launch_bounds__(kMergeThreads)
    merge_statistics_kernel(Geometry g, int channel_blocks, const A* parts, const A* weight,
                            const A* bias, double eps, bool use_running, A* statistics,
                            A* coefficients, double momentum, A* running_mean, A* running_var) {
  __shared__ MergeScratch scratch[2];
  const int thread = static_cast<int>(threadIdx.x), lane = thread / kMergeChannels;
  const int ghost = static_cast<int>(blockIdx.x) / channel_blocks;
  const int c =
      static_cast<int>(blockIdx.x) % channel_blocks * kMergeChannels + thread % kMergeChannels;
  const int64_t plane = int64_t{g.ghosts} * g.channels, at = int64_t{ghost} * g.channels + c;
  const bool exists = c < g.channels;
  if (!use_running) {
    const A* const own = parts + int64_t{g.first_chunk(ghost)} * 3 * g.channels + c;
    const int chunks = g.chunks_in(ghost);
    const double whole = static_cast<double>(g.chunk_lines * g.values_per_line);
    const double values = g.values(ghost), inverse = 1 / values;
    const double rest = values - whole * (chunks - 1);
    const double inverse_whole = 1 / whole, inverse_rest = 1 / rest;
    // Means are taken from that of the first chunk on, which keeps what their differences are.
    double origin = 0, sum = 0, squares = 0;
    if (exists) origin = own[0] + own[g.channels] * (chunks > 1 ? inverse_whole : inverse_rest);
#pragma unroll 1
    for (int first = lane; first < chunks; first += kMergeAhead * kMergeLanes) {
      A part[kMergeAhead][3];
#pragma unroll
      for (int u = 0; u < kMergeAhead; ++u) {
        const int chunk = first + u * kMergeLanes;
#pragma unroll
        for (int i = 0; i < 3; ++i)
          part[u][i] = exists && chunk < chunks ? own[(int64_t{chunk} * 3 + i) * g.channels] : A(0);
      }
#pragma unroll
      for (int u = 0; u < kMergeAhead; ++u) {
        const int chunk = first + u * kMergeLanes;
        if (chunk >= chunks) break;
        const bool last = chunk == chunks - 1;
        const double n = last ? rest : whole;
        const double part_mean = part[u][1] * (last ? inverse_rest : inverse_whole);
        const double distance = part[u][0] + part_mean - origin;
        const double square = part[u][2] - part_mean * part[u][1];
        sum += n * distance;
        squares += (square < 0 ? 0 : square) + n * distance * distance;
      }
    }
    merge_lanes(sum, squares, 1, scratch);
    if (thread >= kMergeChannels || !exists) return;
    const double shift = sum * inverse, mean = origin + shift;
    const double var = (squares - sum * shift) * inverse;
    statistics[at] = static_cast<A>(mean);
    statistics[plane + at] = static_cast<A>(mean - statistics[at]);
    statistics[2 * plane + at] = static_cast<A>(var < 0 ? 0 : var);
    if (running_mean != nullptr) {
      const double unbiased = statistics[2 * plane + at] * (values / (values > 1 ? values - 1 : 1));
      running_mean[c] = static_cast<A>((1 - momentum) * running_mean[c] + momentum * mean);
      running_var[c] = static_cast<A>((1 - momentum) * running_var[c] + momentum * unbiased);
    }
  }
  if (thread >= kMergeChannels || !exists) return;
  const double low = statistics[plane + at];
  const double scale = (weight != nullptr ? weight[c] : 1.0) /
                       sqrt(static_cast<double>(statistics[2 * plane + at]) + eps);
  coefficients[at] = static_cast<A>(scale);
  coefficients[plane + at] = static_cast<A>((bias != nullptr ? bias[c] : 0.0) - low * scale);
}

// Groups of lanes that merge_gradients_kernel gives to ghost batches of as many chunks: a power of
// two. A first ghost batch of other size than the rest has all lanes for itself.
inline int merge_groups(const Geometry& g) {
  const int ghosts = g.equal() ? g.ghosts : g.ghosts - 1;
  int groups = 1;
  while (groups < ghosts && groups < kMergeWarps) groups *= 2;
  return groups;
}

// Gradients of the parameters over the ghost batches in order, and coefficients (3, ghosts,
// channels): scale, slope, offset. A block per kMergeChannels channels; `most_groups` ghost batches
// are merged at a time, each by some of the lanes.
template <class A>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocks)
    merge_gradients_kernel(Geometry g, int most_groups, const A* parts, const A* weight,
                           const A* statistics, const uint8_t* keep, double eps, bool use_running,
                           A* coefficients, A* grad_weight, A* grad_bias) {
  __shared__ MergeScratch scratch[2], totals[2];
  const int thread = static_cast<int>(threadIdx.x), channel = thread % kMergeChannels;
  const int c = static_cast<int>(blockIdx.x) * kMergeChannels + channel;
  const int64_t plane = int64_t{g.ghosts} * g.channels;
  const bool exists = c < g.channels;
  double weight_total = 0, bias_total = 0;
  for (int first_ghost = 0, groups; first_ghost < g.ghosts; first_ghost += groups) {
    groups = first_ghost == 0 && g.lead_lines != g.lines ? 1 : most_groups;
    const int lanes = kMergeLanes / groups, lane = thread / kMergeChannels % lanes;
    const int summed = first_ghost + thread / kMergeChannels / lanes;
    const A* const own = parts + (int64_t{g.first_chunk(summed)} * 3 + 1) * g.channels + c;
    const int chunks = exists && summed < g.ghosts ? g.chunks_in(summed) : 0;
    double sum = 0, product = 0;
#pragma unroll 1
    for (int first = lane; first < chunks; first += kMergeAhead * lanes) {
      A part[kMergeAhead][2];
#pragma unroll
      for (int u = 0; u < kMergeAhead; ++u) {
        const int chunk = first + u * lanes;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          part[u][i] = chunk < chunks ? own[(int64_t{chunk} * 3 + i) * g.channels] : A(0);
      }
#pragma unroll
      for (int u = 0; u < kMergeAhead; ++u) {
        sum += part[u][0];
        product += part[u][1];
      }
    }
    merge_lanes(sum, product, groups, scratch);
    const int ghost = first_ghost + thread / kMergeChannels;
    if (thread < groups * kMergeChannels) {
      double weight_part = 0, bias_part = 0;
      if (exists && ghost < g.ghosts) {
        const int64_t at = int64_t{ghost} * g.channels + c;
        const double low = statistics[plane + at];
        const double rstd = 1 / sqrt(static_cast<double>(statistics[2 * plane + at]) + eps);
        const double scale = (weight != nullptr ? weight[c] : 1.0) * rstd;
        const double inverse = 1 / g.values(ghost);
        product -= low * sum;
        const double slope = use_running ? 0 : -scale * rstd * rstd * product * inverse;
        const double offset = use_running ? 0 : -scale * sum * inverse - slope * low;
        coefficients[at] = static_cast<A>(scale);
        coefficients[plane + at] = static_cast<A>(slope);
        coefficients[2 * plane + at] = static_cast<A>(offset);
        if (keep == nullptr || keep[ghost] != 0) {
          weight_part = product * rstd;
          bias_part = sum;
        }
      }
      totals[0][thread / kMergeChannels][channel] = weight_part;
      totals[1][thread / kMergeChannels][channel] = bias_part;
    }
    __syncthreads();
    if (thread < kMergeChannels)
      for (int group = 0; group < groups; ++group) {
        weight_total += totals[0][group][channel];
        bias_total += totals[1][group][channel];
      }
  }
  if (thread >= kMergeChannels || !exists) return;
  grad_weight[c] = static_cast<A>(weight_total);
  grad_bias[c] = static_cast<A>(bias_total);
}

}  // namespace
}  // namespace gkt
