// The host run behind C functions with the arguments of the CUDA binding, so that Python's half is tested without a
// device. Each gives null, or what went wrong.
#include <string>

#include "common/check.h"
#include "host_cuda/run.h"
#include "ops/fp8_linear/fp8_linear_args.h"
#include "ops/fp8_linear/fp8_linear_gpu.h"
#include "ops/fp8_quantize/fp8_quantize_gpu.h"

namespace {

template <class Call>
const char* told(const Call& call) {
  static std::string text;
  try {
    call();
    text = musubi::host::take_error();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.empty() ? nullptr : text.c_str();
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* host_linear(bool small, bool transposed, int64_t x, int64_t x_rows, int64_t x_cols,
                                 int64_t x_stride, int64_t x_dtype,                                               //
                                 int64_t codes, int64_t w_rows, int64_t w_cols, int64_t w_stride, int64_t scale,  //
                                 int64_t scale_row, int64_t scale_block, int64_t block, int64_t scale_dtype,
                                 int64_t format,  //
                                 int64_t bias, int64_t bias_dtype, int64_t low, int64_t low_stride, int64_t low_dtype,
                                 int64_t tail, int64_t tail_stride, int64_t tail_dtype, int64_t rank, double strength,
                                 int64_t out) {
  return told([&] {
    const musubi::LinearTask task =
        musubi::linear_task_of(transposed, x, x_rows, x_cols, x_stride, x_dtype, codes, w_rows, w_cols, w_stride, scale,
                               scale_row, scale_block, block, scale_dtype, format, bias, bias_dtype, low, low_stride,
                               low_dtype, tail, tail_stride, tail_dtype, rank, strength, out);
    musubi::require(small ? musubi::gpu::small_serves(task) : musubi::gpu::tile_serves(task), "not served; rows",
                    x_rows);
    small ? musubi::gpu::linear_small(task, 0) : musubi::gpu::linear_tile(task, 0);
  });
}

EXPORTED const char* host_quantize(int64_t w, int64_t rows, int64_t cols, int64_t stride, int64_t dtype, int64_t width,
                                   int64_t format, int64_t scale_dtype, int64_t codes, int64_t scales, int64_t peak) {
  return told([&] {
    musubi::QuantizeTask task;
    task.w = musubi::rows_of(w, rows, cols, stride, dtype);
    task.width = width;
    task.format = musubi::format_of(format);
    task.scale_dtype = musubi::dtype_of(scale_dtype);
    task.codes = static_cast<uint8_t*>(musubi::pointer(codes));
    task.scales = musubi::pointer(scales);
    musubi::gpu::quantize(task, static_cast<uint32_t*>(musubi::pointer(peak)), 0);
  });
}

EXPORTED const char* host_dequantize(int64_t codes, int64_t rows, int64_t cols, int64_t stride, int64_t scale,
                                     int64_t scale_row, int64_t scale_block, int64_t block, int64_t scale_dtype,
                                     int64_t format, int64_t out, int64_t out_dtype) {
  return told([&] {
    musubi::DequantizeTask task;
    task.w = musubi::fp8_rows_of(codes, rows, cols, stride, scale, scale_row, scale_block, block, scale_dtype, format);
    task.out = musubi::pointer(out);
    task.out_dtype = musubi::dtype_of(out_dtype);
    musubi::gpu::dequantize(task, 0);
  });
}
