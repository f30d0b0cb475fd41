// What each op adds to the module.
#pragma once

namespace pybind11 {
class module_;
}

namespace musubi {

void bind_fp8_linear(pybind11::module_& module);
void bind_fp8_linear_call(pybind11::module_& module);
void bind_fp8_linear_dynamic(pybind11::module_& module);
void bind_fp8_quantize(pybind11::module_& module);
void bind_fp8_dequantize_call(pybind11::module_& module);

// The same on CUDA devices, in the submodule `cuda`, which exists where nvcc was there at the build.
void bind_fp8_linear_gpu(pybind11::module_& module);
void bind_fp8_quantize_gpu(pybind11::module_& module);

}  // namespace musubi
