// ghost_batch_norm on a GPU: two passes each way, sums per chunk of lines and then the affine map.
//
// A line is what lies together in memory: the channels of one position (channels_last) or the
// positions of one channel of one batch row (planes, where blockIdx.y is the channel). A block
// takes a chunk of lines; X neighbouring threads share a line, N elements each. Sums are shifted by
// values of the data and merged in double in the order of the chunks: see
// csrc/cpu/ghost_batch_norm.cpp, and csrc/gkt_abi.h for the mask and the statistics.
#include "common.cuh"
#include "gkt_abi.h"

namespace gkt {
namespace {

constexpr int kThreads = 256;
constexpr int kChunkElements = 16384;
constexpr int kMaxColumns = 128;  // of a block in channels_last
constexpr int kMergeThreads = 32;

// Sizes of one call. Everything that decides which numbers are added together depends on these
// alone.
struct Geometry {
  int64_t lines, length, channels, chunk_lines, chunks, ghosts;
  int64_t values_per_line;  // of one channel
  bool channels_last;

  explicit Geometry(const gkt_ghost_batch_norm_params& p)
      : lines(p.channels_last ? p.ghost_rows * p.positions : p.ghost_rows),
        length(p.channels_last ? p.channels : p.positions),
        channels(p.channels),
        ghosts(p.ghosts),
        values_per_line(p.channels_last ? 1 : p.positions),
        channels_last(p.channels_last != 0) {
    const int64_t width = channels_last && length > kMaxColumns ? kMaxColumns : length;
    chunk_lines = kChunkElements / width > 1 ? kChunkElements / width : 1;
    chunks = (lines + chunk_lines - 1) / chunk_lines;
  }
  int64_t parts() const { return ghosts * chunks * 3 * channels; }
  int64_t coefficients() const { return 3 * ghosts * channels; }
};

// A tensor as lines: line `l` of all ghost batches (of channel `c` in planes) begins at
// data + l * line + c * channel.
template <class T>
struct Lines {
  T* data;
  int64_t line, channel;
};

template <class T>
Lines<T> lines_of(const gkt_activation& tensor, bool channels_last) {
  if (channels_last) return {static_cast<T*>(tensor.data), tensor.position_stride, 0};
  return {static_cast<T*>(tensor.data), tensor.batch_stride, tensor.channel_stride};
}

// What a thread of the tile kernels works on. In 32 bits where tile_grid() or the size of a chunk
// keeps numbers small: the GPU divides those faster and needs fewer registers for them.
template <int N>
struct Place {
  int64_t first;              // of the chunk's lines, among those of all ghost batches
  int64_t column, width;      // first column of this thread; columns from the block's first tile on
  int64_t channel;            // in planes
  int ghost, chunk, lines;    // lines of the chunk
  int row, rows, tile_width;  // lines and columns that the block works on at once

  __device__ Place(const Geometry& g, int across) {
    const int chunks = static_cast<int>(g.chunks), block = static_cast<int>(blockIdx.x);
    ghost = block / chunks;
    chunk = block % chunks;
    const int64_t skipped = chunk * g.chunk_lines, left = g.lines - skipped;
    first = ghost * g.lines + skipped;
    lines = static_cast<int>(left < g.chunk_lines ? left : g.chunk_lines);
    row = static_cast<int>(threadIdx.x) / across;
    rows = kThreads / across;
    tile_width = across * N;
    column = static_cast<int>(threadIdx.x) % across * N;
    if (g.channels_last) {
      column += int64_t{blockIdx.y} * tile_width;
      width = tile_width;
      channel = 0;
    } else {
      width = g.length;
      channel = blockIdx.y;
    }
  }

  // Calls body(line of all ghost batches, column, whether it exists); all threads call it equally
  // often, so that it may shuffle.
  template <class Body>
  __device__ __forceinline__ void each(const Geometry& g, const Body& body) const {
    for (int start = 0; start < lines; start += rows) {
      const int line = start + row;
#pragma unroll 1
      for (int64_t tile = 0; tile < width; tile += tile_width)
        body(first + line, column + tile, line < lines && column + tile < g.length);
    }
  }

