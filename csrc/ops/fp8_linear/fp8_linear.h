// y = x W^T and dX = dY W with W in FP8, both with an optional low-rank tail: one task, one function per ISA.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace musubi {

// out[M, J] = x[M, C] * P + bias + strength * low[M, R] * tail, rounded once to out's dtype, summed in float32.
// Forward (`transposed` false): P = W^T, so J = W.rows, C = W.cols, and tail = up[N, R]^T.
// Input gradient (`transposed` true): P = W, so J = W.cols, C = W.rows, and tail = down[R, K].
struct LinearTask {
  Rows x;
  Fp8Rows w;
  bool transposed = false;
  Rows bias;  // one row of J, or no data
  Rows low;   // the low-rank activation [M, R]; no data: none
  Rows tail;
  float strength = 0.0f;
  // With data here `low` is made first, at `low_out`, which is where low.data points to: x * low_from, times low_factor
  // and the mask, rounded once to low's dtype. Forward: low_from = down [R, C]^T; input gradient: up [C, R].
  Rows low_from;
  Rows low_mask;  // [M, R], or no data
  float low_factor = 1.0f;
  void* low_out = nullptr;
  void* out = nullptr;  // rows of J, contiguous
  Dtype out_dtype = Dtype::f32;
  int threads = 1;

  int64_t outputs() const { return transposed ? w.cols : w.rows; }
};

using LinearKernel = void (*)(const LinearTask&);

// The kernel of `isa`, or null where this build has none.
LinearKernel linear_kernel(Isa isa);

namespace scalar {
void linear(const LinearTask& task);
}
namespace avx2 {
void linear(const LinearTask& task);
}
namespace avx512 {
void linear(const LinearTask& task);
}
namespace avx512vbmi {
void linear(const LinearTask& task);
}
namespace avx512bf16 {
void linear(const LinearTask& task);
}

}  // namespace musubi
