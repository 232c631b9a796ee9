// Walks over the vectors of a tile's rows in group_knowledge_loss, and the sums that they make.
//
// Two arrangements. A vector holds W classes of one row, and reductions over classes end across its
// lanes; or, for few classes and for dense prediction, it holds one class of W rows, and nothing
// crosses lanes. "Vector i" below is the i-th group of classes, or the i-th class.
#pragma once

#include <cstdint>

#include "cpu/vector.h"

namespace gkt {

namespace GKT_ISA {
namespace {

// Whether a vector has unused lanes, as a type.
template <bool kValue>
struct Last {
  static constexpr bool value = kValue;
};

template <class V>
struct TwoSums {
  V first, second;

  TwoSums& operator+=(const TwoSums& other) {
    first += other.first;
    second += other.second;
    return *this;
  }
};

template <class T, bool kRowsInLanes>
class TileSums {
 public:
  using Real = typename ArithmeticOf<T>::type;
  using V = Vec<Real>;
  static constexpr int W = kLanes<Real>;
  static constexpr int kRows = kRowsInLanes ? W : 1;

  static int64_t vectors(int64_t classes) { return kRowsInLanes ? classes : (classes + W - 1) / W; }

 protected:
  using I = Ints<V>;

  explicit TileSums(int64_t classes)
      : n_(vectors(classes)), tail_(kRowsInLanes ? W : static_cast<int>(classes - (n_ - 1) * W)) {}

  // Calls body(i, last) for every vector; `last` tells of unused lanes.
  template <class Body>
  void for_vectors(const Body& body) const {
    const int64_t whole = tail_ == W ? n_ : n_ - 1;
    for (int64_t i = 0; i < whole; ++i) body(i, Last<false>{});
    if (whole < n_) body(whole, Last<true>{});
  }

  // Adds to total what body(i, last, sums) adds to its sums for every vector. By blocks: rounding
  // errors grow with the length of a block and the number of blocks, not with that of the row.
  template <class Sums, class Body>
  Sums sum_vectors(Sums total, const Body& body) const {
    constexpr int64_t kBlock = 256;
    const int64_t whole = tail_ == W ? n_ : n_ - 1;
    for (int64_t begin = 0; begin < whole; begin += kBlock) {
      const int64_t end = begin + kBlock < whole ? begin + kBlock : whole;
      Sums block{};
      for (int64_t i = begin; i < end; ++i) body(i, Last<false>{}, block);
      total += block;
    }
    if (whole < n_) body(whole, Last<true>{}, total);
    return total;
  }

  // Zero in the unused lanes of the last vector.
  template <bool kLast>
  V used(V v, Last<kLast>) const {
    return kLast && !kRowsInLanes ? (lane_indices<V>() < tail_ ? v : V{}) : v;
  }

  // Reduces over classes; the result is in every lane that needs it.
  static V sum_classes(V v) { return kRowsInLanes ? v : add_lanes(v); }
  static V max_classes(V v) { return kRowsInLanes ? v : maximum_lanes(v); }
  static V first_class(const V* x) { return kRowsInLanes ? x[0] : broadcast<V>(x[0][0]); }

  // Adds the rows for which `counted` holds. Lanes are read from memory: an index that is not a
  // constant would send the whole vector there and back for each of them.
  static void add_rows(double* sum, V value, I counted) {
    Real values[W];
    store(values, counted ? value : V{});
    double total = 0;
    for (int j = 0; j < kRows; ++j) total += static_cast<double>(values[j]);
    *sum += total;
  }

  const int64_t n_;  // vectors per row
  const int tail_;   // lanes in use of the last vector
};

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