  __device__ __forceinline__ int64_t mask_byte(const Geometry& g, int64_t line, int64_t at) const {
    const int64_t mask_line = g.channels_last ? line : line * g.channels + channel;
    return mask_line * ((g.length + 7) / 8) + at / 8;
  }
};

template <class T, int N>
__device__ __forceinline__ void load_line(const Lines<const T>& tensor, int64_t line,
                                          int64_t channel, int64_t column,
                                          Compute<T> (&values)[N]) {
  load_vector<T, N>(tensor.data + line * tensor.line + channel * tensor.channel + column, values);
}

template <class T, int N>
__device__ __forceinline__ void store_line(const Lines<T>& tensor, int64_t line, int64_t channel,
                                           int64_t column, const Compute<T> (&values)[N]) {
  store_vector<T, N>(tensor.data + line * tensor.line + channel * tensor.channel + column, values);
}

// The coefficient of each of a thread's N columns.
template <class A, int N>
__device__ __forceinline__ void load_channels(const A* by_ghost_and_channel, const Geometry& g,
                                              const Place<N>& place, A (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t c = g.channels_last ? place.column + i : place.channel;
    values[i] = c < g.channels ? by_ghost_and_channel[place.ghost * g.channels + c] : A(0);
  }
}

struct BitOr {
  __device__ __forceinline__ unsigned operator()(unsigned lower, unsigned upper) const {
    return lower | upper;
  }
};

// parts (ghosts, chunks, 3, channels): shift, sum of (x - shift), sum of its square; backward:
// unused, sum of dz, sum of dz * (x - mean).
template <class T, int N, bool backward, bool relu>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(Geometry g, int across, Lines<const T> x, Lines<const T> grad_y,
                const uint8_t* mask, const Compute<T>* mean, Compute<T>* parts) {
  using A = Compute<T>;
  __shared__ A scratch[2][kThreads * N];
  const Place<N> place(g, across);
  A shift[N], sum[N] = {}, product[N] = {};
  if constexpr (backward) {
    load_channels(mean, g, place, shift);
  } else {
    // The mean of four values spread over the chunk: near its mean, and exact for equal values.
    const int apart = place.lines / 4;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t column = g.channels_last ? place.column + i : g.length / 2;
      shift[i] = 0;
      for (int sample = 0; sample < 4 && column < g.length; ++sample) {
        const int64_t line = place.first + sample * apart;
        shift[i] += to_compute(x.data[line * x.line + place.channel * x.channel + column]);
      }
      shift[i] *= A(0.25);
    }
  }
  place.each(g, [&](int64_t line, int64_t column, bool exists) {
    if (!exists) return;
    A values[N], dz[N];
    load_line<T, N>(x, line, place.channel, column, values);
    if constexpr (backward) {
      load_line<T, N>(grad_y, line, place.channel, column, dz);
      if constexpr (relu) {
        const unsigned bits = mask[place.mask_byte(g, line, column)] >> (column % 8);
#pragma unroll
        for (int i = 0; i < N; ++i) dz[i] = (bits >> i & 1u) != 0 ? dz[i] : A(0);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A centered = values[i] - shift[i];
      sum[i] += backward ? dz[i] : centered;
      product[i] += (backward ? dz[i] : centered) * centered;
    }
  });

  A* const part = parts + (place.ghost * g.chunks + place.chunk) * 3 * g.channels;
  if (g.channels_last) {
    // Columns of the block lie together in scratch; each is summed over the rows in order.
    const int columns = across * N, own = static_cast<int>(threadIdx.x) % across * N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      scratch[0][place.row * columns + own + i] = sum[i];
      scratch[1][place.row * columns + own + i] = product[i];
    }
    __syncthreads();
    for (int local = static_cast<int>(threadIdx.x); local < columns; local += kThreads) {
      const int64_t c = int64_t{blockIdx.y} * place.tile_width + local;
      if (c >= g.channels) continue;
      A total = 0, total_product = 0;
      for (int row = 0; row < place.rows; ++row) {
        total += scratch[0][row * columns + local];
        total_product += scratch[1][row * columns + local];
      }
      part[g.channels + c] = total;
      part[2 * g.channels + c] = total_product;
    }
    if (!backward && place.row == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (place.column + i < g.channels) part[place.column + i] = shift[i];
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
    if (threadIdx.x == 0) {
      part[place.channel] = shift[0];
      part[g.channels + place.channel] = total;
      part[2 * g.channels + place.channel] = total_product;
    }
  }
}

// Statistics in the order of the chunks, and coefficients (2, ghosts, channels): scale, offset.
template <class A>
__global__ void __launch_bounds__(kMergeThreads)
    merge_statistics_kernel(Geometry g, const A* parts, const A* weight, const A* bias, double eps,
                            bool use_running, A* statistics, A* coefficients) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (c >= g.channels) return;
  const int64_t plane = g.ghosts * g.channels, at = blockIdx.y * g.channels + c;
  if (!use_running) {
    const A* const ghost_parts = parts + blockIdx.y * g.chunks * 3 * g.channels + c;
    const double values = static_cast<double>(g.lines * g.values_per_line);
    const auto values_in = [&](int64_t chunk) {
      const int64_t left = g.lines - chunk * g.chunk_lines;
      return static_cast<double>((left < g.chunk_lines ? left : g.chunk_lines) * g.values_per_line);
    };
    double mean = 0, squares = 0;
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
      const A* const part = ghost_parts + chunk * 3 * g.channels;
      mean += values_in(chunk) * part[0] + part[g.channels];
    }
    mean /= values;
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
      const A* const part = ghost_parts + chunk * 3 * g.channels;
      const double n = values_in(chunk), sum = part[g.channels], part_mean = sum / n;
      const double distance = part[0] + part_mean - mean;
      const double square = part[2 * g.channels] - part_mean * sum;
      squares += (square < 0 ? 0 : square) + n * distance * distance;
    }
    statistics[at] = static_cast<A>(mean);
    statistics[plane + at] = static_cast<A>(mean - statistics[at]);
    statistics[2 * plane + at] = static_cast<A>(squares / values);
  }
  const double low = statistics[plane + at];
  const double scale = (weight != nullptr ? weight[c] : 1.0) /
                       sqrt(static_cast<double>(statistics[2 * plane + at]) + eps);
  coefficients[at] = static_cast<A>(scale);
  coefficients[plane + at] = static_cast<A>((bias != nullptr ? bias[c] : 0.0) - low * scale);
}

