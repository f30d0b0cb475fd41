// A whole call of the forward on CPU tensors in one C++ function: what Python would look at, in a tenth of its code.
//
// A call in Python runs through some 250 KB of interpreter, torch and tensors that have to come from memory when
// nothing is in cache: 0.2 ms, a quarter of what a layer of 3072 x 3072 takes. What is served here was checked by
// Python once (`learn`); whatever differs, and whatever watches calls or wants a gradient, gets None and goes on in
// Python.
#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "bind.h"
#include "common/check.h"
#include "common/torch_calls.h"
#include "ops/fp8_linear/fp8_linear.h"

namespace py = pybind11;

namespace musubi {
namespace {

constexpr size_t kMostKnown = 4096;

// What checks and choice look at, apart from addresses and rows of x. Compared as bytes.
struct Key {
  int64_t n, k, blocks, scale_dims, bias;
  int32_t x_kind, w_kind, scale_kind, bias_kind;
  bool operator<(const Key& other) const { return std::memcmp(this, &other, sizeof(Key)) < 0; }
};

class Call : TorchCalls {
 public:
  Call(const py::capsule& exchange, py::tuple types, py::tuple watchers, py::object get_num_threads,
       py::object new_empty, py::object is_grad_enabled, py::object is_autocast_enabled)
      : TorchCalls(exchange, std::move(types), std::move(watchers), std::move(get_num_threads), std::move(new_empty)),
        is_grad_enabled_(std::move(is_grad_enabled)),
        is_autocast_enabled_(std::move(is_autocast_enabled)) {}

  // The product, or None where Python has to look.
  py::object run(py::handle x, py::handle q, py::handle scale, py::handle bias) {
    const py::handle given[] = {x, q, scale, bias};
    if (!free(given, 4) || wants_gradient(given) || truth(is_autocast_enabled_.ptr(), cpu_.ptr())) {
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
    py::object y = new_empty(x, shape, &task.out);
    task.x.data = views.x.address();
    task.x.rows = 1;
    for (int i = 0; i + 1 < dims; ++i) task.x.rows *= views.x.shape[i];
    task.w.codes = reinterpret_cast<const uint8_t*>(views.q.address());
    task.w.scale = views.scale.address();
    if (!bias.is_none()) task.bias.data = views.bias.address();
    task.threads = threads();
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
    if (!look(given, &views, &key)) return;
    if (settings_changed() || known_.size() >= kMostKnown) known_.clear();
    settings_ = settings();
    Known known;
    known.kernel = linear_kernel(isa_of(isa));
    LinearTask& task = known.task;
    Dtype scale_dtype;
    if (!dtype_of_type(key.x_kind, &task.x.dtype) || !dtype_of_type(key.scale_kind, &scale_dtype)) return;
    task.out_dtype = task.x.dtype;
    task.x.cols = task.x.stride = key.k;
    task.w = weight_of(views.q, views.scale, scale_dtype);
    if (key.bias >= 0) {
      task.bias = {nullptr, 1, key.n, 0, Dtype::f32};
      if (!dtype_of_type(key.bias_kind, &task.bias.dtype)) return;
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

  // False where a tensor is none that the body takes as it is.
  bool look(const py::handle (&given)[4], Views* views, Key* key) const {
    std::memset(static_cast<void*>(key), 0, sizeof(Key));
    if (!view(given[0], &views->x) || !view(given[1], &views->q) || !view(given[2], &views->scale)) return false;
    const TensorView &x = views->x, &q = views->q, &scale = views->scale;
    if (x.dims < 1 || q.dims != 2 || (q.type() != kE4m3Type && q.type() != kE5m2Type)) return false;
    if (x.shape[x.dims - 1] != q.shape[1] || !scales_fit(scale, q.shape[0], q.shape[1])) return false;
    *key = Key{q.shape[0],   q.shape[1], scale.dims == 3 ? scale.shape[1] : 1, scale.dims, -1, x.type(), q.type(),
               scale.type(), 0};
    if (given[3].is_none()) return true;
    if (!view(given[3], &views->bias) || views->bias.dims != 1 || views->bias.shape[0] != key->n) return false;
    key->bias = key->n;
    key->bias_kind = views->bias.type();
    return true;
  }

  bool settings_changed() const { return settings_ != settings(); }

  py::object is_grad_enabled_, is_autocast_enabled_;
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
