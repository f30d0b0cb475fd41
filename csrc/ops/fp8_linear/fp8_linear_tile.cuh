// y = x W^T and dX = dY W by tiles: m16n8k16, a ring of asynchronous copies, codes decoded in registers.
//
// A block makes kRows x 128 outputs with 8 warps (2 by 4), 64 of the contraction per step. x goes to shared memory as
// it is, W as codes. W is the left side (y^T = W x^T): then what a lane loads of x, 8 bytes, is a right operand as it
// stands, and no register is moved. The order of the contraction within a product is free as long as both sides agree:
// lane t of a quad takes neighbours 4t .. 4t + 3, which are one word of codes and 8 bytes of x. The order of outputs is
// free too: rows g and g + 8 of a product are neighbours, so that a lane stores pairs.
//
// Forward: a row of W is one output, so sums over kSegment of K, which lie in one block, are multiplied by its scale in
// float32 and no weight is rounded. They are so at the end of every segment, also where the block goes on: 64 products
// a step cost less than the branches and moves around fewer.
// Input gradient: the contraction runs over rows of W, each with its own scale, so weights are scaled when decoded and
// rounded once to the 16-bit type. A transposing load of byte pairs gives two columns at once, even and odd.
#pragma once

#include "common/numbers.cuh"
#include "ops/fp8_linear/fp8_linear_gpu.h"

namespace musubi::gpu {

constexpr int kTileThreads = 256;
constexpr int kOutputs = 128;  // per block
constexpr int kDepth = 64;     // of the contraction, per step

template <bool kTransposed, int kRows, int kSegment>
struct TileShape {
  static constexpr int kMTiles = kRows / 16;           // tiles of 8 rows of x per warp
  static constexpr int kStages = kTransposed ? 3 : 4;  // steps in the ring
  static constexpr int kXBytes = kRows * kDepth * 2;
  static constexpr int kCodeBytes = kOutputs * kDepth;
  // forward: [segment][output] of a step; gradient: [group of 32 outputs][row of W]
  static constexpr int kScales = kTransposed ? kDepth * 4 : kOutputs * (kDepth / kSegment);
  static constexpr int kStageBytes = kXBytes + kCodeBytes + kScales * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kOutStride = kOutputs + 8;  // of the outputs on their way to memory, so that banks differ
  static_assert(kSharedBytes <= 99 * 1024, "what a block may have on sm_86, sm_89 and sm_120");
  static_assert(kRows * kOutStride * 2 <= kSharedBytes && (kRows + kOutputs) * kDepth * 2 <= kSharedBytes,
                "the ring's");
};

// Where 16-byte chunks of a row lie, so that the loads of a warp meet every bank once.
MUSUBI_DEVICE int x_place(int row, int chunk) { return row * 128 + 16 * (chunk ^ ((row & 3) << 1)); }
MUSUBI_DEVICE int forward_place(int row, int chunk) {  // a load takes every other row, two rows share 128 bytes
  return row / 2 * 128 + 16 * ((row % 2 * 4 + chunk) ^ (row / 2 % 8));
}
MUSUBI_DEVICE int gradient_place(int row, int chunk) {
  return row * 128 + 16 * (chunk ^ ((row & 1) | ((row >> 1) & 6)));
}

// 16 bytes to shared memory, `valid` of them real and the rest zeros, a byte at a time: for rows that are not aligned.
MUSUBI_DEVICE void copy_bytes(unsigned char* to, const unsigned char* from, int valid) {
#pragma unroll 1
  for (int i = 0; i < 16; ++i) to[i] = i < valid ? from[i] : 0;
}

// One side of the product on its way to shared memory: each thread brings kPieces chunks of 16 bytes a step, at the
// same place of rows that are 256 / kPerRow apart.
template <int kPieces, int kPerRow>
class Fetch {
 public:
  static constexpr int kGap = kTileThreads / kPerRow;  // rows between the pieces of a thread

  // The thread's first chunk begins `start` bytes behind the start of row `first` + its own; a step on, `pace` further.
  MUSUBI_DEVICE Fetch(const void* base, int64_t first, int64_t row_bytes, int64_t start, int64_t pace, bool aligned)
      : from_(static_cast<const unsigned char*>(base) + (first + thread_index() / kPerRow) * row_bytes + start),
        gap_(kGap * row_bytes),
        pace_(pace),
        aligned_(aligned) {}

