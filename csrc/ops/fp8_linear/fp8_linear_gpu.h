// The products on a CUDA device. Each gives the launch's error, 0 for none (common/gpu_error.h has its text).
#pragma once

#include <cstdint>

#include "ops/fp8_linear/fp8_linear.h"

namespace musubi::gpu {

inline constexpr int64_t kSmallRows = 32;  // the most rows of x that `linear_small` takes
inline constexpr int64_t kSmallBlock =
    64;  // K is a multiple of it, and so are blocks of scales, unless one covers the row
inline constexpr int64_t kTileBlock = 32;  // blocks of scales are a multiple of it for `linear_tile`

// Few rows, forward only, without a low-rank tail: each weight is read once, and its block's sum is scaled in float32.
// Rows of x and W begin at multiples of 16 bytes.
bool small_serves(const LinearTask& task);
int linear_small(const LinearTask& task, int64_t stream);

// Forward and input gradient by tiles, the codes decoded in registers; with bias and low-rank tail.
// x, low and out have one 16-bit dtype.
bool tile_serves(const LinearTask& task);
int linear_tile(const LinearTask& task, int64_t stream);

}  // namespace musubi::gpu
