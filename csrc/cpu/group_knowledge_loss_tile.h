// A tile of rows of group_knowledge_loss on the CPU: one walk over its streams, with everything
// between the logits and their gradient in scratch memory that stays in cache. The same code runs
// in both arrangements of group_knowledge_loss_sums.h.
#pragma once

#include <cstddef>
#include <type_traits>

#include "cpu/group_knowledge_loss_rows.h"

namespace gkt {

namespace GKT_ISA {
namespace {

enum class CrossEntropy { none, indices, probabilities };

// softmax(n(x) / T) for each row of the tile: exp((x - max) * scale) * inverse_sum.
template <class V>
struct Softmax {
  V* x;  // logits, or a moving average of normalised ones
  V* e;  // exp((x - max) * scale)
  V max, scale, inverse_sum, log_sum;
  V slope, top;  // n(x) = (x - max) * slope + top, where logits are normalised
};

template <class T, bool kRowsInLanes>
class Tile : public TileRows<T, kRowsInLanes> {
  using Base = TileRows<T, kRowsInLanes>;

 public:
  using Base::kRows, Base::vectors, Base::W;
  using typename Base::Real, typename Base::V;

  // Scratch: two rows of classes per softmax kept (one per teaching group, and the student's), the
  // raw exponentials of a cross entropy, the probability targets, q - p, and the gradient.
  static size_t scratch_bytes(const Params& p) {
    const int64_t row_bytes = vectors(p.classes) * kVectorBytes;
    return static_cast<size_t>((2 * (kept(p) + 1) + 4) * row_bytes) +
           static_cast<size_t>(kept(p)) * sizeof(Softmax<V>);
  }

  Tile(const Params& p, const GroupKnowledgeLossPlan& plan, int thread)
      : Base(p, plan),
        temperature_(static_cast<Real>(p.temperature)),
        ce_scale_(static_cast<Real>(p.gradient_scale / plan.ce_rows)),
        kd_scale_(static_cast<Real>(p.gradient_scale / plan.kd_rows)),
        subnet_ce_scale_(static_cast<Real>(p.gradient_scale / plan.subnet_ce_rows)) {
    next_ = reinterpret_cast<V*>(plan.scratch + plan.scratch_bytes * static_cast<size_t>(thread));
    knowledge_ = reinterpret_cast<Softmax<V>*>(next_);
    next_ += kept(p) * static_cast<int64_t>(sizeof(Softmax<V>) / sizeof(V));
    for (int64_t g = 0; g < kept(p); ++g) take_softmax(knowledge_[g]);
    take_softmax(student_);
    raw_ = take();
    targets_ = take();
    difference_ = take();
    output_ = take();
  }

  // Rows of the tile in one tensor: offset of the first, there and in its gradient, and how many.
  struct Rows {
    int64_t logits, gradient;
    int count;
  };

  // Adds the terms of the rows to sums (streams + 1) and writes their gradient. Subnets have the
  // first of the full network's.
  void run(const Rows& full, const Rows& subnets, int64_t targets_row, double* sums) {
    full_rows_ = full;
    subnet_rows_ = subnets;
    begin_rows(p_.full, full.count);
    load_targets(targets_row, p_.targets_row_strides[p_.row_dims - 1]);
    stream(0, sums);
    if (subnets.count == 0) return;
    begin_rows(p_.subnets, subnets.count);
    if (kRowsInLanes) {
      const I in_share = lane_indices<V>() < subnets.count;
      ce_counted_ &= in_share;
      kd_counted_ &= in_share;
    }
    for (int64_t s = 1; s < p_.streams; ++s) stream(s, sums);
  }

 private:
  using typename Base::I;
  using Index = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  using Base::add_rows, Base::first_class, Base::max_classes, Base::sum_classes;
  using Base::ahead_, Base::ahead_step_, Base::begin_rows, Base::begin_stream, Base::count_;
  using Base::for_vectors, Base::sum_vectors, Base::load_rows, Base::logits_step_, Base::n_,
      Base::output_, Base::p_;
  using Base::result_, Base::result_step_, Base::store_scattered, Base::streams_;

  static int64_t kept(const Params& p) { return p.streams - 1 > p.groups ? p.groups : 1; }

  V* take() {
    V* row = next_;
    next_ += n_;
    return row;
  }

  void take_softmax(Softmax<V>& softmax) {
    softmax.x = take();
    softmax.e = take();
  }

