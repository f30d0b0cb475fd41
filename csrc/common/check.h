// Checks at the border: what Python passes wrongly becomes a ValueError there, not a crash here.
#pragma once

#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "common/types.h"

namespace musubi {

inline void require(bool holds, const char* what, int64_t given) {
  if (!holds) throw std::invalid_argument(std::string(what) + ", given " + std::to_string(given));
}

inline void* pointer(int64_t address) { return reinterpret_cast<void*>(address); }

inline Dtype dtype_of(int64_t code) {
  require(code >= 0 && code <= 2, "dtype codes are 0 (float32), 1 (bfloat16), 2 (float16)", code);
  return static_cast<Dtype>(code);
}

inline Format format_of(int64_t code) {
  require(code == 0 || code == 1, "format codes are 0 (e4m3) and 1 (e5m2)", code);
  return static_cast<Format>(code);
}

inline Isa isa_of(int64_t code) {
  require(code >= 0 && code < kIsaCount, "ISA codes are 0 to 4", code);
  require(has(static_cast<Isa>(code)), "this processor cannot run that ISA", code);
  return static_cast<Isa>(code);
}

inline Rows rows_of(int64_t data, int64_t rows, int64_t cols, int64_t stride, int64_t dtype) {
  require(rows >= 0, "rows must not be negative", rows);
  require(cols >= 0, "columns must not be negative", cols);
  return Rows{pointer(data), rows, cols, stride, dtype_of(dtype)};
}

inline Fp8Rows fp8_rows_of(int64_t codes, int64_t rows, int64_t cols, int64_t stride, int64_t scale, int64_t scale_row,
                           int64_t scale_block, int64_t block, int64_t scale_dtype, int64_t format) {
  require(rows >= 0 && cols >= 0, "a weight's sides must not be negative", rows < 0 ? rows : cols);
  require(block >= 1, "a block has at least one weight", block);
  Fp8Rows w;
  w.codes = static_cast<const uint8_t*>(pointer(codes));
  w.rows = rows;
  w.cols = cols;
  w.stride = stride;
  w.scale = pointer(scale);
  w.scale_row = scale_row;
  w.scale_block = scale_block;
  w.block = block;
  w.scale_dtype = dtype_of(scale_dtype);
  w.format = format_of(format);
  return w;
}

}  // namespace musubi
