// The avx512vbmi build of quantise and dequantise.
#define MUSUBI_ISA avx512vbmi
#include "common/vec_avx512.h"
#include "ops/fp8_quantize/fp8_quantize_vbmi-inl.h"

namespace musubi {
namespace MUSUBI_ISA {

void quantize(const QuantizeTask& task) {
  if (!LookUpBody::serves(task)) return avx512::quantize(task);  // the same code, compiled once
  quantize_with<LookUpBody>(task);
}

void dequantize(const DequantizeTask& task) { dequantize_with<TableBody>(task); }

}  // namespace MUSUBI_ISA
}  // namespace musubi
