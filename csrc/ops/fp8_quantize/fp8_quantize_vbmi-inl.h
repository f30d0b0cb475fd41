// Quantising bf16 weights by bf16 scales with AVX-512 VBMI: codes by table look-up, 64 at a time, with no arithmetic on
// floats at all.
//
// With w = 2^e (1 + m/128) and s = 2^f (1 + c/128), the code of w / s in the format's normal range is that of 2^(e-f)
// plus a step that depends on m and c alone. There are 128 x 128 steps; a scale picks the 128 that one look-up reads.
#include <array>

#include "ops/fp8_quantize/fp8_dequantize_avx512-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr int kMantissas = 128;

// Every second byte of two vectors of words.
constexpr std::array<uint8_t, 64> every_second(size_t first) {
  std::array<uint8_t, 64> places{};
  for (size_t i = 0; i < 64; ++i) places[i] = static_cast<uint8_t>(2 * i + first);
  return places;
}
alignas(64) constexpr std::array<uint8_t, 64> kLowerBytes = every_second(0);
alignas(64) constexpr std::array<uint8_t, 64> kUpperBytes = every_second(1);

// steps[c][m] = code(w / s) - 8 (or 4) (e - f), as a byte
template <Format kFormat>
struct Steps {
  alignas(64) uint8_t of[kMantissas][kMantissas];

  Steps() {
    for (int c = 0; c < kMantissas; ++c) {
      float quotients[kMantissas];
      for (int m = 0; m < kMantissas; ++m) quotients[m] = 1.0f + static_cast<float>(m) / kMantissas;
      encode<kFormat>(quotients, kMantissas, 1.0f + static_cast<float>(c) / kMantissas, of[c]);
    }
  }

  static const Steps& table() {
    static const Steps steps;
    return steps;
  }
};

struct LookUpBody : WideBody {
  static bool serves(const QuantizeTask& task) {
    return task.w.dtype == Dtype::bf16 && task.scale_dtype == Dtype::bf16;
  }

  static uint32_t peak_bits(const void* from, Dtype, int64_t start, int64_t count) {
    return WideBody::peak_bits(from, Dtype::bf16, start, count);
  }
  static MUSUBI_INLINE void peaks(const void* from, Dtype, int64_t start, int64_t width, int count, uint32_t* out) {
    WideBody::peaks(from, Dtype::bf16, start, width, count, out);
  }

  template <Format kFormat>
  void encode_groups(const QuantizeTask& task, const void* row, int64_t start, int count, const float* scales,
                     uint8_t* codes) {
    if (task.width % 64 == 0) {
      encode_whole<kFormat>(task, row, start, task.width / 64, count, scales, codes, task.pages.stream);
    } else if (task.width > 256) {  // several looks at a table of its own
      for (int i = 0; i < count; ++i) {
        const int64_t at = start + i * task.width;
        encode_run<kFormat>(task, row, at, task.width, scales[i], codes + at);
      }
    } else {
      by_arithmetic<kFormat>(task, row, start, task.width, count, scales, codes);
    }
  }

  template <Format kFormat>
  void encode_run(const QuantizeTask& task, const void* row, int64_t start, int64_t count, float scale,
                  uint8_t* codes) {
    if (count < 64) return PlainBody::encode_run<kFormat>(task, row, start, count, scale, codes);
    const int64_t skipped = to_next_line(codes, task.pages.stream, count), whole = (count - skipped) / 64;
    alignas(64) uint8_t some[64];
    if (skipped > 0) {
      encode_whole<kFormat>(task, row, start, 1, 1, &scale, some - start, false);
      seam_.finish(codes, _mm512_load_si512(some), skipped);
    }
    encode_whole<kFormat>(task, row, start + skipped, whole, 1, &scale, codes - start, task.pages.stream);
    const int64_t left = count - skipped - 64 * whole;
    if (left > 0) {
      encode_whole<kFormat>(task, row, start + count - 64, 1, 1, &scale, some - (start + count - 64), false);
      seam_.begin(codes + count, _mm512_load_si512(some), left, task.pages.stream && count >= kLeastStreamed);
    }
  }

