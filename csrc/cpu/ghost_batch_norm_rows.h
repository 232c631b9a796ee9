// ghost_batch_norm for channels_last: a row holds the channels of one position.
#pragma once

#include <cstring>
#include "cpu/ghost_batch_norm_common.h"
#include "cpu/parallel.h"

namespace gkt {
namespace GKT_ISA {
namespace {

// A row here is one position of one batch row. A ghost batch is cut into chunks of rows. Any thread
// sums a chunk into its own slot, and slots are merged in order.
template <class T>
class Rows {
  using A = typename ArithmeticOf<T>::type;

 public:
  Rows(const Params& params, int threads)
      : p(params),
        threads(threads),
        channels(params.channels),
        tile_rows(at_least(1, 1024 / channels)),
        chunk_rows(at_least(tile_rows, at_most(1024, 16384 / channels))),
        lead_chunks(chunks_in(params.lead_rows * params.positions)),
        other_chunks(chunks_in(params.ghost_rows * params.positions)),
        all_chunks(lead_chunks + (params.ghosts - 1) * other_chunks),
        streams(can_stream()) {}

  template <bool relu, bool has_residual>
  void forward() const {
    if (!p.use_running) statistics();
    const Scratch scratch(2 * p.ghosts * channels * sizeof(A));
    A* const scale = static_cast<A*>(scratch.data());
    A* const offset = scale + p.ghosts * channels;
    for (int64_t g = 0; g < p.ghosts; ++g) {
      for (int64_t c = 0; c < channels; ++c) {
        const Affine<A> affine(p, g, c);
        scale[g * channels + c] = static_cast<A>(affine.scale());
        offset[g * channels + c] = static_cast<A>(affine.offset());
      }
    }
    const A* const mean = static_cast<const A*>(p.statistics);
    each_tile(true, [&](const Chunk& chunk, int64_t row, int64_t steps) {
      const int64_t g = chunk.ghost, at = g * channels;
      const Strip<T> tile = strip(row);
      for_channel_blocks<A>(
          channels, GKT_BLOCK {
            constexpr int vectors = decltype(vectors_of_block)::value;
            const Strip<T> part = moved(tile, c);
            if (!kept(p, g)) return strip_copy<T, A, vectors>(part, steps, count);
            strip_forward<T, A, vectors, relu, has_residual>(
                part, steps, count, Registers<A, vectors>::read(mean + at + c, count),
                Registers<A, vectors>::read(scale + at + c, count),
                Registers<A, vectors>::read(offset + at + c, count));
          });
    });
  }

  template <bool relu, bool has_residual>
  void backward() const {
    const Scratch sums_scratch(2 * all_chunks * channels * sizeof(A));
    A* const sums = static_cast<A*>(sums_scratch.data());
    std::memset(sums, 0, 2 * all_chunks * channels * sizeof(A));
    const A* const mean = static_cast<const A*>(p.statistics);
    each_tile(false, [&](const Chunk& chunk, int64_t row, int64_t steps) {
      const int64_t g = chunk.ghost;
      if (!kept(p, g)) return;
      const Strip<T> tile = strip(row);
      A* const slot = sums + chunk.slot * 2 * channels;
      for_channel_blocks<A>(
          channels, GKT_BLOCK {
            constexpr int vectors = decltype(vectors_of_block)::value;
            auto sum = Registers<A, vectors>::read(slot + c, count);
            auto product = Registers<A, vectors>::read(slot + channels + c, count);
            strip_backward_sums<T, A, vectors, relu>(
                moved(tile, c), steps, count,
                Registers<A, vectors>::read(mean + g * channels + c, count), sum, product);
            sum.write(slot + c, count);
            product.write(slot + channels + c, count);
          });
    });

    const Scratch scratch(3 * p.ghosts * channels * sizeof(A));
    A* const scale = static_cast<A*>(scratch.data());
    A* const slope = scale + p.ghosts * channels;
    A* const offset = slope + p.ghosts * channels;
    parallel_for(merge_blocks(), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t block = begin; block < end; ++block)
        merge_gradients(block, sums, scale, slope, offset);
    });
    if (p.grad_x.data == nullptr && !has_residual) return;
    each_tile(true, [&](const Chunk& chunk, int64_t row, int64_t steps) {
      const int64_t g = chunk.ghost, at = g * channels;
      const Strip<T> tile = strip(row);
      for_channel_blocks<A>(
          channels, GKT_BLOCK {
            constexpr int vectors = decltype(vectors_of_block)::value;
            const Strip<T> part = moved(tile, c);
            if (!kept(p, g)) return strip_drop<T, A, vectors, has_residual>(part, steps, count);
            strip_backward<T, A, vectors, relu, has_residual>(
                part, steps, count, Registers<A, vectors>::read(mean + at + c, count),
                Registers<A, vectors>::read(scale + at + c, count),
                Registers<A, vectors>::read(slope + at + c, count),
                Registers<A, vectors>::read(offset + at + c, count));
          });
    });
  }

