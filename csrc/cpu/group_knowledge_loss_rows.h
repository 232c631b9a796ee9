// How the rows of a tile of group_knowledge_loss lie in memory, in both arrangements of
// group_knowledge_loss_sums.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/group_knowledge_loss_sums.h"
#include "gkt_abi.h"

namespace gkt {

// The rows are cut into chunks whose number depends on the problem alone, and every chunk adds up
// its own sums: the result is the same for any number of threads.
struct GroupKnowledgeLossPlan {
  int64_t chunks;
  double* sums;          // (chunks, streams + 1): CE, the kd_s, then the subnets' cross entropies
  char* scratch;         // (threads, scratch_bytes), aligned to 64 bytes
  size_t scratch_bytes;  // per thread
  double ce_rows, kd_rows, subnet_ce_rows;  // how many rows the means count
  int threads;
  int64_t gradient_bytes;
};

namespace GKT_ISA {
namespace {

using Params = gkt_group_knowledge_loss_params;

template <class T, bool kRowsInLanes>
class TileRows : public TileSums<T, kRowsInLanes> {
  using Base = TileSums<T, kRowsInLanes>;

 public:
  using Base::kRows, Base::W;
  using typename Base::Real, typename Base::V;

 protected:
  using Base::for_vectors, Base::n_, Base::tail_;

  // A float gradient beyond the caches is written past them; other dtypes gain nothing by it. By
  // whole cache lines, or by vectors that fill one after the other: half a line that waits for its
  // other half while all other classes are written takes several times as long.
  static constexpr int64_t kStreamingBytes = int64_t{8} << 20;
  static constexpr bool kFillsLines = !kRowsInLanes || kVectorBytes == 64;

  TileRows(const Params& p, const GroupKnowledgeLossPlan& plan)
      : Base(p.classes),
        p_(p),
        large_(std::is_same_v<T, float> && kFillsLines && plan.gradient_bytes >= kStreamingBytes) {}

  // The rows that come next lie in `streams`: `count` of them.
  void begin_rows(const gkt_stream_logits& streams, int count) {
    streams_ = &streams;
    count_ = count;
    const int inner = p_.row_dims - 1;
    logits_step_ = streams.row_strides[inner];
    gradient_step_ = streams.gradient_row_strides[inner];
    class_step_ = streams.gradient_class_stride;
    result_step_ = kRowsInLanes && gradient_step_ == 1 ? class_step_ : W;
    aligned_ = kRowsInLanes ? gradient_step_ == 1 && class_step_ % W == 0 : class_step_ == 1;
  }

  // Where a stream's rows are read and, unless null, where their gradient goes; `ahead`: the logits
  // that are read next, and the streams that they are of.
  void begin_stream(T* to, const T* ahead, const gkt_stream_logits& ahead_of) {
    streaming_ = large_ && aligned_ && count_ == kRows &&
                 reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
    ahead_ = ahead;
    ahead_step_ =
        kRowsInLanes && ahead_of.row_strides[p_.row_dims - 1] == 1 ? ahead_of.class_stride : W;
    result_ = streaming_ ? nullptr : to;
  }

  // Reads the tile's rows into x, converted; unused lanes of the last vector get `padding`.
  template <class From>
  void load_rows(const From* from, int64_t row_step, int64_t class_step, Real padding, V* x) const {
    Real* to = reinterpret_cast<Real*>(x);
    if (kRowsInLanes && row_step == 1) {
      if (count_ == W)
        for (int64_t i = 0; i < n_; ++i) x[i] = load<V>(from + i * class_step);
      else
        for (int64_t i = 0; i < n_; ++i) x[i] = load<V>(from + i * class_step, count_);
    } else if (kRowsInLanes) {
      int64_t begin = 0;
      if constexpr (std::is_same_v<From, float>) {
        if (class_step == 1 && count_ == W)
          for (; begin + 4 <= n_; begin += 4)
            for (int j = 0; j < W; j += 4)
              transpose_4x4(from + j * row_step + begin, row_step, to + begin * W + j, W);
      }
      for (int j = 0; j < W; ++j)
        for (int64_t i = begin; i < n_; ++i)
          to[i * W + j] = j < count_ ? to_arithmetic(from[j * row_step + i * class_step]) : Real{0};
    } else if (class_step == 1) {
      for_vectors([&](int64_t i, auto last) {
        x[i] = load<V>(from + i * W, last.value ? tail_ : W);
        if (last.value) x[i] = lane_indices<V>() < tail_ ? x[i] : broadcast<V>(padding);
      });
    } else {
      for (int64_t c = 0; c < p_.classes; ++c) to[c] = to_arithmetic(from[c * class_step]);
      for (int64_t c = p_.classes; c < n_ * W; ++c) to[c] = padding;
    }
  }

  // The gradient's vector i: to memory where rows or classes are adjacent there, else to scratch.
  template <bool kLast>
  void put(T* to, int64_t i, V g, Last<kLast>) const {
    const int64_t class_step = class_step_;
    if (kRowsInLanes && gradient_step_ == 1) {
      if (streaming_)
        store_streaming(to + i * class_step, g);
      else if (count_ == W)
        store(to + i * class_step, g);
      else
        store(to + i * class_step, g, count_);
    } else if (!kRowsInLanes && class_step == 1) {
      if (kLast)
        store(to + i * W, g, tail_);
      else if (streaming_)
        store_streaming(to + i * W, g);
      else
        store(to + i * W, g);
    } else {
      output_[i] = g;
    }
  }

  void store_scattered(T* to) const {
    const Real* from = reinterpret_cast<const Real*>(output_);
    const int64_t class_step = class_step_;
    if (kRowsInLanes && gradient_step_ != 1) {
      int64_t begin = 0;
      if constexpr (std::is_same_v<T, float>) {
        if (class_step == 1 && count_ == W)
          for (; begin + 4 <= n_; begin += 4)
            for (int j = 0; j < W; j += 4)
              transpose_4x4(from + begin * W + j, W, to + j * gradient_step_ + begin,
                            gradient_step_);
      }
      for (int j = 0; j < count_; ++j)
        for (int64_t i = begin; i < n_; ++i)
          from_arithmetic(from[i * W + j], to + j * gradient_step_ + i * class_step);
    } else if (!kRowsInLanes && class_step != 1) {
      for (int64_t c = 0; c < p_.classes; ++c) from_arithmetic(from[c], to + c * class_step);
    }
  }

  const Params& p_;
  V* output_ = nullptr;  // (n_), where memory takes no vectors

  // Memory to have at hand: the logits of the next stream, and where the gradient goes.
  const T *ahead_ = nullptr, *result_ = nullptr;
  int64_t ahead_step_ = 0, result_step_ = 0;
  const gkt_stream_logits* streams_ = nullptr;
  int64_t logits_step_ = 0, gradient_step_ = 0, class_step_ = 0;
  int count_ = 0;  // rows in the tile

 private:
  const bool large_;
  bool aligned_ = false, streaming_ = false;
};

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
