// ghost_batch_norm, first pass: sums of each chunk and channel. They are shifted by values of the
// data, so that they are exact for a large mean.
#pragma once

#include "ghost_batch_norm_chunks.cuh"

namespace gkt {
namespace {

// Blocks that a multiprocessor must be able to hold; 0: nvcc decides. It would give 8 elements so
// many registers that two fit.
template <int N>
constexpr int kSumsBlocks = N == 8 ? 3 : 0;

// The mean of four values spread over the chunk: near its mean, and exact for equal values.
template <class T, int N>
__device__ void sample_chunk(const Geometry& g, const Place<N>& place, const Chunk<const T, N>& x,
                             Compute<T> (&shift)[N]) {
  const int apart = place.lines / 4;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int column = g.channels_last ? place.column + i : g.length / 2;
    shift[i] = 0;
    for (int sample = 0; sample < 4 && column < g.length; ++sample)
      shift[i] += to_compute(*x.at({sample * apart, column, true}));
    shift[i] *= Compute<T>(0.25);
  }
}

// parts (chunks of all ghost batches, 3, channels): shift, sum of (x - shift), sum of its square;
// backward: unused, sum of dz, sum of dz * (x - mean). Without ReLU `mask` is null.
template <class T, int N, bool backward>
__global__ void __launch_bounds__(kThreads, kSumsBlocks<N>)
    sums_kernel(Geometry g, Tiling tiling, Lines<const T> x_lines, Lines<const T> grad_lines,
                const uint8_t* mask_bytes, const Compute<T>* mean, Compute<T>* parts) {
  using A = Compute<T>;
  constexpr int kAhead = backward ? 2 : 4;  // positions whose loads are under way together
  constexpr int kMostColumns = kMaxColumns * (kThreads / kWarpSize);
  __shared__ A scratch[2][kMostColumns];
  const Place<N> place(g, tiling, false);
  const Chunk<const T, N> x(x_lines, place), grad_y(grad_lines, place);
  const MaskChunk<const uint8_t, N> mask(mask_bytes, g, place);
  A shift[N], sum[N] = {}, product[N] = {};
  if constexpr (backward)
    load_channels(mean, g, place, shift);
  else
    sample_chunk<T, N>(g, place, x, shift);

  Walk<N> walk(place);
#pragma unroll 1
  for (int step = 0; step < place.steps; step += kAhead) {
    Vector<T, N> values[kAhead], gradients[kAhead];
    unsigned bits[kAhead];
    bool exists[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const Position at = walk.next(place);
      exists[u] = at.exists;
      values[u] = load_read_only<T, N>(x.at(at));
      if constexpr (backward) {
        gradients[u] = load_read_only<T, N>(grad_y.at(at));
        bits[u] = mask.bits(at);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (!exists[u]) continue;
      A value[N], dz[N];
      unpack(values[u], value);
      if constexpr (backward) unpack(gradients[u], dz);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A centered = value[i] - shift[i];
        if constexpr (backward)
          dz[i] = (bits[u] >> i & 1u) != 0 ? dz[i] : A(0);
        else
          dz[i] = centered;
        sum[i] += dz[i];
        product[i] += dz[i] * centered;
      }
    }
  }

  A* const part = parts + int64_t{place.chunk} * 3 * g.channels;
  const int thread = static_cast<int>(threadIdx.x);
  if (g.channels_last) {
    // The lanes of a warp that have the same columns, then the warps or rows, in order.
    for (int lanes = tiling.across; lanes < kWarpSize; lanes *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[i] += shuffle_xor(sum[i], lanes);
        product[i] += shuffle_xor(product[i], lanes);
      }
    }
    const int columns = tiling.across * N, own = thread % tiling.across * N;
    const bool warps = tiling.across < kWarpSize;
    const int rows = warps ? kThreads / kWarpSize : place.rows;
    if (!warps || thread % kWarpSize < tiling.across) {
      const int row = warps ? thread / kWarpSize : place.row;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        scratch[0][row * columns + own + i] = sum[i];
        scratch[1][row * columns + own + i] = product[i];
      }
    }
    __syncthreads();
    const int c = place.column - own + thread;
    if (thread < columns && c < g.channels) {
      A total = 0, total_product = 0;
      for (int row = 0; row < rows; ++row) {
        total += scratch[0][row * columns + thread];
        total_product += scratch[1][row * columns + thread];
      }
      part[g.channels + c] = total;
      part[2 * g.channels + c] = total_product;
    }
    if (!backward && place.row == 0 && place.column < g.channels) {
#pragma unroll
      for (int i = 0; i < N; ++i) part[place.column + i] = shift[i];
    }
  } else {
    A total = 0, total_product = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      total += sum[i];
      total_product += product[i];
    }
    total = block_reduce(total, Sum(), A(0), scratch[0]);
    total_product = block_reduce(total_product, Sum(), A(0), scratch[1]);
    if (thread == 0) {
      part[place.channel] = shift[0];
      part[g.channels + place.channel] = total;
      part[2 * g.channels + place.channel] = total_product;
    }
  }
}

}  // namespace
}  // namespace gkt
