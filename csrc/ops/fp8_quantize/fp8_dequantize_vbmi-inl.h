// Dequantising with AVX-512 VBMI: 64 codes at a time become floats by table look-up.
#include "ops/fp8_quantize/fp8_quantize_avx512-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

struct TableBody {
  static void run(const uint8_t* codes, int64_t count, float scale, Format format, char* out, Dtype dtype,
                  bool stream) {
    // the rounding below takes a NaN for a number; codes give none that it could harm, a scale may
    const int64_t whole = dtype == Dtype::bf16 && scale == scale ? count / 64 * 64 : 0;
    const Decoder decoder(format);
    const __m512 factor = _mm512_set1_ps(scale);
    const bool past = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    for (int64_t i = 0; i < whole; i += 64) {
      __m512 f[4];
      decoder.floats(_mm512_loadu_si512(codes + i), factor, f);
      MUSUBI_UNROLL
      for (int j = 0; j < 4; j += 2) {
        const __m512i halves = bfloats(f[j], f[j + 1]);
        char* const to = out + 2 * i + 32 * j;
        if (past) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(to), halves);
        } else {
          _mm512_storeu_si512(to, halves);
        }
      }
    }
    PlainBody::run(codes + whole, count - whole, scale, format, out + whole * size_of(dtype), dtype, stream);
  }

  static void done() { _mm_sfence(); }

 private:
  // Two vectors as bf16, ties to even; the processor's own conversion would flush what is below bf16's normals.
  static __m512i bfloats(__m512 low, __m512 high) {
    alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(lifted(low), _mm512_load_si512(kUpper), lifted(high));
  }

  static __m512i lifted(__m512 f) {
    const __m512i bits = _mm512_castps_si512(f);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
