# The CUDA kernels compiled by the C++ compiler and run by fibers on the CPU (csrc/host_cuda/run.h): a program of tests
# and a library that Python loads, each with the FP8 decoding of sm_80 (by integers) and of sm_89 (by conversion).
find_path(MUSUBI_CUDA_HEADERS cuda_fp8.h HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES include
          REQUIRED)

foreach(target 80 89)
  add_library(host_cuda_${target} OBJECT
    csrc/host_cuda/run.cpp
    csrc/host_cuda/host_api.cpp
    csrc/ops/fp8_linear/fp8_linear.cu
    csrc/ops/fp8_quantize/fp8_quantize.cu)
  target_include_directories(host_cuda_${target} PUBLIC csrc)
  target_include_directories(host_cuda_${target} SYSTEM PUBLIC ${MUSUBI_CUDA_HEADERS})
  target_compile_definitions(host_cuda_${target} PUBLIC MUSUBI_HOST_RUN)
  if(target EQUAL 89)
    target_compile_definitions(host_cuda_${target} PUBLIC MUSUBI_HAS_FP8_CONVERSION=1)
  endif()
  # kernels read what they wrote as other types, as nvcc allows; visible, so that a test can name those that ran
  target_compile_options(host_cuda_${target} PUBLIC -O2 -Wall -Wextra -Wno-unknown-pragmas -Wno-clobbered -fno-strict-aliasing
                         -fvisibility=default)
  if(MUSUBI_WERROR)
    target_compile_options(host_cuda_${target} PUBLIC -Werror)
  endif()
  if(MUSUBI_SANITIZE)
    target_compile_options(host_cuda_${target} PUBLIC -fsanitize=${MUSUBI_SANITIZE} -fno-omit-frame-pointer)
    target_link_options(host_cuda_${target} PUBLIC -fsanitize=${MUSUBI_SANITIZE})
  endif()

  add_executable(host_cuda_tests_${target} csrc/host_cuda/host_test.cpp)
  set_target_properties(host_cuda_tests_${target} PROPERTIES ENABLE_EXPORTS ON)
  target_link_libraries(host_cuda_tests_${target} PRIVATE host_cuda_${target} ${CMAKE_DL_LIBS})
endforeach()
set_source_files_properties(csrc/ops/fp8_linear/fp8_linear.cu csrc/ops/fp8_quantize/fp8_quantize.cu PROPERTIES
                            LANGUAGE CXX COMPILE_OPTIONS "-xc++")

add_library(host_cuda SHARED $<TARGET_OBJECTS:host_cuda_80>)
target_link_libraries(host_cuda PRIVATE ${CMAKE_DL_LIBS})
