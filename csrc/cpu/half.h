// bfloat16 and float16: storage only, arithmetic is done in float. One formula serves single values
// and vectors of any width. For code compiled once per instruction set (isa.h): everything is
// internal to the file that includes it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
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

template <class To, class From>
GKT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Floats is float or a vector of floats, Words uint32_t or a vector of as many.
template <class Floats, class Words>
GKT_INLINE Floats widen_bits(Words bits, bfloat16) {
  return bit_cast<Floats>(bits << 16);
}

// Exponent and mantissa move up by 13 bits; a multiply rebiases them, subnormals included.
template <class Floats, class Words>
GKT_INLINE Floats widen_bits(Words bits, float16) {
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words finite = bit_cast<Words>(bit_cast<Floats>(magnitude) * 0x1p112f);
  const Words infinite = magnitude | 0x7f800000u;
  const Words value = magnitude >= 0x0f800000u ? infinite : finite;
  return bit_cast<Floats>(value | (bits & 0x8000u) << 16);
}

// Round to nearest even; NaN stays NaN.
template <class Words, class Floats>
GKT_INLINE Words narrow_bits(Floats v, bfloat16) {
  const Words bits = bit_cast<Words>(v);
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Words nan = bits >> 16 | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

// The addition of 0.5 aligns a subnormal's bits; the rest is rounding as for bfloat16.
template <class Words, class Floats>
GKT_INLINE Words narrow_bits(Floats v, float16) {
  const Words bits = bit_cast<Words>(v), magnitude = bits & 0x7fffffffu;
  const Words subnormal = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const Words infinite = Words{} + 0x7c00u, nan = Words{} + 0x7e00u;
  Words result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? infinite : result;
  result = magnitude > 0x7f800000u ? nan : result;
  return result | (bits >> 16 & 0x8000u);
}

// One value of any stored dtype.
GKT_INLINE float to_arithmetic(float value) { return value; }
GKT_INLINE double to_arithmetic(double value) { return value; }
template <class Half>
GKT_INLINE float to_arithmetic(Half value) {
  return widen_bits<float>(uint32_t{value.bits}, Half{});
}
GKT_INLINE void from_arithmetic(float value, float* to) { *to = value; }
GKT_INLINE void from_arithmetic(double value, double* to) { *to = value; }
template <class Half>
GKT_INLINE void from_arithmetic(float value, Half* to) {
  to->bits = static_cast<uint16_t>(narrow_bits<uint32_t>(value, Half{}));
}

// The half-precision values that fill a vector of floats.
template <class Floats>
struct LanesOf {
  typedef uint16_t Halves __attribute__((vector_size(sizeof(Floats) / 2)));
  typedef uint32_t Words __attribute__((vector_size(sizeof(Floats))));
};
template <class Floats>
using Halves = typename LanesOf<Floats>::Halves;

template <class Floats, class Half>
GKT_INLINE Floats widen(Halves<Floats> bits, Half) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<Half, float16>::value && sizeof(Floats) == 64)
    return bit_cast<Floats>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  if constexpr (std::is_same<Half, float16>::value && sizeof(Floats) == 32)
    return bit_cast<Floats>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#endif
  using Words = typename LanesOf<Floats>::Words;
  return widen_bits<Floats>(__builtin_convertvector(bits, Words), Half{});
}

template <class Floats, class Half>
GKT_INLINE Halves<Floats> narrow(Floats v, Half) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<Half, float16>::value && sizeof(Floats) == 64)
    return bit_cast<Halves<Floats>>(
        _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  if constexpr (std::is_same<Half, float16>::value && sizeof(Floats) == 32)
    return bit_cast<Halves<Floats>>(
        _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
  using Words = typename LanesOf<Floats>::Words;
  return __builtin_convertvector(narrow_bits<Words>(v, Half{}), Halves<Floats>);
}

}  // namespace
}  // namespace GKT_ISA
}  // namespace gkt
