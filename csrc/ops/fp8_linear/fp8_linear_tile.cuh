// y = x W^T and dX = dY W by tiles: m16n8k16, a ring of asynchronous copies, codes decoded in registers.
//
// A block makes kRows x 128 outputs with 8 warps (2 by 4), 64 of the contraction per step. x goes to shared memory as
// it is, W as codes. The order of K within a product is free as long as both sides agree: lane t of a quad takes
// neighbours 4t .. 4t + 3, which are one word of codes and 8 bytes of x.
//
// Forward: a row of W is one output, so a block's sum is multiplied by its scale in float32 and no weight is rounded.
// Input gradient: the contraction runs over rows of W, each with its own scale, so weights are scaled when decoded and
// rounded once to the 16-bit type. A transposing load of byte pairs gives two columns at once, even and odd.
#pragma once

#include "common/numbers.cuh"
#include "ops/fp8_linear/fp8_linear_gpu.h"

namespace musubi::gpu {

constexpr int kTileThreads = 256;
constexpr int kOutputs = 128;  // per block
constexpr int kDepth = 64;     // of the contraction, per step
constexpr int kStages = 4;     // steps in the ring

template <bool kTransposed, int kRows>
struct TileShape {
  static constexpr int kMTiles = kRows / 32;  // tiles of 16 rows per warp
  static constexpr int kXBytes = kRows * kDepth * 2;
  static constexpr int kCodeBytes = kOutputs * kDepth;
  static constexpr int kScaleBytes = kTransposed ? kDepth * 4 * 4 : 0;  // [column group][row of W] float
  static constexpr int kStageBytes = kXBytes + kCodeBytes + kScaleBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// Where 16-byte chunks of a row lie, so that the loads of a warp meet every bank once.
MUSUBI_DEVICE int x_place(int row, int chunk) { return row * 128 + 16 * (chunk ^ ((row & 3) << 1)); }
MUSUBI_DEVICE int forward_place(int row, int chunk) { return row * 64 + 16 * (chunk ^ ((row >> 1) & 3)); }
MUSUBI_DEVICE int gradient_place(int row, int chunk) {
  return row * 128 + 16 * (chunk ^ ((row & 1) | ((row >> 1) & 6)));
}

// 16 bytes of a row to shared memory: asynchronous where the row is aligned, `valid` of them real and the rest zeros.
MUSUBI_DEVICE void fetch(unsigned char* to, const unsigned char* from, const unsigned char* safe, int64_t valid,
                         bool aligned) {
  const int count = valid < 0 ? 0 : valid > 16 ? 16 : static_cast<int>(valid);
  if (aligned) {
    copy_async(to, count > 0 ? from : safe, count);
  } else {
#pragma unroll 1
    for (int i = 0; i < 16; ++i) to[i] = i < count ? from[i] : 0;
  }
}

// Rows [first, first + count) and 64 columns from `col` of a 16-bit matrix.
template <int kCount>
MUSUBI_DEVICE void fetch_x(unsigned char* to, const Rows& x, int64_t first, int64_t col, bool aligned) {
  const unsigned char* const base = static_cast<const unsigned char*>(x.data);
#pragma unroll
  for (int i = 0; i < kCount * 8 / kTileThreads; ++i) {
    const int at = thread_index() + i * kTileThreads, row = at / 8, chunk = at % 8;
    const int64_t here = col + chunk * 8;
    const int64_t valid = first + row < x.rows ? (x.cols - here) * 2 : 0;
    fetch(to + x_place(row, chunk), base + ((first + row) * x.stride + here) * 2, base, valid, aligned);
  }
}

// The codes of 128 outputs by 64 of the contraction.
template <bool kTransposed>
MUSUBI_DEVICE void fetch_codes(unsigned char* to, const Fp8Rows& w, int64_t output, int64_t depth, bool aligned) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = thread_index() + i * kTileThreads, per_row = kTransposed ? 8 : 4;
    const int row = at / per_row, chunk = at % per_row;
    const int64_t n = (kTransposed ? depth : output) + row, k = (kTransposed ? output : depth) + chunk * 16;
    const int64_t valid = n < w.rows ? w.cols - k : 0;
    const int place = kTransposed ? gradient_place(row, chunk) : forward_place(row, chunk);
    fetch(to + place, w.codes + n * w.stride + k, w.codes, valid, aligned);
  }
}

