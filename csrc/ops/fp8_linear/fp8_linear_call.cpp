// A whole call of the forward on CPU tensors in one C++ function: what Python would look at, in a tenth of its code.
//
// A call in Python runs through some 250 KB of interpreter, torch and tensors that have to come from memory when
// nothing is in cache: 0.2 ms, a quarter of what a layer of 3072 x 3072 takes. What is served here was checked by
// Python once (`learn`); whatever differs, and whatever watches calls or wants a gradient, gets None and goes on in
// Python.
#include "ops/fp8_linear/fp8_linear_call.h"

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "bind.h"
#include "common/check.h"
#include "ops/fp8_linear/fp8_linear.h"

namespace py = pybind11;

namespace musubi {
namespace {

constexpr int kMostDims = 8;
constexpr size_t kMostKnown = 4096;

// What checks and choice look at, apart from addresses and rows of x. Compared as bytes.
struct Key {
  int64_t n, k, blocks, scale_dims, bias;
  int32_t x_kind, w_kind, scale_kind, bias_kind;
  bool operator<(const Key& other) const { return std::memcmp(this, &other, sizeof(Key)) < 0; }
};

int32_t kind_of(const TensorView& t) { return t.kind << 8 | t.bits; }

bool dtype_of_kind(int32_t kind, Dtype* out) {
  switch (kind) {
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

const char* address(const TensorView& t) { return static_cast<const char*>(t.data) + t.byte_offset; }

bool contiguous(const TensorView& t) {
  int64_t expected = 1;
  for (int i = t.dims; i-- > 0;) {
    if (t.shape[i] != 1 && t.strides != nullptr && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return expected > 0;
}

class Call {
 public:
  // Everything of torch that a call asks. `watchers` give None, False or 0 where nothing watches.
  Call(const py::capsule& exchange, py::tuple types, py::tuple watchers, py::object is_grad_enabled,
       py::object is_autocast_enabled, py::object get_num_threads, py::object new_empty)
      : types_(std::move(types)),
        watchers_(std::move(watchers)),
        is_grad_enabled_(std::move(is_grad_enabled)),
        is_autocast_enabled_(std::move(is_autocast_enabled)),
        get_num_threads_(std::move(get_num_threads)),
        new_empty_(std::move(new_empty)) {
    exchange_ = static_cast<const TensorExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (exchange_ == nullptr) throw py::error_already_set();
    require(exchange_->major == 1 && exchange_->view != nullptr, "the DLPack exchange API must be 1.x",
            exchange_->major);
  }

  // The product, or None where Python has to look.
  py::object run(py::handle x, py::handle q, py::handle scale, py::handle bias) {
    const py::handle given[] = {x, q, scale, bias};
    if (!plain(given) || watched() || wants_gradient(given) || truth(is_autocast_enabled_.ptr(), cpu_.ptr())) {
      return py::none();
    }
    Views views;
    Key key;
    if (!look(given, &views, &key) || settings_changed()) return py::none();
    const auto found = known_.find(key);
    if (found == known_.end()) return py::none();
    LinearTask task = found->second.task;
    const LinearKernel kernel = found->second.kernel;  // another thread may forget, once this one lets Python go on
    const int dims = views.x.dims;
    py::tuple shape(dims);
    for (int i = 0; i + 1 < dims; ++i) shape[i] = views.x.shape[i];
    shape[dims - 1] = key.n;
    py::object y = py::reinterpret_steal<py::object>(
        PyObject_CallFunctionObjArgs(new_empty_.ptr(), x.ptr(), shape.ptr(), nullptr));
    if (!y) throw py::error_already_set();
    TensorView out;
    if (exchange_->view(y.ptr(), &out) != 0) throw py::error_already_set();
    task.out = out.data;
    task.x.data = address(views.x);
    task.x.rows = 1;
    for (int i = 0; i + 1 < dims; ++i) task.x.rows *= views.x.shape[i];
    task.w.codes = reinterpret_cast<const uint8_t*>(address(views.q));
    task.w.scale = address(views.scale);
    if (!bias.is_none()) task.bias.data = address(views.bias);
    task.threads = static_cast<int>(
        PyLong_AsLong(py::reinterpret_steal<py::object>(PyObject_CallNoArgs(get_num_threads_.ptr())).ptr()));
    {
      py::gil_scoped_release release;
      kernel(task);
    }
    return y;
  }

  // Serve calls like this one, which Python has found to be right, with `isa` as long as the variables stay.
  void learn(py::handle x, py::handle q, py::handle scale, py::handle bias, int64_t isa) {
    const py::handle given[] = {x, q, scale, bias};
    Views views;
    Key key;
    if (!plain(given) || !look(given, &views, &key)) return;
    if (settings_changed() || known_.size() >= kMostKnown) known_.clear();
    settings_ = settings();
    Known known;
    known.kernel = linear_kernel(isa_of(isa));
    LinearTask& task = known.task;
    if (!dtype_of_kind(key.x_kind, &task.x.dtype) || !dtype_of_kind(key.scale_kind, &task.w.scale_dtype)) return;
    task.out_dtype = task.x.dtype;
    task.x.cols = task.x.stride = key.k;
    task.w.rows = key.n;
    task.w.cols = task.w.stride = key.k;
    task.w.block = key.scale_dims == 3 ? key.k / key.blocks : key.k;
    task.w.scale_block = key.scale_dims == 3 ? 1 : 0;
    task.w.scale_row = key.scale_dims == 3 ? key.blocks : key.scale_dims == 2 ? 1 : 0;
    task.w.format = key.w_kind == (10 << 8 | 8) ? Format::e4m3 : Format::e5m2;
    if (key.bias >= 0) {
      task.bias = {nullptr, 1, key.n, 0, Dtype::f32};
      if (!dtype_of_kind(key.bias_kind, &task.bias.dtype)) return;
    }
    known_[key] = known;
  }

  void forget() { known_.clear(); }

 private:
  struct Known {
    LinearTask task;
    LinearKernel kernel = nullptr;
  };
  struct Views {
    TensorView x, q, scale, bias;
  };

  bool plain(const py::handle (&given)[4]) const {
    for (int i = 0; i < 4; ++i) {
      if (i == 3 && given[i].is_none()) continue;
      bool known = false;
      for (const py::handle type : types_)
        known = known || reinterpret_cast<PyObject*>(Py_TYPE(given[i].ptr())) == type.ptr();
      if (!known) return false;
    }
    return true;
  }

  static bool truth(PyObject* function, PyObject* argument) {
    const py::object answer = py::reinterpret_steal<py::object>(
        argument == nullptr ? PyObject_CallNoArgs(function) : PyObject_CallOneArg(function, argument));
    if (!answer) throw py::error_already_set();
    return PyObject_IsTrue(answer.ptr()) != 0;
  }

  bool watched() const {
    for (const py::handle watcher : watchers_) {
      if (truth(watcher.ptr(), nullptr)) return true;
    }
    return false;
  }

  bool wants_gradient(const py::handle (&given)[4]) const {
    if (!truth(is_grad_enabled_.ptr(), nullptr)) return false;
    for (const py::handle each : given) {
      if (each.is_none()) continue;
      const py::object asked = py::reinterpret_steal<py::object>(PyObject_GetAttr(each.ptr(), requires_grad_.ptr()));
      if (!asked) throw py::error_already_set();
      if (asked.ptr() == Py_True) return true;
    }
    return false;
  }

  bool view(py::handle tensor, TensorView* out) const {
    if (exchange_->view(tensor.ptr(), out) != 0) {
      PyErr_Clear();
      return false;
    }
    return out->device_type == 1 && out->lanes == 1 && out->dims <= kMostDims && contiguous(*out);
  }

  // False where a tensor is none that the body takes as it is.
  bool look(const py::handle (&given)[4], Views* views, Key* key) const {
    std::memset(static_cast<void*>(key), 0, sizeof(Key));
    if (!view(given[0], &views->x) || !view(given[1], &views->q) || !view(given[2], &views->scale)) return false;
    const TensorView &x = views->x, &q = views->q, &scale = views->scale;
    const int32_t kind = kind_of(q);
    if (x.dims < 1 || q.dims != 2 || (kind != (10 << 8 | 8) && kind != (12 << 8 | 8))) return false;
    if (x.shape[x.dims - 1] != q.shape[1]) return false;
    *key = Key{q.shape[0],     q.shape[1], scale.dims > 1 ? scale.shape[1] : 1, scale.dims, -1, kind_of(x), kind,
               kind_of(scale), 0};
    const bool fits = scale.dims == 3   ? scale.shape[0] == key->n && scale.shape[2] == 1
                      : scale.dims == 2 ? scale.shape[0] == key->n && scale.shape[1] == 1
                                        : scale.dims == 0 || scale.shape[0] == 1;
    if (!fits || key->k % key->blocks != 0) return false;
    if (given[3].is_none()) return true;
    if (!view(given[3], &views->bias) || views->bias.dims != 1 || views->bias.shape[0] != key->n) return false;
    key->bias = key->n;
    key->bias_kind = kind_of(views->bias);
    return true;
  }

  static std::string settings() {
    std::string all;
    for (const char* name : {"MUSUBI_KERNELS", "MUSUBI_KERNELS_ISA", "TRITON_INTERPRET"}) {
      const char* const value = std::getenv(name);
      all.append(value == nullptr ? "" : value).push_back('\n');
    }
    return all;
  }

  bool settings_changed() const { return settings_ != settings(); }

  const TensorExchange* exchange_ = nullptr;
  py::tuple types_, watchers_;
  py::object is_grad_enabled_, is_autocast_enabled_, get_num_threads_, new_empty_;
  const py::str cpu_{"cpu"}, requires_grad_{"requires_grad"};
  std::string settings_;
  std::map<Key, Known> known_;
};

}  // namespace

void bind_fp8_linear_call(py::module_& module) {
  py::class_<Call>(module, "Call")
      .def(py::init<py::capsule, py::tuple, py::tuple, py::object, py::object, py::object, py::object>())
      .def("run", &Call::run, "The product of (x, q, scale, bias), or None where Python has to look")
      .def("learn", &Call::learn, "Serve calls like this one from now on")
      .def("forget", &Call::forget, "Serve none until they are learnt again");
}

}  // namespace musubi
