#include "ops/fp8_linear/fp8_linear.h"

namespace musubi {

LinearKernel linear_kernel(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::linear;
    case Isa::avx512:
      return avx512::linear;
    case Isa::avx512vbmi:
      return avx512vbmi::linear;
    case Isa::avx512bf16:
      return avx512bf16::linear;
#endif
    case Isa::scalar:
      return scalar::linear;
    default:
      return nullptr;
  }
}

}  // namespace musubi