template <class T, Format kFormat, bool kTransposed, int kRows>
class Tile {
 public:
  using Shape = TileShape<kTransposed, kRows>;
  static constexpr int kMTiles = Shape::kMTiles;

  MUSUBI_DEVICE Tile(const LinearTask& task, unsigned char* shared, bool aligned_x, bool aligned_w)
      : task_(task), shared_(shared), aligned_x_(aligned_x), aligned_w_(aligned_w) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    lane_ = lane, g_ = lane / 4, t_ = lane % 4;
    warp_row_ = warp / 4 * (kRows / 2), warp_col_ = warp % 4 * 32;
    row0_ = block_row() * kRows, col0_ = block_index() * kOutputs;
    contraction_ = kTransposed ? task.w.rows : task.w.cols;
    outputs_ = kTransposed ? task.w.cols : task.w.rows;
  }

  MUSUBI_DEVICE void run() {
    const int64_t steps = (contraction_ + kDepth - 1) / kDepth;
    start_scales();
    // the first turns only fetch, so that the code for a step stands here once
#pragma unroll 1
    for (int64_t step = 1 - kStages; step < steps; ++step) {
      if (step >= 0) {
        if (!MUSUBI_FAULT(tile_without_wait)) copy_wait<kStages - 2>();
        if (!MUSUBI_FAULT(tile_without_barrier)) barrier();
      }
      fetch_step(step + kStages - 1, steps);
      if (step >= 0) multiply(static_cast<int>(step % kStages));
    }
    if (!kTransposed) scale_sums();
    if (task_.low.data != nullptr) add_low_rank();
    store();
  }

 private:
  MUSUBI_DEVICE unsigned char* stage(int s) const { return shared_ + s * Shape::kStageBytes; }

  // A group is committed for every step, also an empty one, so that the waits count alike.
  MUSUBI_DEVICE void fetch_step(int64_t step, int64_t steps) {
    if (step < steps) {
      unsigned char* const to = stage(static_cast<int>(step % kStages));
      fetch_x<kRows>(to, task_.x, row0_, step * kDepth, aligned_x_);
      fetch_codes<kTransposed>(to + Shape::kXBytes, task_.w, col0_, step * kDepth, aligned_w_);
      if (kTransposed) fetch_scales(to + Shape::kXBytes + Shape::kCodeBytes, step * kDepth);
    }
    copy_commit();
  }

  // Gradient: scales of 64 rows of W for each group of 32 columns, as floats.
  MUSUBI_DEVICE void fetch_scales(unsigned char* to, int64_t depth) const {
    const int row = thread_index() % kDepth, group = thread_index() / kDepth;
    const int64_t n = depth + row, k = col0_ + group * 32;
    const Fp8Rows& w = task_.w;
    const bool real = n < w.rows && k < w.cols;
    const float scale =
        real ? load_as_float(w.scale, w.scale_dtype, n * w.scale_row + divide(k, w.block) * w.scale_block) : 0.0f;
    reinterpret_cast<float*>(to)[group * kDepth + row] = scale;
  }

  // Forward: the scales of the current block for this lane's outputs, and how many halves of a step it still has.
  MUSUBI_DEVICE void start_scales() {
    if (kTransposed) return;
    const int64_t halves = task_.w.block / 32;
    per_block_ = task_.w.scale_block == 0 || halves > 0x3fffffff ? 0x3fffffff : static_cast<int>(halves);
    left_ = per_block_;
    block_ = 0;
    load_scales();
  }

  MUSUBI_DEVICE void load_scales() {
    const Fp8Rows& w = task_.w;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t n = col0_ + warp_col_ + i / 2 * 8 + 2 * t_ + i % 2;
      const bool real = n < w.rows && block_ * w.block < w.cols;
      scale_[i] = real ? load_as_float(w.scale, w.scale_dtype, n * w.scale_row + block_ * w.scale_block) : 0.0f;
    }
  }

  MUSUBI_DEVICE void scale_sums() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sums_[m][n][c] += scale_[2 * n + c % 2] * part_[m][n][c];
          part_[m][n][c] = 0.0f;
        }
      }
    }
  }

  // Left operands: x of 16 of the contraction, for every tile of rows.
  MUSUBI_DEVICE void load_left(const unsigned char* x, int j, uint32_t (&a)[kMTiles][4]) const {
    const int chunk = 2 * j + t_ / 2, half = 8 * (t_ % 2);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      const int row = warp_row_ + m * 16 + g_;
      const uint2 upper = *reinterpret_cast<const uint2*>(x + x_place(row, chunk) + half);
      const uint2 lower = *reinterpret_cast<const uint2*>(x + x_place(row + 8, chunk) + half);
      a[m][0] = upper.x, a[m][1] = lower.x, a[m][2] = upper.y, a[m][3] = lower.y;
    }
  }

  // Four words of codes, one for each tile of 8 outputs: the lane's output and neighbours 4t .. 4t + 3 of product j.
  MUSUBI_DEVICE void load_words(const unsigned char* codes, int j, uint32_t (&words)[4]) const {
    if (!kTransposed) {
      load_matrices(words, codes + forward_place(warp_col_ + lane_, j));
      return;
    }
    const int matrix = lane_ / 8, r = lane_ % 8;
    const int row = 16 * j + r / 2 * 4 + r % 2 + matrix % 2 * 2;
    uint32_t raw[4];
    load_matrices_transposed(raw, codes + gradient_place(row, warp_col_ / 16 + matrix / 2));
    const uint32_t even = MUSUBI_FAULT(gradient_swapped_bytes) ? 0x6240u : 0x6420u;
    words[0] = permute(raw[0], raw[1], even);
    words[1] = permute(raw[0], raw[1], 0x7531);
    words[2] = permute(raw[2], raw[3], even);
    words[3] = permute(raw[2], raw[3], 0x7531);
  }

  MUSUBI_DEVICE void multiply(int s) {
    const unsigned char* const x = stage(s);
    const unsigned char* const codes = x + Shape::kXBytes;
    const float* const scales = reinterpret_cast<const float*>(codes + Shape::kCodeBytes) + warp_col_ / 32 * kDepth;
#pragma unroll
    for (int j = 0; j < kDepth / 16; ++j) {
      uint32_t a[kMTiles][4], words[4];
      load_left(x, j, a);
      load_words(codes, j, words);
      float4 factor;
      if (kTransposed) factor = *reinterpret_cast<const float4*>(scales + 16 * j + 4 * t_);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[2];
        if (kTransposed) {
          float w[4];
          decode_floats<kFormat>(words[n], w);
          b[0] = T::pack(w[0] * factor.x, w[1] * factor.y);
          b[1] = T::pack(w[2] * factor.z, w[3] * factor.w);
        } else {
          decode<T, kFormat>(words[n], b);
        }
        if (MUSUBI_FAULT(tile_swapped_fragment)) {
          const uint32_t kept = b[0];
          b[0] = b[1], b[1] = kept;
        }
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) T::multiply_add(kTransposed ? sums_[m][n] : part_[m][n], a[m], b[0], b[1]);
      }
      if (!kTransposed && j % 2 == 1 && --left_ == 0) {
        scale_sums();
        left_ = per_block_;
        ++block_;
        load_scales();
      }
    }
  }

  // The output that a lane's fragment calls column `i` (0 .. 7) of tile n.
  MUSUBI_DEVICE int column(int n, int i) const {
    return warp_col_ + (kTransposed ? n / 2 * 16 + 2 * i + n % 2 : n * 8 + i);
  }

  // sums += strength * low tail, 64 of the rank at a time, through shared memory that the ring no longer needs.
  MUSUBI_DEVICE void add_low_rank() {
    unsigned char* const low = shared_;
    unsigned char* const tail = shared_ + kRows * 128;
    copy_wait<0>();
#pragma unroll 1
    for (int64_t r0 = 0; r0 < task_.low.cols; r0 += kDepth) {
      barrier();
      fetch_x<kRows>(low, task_.low, row0_, r0, false);
#pragma unroll 1
      for (int i = thread_index(); i < kOutputs * kDepth; i += kTileThreads) {
        const int output = kTransposed ? i % kOutputs : i / kDepth, depth = kTransposed ? i / kOutputs : i % kDepth;
        const int64_t o = col0_ + output, r = r0 + depth;
        const int64_t at = kTransposed ? r * task_.tail.stride + o : o * task_.tail.stride + r;
        const bool real = o < outputs_ && r < task_.low.cols;
        const float value = real ? load_as_float(task_.tail.data, task_.tail.dtype, at) : 0.0f;
        reinterpret_cast<uint16_t*>(tail + x_place(output, depth / 8))[depth % 8] = T::round(value);
      }
      barrier();
      const int products =
          task_.low.cols - r0 < kDepth ? static_cast<int>((task_.low.cols - r0 + 15) / 16) : kDepth / 16;
#pragma unroll 1
      for (int j = 0; j < products; ++j) {
        uint32_t a[kMTiles][4];
        load_left(low, j, a);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int place = x_place(column(n, g_), 2 * j + t_ / 2) + 8 * (t_ % 2);
          const uint2 b = *reinterpret_cast<const uint2*>(tail + place);
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            float product[4] = {};
            T::multiply_add(product, a[m], b.x, b.y);
            for (int c = 0; c < 4; ++c) sums_[m][n][c] += task_.strength * product[c];
          }
        }
      }
    }
  }

  MUSUBI_DEVICE void store() const {
    uint16_t* const out = static_cast<uint16_t*>(task_.out);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float bias[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t o = col0_ + column(n, 2 * t_ + i);
        if (task_.bias.data != nullptr && o < outputs_) bias[i] = load_as_float(task_.bias.data, task_.bias.dtype, o);
      }
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int64_t r = row0_ + warp_row_ + m * 16 + g_ + c / 2 * 8, o = col0_ + column(n, 2 * t_ + c % 2);
          if (r < task_.x.rows && o < outputs_) out[r * outputs_ + o] = T::round(sums_[m][n][c] + bias[c % 2]);
        }
      }
    }
  }

  const LinearTask& task_;
  unsigned char* const shared_;
  const bool aligned_x_, aligned_w_;
  int lane_, g_, t_, warp_row_, warp_col_;
  int64_t row0_, col0_, contraction_, outputs_;
  int left_ = 0, per_block_ = 0;
  int64_t block_ = 0;
  float scale_[8];
  float sums_[kMTiles][4][4] = {};
  float part_[kMTiles][4][4] = {};
};

