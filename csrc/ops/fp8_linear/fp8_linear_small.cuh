// y = x W^T + bias for few rows of x: bound by reading W, so every code is loaded once, 16 bytes a lane, several loads
// under way, and never touches shared memory.
//
// A warp takes 16 rows of W as the left side of m16n8k16 and rows of x as its right side (y^T = W x^T). The order of K
// within a step is free as long as both sides agree: lane t of a quad takes 16 neighbouring codes, and product j of
// the step its codes 4j .. 4j + 3. The warps of a block share the same rows of W and divide K among them; their sums
// meet in shared memory. Sums of one block of scales are multiplied by its scale in float32.
//
// Rows begin at multiples of 16 bytes and K is a multiple of 64; anything else goes by tiles, which check every chunk.
#pragma once

#include "common/numbers.cuh"
#include "ops/fp8_linear/fp8_linear_gpu.h"

namespace musubi::gpu {

constexpr int kSmallWarps = 8;
constexpr int kSmallThreads = kSmallWarps * kWarp;
constexpr int kStep = 64;  // of K; lies in one block
constexpr int kAhead = 2;  // steps that a warp loads together, while it multiplies the ones before

// What a lane holds of kAhead steps: the codes and scales of its two rows of W.
struct Ahead {
  uint4 codes[kAhead][2];
  uint32_t scale[kAhead][2];
};

// kTiles tiles of 8 rows of x. `blocks` is 2^32 / (steps per block), rounded up: the block of step s is s * blocks /
// 2^32, exactly for s and steps per block below 2^16; 0 where one scale serves the row.
template <class T, Format kFormat, int kTiles>
MUSUBI_KERNEL(kSmallThreads, 2)
linear_small_kernel(LinearTask task, uint64_t blocks) {
  MUSUBI_SHARED(shared);
  const Fp8Rows& w = task.w;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp, g = lane / 4, t = lane % 4;
  const int64_t first = block_index() * 16;
  const int steps = static_cast<int>(w.cols / kStep);
  const uint8_t* codes_of[2];
  int64_t scale_of_row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = first + g + 8 * r < w.rows ? first + g + 8 * r : w.rows - 1;  // beyond the last: not stored
    codes_of[r] = w.codes + row * w.stride + t * 16;
    scale_of_row[r] = row * w.scale_row;
  }
  const uint16_t* x_of[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t m = tile * 8 + g < task.x.rows ? tile * 8 + g : task.x.rows - 1;
    x_of[tile] = static_cast<const uint16_t*>(task.x.data) + m * task.x.stride + t * 16;
  }
  const auto load = [&](int step, Ahead& to) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int s = step + u * kSmallWarps < steps ? step + u * kSmallWarps : steps - 1;
      const int64_t block = static_cast<int64_t>(static_cast<uint32_t>(s) * blocks >> 32);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        to.codes[u][r] = load_once(codes_of[r] + static_cast<int64_t>(s) * kStep);
        to.scale[u][r] = load_raw(w.scale, w.scale_dtype, scale_of_row[r] + block * w.scale_block);
      }
    }
  };

  float sums[kTiles][4] = {};
  Ahead next;
  if (warp < steps) load(warp, next);
#pragma unroll 1
  for (int step = warp; step < steps; step += kSmallWarps * kAhead) {
    const Ahead now = next;
    if (step + kSmallWarps * kAhead < steps) load(step + kSmallWarps * kAhead, next);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int s = step + u * kSmallWarps;
      if (s >= steps) break;  // the same for the whole warp
      uint4 b[kTiles][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4* const x = reinterpret_cast<const uint4*>(x_of[tile] + static_cast<int64_t>(s) * kStep);
        b[tile][0] = x[0];
        b[tile][1] = x[1];
      }
      uint32_t a[4][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4& codes = now.codes[u][r];
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        uint32_t pairs[4][2];
        decode<T, kFormat>(words, pairs);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[j][r] = pairs[j][0];
          a[j][2 + r] = pairs[j][1];
        }
      }
      const float scale[2] = {float_of(now.scale[u][0], w.scale_dtype), float_of(now.scale[u][1], w.scale_dtype)};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float part[4] = {};
        T::multiply_add(part, a[0], b[tile][0].x, b[tile][0].y);
        T::multiply_add(part, a[1], b[tile][0].z, b[tile][0].w);
        T::multiply_add(part, a[2], b[tile][1].x, b[tile][1].y);
        T::multiply_add(part, a[3], b[tile][1].z, b[tile][1].w);
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[tile][c] += scale[c / 2] * part[c];
      }
    }
  }

  // [warp][row of W][row of x]
  float* const parts = reinterpret_cast<float*>(shared);
  constexpr int kSums = 16 * 8 * kTiles;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      parts[warp * kSums + (g + 8 * (c / 2)) * 8 * kTiles + tile * 8 + 2 * t + c % 2] = sums[tile][c];
    }
  }
  if (!MUSUBI_FAULT(small_without_barrier)) barrier();
  for (int i = thread_index(); i < kSums; i += kSmallThreads) {
    const int64_t n = first + i % 16, m = i / 16;  // neighbours in a row of y are neighbouring threads
    if (n >= w.rows || m >= task.x.rows) continue;
    float sum = task.bias.data != nullptr ? load_as_float(task.bias.data, task.bias.dtype, n) : 0.0f;
#pragma unroll
    for (int other = 0; other < kSmallWarps; ++other) sum += parts[other * kSums + (i % 16) * 8 * kTiles + m];
    static_cast<uint16_t*>(task.out)[m * w.rows + n] = T::round(sum);
  }
}

template <class T, Format kFormat, int kTiles>
int launch_small(const LinearTask& task, int64_t stream) {
  const uint64_t per_block = static_cast<uint64_t>(task.w.block / kStep);
  const uint64_t blocks = task.w.scale_block == 0 ? 0 : ((1ull << 32) - 1 + per_block) / per_block;
  const int shared = kSmallWarps * 16 * 8 * kTiles * 4 - (MUSUBI_FAULT(small_short_buffer) ? 4 : 0);
  return MUSUBI_LAUNCH((linear_small_kernel<T, kFormat, kTiles>), (Grid{(task.w.rows + 15) / 16, 1}), kSmallThreads,
                       shared, stream, task, blocks);
}

}  // namespace musubi::gpu
