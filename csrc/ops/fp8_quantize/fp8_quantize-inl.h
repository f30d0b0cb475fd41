// Quantise and dequantise, written as plain loops over short buffers that every compiler turns into vectors, and
// compiled once per ISA in its own namespace. Division and rounding are IEEE, so all of them give the same bits.
#include <cstring>

#include "common/pool.h"
#include "common/scratch.h"
#include "ops/fp8_quantize/fp8_quantize.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr int64_t kPiece = 512;               // weights handled at once, held as floats
constexpr int64_t kChunkWeights = 64 * 1024;  // weights per chunk of the pool
constexpr float kSmallestScale = 1e-8f;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Numbers that define a format: the bits of its largest value as a float, the mantissa bits a float has too many, the
// exponent offset in codes, the smallest normal, and the float whose last place is the format's smallest step.
template <Format kFormat>
struct Numbers;
template <>
struct Numbers<Format::e4m3> {
  static constexpr uint32_t largest = 0x43e00000, shift = 20, offset = 120u << 3, normal = 0x3c800000;
  static constexpr uint32_t step = 0x46800000;
  static constexpr float largest_value = 448.0f, step_value = 16384.0f;
};
template <>
struct Numbers<Format::e5m2> {
  static constexpr uint32_t largest = 0x47600000, shift = 21, offset = 112u << 2, normal = 0x38800000;
  static constexpr uint32_t step = 0x43000000;
  static constexpr float largest_value = 57344.0f, step_value = 128.0f;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// codes = saturating cast of values / scale, ties to even.
template <Format kFormat>
void encode(const float* values, int64_t count, float scale, uint8_t* codes) {
  using N = Numbers<kFormat>;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(values[i] / scale);
    const uint32_t all = bits & 0x7fffffffu;
    const uint32_t a = all < N::largest ? all : N::largest;
    const uint32_t rounded = ((a + ((1u << (N::shift - 1)) - 1) + ((a >> N::shift) & 1u)) >> N::shift) - N::offset;
    const uint32_t counted = bits_of(float_of(a) + N::step_value) - N::step;
    codes[i] = static_cast<uint8_t>((a < N::normal ? counted : rounded) | ((bits >> 24) & 0x80u));
  }
}

inline void floats_from(const void* from, Dtype dtype, int64_t start, int64_t count, float* out) {
  int64_t i = 0;
  const char* base = static_cast<const char*>(from) + start * size_of(dtype);
  for (; i + Vec::W <= count; i += Vec::W) Vec::store(out + i, Vec::load_as(base, dtype, i));
  for (; i < count; ++i) out[i] = Vec::one(base, dtype, i);
}

// The bits of the largest magnitude among `count` weights from `start`, as a float; any NaN wins, then inf.
inline uint32_t peak_bits(const void* from, Dtype dtype, int64_t start, int64_t count) {
  if (dtype == Dtype::f32) {
    const uint32_t* p = static_cast<const uint32_t*>(from) + start;
    uint32_t peak = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t a = p[i] & 0x7fffffffu;
      peak = a > peak ? a : peak;
    }
    return peak;
  }
  const uint16_t* p = static_cast<const uint16_t*>(from) + start;
  uint16_t peak = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t a = static_cast<uint16_t>(p[i] & 0x7fff);
    peak = a > peak ? a : peak;
  }
  return bits_of(Vec::one(&peak, dtype, 0));
}

// Stores the scale of a group with this peak and gives it back as it was rounded.
template <Format kFormat>
float store_scale(const QuantizeTask& task, int64_t group, uint32_t peak) {
  Vec::put(task.scales, task.scale_dtype, group, float_of(peak) / Numbers<kFormat>::largest_value);
  float floor = kSmallestScale;
  alignas(4) char held[4];
  Vec::put(held, task.scale_dtype, 0, floor);
  floor = Vec::one(held, task.scale_dtype, 0);
  const float scale = Vec::one(task.scales, task.scale_dtype, group);
  if (!(scale < floor)) return scale;
  Vec::put(task.scales, task.scale_dtype, group, floor);
  return floor;
}

// Encodes `count` weights of a row from `start`. A zero scale (float16, all weights zero) gives zeros.
template <Format kFormat>
void encode_run(const QuantizeTask& task, const void* row, int64_t start, int64_t count, float scale, uint8_t* codes) {
  if (scale == 0.0f) {
    std::memset(codes, 0, static_cast<size_t>(count));
    return;
  }
  alignas(64) float values[kPiece];
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t here = least(kPiece, count - i);
    floats_from(row, task.w.dtype, start + i, here, values);
    encode<kFormat>(values, here, scale, codes + i);
  }
}

inline const void* row_of(const Rows& w, int64_t row) {
  return static_cast<const char*>(w.data) + row * w.stride * size_of(w.dtype);
}