  // The chunks of the next step: `rows` rows are real, and `bytes` of each. Where nothing is, nothing is read, whatever
  // the address.
  template <class Place>
  MUSUBI_DEVICE void step(unsigned char* to, int rows, int bytes, const Place& place) {
    const int row = thread_index() / kPerRow, chunk = thread_index() % kPerRow;
    const int valid = bytes < 0 ? 0 : bytes > 16 ? 16 : bytes;
    if (aligned_) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int here = row + i * kGap < rows ? valid : 0;
        copy_async(to + place(row + i * kGap, chunk), from_ + i * gap_, here);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPieces; ++i) {
        const int here = row + i * kGap < rows ? valid : 0;
        copy_bytes(to + place(row + i * kGap, chunk), from_ + i * gap_, here);
      }
    }
    from_ += pace_;
  }

 private:
  const unsigned char* from_;
  const int64_t gap_, pace_;
  const bool aligned_;
};

// A count that a thread compares with small numbers: large ones are cut.
MUSUBI_DEVICE int few(int64_t count) { return count > 1024 ? 1024 : static_cast<int>(count); }

template <class T, Format kFormat, bool kTransposed, int kRows, int kSegment>
class Tile {
 public:
  using Shape = TileShape<kTransposed, kRows, kSegment>;
  static constexpr int kMTiles = Shape::kMTiles;
  static constexpr int kStages = Shape::kStages;
  static constexpr int kCodesPerRow = kTransposed ? 8 : 4;  // chunks

