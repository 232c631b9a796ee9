// One row of group_knowledge_loss on the GPU, through all its streams, by the threads that share
// it: one, a warp or a block. Classes are walked once per pass; the passes after the first find
// them in cache. A group's knowledge is not stored: it is a weighted sum of the logits of the
// streams that visited the group, which are read again.
#pragma once

#include "common.cuh"
#include "gkt_abi.h"

namespace gkt {
namespace {

using Params = gkt_group_knowledge_loss_params;

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

__device__ int64_t row_offset(const Params& p, const int64_t* strides, uint32_t row) {
  int64_t offset = 0;
  for (int d = p.row_dims - 1; d > 0; --d) {
    const uint32_t size = static_cast<uint32_t>(p.row_sizes[d]);
    offset += static_cast<int64_t>(row % size) * strides[d];
    row /= size;
  }
  return offset + static_cast<int64_t>(row) * strides[0];
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
  Real ce_rows, kd_rows;   // how many the means count
  Real* scratch;           // of the block's reductions
  double* sums;            // (S + 1) of this group: CE, the kd_s, the subnets' cross entropies
  Softmax<Real>* visited;  // (S) of this group, for the knowledge of several loops
  int lane;
  const T* logits = nullptr;  // the row in stream 0
  T* gradient = nullptr;
  const void* targets = nullptr;
  bool ce_counted = true, kd_counted = true;
  int label = -1;

  __device__ Real sum(Real value) const { return reduce<kGroup>(value, Sum(), Real(0), scratch); }
  __device__ Real max(Real value) const {
    return reduce<kGroup>(value, Max(), -Real(INFINITY), scratch);
  }

  // Calls body(c) for the first of every kVector classes that this thread has.
  template <class Body>
  __device__ __forceinline__ void for_classes(const Body& body) const {
    for (int c = lane * kVector; c < o.classes; c += kGroup * kVector) body(c);
  }

  __device__ __forceinline__ void load(int stream, int c, Real (&x)[kVector]) const {
    const T* from = logits + stream * p.logits_stream_stride + c * p.logits_class_stride;
    if constexpr (kVector == 1)
      x[0] = to_compute(*from);
    else
      load_vector<T, kVector>(from, x);
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
    logits = static_cast<const T*>(p.logits) + row_offset(p, p.logits_row_strides, row);
    if (p.gradient != nullptr)
      gradient = static_cast<T*>(p.gradient) + row_offset(p, p.gradient_row_strides, row);
    const int64_t target = row_offset(p, p.targets_row_strides, row);
    if (p.probabilities) {
      targets = static_cast<const Real*>(p.targets) + target;
    } else {
      const int64_t index = static_cast<const int64_t*>(p.targets)[target];
      label = static_cast<int>(index);
      ce_counted = index != p.ignore_index;
    }
    kd_counted = p.distill_ignored || ce_counted;
    Softmax<Real> teacher{};
    for (int s = 0; s < o.streams; ++s) stream(s, teacher);
  }

  // `teacher` comes as the softmax of the stream before, and leaves as this stream's.
  __device__ void stream(int s, Softmax<Real>& teacher) {
    const Real temperature = o.temperature, per_class = o.per_class;
    const T* row = logits + s * p.logits_stream_stride;
    const Real shift = to_compute(row[0]);  // keeps the mean of equal logits exact
    Real x[kVector], k[kVector];

    Softmax<Real> q;
    Real maximum = -Real(INFINITY), total = 0;
    for_classes([&](int c) {
      load(s, c, x);
      for (int i = 0; i < kVector; ++i) {
        maximum = x[i] > maximum ? x[i] : maximum;
        total += x[i] - shift;
      }
    });
    q.maximum = max(maximum);
    const Real mean = sum(total) * per_class;
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
      q.slope = 1 / sqrt(sum(squares) * per_class + o.eps);
    }
    q.top = maximum_minus_mean * q.slope;
    q.scale = q.slope / temperature;

    const Real ce_weight = s == 0 ? o.ce_weight : o.subnet_ce_weight;
    const bool has_ce = s == 0 || ce_weight != 0;
    Real raw_total = 0;
    total = 0;
    for_classes([&](int c) {
      load(s, c, x);
      for (int i = 0; i < kVector; ++i) {
        total += exp((x[i] - q.maximum) * q.scale);
        if (has_ce) raw_total += exp(x[i] - q.maximum);
      }
    });
    q.sum = sum(total);
    q.inverse_sum = 1 / q.sum;
    raw_total = has_ce ? sum(raw_total) : Real(1);
    if (!kOneLoop) {
      if (lane == 0) visited[s] = q;
      if constexpr (kGroup == kWarpSize) __syncwarp();
      if constexpr (kGroup > kWarpSize) __syncthreads();
      if (s > 0) teacher = soften_knowledge(s);
    }

    Real dot = 0;
    const Real log_ratio = log(q.sum) - log(teacher.sum);
    if (s > 0) {
      Real divergence = 0;
      for_classes([&](int c) {
        load(s, c, x);
        load_teacher(s, c, k);
        for (int i = 0; i < kVector; ++i) {
          Real summand;
          const Real change = compare(x[i], k[i], q, teacher, log_ratio, summand);
          divergence += summand;
          if (o.normalized) dot += change * ((x[i] - q.maximum) * q.slope + q.top);
        }
      });
      divergence = sum(divergence);
      if (o.normalized) dot = sum(dot) * per_class;
      if (lane == 0 && kd_counted)
        sums[s] += static_cast<double>(divergence * temperature * temperature);
    }
    Real target_total = 1;
    if (has_ce) {
      const Real value =
          cross_entropy(s, q.maximum, maximum_minus_mean, log(raw_total), target_total);
      if (lane == 0 && ce_counted) sums[s == 0 ? 0 : o.streams] += static_cast<double>(value);
    }
    if (gradient != nullptr)
      differentiate(s, q, teacher, log_ratio, dot, ce_weight, target_total / raw_total);
    teacher = q;
  }

