// The avx512bf16 build of quantise and dequantise: 64 codes at a time become floats by table look-up.
#define MUSUBI_ISA avx512bf16
// clang-format off: the decoder is written over the vector
#include "common/vec_avx512.h"
#include "common/decode_vbmi.h"
// clang-format on
#include "ops/fp8_quantize/fp8_quantize-inl.h"

namespace musubi {
namespace avx512bf16 {
namespace {

// float32 products rounded to bf16, except that a result below bf16's normals may not be flushed: those are rare enough
// to be left to the general store.
inline bool all_normal(const __m512* f) {
  const __m512 tiny = _mm512_set1_ps(0x1p-126f), zero = _mm512_setzero_ps();
  __mmask16 odd = 0;
  MUSUBI_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 size = _mm512_abs_ps(f[i]);
    odd = static_cast<__mmask16>(
        odd | (_mm512_cmp_ps_mask(size, tiny, _CMP_LT_OQ) & _mm512_cmp_ps_mask(size, zero, _CMP_NEQ_OQ)));
  }
  return odd == 0;
}

void dequantize_chunks(const uint8_t* codes, int64_t count, float scale, Format format, char* out, Dtype dtype) {
  const Decoder decoder(format);
  const __m512 factor = _mm512_set1_ps(scale);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512 f[4];
    decoder.floats(_mm512_loadu_si512(codes + i), factor, f);
    char* const to = out + i * size_of(dtype);
    if (dtype == Dtype::bf16 && all_normal(f)) {
      _mm512_storeu_si512(to, rounded(f[0], f[1]));
      _mm512_storeu_si512(to + 64, rounded(f[2], f[3]));
      continue;
    }
    MUSUBI_UNROLL
    for (int j = 0; j < 4; ++j) Vec::store_as(to, dtype, 16 * j, f[j]);
  }
  dequantize_run(codes + i, count - i, scale, format, out + i * size_of(dtype), dtype);
}

}  // namespace

void quantize(const QuantizeTask& task) { quantize_any(task); }

void dequantize(const DequantizeTask& task) { dequantize_with(task, dequantize_chunks); }

}  // namespace avx512bf16
}  // namespace musubi
