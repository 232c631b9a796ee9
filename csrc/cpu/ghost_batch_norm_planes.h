// ghost_batch_norm where the positions of one channel of one batch row are neighbours: a plane.
#pragma once

#include "cpu/ghost_batch_norm_common.h"
#include "cpu/parallel.h"

namespace gkt {
namespace GKT_ISA {
namespace {

// One thread does all planes of a channel twice, the second time backwards through a cache that may
// still hold them. Channels of few values go together: their coefficients take divisions and roots
// that wait for one another.
template <class T>
class Planes {
  using A = typename ArithmeticOf<T>::type;
  static constexpr int width = kWidth<A>;

 public:
  Planes(const Params& params, int threads)
      : p(params),
        threads(threads),
        registers(params.positions / width),
        rest(static_cast<int>(params.positions % width)),
        together(at_most(
            max_together,
            at_least(1, values_together /
                            at_least(1, at_least(p.lead_rows, p.ghost_rows) * p.positions)))) {}

  template <bool relu, bool has_residual>
  void forward() const {
    // Neighbours in memory one after the other, unless that gives one thread the long ghost batch.
    const bool equal = p.lead_rows == p.ghost_rows;
    parallel_for(p.ghosts * p.channels, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t first = begin; first < end; first += together) {
        Group group;
        group.count = static_cast<int>(at_most(together, end - first));
        for (int k = 0; k < group.count; ++k) {
          const int64_t i = first + k;
          group.ghost[k] = equal ? i / p.channels : i % p.ghosts;
          group.channel[k] = equal ? i % p.channels : i / p.ghosts;
        }
        forward<relu, has_residual>(group);
      }
    });
  }

  template <bool relu, bool has_residual>
  void backward() const {
    parallel_for(p.channels, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t first = begin; first < end; first += together) {
        Group group;
        group.count = static_cast<int>(at_most(together, end - first));
        double weight[max_together] = {}, bias[max_together] = {};
        for (int64_t g = 0; g < p.ghosts; ++g) {
          for (int k = 0; k < group.count; ++k) {
            group.ghost[k] = g;
            group.channel[k] = first + k;
          }
          backward<relu, has_residual>(group, weight, bias);
        }
        for (int k = 0; k < group.count; ++k) save_gradient<A>(p, first + k, weight[k], bias[k]);
      }
    });
  }

 private:
  using One = Registers<A, 1>;
  static constexpr int64_t part_length = 4096;  // elements summed in A before they go to a double

  // Channels of ghost batches that are done together.
  static constexpr int64_t max_together = 16;
  static constexpr int64_t values_together = 4096;  // that the first level of cache holds
  struct Group {
    int count;
    int64_t ghost[max_together], channel[max_together];
  };

  const Params& p;
  const int threads;
  const int64_t registers;  // whole ones in a plane
  const int rest;           // elements of a plane after them
  const int64_t together;   // at most, in a group

  // Of each of a group, the sums of two quantities.
  struct Sums {
    double first[max_together] = {}, second[max_together] = {};
  };

  template <bool relu, bool has_residual>
  void forward(const Group& group) const {
    if (!p.use_running) statistics(group);
    double mean[max_together], scale[max_together], offset[max_together];
    for (int k = 0; k < group.count; ++k) {
      const Affine<A> affine(p, group.ghost[k], group.channel[k]);
      mean[k] = affine.mean;
      scale[k] = affine.scale();
      offset[k] = affine.offset();
    }
    for (int k = 0; k < group.count; ++k) {
      const One means = One::all(static_cast<A>(mean[k]));
      const One scales = One::all(static_cast<A>(scale[k]));
      const One offsets = One::all(static_cast<A>(offset[k]));
      const bool keep = kept(p, group.ghost[k]);
      each_plane(
          group.ghost[k], group.channel[k], true,
          [&](const Strip<T>& part, int64_t steps, int count) __attribute__((always_inline)) {
            if (!keep) return strip_copy<T, A, 1>(part, steps, count);
            strip_forward<T, A, 1, relu, has_residual>(part, steps, count, means, scales, offsets);
          });
    }
  }

  template <bool relu, bool has_residual>
  void backward(const Group& group, double* grad_weight, double* grad_bias) const {
    const bool keep = kept(p, group.ghost[0]);  // that of all
    Sums of;
    for (int k = 0; keep && k < group.count; ++k) {
      const One mean = One::all(
          static_cast<const A*>(p.statistics)[group.ghost[k] * p.channels + group.channel[k]]);
      sums(group.ghost[k], group.channel[k], of.first[k], of.second[k],
           [&](const Strip<T>& part, int64_t steps, int count, One& first, One& second)
               __attribute__((always_inline)) {
                 strip_backward_sums<T, A, 1, relu>(part, steps, count, mean, first, second);
               });
    }
    double mean[max_together], scale[max_together], slope[max_together], offset[max_together];
    for (int k = 0; k < group.count; ++k) {
      const Affine<A> affine(p, group.ghost[k], group.channel[k]);
      const Gradient gradient(p, group.ghost[k], affine, of.first[k], of.second[k]);
      mean[k] = affine.mean;
      scale[k] = affine.scale();
      slope[k] = gradient.slope;
      offset[k] = gradient.offset;
      if (keep) {
        grad_weight[k] += gradient.weight;
        grad_bias[k] += gradient.bias;
      }
    }
    if (p.grad_x.data == nullptr && !has_residual) return;
    for (int k = 0; k < group.count; ++k) {
      const One means = One::all(static_cast<A>(mean[k]));
      const One scales = One::all(static_cast<A>(scale[k]));
      const One slopes = One::all(static_cast<A>(slope[k]));
      const One offsets = One::all(static_cast<A>(offset[k]));
      each_plane(group.ghost[k], group.channel[k], true,
                 [&](const Strip<T>& part, int64_t steps, int count)
                     __attribute__((always_inline)) {
                       if (!keep) return strip_drop<T, A, 1, has_residual>(part, steps, count);
                       strip_backward<T, A, 1, relu, has_residual>(part, steps, count, means,
                                                                   scales, slopes, offsets);
                     });
    }
  }

  void statistics(const Group& group) const {
    Sums of;
    double shift[max_together];
    for (int k = 0; k < group.count; ++k) {
      const A found = first_shift(group.ghost[k], group.channel[k]);
      const One shifts = One::all(found);
      shift[k] = static_cast<double>(found);
      sums(group.ghost[k], group.channel[k], of.first[k], of.second[k],
           [&](const Strip<T>& part, int64_t steps, int count, One& first, One& second)
               __attribute__((always_inline)) {
                 strip_statistics<T, A, 1>(part, steps, count, shifts, first, second);
               });
    }
    for (int k = 0; k < group.count; ++k) {
      const double n = values_of(p, group.ghost[k]), sum = of.first[k];
      Affine<A>::save(p, group.ghost[k], group.channel[k], shift[k] + sum / n,
                      (of.second[k] - sum * sum / n) / n);
    }
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
