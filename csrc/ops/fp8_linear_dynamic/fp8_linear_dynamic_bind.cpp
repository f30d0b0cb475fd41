#include <pybind11/pybind11.h>

#include "bind.h"
#include "common/check.h"
#include "ops/fp8_linear_dynamic/fp8_linear_dynamic.h"

namespace musubi {
namespace {

void linear_dynamic(int64_t isa, int64_t threads, int64_t x, int64_t x_rows, int64_t x_cols, int64_t x_stride,
                    int64_t x_dtype, int64_t codes, int64_t w_rows, int64_t w_cols, int64_t w_stride, int64_t scale,
                    int64_t scale_row, int64_t scale_block, int64_t block, int64_t scale_dtype, int64_t format,
                    int64_t bias, int64_t bias_dtype, int64_t out, int64_t out_dtype) {
  DynamicTask task;
  task.threads = static_cast<int>(threads);
  task.x = rows_of(x, x_rows, x_cols, x_stride, x_dtype);
  task.w = fp8_rows_of(codes, w_rows, w_cols, w_stride, scale, scale_row, scale_block, block, scale_dtype, format);
  require(x_cols == w_cols, "x and the weight disagree about the contraction", x_cols);
  require(block <= kLargestDynamicBlock, "at most 32768 codes share a scale here", block);
  task.bias = rows_of(bias, 1, w_rows, 0, bias_dtype);
  task.out = pointer(out);
  task.out_dtype = dtype_of(out_dtype);
  const DynamicKernel kernel = dynamic_kernel(isa_of(isa));
  require(kernel != nullptr, "this ISA has no integer products", isa);
  pybind11::gil_scoped_release release;
  kernel(task);
}

}  // namespace

void bind_fp8_linear_dynamic(pybind11::module_& module) {
  module.def("linear_dynamic", &linear_dynamic, "out = int8(x) int8(W)^T + bias with W in FP8");
}

}  // namespace musubi