 private:
  template <Format kFormat>
  void by_arithmetic(const QuantizeTask& task, const void* row, int64_t start, int64_t width, int count,
                     const float* scales, uint8_t* codes) {
    width == 32 ? encode_pairs<kFormat, Dtype::bf16>(task, row, start, count, scales, codes)
                : encode_all<kFormat, Dtype::bf16, true>(task, row, start, width, count, scales, codes);
  }

  // Groups of `per` whole 64s from `start` of a row and of its codes.
  template <Format kFormat>
  void encode_whole(const QuantizeTask& task, const void* row, int64_t start, int64_t per, int64_t count,
                    const float* scales, uint8_t* codes, bool stream) {
    const int64_t all = count * per;
    stream = stream && reinterpret_cast<uintptr_t>(codes + start) % 64 == 0;
    for (int64_t i = 0; (i = look_up<kFormat>(task, row, start, per, i, all, scales, codes, stream)) < all; ++i) {
      const int64_t at = start + 64 * i;
      alignas(64) const float scale[kTogether] = {scales[i / per]};
      by_arithmetic<kFormat>(task, row, at, 64, 1, scale, codes);
    }
  }

  // The 64s from number i on, until all are done or one of them needs arithmetic: gives its number. No call stands in
  // these loops, since it would empty all vector registers.
  template <Format kFormat>
  static MUSUBI_NOINLINE int64_t look_up(const QuantizeTask& task, const void* row, int64_t start, int64_t per,
                                         int64_t i, int64_t all, const float* scales, uint8_t* codes, bool stream) {
    constexpr int kMantissaBits = kFormat == Format::e4m3 ? 3 : 2;
    // w below s 2^least may have a code that is no normal number
    constexpr int kLeast = kFormat == Format::e4m3 ? -5 : -13;
    const __m512i lower = _mm512_load_si512(kLowerBytes.data()), upper = _mm512_load_si512(kUpperBytes.data());
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), sign = byte(0x80);
    const __m512i kept = byte(kFormat == Format::e4m3 ? 0xf8 : 0xfc), largest = byte(Numbers<kFormat>::largest_code);
    const Steps<kFormat>& table = Steps<kFormat>::table();
    const int64_t ahead = weights_ahead(task);
    for (int64_t group = i / per; i < all; ++group) {
      const uint32_t bits = bits_of(scales[group]);
      const int exponent = static_cast<int>(bits >> 23);
      if (exponent + kLeast < 1) return i;
      const uint8_t* const steps = table.of[(bits >> 16) & 127];
      const __m512i steps0 = _mm512_load_si512(steps), steps1 = _mm512_load_si512(steps + 64);
      const __m512i one = _mm512_set1_epi16(static_cast<int16_t>(exponent << 7));
      const __m512i least_normal = _mm512_set1_epi16(static_cast<int16_t>((exponent + kLeast) << 7));
      for (const int64_t end = least(all, (group + 1) * per); i < end; ++i) {
        const int64_t at = start + 64 * i;
        fetch(row, 2 * (at + ahead), 128);
        const uint16_t* const from = static_cast<const uint16_t*>(row) + at;
        const __m512i w0 = _mm512_loadu_si512(from), w1 = _mm512_loadu_si512(from + 32);
        const __m512i a0 = _mm512_and_si512(w0, magnitude), a1 = _mm512_and_si512(w1, magnitude);
        if ((_mm512_cmplt_epu16_mask(a0, least_normal) | _mm512_cmplt_epu16_mask(a1, least_normal)) != 0) return i;
        const __m512i e0 = _mm512_srli_epi16(_mm512_sub_epi16(a0, one), 7 - kMantissaBits);
        const __m512i e1 = _mm512_srli_epi16(_mm512_sub_epi16(a1, one), 7 - kMantissaBits);
        const __m512i exponents = _mm512_and_si512(_mm512_permutex2var_epi8(e0, lower, e1), kept);
        const __m512i step = _mm512_permutex2var_epi8(steps0, _mm512_permutex2var_epi8(w0, lower, w1), steps1);
        const __m512i size = _mm512_min_epu8(_mm512_add_epi8(exponents, step), largest);
        const __m512i signs = _mm512_permutex2var_epi8(w0, upper, w1);
        put64(codes + at, _mm512_ternarylogic_epi32(size, signs, sign, 0xf8), stream);
      }
    }
    return i;
  }

  static __m512i byte(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
