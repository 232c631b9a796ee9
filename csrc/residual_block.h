// A residual block with norms after its convolutions, forward and backward: torch's convolutions
// and ghost_batch_norm's kernels, one after another, without Python between them. The same as
// gkt_fast/ops/residual_block/passes.py, which runs where this doesn't fit.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "residual_block_norms.h"

namespace gkt {

// y, statistics, and what backward needs, as `passes.forward` has them.
struct BlockResults {
  Tensor y;
  std::vector<Tensor> statistics, convolved, masks, activations;
};

template <class Launch>
class BlockRun {
 public:
  BlockRun(const BlockDescription& block, const BlockTensors& tensors, const Launch& launch)
      : block_(block),
        in_(tensors),
        device_(device_of(tensors.x)),
        norms_(block, tensors, launch, device_) {
    const TorchFunctions& torch = torch_functions();
    if (device_.type == torch.cpu) {
      convolution_ = torch.convolution_cpu;
      convolution_backward_ = torch.convolution_backward_cpu;
    } else if (device_.type == torch.cuda) {
      convolution_ = torch.convolution_cuda;
      convolution_backward_ = torch.convolution_backward_cuda;
    }
    if (convolution_ == nullptr || convolution_backward_ == nullptr)
      throw Unfit("this libtorch has no convolution for the device");
  }

  // updates: of each layer.
  BlockResults forward(std::vector<RunningUpdate>& updates) const {
    const size_t last = block_.depth() - 1;
    BlockResults out;
    out.activations.reserve(last);  // which `source` points into
    const Tensor* source = &in_.x;
    Tensor activation;
    for (size_t i = 0; i < last; ++i) {
      out.convolved.push_back(convolve(i, *source));
      Normalized found = norms_.forward(i, out.convolved[i], true, nullptr, updates[i]);
      out.statistics.push_back(std::move(found.statistics));
      if (block_.recompute) {
        activation = std::move(found.y);
        source = &activation;
      } else {
        out.masks.push_back(std::move(found.mask));
        out.activations.push_back(std::move(found.y));
        source = &out.activations.back();
      }
    }
    out.convolved.push_back(convolve(last, *source));
    const Tensor* residual = &skip();
    Normalized shortcut;
    if (block_.shortcut) {
      shortcut.y = convolve(last + 1, *residual);
      if (block_.normed_shortcut()) {
        out.convolved.push_back(std::move(shortcut.y));
        shortcut =
            norms_.forward(last + 1, out.convolved.back(), false, nullptr, updates[last + 1]);
      }
      residual = &shortcut.y;
    }
    if (residual->dtype() != out.convolved[last].dtype()) throw Unfit("the residual's dtype");
    Normalized found = norms_.forward(last, out.convolved[last], true, residual, updates[last]);
    out.y = std::move(found.y);
    out.masks.push_back(std::move(found.mask));
    out.statistics.push_back(std::move(found.statistics));
    if (shortcut.statistics) out.statistics.push_back(std::move(shortcut.statistics));
    return out;
  }

  // Gradients of x, of the residual, of keep (none) and of the parameters, undefined where none is
  // needed, which `needs` has in the same order. That of the residual belongs to skip; without skip
  // it is to be added to that of x.
  std::vector<Tensor> backward(const Tensor& grad_y, const BlockResults& saved,
                               const std::vector<bool>& needs) const {
    const size_t last = block_.depth() - 1, shortcut = last + 1;
    const bool needs_residual = needs[in_.skip ? 1 : 0];
    const auto needs_any = [&](size_t first, size_t layers) {
      bool any = false;
      for (size_t j = kSlots * first; j < kSlots * (first + layers); ++j) any |= needs[kInputs + j];
      return any;
    };
    std::vector<Tensor> gradients(needs.size());
    const auto norm = [&](size_t i, const Tensor& grad, const Tensor* mask, bool with_residual) {
      NormGradients found =
          norms_.backward(i, grad, saved.convolved[i], saved.statistics[i], mask, with_residual);
      const size_t place = kInputs + kSlots * i;
      if (needs[place + kNormWeight]) gradients[place + kNormWeight] = std::move(found.grad_weight);
      if (needs[place + kNormBias]) gradients[place + kNormBias] = std::move(found.grad_bias);
      return std::pair(std::move(found.grad_x), std::move(found.grad_residual));
    };
    const bool wanted = needs_residual || (block_.shortcut && needs_any(shortcut, 1));
    auto [gradient, residual] = norm(last, grad_y, &saved.masks.back(), wanted);
    for (size_t i = last + 1; i-- > 0;) {
      Normalized again;
      const Tensor *source = &in_.x, *mask = nullptr;
      if (i > 0 && block_.recompute) {
        again = norms_.again(i - 1, saved.convolved[i - 1], saved.statistics[i - 1]);
        source = &again.y;
        mask = &again.mask;
      } else if (i > 0) {
        source = &saved.activations[i - 1];
        mask = &saved.masks[i - 1];
      }
      const bool goes_on = needs[0] || needs_any(0, i);
      gradient = convolution_backward(i, gradient, *source, goes_on, needs, gradients);
      if (!gradient) break;
      if (i > 0) gradient = norm(i - 1, gradient, mask, false).first;
    }
    if (wanted && block_.shortcut) {
      if (block_.normed_shortcut()) residual = norm(shortcut, residual, nullptr, false).first;
      residual = convolution_backward(shortcut, residual, skip(), needs_residual, needs, gradients);
    }
    if (needs[0]) gradients[0] = std::move(gradient);
    if (needs_residual) gradients[1] = std::move(residual);
    return gradients;
  }

