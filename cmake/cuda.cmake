# The CUDA bodies, for the target _C. Where nvcc is missing or does not work with this compiler, the module is built
# without them and says so at run time. The runtime is linked statically, so that the module loads without a driver.
if(NOT MUSUBI_CUDA OR "$ENV{MUSUBI_CUDA}" MATCHES "^(0|OFF|off|no)$")
  message(STATUS "CUDA bodies: switched off by MUSUBI_CUDA")
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(MUSUBI_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(MUSUBI_NVCC)
    set(CMAKE_CUDA_COMPILER "${MUSUBI_NVCC}")
  endif()
endif()
# off: what is generated is said below, since two intermediate forms serve all targets and halve the build
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "CUDA bodies: not built, since no nvcc works here")
  return()
endif()
enable_language(CUDA)

# sm_80 and sm_86 decode FP8 by integer operations, sm_89 and later convert; targets that this nvcc lacks are left out
# and served by the PTX of compute_89, which newer devices compile when the module loads.
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE known)
string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
set(targets "")
set(flags "")
foreach(family "80;86" "89;90;100;120")
  list(GET family 0 virtual)
  set(codes "")
  foreach(number IN LISTS family)
    if("sm_${number}" IN_LIST known)
      list(APPEND codes "sm_${number}")
    endif()
  endforeach()
  if(codes)
    list(APPEND targets ${codes})
    if(virtual EQUAL 89)
      list(APPEND codes "compute_89")
    endif()
    string(REPLACE ";" "," codes "${codes}")
    list(APPEND flags "SHELL:-gencode arch=compute_${virtual},code=[${codes}]")
  endif()
endforeach()
if(NOT targets)
  message(STATUS "CUDA bodies: not built, since ${CMAKE_CUDA_COMPILER} knows none of the targets")
  return()
endif()
string(REPLACE ";" " " targets "${targets}")
message(STATUS "CUDA bodies: ${targets} and PTX")

add_library(musubi_cuda OBJECT
  csrc/common/gpu_error.cu
  csrc/ops/fp8_linear/fp8_linear.cu
  csrc/ops/fp8_quantize/fp8_quantize.cu)
target_include_directories(musubi_cuda PUBLIC csrc)
target_compile_options(musubi_cuda PRIVATE ${flags} -Xfatbin=-compress-all --threads=2)
set_target_properties(musubi_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON POSITION_INDEPENDENT_CODE ON)

target_sources(_C PRIVATE
  csrc/ops/fp8_linear/fp8_linear_bind_gpu.cpp
  csrc/ops/fp8_quantize/fp8_quantize_bind_gpu.cpp)
target_compile_definitions(_C PRIVATE "MUSUBI_CUDA_TARGETS=\"${targets}\"")
target_link_libraries(_C PRIVATE musubi_cuda)
