// Quantise and dequantise: bound by memory, so whole lines of it in every access. Bit for bit as the CPU's.
#include "common/numbers.cuh"
#include "ops/fp8_quantize/fp8_quantize_gpu.h"

namespace musubi::gpu {

constexpr int kThreads = 256;
constexpr int kCodes = 8;      // codes per load of a dequantising thread: a warp's 16-bit results leave in whole lines
constexpr int kWeights = 8;    // weights per step of a quantising lane
constexpr int kHeldSteps = 2;  // steps whose weights stay in registers between peak and codes

// ---- dequantise -----------------------------------------------------------------------------------------------------

template <Format kFormat>
MUSUBI_DEVICE void store_products(const DequantizeTask& task, int64_t at, const float (&values)[kCodes]) {
  char* const to = static_cast<char*>(task.out) + at * (task.out_dtype == Dtype::f32 ? 4 : 2);
  if (task.out_dtype == Dtype::f32) {
    for (int i = 0; i < kCodes / 4; ++i) {
      reinterpret_cast<float4*>(to)[i] =
          make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
    }
    return;
  }
  uint32_t pairs[kCodes / 2];
  for (int i = 0; i < kCodes / 2; ++i) {
    pairs[i] = task.out_dtype == Dtype::bf16 ? Bf16::pack(values[2 * i], values[2 * i + 1])
                                             : F16::pack(values[2 * i], values[2 * i + 1]);
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Rows whose codes, columns and blocks come in whole eights: one load a thread, since so many threads are under way
// that more loads in each (2, 4 and 8 were measured on an H200) gain nothing for large weights and cost 7 to 60 % for
// small.
template <Format kFormat>
MUSUBI_KERNEL(kThreads, 4)
dequantize_wide(DequantizeTask task, int64_t total) {
  const Fp8Rows& w = task.w;
  const uint32_t per_row = static_cast<uint32_t>(w.cols / kCodes), block = static_cast<uint32_t>(w.block / kCodes);
  const int64_t i = block_index() * kThreads + thread_index();
  if (i >= total) return;
  const int64_t row = static_cast<uint32_t>(i) / per_row;
  const uint32_t step = static_cast<uint32_t>(i) % per_row;
  const uint2 codes = load_pair_once(w.codes + row * w.stride + static_cast<int64_t>(step) * kCodes);
  const float scale = load_as_float(w.scale, w.scale_dtype, row * w.scale_row + (step / block) * w.scale_block);
  const uint32_t words[2] = {codes.x, codes.y};
  float fours[2][4], values[kCodes];
  decode_floats<kFormat>(words, fours);
#pragma unroll
  for (int e = 0; e < kCodes; ++e) values[e] = fours[e / 4][e % 4] * scale;
  store_products<kFormat>(task, i * kCodes, values);
}

// Any sizes and strides: one code per thread.
template <Format kFormat>
MUSUBI_KERNEL(kThreads, 2)
dequantize_any(DequantizeTask task) {
  const Fp8Rows& w = task.w;
  const int64_t total = w.rows * w.cols;
  for (int64_t i = block_index() * kThreads + thread_index(); i < total; i += grid_width() * kThreads) {
    const int64_t row = i / w.cols, col = i % w.cols;
    const uint32_t code[1] = {w.codes[row * w.stride + col]};
    float four[1][4];
    decode_floats<kFormat>(code, four);
    const float scale = load_as_float(w.scale, w.scale_dtype, row * w.scale_row + col / w.block * w.scale_block);
    store_float(task.out, task.out_dtype, i, four[0][0] * scale);
  }
}

template <Format kFormat>
int dequantize_as(const DequantizeTask& task, int64_t stream) {
  const Fp8Rows& w = task.w;
  const int64_t total = w.rows * w.cols;
  const bool whole = w.cols % kCodes == 0 && w.block % kCodes == 0 && w.stride % kCodes == 0 &&
                     reinterpret_cast<uintptr_t>(w.codes) % kCodes == 0 &&
                     reinterpret_cast<uintptr_t>(task.out) % 16 == 0 && total / kCodes <= 0xffffffffll;
  if (whole) {
    const int64_t steps = total / kCodes;
    return MUSUBI_LAUNCH((dequantize_wide<kFormat>), (Grid{(steps + kThreads - 1) / kThreads, 1}), kThreads, 0, stream,
                         task, steps);
  }
  const int64_t blocks = (total + kThreads - 1) / kThreads;
  return MUSUBI_LAUNCH((dequantize_any<kFormat>), (Grid{blocks < (1 << 20) ? blocks : 1 << 20, 1}), kThreads, 0, stream,
                       task);
}

int dequantize(const DequantizeTask& task, int64_t stream) {
  if (task.w.rows == 0 || task.w.cols == 0) return 0;
  return task.w.format == Format::e4m3 ? dequantize_as<Format::e4m3>(task, stream)
                                       : dequantize_as<Format::e5m2>(task, stream);
}

// ---- quantise -------------------------------------------------------------------------------------------------------

// Weights i .. i + count of a row (count <= 8) as floats, zeros after them.
MUSUBI_DEVICE void load_weights(const void* from, Dtype dtype, int64_t i, int64_t count, bool whole,
                                float (&values)[kWeights]) {
  if (!whole) {
    for (int e = 0; e < kWeights; ++e) values[e] = e < count ? load_as_float(from, dtype, i + e) : 0.0f;
  } else if (dtype == Dtype::f32) {
    const float4* const p = reinterpret_cast<const float4*>(static_cast<const float*>(from) + i);
    const float4 a = p[0], b = p[1];
    values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
    values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + i);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    for (int p = 0; p < 4; ++p) {
      values[2 * p] = dtype == Dtype::bf16 ? Bf16::low(words[p]) : F16::low(words[p]);
      values[2 * p + 1] = dtype == Dtype::bf16 ? Bf16::high(words[p]) : F16::high(words[p]);
    }
  }
}

// The largest magnitude so far as bits of a float: NaN beats infinity beats numbers.
MUSUBI_DEVICE uint32_t peak_with(uint32_t peak, const float (&values)[kWeights]) {
  for (int e = 0; e < kWeights; ++e) {
    const uint32_t a = float_to_bits(values[e]) & 0x7fffffffu;
    peak = a > peak ? a : peak;
  }
  return peak;
}

// The scale of a group with this peak, rounded to its dtype and clamped there.
template <Format kFormat>
MUSUBI_DEVICE float scale_of(uint32_t peak, Dtype dtype) {
  float scale = bits_to_float(peak) / Numbers<kFormat>::largest_value, smallest = 1e-8f;
  if (dtype != Dtype::f32) {
    const bool bf16 = dtype == Dtype::bf16;
    scale = bf16 ? Bf16::low(Bf16::round(scale)) : F16::low(F16::round(scale));
    smallest = bf16 ? Bf16::low(Bf16::round(smallest)) : F16::low(F16::round(smallest));
  }
  return scale < smallest ? smallest : scale;
}

// A zero scale (float16, all weights zero) gives zeros.
template <Format kFormat>
MUSUBI_DEVICE void store_codes(uint8_t* to, int64_t count, bool whole, float scale, const float (&values)[kWeights]) {
  uint32_t words[2] = {0, 0};
  if (scale != 0.0f) {
    for (int e = 0; e < kWeights; ++e) words[e / 4] |= encode<kFormat>(values[e], scale) << (8 * (e % 4));
  }
  if (whole) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
    for (int e = 0; e < kWeights && e < count; ++e) to[e] = static_cast<uint8_t>(words[e / 4] >> (8 * (e % 4)));
  }
}

// One team of kTeam lanes per group; a lane takes every kTeam-th eight of its weights.
template <Format kFormat, int kTeam>
MUSUBI_KERNEL(kThreads, 2)
quantize_groups(QuantizeTask task, int64_t per_row, bool whole) {
  const int64_t group = block_index() * (kThreads / kTeam) + thread_index() / kTeam;
  const int lane = thread_index() % kTeam;
  const bool here = group < task.w.rows * per_row;  // a warp stays together for the shuffles
  const int64_t row = here ? divide(group, per_row) : 0, start = here ? (group - row * per_row) * task.width : 0;
  const char* const from =
      static_cast<const char*>(task.w.data) + (row * task.w.stride + start) * (task.w.dtype == Dtype::f32 ? 4 : 2);
  const int64_t width = here ? task.width : 0;
  float held[kHeldSteps][kWeights];
  uint32_t peak = 0;
#pragma unroll
  for (int s = 0; s < kHeldSteps; ++s) {
    const int64_t i = (s * kTeam + lane) * kWeights;
    load_weights(from, task.w.dtype, i, width - i, whole && i < width, held[s]);
    peak = peak_with(peak, held[s]);
  }
  for (int64_t i = (kHeldSteps * kTeam + lane) * kWeights; i < width; i += kTeam * kWeights) {
    float values[kWeights];
    load_weights(from, task.w.dtype, i, width - i, whole, values);
    peak = peak_with(peak, values);
  }
#pragma unroll
  for (int mask = kTeam / 2; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(peak, mask);
    peak = other > peak ? other : peak;
  }
  if (!here) return;
  const float scale = scale_of<kFormat>(peak, task.scale_dtype);
  if (lane == 0) store_float(task.scales, task.scale_dtype, group, scale);
  uint8_t* const to = task.codes + row * task.w.cols + start;
#pragma unroll
  for (int s = 0; s < kHeldSteps; ++s) {
    const int64_t i = (s * kTeam + lane) * kWeights;
    if (i < width) store_codes<kFormat>(to + i, width - i, whole, scale, held[s]);
  }
  for (int64_t i = (kHeldSteps * kTeam + lane) * kWeights; i < width; i += kTeam * kWeights) {
    float values[kWeights];
    load_weights(from, task.w.dtype, i, width - i, whole, values);
    store_codes<kFormat>(to + i, width - i, whole, scale, values);
  }
}

// One group over everything, first pass: its peak.
MUSUBI_KERNEL(kThreads, 2)
peak_of_all(QuantizeTask task, uint32_t* peak, bool whole) {
  uint32_t found = 0;
  const int64_t step = grid_width() * kThreads * kWeights;
  for (int64_t i = (block_index() * kThreads + thread_index()) * kWeights; i < task.w.cols; i += step) {
    float values[kWeights];
    load_weights(task.w.data, task.w.dtype, i, task.w.cols - i, whole, values);
    found = peak_with(found, values);
  }
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const uint32_t other = shuffle_xor(found, mask);
    found = other > found ? other : found;
  }
  if (thread_index() % kWarp == 0 && found != 0) atomic_max(peak, found);
}

