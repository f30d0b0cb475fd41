// Dequantising to bf16 with AVX-512: 64 codes at a time become products by table look-up, without arithmetic on floats.
//
// The lower four bits of a code, its mantissa and the end of its exponent, choose one of 16 products, which are
// computed and rounded once for each scale. The three bits above move the exponent of that product by so much that only
// its upper byte changes, and the sign is the sign. So a product is two bytes of two tables, and one addition. Codes
// below 16, some of which are no normal numbers, have products of their own; they are rare (one block of 64 normal
// weights in a hundred has any), so that their tables are made where they are met.
#include <array>

#include "ops/fp8_quantize/fp8_quantize_avx512-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

// A constant that stays in a register: GCC would make it anew for each block.
MUSUBI_INLINE __m512i kept(__m512i constant) {
  asm("" : "+v"(constant));
  return constant;
}

template <size_t kCount>
constexpr std::array<uint8_t, kCount> numbers_from(size_t first, size_t step, size_t period) {
  std::array<uint8_t, kCount> numbers{};
  for (size_t i = 0; i < kCount; ++i) numbers[i] = static_cast<uint8_t>(first + i % period * step);
  return numbers;
}
alignas(64) constexpr std::array<uint8_t, 32> kFirstCodes = numbers_from<32>(0, 1, 32);

alignas(64) constexpr std::array<uint8_t, 64> kThird = numbers_from<64>(2, 4, 16);
alignas(64) constexpr std::array<uint8_t, 64> kFourth = numbers_from<64>(3, 4, 16);

// Of a format; in words of 32 bits what rounds products, in bytes what takes codes apart.
template <Format kFormat>
struct Constants {
  static constexpr bool kE4m3 = kFormat == Format::e4m3;
  // by how much less the three upper bits count in the upper byte of a product than in a code
  static constexpr int kShift = kE4m3 ? 4 : 3;

  const __m512 values = Vec::decode(kFirstCodes.data(), kFormat);  // of codes 0 to 15
  // what is looked up: codes 16 to 31 with none of the three upper bits of their exponents
  const __m512 normal =
      _mm512_mul_ps(Vec::decode(kFirstCodes.data() + 16, kFormat), _mm512_set1_ps(kE4m3 ? 0x1p-2f : 0x1p-4f));
  const __m512i one = kept(_mm512_set1_epi32(1)), half = kept(_mm512_set1_epi32(0x7fff));
  const __m512i third = kept(_mm512_load_si512(kThird.data())), fourth = kept(_mm512_load_si512(kFourth.data()));
  // unpacking bytes takes eight of each quarter of a vector, then the other eight
  const __m512i order = kept(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  const __m512i place = byte(0x0f), size = byte(0x7f), sixteen = byte(16), upper = byte(0x70 >> kShift);
  const __m512i not_finite = byte((kE4m3 ? 0x7f : 0x7c) - 16);  // above codes 16
  const __m512i sign = byte(0x80);

 private:
  static __m512i byte(int value) { return kept(_mm512_set1_epi8(static_cast<char>(value))); }
};

// Sixteen products as two tables of bytes, which stand in each quarter of a vector.
struct Products {
  __m512i lower, upper;

  // Rounded to bf16, ties to even; the processor's own conversion would flush what is below bf16's normals.
  template <Format kFormat>
  static MUSUBI_INLINE Products of(__m512 exact, const Constants<kFormat>& c) {
    const __m512i bits = _mm512_castps_si512(exact);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), c.one);
    const __m512i words = _mm512_add_epi32(_mm512_add_epi32(bits, c.half), odd);
#ifdef __AVX512VBMI__
    return {_mm512_permutexvar_epi8(c.third, words), _mm512_permutexvar_epi8(c.fourth, words)};
#else
    return {_mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_srli_epi32(words, 16))),
            _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_srli_epi32(words, 24)))};
#endif
  }
};

constexpr int64_t kAhead = 2048;  // codes asked for before they are looked up

struct TableBody {
  void decode(const DequantizeTask& task, int64_t n, int64_t k0, int64_t k1) {
    if (task.out_dtype != Dtype::bf16) return PlainBody::decode(task, n, k0, k1);
    task.w.format == Format::e4m3 ? decode_as<Format::e4m3>(task, n, k0, k1) : decode_as<Format::e5m2>(task, n, k0, k1);
  }

  void done() {
    seam_.write_out();
    _mm_sfence();
  }

 private:
  // Scales by which no product of a finite code, nor a step on the way, leaves the normal numbers of bf16.
  static bool ordinary(uint32_t scale_bits) { return scale_bits >= 24u << 23 && scale_bits < 230u << 23; }

  template <Format kFormat>
  void decode_as(const DequantizeTask& task, int64_t n, int64_t k0, int64_t k1) {
    const Fp8Rows& w = task.w;
    uint16_t* const out = static_cast<uint16_t*>(task.out) + n * w.cols;
    for (int64_t k = k0; (k = look_up<kFormat>(task, n, k, k1)) < k1;) {
      const int64_t end = least(least(k1, (k / w.block + 1) * w.block), k + 32);
      PlainBody::run(w.codes + n * w.stride + k, end - k, scale_of(w, n, k / w.block), w.format,
                     reinterpret_cast<char*>(out + k), Dtype::bf16);
      k = end;
    }
  }

