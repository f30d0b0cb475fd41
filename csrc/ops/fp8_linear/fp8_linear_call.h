// The parts of the DLPack exchange API (1.x) by which a module that knows no torch reads a tensor's address and sizes
// in C, without a copy and without Python attributes. Layouts are fixed by the standard, so they stand here.
#pragma once

#include <cstdint>

namespace musubi {

struct TensorView {
  void* data;
  int32_t device_type;  // 1: CPU
  int32_t device_id;
  int32_t dims;
  uint8_t kind;  // 2 float, 4 bfloat, 10 float8_e4m3fn, 12 float8_e5m2
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// What the capsule "dlpack_exchange_api" of a tensor type points to.
struct TensorExchange {
  uint32_t major, minor;
  void* older;
  void* allocate;
  void* export_owned;
  void* import_owned;
  int (*view)(void* tensor, TensorView* out);  // 0, or -1 with a Python error set
  void* current_stream;
};

}  // namespace musubi
