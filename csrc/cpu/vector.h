// Vectors of the instruction set being compiled (GKT_ISA): types, loads and stores of every dtype,
// exp and log. Everything is local to the file that includes it (see cpu/isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/half.h"

namespace gkt {
namespace GKT_ISA {
namespace {

#if defined(GKT_ISA_avx512)
constexpr int kVectorBytes = 64;
#elif defined(GKT_ISA_avx2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};

template <class Real>
using Vec = typename VectorOf<Real>::Type;
template <class Real>
using IntVec = typename VectorOf<Real>::Int;
template <class Real>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Real));

template <class Real>
inline Vec<Real> broadcast(Real value) {
  return value - Vec<Real>{};
}

template <class Real>
inline IntVec<Real> lane_indices() {
  IntVec<Real> lanes;
  for (int j = 0; j < kLanes<Real>; ++j) lanes[j] = j;
  return lanes;
}

template <class V>
inline V maximum(V a, V b) {
  return a > b ? a : b;
}

// The value of the lane whose index differs in the bit `distance`.
template <class Real>
inline Vec<Real> swap_lanes(Vec<Real> v, int distance) {
#if defined(__clang__)
  Vec<Real> swapped;
  for (int j = 0; j < kLanes<Real>; ++j) swapped[j] = v[j ^ distance];
  return swapped;
#else
  return __builtin_shuffle(v, lane_indices<Real>() ^ distance);
#endif
}

// Reductions leave the result in every lane.
template <class Real>
inline Vec<Real> add_lanes(Vec<Real> v) {
#pragma GCC unroll 8
  for (int distance = kLanes<Real> / 2; distance > 0; distance /= 2)
    v += swap_lanes<Real>(v, distance);
  return v;
}

template <class Real>
inline Vec<Real> maximum_lanes(Vec<Real> v) {
#pragma GCC unroll 8
  for (int distance = kLanes<Real> / 2; distance > 0; distance /= 2)
    v = maximum(v, swap_lanes<Real>(v, distance));
  return v;
}

inline Vec<float> load(const float* from) {
  Vec<float> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline Vec<double> load(const double* from) {
  Vec<double> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline void store(float* to, Vec<float> v) { std::memcpy(to, &v, sizeof(v)); }
inline void store(double* to, Vec<double> v) { std::memcpy(to, &v, sizeof(v)); }

template <class Half>
inline Vec<float> load(const Half* from) {
  Halves<Vec<float>> bits;
  std::memcpy(&bits, from, sizeof(bits));
  return widen<Vec<float>>(bits, Half{});
}
template <class Half>
inline void store(Half* to, Vec<float> v) {
  const Halves<Vec<float>> bits = narrow(v, Half{});
  std::memcpy(to, &bits, sizeof(bits));
}

// A store that leaves the cache alone, for results that are too many to stay there. The address
// must be a multiple of kVectorBytes; finish_streaming() orders it before what follows.
inline void store_streaming(float* to, Vec<float> v) {
#if defined(GKT_ISA_avx512)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(GKT_ISA_avx2)
  _mm256_stream_ps(to, (__m256)v);
#else
  store(to, v);
#endif
}
template <class T>
inline void store_streaming(T* to, Vec<typename ArithmeticOf<T>::type> v) {
  store(to, v);
}
inline void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Four values of four rows become four rows of four values.
inline void transpose_4x4(const float* from, int64_t from_step, float* to, int64_t to_step) {
  typedef float Four __attribute__((vector_size(16)));
  Four a, b, c, d;
  std::memcpy(&a, from, sizeof(a));
  std::memcpy(&b, from + from_step, sizeof(b));
  std::memcpy(&c, from + 2 * from_step, sizeof(c));
  std::memcpy(&d, from + 3 * from_step, sizeof(d));
  const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
  std::memcpy(to, &a, sizeof(a));
  std::memcpy(to + to_step, &b, sizeof(b));
  std::memcpy(to + 2 * to_step, &c, sizeof(c));
  std::memcpy(to + 3 * to_step, &d, sizeof(d));
}

// The first `count` lanes from memory, `fill` in the others.
template <class T>
inline Vec<typename ArithmeticOf<T>::type> load_partial(const T* from, int count,
                                                        typename ArithmeticOf<T>::type fill) {
  using Real = typename ArithmeticOf<T>::type;
  T values[kLanes<Real>] = {};
  std::memcpy(values, from, static_cast<size_t>(count) * sizeof(T));
  return lane_indices<Real>() < count ? load(values) : broadcast(fill);
}

template <class T>
inline void store_partial(T* to, Vec<typename ArithmeticOf<T>::type> v, int count) {
  T values[kLanes<typename ArithmeticOf<T>::type>];
  store(values, v);
  std::memcpy(to, values, static_cast<size_t>(count) * sizeof(T));
}

// exp(x) for x <= 0 to about one unit in the last place; 0 where the result is not a normal number.
inline Vec<float> exponential(Vec<float> x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Vec<float> shifted = x * 0x1.715476p+0f + kRound;
  const Vec<float> n = shifted - kRound;
  Vec<float> r = x - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  Vec<float> p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec<float> power = (Vec<float>)(((IntVec<float>)shifted << 23) + (127 << 23));
  return x < -87.0f ? Vec<float>{} : p * power;
}

inline Vec<double> exponential(Vec<double> x) {
  constexpr double kRound = 0x1.8p52;
  const Vec<double> shifted = x * 0x1.71547652b82fep+0 + kRound;
  const Vec<double> n = shifted - kRound;
  Vec<double> r = x - n * 0x1.62e42feep-1;
  r = r - n * 0x1.a39ef35793c76p-33;
  Vec<double> p = broadcast(1.0 / 6227020800.0);
  double inverse_factorial = 1.0 / 6227020800.0;  // 1 / 13!
#pragma GCC unroll 13
  for (int k = 13; k > 0; --k) {
    inverse_factorial *= k;
    p = p * r + inverse_factorial;
  }
  const Vec<double> power = (Vec<double>)(((IntVec<double>)shifted << 52) + (1023LL << 52));
  return x < -708.0 ? Vec<double>{} : p * power;
}

// log(x) for finite normal x > 0. With x = 2^n m, m in [sqrt(1/2), sqrt(2)) and s = (m-1)/(m+1):
// log m = 2 artanh s = 2 (s + s^3/3 + s^5/5 + ...).
template <class Real>
inline Vec<Real> logarithm(Vec<Real> x) {
  constexpr bool kDouble = sizeof(Real) == 8;
  constexpr int kMantissa = kDouble ? 52 : 23;
  constexpr int kTerms = kDouble ? 12 : 5;
  constexpr Real kSqrtHalf = static_cast<Real>(0x1.6a09e667f3bcdp-1);
  using I = IntVec<Real>;
  const Vec<Real> offset = broadcast(kSqrtHalf);
  const I n = ((I)x - (I)offset) >> kMantissa;
  const Vec<Real> m = (Vec<Real>)((I)x - (n << kMantissa));
  const Vec<Real> s = (m - 1) / (m + 1);
  const Vec<Real> square = s * s;
  Vec<Real> p = broadcast(static_cast<Real>(1.0 / (2 * kTerms - 1)));
#pragma GCC unroll 12
  for (int k = kTerms - 2; k >= 0; --k) p = p * square + static_cast<Real>(1.0 / (2 * k + 1));
  const Vec<Real> exponent = __builtin_convertvector(n, Vec<Real>);
  const Vec<Real> result = 2 * s * p + exponent * static_cast<Real>(0x1.62e42fefa39efp-1);
  return x == x ? result : x;
}

template <class Real>
inline Vec<Real> square_root(Vec<Real> x) {
  Vec<Real> root{};
#if defined(GKT_ISA_avx512)
  if constexpr (sizeof(Real) == 4)
    root = (Vec<Real>)_mm512_sqrt_ps((__m512)x);
  else
    root = (Vec<Real>)_mm512_sqrt_pd((__m512d)x);
#else
  for (int j = 0; j < kLanes<Real>; ++j) {
    if constexpr (sizeof(Real) == 4)
      root[j] = __builtin_sqrtf(x[j]);
    else
      root[j] = __builtin_sqrt(x[j]);
  }
#endif
  return root;
}

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
