// Dequantising to bf16 with AVX-512: 32 codes at a time become products by table look-up, without arithmetic on floats.
//
// Products of one scale and numbers of equal mantissa differ by their exponents alone. So 16 products are computed and
// rounded for each scale, and with their exponents moved they make two tables of 32: of the codes below 32, some of
// which are no normal numbers, and of the others, all of which have the mantissas of codes 32 to 63.
#include <array>

#include "ops/fp8_quantize/fp8_quantize_avx512-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

// Words of a table: which of the 16 products each is made of, as a word of their upper halves, and what to add to it.
struct Recipe {
  alignas(64) std::array<uint16_t, 32> from;
  alignas(64) std::array<uint16_t, 32> plus;
};

// Of the 32 codes from `first`, less what the code's upper two bits are worth.
constexpr Recipe recipe_of(unsigned first, unsigned mantissa_bits) {
  Recipe recipe{};
  const unsigned normal = 1u << mantissa_bits;  // the least normal code
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned code = first + i, product = code < 16 ? code : normal + code % normal;
    recipe.from[i] = static_cast<uint16_t>(2 * product + 1);
    recipe.plus[i] = static_cast<uint16_t>(((code - product - (first & 0x60)) >> mantissa_bits) << 7);
  }
  return recipe;
}

template <Format kFormat>
struct Table {
  static constexpr unsigned kMantissaBits = kFormat == Format::e4m3 ? 3 : 2;
  static constexpr Recipe low = recipe_of(0, kMantissaBits), high = recipe_of(32, kMantissaBits);
  // magnitudes from here on are infinite or no numbers
  static constexpr int16_t kNotFinite = kFormat == Format::e4m3 ? 0x7f : 0x7c;
};

alignas(64) constexpr std::array<uint8_t, 16> kFirstCodes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct TableBody {
  static void decode(const DequantizeTask& task, int64_t n, int64_t k0, int64_t k1) {
    if (task.out_dtype != Dtype::bf16) return PlainBody::decode(task, n, k0, k1);
    task.w.format == Format::e4m3 ? decode_as<Format::e4m3>(task, n, k0, k1) : decode_as<Format::e5m2>(task, n, k0, k1);
  }

  static void done() { _mm_sfence(); }

 private:
  // Scales by which no product of a finite code, nor a step on the way, leaves the normal numbers of bf16.
  static bool ordinary(float scale) {
    const uint32_t bits = bits_of(scale);
    return bits >= 24u << 23 && bits < 230u << 23;
  }

  template <Format kFormat>
  static void decode_as(const DequantizeTask& task, int64_t n, int64_t k0, int64_t k1) {
    const Fp8Rows& w = task.w;
    uint16_t* const out = static_cast<uint16_t*>(task.out) + n * w.cols;
    for (int64_t k = k0; (k = look_up<kFormat>(task, n, k, k1)) < k1;) {
      const int64_t end = least(least(k1, (k / w.block + 1) * w.block), k + 32);
      PlainBody::run(w.codes + n * w.stride + k, end - k, scale_of(w, n, k / w.block), w.format,
                     reinterpret_cast<char*>(out + k), Dtype::bf16);
      k = end;
    }
  }

  // Codes from k on of a row, 32 at a time; gives where others begin: k1, or codes that are not finite, too few of a
  // block, or under no ordinary scale. No call stands in these loops, since it would empty all vector registers.
  template <Format kFormat>
  static MUSUBI_NOINLINE int64_t look_up(const DequantizeTask& task, int64_t n, int64_t k, int64_t k1) {
    using T = Table<kFormat>;
    const Fp8Rows& w = task.w;
    const uint8_t* const codes = w.codes + n * w.stride;
    uint16_t* const out = static_cast<uint16_t*>(task.out) + n * w.cols;
    const bool stream = task.stream && reinterpret_cast<uintptr_t>(out) % 64 == 0 && w.block % 32 == 0;
    const auto all = [](int word) { return _mm512_set1_epi16(static_cast<int16_t>(word)); };
    const auto load = [](const std::array<uint16_t, 32>& words) { return _mm512_load_si512(words.data()); };
    const __m512 first = Vec::decode(kFirstCodes.data(), kFormat);
    for (int64_t block = k / w.block; k < k1; ++block) {
      const int64_t end = least(k1, (block + 1) * w.block);
      const float scale = scale_of(w, n, block);
      if (!ordinary(scale)) return k;
      const __m512i products = rounded(_mm512_mul_ps(first, _mm512_set1_ps(scale)));
      const __m512i low = _mm512_add_epi16(_mm512_permutexvar_epi16(load(T::low.from), products), load(T::low.plus));
      const __m512i high = _mm512_add_epi16(_mm512_permutexvar_epi16(load(T::high.from), products), load(T::high.plus));
      for (; k + 32 <= end; k += 32) {
        const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + k)));
        if (_mm512_cmpge_epu16_mask(_mm512_and_si512(x, all(0x7f)), all(T::kNotFinite)) != 0) return k;
        const __m512i of_high = _mm512_permutexvar_epi16(x, high);  // by the lower five bits
        const __mmask32 is_low = _mm512_testn_epi16_mask(x, all(0x60));
        const __m512i of_either = _mm512_mask_permutexvar_epi16(of_high, is_low, x, low);
        const __m512i upper = _mm512_slli_epi16(_mm512_and_si512(x, all(0x60)), 7 - T::kMantissaBits);
        const __m512i size = _mm512_add_epi16(of_either, upper);
        const __m512i done = _mm512_ternarylogic_epi32(size, _mm512_slli_epi16(x, 8), all(0x8000), 0xf8);
        put64(reinterpret_cast<uint8_t*>(out + k), done, stream);
      }
      if (k < end) return k;
    }
    return k;
  }

  // bf16 in the upper halves, ties to even; the processor's own conversion would flush what is below bf16's normals.
  static MUSUBI_INLINE __m512i rounded(__m512 f) {
    const __m512i bits = _mm512_castps_si512(f);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