  void load_targets(int64_t row, int64_t step) {
    const I rows = kRowsInLanes ? lane_indices<V>() < count_ : I{} == 0;
    if (p_.probabilities) {
      const Real* from = static_cast<const Real*>(p_.targets) + row;
      load_rows(from, step, p_.targets_class_stride, Real{0}, targets_);
      const Real uniform = static_cast<Real>(p_.label_smoothing / static_cast<double>(p_.classes));
      const Real keep = static_cast<Real>(1 - p_.label_smoothing);
      target_total_ = sum_classes(sum_vectors(V{}, [&](int64_t i, auto last, V& total) {
        targets_[i] = targets_[i] * keep + uniform;
        total += this->used(targets_[i], last);
      }));
      ce_counted_ = rows;
      kd_counted_ = rows;
      return;
    }
    const int64_t* from = static_cast<const int64_t*>(p_.targets) + row;
    Index labels[W];
    for (int j = 0; j < W; ++j) {
      const int64_t target = kRowsInLanes ? (j < count_ ? from[j * step] : 0) : from[0];
      labels[j] = static_cast<Index>(target == p_.ignore_index ? -1 : target);
      labels_[j] = labels[j] < 0 ? 0 : labels[j];
    }
    std::memcpy(&label_, labels, sizeof(label_));
    ce_counted_ = rows & (label_ >= 0);
    kd_counted_ = p_.distill_ignored ? rows : ce_counted_;
  }

  void stream(int64_t s, double* sums) {
    const int64_t group = s == 0 ? 0 : (s - 1) % p_.groups + 1;
    const bool first_loop = s <= p_.groups;
    const Real infinity = static_cast<Real>(__builtin_inf());
    Softmax<V>& q = student_;
    load_rows(logits(s), logits_step_, streams_->class_stride, -infinity, q.x);
    measure(q);
    const double ce_weight = s == 0 ? p_.ce_weight : p_.subnet_ce_weight;
    const bool has_ce = s == 0 || ce_weight != 0;
    Coefficients k{};
    T* const to = gradient(s);
    if (s + 1 < p_.streams && subnet_rows_.count > 0)
      begin_stream(to, logits(s + 1), p_.subnets);
    else
      begin_stream(to, logits(0) + kRows * p_.full.row_strides[p_.row_dims - 1], p_.full);
    soften(q);
    if (s > 0) add_rows(sums + s, compare(q, knowledge_[slot(group - 1)], k), kd_counted_);
    if (has_ce) {
      const V ce = cross_entropy(
          q, static_cast<Real>(ce_weight) * (s == 0 ? ce_scale_ : subnet_ce_scale_), k);
      add_rows(sums + (s == 0 ? 0 : p_.streams), ce, ce_counted_);
    }
    if (to != nullptr) {
      const bool has_kd = s > 0 && p_.kd_weight != 0;
      if (ce_weight == 0)
        differentiate<CrossEntropy::none>(q, has_kd, k, to);
      else if (p_.probabilities)
        differentiate<CrossEntropy::probabilities>(q, has_kd, k, to);
      else
        differentiate<CrossEntropy::indices>(q, has_kd, k, to);
      store_scattered(to);
    }
    // The last group teaches nobody.
    if (group == p_.groups && s > 0) return;
    if (first_loop || p_.ema == 0) {
      Softmax<V>& kept = knowledge_[slot(group)];
      const Softmax<V> spare = kept;
      kept = q;
      q = spare;
    } else if (p_.ema != 1) {
      average(knowledge_[slot(group)], q, s - p_.groups <= p_.groups);
    }
  }

  const T* logits(int64_t s) const {
    const gkt_stream_logits& from = s == 0 ? p_.full : p_.subnets;
    return static_cast<const T*>(from.logits) + (s == 0 ? 0 : (s - 1) * from.stream_stride) +
           (s == 0 ? full_rows_ : subnet_rows_).logits;
  }

  T* gradient(int64_t s) const {
    T* const to = static_cast<T*>(streams_->gradient);
    if (to == nullptr || s == 0) return to == nullptr ? nullptr : to + full_rows_.gradient;
    return to + (s - 1) * streams_->gradient_stream_stride + subnet_rows_.gradient;
  }

  // With one loop a group's knowledge replaces that of the group before it.
  int64_t slot(int64_t group) const { return kept(p_) == 1 ? 0 : group; }

  // What the gradient needs besides the rows in scratch.
  struct Coefficients {
    V difference;                 // of q - p
    V centre_slope, centre_top;   // of the projection that normalisation adds
    V softmax, one_hot, uniform;  // of the cross entropy
  };

