// Running statistics of many norms in one call, in the CPU's memory.
#pragma once

#include <cstdint>
#include <vector>

#include "torch_shim.h"

namespace gkt {

// What one norm has found, and what it updates.
struct StatisticsUpdate {
  Tensor mean, var;  // of ghost batches, (m, C) each; without var both in mean, (3, m, C)
  Tensor running_mean, running_var;
  Tensor counter;  // of batches, one int64; may be undefined
  int64_t ghost;
  double correction;  // of the variance, to make it unbiased
  double momentum;
};

inline bool is_on_cpu(const Tensor& tensor) {
  return tensor.data() != nullptr && device_of(tensor).type == torch_functions().cpu;
}

// Whether 1 can be added to it here.
inline bool is_counter(const Tensor& tensor) {
  return tensor.dtype() == torch_functions().int64 && tensor.numel() == 1 && is_on_cpu(tensor);
}

inline void count_batch(const Tensor& counter) { ++*static_cast<int64_t*>(counter.data()); }

inline bool is_vector_of(const Tensor& tensor, int32_t dtype, int64_t channels) {
  return tensor.dtype() == dtype && tensor.dim() == 1 && tensor.size(0) == channels &&
         tensor.is_dense({0}) && is_on_cpu(tensor);
}

// Whether `write` can read and write it.
inline bool fits(const StatisticsUpdate& update) {
  const TorchFunctions& torch = torch_functions();
  const int32_t dtype = update.running_mean.dtype();
  const int64_t channels = update.running_mean.numel();
  if ((dtype != torch.float32 && dtype != torch.float64) ||
      !is_vector_of(update.running_mean, dtype, channels) ||
      !is_vector_of(update.running_var, dtype, channels))
    return false;
  const auto is_found = [&](const Tensor& found, int64_t dims) {
    return found.dtype() == dtype && found.dim() == dims && found.size(dims - 1) == channels &&
           update.ghost >= 0 && update.ghost < found.size(dims - 2) &&
           (dims == 2 ? found.is_dense({0, 1}) : found.size(0) == 3 && found.is_dense({0, 1, 2})) &&
           is_on_cpu(found);
  };
  if (!is_found(update.mean, update.var ? 2 : 3)) return false;
  if (update.var && !is_found(update.var, 2)) return false;
  return !update.counter || is_counter(update.counter);
}

template <class A>
void mix(const Tensor& running, const A* statistic, double momentum, double correction) {
  A* const values = static_cast<A*>(running.data());
  for (int64_t c = 0; c < running.size(0); ++c)
    values[c] = static_cast<A>((1 - momentum) * values[c] + momentum * correction * statistic[c]);
}

template <class A>
void write_as(const StatisticsUpdate& update) {
  const int64_t channels = update.running_mean.size(0), row = update.ghost * channels;
  const A* const mean = static_cast<const A*>(update.mean.data()) + row;
  const A* const var = update.var ? static_cast<const A*>(update.var.data()) + row
                                  : mean + 2 * update.mean.size(1) * channels;
  mix(update.running_mean, mean, update.momentum, 1);
  mix(update.running_var, var, update.momentum, update.correction);
}

inline void write(const StatisticsUpdate& update) {
  if (update.running_mean.dtype() == torch_functions().float64)
    write_as<double>(update);
  else
    write_as<float>(update);
  if (update.counter) count_batch(update.counter);
}

// Writes the updates in their order; false, and nothing is written, where one doesn't fit.
inline bool update_running_statistics(const std::vector<StatisticsUpdate>& updates) {
  for (const StatisticsUpdate& update : updates)
    if (!fits(update)) return false;
  for (const StatisticsUpdate& update : updates) write(update);
  return true;
}

}  // namespace gkt
