#include <pybind11/pybind11.h>

#include "bind.h"
#include "common/gpu_bind.h"
#include "ops/fp8_linear/fp8_linear_args.h"
#include "ops/fp8_linear/fp8_linear_gpu.h"

namespace musubi {
namespace {

void linear(bool small, int64_t device, int64_t stream, bool transposed,                                 //
            int64_t x, int64_t x_rows, int64_t x_cols, int64_t x_stride, int64_t x_dtype,                //
            int64_t codes, int64_t w_rows, int64_t w_cols, int64_t w_stride, int64_t scale,              //
            int64_t scale_row, int64_t scale_block, int64_t block, int64_t scale_dtype, int64_t format,  //
            int64_t bias, int64_t bias_dtype, int64_t low, int64_t low_stride, int64_t low_dtype, int64_t tail,
            int64_t tail_stride, int64_t tail_dtype, int64_t rank, double strength, int64_t out) {
  const LinearTask task =
      linear_task_of(transposed, x, x_rows, x_cols, x_stride, x_dtype, codes, w_rows, w_cols, w_stride, scale,
                     scale_row, scale_block, block, scale_dtype, format, bias, bias_dtype, low, low_stride, low_dtype,
                     tail, tail_stride, tail_dtype, rank, strength, out);
  require(small ? gpu::small_serves(task) : gpu::tile_serves(task),
          "this kernel has no such dtype, block or number of rows; rows", x_rows);
  const pybind11::gil_scoped_release release;
  const gpu::Launch launch{small ? "linear_small" : "linear_tile", x_rows, w_rows, w_cols};
  gpu::require_launched(gpu::use_device(device), launch);
  gpu::require_launched(small ? gpu::linear_small(task, stream) : gpu::linear_tile(task, stream), launch);
}

}  // namespace

void bind_fp8_linear_gpu(pybind11::module_& module) {
  module.def("linear", &linear, "out = x P + bias + strength * low * tail on a CUDA device, with P = W^T or W in FP8");
  module.attr("small_rows") = gpu::kSmallRows;
  module.attr("small_block") = gpu::kSmallBlock;
  module.attr("tile_block") = gpu::kTileBlock;
}

}  // namespace musubi