// Gradients of the parameters over the ghost batches in order, and coefficients (3, ghosts,
// channels): scale, slope, offset.
template <class A>
__global__ void __launch_bounds__(kMergeThreads)
    merge_gradients_kernel(Geometry g, const A* parts, const A* weight, const A* statistics,
                           const uint8_t* keep, double eps, bool use_running, A* coefficients,
                           A* grad_weight, A* grad_bias) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (c >= g.channels) return;
  const int64_t plane = g.ghosts * g.channels;
  const double values = static_cast<double>(g.lines * g.values_per_line);
  double weight_total = 0, bias_total = 0;
  for (int64_t ghost = 0; ghost < g.ghosts; ++ghost) {
    const A* const ghost_parts = parts + ghost * g.chunks * 3 * g.channels + c;
    const int64_t at = ghost * g.channels + c;
    double sum = 0, product = 0;
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
      sum += ghost_parts[chunk * 3 * g.channels + g.channels];
      product += ghost_parts[chunk * 3 * g.channels + 2 * g.channels];
    }
    const double low = statistics[plane + at];
    const double rstd = 1 / sqrt(static_cast<double>(statistics[2 * plane + at]) + eps);
    const double scale = (weight != nullptr ? weight[c] : 1.0) * rstd;
    product -= low * sum;
    const double slope = use_running ? 0 : -scale * rstd * rstd * product / values;
    const double offset = use_running ? 0 : -scale * sum / values - slope * low;
    coefficients[at] = static_cast<A>(scale);
    coefficients[plane + at] = static_cast<A>(slope);
    coefficients[2 * plane + at] = static_cast<A>(offset);
    if (keep != nullptr && keep[ghost] == 0) continue;
    weight_total += product * rstd;
    bias_total += sum;
  }
  grad_weight[c] = static_cast<A>(weight_total);
  grad_bias[c] = static_cast<A>(bias_total);
}

template <class T, int N, bool relu, bool has_residual>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Geometry g, int across, Lines<const T> x, Lines<const T> residual, Lines<T> y,
                   uint8_t* mask, const Compute<T>* mean, const Compute<T>* coefficients,
                   const uint8_t* keep) {
  using A = Compute<T>;
  const Place<N> place(g, across);
  A means[N], scale[N], offset[N];
  load_channels(mean, g, place, means);
  load_channels(coefficients, g, place, scale);
  load_channels(coefficients + g.ghosts * g.channels, g, place, offset);
  const bool kept = keep == nullptr || keep[place.ghost] != 0;
  place.each(g, [&](int64_t line, int64_t column, bool exists) {
    A values[N] = {}, added[N] = {};
    unsigned bits = 0;
    if (exists) {
      load_line<T, N>(x, line, place.channel, column, values);
      if constexpr (has_residual) load_line<T, N>(residual, line, place.channel, column, added);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A z = (values[i] - means[i]) * scale[i] + offset[i];
        if (has_residual) z += added[i];
        const bool passed = !(z <= 0);
        if (passed || !kept) bits |= 1u << i;
        values[i] = !kept ? added[i] : relu && !passed ? A(0) : z;
      }
      store_line<T, N>(y, line, place.channel, column, values);
    }
    if constexpr (relu) {
      bits = warp_reduce<8 / N>(bits << (column % 8), BitOr());
      if (exists && column % 8 == 0)
        mask[place.mask_byte(g, line, column)] = static_cast<uint8_t>(bits);
    }
  });
}

