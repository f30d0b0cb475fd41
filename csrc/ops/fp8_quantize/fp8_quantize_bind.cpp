#include <pybind11/pybind11.h>

#include "bind.h"
#include "common/check.h"
#include "common/pages.h"
#include "ops/fp8_quantize/fp8_quantize.h"

namespace musubi {
namespace {

void quantize(int64_t isa, int64_t threads, int64_t w, int64_t rows, int64_t cols, int64_t stride, int64_t dtype,
              int64_t width, int64_t format, int64_t scale_dtype, int64_t codes, int64_t scales, bool search) {
  QuantizeTask task;
  task.w = rows_of(w, rows, cols, stride, dtype);
  require(width >= 1 && cols % width == 0, "groups must divide the rows", width);
  task.width = width;
  task.format = format_of(format);
  task.scale_dtype = dtype_of(scale_dtype);
  task.codes = static_cast<uint8_t*>(pointer(codes));
  task.scales = pointer(scales);
  task.search = search;
  task.threads = static_cast<int>(threads);
  const QuantizeKernel kernel = quantize_kernel(isa_of(isa));
  pybind11::gil_scoped_release release;
  constexpr int64_t kLeast = int64_t{4} << 20;  // codes are kept, and seldom read at once
  task.pages = pages_of(task.codes, rows * cols, kLeast);
  kernel(task);
}

void dequantize(int64_t isa, int64_t threads, int64_t codes, int64_t rows, int64_t cols, int64_t stride, int64_t scale,
                int64_t scale_row, int64_t scale_block, int64_t block, int64_t scale_dtype, int64_t format, int64_t out,
                int64_t out_dtype) {
  DequantizeTask task;
  task.w = fp8_rows_of(codes, rows, cols, stride, scale, scale_row, scale_block, block, scale_dtype, format);
  task.out = pointer(out);
  task.out_dtype = dtype_of(out_dtype);
  task.threads = static_cast<int>(threads);
  const DequantizeKernel kernel = dequantize_kernel(isa_of(isa));
  pybind11::gil_scoped_release release;
  dequantize_anew(kernel, task);
}

}  // namespace

void bind_fp8_quantize(pybind11::module_& module) {
  module.def("quantize", &quantize, "FP8 codes and scales of a weight");
  module.def("dequantize", &dequantize, "codes times scales");
}

}  // namespace musubi