// One group over everything, second pass: the codes.
template <Format kFormat>
MUSUBI_KERNEL(kThreads, 2)
quantize_all(QuantizeTask task, const uint32_t* peak, bool whole) {
  const float scale = scale_of<kFormat>(*peak, task.scale_dtype);
  const int64_t step = grid_width() * kThreads * kWeights;
  for (int64_t i = (block_index() * kThreads + thread_index()) * kWeights; i < task.w.cols; i += step) {
    float values[kWeights];
    load_weights(task.w.data, task.w.dtype, i, task.w.cols - i, whole, values);
    store_codes<kFormat>(task.codes + i, task.w.cols - i, whole, scale, values);
  }
  if (block_index() == 0 && thread_index() == 0) store_float(task.scales, task.scale_dtype, 0, scale);
}

template <Format kFormat>
int quantize_as(const QuantizeTask& task, uint32_t* peak, int64_t stream) {
  const int64_t bytes = size_of(task.w.dtype);
  const bool whole = task.width % kWeights == 0 && reinterpret_cast<uintptr_t>(task.w.data) % 16 == 0 &&
                     (task.w.rows == 1 || task.w.stride * bytes % 16 == 0) &&
                     reinterpret_cast<uintptr_t>(task.codes) % kWeights == 0;
  if (task.w.rows == 1 && task.width == task.w.cols) {
    const int64_t needed = (task.w.cols + kThreads * kWeights - 1) / (kThreads * kWeights);
    const Grid grid{needed < 4096 ? needed : 4096, 1};
    const int error = MUSUBI_LAUNCH((peak_of_all), grid, kThreads, 0, stream, task, peak, whole);
    if (error != 0) return error;
    return MUSUBI_LAUNCH((quantize_all<kFormat>), grid, kThreads, 0, stream, task, peak, whole);
  }
  const int64_t per_row = task.w.cols / task.width, groups = task.w.rows * per_row;
  const auto grid_for = [&](int team) {
    const int64_t per_block = kThreads / team;
    return Grid{(groups + per_block - 1) / per_block, 1};
  };
  if (task.width <= 8 * kWeights * kHeldSteps) {
    return MUSUBI_LAUNCH((quantize_groups<kFormat, 8>), grid_for(8), kThreads, 0, stream, task, per_row, whole);
  }
  return MUSUBI_LAUNCH((quantize_groups<kFormat, 32>), grid_for(32), kThreads, 0, stream, task, per_row, whole);
}

int quantize(const QuantizeTask& task, uint32_t* peak, int64_t stream) {
  if (task.w.rows == 0 || task.w.cols == 0) return 0;
  return task.format == Format::e4m3 ? quantize_as<Format::e4m3>(task, peak, stream)
                                     : quantize_as<Format::e5m2>(task, peak, stream);
}

}  // namespace musubi::gpu
