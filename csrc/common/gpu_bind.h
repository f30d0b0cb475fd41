// What the CUDA bindings share: the device of a launch, and its error as an exception.
#pragma once

#include <stdexcept>
#include <string>

#include "common/gpu_error.h"

namespace musubi::gpu {

struct Launch {
  const char* name;
  int64_t m, n, k;
};

// RuntimeError in Python, with the launch's name and sizes.
inline void require_launched(int error, const Launch& launch) {
  if (error == 0) return;
  throw std::runtime_error(std::string(launch.name) + " with M = " + std::to_string(launch.m) +
                           ", N = " + std::to_string(launch.n) + ", K = " + std::to_string(launch.k) +
                           ": CUDA says: " + error_text(error));
}

}  // namespace musubi::gpu