// Blocks of backward_kernel that a multiprocessor must be able to hold; 0: nvcc decides. It would
// give 8 elements so many registers that two fit.
template <int N>
constexpr int kBackwardBlocks = N == 8 ? 3 : 0;

template <class T, int N, bool relu, bool has_residual>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<N>)
    backward_kernel(Geometry g, int across, Lines<const T> x, Lines<const T> grad_y,
                    Lines<T> grad_x, Lines<T> grad_residual, const uint8_t* mask,
                    const Compute<T>* mean, const Compute<T>* coefficients, const uint8_t* keep) {
  using A = Compute<T>;
  const Place<N> place(g, across);
  const int64_t plane = g.ghosts * g.channels;
  A means[N], scale[N], slope[N], offset[N];
  load_channels(mean, g, place, means);
  load_channels(coefficients, g, place, scale);
  load_channels(coefficients + plane, g, place, slope);
  load_channels(coefficients + 2 * plane, g, place, offset);
  const bool kept = keep == nullptr || keep[place.ghost] != 0;
  place.each(g, [&](int64_t line, int64_t column, bool exists) {
    if (!exists) return;
    A values[N], dz[N];
    load_line<T, N>(x, line, place.channel, column, values);
    load_line<T, N>(grad_y, line, place.channel, column, dz);
    const unsigned bits = relu ? mask[place.mask_byte(g, line, column)] >> (column % 8) : ~0u;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dz[i] = (bits >> i & 1u) != 0 ? dz[i] : A(0);
      const A dx = dz[i] * scale[i] + ((values[i] - means[i]) * slope[i] + offset[i]);
      values[i] = kept ? dx : A(0);
    }
    store_line<T, N>(grad_x, line, place.channel, column, values);
    if constexpr (has_residual) store_line<T, N>(grad_residual, line, place.channel, column, dz);
  });
}

// Threads that share a line: a power of two, at least the number that share a byte of the mask.
int threads_across(const Geometry& g, int vector) {
  const int64_t most = g.channels_last ? kMaxColumns / vector : kThreads;
  int across = 8 / vector;
  while (across < most && static_cast<int64_t>(across) * vector < g.length) across *= 2;
  return across;
}

dim3 tile_grid(const Geometry& g, int across, int vector) {
  const int64_t blocks =
      g.channels_last ? (g.length + across * vector - 1) / (across * vector) : g.channels;
  if (g.ghosts * g.chunks > INT32_MAX || blocks > 65535)
    throw InvalidArgument("ghost_batch_norm: too many channels or rows for a grid");
  return dim3(static_cast<unsigned>(g.ghosts * g.chunks), static_cast<unsigned>(blocks));
}

unsigned merge_blocks(const Geometry& g) {
  return static_cast<unsigned>((g.channels + kMergeThreads - 1) / kMergeThreads);
}

template <class T, int N>
bool readable(const Geometry& g, const gkt_activation& tensor) {
  const Lines<T> lines = lines_of<T>(tensor, g.channels_last);
  return tensor.data == nullptr || (is_vectorizable<T, N>(tensor.data, g.length, lines.line) &&
                                    (g.channels_last || lines.channel % N == 0));
}

template <class T, int N>
void forward(const gkt_ghost_batch_norm_params& p, void* stream) {
  using A = Compute<T>;
  const Geometry g(p);
  const int across = threads_across(g, N);
  const dim3 grid = tile_grid(g, across, N);
  A* const statistics = static_cast<A*>(p.statistics);
  A* const parts = static_cast<A*>(p.workspace);
  A* const coefficients = parts + g.parts();
  const auto x = lines_of<const T>(p.x, g.channels_last);
  const auto residual = lines_of<const T>(p.residual, g.channels_last);
  const auto y = lines_of<T>(p.y, g.channels_last);
  const A* const no_mean = nullptr;
  const uint8_t* const no_mask = nullptr;
  if (!p.use_running)
    launch<sums_kernel<T, N, false, false>>(grid, kThreads, 0, stream, g, across, x, x, no_mask,
                                            no_mean, parts);
  launch<merge_statistics_kernel<A>>(dim3(merge_blocks(g), static_cast<unsigned>(g.ghosts)),
                                     kMergeThreads, 0, stream, g, static_cast<const A*>(parts),
                                     static_cast<const A*>(p.weight), static_cast<const A*>(p.bias),
                                     p.eps, p.use_running != 0, statistics, coefficients);
  dispatch_bool(p.relu != 0, [&](auto relu) {
    dispatch_bool(p.residual.data != nullptr, [&](auto has_residual) {
      launch<forward_kernel<T, N, decltype(relu)::value, decltype(has_residual)::value>>(
          grid, kThreads, 0, stream, g, across, x, residual, y, p.mask,
          static_cast<const A*>(statistics), static_cast<const A*>(coefficients), p.keep);
    });
  });
}