template <class T, Format kFormat, bool kTransposed, int kRows>
MUSUBI_KERNEL(kTileThreads, 1)
linear_tile_kernel(LinearTask task, bool aligned_x, bool aligned_w) {
  MUSUBI_SHARED(shared);
  Tile<T, kFormat, kTransposed, kRows>(task, shared, aligned_x, aligned_w).run();
}

template <class T, Format kFormat, bool kTransposed, int kRows>
int launch_tile(const LinearTask& task, int64_t stream) {
  using Shape = TileShape<kTransposed, kRows>;
  const bool aligned_x =
      (task.x.stride % 8 == 0 || task.x.rows == 1) && reinterpret_cast<uintptr_t>(task.x.data) % 16 == 0;
  const bool aligned_w = task.w.stride % 16 == 0 && reinterpret_cast<uintptr_t>(task.w.codes) % 16 == 0;
  const Grid grid{(task.outputs() + kOutputs - 1) / kOutputs, (task.x.rows + kRows - 1) / kRows};
  const int shared = Shape::kSharedBytes - (MUSUBI_FAULT(tile_short_buffer) ? 2 : 0);
  return MUSUBI_LAUNCH((linear_tile_kernel<T, kFormat, kTransposed, kRows>), grid, kTileThreads, shared, stream, task,
                       aligned_x, aligned_w);
}

}  // namespace musubi::gpu
