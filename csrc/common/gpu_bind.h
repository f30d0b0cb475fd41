// What the CUDA bindings share: the device of a launch, and its error as an exception.
#pragma once

#include <stdexcept>
#include <string>

#include "common/gpu_error.h"

namespace musubi::gpu {

// RuntimeError in Python, with the launch's name and sizes.
inline void require_launched(int error, const std::string& what) {
  if (error != 0) throw std::runtime_error(what + ": CUDA says: " + error_text(error));
}

inline std::string sizes(const char* name, int64_t m, int64_t n, int64_t k) {
  return std::string(name) + " with M = " + std::to_string(m) + ", N = " + std::to_string(n) +
         ", K = " + std::to_string(k);
}

}  // namespace musubi::gpu
