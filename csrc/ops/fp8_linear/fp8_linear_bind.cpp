#include <pybind11/pybind11.h>

#include "bind.h"
#include "ops/fp8_linear/fp8_linear_args.h"

namespace musubi {
namespace {

void linear(int64_t isa, bool transposed, int64_t threads,                                               //
            int64_t x, int64_t x_rows, int64_t x_cols, int64_t x_stride, int64_t x_dtype,                //
            int64_t codes, int64_t w_rows, int64_t w_cols, int64_t w_stride, int64_t scale,              //
            int64_t scale_row, int64_t scale_block, int64_t block, int64_t scale_dtype, int64_t format,  //
            int64_t bias, int64_t bias_dtype, int64_t low, int64_t low_stride, int64_t low_dtype, int64_t tail,
            int64_t tail_stride, int64_t tail_dtype, int64_t rank, double strength, int64_t out, int64_t out_dtype) {
  LinearTask task = linear_task_of(transposed, x, x_rows, x_cols, x_stride, x_dtype, codes, w_rows, w_cols, w_stride,
                                   scale, scale_row, scale_block, block, scale_dtype, format, bias, bias_dtype, low,
                                   low_stride, low_dtype, tail, tail_stride, tail_dtype, rank, strength, out);
  task.threads = static_cast<int>(threads);
  task.out_dtype = dtype_of(out_dtype);
  const LinearKernel kernel = linear_kernel(isa_of(isa));
  pybind11::gil_scoped_release release;
  kernel(task);
}

}  // namespace

void bind_fp8_linear(pybind11::module_& module) {
  module.def("linear", &linear, "out = x P + bias + strength * low * tail, with P = W^T or W in FP8");
}

}  // namespace musubi
