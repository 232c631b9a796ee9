// ghost_batch_norm where the positions of one channel of one batch row are neighbours: a plane.
#pragma once

#include "cpu/ghost_batch_norm_common.h"
#include "cpu/parallel.h"

namespace gkt {
namespace GKT_ISA {
namespace {

// One thread does all planes of a channel twice, the second time backwards through a cache that may
// still hold them.
template <class T>
class Planes {
  using A = typename ArithmeticOf<T>::type;
  static constexpr int width = kWidth<A>;

 public:
  Planes(const Params& params, int threads)
      : p(params),
        threads(threads),
        registers(params.positions / width),
        rest(static_cast<int>(params.positions % width)) {}

  template <bool relu, bool has_residual>
  void forward() const {
    // Neighbours in memory one after the other, unless that gives one thread the long ghost batch.
    const bool equal = p.lead_rows == p.ghost_rows;
    parallel_for(p.ghosts * p.channels, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t g = equal ? i / p.channels : i % p.ghosts;
        const int64_t c = equal ? i % p.channels : i / p.ghosts;
        forward<relu, has_residual>(g, c);
      }
    });
  }

  template <bool relu, bool has_residual>
  void backward() const {
    parallel_for(p.channels, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t c = begin; c < end; ++c) {
        double weight = 0, bias = 0;
        for (int64_t g = 0; g < p.ghosts; ++g) backward<relu, has_residual>(g, c, weight, bias);
        save_gradient<A>(p, c, weight, bias);
      }
    });
  }

 private:
  using One = Registers<A, 1>;
  static constexpr int64_t part_length = 4096;  // elements summed in A before they go to a double

  const Params& p;
  const int threads;
  const int64_t registers;  // whole ones in a plane
  const int rest;           // elements of a plane after them

  template <bool relu, bool has_residual>
  void forward(int64_t g, int64_t c) const {
    if (!p.use_running) statistics(g, c);
    const Affine<A> affine(p, g, c);
    const One mean = One::all(static_cast<A>(affine.mean));
    const One scale = One::all(static_cast<A>(affine.scale()));
    const One offset = One::all(static_cast<A>(affine.offset()));
    const bool keep = kept(p, g);
    each_plane(g, c, true,
               [&](const Strip<T>& part, int64_t steps, int count) __attribute__((always_inline)) {
                 if (!keep) return strip_copy<T, A, 1>(part, steps, count);
                 strip_forward<T, A, 1, relu, has_residual>(part, steps, count, mean, scale,
                                                            offset);
               });
  }

  template <bool relu, bool has_residual>
  void backward(int64_t g, int64_t c, double& grad_weight, double& grad_bias) const {
    const Affine<A> affine(p, g, c);
    const One mean = One::all(static_cast<A>(affine.mean));
    const bool keep = kept(p, g);
    double sum = 0, product = 0;
    if (keep) {
      sums(g, c, sum, product,
           [&](const Strip<T>& part, int64_t steps, int count, One& first, One& second)
               __attribute__((always_inline)) {
                 strip_backward_sums<T, A, 1, relu>(part, steps, count, mean, first, second);
               });
    }
    const Gradient gradient(p, g, affine, sum, product);
    if (keep) {
      grad_weight += gradient.weight;
      grad_bias += gradient.bias;
    }
    if (p.grad_x.data == nullptr && !has_residual) return;
    const One scale = One::all(static_cast<A>(affine.scale()));
    const One slope = One::all(static_cast<A>(gradient.slope));
    const One offset = One::all(static_cast<A>(gradient.offset));
    each_plane(g, c, true,
               [&](const Strip<T>& part, int64_t steps, int count) __attribute__((always_inline)) {
                 if (!keep) return strip_drop<T, A, 1, has_residual>(part, steps, count);
                 strip_backward<T, A, 1, relu, has_residual>(part, steps, count, mean, scale, slope,
                                                             offset);
               });
  }

  void statistics(int64_t g, int64_t c) const {
    const double n = values_of(p, g);
    const A shift = first_shift(g, c);
    const One shifts = One::all(shift);
    double sum = 0, square = 0;
    sums(g, c, sum, square,
         [&](const Strip<T>& part, int64_t steps, int count, One& first, One& second)
             __attribute__((always_inline)) {
               strip_statistics<T, A, 1>(part, steps, count, shifts, first, second);
             });
    Affine<A>::save(p, g, c, static_cast<double>(shift) + sum / n, (square - sum * sum / n) / n);
  }

  // The mean of four values spread over the channel: near its mean, and exact for equal values.
  A first_shift(int64_t g, int64_t c) const {
    const int64_t n = rows_of(p, g) * p.positions, first_row = rows_before(p, g);
    const int samples = n >= 4 ? 4 : 1;
    A sum = 0;
    for (int sample = 0; sample < samples; ++sample) {
      const int64_t at = n / samples * sample, row = first_row + at / p.positions;
      const T* x =
          static_cast<const T*>(p.x.data) + row * p.x.batch_stride + c * p.x.channel_stride;
      sum += load<Lanes<A>>(x + at % p.positions, 1)[0];
    }
    return sum / samples;
  }

  // Calls body(strip, registers, elements in each) on the whole registers of each plane, then on
  // its rest.
  template <class Body>
  GKT_INLINE void each_plane(int64_t g, int64_t c, bool backwards, const Body& body) const {
    const int64_t first_row = rows_before(p, g), rows = rows_of(p, g);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = first_row + (backwards ? rows - 1 - i : i);
      const int64_t line = mask_bytes(p.positions);
      const auto start = [&](const gkt_activation& tensor) {
        return row * tensor.batch_stride + c * tensor.channel_stride;
      };
      const auto step = [](const gkt_activation&) { return width; };
      const Strip<T> plane =
          make_strip<T>(p, start, step, (row * p.channels + c) * line, width / 8);
      if (registers) body(plane, registers, width);
      if (rest) body(moved(plane, registers * width), 1, rest);
    }
  }

  // Sums two quantities over a channel of a ghost batch, in A for a few thousand elements at a
  // time.
  template <class Body>
  GKT_INLINE void sums(int64_t g, int64_t c, double& first, double& second,
                       const Body& body) const {
    constexpr int64_t part_steps = part_length / width;
    One parts[2] = {One::all(0), One::all(0)};
    int64_t steps_in_part = 0;
    const auto flush = [&] {
      first += lane_sum(parts[0].of[0]);
      second += lane_sum(parts[1].of[0]);
      parts[0] = parts[1] = One::all(0);
      steps_in_part = 0;
    };
    each_plane(g, c, false,
               [&](const Strip<T>& strip, int64_t steps, int count) __attribute__((always_inline)) {
                 for (int64_t step = 0; step < steps; step += part_steps) {
                   const int64_t now = at_most(part_steps, steps - step);
                   if (steps_in_part + now > part_steps) flush();
                   body(moved(strip, step * width), now, count, parts[0], parts[1]);
                   steps_in_part += now;
                 }
               });
    flush();
  }
};

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
