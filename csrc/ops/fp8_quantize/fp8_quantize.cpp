#include "ops/fp8_quantize/fp8_quantize.h"

#include "common/pages.h"

namespace musubi {

QuantizeKernel quantize_kernel(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::quantize;
    case Isa::avx512:
      return avx512::quantize;
    case Isa::avx512vbmi:
    case Isa::avx512bf16:  // which has nothing to add here
      return avx512vbmi::quantize;
#endif
    case Isa::scalar:
      return scalar::quantize;
    default:
      return nullptr;
  }
}

DequantizeKernel dequantize_kernel(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::dequantize;
    case Isa::avx512:
      return avx512::dequantize;
    case Isa::avx512vbmi:
    case Isa::avx512bf16:
      return avx512vbmi::dequantize;
#endif
    case Isa::scalar:
      return scalar::dequantize;
    default:
      return nullptr;
  }
}

void dequantize_anew(DequantizeKernel kernel, DequantizeTask task) {
  const int64_t bytes = task.w.rows * task.w.cols * size_of(task.out_dtype);
  constexpr int64_t kLeast = int64_t{8} << 20;  // a product reads them next, from a cache if that holds them
  task.pages = pages_of(task.out, bytes, kLeast);
  kernel(task);
}

}  // namespace musubi