  // Maximum, and with normalised logits mean and variance, of each row.
  void measure(Softmax<V>& q) {
    const bool needs_mean = p_.normalize_logits || p_.label_smoothing != 0;
    const V shift = first_class(q.x);
    V max = shift, sum{};
    if (needs_mean) {
      sum = sum_vectors(V{}, [&](int64_t i, auto last, V& part) {
        max = maximum(q.x[i], max);
        part += this->used(q.x[i] - shift, last);
      });
    } else {
      for_vectors([&](int64_t i, auto) { max = maximum(q.x[i], max); });
    }
    q.max = max_classes(max);
    const Real per_class = static_cast<Real>(1.0 / static_cast<double>(p_.classes));
    const V mean = sum_classes(sum) * per_class;  // of x - shift, which keeps all-equal rows exact
    max_minus_mean_ = (q.max - shift) - mean;
    if (!p_.normalize_logits) {
      q.scale = broadcast<V>(1 / temperature_);
      return;
    }
    const V squares = sum_vectors(V{}, [&](int64_t i, auto last, V& part) {
      const V centered = this->used(q.x[i] - shift - mean, last);
      part += centered * centered;
    });
    const V variance = sum_classes(squares) * per_class;
    // A variance that overflows must not pass for an infinite one, which would leave no logits.
    const V slope = 1 / square_root<Real>(variance + static_cast<Real>(p_.eps));
    q.slope = slope > 0 ? slope : broadcast<V>(static_cast<Real>(__builtin_nan("")));
    q.top = max_minus_mean_ * q.slope;
    q.scale = q.slope / temperature_;
  }

  void soften(Softmax<V>& softmax) const {
    const V *x = softmax.x, max = softmax.max, scale = softmax.scale;
    const T *ahead = ahead_, *result = result_;
    const int64_t ahead_step = ahead_step_, result_step = result_step_;
    V* e = softmax.e;
    const V sum = sum_classes(sum_vectors(V{}, [&](int64_t i, auto, V& part) {
      __builtin_prefetch(ahead + i * ahead_step, 0, 2);
      if (result != nullptr) __builtin_prefetch(result + i * result_step, 1, 2);
      e[i] = exponential((x[i] - max) * scale);
      part += e[i];
    }));
    softmax.inverse_sum = 1 / sum;
    softmax.log_sum = logarithm<Real>(sum);
  }

  // T^2 * KL(p || q) of each row, and q - p into scratch.
  V compare(const Softmax<V>& q, const Softmax<V>& teacher, Coefficients& k) const {
    return p_.normalize_logits ? compare<true>(q, teacher, k) : compare<false>(q, teacher, k);
  }

  // With d = log q - log p the divergence is sum_c p (exp(d) - 1 - d), since sum_c (q - p) = 0: all
  // summands are positive, errors of log q and log p cancel to first order, and for a small d both
  // summand and q - p come from d itself, without the cancellation of nearly equal numbers.
  template <bool kNormalized>
  V compare(const Softmax<V>& q, const Softmax<V>& teacher, Coefficients& k) const {
    constexpr Real kNear = sizeof(Real) == 4 ? Real(0.5) : Real(1e-3);
    const V *x = q.x, *e = q.e, *teacher_x = teacher.x, *teacher_e = teacher.e;
    const V max = q.max, scale = q.scale, inverse_sum = q.inverse_sum, top = q.top;
    const V teacher_max = teacher.max, teacher_scale = teacher.scale;
    const V teacher_inverse_sum = teacher.inverse_sum, log_ratio = q.log_sum - teacher.log_sum;
    const Real temperature = temperature_;
    V* difference = difference_;
    const auto sums = sum_vectors(TwoSums<V>{}, [&](int64_t i, auto last, TwoSums<V>& part) {
      const V student_d = (x[i] - max) * scale;
      const V d = student_d - (teacher_x[i] - teacher_max) * teacher_scale - log_ratio;
      const V student = e[i] * inverse_sum, p = teacher_e[i] * teacher_inverse_sum;
      V series = d * Real(1.0 / 5040) + Real(1.0 / 720);
      series = series * d + Real(1.0 / 120);
      series = series * d + Real(1.0 / 24);
      series = series * d + Real(1.0 / 6);
      series = series * d + Real(0.5);
      series = p * (series * (d * d));  // p (exp(d) - 1 - d)
      const I near = (d < kNear) & (d > -kNear);
      const V apart = student - p;
      const V change = near ? series + p * d : apart;
      part.first += near ? series : apart - (p == 0 ? V{} : p * d);  // 0 log 0 = 0, also for -inf
      difference[i] = change;
      if (kNormalized) part.second += this->used(change * (student_d * temperature + top), last);
    });
    const Real weight = static_cast<Real>(p_.kd_weight) * temperature_ * kd_scale_;
    k.difference = kd_counted_ ? broadcast<V>(weight) : V{};
    if (kNormalized) {
      // d/dx = slope * (g - n(x) * mean_c(g n(x))) for g = weight * (q - p), whose sum is zero.
      const V mean =
          sum_classes(sums.second) * static_cast<Real>(1.0 / static_cast<double>(p_.classes));
      k.difference *= q.slope;
      k.centre_slope = k.difference * mean * q.slope;
      k.centre_top = k.difference * mean * q.top;
    }
    return sum_classes(sums.first) * (temperature_ * temperature_);
  }

