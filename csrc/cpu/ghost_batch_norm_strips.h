// The inner loops of ghost_batch_norm: a few vector registers wide, coefficients in registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/vector.h"

namespace gkt {
namespace GKT_ISA {
namespace {

// At least 8 lanes, so that a vector's bits fill bytes of a mask.
template <class A>
constexpr int kWidth = kLanes<A> < 8 ? 8 : kLanes<A>;
template <class A>
using Lanes = Vec<A, kWidth<A>>;

#define GKT_UNROLL _Pragma("GCC unroll 8")

template <int width>
GKT_INLINE uint32_t load_bits(const uint8_t* from, int count) {
  if (count >= width) {
    if constexpr (width == 16) {
      uint16_t bits;
      std::memcpy(&bits, from, 2);
      return bits;
    }
    return from[0];
  }
  return count > 8 ? from[0] | from[1] << 8 : from[0];
}

template <int width>
GKT_INLINE void store_bits(uint8_t* to, uint32_t bits, int count) {
  if (count >= width && width == 16) {
    const uint16_t two = static_cast<uint16_t>(bits);
    std::memcpy(to, &two, 2);
    return;
  }
  if (count < width) bits &= (1u << count) - 1;
  to[0] = static_cast<uint8_t>(bits);
  if (count > 8) to[1] = static_cast<uint8_t>(bits >> 8);
}

// A strip is `steps` times `vectors` neighbouring registers, of which the last holds `count`
// elements. Each tensor has its own distance from step to step. Coefficients stay in registers: in
// channels_last they differ by lane and a step is a row; in planes they are all the same and a step
// is the next register.
template <class T>
struct Strip {
  const T* x = nullptr;
  const T* residual = nullptr;
  const T* grad_y = nullptr;
  T* y = nullptr;
  T* grad_x = nullptr;
  T* grad_residual = nullptr;
  uint8_t* mask = nullptr;
  int64_t x_step = 0, residual_step = 0, grad_y_step = 0, y_step = 0, grad_x_step = 0;
  int64_t grad_residual_step = 0, mask_step = 0;
  bool streams = false;  // whole registers are written past the cache
};

// The strip that begins `elements` further on, a multiple of 8 (each bit mask byte holds 8).
template <class T>
GKT_INLINE Strip<T> moved(Strip<T> strip, int64_t elements) {
  const auto move = [=](auto& pointer) {
    if (pointer) pointer += elements;
  };
  move(strip.x);
  move(strip.residual);
  move(strip.grad_y);
  move(strip.y);
  move(strip.grad_x);
  move(strip.grad_residual);
  if (strip.mask) strip.mask += elements / 8;
  return strip;
}

// The sum of all lanes in double, in pairs: lane after lane would wait for one addition after the
// other.
template <class V>
GKT_INLINE double lane_sum(V v) {
  constexpr int half = kLanesOf<V> / 2;
  const auto low = lanes_from<0, half>(v), high = lanes_from<half, half>(v);
  using Doubles = typename VectorOf<double, half>::Type;
  const Doubles sum =
      __builtin_convertvector(low, Doubles) + __builtin_convertvector(high, Doubles);
  if constexpr (half == 1)
    return sum[0];
  else
    return lane_sum(sum);
}

template <class T, class V>
GKT_INLINE void write(const Strip<T>& strip, T* to, V v, int lanes) {
  if (strip.streams && lanes == kLanesOf<V>)
    store_streaming(to, v);
  else
    store(to, v, lanes);
}

template <class A, int vectors>
struct Registers {
  Lanes<A> of[vectors];

