#include "common/torch_calls.h"

#include <cstdlib>
#include <utility>

#include "common/check.h"

namespace py = pybind11;

namespace musubi {
namespace {

constexpr int kMostDims = 8;

bool contiguous(const TensorView& t) {
  int64_t expected = 1;
  for (int i = t.dims; i-- > 0;) {
    if (t.shape[i] != 1 && t.strides != nullptr && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return expected > 0;
}

}  // namespace

bool dtype_of_type(int32_t type, Dtype* out) {
  switch (type) {
    case 2 << 8 | 32:
      *out = Dtype::f32;
      return true;
    case 4 << 8 | 16:
      *out = Dtype::bf16;
      return true;
    case 2 << 8 | 16:
      *out = Dtype::f16;
      return true;
    default:
      return false;
  }
}

bool scales_fit(const TensorView& scale, int64_t rows, int64_t cols) {
  switch (scale.dims) {
    case 3:
      return scale.shape[0] == rows && scale.shape[2] == 1 && cols % scale.shape[1] == 0;
    case 2:
      return scale.shape[0] == rows && scale.shape[1] == 1;
    case 1:
      return scale.shape[0] == 1;
    default:
      return scale.dims == 0;
  }
}

Fp8Rows weight_of(const TensorView& q, const TensorView& scale, Dtype scale_dtype) {
  Fp8Rows w;
  w.rows = q.shape[0];
  w.cols = w.stride = w.block = q.shape[1];
  w.scale_dtype = scale_dtype;
  w.format = q.type() == kE4m3Type ? Format::e4m3 : Format::e5m2;
  if (scale.dims == 2) w.scale_row = 1;
  if (scale.dims != 3) return w;
  w.block = w.cols / scale.shape[1];
  w.scale_row = scale.shape[1];
  w.scale_block = 1;
  return w;
}

TorchCalls::TorchCalls(const py::capsule& exchange, py::tuple types, py::tuple watchers, py::object get_num_threads,
                       py::object new_empty)
    : types_(std::move(types)),
      watchers_(std::move(watchers)),
      get_num_threads_(std::move(get_num_threads)),
      new_empty_(std::move(new_empty)) {
  exchange_ = static_cast<const TensorExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  if (exchange_ == nullptr) throw py::error_already_set();
  require(exchange_->major == 1 && exchange_->view != nullptr, "the DLPack exchange API must be 1.x", exchange_->major);
}

bool TorchCalls::free(const py::handle* tensors, int count) const {
  for (int i = 0; i < count; ++i) {
    bool known = tensors[i].is_none();
    for (const py::handle type : types_) {
      known = known || reinterpret_cast<PyObject*>(Py_TYPE(tensors[i].ptr())) == type.ptr();
    }
    if (!known) return false;
  }
  for (const py::handle watcher : watchers_) {
    if (truth(watcher.ptr(), nullptr)) return false;
  }
  return true;
}

bool TorchCalls::view(py::handle tensor, TensorView* out) const {
  if (tensor.is_none()) return false;
  if (exchange_->view(tensor.ptr(), out) != 0) {
    PyErr_Clear();
    return false;
  }
  return out->device_type == 1 && out->lanes == 1 && out->dims <= kMostDims && contiguous(*out);
}

py::object TorchCalls::new_empty(py::handle tensor, const py::tuple& shape, void** data) const {
  py::object made = py::reinterpret_steal<py::object>(
      PyObject_CallFunctionObjArgs(new_empty_.ptr(), tensor.ptr(), shape.ptr(), nullptr));
  TensorView out;
  if (!made || exchange_->view(made.ptr(), &out) != 0) throw py::error_already_set();
  *data = out.data;
  return made;
}

int TorchCalls::threads() const {
  const py::object count = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(get_num_threads_.ptr()));
  if (!count) throw py::error_already_set();
  return static_cast<int>(PyLong_AsLong(count.ptr()));
}

bool TorchCalls::truth(PyObject* function, PyObject* argument) {
  const py::object answer = py::reinterpret_steal<py::object>(
      argument == nullptr ? PyObject_CallNoArgs(function) : PyObject_CallOneArg(function, argument));
  if (!answer) throw py::error_already_set();
  return PyObject_IsTrue(answer.ptr()) != 0;
}

std::string TorchCalls::settings() {
  std::string all;
  for (const char* name : {"MUSUBI_KERNELS", "MUSUBI_KERNELS_ISA", "TRITON_INTERPRET"}) {
    const char* const value = std::getenv(name);
    all.append(value == nullptr ? "" : value).push_back('\n');
  }
  return all;
}

}  // namespace musubi
