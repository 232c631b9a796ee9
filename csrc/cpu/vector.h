// Vectors of the instruction set being compiled (GKT_ISA), as GCC and clang have them: arithmetic,
// comparisons and ?: are the language's own. Here are their types, loads and stores of every dtype,
// what crosses lanes, exp and log. Everything is local to the file that includes it (cpu/isa.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Real));

template <class Real, int lanes>
struct VectorOf {
  typedef Real Type __attribute__((vector_size(lanes * sizeof(Real))));
};

// As many values as a register holds, or a power of two of them: more take several registers.
template <class Real, int lanes = kLanes<Real>>
using Vec = typename VectorOf<Real, lanes>::Type;

template <class V>
using Element = std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>>;
// What a comparison gives: all bits of a lane, or none.
template <class V>
using Ints = decltype(V{} == V{});
template <class V>
constexpr int kLanesOf = static_cast<int>(sizeof(V) / sizeof(Element<V>));

template <class V>
GKT_INLINE V broadcast(Element<V> value) {
  return value - V{};
}

template <class V>
GKT_INLINE Ints<V> lane_indices() {
  Ints<V> lanes;
  for (int j = 0; j < kLanesOf<V>; ++j) lanes[j] = j;
  return lanes;
}

template <class V>
GKT_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

// The value of the lane whose index differs in the bit `distance`.
template <class V>
GKT_INLINE V swap_lanes(V v, int distance) {
#if defined(__clang__)
  V swapped;
  for (int j = 0; j < kLanesOf<V>; ++j) swapped[j] = v[j ^ distance];
  return swapped;
#else
  return __builtin_shuffle(v, lane_indices<V>() ^ distance);
#endif
}

template <class V, int first, int... lanes>
GKT_INLINE auto lanes_from(V v, std::integer_sequence<int, lanes...>) {
  return __builtin_shufflevector(v, v, first + lanes...);
}

// `count` lanes, a power of two.
template <int first, int count, class V>
GKT_INLINE auto lanes_from(V v) {
  return lanes_from<V, first>(v, std::make_integer_sequence<int, count>());
}

// Reductions leave the result in every lane.
template <class V>
GKT_INLINE V add_lanes(V v) {
#pragma GCC unroll 8
  for (int distance = kLanesOf<V> / 2; distance > 0; distance /= 2) v += swap_lanes(v, distance);
  return v;
}

template <class V>
GKT_INLINE V maximum_lanes(V v) {
#pragma GCC unroll 8
  for (int distance = kLanesOf<V> / 2; distance > 0; distance /= 2)
    v = maximum(v, swap_lanes(v, distance));
  return v;
}

// Bit masks, a bit per lane, lane 0 lowest.

// Which lanes pass a ReLU: not (v <= 0), so that NaN does.
template <class V>
GKT_INLINE uint32_t positive_bits(V v) {
#if defined(GKT_ISA_avx512)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NLE_UQ);
#elif defined(GKT_ISA_avx2)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return static_cast<uint32_t>(
        _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NLE_UQ)));
#endif
  const Ints<V> passed = ~(v <= V{});
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanesOf<V>; ++lane)
    bits |= static_cast<uint32_t>(passed[lane] & 1) << lane;
  return bits;
}

// 0 where the bit is not set.
template <class V>
GKT_INLINE V where(V v, uint32_t bits) {
#if defined(GKT_ISA_avx512)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return (V)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#endif
  if constexpr (sizeof(V) >
                kVectorBytes) {  // lane by lane is faster than what compilers make of it
    for (int lane = 0; lane < kLanesOf<V>; ++lane)
      if (!(bits >> lane & 1)) v[lane] = 0;
    return v;
  }
  const Ints<V> lane_bit = (Ints<V>{} + 1) << lane_indices<V>();
  const Ints<V> set = (Ints<V>{} + static_cast<int>(bits)) & lane_bit;
  return set == lane_bit ? v : V{};
}

template <class V>
GKT_INLINE V rectified(V v) {
#if defined(GKT_ISA_avx512)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return (V)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v);
#elif defined(GKT_ISA_avx2)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return (V)_mm256_max_ps(_mm256_setzero_ps(), (__m256)v);
#endif
  return v <= V{} ? V{} : v;
}

// Memory, in the dtype T that tensors are stored in.

template <class V, class T>
GKT_INLINE V load(const T* from) {
  if constexpr (std::is_same_v<T, Element<V>>) {
    V v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  } else {
    Halves<V> bits;
    std::memcpy(&bits, from, sizeof(bits));
    return widen<V>(bits, T{});
  }
}