  static GKT_INLINE Registers all(A scalar) {
    Registers r;
    GKT_UNROLL for (int v = 0; v < vectors; ++v) r.of[v] = broadcast<Lanes<A>>(scalar);
    return r;
  }
  static GKT_INLINE Registers read(const A* from, int count) {
    Registers r;
    GKT_UNROLL for (int v = 0; v < vectors; ++v) r.of[v] =
        load<Lanes<A>>(from + v * kWidth<A>, v == vectors - 1 ? count : kWidth<A>);
    return r;
  }
  GKT_INLINE void write(A* to, int count) const {
    GKT_UNROLL for (int v = 0; v < vectors; ++v)
        store(to + v * kWidth<A>, of[v], v == vectors - 1 ? count : kWidth<A>);
  }
};

// first += a; second += a * b, for (a, b) = term(step, v), summed in several chains of additions.
template <class A, int vectors, class Term>
GKT_INLINE void accumulate(int64_t steps, Registers<A, vectors>& first,
                           Registers<A, vectors>& second, const Term& term) {
  constexpr int chains = vectors >= 4 ? 1 : 4 / vectors;
  Registers<A, vectors> sums[chains][2];
  GKT_UNROLL for (int chain = 0; chain < chains; ++chain) {
    sums[chain][0] = Registers<A, vectors>::all(0);
    sums[chain][1] = Registers<A, vectors>::all(0);
  }
  int64_t step = 0;
  for (; step + chains <= steps; step += chains) {
    GKT_UNROLL for (int chain = 0; chain < chains; ++chain) {
      GKT_UNROLL for (int v = 0; v < vectors; ++v)
          term(step + chain, v, sums[chain][0].of[v], sums[chain][1].of[v]);
    }
  }
  for (; step < steps; ++step) {
    GKT_UNROLL for (int v = 0; v < vectors; ++v) term(step, v, sums[0][0].of[v], sums[0][1].of[v]);
  }
  GKT_UNROLL for (int chain = 0; chain < chains; ++chain) {
    GKT_UNROLL for (int v = 0; v < vectors; ++v) {
      first.of[v] = first.of[v] + sums[chain][0].of[v];
      second.of[v] = second.of[v] + sums[chain][1].of[v];
    }
  }
}

// sum += x - shift, square += (x - shift)^2.
template <class T, class A, int vectors>
GKT_INLINE void strip_statistics(const Strip<T>& strip, int64_t steps, int count,
                                 const Registers<A, vectors>& shift, Registers<A, vectors>& sum,
                                 Registers<A, vectors>& square) {
  constexpr int width = kWidth<A>;
  const uint32_t valid = (1u << count) - 1;
  accumulate<A, vectors>(
      steps, sum, square, [&](int64_t step, int v, Lanes<A>& first, Lanes<A>& second) {
        const int lanes = v == vectors - 1 ? count : width;
        Lanes<A> d = load<Lanes<A>>(strip.x + step * strip.x_step + v * width, lanes) - shift.of[v];
        if (lanes < width) d = where(d, valid);
        first += d;
        second += d * d;
      });
}

template <class T, class A, int vectors, bool relu, bool has_residual>
GKT_INLINE void strip_forward(const Strip<T>& strip, int64_t steps, int count,
                              const Registers<A, vectors>& mean, const Registers<A, vectors>& scale,
                              const Registers<A, vectors>& offset) {
  constexpr int width = kWidth<A>;
  for (int64_t step = 0; step < steps; ++step) {
    GKT_UNROLL for (int v = 0; v < vectors; ++v) {
      const int lanes = v == vectors - 1 ? count : width;
      const Lanes<A> x = load<Lanes<A>>(strip.x + step * strip.x_step + v * width, lanes);
      Lanes<A> y = (x - mean.of[v]) * scale.of[v] + offset.of[v];
      if (has_residual)
        y = y + load<Lanes<A>>(strip.residual + step * strip.residual_step + v * width, lanes);
      if (relu) {
        store_bits<width>(strip.mask + step * strip.mask_step + v * (width / 8), positive_bits(y),
                          lanes);
        y = rectified(y);
      }
      write(strip, strip.y + step * strip.y_step + v * width, y, lanes);
    }
  }
}

template <class T, class A, bool relu>
GKT_INLINE Lanes<A> grad_before_relu(const Strip<T>& strip, int64_t step, int v, int lanes) {
  constexpr int width = kWidth<A>;
  const Lanes<A> grad = load<Lanes<A>>(strip.grad_y + step * strip.grad_y_step + v * width, lanes);
  if (!relu) return grad;
  const uint8_t* mask = strip.mask + step * strip.mask_step + v * (width / 8);
  return where(grad, load_bits<width>(mask, lanes));
}

// sum += dz, product += dz * (x - mean), with dz the gradient before the ReLU.
template <class T, class A, int vectors, bool relu>
GKT_INLINE void strip_backward_sums(const Strip<T>& strip, int64_t steps, int count,
                                    const Registers<A, vectors>& mean, Registers<A, vectors>& sum,
                                    Registers<A, vectors>& product) {
  constexpr int width = kWidth<A>;
  accumulate<A, vectors>(
      steps, sum, product, [&](int64_t step, int v, Lanes<A>& first, Lanes<A>& second) {
        const int lanes = v == vectors - 1 ? count : width;
        const Lanes<A> x = load<Lanes<A>>(strip.x + step * strip.x_step + v * width, lanes);
        const Lanes<A> dz = grad_before_relu<T, A, relu>(strip, step, v, lanes);
        first += dz;
        second += dz * (x - mean.of[v]);
      });
}

// dx = scale * dz + slope * (x - mean) + offset.
template <class T, class A, int vectors, bool relu, bool has_residual>
GKT_INLINE void strip_backward(const Strip<T>& strip, int64_t steps, int count,
                               const Registers<A, vectors>& mean,
                               const Registers<A, vectors>& scale,
                               const Registers<A, vectors>& slope,
                               const Registers<A, vectors>& offset) {
  constexpr int width = kWidth<A>;
  for (int64_t step = 0; step < steps; ++step) {
    GKT_UNROLL for (int v = 0; v < vectors; ++v) {
      const int lanes = v == vectors - 1 ? count : width;
      const Lanes<A> x = load<Lanes<A>>(strip.x + step * strip.x_step + v * width, lanes);
      const Lanes<A> dz = grad_before_relu<T, A, relu>(strip, step, v, lanes);
      if (has_residual)
        write(strip, strip.grad_residual + step * strip.grad_residual_step + v * width, dz, lanes);
      const Lanes<A> dx = dz * scale.of[v] + ((x - mean.of[v]) * slope.of[v] + offset.of[v]);
      write(strip, strip.grad_x + step * strip.grad_x_step + v * width, dx, lanes);
    }
  }
}

// y = residual and a mask that lets every gradient pass, for a dropped ghost batch.
template <class T, class A, int vectors>
GKT_INLINE void strip_copy(const Strip<T>& strip, int64_t steps, int count) {
  constexpr int width = kWidth<A>;
  const std::size_t bytes = ((vectors - 1) * width + count) * sizeof(T);
  for (int64_t step = 0; step < steps; ++step) {
    std::memcpy(strip.y + step * strip.y_step, strip.residual + step * strip.residual_step, bytes);
    if (strip.mask == nullptr) continue;
    for (int v = 0; v < vectors; ++v)
      store_bits<width>(strip.mask + step * strip.mask_step + v * (width / 8), (1u << width) - 1,
                        v == vectors - 1 ? count : width);
  }
}

// dx = 0 and the residual's gradient is y's, for a dropped ghost batch.
template <class T, class A, int vectors, bool has_residual>
GKT_INLINE void strip_drop(const Strip<T>& strip, int64_t steps, int count) {
  const std::size_t bytes = ((vectors - 1) * kWidth<A> + count) * sizeof(T);
  for (int64_t step = 0; step < steps; ++step) {
    if (strip.grad_x) std::memset(strip.grad_x + step * strip.grad_x_step, 0, bytes);
    if (has_residual)
      std::memcpy(strip.grad_residual + step * strip.grad_residual_step,
                  strip.grad_y + step * strip.grad_y_step, bytes);
  }
}

template <int n>
struct Int {
  static constexpr int value = n;
};

// Calls body(Int<vectors>, first channel, elements in the last vector) on blocks that cover
// `channels`.
template <class A, class Body>
GKT_INLINE void for_channel_blocks(int64_t channels, const Body& body) {
  constexpr int width = kWidth<A>;
  constexpr int most = width == 16 ? 4 : 2;
  int64_t c = 0;
  for (; c + most * width <= channels; c += most * width) body(Int<most>{}, c, width);
  if (most == 4 && c + 2 * width <= channels) {
    body(Int<2>{}, c, width);
    c += 2 * width;
  }
  if (c + width <= channels) {
    body(Int<1>{}, c, width);
    c += width;
  }
  if (c < channels) body(Int<1>{}, c, static_cast<int>(channels - c));
}

#define GKT_BLOCK [&](auto vectors_of_block, int64_t c, int count) __attribute__((always_inline))

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
