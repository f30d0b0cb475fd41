// The task of a product from the integers that Python passes: addresses, sizes, strides and dtype codes.
#pragma once

#include "common/check.h"
#include "ops/fp8_linear/fp8_linear.h"

namespace musubi {

// `out` gets x's dtype unless the caller says otherwise; `low` 0 means no low-rank tail.
inline LinearTask linear_task_of(bool transposed,  //
                                 int64_t x, int64_t x_rows, int64_t x_cols, int64_t x_stride, int64_t x_dtype,
                                 int64_t codes, int64_t w_rows, int64_t w_cols, int64_t w_stride, int64_t scale,
                                 int64_t scale_row, int64_t scale_block, int64_t block, int64_t scale_dtype,
                                 int64_t format, int64_t bias, int64_t bias_dtype, int64_t low, int64_t low_stride,
                                 int64_t low_dtype, int64_t tail, int64_t tail_stride, int64_t tail_dtype, int64_t rank,
                                 double strength, int64_t out) {
  LinearTask task;
  task.transposed = transposed;
  task.x = rows_of(x, x_rows, x_cols, x_stride, x_dtype);
  task.w = fp8_rows_of(codes, w_rows, w_cols, w_stride, scale, scale_row, scale_block, block, scale_dtype, format);
  require(x_cols == (transposed ? w_rows : w_cols), "x and the weight disagree about the contraction", x_cols);
  task.bias = rows_of(bias, 1, task.outputs(), 0, bias_dtype);
  if (low != 0) {
    task.low = rows_of(low, x_rows, rank, low_stride, low_dtype);
    task.tail = transposed ? rows_of(tail, rank, w_cols, tail_stride, tail_dtype)
                           : rows_of(tail, w_rows, rank, tail_stride, tail_dtype);
    task.strength = static_cast<float>(strength);
  }
  task.out = pointer(out);
  task.out_dtype = task.x.dtype;
  return task;
}

// `low` of this task is made first, from a small matrix and with an optional mask [M, R] of low's dtype; 0: it is not.
inline void make_low_from(LinearTask* task, int64_t low_from, int64_t stride, int64_t dtype, int64_t mask,
                          double factor) {
  if (low_from == 0) return;
  Rows& low = task->low;
  const int64_t contraction = task->x.cols;
  task->low_from = task->transposed ? rows_of(low_from, contraction, low.cols, stride, dtype)
                                    : rows_of(low_from, low.cols, contraction, stride, dtype);
  if (mask != 0) task->low_mask = {pointer(mask), low.rows, low.cols, low.cols, low.dtype};
  task->low_factor = static_cast<float>(factor);
  task->low_out = const_cast<void*>(low.data);
}

}  // namespace musubi