  MUSUBI_DEVICE Tile(const LinearTask& task, unsigned char* shared, bool aligned_x, bool aligned_w)
      : task_(task),
        shared_(shared),
        row0_(block_row() * kRows),
        col0_(block_index() * kOutputs),
        contraction_(kTransposed ? task.w.rows : task.w.cols),
        outputs_(kTransposed ? task.w.cols : task.w.rows),
        x_(task.x.data, row0_, task.x.stride * 2, thread_index() % 8 * 16, kDepth * 2, aligned_x),
        codes_(task.w.codes, kTransposed ? 0 : col0_, task.w.stride,
               thread_index() % kCodesPerRow * 16 + (kTransposed ? col0_ : 0),
               kTransposed ? kDepth * task.w.stride : kDepth, aligned_w),
        x_rows_(few(task.x.rows - row0_)),
        columns_(few(outputs_ - col0_)),
        one_scale_(kTransposed && task.w.scale_row == 0 && task.w.scale_block == 0) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    g_ = lane / 4, t_ = lane % 4;
    warp_row_ = warp / 4 * (kRows / 2), warp_col_ = warp % 4 * 32;
    right_at_ = x_place(warp_row_ + g_, t_ / 2) + 8 * (t_ % 2);
    if (kTransposed) {
      const int matrix = lane / 8, r = lane % 8, row = r / 2 * 4 + r % 2 + matrix % 2 * 2;
      words_at_ = gradient_place(row, warp_col_ / 16 + matrix / 2);
    } else {
      words_at_ = forward_place(warp_col_ + lane / 16 * 16 + lane % 8 * 2 + lane / 8 % 2, 0);
    }
  }

  MUSUBI_DEVICE void run() {
    const int64_t steps = (contraction_ + kDepth - 1) / kDepth;
    start_scale();
    // the first turns only fetch, so that the code for a step stands here once
#pragma unroll 1
    for (int64_t step = 1 - kStages; step < steps; ++step) {
      if (step >= 0) {
        if (!MUSUBI_FAULT(tile_without_wait)) copy_wait<kStages - 2>();
        if (!MUSUBI_FAULT(tile_without_barrier)) barrier();
      }
      fetch_step(step + kStages - 1, steps);
      if (step >= 0) multiply(static_cast<int>(step) % kStages);
    }
    if (one_scale_) apply_one_scale();
    if (task_.low.data != nullptr) add_low_rank();
    store();
  }

 private:
  MUSUBI_DEVICE unsigned char* stage(int s) const { return shared_ + s * Shape::kStageBytes; }

  // A group is committed for every step, also an empty one, so that the waits count alike.
  MUSUBI_DEVICE void fetch_step(int64_t step, int64_t steps) {
    if (step < steps) {
      unsigned char* const to = stage(static_cast<int>(step) % kStages);
      const int left = few(contraction_ - step * kDepth), chunk = thread_index() % kCodesPerRow * 16;
      x_.step(to, x_rows_, (left - thread_index() % 8 * 8) * 2, x_place);
      if (kTransposed) {
        codes_.step(to + Shape::kXBytes, left, columns_ - chunk, gradient_place);
      } else {
        codes_.step(to + Shape::kXBytes, columns_, left - chunk, forward_place);
      }
      if (thread_index() < Shape::kScales) {
        reinterpret_cast<float*>(to + Shape::kXBytes + Shape::kCodeBytes)[thread_index()] =
            one_scale_ ? 1.0f : float_of(scale_, task_.w.scale_dtype);
      }
      load_scale(left - kDepth);
    }
    copy_commit();
  }

  // Where this thread's scale lies. Forward: of one output and segment, a block of scales further whenever the steps
  // have left one behind. Gradient: of one row of W, 64 rows further each step.
  MUSUBI_DEVICE void start_scale() {
    const Fp8Rows& w = task_.w;
    const int i = thread_index();
    const int64_t n = kTransposed ? i % kDepth : col0_ + i % kOutputs;
    const int64_t k = kTransposed ? col0_ + i / kDepth * 32 : i / kOutputs * kSegment;
    const int64_t block = w.scale_block == 0 ? 0 : divide(k, w.block);
    scale_at_ = n * w.scale_row + block * w.scale_block;
    block_ = w.scale_block == 0 || w.block > (1 << 30) ? 1 << 30 : static_cast<int>(w.block);
    into_block_ = w.scale_block == 0 ? 0 : static_cast<int>(k - block * w.block);
    first_scale_ = kTransposed ? i % kDepth : i / kOutputs * kSegment;
    has_scale_ = i < Shape::kScales && (kTransposed ? k < w.cols : n < w.rows);
    load_scale(few(contraction_));
  }

  // This thread's scale of the next step, as it lies in memory: read a step before it is stored, so that nothing waits
  // for it. `left`: what the contraction has from there on.
  MUSUBI_DEVICE void load_scale(int left) {
    const Fp8Rows& w = task_.w;
    scale_ = has_scale_ && first_scale_ < left ? load_raw(w.scale, w.scale_dtype, scale_at_) : 0;
    if (kTransposed) {
      scale_at_ += kDepth * w.scale_row;
    } else {
      for (into_block_ += kDepth; into_block_ >= block_; into_block_ -= block_) scale_at_ += w.scale_block;
    }
  }

  // Right operands: x of 16 of the contraction, for every tile of rows.
  MUSUBI_DEVICE void load_right(const unsigned char* x, int j, uint2 (&b)[kMTiles]) const {
    const unsigned char* const from = x + (right_at_ ^ (32 * j));
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) b[m] = *reinterpret_cast<const uint2*>(from + m * 8 * 128);
  }

  // Four words of codes, neighbours 4t .. 4t + 3 of product j: of rows g and g + 8 of the first 16 outputs, then of the
  // second.
  MUSUBI_DEVICE void load_words(const unsigned char* codes, int j, uint32_t (&words)[4]) const {
    if (!kTransposed) {
      load_matrices(words, codes + (words_at_ ^ (16 * j)));
      return;
    }
    uint32_t raw[4];
    load_matrices_transposed(raw, codes + words_at_ + 16 * 128 * j);
    const uint32_t even = MUSUBI_FAULT(gradient_swapped_bytes) ? 0x6240u : 0x6420u;
    words[0] = permute(raw[0], raw[1], even);
    words[1] = permute(raw[0], raw[1], 0x7531);
    words[2] = permute(raw[2], raw[3], even);
    words[3] = permute(raw[2], raw[3], 0x7531);
  }

  // sums += w x^T for the 32 outputs of the warp; w: the pairs of its four words.
  MUSUBI_DEVICE void add_products(float (&sums)[2][kMTiles][4], const uint32_t (&w)[4][2],
                                  const uint2 (&b)[kMTiles]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int upper = MUSUBI_FAULT(tile_swapped_fragment) ? 1 : 0;
      const uint32_t a[4] = {w[2 * i][upper], w[2 * i + 1][upper], w[2 * i][1 - upper], w[2 * i + 1][1 - upper]};
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) T::multiply_add(sums[i][m], a, b[m].x, b[m].y);
    }
  }

  MUSUBI_DEVICE void multiply(int s) {
    const unsigned char* const x = stage(s);
    const unsigned char* const codes = x + Shape::kXBytes;
    const float* const scales = reinterpret_cast<const float*>(codes + Shape::kCodeBytes);
    if (kTransposed) {
      multiply_scaled(x, codes, scales + warp_col_ / 32 * kDepth);
      return;
    }
#pragma unroll
    for (int segment = 0; segment < kDepth / kSegment; ++segment) {
      float part[2][kMTiles][4] = {};
#pragma unroll
      for (int p = 0; p < kSegment / 16; ++p) {
        const int j = segment * (kSegment / 16) + p;
        uint32_t words[4], w[4][2];
        uint2 b[kMTiles];
        load_words(codes, j, words);
        load_right(x, j, b);
        decode<T, kFormat>(words, w);
        add_products(part, w, b);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 scale = *reinterpret_cast<const float2*>(scales + segment * kOutputs + column(i));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          sums_[i][m][0] += scale.x * part[i][m][0];
          sums_[i][m][1] += scale.x * part[i][m][1];
          sums_[i][m][2] += scale.y * part[i][m][2];
          sums_[i][m][3] += scale.y * part[i][m][3];
        }
      }
    }
  }

  // Gradient: `scales` are of the 64 rows of W, for this warp's outputs.
  MUSUBI_DEVICE void multiply_scaled(const unsigned char* x, const unsigned char* codes, const float* scales) {
#pragma unroll
    for (int j = 0; j < kDepth / 16; ++j) {
      uint32_t words[4], scaled[4][2];
      uint2 b[kMTiles];
      load_words(codes, j, words);
      load_right(x, j, b);
      const float4 factor = *reinterpret_cast<const float4*>(scales + 16 * j + 4 * t_);
      float w[4][4];
      decode_floats<kFormat>(words, w);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        scaled[n][0] = T::pack(w[n][0] * factor.x, w[n][1] * factor.y);
        scaled[n][1] = T::pack(w[n][2] * factor.z, w[n][3] * factor.w);
      }
      add_products(sums_, scaled, b);
    }
  }

  // Gradient with one scale for all of W: rounded into the weights it would be wrong by the same amount for every
  // weight of a mantissa, of which there are four or eight, and such errors do not average out.
  MUSUBI_DEVICE void apply_one_scale() {
    const float scale = load_as_float(task_.w.scale, task_.w.scale_dtype, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[i][m][c] *= scale;
      }
    }
  }

  // The first of the two neighbouring outputs that a lane holds of tile i, within the block.
  MUSUBI_DEVICE int column(int i) const { return warp_col_ + 16 * i + 2 * g_; }

  // sums += strength * low tail, 64 of the rank at a time, through shared memory that the ring no longer needs.
  MUSUBI_DEVICE void add_low_rank() {
    unsigned char* const low = shared_;
    unsigned char* const tail = shared_ + kRows * 128;
    copy_wait<0>();
#pragma unroll 1
    for (int64_t r0 = 0; r0 < task_.low.cols; r0 += kDepth) {
      barrier();
#pragma unroll 1
      for (int i = thread_index(); i < kRows * kDepth; i += kTileThreads) {
        const int64_t r = row0_ + i / kDepth, c = r0 + i % kDepth;
        const bool real = r < task_.low.rows && c < task_.low.cols;
        reinterpret_cast<uint16_t*>(low + x_place(i / kDepth, i % kDepth / 8))[i % 8] =
            real ? static_cast<const uint16_t*>(task_.low.data)[r * task_.low.stride + c] : uint16_t{0};
      }
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
        float product[2][kMTiles][4] = {};
        uint2 b[kMTiles];
        uint32_t w[4][2];
        load_right(low, j, b);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int place = x_place(column(n / 2) + n % 2, 2 * j + t_ / 2) + 8 * (t_ % 2);
          const uint2 pairs = *reinterpret_cast<const uint2*>(tail + place);
          w[n][0] = pairs.x, w[n][1] = pairs.y;
        }
        add_products(product, w, b);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sums_[i][m][c] += task_.strength * product[i][m][c];
          }
        }
      }
    }
  }

  // Through shared memory, so that rows go out in pieces of 16 bytes.
  MUSUBI_DEVICE void store() {
    copy_wait<0>();
    barrier();
    uint16_t* const held = reinterpret_cast<uint16_t*>(shared_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float bias[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t o = col0_ + column(i) + h;
        const bool real = task_.bias.data != nullptr && o < outputs_;
        bias[h] = real ? load_as_float(task_.bias.data, task_.bias.dtype, o) : 0.0f;
      }
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = warp_row_ + m * 8 + 2 * t_ + r;
          *reinterpret_cast<uint32_t*>(held + row * Shape::kOutStride + column(i)) =
              T::pack(sums_[i][m][r] + bias[0], sums_[i][m][2 + r] + bias[1]);
        }
      }
    }
    if (!MUSUBI_FAULT(tile_stored_too_soon)) barrier();
    uint16_t* const out = static_cast<uint16_t*>(task_.out);
    const bool whole = outputs_ % 8 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll 1
    for (int v = thread_index(); v < kRows * kOutputs / 8; v += kTileThreads) {
      const int row = v / (kOutputs / 8), col = v % (kOutputs / 8) * 8;
      const int64_t r = row0_ + row, o = col0_ + col;
      if (r >= task_.x.rows || o >= outputs_) continue;
      const uint16_t* const from = held + row * Shape::kOutStride + col;
      uint16_t* const to = out + r * outputs_ + o;
      if (whole) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll 1
        for (int e = 0; e < 8 && o + e < outputs_; ++e) to[e] = from[e];
      }
    }
  }

  const LinearTask& task_;
  unsigned char* const shared_;
  const int64_t row0_, col0_, contraction_, outputs_;
  Fetch<kRows * 8 / kTileThreads, 8> x_;
  Fetch<2, kCodesPerRow> codes_;
  const int x_rows_, columns_;  // real ones of this block's
  const bool one_scale_;        // a gradient's sums meet the scale, not its weights
  int g_, t_, warp_row_, warp_col_, right_at_, words_at_;
  int64_t scale_at_;
  int block_, into_block_, first_scale_;
  bool has_scale_;
  uint32_t scale_;
  // [16 outputs][8 rows of x]: rows 2t and 2t + 1 of the first output, then of the second
  float sums_[2][kMTiles][4] = {};
};

