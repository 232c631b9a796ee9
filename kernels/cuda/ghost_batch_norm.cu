// ghost_batch_norm on a GPU: two passes each way, sums per chunk of lines (..._sums.cuh) and then
// the affine map (..._affine.cuh); between them the sums of the chunks are merged (..._merge.cuh).
// The same shapes, strides and alignment give the same bits on any GPU. See
// csrc/cpu/ghost_batch_norm.cpp, and csrc/gkt_abi.h for the mask and the statistics.
#include "ghost_batch_norm_affine.cuh"
#include "ghost_batch_norm_merge.cuh"
#include "ghost_batch_norm_sums.cuh"

namespace gkt {
namespace {

// Threads that share a line: a power of two, at least the number that share a byte of the mask.
Tiling make_tiling(const Geometry& g, int vector) {
  const int most = g.channels_last ? kMaxColumns / vector : kThreads;
  int across = 8 / vector;
  while (across < most && int64_t{across} * vector < g.length) across *= 2;
  const int width = across * vector;
  return {across, g.channels_last ? (g.length + width - 1) / width : g.channels};
}

dim3 tile_grid(const Geometry& g, Tiling tiling) {
  const int64_t blocks = tiling.blocks * g.all_chunks();
  if (blocks > INT32_MAX) throw InvalidArgument("ghost_batch_norm: too large for a grid");
  return dim3(static_cast<unsigned>(blocks));
}

int merge_blocks(const Geometry& g) { return (g.channels + kMergeChannels - 1) / kMergeChannels; }

template <class T, int N>
void forward(const gkt_ghost_batch_norm_params& p, void* stream) {
  using A = Compute<T>;
  const Geometry g(p);
  const Tiling tiling = make_tiling(g, N);
  const dim3 grid = tile_grid(g, tiling);
  A* const statistics = static_cast<A*>(p.statistics);
  A* const parts = static_cast<A*>(p.workspace);
  A* const coefficients = parts + g.parts();
  const auto x = lines_of<const T>(p.x, g.channels_last);
  const A* const no_mean = nullptr;
  const uint8_t* const no_mask = nullptr;
  if (!p.use_running)
    launch<sums_kernel<T, N, false>>(grid, kThreads, 0, stream, g, tiling, x, x, no_mask, no_mean,
                                     parts);
  const int64_t merges = int64_t{merge_blocks(g)} * g.ghosts;
  launch<merge_statistics_kernel<A>>(
      dim3(static_cast<unsigned>(merges)), kMergeThreads, 0, stream, g, merge_blocks(g),
      static_cast<const A*>(parts), static_cast<const A*>(p.weight), static_cast<const A*>(p.bias),
      p.eps, p.use_running != 0, statistics, coefficients, p.momentum,
      static_cast<A*>(p.running_mean), static_cast<A*>(p.running_var));
  launch<forward_kernel<T, N>>(
      grid, kThreads, 0, stream, g, tiling, x, lines_of<const T>(p.residual, g.channels_last),
      lines_of<T>(p.y, g.channels_last), p.relu != 0 ? p.mask : static_cast<uint8_t*>(nullptr),
      static_cast<const A*>(statistics), static_cast<const A*>(coefficients), p.keep);
}

template <class T, int N>
void backward(const gkt_ghost_batch_norm_params& p, void* stream) {
  using A = Compute<T>;
  const Geometry g(p);
  const Tiling tiling = make_tiling(g, N);
  const dim3 grid = tile_grid(g, tiling);
  const A* const statistics = static_cast<const A*>(p.statistics);
  A* const parts = static_cast<A*>(p.workspace);
  A* const coefficients = parts + g.parts();
  const auto x = lines_of<const T>(p.x, g.channels_last);
  const auto grad_y = lines_of<const T>(p.grad_y, g.channels_last);
  const uint8_t* const mask = p.relu != 0 ? p.mask : nullptr;
  launch<sums_kernel<T, N, true>>(grid, kThreads, 0, stream, g, tiling, x, grad_y, mask, statistics,
                                  parts);
  launch<merge_gradients_kernel<A>>(dim3(static_cast<unsigned>(merge_blocks(g))), kMergeThreads, 0,
                                    stream, g, merge_groups(g), static_cast<const A*>(parts),
                                    static_cast<const A*>(p.weight), statistics, p.keep, p.eps,
                                    p.use_running != 0, coefficients,
                                    static_cast<A*>(p.grad_weight), static_cast<A*>(p.grad_bias));
  launch<backward_kernel<T, N>>(grid, kThreads, 0, stream, g, tiling, x, grad_y,
                                lines_of<T>(p.grad_x, g.channels_last),
                                lines_of<T>(p.grad_residual, g.channels_last), mask, statistics,
                                static_cast<const A*>(coefficients), p.keep);
}

template <class T>
bool vectorizable(const gkt_ghost_batch_norm_params& p, int width) {
  using A = Compute<T>;
  const Geometry g(p);
  const auto multiple = [](int64_t value, int64_t of) { return value % of == 0; };
  const auto aligned = [&](const void* address, int64_t bytes) {
    return multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % 16),
                    bytes < 16 ? bytes : 16);
  };
  for (const gkt_activation* tensor :
       {&p.x, &p.residual, &p.y, &p.grad_y, &p.grad_x, &p.grad_residual}) {
    const Lines<T> lines = lines_of<T>(*tensor, g.channels_last);
    if (!aligned(tensor->data, width * static_cast<int64_t>(sizeof(T))) ||
        !multiple(lines.line, width) || !multiple(lines.channel, width))
      return false;
  }
  const int64_t channel_bytes = width * static_cast<int64_t>(sizeof(A));
  return multiple(g.length, width) && (!g.channels_last || (aligned(p.statistics, channel_bytes) &&
                                                            aligned(p.workspace, channel_bytes)));
}

// Elements that one access moves: 16 bytes of them, or fewer where sizes, strides or addresses are
// no multiples of that.
template <class T, int N = kVectorSize<T>, class Body>
void dispatch_width(const gkt_ghost_batch_norm_params& p, const Body& body) {
  if constexpr (N > 1) {
    if (!vectorizable<T>(p, N)) return dispatch_width<T, N / 2>(p, body);
  }
  body(std::integral_constant<int, N>());
}

template <bool is_forward>
void run(const gkt_ghost_batch_norm_params& p, void* stream) {
  if (p.relu && p.mask == nullptr) throw InvalidArgument("ghost_batch_norm: ReLU needs a mask");
  if (p.running_mean != nullptr && (p.ghosts != 1 || p.use_running || p.running_var == nullptr))
    throw InvalidArgument("ghost_batch_norm: running statistics are those of one ghost batch");
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_width<T>(p, [&](auto width) {
      constexpr int N = decltype(width)::value;
      if constexpr (is_forward)
        forward<T, N>(p, stream);
      else
        backward<T, N>(p, stream);
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
