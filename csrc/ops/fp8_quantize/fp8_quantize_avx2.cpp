// The avx2 build of quantise and dequantise.
#define MUSUBI_ISA avx2
#include "common/vec_avx2.h"
#include "ops/fp8_quantize/fp8_quantize-inl.h"

namespace musubi {
namespace MUSUBI_ISA {

void quantize(const QuantizeTask& task) { quantize_with<PlainBody>(task); }

void dequantize(const DequantizeTask& task) { dequantize_with<PlainBody>(task); }

}  // namespace MUSUBI_ISA
}  // namespace musubi
