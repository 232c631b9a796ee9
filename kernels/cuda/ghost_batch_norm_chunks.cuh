// How ghost_batch_norm cuts its tensors into chunks, and how a block walks through one.
//
// A line is what lies together in memory: the channels of one position (channels_last) or the
// positions of one channel of one batch row (planes). A block takes a chunk of lines, in planes of
// one channel, in channels_last of up to kMaxColumns channels; X neighbouring threads share a line,
// N elements each.
#pragma once

#include "common.cuh"
#include "gkt_abi.h"

namespace gkt {
namespace {

constexpr int kThreads = 256;
constexpr int kChunkElements = 8192;  // of a block, at least
constexpr int kMostChunks = 1024;     // of all ghost batches, unless there are more of these
constexpr int kMaxColumns = 128;      // of a block in channels_last

// Sizes of one call. Chunks depend on these alone, on any machine; which numbers a thread adds up
// depends on them and on N, which follows from sizes, strides and the alignment of addresses.
struct Geometry {
  int length, channels, ghosts;
  int lead_lines, lines;    // of the first ghost batch and of each other one
  int lead_chunks, chunks;  // the same
  int chunk_lines;
  int64_t values_per_line;  // of one channel
  bool channels_last;

  explicit Geometry(const gkt_ghost_batch_norm_params& p) {
    channels_last = p.channels_last != 0;
    const int64_t lines_per_row = channels_last ? p.positions : 1;
    const int64_t first_lines = p.lead_rows * lines_per_row;
    const int64_t other_lines = p.ghost_rows * lines_per_row;
    const int64_t all_columns = channels_last ? p.channels : p.positions;
    if (p.ghosts < 1 || p.lead_rows < 1 || p.ghost_rows < 1 || p.channels < 1 || p.positions < 1)
      throw InvalidArgument("ghost_batch_norm: every size must be at least 1");
    if (first_lines > INT32_MAX || other_lines > INT32_MAX || all_columns > INT32_MAX ||
        p.channels > INT32_MAX || p.ghosts > INT32_MAX)
      throw InvalidArgument("ghost_batch_norm: the CUDA kernels take sizes below 2^31");
    lead_lines = static_cast<int>(first_lines);
    lines = static_cast<int>(other_lines);
    length = static_cast<int>(all_columns);
    channels = static_cast<int>(p.channels);
    ghosts = static_cast<int>(p.ghosts);
    values_per_line = channels_last ? 1 : p.positions;
    const int width = channels_last && length > kMaxColumns ? kMaxColumns : length;
    const int64_t all_lines = first_lines + (p.ghosts - 1) * other_lines;
    const int64_t longest = (all_lines + kMostChunks - 1) / kMostChunks;
    const int most_lines = lead_lines > lines ? lead_lines : lines;
    int64_t wanted = kChunkElements / width > 1 ? kChunkElements / width : 1;
    if (wanted < longest) wanted = longest;
    chunk_lines = static_cast<int>(wanted < most_lines ? wanted : most_lines);
    lead_chunks = (lead_lines + chunk_lines - 1) / chunk_lines;
    chunks = (lines + chunk_lines - 1) / chunk_lines;
  }
  bool equal() const { return lead_lines == lines; }
  int64_t all_chunks() const { return lead_chunks + int64_t{ghosts - 1} * chunks; }
  int64_t parts() const { return 3 * all_chunks() * channels; }
  int64_t coefficients() const { return int64_t{3} * ghosts * channels; }
  __device__ int lines_in(int ghost) const { return ghost == 0 ? lead_lines : lines; }
  __device__ int64_t first_line(int ghost) const {
    return ghost == 0 ? 0 : lead_lines + int64_t{ghost - 1} * lines;
  }
  __device__ int chunks_in(int ghost) const { return ghost == 0 ? lead_chunks : chunks; }
  __device__ int first_chunk(int ghost) const {
    return ghost == 0 ? 0 : lead_chunks + (ghost - 1) * chunks;
  }
  __device__ double values(int ghost) const {
    return static_cast<double>(lines_in(ghost) * values_per_line);
  }
};

// A tensor as lines: line `l` of all ghost batches (of channel `c` in planes) begins at
// data + l * line + c * channel.
template <class T>
struct Lines {
  T* data;
  int line;
  int64_t channel;
};

template <class T>
Lines<T> lines_of(const gkt_activation& tensor, bool channels_last) {
  const int64_t line = channels_last ? tensor.position_stride : tensor.batch_stride;
  if (line > INT32_MAX || line < INT32_MIN)
    throw InvalidArgument("ghost_batch_norm: the CUDA kernels take strides below 2^31");
  return {static_cast<T*>(tensor.data), static_cast<int>(line),
          channels_last ? 0 : tensor.channel_stride};
}

// Threads that share a line, and blocks that share a chunk.
struct Tiling {
  int across, blocks;
};

// What a thread of the tile kernels works on.
template <int N>
struct Place {
  int64_t first;              // of the chunk's lines, among those of all ghost batches
  int channel;                // in planes
  int ghost, chunk, lines;    // the chunk among those of all ghost batches, and its lines
  int column, width, length;  // first column of this thread; columns from the block's first tile on
  int row, rows, tile_width;  // lines and columns that the block works on at once
  int steps;                  // how often it does, to have seen all