 private:
  static constexpr int64_t merge_width = 64;  // channels that one thread merges at a time

  const Params& p;
  const int threads;
  const int64_t channels, tile_rows, chunk_rows;
  const int64_t lead_chunks, other_chunks,
      all_chunks;  // of the first, each other, all ghost batches
  const bool streams;

  struct Chunk {
    int64_t ghost, slot;
    int64_t first, rows;  // among those of all ghost batches
  };

  int64_t chunks_in(int64_t rows) const { return (rows + chunk_rows - 1) / chunk_rows; }
  int64_t chunks_of(int64_t ghost) const { return ghost == 0 ? lead_chunks : other_chunks; }
  int64_t first_slot(int64_t ghost) const {
    return ghost == 0 ? 0 : lead_chunks + (ghost - 1) * other_chunks;
  }
  int64_t rows_in(int64_t ghost, int64_t chunk) const {
    return at_most(chunk_rows, rows_of(p, ghost) * p.positions - chunk * chunk_rows);
  }
  Chunk chunk_in(int64_t slot) const {
    const int64_t ghost = slot < lead_chunks ? 0 : 1 + (slot - lead_chunks) / other_chunks;
    const int64_t chunk = slot - first_slot(ghost);
    return {ghost, slot, rows_before(p, ghost) * p.positions + chunk * chunk_rows,
            rows_in(ghost, chunk)};
  }

  // Per chunk and channel: a shift, and the sums of (x - shift) and its square.
  void statistics() const {
    const Scratch scratch(3 * all_chunks * channels * sizeof(A));
    A* const parts = static_cast<A*>(scratch.data());
    each_tile(false, [&](const Chunk& chunk, int64_t row, int64_t steps) {
      const Strip<T> tile = strip(row);
      A* const shift = parts + chunk.slot * 3 * channels;
      if (row == chunk.first) first_shift(tile, chunk.rows, shift);
      for_channel_blocks<A>(
          channels, GKT_BLOCK {
            constexpr int vectors = decltype(vectors_of_block)::value;
            auto sum = Registers<A, vectors>::read(shift + channels + c, count);
            auto square = Registers<A, vectors>::read(shift + 2 * channels + c, count);
            strip_statistics<T, A, vectors>(moved(tile, c), steps, count,
                                            Registers<A, vectors>::read(shift + c, count), sum,
                                            square);
            sum.write(shift + channels + c, count);
            square.write(shift + 2 * channels + c, count);
          });
    });
    parallel_for(p.ghosts * merge_blocks(), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        merge_statistics(i / merge_blocks(), i % merge_blocks() * merge_width, parts);
    });
  }

  // The mean of four rows spread over the chunk: near the chunk's mean, and exact for equal rows.
  void first_shift(const Strip<T>& chunk, int64_t chunk_length, A* shift) const {
    const int samples = chunk_length >= 4 ? 4 : 1;
    const int64_t apart = chunk_length / samples * chunk.x_step;
    for_channel_blocks<A>(
        channels, GKT_BLOCK {
          constexpr int vectors = decltype(vectors_of_block)::value;
          for (int v = 0; v < vectors; ++v) {
            const int lanes = v == vectors - 1 ? count : kWidth<A>;
            const T* x = chunk.x + c + v * kWidth<A>;
            Lanes<A> sum = load<Lanes<A>>(x, lanes);
            for (int sample = 1; sample < samples; ++sample)
              sum = sum + load<Lanes<A>>(x + sample * apart, lanes);
            store(shift + c + v * kWidth<A>, sum * broadcast<Lanes<A>>(A(1) / samples), lanes);
          }
        });
    std::memset(shift + channels, 0, 2 * channels * sizeof(A));
  }