  __device__ Softmax<Real> soften_knowledge(int s) const {
    Softmax<Real> teacher{};
    teacher.scale = 1 / o.temperature;
    Real k[kVector], maximum = -Real(INFINITY), total = 0;
    for_classes([&](int c) {
      load_teacher(s, c, k);
      for (int i = 0; i < kVector; ++i) maximum = k[i] > maximum ? k[i] : maximum;
    });
    teacher.maximum = max(maximum);
    for_classes([&](int c) {
      load_teacher(s, c, k);
      for (int i = 0; i < kVector; ++i) total += exp((k[i] - teacher.maximum) * teacher.scale);
    });
    teacher.sum = sum(total);
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

  __device__ Real cross_entropy(int s, Real maximum, Real maximum_minus_mean, Real log_sum,
                                Real& target_total) const {
    if (p.probabilities) {
      Real value = 0, total = 0, x[kVector];
      for_classes([&](int c) {
        load(s, c, x);
        for (int i = 0; i < kVector; ++i) {
          const Real t = probability(c + i);
          value += t * ((maximum - x[i]) + log_sum);
          total += t;
        }
      });
      target_total = sum(total);
      return sum(value);
    }
    if (!ce_counted) return 0;
    const Real chosen =
        to_compute(logits[s * p.logits_stream_stride + label * p.logits_class_stride]);
    const Real nll = (maximum - chosen) + log_sum;
    if (o.smoothing == 0) return nll;
    return nll * (1 - o.smoothing) + (maximum_minus_mean + log_sum) * o.smoothing;
  }

  __device__ void differentiate(int s, const Softmax<Real>& q, const Softmax<Real>& teacher,
                                Real log_ratio, Real dot, Real ce_weight,
                                Real softmax_factor) const {
    const bool distilled = s > 0 && o.kd_weight != 0, has_ce = ce_weight != 0;
    const Real ce = ce_counted ? ce_weight * o.gradient_scale / ce_rows : Real(0);
    const Real kd = kd_counted ? o.kd_weight * o.temperature * o.gradient_scale / kd_rows : Real(0);
    const Real one_hot = ce * (1 - o.smoothing);
    const Real uniform = ce * o.uniform;
    T* to = gradient + s * p.gradient_stream_stride;
    for_classes([&](int c) {
      Real x[kVector], k[kVector], g[kVector];
      load(s, c, x);
      if (distilled) load_teacher(s, c, k);
      for (int i = 0; i < kVector; ++i) {
        g[i] = 0;
        if (distilled) {
          Real summand;
          g[i] = compare(x[i], k[i], q, teacher, log_ratio, summand);
          // d/dx = slope * (g - n(x) * mean_c(g n(x))) for g = q - p, whose sum is zero.
          if (o.normalized) g[i] -= ((x[i] - q.maximum) * q.slope + q.top) * dot;
          g[i] *= kd * q.slope;
        }
        if (has_ce) {
          g[i] += exp(x[i] - q.maximum) * (ce * softmax_factor);
          if (p.probabilities)
            g[i] -= ce * probability(c + i);
          else
            g[i] -= uniform + (c + i == label ? one_hot : Real(0));
        }
      }
      if constexpr (kVector == 1)
        to[c * p.gradient_class_stride] = from_compute<T>(g[0]);
      else
        store_vector<T, kVector>(to + c, g);
    });
  }
};

}  // namespace
}  // namespace gkt
