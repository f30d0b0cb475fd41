// y = x W^T + bias for few rows of x: bound by reading W, so every code is loaded once, 16 bytes a lane, several loads
// under way, and never touches shared memory.
//
// A warp takes 16 rows of W as the left side of m16n8k16 and rows of x as its right side (y^T = W x^T). The order of K
// within a step is free as long as both sides agree: lane t of a quad takes 16 neighbouring codes, and product j of
// the step its codes 4j .. 4j + 3. The warps of a block share the same rows of W and divide K among them; their sums
// meet in shared memory. Sums of one block of scales are multiplied by its scale in float32.
#pragma once

#include "common/numbers.cuh"
#include "ops/fp8_linear/fp8_linear_gpu.h"

namespace musubi::gpu {

constexpr int kSmallWarps = 8;
constexpr int kSmallThreads = kSmallWarps * kWarp;

// 16 neighbouring bytes, zeros beyond `count`.
template <bool kOnce>
MUSUBI_DEVICE uint4 load_bytes(const void* from, int64_t count, bool aligned) {
  if (aligned && count >= 16) return kOnce ? load_once(from) : *static_cast<const uint4*>(from);
  uint4 bytes = make_uint4(0, 0, 0, 0);
  const uint8_t* const p = static_cast<const uint8_t*>(from);
#pragma unroll 1
  for (int i = static_cast<int>(count < 16 ? count : 16) - 1; i >= 0; --i) {
    bytes.w = bytes.w << 8 | bytes.z >> 24;
    bytes.z = bytes.z << 8 | bytes.y >> 24;
    bytes.y = bytes.y << 8 | bytes.x >> 24;
    bytes.x = bytes.x << 8 | p[i];
  }
  return bytes;
}

// kTiles tiles of 8 rows of x; a step is 64 of K and lies in one block.
template <class T, Format kFormat, int kTiles>
MUSUBI_KERNEL(kSmallThreads, 2)
linear_small_kernel(LinearTask task, bool aligned_w, bool aligned_x) {
  constexpr int kStep = 64, kAhead = 2;
  MUSUBI_SHARED(shared);
  const Fp8Rows& w = task.w;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, g = lane / 4, t = lane % 4;
  const int64_t first = block_index() * 16;
  int64_t row[2];
  const uint8_t* codes_of[2];
  for (int r = 0; r < 2; ++r) {
    row[r] = first + g + 8 * r < w.rows ? first + g + 8 * r : w.rows - 1;  // rows beyond the last are not stored
    codes_of[r] = w.codes + row[r] * w.stride;
  }
  float sums[kTiles][4] = {};

  for (int64_t k0 = static_cast<int64_t>(warp) * kStep; k0 < w.cols; k0 += kSmallWarps * kAhead * kStep) {
    uint4 codes[kAhead][2];
    float scale[kAhead][2];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t k = k0 + u * kSmallWarps * kStep, mine = k + t * 16;
      const int64_t block = k < w.cols && w.scale_block != 0 ? divide(k, w.block) : 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        codes[u][r] = load_bytes<true>(codes_of[r] + mine, w.cols - mine, aligned_w);
        scale[u][r] = load_as_float(w.scale, w.scale_dtype, row[r] * w.scale_row + block * w.scale_block);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t k = k0 + u * kSmallWarps * kStep, mine = k + t * 16;
      if (k >= w.cols) break;  // the same for the whole warp
      uint32_t a[4][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t words[4] = {codes[u][r].x, codes[u][r].y, codes[u][r].z, codes[u][r].w};
        uint32_t pairs[4][2];
        decode<T, kFormat>(words, pairs);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[j][r] = pairs[j][0];
          a[j][2 + r] = pairs[j][1];
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int64_t m = tile * 8 + g;
        uint4 b[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        if (m < task.x.rows) {
          const uint16_t* const x = static_cast<const uint16_t*>(task.x.data) + m * task.x.stride + mine;
          b[0] = load_bytes<false>(x, 2 * (w.cols - mine), aligned_x);
          b[1] = load_bytes<false>(x + 8, 2 * (w.cols - mine) - 16, aligned_x);
        }
        float part[4] = {};
        T::multiply_add(part, a[0], b[0].x, b[0].y);
        T::multiply_add(part, a[1], b[0].z, b[0].w);
        T::multiply_add(part, a[2], b[1].x, b[1].y);
        T::multiply_add(part, a[3], b[1].z, b[1].w);
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[tile][c] += scale[u][c / 2] * part[c];
      }
    }
  }

  // [warp][row of W][row of x]
  float* const parts = reinterpret_cast<float*>(shared);
  constexpr int kOutputs = 16 * 8 * kTiles;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      parts[warp * kOutputs + (g + 8 * (c / 2)) * 8 * kTiles + tile * 8 + 2 * t + c % 2] = sums[tile][c];
    }
  }
  if (!MUSUBI_FAULT(small_without_barrier)) barrier();
  for (int i = thread_index(); i < kOutputs; i += kSmallThreads) {
    const int64_t n = first + i % 16, m = i / 16;  // neighbours in a row of y are neighbouring threads
    if (n >= w.rows || m >= task.x.rows) continue;
    float sum = task.bias.data != nullptr ? load_as_float(task.bias.data, task.bias.dtype, n) : 0.0f;
#pragma unroll
    for (int other = 0; other < kSmallWarps; ++other) sum += parts[other * kOutputs + (i % 16) * 8 * kTiles + m];
    static_cast<uint16_t*>(task.out)[m * w.rows + n] = T::round(sum);
  }
}

template <class T, Format kFormat, int kTiles>
int launch_small(const LinearTask& task, int64_t stream) {
  const bool aligned_w = task.w.stride % 16 == 0 && reinterpret_cast<uintptr_t>(task.w.codes) % 16 == 0;
  const bool aligned_x =
      (task.x.stride % 8 == 0 || task.x.rows == 1) && reinterpret_cast<uintptr_t>(task.x.data) % 16 == 0;
  const int shared = kSmallWarps * 16 * 8 * kTiles * 4 - (MUSUBI_FAULT(small_short_buffer) ? 4 : 0);
  return MUSUBI_LAUNCH((linear_small_kernel<T, kFormat, kTiles>), (Grid{(task.w.rows + 15) / 16, 1}), kSmallThreads,
                       shared, stream, task, aligned_w, aligned_x);
}

}  // namespace musubi::gpu