 private:
  const Tensor& skip() const { return in_.skip ? in_.skip : in_.x; }

  // The tensor, or `room` with a copy of it, in the dtype.
  const Tensor& as(const Tensor& tensor, int32_t dtype, Tensor& room) const {
    if (!tensor || tensor.dtype() == dtype) return tensor;
    const bool dense =
        tensor.dim() == 4 && (tensor.is_dense({0, 1, 2, 3}) || tensor.is_dense({0, 2, 3, 1}));
    room = dense ? empty_like(tensor, dtype, device_)
                 : empty({tensor.sizes(), tensor.sizes() + tensor.dim()}, dtype, device_);
    copy(room, tensor);
    return room;
  }

  // What convolution i reads, in the dtype in which it runs.
  struct Operands {
    const Tensor &x, &weight, &bias;
  };

  Operands operands(size_t i, const Tensor& x, Tensor (&rooms)[3]) const {
    const Tensor &weight = in_.parameter(i, kWeight), &bias = in_.parameter(i, kBias);
    const int32_t dtype = block_.dtype ? torch_dtype(*block_.dtype) : x.dtype();
    if (!block_.dtype && (weight.dtype() != dtype || (bias && bias.dtype() != dtype)))
      throw Unfit("a convolution's dtypes differ");
    return {as(x, dtype, rooms[0]), as(weight, dtype, rooms[1]), as(bias, dtype, rooms[2])};
  }

  Tensor convolve(size_t i, const Tensor& input) const {
    Tensor rooms[3];
    const auto [x, weight, bias] = operands(i, input, rooms);
    const BlockDescription::Convolution& c = block_.convolutions[i];
    TensorHandle bias_handle = bias.handle(), result = nullptr;
    check_torch(convolution_(x.handle(), weight.handle(), bias ? &bias_handle : nullptr,
                             c.stride.data(), 2, c.padding.data(), 2, c.dilation.data(), 2,
                             kNotTransposed, kNoPadding, 2, c.groups, &result),
                "convolution");
    return Tensor(result);
  }

  // The gradient of what convolution i read, undefined where none goes on; those of its parameters
  // are put down.
  Tensor convolution_backward(size_t i, const Tensor& grad_y, const Tensor& input, bool goes_on,
                              const std::vector<bool>& needs,
                              std::vector<Tensor>& gradients) const {
    const size_t place = kInputs + kSlots * i;
    const int32_t mask[] = {goes_on, needs[place + kWeight], needs[place + kBias]};
    if (!(mask[0] || mask[1] || mask[2])) return {};
    Tensor rooms[3];
    const auto [x, weight, bias] = operands(i, input, rooms);
    const BlockDescription::Convolution& c = block_.convolutions[i];
    const int64_t* bias_sizes = bias.sizes();
    TensorHandle results[3] = {};
    check_torch(convolution_backward_(
                    grad_y.handle(), x.handle(), weight.handle(), bias ? &bias_sizes : nullptr, 1,
                    c.stride.data(), 2, c.padding.data(), 2, c.dilation.data(), 2, kNotTransposed,
                    kNoPadding, 2, c.groups, mask, 3, &results[0], &results[1], &results[2]),
                "convolution_backward");
    Tensor found[3];
    for (int j = 0; j < 3; ++j) {
      if (mask[j])
        found[j] = Tensor(results[j]);
      else if (results[j] != nullptr)
        torch_functions().delete_tensor(results[j]);  // undefined
    }
    for (int j = 1; j < 3; ++j) {
      if (!found[j]) continue;
      const int32_t dtype = in_.parameter(i, static_cast<Slot>(j - 1)).dtype();
      Tensor room;
      as(found[j], dtype, room);
      gradients[place + j - 1] = room ? std::move(room) : std::move(found[j]);
    }
    return std::move(found[0]);
  }

  static constexpr int32_t kNotTransposed = 0;
  static constexpr int64_t kNoPadding[] = {0, 0};  // of the output

  const BlockDescription& block_;
  const BlockTensors& in_;
  const Device device_;
  const BlockNorms<Launch> norms_;
  TorchFunctions::Convolution convolution_ = nullptr;
  TorchFunctions::ConvolutionBackward convolution_backward_ = nullptr;
};

}  // namespace gkt
