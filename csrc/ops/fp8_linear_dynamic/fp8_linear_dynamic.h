// y = x W^T + bias with each row of x in integers of eight bits: one task, bodies where the processor multiplies those.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace musubi {

struct DynamicTask {
  Rows x;
  Fp8Rows w;
  Rows bias;            // one row of w.rows, or no data
  void* out = nullptr;  // rows of w.rows, contiguous
  Dtype out_dtype = Dtype::f32;
  int threads = 1;
};

constexpr int64_t kLargestDynamicBlock = 32768;  // codes under one scale: their products fit 32 bits

using DynamicKernel = void (*)(const DynamicTask&);

// The kernel of `isa`, or null where that instruction set has none.
DynamicKernel dynamic_kernel(Isa isa);

namespace avx512vbmi {
void linear_dynamic(const DynamicTask& task);
}

}  // namespace musubi
