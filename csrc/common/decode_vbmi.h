// Codes to bf16 and float by table look-up, for the build with AVX-512 VBMI and BF16. Exact for every code.
#pragma once

#include <immintrin.h>

#include "common/types.h"

namespace musubi {
namespace avx512bf16 {
namespace {

// The two bytes of bf16(code) for the 128 codes without sign.
struct Bytes {
  alignas(64) uint8_t lower[128];
  alignas(64) uint8_t upper[128];
};

constexpr uint32_t bf16_of(uint32_t code, uint32_t mantissa_bits, uint32_t bias) {
  const uint32_t exponent = code >> mantissa_bits;
  const uint32_t mantissa = code & ((1u << mantissa_bits) - 1);
  if (mantissa_bits == 3 && code == 0x7f) return 0x7fc0;
  if (mantissa_bits == 2 && exponent == 31) return mantissa != 0 ? 0x7fc0 : 0x7f80;
  if (exponent > 0) return ((exponent + 127 - bias) << 7) | (mantissa << (7 - mantissa_bits));
  if (mantissa == 0) return 0;
  uint32_t top = 0;
  while ((mantissa >> (top + 1)) != 0) ++top;
  return ((top + 128 - bias - mantissa_bits) << 7) | ((mantissa - (1u << top)) << (7 - top));
}

constexpr Bytes bytes_of(uint32_t mantissa_bits, uint32_t bias) {
  Bytes bytes{};
  for (uint32_t code = 0; code < 128; ++code) {
    const uint32_t value = bf16_of(code, mantissa_bits, bias);
    bytes.lower[code] = static_cast<uint8_t>(value & 0xff);
    bytes.upper[code] = static_cast<uint8_t>(value >> 8);
  }
  return bytes;
}

constexpr Bytes kE4m3 = bytes_of(3, 7);
constexpr Bytes kE5m2 = bytes_of(2, 15);

struct Decoder {
  __m512i lower0, lower1, upper0, upper1;

  explicit Decoder(Format format) {
    const Bytes& bytes = format == Format::e4m3 ? kE4m3 : kE5m2;
    lower0 = _mm512_load_si512(bytes.lower);
    lower1 = _mm512_load_si512(bytes.lower + 64);
    upper0 = _mm512_load_si512(bytes.upper);
    upper1 = _mm512_load_si512(bytes.upper + 64);
  }

  void look_up(__m512i codes, __m512i* lower, __m512i* upper) const {
    *lower = _mm512_permutex2var_epi8(lower0, codes, lower1);
    const __m512i magnitude = _mm512_permutex2var_epi8(upper0, codes, upper1);
    *upper = _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
  }

  // 64 codes as bf16: `a` holds the first 32, `b` the others.
  void pairs(__m512i codes, __m512i* a, __m512i* b) const {
    __m512i lower, upper;
    look_up(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes), &lower, &upper);
    *a = _mm512_unpacklo_epi8(lower, upper);
    *b = _mm512_unpackhi_epi8(lower, upper);
  }

  // 64 codes as floats times `scale`, in order.
  void floats(__m512i codes, __m512 scale, __m512* out) const {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i lower, upper;
    look_up(_mm512_permutexvar_epi32(order, codes), &lower, &upper);
    const __m512i a = _mm512_unpacklo_epi8(lower, upper), b = _mm512_unpackhi_epi8(lower, upper);
    const __m512i zero = _mm512_setzero_si512();
    out[0] = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, a)), scale);
    out[1] = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, a)), scale);
    out[2] = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, b)), scale);
    out[3] = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, b)), scale);
  }
};

inline __mmask64 first(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << static_cast<unsigned>(count)) - 1;
}

inline __mmask32 first_words(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << static_cast<unsigned>(count > 0 ? count : 0)) - 1;
}

inline __m512i rounded(__m512 low_half, __m512 high_half) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high_half, low_half));
}

}  // namespace
}  // namespace avx512bf16
}  // namespace musubi