template <class T, Format kFormat, bool kTransposed, int kRows, int kSegment>
MUSUBI_KERNEL(kTileThreads, 1)
linear_tile_kernel(LinearTask task, bool aligned_x, bool aligned_w) {
  MUSUBI_SHARED(shared);
  Tile<T, kFormat, kTransposed, kRows, kSegment>(task, shared, aligned_x, aligned_w).run();
}

template <class T, Format kFormat, bool kTransposed, int kRows, int kSegment = kDepth>
int launch_tile(const LinearTask& task, int64_t stream) {
  using Shape = TileShape<kTransposed, kRows, kSegment>;
  const bool aligned_x = task.x.stride % 8 == 0 && reinterpret_cast<uintptr_t>(task.x.data) % 16 == 0;
  const bool aligned_w = task.w.stride % 16 == 0 && reinterpret_cast<uintptr_t>(task.w.codes) % 16 == 0;
  const Grid grid{(task.outputs() + kOutputs - 1) / kOutputs, (task.x.rows + kRows - 1) / kRows};
  const int shared = Shape::kSharedBytes - (MUSUBI_FAULT(tile_short_buffer) ? 4 : 0);
  return MUSUBI_LAUNCH((linear_tile_kernel<T, kFormat, kTransposed, kRows, kSegment>), grid, kTileThreads, shared,
                       stream, task, aligned_x, aligned_w);
}

}  // namespace musubi::gpu