  // Codes from k on of a row, 64 at a time, then 32 and what is left of a longer block; gives where others begin: k1,
  // or codes that are not finite, too few of a block, or under no ordinary scale. No call stands in these loops, since
  // it would empty all vector registers.
  template <Format kFormat>
  MUSUBI_NOINLINE int64_t look_up(const DequantizeTask& task, int64_t n, int64_t k, int64_t k1) {
    const Fp8Rows w = task.w;  // a copy, which no store to `out` could change
    const uint8_t* const codes = w.codes + n * w.stride;
    uint8_t* const out = static_cast<uint8_t*>(task.out) + 2 * n * w.cols;
    const Constants<kFormat> c;
    for (int64_t block = k / w.block, end = block * w.block; k < k1; ++block) {
      end = least(k1, end + w.block);
      const uint32_t bits = scale_bits(w, n * w.scale_row + block * w.scale_block);
      if (!ordinary(bits)) return k;
      const __m512 scale = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits)));
      const Products products = Products::of(_mm512_mul_ps(c.normal, scale), c);
      __m512i lower, upper;
      const int64_t first = k, skipped = to_next_line(out + 2 * k, task.pages.stream, 2 * (end - k)) / 2;
      if (skipped > 0) {
        if (!look_up(half_of(codes + k, c), products, scale, c, &lower, &upper)) return k;
        seam_.finish(out + 2 * k, _mm512_unpacklo_epi8(lower, upper), 2 * skipped);
        k += skipped;
      }
      const bool whole_lines = w.block % 32 == 0 || skipped > 0 || 2 * (end - k) >= kLeastStreamed;
      const bool stream = task.pages.stream && whole_lines && reinterpret_cast<uintptr_t>(out + 2 * k) % 64 == 0;
      for (; k + 64 <= end; k += 64) {
        fetch(codes, k + kAhead, 1);
        const __m512i x = _mm512_permutexvar_epi64(c.order, _mm512_loadu_si512(codes + k));
        if (!look_up(x, products, scale, c, &lower, &upper)) return k;
        put64(out + 2 * k, _mm512_unpacklo_epi8(lower, upper), stream);
        put64(out + 2 * k + 64, _mm512_unpackhi_epi8(lower, upper), stream);
      }
      if (k + 32 <= end) {
        if (!look_up(half_of(codes + k, c), products, scale, c, &lower, &upper)) return k;
        put64(out + 2 * k, _mm512_unpacklo_epi8(lower, upper), stream);
        k += 32;
      }
      if (k < end) {
        if (k - first < 32) return k;
        if (!look_up(half_of(codes + end - 32, c), products, scale, c, &lower, &upper)) return k;
        seam_.begin(out + 2 * end, _mm512_unpacklo_epi8(lower, upper), 2 * (end - k), stream);
        k = end;
      }
    }
    return k;
  }

  // 32 codes, twice, in the order of unpacking: the products of all are in its lower half.
  template <Format kFormat>
  static MUSUBI_INLINE __m512i half_of(const uint8_t* codes, const Constants<kFormat>& c) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return _mm512_permutexvar_epi64(c.order, _mm512_broadcast_i64x4(half));
  }

  // The bits of a scale as a float. bf16 stays out of the vector registers on the way.
  static MUSUBI_INLINE uint32_t scale_bits(const Fp8Rows& w, int64_t i) {
    if (w.scale_dtype != Dtype::bf16) return bits_of(Vec::one(w.scale, w.scale_dtype, i));
    uint16_t half;
    std::memcpy(&half, static_cast<const uint16_t*>(w.scale) + i, 2);
    return static_cast<uint32_t>(half) << 16;
  }

  // The two bytes of each product of 64 codes; false where a code is not finite.
  template <Format kFormat>
  static MUSUBI_INLINE bool look_up(__m512i x, const Products& products, __m512 scale, const Constants<kFormat>& c,
                                    __m512i* lower, __m512i* upper) {
    const __m512i place = _mm512_and_si512(x, c.place);
    const __m512i over = _mm512_sub_epi8(_mm512_and_si512(x, c.size), c.sixteen);
    const __mmask64 rare = _mm512_cmpge_epu8_mask(over, c.not_finite);
    *lower = _mm512_shuffle_epi8(products.lower, place);
    *upper = _mm512_shuffle_epi8(products.upper, place);
    if (__builtin_expect(rare != 0, 0)) {
      // what is below 16 has wrapped
      if (_mm512_mask_cmplt_epu8_mask(rare, over, c.sign) != 0) return false;
      const Products small = Products::of(_mm512_mul_ps(c.values, scale), c);
      *lower = _mm512_mask_shuffle_epi8(*lower, rare, small.lower, place);
      *upper = _mm512_mask_shuffle_epi8(*upper, rare, small.upper, place);
    }
    const __m512i higher =
        _mm512_add_epi8(*upper, _mm512_and_si512(_mm512_srli_epi16(x, Constants<kFormat>::kShift), c.upper));
    *upper = _mm512_ternarylogic_epi32(higher, x, c.sign, 0xf8);
    return true;
  }

  Seam seam_;
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