template <Format kFormat>
void quantize_groups(const QuantizeTask& task) {
  const int64_t per_row = task.w.cols / task.width;
  const int64_t rows = kChunkWeights / task.w.cols + 1;
  parallel_chunks((task.w.rows + rows - 1) / rows, task.threads, [&](int64_t chunk) {
    for (int64_t r = chunk * rows; r < least(task.w.rows, (chunk + 1) * rows); ++r) {
      const void* const row = row_of(task.w, r);
      for (int64_t g = 0; g < per_row; ++g) {
        const int64_t start = g * task.width;
        const float scale =
            store_scale<kFormat>(task, r * per_row + g, peak_bits(row, task.w.dtype, start, task.width));
        encode_run<kFormat>(task, row, start, task.width, scale, task.codes + r * task.w.cols + start);
      }
    }
  });
}

// One group over everything: the peak first, by chunks, then the codes.
template <Format kFormat>
void quantize_whole(const QuantizeTask& task) {
  const int64_t chunks = (task.w.cols + kChunkWeights - 1) / kChunkWeights;
  uint32_t* const peaks = static_cast<uint32_t*>(scratch(Slot::sums, chunks * 4));
  parallel_chunks(chunks, task.threads, [&](int64_t c) {
    const int64_t start = c * kChunkWeights;
    peaks[c] = peak_bits(task.w.data, task.w.dtype, start, least(kChunkWeights, task.w.cols - start));
  });
  uint32_t peak = 0;
  for (int64_t c = 0; c < chunks; ++c) peak = peaks[c] > peak ? peaks[c] : peak;
  const float scale = store_scale<kFormat>(task, 0, peak);
  parallel_chunks(chunks, task.threads, [&](int64_t c) {
    const int64_t start = c * kChunkWeights;
    const int64_t count = least(kChunkWeights, task.w.cols - start);
    encode_run<kFormat>(task, task.w.data, start, count, scale, task.codes + start);
  });
}

template <Format kFormat>
void quantize_as(const QuantizeTask& task) {
  if (task.w.rows == 1 && task.width == task.w.cols) {
    quantize_whole<kFormat>(task);
  } else if (task.w.rows > 0 && task.w.cols > 0) {
    quantize_groups<kFormat>(task);
  }
}

inline void quantize_any(const QuantizeTask& task) {
  task.format == Format::e4m3 ? quantize_as<Format::e4m3>(task) : quantize_as<Format::e5m2>(task);
}

// out[i .. i + count) of a row = codes * scale
inline void dequantize_run(const uint8_t* codes, int64_t count, float scale, Format format, char* out, Dtype dtype) {
  const auto factor = Vec::set1(scale);
  int64_t i = 0;
  for (; i + Vec::W <= count; i += Vec::W) {
    Vec::store_as(out, dtype, i, Vec::mul(Vec::decode(codes + i, format), factor));
  }
  if (i == count) return;
  uint8_t few[Vec::W] = {};
  alignas(64) char wide[4 * Vec::W];
  std::memcpy(few, codes + i, static_cast<size_t>(count - i));
  Vec::store_as(wide, dtype, 0, Vec::mul(Vec::decode(few, format), factor));
  std::memcpy(out + i * size_of(dtype), wide, static_cast<size_t>((count - i) * size_of(dtype)));
}

template <class Run>
void dequantize_with(const DequantizeTask& task, const Run& run) {
  const Fp8Rows& w = task.w;
  if (w.rows == 0 || w.cols == 0) return;
  // pieces of a row are chunks of their own, since one row may be a whole tensor
  const int64_t piece = w.block < kChunkWeights ? kChunkWeights / w.block * w.block : kChunkWeights;
  const int64_t per_row = (w.cols + piece - 1) / piece;
  const int64_t rows = per_row > 1 ? 1 : kChunkWeights / w.cols + 1;
  const int64_t chunks = (w.rows + rows - 1) / rows * per_row;
  parallel_chunks(chunks, task.threads, [&](int64_t chunk) {
    const int64_t first = chunk / per_row * rows, k0 = chunk % per_row * piece, k1 = least(w.cols, k0 + piece);
    for (int64_t n = first; n < least(w.rows, first + rows); ++n) {
      char* const out = static_cast<char*>(task.out) + n * w.cols * size_of(task.out_dtype);
      for (int64_t k = k0; k < k1;) {
        const int64_t end = least(k1, (k / w.block + 1) * w.block);
        const float scale = Vec::one(w.scale, w.scale_dtype, n * w.scale_row + (k / w.block) * w.scale_block);
        run(w.codes + n * w.stride + k, end - k, scale, w.format, out + k * size_of(task.out_dtype), task.out_dtype);
        k = end;
      }
    }
  });
}

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