  // The cross entropy of each row, whose gradient counts `weight`.
  V cross_entropy(const Softmax<V>& q, Real weight, Coefficients& k) {
    const bool shared = !p_.normalize_logits && p_.temperature == 1;
    V sum{};
    if (!shared)
      sum = sum_vectors(V{}, [&](int64_t i, auto, V& part) {
        raw_[i] = exponential(q.x[i] - q.max);
        part += raw_[i];
      });
    cross_entropy_e_ = shared ? q.e : raw_;
    sum = sum_classes(sum);
    const V log_sum = shared ? q.log_sum : logarithm<Real>(sum);
    const V row_weight = ce_counted_ ? broadcast<V>(weight) : V{};
    const V softmax = row_weight * (shared ? q.inverse_sum : 1 / sum);
    const Real smoothing = static_cast<Real>(p_.label_smoothing);
    k.one_hot = row_weight;
    k.softmax = softmax;
    if (p_.probabilities) {
      k.softmax *= target_total_;
      return sum_classes(sum_vectors(V{}, [&](int64_t i, auto last, V& part) {
        part += this->used(targets_[i] * ((q.max - q.x[i]) + log_sum), last);
      }));
    }
    k.one_hot *= 1 - smoothing;
    k.uniform = row_weight * (smoothing / static_cast<Real>(p_.classes));
    const Real* x = reinterpret_cast<const Real*>(q.x);
    Real chosen[W];
    for (int j = 0; j < W; ++j)
      chosen[j] = kRowsInLanes ? x[int64_t{labels_[j]} * W + j] : x[labels_[j]];
    const V nll = (q.max - load<V>(chosen)) + log_sum;
    if (p_.label_smoothing == 0) return nll;
    return nll * (1 - smoothing) + (max_minus_mean_ + log_sum) * smoothing;
  }

  template <CrossEntropy kCe>
  void differentiate(const Softmax<V>& q, bool has_kd, const Coefficients& k, T* to) const {
    if (has_kd && p_.normalize_logits)
      differentiate<kCe, true, true>(q, k, to);
    else if (has_kd)
      differentiate<kCe, true, false>(q, k, to);
    else
      differentiate<kCe, false, false>(q, k, to);
  }

  template <CrossEntropy kCe, bool kDistilled, bool kNormalized>
  void differentiate(const Softmax<V>& q, const Coefficients& coefficients, T* to) const {
    const Coefficients k = coefficients;
    const V max = q.max;
    const V *x = q.x, *difference = difference_, *raw = cross_entropy_e_;
    const I label = label_;
    for_vectors([&](int64_t i, auto last) {
      V g{};
      if (kDistilled) g = difference[i] * k.difference;
      if (kNormalized) g -= (x[i] - max) * k.centre_slope + k.centre_top;
      if (kCe != CrossEntropy::none) g += raw[i] * k.softmax;
      if (kCe == CrossEntropy::probabilities) g -= targets_[i] * k.one_hot;
      if (kCe == CrossEntropy::indices) {
        const I index =
            kRowsInLanes ? I{} + static_cast<int>(i) : lane_indices<V>() + static_cast<int>(i * W);
        g -= k.uniform + (index == label ? k.one_hot : V{});
      }
      this->put(to, i, g, last);
    });
  }

  // K <- ema * K + (1 - ema) * n(z), and its softmax. `pure`: K is still a stream's logits.
  void average(Softmax<V>& knowledge, const Softmax<V>& q, bool pure) {
    const Real ema = static_cast<Real>(p_.ema), rest = static_cast<Real>(1 - p_.ema);
    const bool old_is_raw = p_.normalize_logits && pure, new_is_raw = p_.normalize_logits;
    V max = broadcast<V>(-static_cast<Real>(__builtin_inf()));
    for_vectors([&](int64_t i, auto) {
      V old = knowledge.x[i], latest = q.x[i];
      if (old_is_raw) old = (old - knowledge.max) * knowledge.slope + knowledge.top;
      if (new_is_raw) latest = (latest - q.max) * q.slope + q.top;
      knowledge.x[i] = old * ema + latest * rest;
      max = maximum(knowledge.x[i], max);
    });
    knowledge.max = max_classes(max);
    knowledge.scale = broadcast<V>(1 / temperature_);
    soften(knowledge);
  }

  const Real temperature_, ce_scale_, kd_scale_, subnet_ce_scale_;
  V* next_ = nullptr;
  Softmax<V>* knowledge_;
  Softmax<V> student_;
  V *raw_, *targets_, *difference_;
  const V* cross_entropy_e_ = nullptr;

  Rows full_rows_{}, subnet_rows_{};
  Index labels_[W]{};  // class indices, 0 for a row without one
  I label_{}, ce_counted_{}, kd_counted_{};
  V target_total_{}, max_minus_mean_{};
};

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
