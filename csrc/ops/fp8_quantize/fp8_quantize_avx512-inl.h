// Quantising with AVX-512: 64 weights at a time become floats, quotients and codes without leaving registers.
#include "ops/fp8_quantize/fp8_quantize-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

struct WideBody {
  static uint32_t peak_bits(const void* from, Dtype dtype, int64_t start, int64_t count) {
    const int64_t step = dtype == Dtype::f32 ? 16 : 32;
    if (count % step != 0) return PlainBody::peak_bits(from, dtype, start, count);
    const char* p = static_cast<const char*>(from) + start * size_of(dtype);
    const char* const end = p + count * size_of(dtype);
    __m512i peak = _mm512_setzero_si512();
    if (dtype == Dtype::f32) {
      const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
      for (; p < end; p += 64) peak = _mm512_max_epu32(peak, _mm512_and_si512(_mm512_loadu_si512(p), magnitude));
      return _mm512_reduce_max_epu32(peak);
    }
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    for (; p < end; p += 64) peak = _mm512_max_epu16(peak, _mm512_and_si512(_mm512_loadu_si512(p), magnitude));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(peak), _mm512_extracti64x4_epi64(peak, 1));
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least_of_others = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
    const uint16_t largest = static_cast<uint16_t>(~_mm_cvtsi128_si32(least_of_others));
    return bits_of(Vec::one(&largest, dtype, 0));
  }

  template <Format kFormat>
  static void encode_run(const QuantizeTask& task, const void* row, int64_t start, int64_t count, float scale,
                         uint8_t* codes) {
    const int64_t whole = scale == 0.0f ? 0 : count / 64 * 64;
    const void* const from = static_cast<const char*>(row) + start * size_of(task.w.dtype);
    const bool stream = streams(task.w.rows * task.w.cols) && reinterpret_cast<uintptr_t>(codes) % 64 == 0;
    const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.0f / scale);
    const bool narrow = task.w.dtype != Dtype::f32 && task.scale_dtype != Dtype::f32;
    for (int64_t i = 0; i < whole; i += 64) {
      __m512i c[4];
      MUSUBI_UNROLL
      for (int j = 0; j < 4; ++j) {
        const __m512 w = Vec::load_as(from, task.w.dtype, i + 16 * j);
        c[j] = codes_of<kFormat>(narrow ? quotient(w, divisor, inverse) : _mm512_div_ps(w, divisor), w);
      }
      const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(c[0], c[1]), _mm512_packus_epi32(c[2], c[3]));
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const __m512i in_order = _mm512_permutexvar_epi32(order, packed);
      if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(codes + i), in_order);
      } else {
        _mm512_storeu_si512(codes + i, in_order);
      }
    }
    if (whole < count) PlainBody::encode_run<kFormat>(task, row, start + whole, count - whole, scale, codes + whole);
  }

  static void done() { _mm_sfence(); }

 private:
  // w / s, rounded once as a division is. With at most 11 significant bits in both, the remainder w - q s is exact and
  // w / s is at least 2^-11 of a last place away from the middle of two floats, so one correction is enough; a division
  // takes seven times as long.
  static __m512 quotient(__m512 w, __m512 s, __m512 inverse) {
    const __m512 q = _mm512_mul_ps(w, inverse);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, s, w), inverse, q);
  }

  // The codes of quotients with the signs of the weights: correcting a quotient of -0 has made it 0.
  template <Format kFormat>
  static __m512i codes_of(__m512 value, __m512 w) {
    using N = Numbers<kFormat>;
    const auto all = [](uint32_t bits) { return _mm512_set1_epi32(static_cast<int>(bits)); };
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(value), all(0x7fffffffu));
    const __m512i a = _mm512_min_epu32(magnitude, all(N::largest));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(a, N::shift), all(1));
    const __m512i lifted = _mm512_add_epi32(_mm512_add_epi32(a, all((1u << (N::shift - 1)) - 1)), odd);
    const __m512i rounded = _mm512_sub_epi32(_mm512_srli_epi32(lifted, N::shift), all(N::offset));
    const __m512 shifted = _mm512_add_ps(_mm512_castsi512_ps(a), _mm512_set1_ps(N::step_value));
    const __m512i counted = _mm512_sub_epi32(_mm512_castps_si512(shifted), all(N::step));
    const __m512i size = _mm512_mask_mov_epi32(rounded, _mm512_cmplt_epu32_mask(a, all(N::normal)), counted);
    return _mm512_ternarylogic_epi32(size, _mm512_srli_epi32(_mm512_castps_si512(w), 24), all(0x80), 0xf8);
  }
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
