// One vector register of float or double per instruction set, and the conversions from and to the
// dtypes that tensors are stored in. For code compiled once per set (isa.h): everything is internal
// to the file that includes it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// GCC 12 warns of its own intrinsics, and of an ABI that nothing here uses across files.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"

#define GKT_INLINE inline __attribute__((always_inline))

namespace gkt {
namespace GKT_ISA {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The dtype that a stored dtype is computed in.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};

// A register of `width` lanes. Bits hold one bit per lane, lane 0 lowest.
template <class T>
struct Vec;

// GCC splits a vector wider than the machine's into several registers.
template <>
struct Vec<double> {
  static constexpr int width = 8;
  typedef double raw __attribute__((vector_size(64)));
  typedef int64_t raw_bits __attribute__((vector_size(64)));
  raw value;

  static GKT_INLINE Vec all(double scalar) { return {raw{} + scalar}; }
  friend GKT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.value * b.value + c.value}; }
  GKT_INLINE uint32_t positive() const {  // not (value <= 0), so that NaN counts
    const raw_bits greater = ~(value <= raw{});
    uint32_t bits = 0;
    for (int lane = 0; lane < width; ++lane)
      bits |= static_cast<uint32_t>(greater[lane] & 1) << lane;
    return bits;
  }
  GKT_INLINE Vec where(uint32_t bits) const {  // 0 where the bit is not set
    Vec result = *this;
    for (int lane = 0; lane < width; ++lane)
      if (!(bits >> lane & 1)) result.value[lane] = 0;
    return result;
  }
  GKT_INLINE Vec relu() const { return {value <= raw{} ? raw{} : value}; }
};

template <>
struct Vec<float> {
#if defined(__AVX512F__)
  static constexpr int width = 16;
  typedef __m512 raw;
#elif defined(__AVX2__)
  static constexpr int width = 8;
  typedef __m256 raw;
#else
  static constexpr int width = 8;
  typedef float raw __attribute__((vector_size(32)));
  typedef int32_t raw_bits __attribute__((vector_size(32)));
#endif
  raw value;

#if defined(__AVX512F__)
  static GKT_INLINE Vec all(float scalar) { return {_mm512_set1_ps(scalar)}; }
  friend GKT_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {_mm512_fmadd_ps(a.value, b.value, c.value)};
  }
  GKT_INLINE uint32_t positive() const {
    return _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NLE_UQ);
  }
  GKT_INLINE Vec where(uint32_t bits) const {
    return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), value)};
  }
  GKT_INLINE Vec relu() const { return {_mm512_max_ps(_mm512_setzero_ps(), value)}; }
#elif defined(__AVX2__)
  static GKT_INLINE Vec all(float scalar) { return {_mm256_set1_ps(scalar)}; }
  friend GKT_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.value, b.value, c.value)};
  }
  GKT_INLINE uint32_t positive() const {
    return _mm256_movemask_ps(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_NLE_UQ));
  }
  GKT_INLINE Vec where(uint32_t bits) const {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
    return {_mm256_and_ps(value, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit)))};
  }
  GKT_INLINE Vec relu() const { return {_mm256_max_ps(_mm256_setzero_ps(), value)}; }
#else
  static GKT_INLINE Vec all(float scalar) { return {raw{} + scalar}; }
  friend GKT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.value * b.value + c.value}; }
  GKT_INLINE uint32_t positive() const {
    const raw_bits greater = ~(value <= raw{});
    uint32_t bits = 0;
    for (int lane = 0; lane < width; ++lane)
      bits |= static_cast<uint32_t>(greater[lane] & 1) << lane;
    return bits;
  }
  GKT_INLINE Vec where(uint32_t bits) const {
    const raw_bits lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
    const raw_bits set = (raw_bits{} + static_cast<int32_t>(bits)) & lane_bit;
    return {set == lane_bit ? value : raw{}};
  }
  GKT_INLINE Vec relu() const { return {value <= raw{} ? raw{} : value}; }
#endif
};

#define GKT_VEC_OPERATOR(op)                                        \
  template <class T>                                                \
  GKT_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) {               \
    return {static_cast<typename Vec<T>::raw>(a.value op b.value)}; \
  }
GKT_VEC_OPERATOR(+)
GKT_VEC_OPERATOR(-)
GKT_VEC_OPERATOR(*)
#undef GKT_VEC_OPERATOR

typedef uint16_t half_lanes __attribute__((vector_size(2 * Vec<float>::width)));
typedef uint32_t word_lanes __attribute__((vector_size(4 * Vec<float>::width)));

template <class To, class From>
GKT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

GKT_INLINE Vec<float> widen(half_lanes bits, bfloat16) {
  return {bit_cast<Vec<float>::raw>(__builtin_convertvector(bits, word_lanes) << 16)};
}

// Round to nearest even; NaN stays NaN.
GKT_INLINE half_lanes narrow(Vec<float> v, bfloat16) {
  const word_lanes bits = bit_cast<word_lanes>(v.value);
  const word_lanes rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const word_lanes nan = bits >> 16 | 0x40u;
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return __builtin_convertvector(is_nan ? nan : rounded, half_lanes);
}