template <class T, int N>
void backward(const gkt_ghost_batch_norm_params& p, void* stream) {
  using A = Compute<T>;
  const Geometry g(p);
  const int across = threads_across(g, N);
  const dim3 grid = tile_grid(g, across, N);
  const A* const statistics = static_cast<const A*>(p.statistics);
  A* const parts = static_cast<A*>(p.workspace);
  A* const coefficients = parts + g.parts();
  const auto x = lines_of<const T>(p.x, g.channels_last);
  const auto grad_y = lines_of<const T>(p.grad_y, g.channels_last);
  const auto grad_x = lines_of<T>(p.grad_x, g.channels_last);
  const auto grad_residual = lines_of<T>(p.grad_residual, g.channels_last);
  const uint8_t* const mask = p.mask;
  dispatch_bool(p.relu != 0, [&](auto relu) {
    launch<sums_kernel<T, N, true, decltype(relu)::value>>(grid, kThreads, 0, stream, g, across, x,
                                                           grad_y, mask, statistics, parts);
  });
  launch<merge_gradients_kernel<A>>(merge_blocks(g), kMergeThreads, 0, stream, g,
                                    static_cast<const A*>(parts), static_cast<const A*>(p.weight),
                                    statistics, p.keep, p.eps, p.use_running != 0, coefficients,
                                    static_cast<A*>(p.grad_weight), static_cast<A*>(p.grad_bias));
  dispatch_bool(p.relu != 0, [&](auto relu) {
    dispatch_bool(p.grad_residual.data != nullptr, [&](auto has_residual) {
      launch<backward_kernel<T, N, decltype(relu)::value, decltype(has_residual)::value>>(
          grid, kThreads, 0, stream, g, across, x, grad_y, grad_x, grad_residual, mask, statistics,
          static_cast<const A*>(coefficients), p.keep);
    });
  });
}

void check(const gkt_ghost_batch_norm_params& p) {
  if (p.ghosts < 1 || p.ghosts > 65535 || p.ghost_rows < 1 || p.channels < 1 || p.positions < 1)
    throw InvalidArgument(
        "ghost_batch_norm: every size must be at least 1, and ghosts at most 65535");
  if (p.relu && p.mask == nullptr) throw InvalidArgument("ghost_batch_norm: ReLU needs a mask");
}

template <bool is_forward>
void run(const gkt_ghost_batch_norm_params& p, void* stream) {
  check(p);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int N = kVectorSize<T>;
    const Geometry g(p);
    bool vectors = true;
    for (const gkt_activation* tensor :
         {&p.x, &p.residual, &p.y, &p.grad_y, &p.grad_x, &p.grad_residual})
      vectors = vectors && readable<T, N>(g, *tensor);
    dispatch_bool(vectors, [&](auto wide) {
      constexpr int width = decltype(wide)::value ? N : 1;
      if constexpr (is_forward)
        forward<T, width>(p, stream);
      else
        backward<T, width>(p, stream);
    });
  });
}

}  // namespace
}  // namespace gkt

extern "C" int64_t gkt_ghost_batch_norm_workspace_cuda(const gkt_ghost_batch_norm_params* params) {
  const gkt::Geometry g(*params);
  return g.parts() + g.coefficients();
}

extern "C" int gkt_ghost_batch_norm_fwd_cuda(const gkt_ghost_batch_norm_params* params,
                                             void* stream) {
  return gkt::guarded([&] { gkt::run<true>(*params, stream); });
}

extern "C" int gkt_ghost_batch_norm_bwd_cuda(const gkt_ghost_batch_norm_params* params,
                                             void* stream) {
  return gkt::guarded([&] { gkt::run<false>(*params, stream); });
}
