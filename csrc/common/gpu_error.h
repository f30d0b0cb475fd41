// What the binding asks of the CUDA runtime, without its headers.
#pragma once

#include <cstdint>

namespace musubi::gpu {

// The text of an error that a launch gave.
const char* error_text(int error);

// Makes `device` current for this thread; gives the error.
int use_device(int64_t device);

}  // namespace musubi::gpu
