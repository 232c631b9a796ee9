// Vectors of the instruction set being compiled (GKT_ISA): types, loads and stores of every dtype,
// exp and log. Everything is local to the file that includes it (see cpu/isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

// Storage only: arithmetic is done in the compute type.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};

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

// --- one value -------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_compute(float value) { return value; }
inline double to_compute(double value) { return value; }
inline float to_compute(BFloat16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}
inline float to_compute(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // 2^112 moves the exponent's bias from 15 to 127, and makes subnormal numbers normal.
  if (magnitude < 0x7c00u)
    return bits_to_float(float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f) | sign);
  return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
}

inline void from_compute(float value, float* to) { *to = value; }
inline void from_compute(double value, double* to) { *to = value; }
inline void from_compute(float value, BFloat16* to) {
  const uint32_t bits = float_to_bits(value);
  const bool nan = value != value;
  to->bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void from_compute(float value, Float16* to) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const float magnitude = bits_to_float(bits & 0x7fffffffu);
  uint32_t half;
  if (value != value) {
    half = 0x7e00u;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    // Adding 0.5 leaves the rounded multiple of 2^-24, the subnormal step, in the low bits.
    half = float_to_bits(magnitude + 0.5f) - float_to_bits(0.5f);
  } else {
    const uint32_t m = float_to_bits(magnitude);
    half = (m - (112u << 23) + 0xfffu + (m >> 13 & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
}

// --- vectors ---------------------------------------------------------------------------------

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

#if defined(GKT_ISA_avx512)
inline Vec<float> load(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
inline void store(BFloat16* to, Vec<float> v) {
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_srli_epi32(rounded, 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}
inline Vec<float> load(const Float16* from) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(Float16* to, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(GKT_ISA_avx2)
inline Vec<float> load(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
inline void store(BFloat16* to, Vec<float> v) {
  for (int j = 0; j < kLanes<float>; ++j) from_compute(v[j], to + j);
}
inline Vec<float> load(const Float16* from) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store(Float16* to, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class T>
inline Vec<float> load(const T* from) {
  Vec<float> v;
  for (int j = 0; j < kLanes<float>; ++j) v[j] = to_compute(from[j]);
  return v;
}
template <class T>
inline void store(T* to, Vec<float> v) {
  for (int j = 0; j < kLanes<float>; ++j) from_compute(v[j], to + j);
}
#endif

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
inline void store_streaming(T* to, Vec<typename Compute<T>::Type> v) {
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
inline Vec<typename Compute<T>::Type> load_partial(const T* from, int count,
                                                   typename Compute<T>::Type fill) {
  using Real = typename Compute<T>::Type;
  T values[kLanes<Real>] = {};
  std::memcpy(values, from, static_cast<size_t>(count) * sizeof(T));
  return lane_indices<Real>() < count ? load(values) : broadcast(fill);
}

template <class T>
inline void store_partial(T* to, Vec<typename Compute<T>::Type> v, int count) {
  T values[kLanes<typename Compute<T>::Type>];
  store(values, v);
  std::memcpy(to, values, static_cast<size_t>(count) * sizeof(T));
}

// --- functions -------------------------------------------------------------------------------

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
