// What a whole call of an op in C++ asks of torch: who watches calls, and where tensors are. Knows no torch header.
//
// Tensors are read by the DLPack exchange API (1.x): addresses and sizes in C, without a copy and without Python
// attributes. Its layouts are fixed by the standard, so they stand here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/types.h"

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

  const char* address() const { return static_cast<const char*>(data) + byte_offset; }
  int32_t type() const { return kind << 8 | bits; }
};

constexpr int32_t kE4m3Type = 10 << 8 | 8, kE5m2Type = 12 << 8 | 8;

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

// False where `type` is none that a kernel reads.
bool dtype_of_type(int32_t type, Dtype* out);

// Whether contiguous scales belong to a weight [rows, cols], in any layout.
bool scales_fit(const TensorView& scale, int64_t rows, int64_t cols);

// A contiguous weight and its scales as the kernels take them, without addresses.
Fp8Rows weight_of(const TensorView& q, const TensorView& scale, Dtype scale_dtype);

class TorchCalls {
 public:
  // `watchers` give None, False or 0 where nothing watches; `types` are those of tensors that hide nothing.
  TorchCalls(const pybind11::capsule& exchange, pybind11::tuple types, pybind11::tuple watchers,
             pybind11::object get_num_threads, pybind11::object new_empty);

 protected:
  // Whether a call with these tensors, some of them None, may be served here: nothing watches, nothing is hidden.
  bool free(const pybind11::handle* tensors, int count) const;
  // False where it is no contiguous CPU tensor with elements.
  bool view(pybind11::handle tensor, TensorView* out) const;
  // tensor.new_empty(shape), and where it is.
  pybind11::object new_empty(pybind11::handle tensor, const pybind11::tuple& shape, void** data) const;
  int threads() const;

  static bool truth(PyObject* function, PyObject* argument);
  // The variables that choose a backend of the CPU.
  static std::string settings();

 private:
  const TensorExchange* exchange_ = nullptr;
  pybind11::tuple types_, watchers_;
  pybind11::object get_num_threads_, new_empty_;
};

}  // namespace musubi
