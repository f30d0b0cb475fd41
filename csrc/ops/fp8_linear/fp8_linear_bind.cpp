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
            int64_t tail_stride, int64_t tail_dtype, int64_t rank, double strength, int64_t low_from,
            int64_t low_from_stride, int64_t low_from_dtype, int64_t mask, double low_factor, int64_t out,
            int64_t out_dtype) {
  LinearTask task = linear_task_of(transposed, x, x_rows, x_cols, x_stride, x_dtype, codes, w_rows, w_cols, w_stride,
                                   scale, scale_row, scale_block, block, scale_dtype, format, bias, bias_dtype, low,
                                   low_stride, low_dtype, tail, tail_stride, tail_dtype, rank, strength, out);
  make_low_from(&task, low_from, low_from_stride, low_from_dtype, mask, low_factor);
  task.threads = static_cast<int>(threads);
  task.out_dtype = dtype_of(out_dtype);
  const LinearKernel kernel = linear_kernel(isa_of(isa));
  pybind11::gil_scoped_release release;
  kernel(task);
}

// A product with all that does not change from call to call: checked and converted once, so that a call passes
// addresses only. Everything is contiguous.
class Prepared {
 public:
  Prepared(int64_t isa, bool transposed, int64_t x_dtype, int64_t w_rows, int64_t w_cols, int64_t scale_row,
           int64_t scale_block, int64_t block, int64_t scale_dtype, int64_t format)
      : kernel_(linear_kernel(isa_of(isa))) {
    task_.transposed = transposed;
    task_.w = fp8_rows_of(0, w_rows, w_cols, w_cols, 0, scale_row, scale_block, block, scale_dtype, format);
    const int64_t inputs = transposed ? w_rows : w_cols;
    task_.x = rows_of(0, 0, inputs, inputs, x_dtype);
    task_.out_dtype = task_.x.dtype;
  }

  void run(int64_t threads, int64_t x, int64_t rows, int64_t codes, int64_t scale, int64_t bias, int64_t bias_dtype,
           int64_t low, int64_t rank, int64_t tail, int64_t tail_dtype, double strength, int64_t low_from,
           int64_t low_from_dtype, int64_t mask, double low_factor, int64_t out) const {
    LinearTask task = task_;
    task.threads = static_cast<int>(threads);
    task.x.data = pointer(x);
    task.x.rows = rows;
    task.w.codes = static_cast<const uint8_t*>(pointer(codes));
    task.w.scale = pointer(scale);
    task.bias = rows_of(bias, 1, task.outputs(), 0, bias_dtype);
    if (low != 0) {
      task.low = Rows{pointer(low), rows, rank, rank, task.x.dtype};
      task.tail = task.transposed ? rows_of(tail, rank, task.w.cols, task.w.cols, tail_dtype)
                                  : rows_of(tail, task.w.rows, rank, rank, tail_dtype);
      task.strength = static_cast<float>(strength);
      make_low_from(&task, low_from, task.transposed ? rank : task.x.cols, low_from_dtype, mask, low_factor);
    }
    task.out = pointer(out);
    pybind11::gil_scoped_release release;
    kernel_(task);
  }

 private:
  LinearTask task_;
  LinearKernel kernel_;
};

}  // namespace

void bind_fp8_linear(pybind11::module_& module) {
  module.def("linear", &linear, "out = x P + bias + strength * low * tail, with P = W^T or W in FP8");
  pybind11::class_<Prepared>(module, "Linear")
      .def(pybind11::init<int64_t, bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>())
      .def("run", &Prepared::run, "The same on contiguous matrices, by their addresses");
}

}  // namespace musubi
