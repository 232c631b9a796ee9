// The norms of a residual block: memory for results, and calls of ghost_batch_norm's kernels.
#pragma once

#include <cstdint>
#include <utility>

#include "residual_block_problem.h"
#include "running_statistics.h"

namespace gkt {

// The number that torch has for a gkt_dtype.
inline int32_t torch_dtype(int32_t dtype) {
  const TorchFunctions& torch = torch_functions();
  const int32_t numbers[] = {torch.float32, torch.float64, torch.bfloat16, torch.float16};
  return numbers[dtype];
}

// The gkt_dtype of a tensor.
inline int32_t kernel_dtype(const Tensor& tensor) {
  for (const int32_t dtype : {GKT_FLOAT32, GKT_FLOAT64, GKT_BFLOAT16, GKT_FLOAT16})
    if (tensor.dtype() == torch_dtype(dtype)) return dtype;
  throw Unfit("an activation's dtype");
}

// What a norm gave. Statistics are (3, ghosts, channels); the mask is empty without ReLU.
struct Normalized {
  Tensor y, statistics, mask;
};

struct NormGradients {
  Tensor grad_x, grad_residual, grad_weight, grad_bias;
};

template <class Launch>
class BlockNorms {
 public:
  BlockNorms(const BlockDescription& block, const BlockTensors& tensors, const Launch& launch,
             Device device)
      : block_(block), in_(tensors), launch_(launch), device_(device) {
    if (in_.keep && (in_.keep.dim() != 1 || in_.keep.size(0) != block_.ghosts ||
                     !in_.keep.is_dense({0}) || !is_here(in_.keep)))
      throw Unfit("keep");
    for (size_t i = 0; i < block_.layers(); ++i)
      if (in_.parameter(i, kEvalMean) || in_.parameter(i, kEvalVar))
        throw Unfit("running statistics are used");
  }

  // Of c, what convolution i gave. residual: null for none, and then no ReLU follows, or in
  // the main branch one does.
  Normalized forward(size_t i, const Tensor& c, bool relu, const Tensor* residual,
                     RunningUpdate& update) const {
    gkt_ghost_batch_norm_params params = describe(i, c, relu);
    Normalized out{empty_like(c, c.dtype(), device_),
                   empty({3, block_.ghosts, params.channels}, statistics_dtype(params), device_),
                   mask_for(params, c)};
    Tensor room;
    params.x = activation(params, c);
    params.y = activation(params, out.y);
    if (residual != nullptr) {
      params.residual = activation(params, laid_out_as(*residual, c, room));
      params.keep = static_cast<const uint8_t*>(in_.keep.data());
    }
    params.statistics = out.statistics.data();
    params.mask = static_cast<uint8_t*>(out.mask.data());
    const bool updates = update.mean && !update.done;
    if (updates) {
      params.running_mean = vector(update.mean, params);
      params.running_var = vector(update.var, params);
      params.momentum = update.momentum;
      if (update.counter && !is_counter(update.counter)) throw Unfit("a counter");
    }
    const Tensor workspace = workspace_for(params);
    check(launch_.forward(params));
    if (updates && update.counter) count_batch(update.counter);
    update.done = update.done || updates;
    return out;
  }

  // What `forward` gave with ReLU and without residual, once more, by the statistics it found.
  Normalized again(size_t i, const Tensor& c, const Tensor& statistics) const {
    gkt_ghost_batch_norm_params params = describe(i, c, true);
    Normalized out{empty_like(c, c.dtype(), device_), {}, mask_for(params, c)};
    params.use_running = 1;
    params.x = activation(params, c);
    params.y = activation(params, out.y);
    params.statistics = values_of(statistics);
    params.mask = static_cast<uint8_t*>(out.mask.data());
    const Tensor workspace = workspace_for(params);
    check(launch_.forward(params));
    return out;
  }

  // mask: null without ReLU. The block's last norm is the one that has a residual.
  NormGradients backward(size_t i, const Tensor& grad_y, const Tensor& c, const Tensor& statistics,
                         const Tensor* mask, bool needs_residual) const {
    gkt_ghost_batch_norm_params params = describe(i, c, mask != nullptr);
    const int32_t dtype = statistics_dtype(params);
    NormGradients out{empty_like(c, c.dtype(), device_),
                      {},
                      empty({params.channels}, dtype, device_),
                      empty({params.channels}, dtype, device_)};
    Tensor room;
    params.grad_y = activation(params, laid_out_as(grad_y, c, room));
    params.x = activation(params, c);
    params.grad_x = activation(params, out.grad_x);
    if (needs_residual) {
      out.grad_residual = empty_like(c, c.dtype(), device_);
      params.grad_residual = activation(params, out.grad_residual);
    }
    params.statistics = values_of(statistics);
    if (mask != nullptr) params.mask = static_cast<uint8_t*>(mask->data());
    if (i == block_.depth() - 1) params.keep = static_cast<const uint8_t*>(in_.keep.data());
    params.grad_weight = out.grad_weight.data();
    params.grad_bias = out.grad_bias.data();
    const Tensor workspace = workspace_for(params);
    check(launch_.backward(params));
    return out;
  }

