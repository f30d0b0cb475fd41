// Sixteen floats at a time with AVX-512 F, BW, VL and DQ. Included by two translation units, each in its own namespace:
// the build defines MUSUBI_ISA.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "common/types.h"

namespace musubi {
namespace MUSUBI_ISA {

struct Vec {
  static constexpr int W = 16;
  using F = __m512;

  static F zero() { return _mm512_setzero_ps(); }
  // Many zeros at once: GCC makes one and copies it, which takes the multipliers' ports; a register less itself is
  // free.
  static F fresh_zero() {
    F f;
    asm("vpxord %0, %0, %0" : "=v"(f));
    return f;
  }
  static F set1(float a) { return _mm512_set1_ps(a); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
  // The G floats at p, again and again.
  template <int G>
  static F repeat(const float* p) {
    if constexpr (G == 1) return _mm512_set1_ps(*p);
    if constexpr (G == 2)
      return _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_load_sd(reinterpret_cast<const double*>(p))));
    if constexpr (G == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if constexpr (G == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    if constexpr (G == 16) return _mm512_loadu_ps(p);
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  // The largest power of two that is not above |a|.
  static F power_of(F a) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7f800000)));
  }
  // The nearest number with kBits fewer bits of mantissa, halves away from zero.
  template <int kBits>
  static F shortened(F a) {
    const __m512i lifted = _mm512_add_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(1 << (kBits - 1)));
    return _mm512_castsi512_ps(_mm512_and_si512(lifted, _mm512_set1_epi32(-(1 << kBits))));
  }
  // Whether the magnitude of some lane is below `limit` and not zero.
  static bool any_below(F a, F limit) {
    const F size = _mm512_abs_ps(a);
    const __mmask16 below = _mm512_cmp_ps_mask(size, limit, _CMP_LT_OQ);
    return _mm512_mask_cmp_ps_mask(below, size, zero(), _CMP_NEQ_OQ) != 0;
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }

  static void transpose(F* r) {
    F t[W];
    MUSUBI_UNROLL
    for (int i = 0; i < W; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    F q[W];
    MUSUBI_UNROLL
    for (int i = 0; i < W; i += 4) {
      q[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      q[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      q[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      q[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    MUSUBI_UNROLL
    for (int j = 0; j < 4; ++j) {
      const F a = _mm512_shuffle_f32x4(q[j], q[4 + j], 0x44);
      const F b = _mm512_shuffle_f32x4(q[j], q[4 + j], 0xee);
      const F c = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0x44);
      const F d = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0xee);
      r[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      r[4 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[8 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
      r[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }

  static float one(const void* p, Dtype dtype, int64_t i) {
    float value;
    if (dtype == Dtype::f32) {
      std::memcpy(&value, static_cast<const float*>(p) + i, 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, static_cast<const uint16_t*>(p) + i, 2);
    if (dtype == Dtype::f16) return _cvtsh_ss(half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  static void put(void* p, Dtype dtype, int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == Dtype::f32) {
      std::memcpy(static_cast<float*>(p) + i, &bits, 4);
      return;
    }
    const uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    uint16_t half = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : even);
    if (dtype == Dtype::f16) half = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
    std::memcpy(static_cast<uint16_t*>(p) + i, &half, 2);
  }

  static F load_as(const void* p, Dtype dtype, int64_t i) {
    if (dtype == Dtype::f32) return load(static_cast<const float*>(p) + i);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i));
    if (dtype == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  static void store_as(void* p, Dtype dtype, int64_t i, F f) {
    if (dtype == Dtype::f32) return store(static_cast<float*>(p) + i, f);
    __m256i* to = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + i);
    if (dtype == Dtype::f16) {
      _mm256_storeu_si256(to, _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
    const __m512i bits = _mm512_castps_si512(f);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16)));
  }

  // e5m2 is the upper byte of a half. e4m3 becomes a half of 2^-8 times its value, denormals included; 0x7f is NaN.
  static F decode(const uint8_t* codes, Format format) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m256i upper = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8);
    if (format == Format::e5m2) return _mm512_cvtph_ps(upper);
    const __m256i sign = _mm256_and_si256(upper, _mm256_set1_epi16(static_cast<int16_t>(0x8000)));
    const __m256i magnitude = _mm256_and_si256(upper, _mm256_set1_epi16(0x7f00));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f00));
    const __m256i finite = _mm256_or_si256(sign, _mm256_srli_epi16(magnitude, 1));
    const __m256i half = _mm256_mask_mov_epi16(finite, nan, _mm256_set1_epi16(0x7e00));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
  }
};

}  // namespace MUSUBI_ISA
}  // namespace musubi
