#include <pybind11/pybind11.h>

#include "bind.h"
#include "common/check.h"
#include "common/gpu_bind.h"
#include "ops/fp8_quantize/fp8_quantize_gpu.h"

namespace musubi {
namespace {

void quantize(int64_t device, int64_t stream, int64_t w, int64_t rows, int64_t cols, int64_t stride, int64_t dtype,
              int64_t width, int64_t format, int64_t scale_dtype, int64_t codes, int64_t scales, int64_t peak) {
  QuantizeTask task;
  task.w = rows_of(w, rows, cols, stride, dtype);
  require(width >= 1 && cols % width == 0, "groups must divide the rows", width);
  task.width = width;
  task.format = format_of(format);
  task.scale_dtype = dtype_of(scale_dtype);
  task.codes = static_cast<uint8_t*>(pointer(codes));
  task.scales = pointer(scales);
  const pybind11::gil_scoped_release release;
  const gpu::Launch launch{"quantize", 1, rows, cols};
  gpu::require_launched(gpu::use_device(device), launch);
  gpu::require_launched(gpu::quantize(task, static_cast<uint32_t*>(pointer(peak)), stream), launch);
}

void dequantize(int64_t device, int64_t stream, int64_t codes, int64_t rows, int64_t cols, int64_t w_stride,
                int64_t scale, int64_t scale_row, int64_t scale_block, int64_t block, int64_t scale_dtype,
                int64_t format, int64_t out, int64_t out_dtype) {
  DequantizeTask task;
  task.w = fp8_rows_of(codes, rows, cols, w_stride, scale, scale_row, scale_block, block, scale_dtype, format);
  task.out = pointer(out);
  task.out_dtype = dtype_of(out_dtype);
  const pybind11::gil_scoped_release release;
  const gpu::Launch launch{"dequantize", 1, rows, cols};
  gpu::require_launched(gpu::use_device(device), launch);
  gpu::require_launched(gpu::dequantize(task, stream), launch);
}

}  // namespace

void bind_fp8_quantize_gpu(pybind11::module_& module) {
  module.def("quantize", &quantize, "FP8 codes and scales of a weight on a CUDA device");
  module.def("dequantize", &dequantize, "codes times scales on a CUDA device");
}

}  // namespace musubi
