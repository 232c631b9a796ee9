// What a residual block is told, and where ghost_batch_norm's kernels run for it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include "gkt_abi.h"
#include "torch_shim.h"

namespace gkt {

// The arguments aren't what residual_block.h is for. Nothing has been written.
struct Unfit : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A kernel's status; gkt_last_error() has its text.
struct KernelError {
  int status;
};

// Which kernels of ghost_batch_norm run, and where.
struct CpuLaunch {
  int threads;
  int forward(const gkt_ghost_batch_norm_params& params) const {
    return gkt_ghost_batch_norm_fwd_cpu(&params, threads);
  }
  int backward(const gkt_ghost_batch_norm_params& params) const {
    return gkt_ghost_batch_norm_bwd_cpu(&params, threads);
  }
  int64_t workspace(const gkt_ghost_batch_norm_params&) const { return 0; }
};

#ifdef GKT_WITH_CUDA
struct CudaLaunch {
  void* stream;
  int forward(const gkt_ghost_batch_norm_params& params) const {
    return gkt_ghost_batch_norm_fwd_cuda(&params, stream);
  }
  int backward(const gkt_ghost_batch_norm_params& params) const {
    return gkt_ghost_batch_norm_bwd_cuda(&params, stream);
  }
  int64_t workspace(const gkt_ghost_batch_norm_params& params) const {
    return gkt_ghost_batch_norm_workspace_cuda(&params);
  }
};
#endif

// Tensors of a layer, in the order of `parameters_of` in Python.
enum Slot { kWeight, kBias, kNormWeight, kNormBias, kEvalMean, kEvalVar, kSlots };

// What is told of a block besides tensors; `Problem` in Python.
struct BlockDescription {
  struct Convolution {
    std::array<int64_t, 2> stride, padding, dilation;
    int64_t groups;
  };
  std::vector<Convolution> convolutions;  // of the main branch, then of the shortcut
  std::vector<double> eps;                // negative: no norm
  bool shortcut;
  int64_t ghosts;
  std::optional<int64_t> lead_rows;
  bool recompute;
  std::optional<int32_t> dtype;  // gkt_dtype of convolutions; none: that of their input

  size_t layers() const { return convolutions.size(); }
  size_t depth() const { return layers() - (shortcut ? 1 : 0); }
  bool normed_shortcut() const { return shortcut && eps.back() >= 0; }
};

// Running statistics that a layer's norm updates.
struct RunningUpdate {
  Tensor mean, var;
  Tensor counter;  // of batches, in the CPU's memory; may be undefined
  double momentum;
  bool done;
};

// x, skip and keep, which come before the parameters.
constexpr size_t kInputs = 3;

// The tensors of a call. skip and keep may be undefined, and so may parameters.
struct BlockTensors {
  Tensor x, skip, keep;
  std::vector<Tensor> parameters;

  const Tensor& parameter(size_t layer, Slot slot) const {
    return parameters[kSlots * layer + slot];
  }
};

}  // namespace gkt
