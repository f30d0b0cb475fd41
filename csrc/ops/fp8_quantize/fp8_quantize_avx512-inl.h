// Quantising with AVX-512: 64 weights at a time become floats, quotients and codes without leaving registers.
#include "ops/fp8_quantize/fp8_quantize-inl.h"
#include "ops/fp8_quantize/streamed_avx512.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

struct WideBody {
  static uint32_t peak_bits(const void* from, Dtype dtype, int64_t start, int64_t count) {
    if (count < step_of(dtype)) return PlainBody::peak_bits(from, dtype, start, count);
    const char* const p = static_cast<const char*>(from) + start * size_of(dtype);
    if (dtype == Dtype::f32) return _mm512_reduce_max_epu32(peak<Dtype::f32>(p, 4 * count));
    const __m512i words = peak<Dtype::bf16>(p, 2 * count);
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least_of_others = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
    const uint16_t largest = static_cast<uint16_t>(~_mm_cvtsi128_si32(least_of_others));
    return bits_of(Vec::one(&largest, dtype, 0));
  }

  static MUSUBI_INLINE void peaks(const void* from, Dtype dtype, int64_t start, int64_t width, int count,
                                  uint32_t* out) {
    if (count < kTogether || width % step_of(dtype) != 0) {
      for (int i = 0; i < count; ++i) out[i] = peak_bits(from, dtype, start + i * width, width);
      return;
    }
    const char* const p = static_cast<const char*>(from) + start * size_of(dtype);
    dtype == Dtype::f32 ? peaks_of_floats(p, 4 * width, out) : peaks_of_halves(p, 2 * width, dtype, out);
  }

  template <Format kFormat>
  void encode_groups(const QuantizeTask& task, const void* row, int64_t start, int count, const float* scales,
                     uint8_t* codes) {
    encode_as<kFormat>(task, row, start, task.width, count, scales, codes);
  }

  template <Format kFormat>
  void encode_run(const QuantizeTask& task, const void* row, int64_t start, int64_t count, float scale,
                  uint8_t* codes) {
    alignas(64) const float scales[kTogether] = {scale};
    encode_as<kFormat>(task, row, start, count, 1, scales, codes - start);
  }

  // After the last byte of a chunk.
  void done() {
    seam_.write_out();
    _mm_sfence();
  }

 protected:
  // Groups of `width` weights from `start` of a row and of `codes`. kShort: weights and scales have at most 11
  // significant bits.
  template <Format kFormat, Dtype kDtype, bool kShort>
  MUSUBI_NOINLINE void encode_all(const QuantizeTask& task, const void* row, int64_t start, int64_t width, int count,
                                  const float* scales, uint8_t* codes) {
    constexpr int64_t kSize = kDtype == Dtype::f32 ? 4 : 2;
    alignas(64) float inverses[kTogether];
    for (int i = 0; i < kTogether; ++i) inverses[i] = 1.0f / scales[i];
    const int64_t ahead = weights_ahead(task);
    for (int g = 0; g < count; ++g) {
      if (scales[g] == 0.0f || width < 64) continue;
      const int64_t first = start + g * width, end = first + width;
      const int64_t skipped = to_next_line(codes + first, task.pages.stream, width);
      const bool whole_lines = width % 64 == 0 || width >= kLeastStreamed;
      const bool stream =
          task.pages.stream && whole_lines && reinterpret_cast<uintptr_t>(codes + first + skipped) % 64 == 0;
      const Divisor divisor(scales[g], inverses[g]);
      const auto at = [&](int64_t i) { return codes_of<kFormat, kDtype, kShort>(row, i, divisor, divisor); };
      if (skipped > 0) seam_.finish(codes + first, at(first), skipped);
      int64_t i = first + skipped;
      for (; i + 64 <= end; i += 64) {
        fetch(row, (i + ahead) * kSize, 64 * kSize);
        put64(codes + i, at(i), stream);
      }
      if (i < end) seam_.begin(codes + end, at(end - 64), end - i, stream);
    }
    for (int g = 0; g < count; ++g) {  // apart: a call empties all vector registers
      const int64_t whole = scales[g] == 0.0f || width < 64 ? 0 : width, first = start + g * width + whole;
      if (whole < width) PlainBody::encode_run<kFormat>(task, row, first, width - whole, scales[g], codes + first);
    }
  }

