// One row of group_knowledge_loss on the GPU, through all its streams, by the threads that share
// it: one, a warp or a block. Classes are walked in two passes, with an online softmax in the
// first; in four where logits are normalised. Every thread keeps the classes that it has read in
// shared memory where they fit, for the later passes and the next stream; else all passes read from
// memory. A group's knowledge is not stored: it is a weighted sum of the logits of the streams that
// visited the group.
#pragma once

#include "group_knowledge_loss_count.cuh"

namespace gkt {
namespace {

// The options in the type that they are used in: the GPU divides and converts double slowly.
template <class Real>
struct Options {
  int streams, groups, classes;
  bool normalized;  // not a template argument: twice the kernels would take twice as long to build
  Real ema, temperature, eps, kd_weight, ce_weight, subnet_ce_weight, gradient_scale;
  Real smoothing, uniform, per_class;  // uniform: smoothing spread over the classes
};

template <class Real>
Options<Real> make_options(const Params& p) {
  const double classes = static_cast<double>(p.classes);
  return {static_cast<int>(p.streams),
          static_cast<int>(p.groups),
          static_cast<int>(p.classes),
          p.normalize_logits != 0,
          static_cast<Real>(p.ema),
          static_cast<Real>(p.temperature),
          static_cast<Real>(p.eps),
          static_cast<Real>(p.kd_weight),
          static_cast<Real>(p.ce_weight),
          static_cast<Real>(p.subnet_ce_weight),
          static_cast<Real>(p.gradient_scale),
          static_cast<Real>(p.label_smoothing),
          static_cast<Real>(p.label_smoothing / classes),
          static_cast<Real>(1 / classes)};
}

// softmax(n(x) / T) = exp((x - maximum) * scale) * inverse_sum with n(x) = (x - maximum) * slope +
// top.
template <class Real>
struct Softmax {
  Real maximum, scale, sum, inverse_sum, slope, top;
};

// Reduction over the kGroup threads that share a row.
template <int kGroup, class T, class Combine>
__device__ __forceinline__ T reduce(T value, Combine combine, T identity, T* scratch) {
  if constexpr (kGroup == 1)
    return value;
  else if constexpr (kGroup == kWarpSize)
    return warp_reduce(value, combine);
  else
    return block_reduce(value, combine, identity, scratch);
}

template <class T, int kGroup, int kVector, bool kOneLoop>
struct RowLoss {
  using Real = Compute<T>;

  const Params& p;
  const Options<Real>& o;
  Real ce_rows, kd_rows, subnet_ce_rows;  // how many the means count
  Real* scratch;                          // of the block's reductions
  double* sums;              // (S + 1) of this group: CE, the kd_s, the subnets' cross entropies
  Softmax<Real>* visited;    // (S) of this group, for the knowledge of several loops
  Vector<T, kVector>* held;  // (slots, held_vectors), kThreads apart: this thread's; null: none
  int held_vectors;          // of a row
  int lane;
  const T *full = nullptr, *subnets = nullptr;  // the row in streams 0 and 1
  T *full_gradient = nullptr, *subnets_gradient = nullptr;
  const void* targets = nullptr;
  bool ce_counted = true, kd_counted = true;
  int label = -1;
  Real target_total = 1;

  __device__ Real sum(Real value) const { return reduce<kGroup>(value, Sum(), Real(0), scratch); }
  __device__ Real max(Real value) const {
    return reduce<kGroup>(value, Max(), -Real(INFINITY), scratch);
  }

  // Calls body(c) for the first of every kVector classes that this thread has.
  template <class Body>
  __device__ __forceinline__ void for_classes(const Body& body) const {
    for (int c = lane * kVector; c < o.classes; c += kGroup * kVector) body(c);
  }

  __device__ __forceinline__ const T* address(int stream, int c) const {
    return stream == 0
               ? full + c * p.full.class_stride
               : subnets + (stream - 1) * p.subnets.stream_stride + c * p.subnets.class_stride;
  }

  __device__ __forceinline__ Vector<T, kVector>& place(int stream, int c) const {
    const int slot = kOneLoop ? stream & 1 : stream;
    return held[(slot * held_vectors + c / (kGroup * kVector)) * kThreads];
  }

  // The first time that a stream's classes are read.
  __device__ __forceinline__ void fetch(int stream, int c, Real (&x)[kVector]) const {
    const Vector<T, kVector> packed = load_read_only<T, kVector>(address(stream, c));
    if constexpr (kGroup <= kWarpSize)
      if (held != nullptr) place(stream, c) = packed;
    unpack(packed, x);
  }