#if defined(__AVX512F__)
GKT_INLINE Vec<float> widen(half_lanes bits, float16) {
  return {_mm512_cvtph_ps(bit_cast<__m256i>(bits))};
}
GKT_INLINE half_lanes narrow(Vec<float> v, float16) {
  return bit_cast<half_lanes>(_mm512_cvtps_ph(v.value, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
GKT_INLINE Vec<float> widen(half_lanes bits, float16) {
  return {_mm256_cvtph_ps(bit_cast<__m128i>(bits))};
}
GKT_INLINE half_lanes narrow(Vec<float> v, float16) {
  return bit_cast<half_lanes>(_mm256_cvtps_ph(v.value, _MM_FROUND_TO_NEAREST_INT));
}
#else
// Exponent and mantissa move up by 13 bits; a multiply rebiases them, subnormals included.
GKT_INLINE Vec<float> widen(half_lanes bits, float16) {
  const word_lanes word = __builtin_convertvector(bits, word_lanes);
  const word_lanes magnitude = (word & 0x7fffu) << 13;
  const Vec<float> scaled =
      Vec<float>{bit_cast<Vec<float>::raw>(magnitude)} * Vec<float>::all(0x1p112f);
  const word_lanes finite = bit_cast<word_lanes>(scaled.value);
  const auto special = magnitude >= 0x0f800000u;
  return {bit_cast<Vec<float>::raw>((special ? magnitude | 0x7f800000u : finite) | (word & 0x8000u)
                                                                                       << 16)};
}
// The addition of 0.5 aligns a subnormal's bits; the rest is rounding to nearest even as for
// bfloat16.
GKT_INLINE half_lanes narrow(Vec<float> v, float16) {
  const word_lanes bits = bit_cast<word_lanes>(v.value);
  const word_lanes magnitude = bits & 0x7fffffffu;
  const Vec<float> aligned =
      Vec<float>{bit_cast<Vec<float>::raw>(magnitude)} + Vec<float>::all(0.5f);
  const word_lanes subnormal = bit_cast<word_lanes>(aligned.value) - 0x3f000000u;
  const word_lanes normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  word_lanes result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? word_lanes{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? word_lanes{} + 0x7e00u : result;
  return __builtin_convertvector(result | (bits >> 16 & 0x8000u), half_lanes);
}
#endif

// Elements at `from`; lanes beyond `count` are 0 and not read. A constant count folds the branch
// away.
template <class T>
GKT_INLINE Vec<T> load(const T* from, int count) {
  Vec<T> v;
  if (count >= Vec<T>::width) {
    std::memcpy(&v.value, from, sizeof(v.value));
    return v;
  }
  T lanes[Vec<T>::width] = {};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  std::memcpy(&v.value, lanes, sizeof(v.value));
  return v;
}

template <class T>
GKT_INLINE void store(T* to, Vec<T> v, int count) {
  if (count >= Vec<T>::width) {
    std::memcpy(to, &v.value, sizeof(v.value));
    return;
  }
  T lanes[Vec<T>::width];
  std::memcpy(lanes, &v.value, sizeof(v.value));
  for (int lane = 0; lane < count; ++lane) to[lane] = lanes[lane];
}

template <class Half>
GKT_INLINE Vec<float> load_half(const Half* from, int count) {
  half_lanes bits = {};
  if (count >= Vec<float>::width)
    std::memcpy(&bits, from, sizeof(bits));
  else
    for (int lane = 0; lane < count; ++lane) bits[lane] = from[lane].bits;
  return widen(bits, Half{});
}

template <class Half>
GKT_INLINE void store_half(Half* to, Vec<float> v, int count) {
  const half_lanes bits = narrow(v, Half{});
  if (count >= Vec<float>::width)
    std::memcpy(to, &bits, sizeof(bits));
  else
    for (int lane = 0; lane < count; ++lane) to[lane].bits = bits[lane];
}

GKT_INLINE Vec<float> load(const bfloat16* from, int count) { return load_half(from, count); }
GKT_INLINE Vec<float> load(const float16* from, int count) { return load_half(from, count); }
GKT_INLINE void store(bfloat16* to, Vec<float> v, int count) { store_half(to, v, count); }
GKT_INLINE void store(float16* to, Vec<float> v, int count) { store_half(to, v, count); }

// Past the cache, to an address aligned to the register; ends with stream_fence().
template <class T, class A>
GKT_INLINE void stream(T* to, Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8)
    _mm512_stream_pd(to, bit_cast<__m512d>(v.value));
  else if constexpr (sizeof(T) == 4)
    _mm512_stream_ps(to, v.value);
  else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(narrow(v, T{})));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    _mm256_stream_ps(to, v.value);
  else if constexpr (sizeof(T) == 2)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(narrow(v, T{})));
  else
    store(to, v, Vec<A>::width);
#else
  store(to, v, Vec<A>::width);
#endif
}

GKT_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