  // Groups of 32, two at a time.
  template <Format kFormat, Dtype kDtype>
  MUSUBI_NOINLINE void encode_pairs(const QuantizeTask& task, const void* row, int64_t start, int count,
                                    const float* scales, uint8_t* codes) {
    constexpr int64_t kSize = kDtype == Dtype::f32 ? 4 : 2;
    alignas(64) float inverses[kTogether];
    for (int i = 0; i < kTogether; ++i) inverses[i] = 1.0f / scales[i];
    const bool stream = task.pages.stream && reinterpret_cast<uintptr_t>(codes + start) % 64 == 0;
    const int64_t ahead = weights_ahead(task);
    bool done[kTogether] = {};
    for (int g = 0; g + 2 <= count; g += 2) {
      const int64_t at = start + 32 * g;
      fetch(row, (at + ahead) * kSize, 64 * kSize);
      done[g] = done[g + 1] = scales[g] != 0.0f && scales[g + 1] != 0.0f;
      if (!done[g]) continue;
      const Divisor first(scales[g], inverses[g]), second(scales[g + 1], inverses[g + 1]);
      put64(codes + at, codes_of<kFormat, kDtype, false>(row, at, first, second), stream);
    }
    for (int g = 0; g < count; ++g) {
      const int64_t at = start + 32 * g;
      if (!done[g]) PlainBody::encode_run<kFormat>(task, row, at, 32, scales[g], codes + at);
    }
  }

  struct Divisor {
    __m512 scale, inverse;
    Divisor(float value, float its_inverse) : scale(_mm512_set1_ps(value)), inverse(_mm512_set1_ps(its_inverse)) {}
  };