  __device__ __forceinline__ void load(int stream, int c, Real (&x)[kVector]) const {
    if constexpr (kGroup <= kWarpSize)
      if (held != nullptr) return unpack(place(stream, c), x);
    unpack(load_read_only<T, kVector>(address(stream, c)), x);
  }

  // K of `group` after `visits` loops: the first counts ema^(visits - 1), a later one
  // (1 - ema) * ema^(visits - 1 - visit).
  __device__ __forceinline__ void load_knowledge(int group, int visits, int c,
                                                 Real (&k)[kVector]) const {
    for (int i = 0; i < kVector; ++i) k[i] = 0;
    for (int visit = 0; visit < visits; ++visit) {
      Real weight = visit == 0 ? Real(1) : 1 - o.ema;
      for (int later = visit + 1; later < visits; ++later) weight *= o.ema;
      if (weight == 0) continue;
      const int stream = visit * o.groups + group;
      Real x[kVector];
      load(stream, c, x);
      const Softmax<Real> s = visited[stream];
      for (int i = 0; i < kVector; ++i)
        k[i] += weight * (o.normalized ? (x[i] - s.maximum) * s.slope + s.top : x[i]);
    }
  }

  __device__ void load_teacher(int stream, int c, Real (&k)[kVector]) const {
    if (kOneLoop)
      load(stream - 1, c, k);
    else
      load_knowledge((stream - 1) % o.groups, visits(stream), c, k);
  }

  __device__ int visits(int stream) const {
    return (stream - 1) % o.groups == 0 ? 1 : (stream - 1) / o.groups + 1;
  }

  __device__ Real probability(int c) const {
    const Real t = static_cast<const Real*>(targets)[c * p.targets_class_stride];
    return t * (1 - o.smoothing) + o.uniform;
  }

  __device__ void run(uint32_t row) {
    full = static_cast<const T*>(p.full.logits) + row_offset(p, p.full.row_strides, row);
    subnets = static_cast<const T*>(p.subnets.logits) + row_offset(p, p.subnets.row_strides, row);
    if (p.full.gradient != nullptr) {
      full_gradient =
          static_cast<T*>(p.full.gradient) + row_offset(p, p.full.gradient_row_strides, row);
      subnets_gradient =
          static_cast<T*>(p.subnets.gradient) + row_offset(p, p.subnets.gradient_row_strides, row);
    }
    const int64_t target = row_offset(p, p.targets_row_strides, row);
    if (p.probabilities) {
      targets = static_cast<const Real*>(p.targets) + target;
      Real total = 0;
      for_classes([&](int c) {
        for (int i = 0; i < kVector; ++i) total += probability(c + i);
      });
      target_total = sum(total);
    } else {
      const int64_t index = static_cast<const int64_t*>(p.targets)[target];
      ce_counted = index != p.ignore_index;
      // One out of range was counted, which makes everything NaN.
      label = index >= 0 && index < o.classes ? static_cast<int>(index) : ce_counted ? 0 : -1;
    }
    kd_counted = p.distill_ignored || ce_counted;
    Softmax<Real> teacher{};
    const int streams = row < p.subnet_rows ? o.streams : 1;
    for (int s = 0; s < streams; ++s) stream(s, teacher);
  }

