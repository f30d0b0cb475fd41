// The avx512 build of quantise and dequantise.
#define MUSUBI_ISA avx512
#include "common/vec_avx512.h"
#include "ops/fp8_quantize/fp8_dequantize_avx512-inl.h"

namespace musubi {
namespace MUSUBI_ISA {

void quantize(const QuantizeTask& task) { quantize_with<WideBody>(task); }

void dequantize(const DequantizeTask& task) { dequantize_with<TableBody>(task); }

}  // namespace MUSUBI_ISA
}  // namespace musubi