// The vector as it is stored.
template <class T, class V>
GKT_INLINE auto stored(V v) {
  if constexpr (std::is_same_v<T, Element<V>>)
    return v;
  else
    return narrow(v, T{});
}

template <class T, class V>
GKT_INLINE void store(T* to, V v) {
  const auto values = stored<T>(v);
  std::memcpy(to, &values, sizeof(values));
}

// The first `count` lanes; beyond them memory is not touched and lanes are 0. A constant count
// folds the branch away. A copy lane by lane would have the load wait until all of it is in memory.
template <class V, class T>
GKT_INLINE V load(const T* from, int count) {
  if (count >= kLanesOf<V>) return load<V>(from);
#if defined(GKT_ISA_avx512)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(V) == kVectorBytes && sizeof(T) == 4)
    return (V)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from);
  if constexpr (sizeof(V) == kVectorBytes && sizeof(T) == 8)
    return (V)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), from);
  if constexpr (sizeof(V) == kVectorBytes && sizeof(T) == 2)
    return widen<V>(
        bit_cast<Halves<V>>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), from)), T{});
#elif defined(GKT_ISA_avx2)
  if constexpr (sizeof(V) == kVectorBytes && sizeof(T) == 4)
    return (V)_mm256_maskload_ps(from, (__m256i)(lane_indices<V>() < count));
  if constexpr (sizeof(V) == kVectorBytes && sizeof(T) == 8)
    return (V)_mm256_maskload_pd(from, (__m256i)(lane_indices<V>() < count));
#endif
  T values[kLanesOf<V>] = {};
  for (int lane = 0; lane < count; ++lane) values[lane] = from[lane];
  return load<V>(values);
}

template <class T, class V>
GKT_INLINE void store(T* to, V v, int count) {
  if (count >= kLanesOf<V>) return store(to, v);
#if defined(GKT_ISA_avx512)  // AVX2 has such stores too, but some processors take very long for
                             // them
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(V) == kVectorBytes && sizeof(T) == 4)
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes), (__m512)v);
  if constexpr (sizeof(V) == kVectorBytes && sizeof(T) == 8)
    return _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lanes), (__m512d)v);
  if constexpr (sizeof(V) == kVectorBytes && sizeof(T) == 2)
    return _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(lanes),
                                    bit_cast<__m256i>(stored<T>(v)));
#endif
  T values[kLanesOf<V>];
  store(values, v);
  for (int lane = 0; lane < count; ++lane) to[lane] = values[lane];
}

// A store that leaves the cache alone, for results that are too many to stay there. The address
// must be a multiple of the bytes stored; finish_streaming() orders it before what follows.
template <class T, class V>
GKT_INLINE void store_streaming(T* to, V v) {
#if defined(GKT_ISA_avx512) || defined(GKT_ISA_avx2)
  const auto values = stored<T>(v);
#if defined(GKT_ISA_avx512)
  if constexpr (sizeof(values) == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(values));
#endif
  if constexpr (sizeof(values) == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(values));
  if constexpr (sizeof(values) == 16)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(values));
#endif
  store(to, v);
}

GKT_INLINE void finish_streaming() {
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
  const Vec<float> power = (Vec<float>)(((Ints<Vec<float>>)shifted << 23) + (127 << 23));
  return x < -87.0f ? Vec<float>{} : p * power;
}

inline Vec<double> exponential(Vec<double> x) {
  constexpr double kRound = 0x1.8p52;
  const Vec<double> shifted = x * 0x1.71547652b82fep+0 + kRound;
  const Vec<double> n = shifted - kRound;
  Vec<double> r = x - n * 0x1.62e42feep-1;
  r = r - n * 0x1.a39ef35793c76p-33;
  Vec<double> p = broadcast<Vec<double>>(1.0 / 6227020800.0);
  double inverse_factorial = 1.0 / 6227020800.0;  // 1 / 13!
#pragma GCC unroll 13
  for (int k = 13; k > 0; --k) {
    inverse_factorial *= k;
    p = p * r + inverse_factorial;
  }
  const Vec<double> power = (Vec<double>)(((Ints<Vec<double>>)shifted << 52) + (1023LL << 52));
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
  using I = Ints<Vec<Real>>;
  const Vec<Real> offset = broadcast<Vec<Real>>(kSqrtHalf);
  const I n = ((I)x - (I)offset) >> kMantissa;
  const Vec<Real> m = (Vec<Real>)((I)x - (n << kMantissa));
  const Vec<Real> s = (m - 1) / (m + 1);
  const Vec<Real> square = s * s;
  Vec<Real> p = broadcast<Vec<Real>>(static_cast<Real>(1.0 / (2 * kTerms - 1)));
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
