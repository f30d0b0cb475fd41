#include "ops/fp8_linear_dynamic/fp8_linear_dynamic.h"

namespace musubi {

DynamicKernel dynamic_kernel(Isa isa) {
#if defined(__x86_64__)
  // the build with bf16 products has nothing to add to integer ones
  if (isa == Isa::avx512vbmi || isa == Isa::avx512bf16) return avx512vbmi::linear_dynamic;
#endif
  static_cast<void>(isa);
  return nullptr;
}

}  // namespace musubi
