// A whole dequantisation on the CPU in one C++ function. After something that left nothing in cache the way through
// Python takes 0.3 ms, a sixth of what a weight of 3072 x 3072 takes.
#include <string>
#include <utility>

#include "bind.h"
#include "common/check.h"
#include "common/torch_calls.h"
#include "ops/fp8_quantize/fp8_quantize.h"

namespace py = pybind11;

namespace musubi {
namespace {

class DequantizeCall : TorchCalls {
 public:
  DequantizeCall(const py::capsule& exchange, py::tuple types, py::tuple watchers, py::object get_num_threads,
                 py::object new_empty)
      : TorchCalls(exchange, std::move(types), std::move(watchers), std::move(get_num_threads), std::move(new_empty)) {}

  // q times scale in the scale's dtype, or None where Python has to look.
  py::object run(py::handle q, py::handle scale) const {
    const py::handle given[] = {q, scale};
    TensorView codes, scales;
    DequantizeTask task;
    if (kernel_ == nullptr || !free(given, 2) || !view(q, &codes) || !view(scale, &scales)) return py::none();
    if (codes.dims != 2 || (codes.type() != kE4m3Type && codes.type() != kE5m2Type)) return py::none();
    if (!scales_fit(scales, codes.shape[0], codes.shape[1])) return py::none();
    if (!dtype_of_type(scales.type(), &task.out_dtype) || settings_ != settings()) return py::none();
    task.w = weight_of(codes, scales, task.out_dtype);
    task.w.codes = reinterpret_cast<const uint8_t*>(codes.address());
    task.w.scale = scales.address();
    task.threads = threads();
    py::object out = new_empty(scale, py::make_tuple(task.w.rows, task.w.cols), &task.out);
    const DequantizeKernel kernel = kernel_;  // another thread may forget it, once this one lets Python go on
    {
      const py::gil_scoped_release release;
      dequantize_anew(kernel, task);
    }
    return out;
  }

  // Serve weights on the CPU with `isa` as long as the variables stay.
  void learn(int64_t isa) {
    kernel_ = dequantize_kernel(isa_of(isa));
    settings_ = settings();
  }

  void forget() { kernel_ = nullptr; }

 private:
  DequantizeKernel kernel_ = nullptr;
  std::string settings_;
};

}  // namespace

void bind_fp8_dequantize_call(py::module_& module) {
  py::class_<DequantizeCall>(module, "DequantizeCall")
      .def(py::init<py::capsule, py::tuple, py::tuple, py::object, py::object>())
      .def("run", &DequantizeCall::run, "q times scale in the scale's dtype, or None where Python has to look")
      .def("learn", &DequantizeCall::learn, "Serve weights on the CPU from now on")
      .def("forget", &DequantizeCall::forget, "Serve none until told again");
}

}  // namespace musubi
