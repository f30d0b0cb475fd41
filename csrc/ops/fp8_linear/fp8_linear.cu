// Which kernel a product takes: by dtype, format, rows of x.
#include "ops/fp8_linear/fp8_linear_small.cuh"
#include "ops/fp8_linear/fp8_linear_tile.cuh"

namespace musubi::gpu {

constexpr int64_t kTallFrom = 65;  // rows of x from which tiles of 128 rows waste less than they save

// One scale for every row or for all: no block ends before the row does.
bool whole_rows(const Fp8Rows& w) { return w.scale_block == 0 || w.block >= w.cols; }

LinearTask plain(LinearTask task) {
  if (whole_rows(task.w)) task.w.scale_block = 0;
  // the stride of a single row may be anything; kernels form the addresses of more
  if (task.x.rows == 1) task.x.stride = 0;
  if (task.w.rows == 1) task.w.stride = 0;
  return task;
}

bool tile_serves(const LinearTask& task) {
  const bool half = task.x.dtype != Dtype::f32 && task.out_dtype == task.x.dtype;
  const bool same = task.low.data == nullptr || task.low.dtype == task.x.dtype;
  return half && same && (whole_rows(task.w) || task.w.block % kTileBlock == 0);
}

bool aligned(const void* data, int64_t row_bytes, int64_t rows) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows == 1 || row_bytes % 16 == 0);
}

bool small_serves(const LinearTask& task) {
  const bool few = !task.transposed && task.low.data == nullptr && task.x.rows <= kSmallRows;
  const bool whole = task.w.cols % kSmallBlock == 0 && aligned(task.w.codes, task.w.stride, task.w.rows) &&
                     aligned(task.x.data, task.x.stride * 2, task.x.rows);
  return tile_serves(task) && few && whole && (whole_rows(task.w) || task.w.block % kSmallBlock == 0);
}

template <class T, Format kFormat>
int small_as(const LinearTask& task, int64_t stream) {
  if (task.x.rows <= 8) return launch_small<T, kFormat, 1>(task, stream);
  if (task.x.rows <= 16) return launch_small<T, kFormat, 2>(task, stream);
  return launch_small<T, kFormat, 4>(task, stream);
}

// e5m2 weights and blocks that are no multiple of 64 are rare: one size of tile for them keeps the build short.
template <class T, Format kFormat>
int tile_as(const LinearTask& task, int64_t stream) {
  constexpr bool common = kFormat == Format::e4m3;
  const bool tall = common && task.x.rows >= kTallFrom;
  if (task.transposed) {
    if constexpr (common) {
      if (tall) return launch_tile<T, kFormat, true, 128>(task, stream);
    }
    return launch_tile<T, kFormat, true, 64>(task, stream);
  }
  if constexpr (common) {
    if (whole_rows(task.w) || task.w.block % kDepth == 0) {
      return tall ? launch_tile<T, kFormat, false, 128>(task, stream)
                  : launch_tile<T, kFormat, false, 64>(task, stream);
    }
  }
  return launch_tile<T, kFormat, false, 64, 32>(task, stream);
}

int linear_small(const LinearTask& given, int64_t stream) {
  const LinearTask task = plain(given);
  if (task.x.rows == 0 || task.w.rows == 0) return 0;
  if (task.x.dtype == Dtype::bf16) {
    return task.w.format == Format::e4m3 ? small_as<Bf16, Format::e4m3>(task, stream)
                                         : small_as<Bf16, Format::e5m2>(task, stream);
  }
  return task.w.format == Format::e4m3 ? small_as<F16, Format::e4m3>(task, stream)
                                       : small_as<F16, Format::e5m2>(task, stream);
}

int linear_tile(const LinearTask& given, int64_t stream) {
  const LinearTask task = plain(given);
  if (task.x.rows == 0 || task.outputs() == 0) return 0;
  if (task.x.dtype == Dtype::bf16) {
    return task.w.format == Format::e4m3 ? tile_as<Bf16, Format::e4m3>(task, stream)
                                         : tile_as<Bf16, Format::e5m2>(task, stream);
  }
  return task.w.format == Format::e4m3 ? tile_as<F16, Format::e4m3>(task, stream)
                                       : tile_as<F16, Format::e5m2>(task, stream);
}

}  // namespace musubi::gpu
