// The values that cross the border between the binding and the kernels: pointers, sizes, strides, dtypes. No torch.
#pragma once

#include <cstdint>

// Before a loop over registers: without it GCC 12 keeps small arrays of vectors on the stack and stores them every
// turn.
#define MUSUBI_UNROLL _Pragma("GCC unroll 64")
#define MUSUBI_INLINE inline __attribute__((always_inline))
#define MUSUBI_NOINLINE __attribute__((noinline))

namespace musubi {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Format : int { e4m3 = 0, e5m2 = 1 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// A matrix whose rows are contiguous; `stride` counts elements between rows and may be anything, 0 included.
struct Rows {
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  Dtype dtype = Dtype::f32;
};

// An FP8 matrix [rows, cols] with one scale per `block` codes of a row. The scale of code (n, k) is element
// n * scale_row + (k / block) * scale_block of `scale`, so block, channel and tensor layouts differ by strides only.
struct Fp8Rows {
  const uint8_t* codes = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  const void* scale = nullptr;
  int64_t scale_row = 0;
  int64_t scale_block = 0;
  int64_t block = 1;
  Dtype scale_dtype = Dtype::f32;
  Format format = Format::e4m3;
};

}  // namespace musubi
