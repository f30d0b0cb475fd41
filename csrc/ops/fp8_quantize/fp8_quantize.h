// Quantise a weight to FP8 and back, bit for bit as the package's formula says.
#pragma once

#include "common/isa.h"
#include "common/pages.h"
#include "common/types.h"

namespace musubi {

// Groups of `width` neighbouring weights, each with one scale. Row r of `w` holds w.cols / width groups, so block,
// channel and tensor layouts differ by `width` only (tensor: the caller gives one row).
struct QuantizeTask {
  Rows w;
  int64_t width = 1;
  Format format = Format::e4m3;
  Dtype scale_dtype = Dtype::f32;
  bool search = false;       // least squared error over factors of the absmax scale
  uint8_t* codes = nullptr;  // contiguous
  void* scales = nullptr;    // contiguous, one per group, of scale_dtype
  Pages pages;               // those of the codes
  int threads = 1;
};

struct DequantizeTask {
  Fp8Rows w;
  void* out = nullptr;  // contiguous
  Dtype out_dtype = Dtype::f32;
  Pages pages;  // those of `out`
  int threads = 1;
};

using QuantizeKernel = void (*)(const QuantizeTask&);
using DequantizeKernel = void (*)(const DequantizeTask&);

QuantizeKernel quantize_kernel(Isa isa);
DequantizeKernel dequantize_kernel(Isa isa);

// Into memory that may be new: with large pages where there are none yet, past the caches where that is better.
void dequantize_anew(DequantizeKernel kernel, DequantizeTask task);

namespace scalar {
void quantize(const QuantizeTask& task);
void dequantize(const DequantizeTask& task);
}  // namespace scalar
namespace avx2 {
void quantize(const QuantizeTask& task);
void dequantize(const DequantizeTask& task);
}  // namespace avx2
namespace avx512 {
void quantize(const QuantizeTask& task);
void dequantize(const DequantizeTask& task);
}  // namespace avx512
namespace avx512vbmi {
void quantize(const QuantizeTask& task);
void dequantize(const DequantizeTask& task);
}  // namespace avx512vbmi

}  // namespace musubi