 private:
  // Sizes, layout and options; every activation has the layout of c.
  gkt_ghost_batch_norm_params describe(size_t i, const Tensor& c, bool relu) const {
    gkt_ghost_batch_norm_params params{};
    if (c.dim() != 4 || c.numel() == 0) throw Unfit("an activation is empty");
    params.channels = c.size(1);
    params.positions = c.size(2) * c.size(3);
    if (c.is_dense({0, 1, 2, 3}) && params.positions > 1)
      params.channels_last = 0;
    else if (c.is_dense({0, 2, 3, 1}))
      params.channels_last = 1;
    else
      throw Unfit("an activation is strided");
    if (block_.ghosts < 1) throw Unfit("there are no ghost batches");
    params.ghosts = block_.ghosts;
    params.lead_rows = block_.lead_rows.value_or(c.size(0) / block_.ghosts);
    params.ghost_rows = params.lead_rows;
    if (block_.ghosts > 1) params.ghost_rows = (c.size(0) - params.lead_rows) / (block_.ghosts - 1);
    if (params.lead_rows + params.ghost_rows * (block_.ghosts - 1) != c.size(0))
      throw Unfit("rows don't divide");
    params.eps = block_.eps[i];
    params.relu = relu;
    params.dtype = kernel_dtype(c);
    params.weight = vector(in_.parameter(i, kNormWeight), params);
    params.bias = vector(in_.parameter(i, kNormBias), params);
    return params;
  }

  static gkt_activation activation(const gkt_ghost_batch_norm_params& params,
                                   const Tensor& tensor) {
    const int64_t row = params.channels * params.positions;
    if (params.channels_last) return {tensor.data(), row, 1, params.channels};
    return {tensor.data(), row, params.positions, 1};
  }

  static int32_t statistics_dtype(const gkt_ghost_batch_norm_params& params) {
    return torch_dtype(params.dtype == GKT_FLOAT64 ? GKT_FLOAT64 : GKT_FLOAT32);
  }

  // Whether it has values in memory that the kernels can read.
  bool is_here(const Tensor& tensor) const {
    const Device device = device_of(tensor);
    return tensor.data() != nullptr && device.type == device_.type && device.index == device_.index;
  }

  // The tensor, or `room` with a copy of it, in the dtype and the layout of the example.
  const Tensor& laid_out_as(const Tensor& tensor, const Tensor& example, Tensor& room) const {
    bool alike = tensor.dim() == example.dim(), same = tensor.dtype() == example.dtype();
    for (int64_t d = 0; alike && d < tensor.dim(); ++d) {
      alike = tensor.size(d) == example.size(d);
      same = same && (tensor.size(d) == 1 || tensor.stride(d) == example.stride(d));
    }
    if (!alike || !is_here(tensor)) throw Unfit("an activation's shape, or where it is");
    if (same) return tensor;
    room = empty_like(example, example.dtype(), device_);
    copy(room, tensor);
    return room;
  }

  // A vector of a norm, as kernels read it.
  void* vector(const Tensor& tensor, const gkt_ghost_batch_norm_params& params) const {
    if (!tensor) return nullptr;
    if (tensor.dtype() != statistics_dtype(params) || tensor.dim() != 1 ||
        tensor.size(0) != params.channels || !tensor.is_dense({0}) || !is_here(tensor))
      throw Unfit("a norm's vector");
    return tensor.data();
  }

  static void* values_of(const Tensor& statistics) {
    if (!statistics.is_dense({0, 1, 2})) throw Unfit("statistics are strided");
    return statistics.data();
  }

  Tensor mask_for(const gkt_ghost_batch_norm_params& params, const Tensor& c) const {
    const int64_t lines = c.size(0) * (params.channels_last ? params.positions : params.channels);
    const int64_t length = params.channels_last ? params.channels : params.positions;
    return empty({params.relu ? lines * ((length + 7) / 8) : 0}, torch_functions().uint8, device_);
  }

  Tensor workspace_for(gkt_ghost_batch_norm_params& params) const {
    const int64_t elements = launch_.workspace(params);
    if (elements == 0) return {};
    Tensor workspace = empty({elements}, statistics_dtype(params), device_);
    params.workspace = workspace.data();
    return workspace;
  }

  static void check(int status) {
    if (status != GKT_OK) throw KernelError{status};
  }

  const BlockDescription& block_;
  const BlockTensors& in_;
  const Launch launch_;
  const Device device_;
};

}  // namespace gkt
