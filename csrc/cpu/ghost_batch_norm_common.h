// What both layouts of ghost_batch_norm share: coefficients of the affine maps, addresses.
#pragma once

#include <cstdint>
#include <cstddef>
#include <new>
#include "cpu/ghost_batch_norm_strips.h"
#include "gkt_abi.h"

namespace gkt {
namespace GKT_ISA {
namespace {

using Params = gkt_ghost_batch_norm_params;

GKT_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
GKT_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64})) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

GKT_INLINE int64_t rows_of(const Params& p, int64_t ghost) {
  return ghost == 0 ? p.lead_rows : p.ghost_rows;
}

// Of all ghost batches before this one.
GKT_INLINE int64_t rows_before(const Params& p, int64_t ghost) {
  return ghost == 0 ? 0 : p.lead_rows + (ghost - 1) * p.ghost_rows;
}

// Of a channel of a ghost batch.
GKT_INLINE double values_of(const Params& p, int64_t ghost) {
  return static_cast<double>(rows_of(p, ghost) * p.positions);
}

// What one (ghost batch, channel) needs of its statistics.
template <class A>
struct Affine {
  double mean, low, rstd, weight, bias;

  Affine(const Params& p, int64_t ghost, int64_t c) {
    const A* statistics = static_cast<const A*>(p.statistics) + ghost * p.channels + c;
    const int64_t plane = p.ghosts * p.channels;
    mean = statistics[0];
    low = statistics[plane];
    rstd = 1 / __builtin_sqrt(statistics[2 * plane] + p.eps);
    weight = p.weight ? static_cast<const A*>(p.weight)[c] : 1;
    bias = p.bias ? static_cast<const A*>(p.bias)[c] : 0;
  }
  static void save(const Params& p, int64_t ghost, int64_t c, double mean, double var) {
    A* statistics = static_cast<A*>(p.statistics) + ghost * p.channels + c;
    const int64_t plane = p.ghosts * p.channels;
    statistics[0] = static_cast<A>(mean);
    statistics[plane] = static_cast<A>(mean - statistics[0]);
    statistics[2 * plane] = static_cast<A>(var > 0 || var != var ? var : 0);
    if (p.running_mean == nullptr) return;
    const double n = values_of(p, ghost);
    mix(p, p.running_mean, c, mean);
    mix(p, p.running_var, c, statistics[2 * plane] * (n / (n > 1 ? n - 1 : 1)));
  }
  double scale() const { return weight * rstd; }
  double offset() const { return bias - low * scale(); }

 private:
  static void mix(const Params& p, void* running, int64_t c, double statistic) {
    A& r = static_cast<A*>(running)[c];
    r = static_cast<A>((1 - p.momentum) * r + p.momentum * statistic);
  }
};

// dx = scale * dz + slope * (x - mean) + offset, from the sums of dz and dz * (x - mean).
struct Gradient {
  double slope = 0, offset = 0, weight, bias;

  template <class A>
  Gradient(const Params& p, int64_t ghost, const Affine<A>& affine, double sum, double product) {
    product -= affine.low * sum;
    weight = product * affine.rstd;
    bias = sum;
    if (p.use_running) return;
    const double n = values_of(p, ghost);
    slope = -affine.scale() * affine.rstd * affine.rstd * product / n;
    offset = -affine.scale() * sum / n - slope * affine.low;
  }
};

GKT_INLINE bool kept(const Params& p, int64_t ghost) { return p.keep == nullptr || p.keep[ghost]; }

template <class A>
GKT_INLINE void save_gradient(const Params& p, int64_t c, double weight, double bias) {
  if (p.grad_weight) static_cast<A*>(p.grad_weight)[c] = static_cast<A>(weight);
  if (p.grad_bias) static_cast<A*>(p.grad_bias)[c] = static_cast<A>(bias);
}

GKT_INLINE int64_t mask_bytes(int64_t length) { return (length + 7) / 8; }

// The strip that begins `start(tensor)` elements into each tensor and advances by `step(tensor)`.
template <class T, class Start, class Step>
GKT_INLINE Strip<T> make_strip(const Params& p, const Start& start, const Step& step,
                               int64_t mask_start, int64_t mask_step) {
  const auto at = [&](const gkt_activation& tensor) {
    return tensor.data ? static_cast<T*>(tensor.data) + start(tensor) : nullptr;
  };
  Strip<T> strip;
  strip.x = at(p.x);
  strip.residual = at(p.residual);
  strip.y = at(p.y);
  strip.grad_y = at(p.grad_y);
  strip.grad_x = at(p.grad_x);
  strip.grad_residual = at(p.grad_residual);
  strip.mask = p.mask ? p.mask + mask_start : nullptr;
  strip.x_step = step(p.x);
  strip.residual_step = step(p.residual);
  strip.y_step = step(p.y);
  strip.grad_y_step = step(p.grad_y);
  strip.grad_x_step = step(p.grad_x);
  strip.grad_residual_step = step(p.grad_residual);
  strip.mask_step = mask_step;
  return strip;
}

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