  // Block 0 takes the first chunk, or the last one.
  __device__ Place(const Geometry& g, Tiling tiling, bool backwards) {
    const int block = static_cast<int>(backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    const int beside = block % tiling.blocks;
    chunk = block / tiling.blocks;
    ghost = chunk < g.lead_chunks ? 0 : 1 + (chunk - g.lead_chunks) / g.chunks;
    const int skipped = (chunk - g.first_chunk(ghost)) * g.chunk_lines;
    const int left = g.lines_in(ghost) - skipped;
    first = g.first_line(ghost) + skipped;
    lines = left < g.chunk_lines ? left : g.chunk_lines;
    row = static_cast<int>(threadIdx.x) / tiling.across;
    rows = kThreads / tiling.across;
    tile_width = tiling.across * N;
    column = static_cast<int>(threadIdx.x) % tiling.across * N;
    length = g.length;
    if (g.channels_last) {
      column += beside * tile_width;
      width = tile_width;
      channel = 0;
    } else {
      width = g.length;
      channel = beside;
    }
    steps = (lines + rows - 1) / rows * ((width + tile_width - 1) / tile_width);
  }
};

// N elements of a line of the chunk. One that doesn't exist lies where another one does, so that
// loads need no branch, which would keep the next one waiting.
struct Position {
  int line, column;
  bool exists;
};

// The positions of a thread, one after the other. All threads of a block have as many, so that they
// may shuffle; beyond the last of them none exists.
template <int N>
struct Walk {
  int line, tile = 0;

  __device__ explicit Walk(const Place<N>& place) : line(place.row) {}
  __device__ __forceinline__ Position next(const Place<N>& place) {
    const int column = place.column + tile, last_line = place.lines - 1,
              last_column = place.length - N;
    const Position at{line < last_line ? line : last_line,
                      column < last_column ? column : last_column,
                      line <= last_line && column <= last_column};
    tile += place.tile_width;
    if (tile >= place.width) {
      tile = 0;
      line += place.rows;
    }
    return at;
  }
};

// A tensor's part that a thread works on.
template <class T, int N>
struct Chunk {
  T* data;
  int line;

  __device__ Chunk(const Lines<T>& tensor, const Place<N>& place)
      : data(tensor.data + place.first * tensor.line + place.channel * tensor.channel),
        line(tensor.line) {}
  __device__ __forceinline__ T* at(Position position) const {
    return data + int64_t{position.line} * line + position.column;
  }
};

// The ReLU's bits (csrc/gkt_abi.h); none where there is no ReLU.
template <class Byte, int N>
struct MaskChunk {
  Byte* data;
  int64_t line;

  __device__ MaskChunk(Byte* mask, const Geometry& g, const Place<N>& place)
      : data(mask), line((g.channels_last ? int64_t{1} : g.channels) * ((g.length + 7) / 8)) {
    if (mask != nullptr) data += place.first * line + int64_t{place.channel} * ((g.length + 7) / 8);
  }
  __device__ __forceinline__ bool is_there() const { return data != nullptr; }
  __device__ __forceinline__ Byte* at(Position position) const {
    return data + position.line * line + position.column / 8;
  }
  // Bit i is that of element i.
  __device__ __forceinline__ unsigned bits(Position position) const {
    return is_there() ? static_cast<unsigned>(*at(position)) >> (position.column % 8) : ~0u;
  }
};

// The coefficient of each of a thread's N columns, from (ghosts, channels). In channels_last N
// divides the channels and `by_channel` is aligned to N of them or 16 bytes: see vector_width().
template <class A, int N>
__device__ __forceinline__ void load_channels(const A* by_channel, const Geometry& g,
                                              const Place<N>& place, A (&values)[N]) {
  constexpr int kTogether = N < kVectorSize<A> ? N : kVectorSize<A>;
  const A* const ghost = by_channel + int64_t{place.ghost} * g.channels;
  if (!g.channels_last) {
    const A value = ghost[place.channel];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = value;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; i += kTogether) {
    A part[kTogether] = {};
    if (place.column < g.channels) load_vector<A, kTogether>(ghost + place.column + i, part);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) values[i + j] = part[j];
  }
}

}  // namespace
}  // namespace gkt
