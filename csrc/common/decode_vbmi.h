// Codes to bf16 and float by table look-up, for the builds with AVX-512 VBMI. Exact for every code.
#pragma once

#include <immintrin.h>

#include "common/types.h"

namespace musubi {
namespace MUSUBI_ISA {
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

  MUSUBI_INLINE void look_up(__m512i codes, __m512i* lower, __m512i* upper) const {
    *lower = _mm512_permutex2var_epi8(lower0, codes, lower1);
    const __m512i magnitude = _mm512_permutex2var_epi8(upper0, codes, upper1);
    *upper = _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
  }

  // The same where a look-up in 128 entries costs three operations (Intel's cores): two in 64 entries each, the second
  // where bit 6 is set.
  MUSUBI_INLINE void look_up_twice(__m512i codes, __m512i* lower, __m512i* upper) const {
    const __mmask64 high = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(0x40));
    const __m512i low0 = _mm512_permutexvar_epi8(codes, lower0), up0 = _mm512_permutexvar_epi8(codes, upper0);
    *lower = _mm512_mask_permutexvar_epi8(low0, high, codes, lower1);
    const __m512i magnitude = _mm512_mask_permutexvar_epi8(up0, high, codes, upper1);
    *upper = _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
  }

  // 64 codes as bf16 in the order that costs no move: pair i of both together is pair pair_at(i) of the codes.
  MUSUBI_INLINE void pairs_shuffled(__m512i codes, __m512i* a, __m512i* b) const {
    __m512i lower, upper;
    look_up(codes, &lower, &upper);
    *a = _mm512_unpacklo_epi8(lower, upper);
    *b = _mm512_unpackhi_epi8(lower, upper);
  }
  // The same in order: `a` holds the first 32, `b` the others.
  MUSUBI_INLINE void pairs(__m512i codes, __m512i* a, __m512i* b) const {
    pairs_shuffled(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes), a, b);
  }
  static constexpr int64_t pair_at(int64_t i) { return i % 16 / 4 * 8 + i / 16 * 4 + i % 4; }

  // 64 codes as floats in the order that costs no move: float i of all four together is code float_at(i).
  MUSUBI_INLINE void floats_shuffled(__m512i codes, __m512* out) const {
    __m512i lower, upper;
#ifdef __AVX512BF16__
    look_up(codes, &lower, &upper);
#else
    look_up_twice(codes, &lower, &upper);
#endif
    const __m512i a = _mm512_unpacklo_epi8(lower, upper), b = _mm512_unpackhi_epi8(lower, upper);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(a, high));
    out[2] = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
    out[3] = _mm512_castsi512_ps(_mm512_and_si512(b, high));
  }
  static constexpr int64_t float_at(int64_t i) { return i % 16 / 4 * 16 + i / 32 * 8 + i % 4 * 2 + i / 16 % 2; }

  // 64 codes as floats, in order. The codes are laid out so that the two halves of a word are 16 codes apart: shifting
  // them out takes another port than the look-ups.
  MUSUBI_INLINE void floats(__m512i codes, __m512* out) const {
    floats_shuffled(_mm512_permutexvar_epi8(_mm512_load_si512(kOrder), codes), out);
  }

  // The same times `scale`.
  void floats(__m512i codes, __m512 scale, __m512* out) const {
    floats(codes, out);
    MUSUBI_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = _mm512_mul_ps(out[i], scale);
  }

 private:
  alignas(64) static constexpr uint8_t kOrder[64] = {0,  16, 1,  17, 2,  18, 3,  19, 32, 48, 33, 49, 34, 50, 35, 51,  //
                                                     4,  20, 5,  21, 6,  22, 7,  23, 36, 52, 37, 53, 38, 54, 39, 55,  //
                                                     8,  24, 9,  25, 10, 26, 11, 27, 40, 56, 41, 57, 42, 58, 43, 59,  //
                                                     12, 28, 13, 29, 14, 30, 15, 31, 44, 60, 45, 61, 46, 62, 47, 63};
};

inline __mmask64 first(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << static_cast<unsigned>(count)) - 1;
}

inline __mmask32 first_words(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << static_cast<unsigned>(count > 0 ? count : 0)) - 1;
}

#ifdef __AVX512BF16__
inline __m512i rounded(__m512 low_half, __m512 high_half) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high_half, low_half));
}
#endif

// What decode_vec.h offers, 64 codes at a time.
class Codes {
 public:
  explicit Codes(Format format) : decoder_(format) {}

  // out[0 .. count) = float(codes) * scale
  void floats(const uint8_t* codes, int64_t count, float scale, float* out) const {
    const __m512 factor = _mm512_set1_ps(scale);
    int64_t i = 0;
    __m512 f[4];
    for (; i + 64 <= count; i += 64) {
      decoder_.floats(_mm512_loadu_si512(codes + i), factor, f);
      MUSUBI_UNROLL
      for (int v = 0; v < 4; ++v) _mm512_storeu_ps(out + i + 16 * v, f[v]);
    }
    if (i == count) return;
    decoder_.floats(_mm512_maskz_loadu_epi8(first(count - i), codes + i), factor, f);
    MUSUBI_UNROLL
    for (int v = 0; v < 4; ++v) {
      _mm512_mask_storeu_ps(out + i + 16 * v, static_cast<__mmask16>(first_words(count - i - 16 * v)), f[v]);
    }
  }

  // out[0 .. 64) = float(codes) * scale
  MUSUBI_INLINE void floats(const uint8_t* codes, float scale, float* out) const {
    __m512 f[4];
    decoder_.floats(_mm512_loadu_si512(codes), _mm512_set1_ps(scale), f);
    MUSUBI_UNROLL
    for (int v = 0; v < 4; ++v) _mm512_storeu_ps(out + 16 * v, f[v]);
  }

  // out[0 .. count) = float(codes), and zeros up to 64. At most 64 codes.
  MUSUBI_INLINE void padded(const uint8_t* codes, int64_t count, float* out) const {
    __m512 f[4];
    decoder_.floats(count == 64 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(first(count), codes), f);
    MUSUBI_UNROLL
    for (int v = 0; v < 4; ++v) _mm512_storeu_ps(out + 16 * v, f[v]);
  }

  // 64 codes as floats in an order of this build: float i is code place(i).
  static constexpr bool kInRegisters = true;
  MUSUBI_INLINE void shuffled(const uint8_t* codes, __m512* out) const {
    decoder_.floats_shuffled(_mm512_loadu_si512(codes), out);
  }
  // The same of `count` codes, and zeros.
  MUSUBI_INLINE void shuffled_part(const uint8_t* codes, int64_t count, __m512* out) const {
    decoder_.floats_shuffled(_mm512_maskz_loadu_epi8(first(count), codes), out);
  }
  static constexpr int64_t place(int64_t i) { return Decoder::float_at(i); }

  const Decoder& decoder() const { return decoder_; }

 private:
  Decoder decoder_;
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
