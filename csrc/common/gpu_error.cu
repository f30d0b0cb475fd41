#include "common/gpu.cuh"
#include "common/gpu_error.h"

namespace musubi::gpu {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int use_device(int64_t device) {
  int current = -1;
  const auto asked = cudaGetDevice(&current);
  if (asked == cudaSuccess && current == device) return 0;
  const auto set = cudaSetDevice(static_cast<int>(device));
  if (set != cudaSuccess) (void)cudaGetLastError();
  return static_cast<int>(set);
}

}  // namespace musubi::gpu
