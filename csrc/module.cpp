// musubi_kernels._C: the compiled bodies. It takes addresses, sizes, strides and dtype codes, and knows no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "common/isa.h"
#include "common/pool.h"
#include "common/scratch.h"

PYBIND11_MODULE(_C, module) {
  module.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < musubi::kIsaCount; ++i) {
          const auto isa = static_cast<musubi::Isa>(i);
          if (musubi::has(isa)) names.emplace_back(musubi::name_of(isa));
        }
        if (musubi::has(musubi::Isa::avx512bf16) && musubi::prefers_floats())
          std::swap(names.back(), *(names.end() - 2));
        return names;
      },
      "Instruction sets that this processor can run, the best one last; an op's `isa` is an index into all_isas().");
  module.def(
      "all_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < musubi::kIsaCount; ++i) names.emplace_back(musubi::name_of(static_cast<musubi::Isa>(i)));
        return names;
      },
      "Instruction sets of this build.");
  module.def(
      "settings",
      [] {
        std::string all;
        for (const char* name : {"MUSUBI_KERNELS", "MUSUBI_KERNELS_ISA", "TRITON_INTERPRET", "MUSUBI_KERNELS_PATH",
                                 "MUSUBI_KERNELS_TUNE"}) {
          const char* const value = std::getenv(name);
          all.append(value == nullptr ? "" : value).push_back('\n');
        }
        return all;
      },
      "The variables that choose a backend and its way, one a line: asked for in every call, where os.environ takes 1 "
      "us each.");
  module.def("pool_workers", &musubi::pool_workers, "Worker threads that exist now.");
  module.def("scratch_bytes", &musubi::scratch_bytes, "Bytes of scratch that this thread holds.");
  musubi::bind_fp8_linear(module);
  musubi::bind_fp8_linear_call(module);
  musubi::bind_fp8_linear_dynamic(module);
  musubi::bind_fp8_quantize(module);
  musubi::bind_fp8_dequantize_call(module);
#ifdef MUSUBI_CUDA_TARGETS
  auto cuda = module.def_submodule("cuda", "The bodies for CUDA devices. Importing it asks for no driver.");
  cuda.attr("targets") = MUSUBI_CUDA_TARGETS;
  musubi::bind_fp8_linear_gpu(cuda);
  musubi::bind_fp8_quantize_gpu(cuda);
#endif
}