  // `teacher` comes as the softmax of the stream before, and leaves as this stream's.
  __device__ void stream(int s, Softmax<Real>& teacher) {
    const Real shift = to_compute(*address(s, 0));  // keeps the mean of equal logits exact
    const Real ce_weight = s == 0 ? o.ce_weight : o.subnet_ce_weight;
    const bool has_ce = s == 0 || ce_weight != 0;
    const bool shared = !o.normalized && o.temperature == 1;  // by both softmaxes
    Real x[kVector];

    Softmax<Real> q;
    q.scale = 1 / o.temperature;
    OnlineSum softened{!o.normalized, q.scale}, raw{has_ce && !shared, 1};
    Real maximum = -Real(INFINITY), total = 0;
    for_classes([&](int c) {
      fetch(s, c, x);
      const Real before = maximum;
      for (int i = 0; i < kVector; ++i) {
        maximum = x[i] > maximum ? x[i] : maximum;
        total += x[i] - shift;
      }
      softened.add(x, before, maximum);
      raw.add(x, before, maximum);
    });
    q.maximum = max(maximum);
    const Real mean = sum(total) * o.per_class;
    const Real maximum_minus_mean = (q.maximum - shift) - mean;
    q.slope = 1;
    if (o.normalized) {
      Real squares = 0;
      for_classes([&](int c) {
        load(s, c, x);
        for (int i = 0; i < kVector; ++i) {
          const Real deviation = x[i] - shift - mean;
          squares += deviation * deviation;
        }
      });
      q.slope = 1 / sqrt(sum(squares) * o.per_class + o.eps);
      // A variance that overflows must not pass for an infinite one, which would leave no logits.
      if (!(q.slope > 0)) q.slope = NAN;
      q.scale *= q.slope;
      softened.scale = q.scale;
      for_classes([&](int c) {
        load(s, c, x);
        for (int i = 0; i < kVector; ++i) softened.sum += exp((x[i] - q.maximum) * q.scale);
      });
    } else {
      softened.rescale(maximum, q.maximum);
    }
    q.top = maximum_minus_mean * q.slope;
    q.sum = sum(softened.sum);
    q.inverse_sum = 1 / q.sum;
    Real raw_sum = q.sum;
    if (has_ce && !shared) {
      raw.rescale(maximum, q.maximum);
      raw_sum = sum(raw.sum);
    }
    if (!kOneLoop) {
      if constexpr (kGroup == kWarpSize) __syncwarp();  // other lanes are done with the row before
      if (lane == 0) visited[s] = q;
      if constexpr (kGroup == kWarpSize) __syncwarp();
      if constexpr (kGroup > kWarpSize) __syncthreads();
      if (s > 0) teacher = soften_knowledge(s);
    }
    compare_and_differentiate(s, q, teacher, ce_weight, has_ce, raw_sum, maximum_minus_mean);
    teacher = q;
  }

  // Sum of exp((x - maximum) * scale) while the maximum grows.
  struct OnlineSum {
    bool wanted;
    Real scale, sum = 0;

    __device__ OnlineSum(bool wanted, Real scale) : wanted(wanted), scale(scale) {}

    __device__ __forceinline__ void add(const Real (&x)[kVector], Real before, Real maximum) {
      if (!wanted) return;
      if (maximum > before) sum *= exp((before - maximum) * scale);
      const Real base = maximum == -Real(INFINITY) ? Real(0) : maximum;
      for (int i = 0; i < kVector; ++i) sum += exp((x[i] - base) * scale);
    }

    // From the maximum of this thread's classes to that of the row.
    __device__ __forceinline__ void rescale(Real own, Real maximum) {
      if (wanted && own != maximum) sum *= exp((own - maximum) * scale);
    }
  };

  __device__ Softmax<Real> soften_knowledge(int s) const {
    Softmax<Real> teacher{};
    teacher.scale = 1 / o.temperature;
    OnlineSum softened{true, teacher.scale};
    Real k[kVector], maximum = -Real(INFINITY);
    for_classes([&](int c) {
      load_teacher(s, c, k);
      const Real before = maximum;
      for (int i = 0; i < kVector; ++i) maximum = k[i] > maximum ? k[i] : maximum;
      softened.add(k, before, maximum);
    });
    teacher.maximum = max(maximum);
    softened.rescale(maximum, teacher.maximum);
    teacher.sum = sum(softened.sum);
    teacher.inverse_sum = 1 / teacher.sum;
    return teacher;
  }

  // q - p, and the divergence's summand p (exp(d) - 1 - d) for d = log q - log p: both accurate for
  // small d, and errors of the logarithms cancel to first order in the sum.
  __device__ static Real compare(Real x, Real k, const Softmax<Real>& student,
                                 const Softmax<Real>& teacher, Real log_ratio, Real& summand) {
    constexpr Real kNear = sizeof(Real) == 4 ? Real(0.5) : Real(1e-3);
    const Real student_d = (x - student.maximum) * student.scale;
    const Real teacher_d = (k - teacher.maximum) * teacher.scale;
    const Real q = exp(student_d) * student.inverse_sum;
    const Real prob = exp(teacher_d) * teacher.inverse_sum;
    const Real d = student_d - teacher_d - log_ratio;
    if (d < kNear && d > -kNear) {
      Real series = d * Real(1.0 / 5040) + Real(1.0 / 720);
      series = series * d + Real(1.0 / 120);
      series = series * d + Real(1.0 / 24);
      series = series * d + Real(1.0 / 6);
      series = series * d + Real(0.5);
      summand = prob * (series * (d * d));
      return summand + prob * d;
    }
    summand = q - prob - (prob == 0 ? Real(0) : prob * d);  // 0 log 0 = 0, also for -inf
    return q - prob;
  }

