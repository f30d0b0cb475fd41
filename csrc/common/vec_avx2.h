// Eight floats at a time with AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "common/types.h"

namespace musubi {
namespace avx2 {

struct Vec {
  static constexpr int W = 8;
  using F = __m256;

  static F zero() { return _mm256_setzero_ps(); }
  static F fresh_zero() { return zero(); }
  static F set1(float a) { return _mm256_set1_ps(a); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F f) { _mm256_storeu_ps(p, f); }
  // The G floats at p, again and again.
  template <int G>
  static F repeat(const float* p) {
    if constexpr (G == 1) return _mm256_set1_ps(*p);
    if constexpr (G == 2)
      return _mm256_castpd_ps(_mm256_broadcastsd_pd(_mm_load_sd(reinterpret_cast<const double*>(p))));
    if constexpr (G == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    if constexpr (G == 8) return _mm256_loadu_ps(p);
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  // The largest power of two that is not above |a|.
  static F power_of(F a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000))); }
  // The nearest number with kBits fewer bits of mantissa, halves away from zero.
  template <int kBits>
  static F shortened(F a) {
    const __m256i lifted = _mm256_add_epi32(_mm256_castps_si256(a), _mm256_set1_epi32(1 << (kBits - 1)));
    return _mm256_castsi256_ps(_mm256_and_si256(lifted, _mm256_set1_epi32(-(1 << kBits))));
  }
  // Whether the magnitude of some lane is below `limit` and not zero.
  static bool any_below(F a, F limit) {
    const F size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
    const F some = _mm256_and_ps(_mm256_cmp_ps(size, limit, _CMP_LT_OQ), _mm256_cmp_ps(size, zero(), _CMP_NEQ_OQ));
    return _mm256_movemask_ps(some) != 0;
  }
  static float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  static void transpose(F* r) {
    F t[W];
    MUSUBI_UNROLL
    for (int i = 0; i < W; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    F q[W];
    MUSUBI_UNROLL
    for (int i = 0; i < W; i += 4) {
      q[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      q[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      q[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      q[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    MUSUBI_UNROLL
    for (int j = 0; j < 4; ++j) {
      r[j] = _mm256_permute2f128_ps(q[j], q[4 + j], 0x20);
      r[4 + j] = _mm256_permute2f128_ps(q[j], q[4 + j], 0x31);
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
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
    if (dtype == Dtype::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  static void store_as(void* p, Dtype dtype, int64_t i, F f) {
    if (dtype == Dtype::f32) return store(static_cast<float*>(p) + i, f);
    __m128i* to = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i);
    if (dtype == Dtype::f16) {
      _mm_storeu_si128(to, _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
    const __m256i bits = _mm256_castps_si256(f);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(to, _mm256_castsi256_si128(packed));
  }

  // e5m2 is the upper byte of a half. e4m3 becomes a half of 2^-8 times its value, denormals included; 0x7f is NaN.
  static F decode(const uint8_t* codes, Format format) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i upper = _mm_unpacklo_epi8(_mm_setzero_si128(), bytes);
    if (format == Format::e5m2) return _mm256_cvtph_ps(upper);
    const __m128i sign = _mm_and_si128(upper, _mm_set1_epi16(static_cast<int16_t>(0x8000)));
    const __m128i magnitude = _mm_and_si128(upper, _mm_set1_epi16(0x7f00));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f00));
    const __m128i half =
        _mm_or_si128(_mm_or_si128(sign, _mm_srli_epi16(magnitude, 1)), _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
  }
};

}  // namespace avx2
}  // namespace musubi
