// One vector register of float or double per instruction set, and the conversions from and to the
// dtypes that tensors are stored in. For code compiled once per set (isa.h): everything is internal
// to the file that includes it.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/half.h"

namespace gkt {
namespace GKT_ISA {
namespace {

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

typedef float float_lanes __attribute__((vector_size(4 * Vec<float>::width)));

template <class Half>
GKT_INLINE Vec<float> load_half(const Half* from, int count) {
  Halves<float_lanes> bits = {};
  if (count >= Vec<float>::width)
    std::memcpy(&bits, from, sizeof(bits));
  else
    for (int lane = 0; lane < count; ++lane) bits[lane] = from[lane].bits;
  return {bit_cast<Vec<float>::raw>(widen<float_lanes>(bits, Half{}))};
}

template <class Half>
GKT_INLINE void store_half(Half* to, Vec<float> v, int count) {
  const Halves<float_lanes> bits = narrow(bit_cast<float_lanes>(v.value), Half{});
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
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                        bit_cast<__m256i>(narrow(bit_cast<float_lanes>(v.value), T{})));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    _mm256_stream_ps(to, v.value);
  else if constexpr (sizeof(T) == 2)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                     bit_cast<__m128i>(narrow(bit_cast<float_lanes>(v.value), T{})));
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