  // The mean over classes of n(x) * (q - p), which normalisation takes from the gradient.
  __device__ Real project(int s, const Softmax<Real>& q, const Softmax<Real>& teacher,
                          Real log_ratio) const {
    Real dot = 0, x[kVector], k[kVector];
    for_classes([&](int c) {
      load(s, c, x);
      load_teacher(s, c, k);
      for (int i = 0; i < kVector; ++i) {
        Real summand;
        const Real change = compare(x[i], k[i], q, teacher, log_ratio, summand);
        dot += change * ((x[i] - q.maximum) * q.slope + q.top);
      }
    });
    return sum(dot) * o.per_class;
  }

  __device__ void compare_and_differentiate(int s, const Softmax<Real>& q,
                                            const Softmax<Real>& teacher, Real ce_weight,
                                            bool has_ce, Real raw_sum, Real maximum_minus_mean) {
    const bool compared = s > 0, distilled = compared && o.kd_weight != 0;
    const bool by_probability = has_ce && p.probabilities, weighted = ce_weight != 0;
    T* to = s == 0 ? full_gradient
            : subnets_gradient == nullptr
                ? nullptr
                : subnets_gradient + (s - 1) * p.subnets.gradient_stream_stride;
    const int64_t step = s == 0 ? p.full.gradient_class_stride : p.subnets.gradient_class_stride;
    const Real log_raw = log(raw_sum), log_ratio = log(q.sum) - log(teacher.sum);
    const Real ce =
        ce_counted ? ce_weight * o.gradient_scale / (s == 0 ? ce_rows : subnet_ce_rows) : Real(0);
    const Real kd =
        kd_counted ? o.kd_weight * o.temperature * o.gradient_scale / kd_rows * q.slope : Real(0);
    const Real softmax_factor = ce * target_total / raw_sum;
    const Real one_hot = ce * (1 - o.smoothing), uniform = ce * o.uniform;
    const Real dot =
        o.normalized && distilled && to != nullptr ? project(s, q, teacher, log_ratio) : Real(0);
    Real divergence = 0, value = 0;
    if (to != nullptr || compared || by_probability)
      for_classes([&](int c) {
        Real x[kVector], k[kVector], g[kVector];
        load(s, c, x);
        if (compared) load_teacher(s, c, k);
        for (int i = 0; i < kVector; ++i) {
          g[i] = 0;
          if (compared) {
            Real summand;
            Real change = compare(x[i], k[i], q, teacher, log_ratio, summand);
            divergence += summand;
            // d/dx = slope * (g - n(x) * mean_c(g n(x))) for g = q - p, whose sum is zero.
            if (o.normalized) change -= ((x[i] - q.maximum) * q.slope + q.top) * dot;
            if (distilled) g[i] = change * kd;
          }
          if (by_probability) {
            const Real t = probability(c + i);
            value += t * ((q.maximum - x[i]) + log_raw);
            if (weighted) g[i] -= ce * t;
          }
          if (weighted) {
            g[i] += exp(x[i] - q.maximum) * softmax_factor;
            if (!p.probabilities) g[i] -= uniform + (c + i == label ? one_hot : Real(0));
          }
        }
        if (to == nullptr) return;
        if constexpr (kVector == 1)
          to[c * step] = from_compute<T>(g[0]);
        else
          store_vector<T, kVector>(to + c, g);
      });
    if (compared) {
      divergence = sum(divergence) * o.temperature * o.temperature;
      if (lane == 0 && kd_counted) sums[s] += static_cast<double>(divergence);
    }
    if (by_probability)
      value = sum(value);
    else if (has_ce && ce_counted)
      value = negative_log_likelihood(s, q.maximum, maximum_minus_mean, log_raw);
    if (has_ce && lane == 0 && ce_counted)
      sums[s == 0 ? 0 : o.streams] += static_cast<double>(value);
  }

  __device__ Real negative_log_likelihood(int s, Real maximum, Real maximum_minus_mean,
                                          Real log_sum) const {
    const Real nll = (maximum - to_compute(*address(s, label))) + log_sum;
    if (o.smoothing == 0) return nll;
    return nll * (1 - o.smoothing) + (maximum_minus_mean + log_sum) * o.smoothing;
  }
};

}  // namespace
}  // namespace gkt