  // In double, in the order of the chunks.
  void merge_statistics(int64_t g, int64_t first, const A* parts) const {
    const int64_t width = at_most(merge_width, channels - first);
    const A* const ghost_parts = parts + first_slot(g) * 3 * channels + first;
    const int64_t chunks = chunks_of(g);
    double mean[merge_width] = {}, squares[merge_width] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const A* const shift = ghost_parts + chunk * 3 * channels;
      const double n = static_cast<double>(rows_in(g, chunk));
      for (int64_t c = 0; c < width; ++c)
        mean[c] += n * static_cast<double>(shift[c]) + static_cast<double>(shift[channels + c]);
    }
    for (int64_t c = 0; c < width; ++c) mean[c] /= values_of(p, g);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const A* const shift = ghost_parts + chunk * 3 * channels;
      const A* const sum = shift + channels;
      const A* const square = sum + channels;
      const double n = static_cast<double>(rows_in(g, chunk)), inverse = 1 / n;
      for (int64_t c = 0; c < width; ++c) {
        const double part_mean = static_cast<double>(sum[c]) * inverse;
        const double distance = static_cast<double>(shift[c]) + part_mean - mean[c];
        const double part =
            static_cast<double>(square[c]) - part_mean * static_cast<double>(sum[c]);
        squares[c] += (part < 0 ? 0 : part) + n * distance * distance;
      }
    }
    for (int64_t c = 0; c < width; ++c)
      Affine<A>::save(p, g, first + c, mean[c], squares[c] / values_of(p, g));
  }

  void merge_gradients(int64_t block, const A* sums, A* scale, A* slope, A* offset) const {
    const int64_t first = block * merge_width, width = at_most(merge_width, channels - first);
    double grad_weight[merge_width] = {}, grad_bias[merge_width] = {};
    for (int64_t g = 0; g < p.ghosts; ++g) {
      double sum[merge_width] = {}, product[merge_width] = {};
      const int64_t begin = first_slot(g), end = begin + chunks_of(g);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const A* const slot = sums + chunk * 2 * channels + first;
        for (int64_t c = 0; c < width; ++c) {
          sum[c] += static_cast<double>(slot[c]);
          product[c] += static_cast<double>(slot[channels + c]);
        }
      }
      for (int64_t c = 0; c < width; ++c) {
        const Affine<A> affine(p, g, first + c);
        const Gradient gradient(p, g, affine, sum[c], product[c]);
        scale[g * channels + first + c] = static_cast<A>(affine.scale());
        slope[g * channels + first + c] = static_cast<A>(gradient.slope);
        offset[g * channels + first + c] = static_cast<A>(gradient.offset);
        if (!kept(p, g)) continue;
        grad_weight[c] += gradient.weight;
        grad_bias[c] += gradient.bias;
      }
    }
    for (int64_t c = 0; c < width; ++c)
      save_gradient<A>(p, first + c, grad_weight[c], grad_bias[c]);
  }

  int64_t merge_blocks() const { return (channels + merge_width - 1) / merge_width; }

  Strip<T> strip(int64_t row) const {
    const auto step = [](const gkt_activation& tensor) { return tensor.position_stride; };
    const auto start = [&](const gkt_activation& tensor) { return row * tensor.position_stride; };
    Strip<T> strip =
        make_strip<T>(p, start, step, row * mask_bytes(channels), mask_bytes(channels));
    strip.streams = streams;
    return strip;
  }

  // Calls body(chunk, first row, rows) for all tiles, in parallel over chunks; `backwards` meets
  // first what a pass forwards has left in the cache.
  template <class Body>
  void each_tile(bool backwards, const Body& body) const {
    parallel_for(all_chunks, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const Chunk chunk = chunk_in(backwards ? begin + end - 1 - i : i);
        const int64_t last = chunk.first + chunk.rows;
        for (int64_t row = chunk.first; row < last; row += tile_rows)
          body(chunk, row, at_most(tile_rows, last - row));
      }
      if (streams) finish_streaming();
    });
  }

  // Outputs that the cache can't hold anyway are written past it, which spares reading them first.
  bool can_stream() const {
    constexpr int64_t register_bytes = kWidth<A> * sizeof(T), too_large = 16 << 20;
    const auto aligned = [&](const gkt_activation& tensor) {
      return (reinterpret_cast<uintptr_t>(tensor.data) |
              static_cast<uintptr_t>(tensor.position_stride) * sizeof(T)) %
                 register_bytes ==
             0;
    };
    const int64_t elements = rows_before(p, p.ghosts) * p.positions * channels;
    return elements * static_cast<int64_t>(sizeof(T)) >= too_large && aligned(p.y) &&
           aligned(p.grad_x) && aligned(p.grad_residual);
  }
};

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
