// ghost_batch_norm, second pass: the affine map and what goes with it, from the last chunk to the
// first, so that it meets what the first pass has left in the cache.
#pragma once

#include "ghost_batch_norm_chunks.cuh"

namespace gkt {
namespace {

// Positions whose loads are under way together: more where coefficients take so many registers that
// only two blocks fit on a multiprocessor.
template <int N>
constexpr int kForwardAhead = N == 8 ? 4 : 2;
template <int N>
constexpr int kBackwardAhead = N == 8   ? 4
                               : N == 4 ? 3
                                        : 2;

// Blocks that a multiprocessor must be able to hold; 0: nvcc decides.
template <int N>
constexpr int kAffineBlocks = N == 8 ? 2 : 0;

struct BitOr {
  __device__ __forceinline__ unsigned operator()(unsigned lower, unsigned upper) const {
    return lower | upper;
  }
};

// y = relu((x - mean) * scale + offset + residual); y = residual where keep is 0. Without residual
// its data is null, without ReLU `mask`.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kAffineBlocks<N>)
    forward_kernel(Geometry g, Tiling tiling, Lines<const T> x_lines, Lines<const T> residual_lines,
                   Lines<T> y_lines, uint8_t* mask_bytes, const Compute<T>* mean,
                   const Compute<T>* coefficients, const uint8_t* keep) {
  using A = Compute<T>;
  constexpr int kAhead = kForwardAhead<N>;
  const Place<N> place(g, tiling, true);
  const Chunk<const T, N> x(x_lines, place), residual(residual_lines, place);
  const Chunk<T, N> y(y_lines, place);
  const MaskChunk<uint8_t, N> mask(mask_bytes, g, place);
  const bool has_residual = residual_lines.data != nullptr, relu = mask.is_there();
  const bool kept = keep == nullptr || keep[place.ghost] != 0;
  A means[N], scale[N], offset[N];
  load_channels(mean, g, place, means);
  load_channels(coefficients, g, place, scale);
  load_channels(coefficients + int64_t{g.ghosts} * g.channels, g, place, offset);

  Walk<N> walk(place);
#pragma unroll 1
  for (int step = 0; step < place.steps; step += kAhead) {
    Vector<T, N> values[kAhead], residuals[kAhead] = {};
    Position at[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      at[u] = walk.next(place);
      values[u] = load_read_only<T, N>(x.at(at[u]));
      if (has_residual) residuals[u] = load_read_only<T, N>(residual.at(at[u]));
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      unsigned bits = 0;
      if (at[u].exists) {
        A value[N], added[N];
        unpack(values[u], value);
        unpack(residuals[u], added);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A z = (value[i] - means[i]) * scale[i] + offset[i] + added[i];
          const bool passed = !(z <= 0);
          if (passed) bits |= 1u << i;
          value[i] = relu && !passed ? A(0) : z;
        }
        if (!kept) bits = (1u << N) - 1;
        store_streaming<T, N>(y.at(at[u]), kept ? pack<T, N>(value) : residuals[u]);
      }
      if (relu) {
        bits = warp_reduce<8 / N>(bits << (at[u].column % 8), BitOr());
        if (at[u].exists && at[u].column % 8 == 0) *mask.at(at[u]) = static_cast<uint8_t>(bits);
      }
    }
  }
}

// dx = dz * scale + (x - mean) * slope + offset, 0 where keep is 0; the residual's gradient is dz.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kAffineBlocks<N>)
    backward_kernel(Geometry g, Tiling tiling, Lines<const T> x_lines, Lines<const T> grad_lines,
                    Lines<T> grad_x_lines, Lines<T> grad_residual_lines, const uint8_t* mask_bytes,
                    const Compute<T>* mean, const Compute<T>* coefficients, const uint8_t* keep) {
  using A = Compute<T>;
  constexpr int kAhead = kBackwardAhead<N>;
  const Place<N> place(g, tiling, true);
  const Chunk<const T, N> x(x_lines, place), grad_y(grad_lines, place);
  const Chunk<T, N> grad_x(grad_x_lines, place), grad_residual(grad_residual_lines, place);
  const MaskChunk<const uint8_t, N> mask(mask_bytes, g, place);
  const bool has_residual = grad_residual_lines.data != nullptr;
  const bool kept = keep == nullptr || keep[place.ghost] != 0;
  const int64_t plane = int64_t{g.ghosts} * g.channels;
  A means[N], scale[N], slope[N], offset[N];
  load_channels(mean, g, place, means);
  load_channels(coefficients, g, place, scale);
  load_channels(coefficients + plane, g, place, slope);
  load_channels(coefficients + 2 * plane, g, place, offset);

  Walk<N> walk(place);
#pragma unroll 1
  for (int step = 0; step < place.steps; step += kAhead) {
    Vector<T, N> values[kAhead], gradients[kAhead];
    Position at[kAhead];
    unsigned bits[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      at[u] = walk.next(place);
      values[u] = load_read_only<T, N>(x.at(at[u]));
      gradients[u] = load_read_only<T, N>(grad_y.at(at[u]));
      bits[u] = mask.bits(at[u]);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (!at[u].exists) continue;
      A value[N], dz[N];
      unpack(values[u], value);
      unpack(gradients[u], dz);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dz[i] = (bits[u] >> i & 1u) != 0 ? dz[i] : A(0);
        const A dx = dz[i] * scale[i] + ((value[i] - means[i]) * slope[i] + offset[i]);
        value[i] = kept ? dx : A(0);
      }
      store_streaming<T, N>(grad_x.at(at[u]), pack<T, N>(value));
      if (has_residual) store_streaming<T, N>(grad_residual.at(at[u]), pack<T, N>(dz));
    }
  }
}

}  // namespace
}  // namespace gkt
