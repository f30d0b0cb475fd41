// Quantise and dequantise on a CUDA device. Each gives the launch's error, 0 for none (common/gpu_error.h has its
// text).
#pragma once

#include <cstdint>

#include "ops/fp8_quantize/fp8_quantize.h"

namespace musubi::gpu {

// As in fp8_quantize.h; `peak` is one zeroed uint32 on the device where one group covers everything, else unused.
int quantize(const QuantizeTask& task, uint32_t* peak, int64_t stream);

// out[rows, cols] = codes * scale, each product rounded once; `codes` may be a slice of a wider matrix.
int dequantize(const DequantizeTask& task, int64_t stream);

}  // namespace musubi::gpu