  // The codes of 64 weights from `start`, 32 of each divisor.
  template <Format kFormat, Dtype kDtype, bool kShort>
  static MUSUBI_INLINE __m512i codes_of(const void* row, int64_t start, const Divisor& low, const Divisor& high) {
    __m512i w[4], c[4];
    MUSUBI_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512 each = Vec::load_as(row, kDtype, start + 16 * j);
      w[j] = _mm512_castps_si512(each);
      const Divisor& divisor = j < 2 ? low : high;
      c[j] = sizes<kFormat>(quotient<kShort>(each, divisor.scale, divisor.inverse));
    }
    const __m512i sizes = _mm512_packus_epi16(_mm512_packus_epi32(c[0], c[1]), _mm512_packus_epi32(c[2], c[3]));
    // signed packing keeps signs, and a corrected quotient has lost that of -0
    const __m512i signs = _mm512_packs_epi16(_mm512_packs_epi32(w[0], w[1]), _mm512_packs_epi32(w[2], w[3]));
    const __m512i shifted = _mm512_add_epi8(sizes, _mm512_set1_epi8(Numbers<kFormat>::code_offset));
    const __m512i done = _mm512_ternarylogic_epi32(shifted, signs, _mm512_set1_epi8(-0x80), 0xf8);
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), done);
  }

  Seam seam_;

 private:
  static int64_t step_of(Dtype dtype) { return dtype == Dtype::f32 ? 16 : 32; }

  template <Dtype kDtype>
  static MUSUBI_INLINE __m512i larger(__m512i a, __m512i b) {
    return kDtype == Dtype::f32 ? _mm512_max_epu32(a, b) : _mm512_max_epu16(a, b);
  }

  // The largest magnitudes of at least 64 bytes, lane by lane. bf16 and float16 are alike here. The last vector may
  // begin in the one before: what is looked at twice is no larger.
  template <Dtype kDtype>
  static MUSUBI_INLINE __m512i peak(const char* p, int64_t bytes) {
    const __m512i magnitude = kDtype == Dtype::f32 ? _mm512_set1_epi32(0x7fffffff) : _mm512_set1_epi16(0x7fff);
    __m512i all = _mm512_and_si512(_mm512_loadu_si512(p), magnitude);
    for (int64_t i = 64; i + 64 <= bytes; i += 64) {
      all = larger<kDtype>(all, _mm512_and_si512(_mm512_loadu_si512(p + i), magnitude));
    }
    return larger<kDtype>(all, _mm512_and_si512(_mm512_loadu_si512(p + bytes - 64), magnitude));
  }

  // Sixteen groups at once: neighbouring vectors are laid into each other, halving their number, until each lane holds
  // a group of its own.
  static MUSUBI_INLINE void peaks_of_halves(const char* p, int64_t bytes, Dtype dtype, uint32_t* out) {
    constexpr Dtype kWords = Dtype::bf16;
    __m512i v[16];
    MUSUBI_UNROLL
    for (int i = 0; i < 16; ++i) v[i] = peak<kWords>(p + i * bytes, bytes);
    MUSUBI_UNROLL
    for (int i = 0; i < 8; ++i) {
      v[i] =
          larger<kWords>(_mm512_unpacklo_epi16(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi16(v[2 * i], v[2 * i + 1]));
    }
    MUSUBI_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i] =
          larger<kWords>(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    }
    MUSUBI_UNROLL
    for (int i = 0; i < 2; ++i) {
      v[i] =
          larger<kWords>(_mm512_unpacklo_epi64(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi64(v[2 * i], v[2 * i + 1]));
    }
    const __m512i quarters =
        larger<kWords>(_mm512_shuffle_i32x4(v[0], v[1], 0x44), _mm512_shuffle_i32x4(v[0], v[1], 0xee));
    const __m512i both = larger<kWords>(quarters, _mm512_shuffle_i32x4(quarters, quarters, 0xb1));
    const __m256i words = _mm512_castsi512_si256(_mm512_shuffle_i32x4(both, both, 0x08));
    const __m512i floats = dtype == Dtype::f16 ? _mm512_castps_si512(_mm512_cvtph_ps(words))
                                               : _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
    _mm512_store_si512(out, floats);
  }

  static MUSUBI_INLINE void peaks_of_floats(const char* p, int64_t bytes, uint32_t* out) {
    constexpr Dtype kFloats = Dtype::f32;
    __m512i v[16];
    MUSUBI_UNROLL
    for (int i = 0; i < 16; ++i) v[i] = peak<kFloats>(p + i * bytes, bytes);
    MUSUBI_UNROLL
    for (int i = 0; i < 8; ++i) {
      v[i] =
          larger<kFloats>(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    }
    MUSUBI_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i] =
          larger<kFloats>(_mm512_unpacklo_epi64(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi64(v[2 * i], v[2 * i + 1]));
    }
    MUSUBI_UNROLL
    for (int i = 0; i < 2; ++i) {
      v[i] = larger<kFloats>(_mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x44),
                             _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xee));
    }
    _mm512_store_si512(out,
                       larger<kFloats>(_mm512_shuffle_i32x4(v[0], v[1], 0x88), _mm512_shuffle_i32x4(v[0], v[1], 0xdd)));
  }

  template <Format kFormat>
  MUSUBI_NOINLINE void encode_as(const QuantizeTask& task, const void* row, int64_t start, int64_t width, int count,
                                 const float* scales, uint8_t* codes) {
    if (width == 32) {
      if (task.w.dtype == Dtype::f32) return encode_pairs<kFormat, Dtype::f32>(task, row, start, count, scales, codes);
      if (task.w.dtype == Dtype::f16) return encode_pairs<kFormat, Dtype::f16>(task, row, start, count, scales, codes);
      return encode_pairs<kFormat, Dtype::bf16>(task, row, start, count, scales, codes);
    }
    const bool short_scale = task.scale_dtype != Dtype::f32;
    if (task.w.dtype == Dtype::f32) {
      encode_all<kFormat, Dtype::f32, false>(task, row, start, width, count, scales, codes);
    } else if (task.w.dtype == Dtype::bf16) {
      short_scale ? encode_all<kFormat, Dtype::bf16, true>(task, row, start, width, count, scales, codes)
                  : encode_all<kFormat, Dtype::bf16, false>(task, row, start, width, count, scales, codes);
    } else {
      short_scale ? encode_all<kFormat, Dtype::f16, true>(task, row, start, width, count, scales, codes)
                  : encode_all<kFormat, Dtype::f16, false>(task, row, start, width, count, scales, codes);
    }
  }

  // w / s, rounded once as a division is, which takes several times as long. One correction by the remainder makes a
  // quotient that is off by less than a last place; the second is exact then and decides the rounding (Markstein 1990,
  // for a correctly rounded inverse). With at most 11 significant bits in both, w / s is at least 2^-11 of a last place
  // away from the middle of two floats, so that the first is enough. Where a remainder is too small for a float, so is
  // the quotient for any code but zero.
  template <bool kShort>
  static MUSUBI_INLINE __m512 quotient(__m512 w, __m512 s, __m512 inverse) {
    const __m512 q = _mm512_mul_ps(w, inverse);
    const __m512 closer = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, s, w), inverse, q);
    if (kShort) return closer;
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(closer, s, w), inverse, closer);
  }

  // The codes without signs of quotients, less Numbers::code_offset and modulo 256. Adding 2^shift times the power of
  // two below a number rounds it to the format's mantissa, and leaves how many steps that is in the low bits.
  template <Format kFormat>
  static MUSUBI_INLINE __m512i sizes(__m512 value) {
    using N = Numbers<kFormat>;
    const auto all = [](uint32_t bits) { return _mm512_set1_epi32(static_cast<int>(bits)); };
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(value), all(0x7fffffffu));
    const __m512i a = _mm512_min_epu32(magnitude, all(N::largest));
    const __m512i power = _mm512_max_epu32(_mm512_and_si512(a, all(0x7f800000u)), all(N::normal));
    const __m512 lift = _mm512_castsi512_ps(_mm512_add_epi32(power, all(N::shift << 23)));
    const __m512i steps = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), lift));
    return _mm512_and_si512(_mm512_add_epi32(steps, _mm512_srli_epi32(power, N::shift)), all(0xff));
  }
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
