// Quantise and dequantise, written as plain loops over short buffers that every compiler turns into vectors, and
// compiled once per ISA in its own namespace. Division and rounding are IEEE, so all of them give the same bits.
#include <cstring>
#include <vector>

#include "common/pool.h"
#include "common/scratch.h"
#include "ops/fp8_quantize/fp8_quantize.h"
#include "ops/fp8_quantize/fp8_search-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr int64_t kPiece = 512;               // weights handled at once, held as floats
constexpr int64_t kChunkWeights = 64 * 1024;  // weights per chunk of the pool
constexpr int kTogether = 16;                 // groups whose scales are computed at once

// The least scale as a scale of this dtype holds it.
inline float least_scale(Dtype dtype) {
  alignas(4) char held[4];
  Vec::put(held, dtype, 0, kSmallestScale);
  return Vec::one(held, dtype, 0);
}

// Stores the scales of `count` neighbouring groups with these peaks, the first of them `group`, and gives them back as
// they were rounded. A NaN stays one.
template <Format kFormat>
MUSUBI_INLINE void store_scales(const QuantizeTask& task, int64_t group, int count, const uint32_t* peaks, float floor,
                                float* scales) {
  alignas(64) char held[4 * kTogether];
  for (int i = 0; i < kTogether; ++i) scales[i] = float_of(peaks[i]) / Numbers<kFormat>::largest_value;
  for (int i = 0; i < kTogether; i += Vec::W) {
    Vec::store_as(held, task.scale_dtype, i, Vec::max(Vec::set1(floor), Vec::load(scales + i)));
    Vec::store(scales + i, Vec::load_as(held, task.scale_dtype, i));
  }
  const int64_t size = size_of(task.scale_dtype);
  char* const to = static_cast<char*>(task.scales) + group * size;
  if (count == kTogether) {
    std::memcpy(to, held, 2 * kTogether);
    if (size == 4) std::memcpy(to + 2 * kTogether, held + 2 * kTogether, 2 * kTogether);
  } else {
    std::memcpy(to, held, static_cast<size_t>(count * size));
  }
}

// How far ahead of what is encoded to ask for weights: where the groups begin whose peaks are looked for next, or, in
// one group over everything, near enough to be kept until then.
inline int64_t weights_ahead(const QuantizeTask& task) {
  const int64_t next = task.width * least(kTogether, task.w.cols / task.width);
  return next <= kChunkWeights / 2 ? next : 1024;
}

// Asks for bytes that are read soon: encoding takes longer than looking for peaks and leaves memory idle. Bytes beyond
// the weight are no harm.
MUSUBI_INLINE void fetch(const void* base, int64_t offset, int64_t bytes) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset);
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(start + static_cast<uintptr_t>(i)));
  }
}

inline float scale_of(const Fp8Rows& w, int64_t row, int64_t block) {
  return Vec::one(w.scale, w.scale_dtype, row * w.scale_row + block * w.scale_block);
}

// What an instruction set may do better, one of its own for each chunk; the plain way serves every one.
struct PlainBody {
  // The bits of the largest magnitude among `count` weights from `start`, as a float; any NaN wins, then inf.
  static uint32_t peak_bits(const void* from, Dtype dtype, int64_t start, int64_t count) {
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

  // Encodes `count` weights of a row from `start`. A zero scale (float16, all weights zero) gives zeros.
  template <Format kFormat>
  static void encode_run(const QuantizeTask& task, const void* row, int64_t start, int64_t count, float scale,
                         uint8_t* codes) {
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

  // The codes of `count` neighbouring groups of task.width weights from `start`; `codes` is the row's.
  template <Format kFormat>
  static void encode_groups(const QuantizeTask& task, const void* row, int64_t start, int count, const float* scales,
                            uint8_t* codes) {
    for (int i = 0; i < count; ++i) {
      const int64_t at = start + i * task.width;
      encode_run<kFormat>(task, row, at, task.width, scales[i], codes + at);
    }
  }

  // Weights k0 .. k1 of row n.
  static void decode(const DequantizeTask& task, int64_t n, int64_t k0, int64_t k1) {
    const Fp8Rows& w = task.w;
    char* const out = static_cast<char*>(task.out) + n * w.cols * size_of(task.out_dtype);
    for (int64_t k = k0, block = k0 / w.block; k < k1; ++block) {
      const int64_t end = least(k1, (block + 1) * w.block);
      run(w.codes + n * w.stride + k, end - k, scale_of(w, n, block), w.format, out + k * size_of(task.out_dtype),
          task.out_dtype);
      k = end;
    }
  }

  // out[0 .. count) = codes * scale
  static void run(const uint8_t* codes, int64_t count, float scale, Format format, char* out, Dtype dtype) {
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

  // The peaks of `count` <= kTogether neighbouring groups of `width` weights from `start`.
  static void peaks(const void* from, Dtype dtype, int64_t start, int64_t width, int count, uint32_t* out) {
    for (int i = 0; i < count; ++i) out[i] = peak_bits(from, dtype, start + i * width, width);
  }

  // After the last byte of a chunk is written.
  static void done() {}
};

inline const void* row_of(const Rows& w, int64_t row) {
  return static_cast<const char*>(w.data) + row * w.stride * size_of(w.dtype);
}

// Puts the best scales of `count` groups, of which `group` is the first, in place of their absmax scales.
template <Format kFormat>
MUSUBI_NOINLINE void search_groups(const QuantizeTask& task, const void* row, int64_t start, int64_t group, int count,
                                   float* scales) {
  for (int i = 0; i < count; ++i) {
    if (!(scales[i] > 0.0f)) continue;
    Search<kFormat> search(task.scale_dtype, scales[i]);
    search.add(row, task.w.dtype, start + i * task.width, task.width);
    scales[i] = search.best();
    Vec::put(task.scales, task.scale_dtype, group + i, scales[i]);
  }
}

template <class Body, Format kFormat>
void quantize_groups(const QuantizeTask& task) {
  const int64_t per_row = task.w.cols / task.width;
  const int64_t rows = kChunkWeights / task.w.cols + 1;
  const float floor = least_scale(task.scale_dtype);
  parallel_chunks((task.w.rows + rows - 1) / rows, task.threads, [&](int64_t chunk) {
    Body body;
    alignas(64) uint32_t peaks[kTogether] = {};
    alignas(64) float scales[kTogether];
    const int64_t end = least(task.w.rows, (chunk + 1) * rows);
    if (task.pages.fresh) make_pages(task.codes + chunk * rows * task.w.cols, (end - chunk * rows) * task.w.cols);
    for (int64_t r = chunk * rows; r < end; ++r) {
      const void* const row = row_of(task.w, r);
      for (int64_t g = 0; g < per_row; g += kTogether) {
        const int count = static_cast<int>(least(kTogether, per_row - g));
        body.peaks(row, task.w.dtype, g * task.width, task.width, count, peaks);
        store_scales<kFormat>(task, r * per_row + g, count, peaks, floor, scales);
        if (task.search) search_groups<kFormat>(task, row, g * task.width, r * per_row + g, count, scales);
        body.template encode_groups<kFormat>(task, row, g * task.width, count, scales, task.codes + r * task.w.cols);
      }
    }
    body.done();
  });
}

// One group over everything: the peak first, by chunks, then the codes.
template <class Body, Format kFormat>
void quantize_whole(const QuantizeTask& task) {
  const int64_t chunks = (task.w.cols + kChunkWeights - 1) / kChunkWeights;
  const auto count = [&](int64_t c) { return least(kChunkWeights, task.w.cols - c * kChunkWeights); };
  uint32_t* const peaks = static_cast<uint32_t*>(scratch(Slot::sums, chunks * 4));
  parallel_chunks(chunks, task.threads, [&](int64_t c) {
    peaks[c] = Body::peak_bits(task.w.data, task.w.dtype, c * kChunkWeights, count(c));
  });
  alignas(64) uint32_t peak[kTogether] = {};
  alignas(64) float scales[kTogether];
  for (int64_t c = 0; c < chunks; ++c) peak[0] = peaks[c] > peak[0] ? peaks[c] : peak[0];
  store_scales<kFormat>(task, 0, 1, peak, least_scale(task.scale_dtype), scales);
  float scale = scales[0];
  if (task.search && scale > 0.0f) {
    std::vector<Search<kFormat>> parts(static_cast<size_t>(chunks), Search<kFormat>(task.scale_dtype, scale));
    parallel_chunks(chunks, task.threads, [&](int64_t c) {
      parts[static_cast<size_t>(c)].add(task.w.data, task.w.dtype, c * kChunkWeights, count(c));
    });
    for (size_t c = 1; c < parts.size(); ++c) parts[0].add(parts[c]);
    scale = parts[0].best();
    Vec::put(task.scales, task.scale_dtype, 0, scale);
  }
  parallel_chunks(chunks, task.threads, [&](int64_t c) {
    Body body;
    const int64_t start = c * kChunkWeights;
    if (task.pages.fresh) make_pages(task.codes + start, count(c));
    body.template encode_run<kFormat>(task, task.w.data, start, count(c), scale, task.codes + start);
    body.done();
  });
}

template <class Body, Format kFormat>
void quantize_as(const QuantizeTask& task) {
  if (task.w.rows == 1 && task.width == task.w.cols) {
    quantize_whole<Body, kFormat>(task);
  } else if (task.w.rows > 0 && task.w.cols > 0) {
    quantize_groups<Body, kFormat>(task);
  }
}

template <class Body>
void quantize_with(const QuantizeTask& task) {
  task.format == Format::e4m3 ? quantize_as<Body, Format::e4m3>(task) : quantize_as<Body, Format::e5m2>(task);
}

template <class Body>
void dequantize_with(const DequantizeTask& task) {
  const Fp8Rows& w = task.w;
  if (w.rows == 0 || w.cols == 0) return;
  // pieces of a row are chunks of their own, since one row may be a whole tensor
  const int64_t piece = w.block < kChunkWeights ? kChunkWeights / w.block * w.block : kChunkWeights;
  const int64_t per_row = (w.cols + piece - 1) / piece;
  const int64_t rows = per_row > 1 ? 1 : kChunkWeights / w.cols + 1;
  const int64_t chunks = (w.rows + rows - 1) / rows * per_row;
  parallel_chunks(chunks, task.threads, [&](int64_t chunk) {
    Body body;
    const int64_t first = chunk / per_row * rows, k0 = chunk % per_row * piece, k1 = least(w.cols, k0 + piece);
    const int64_t last = least(w.rows, first + rows);
    if (task.pages.fresh) {
      const int64_t size = size_of(task.out_dtype), from = first * w.cols + k0, to = (last - 1) * w.cols + k1;
      make_pages(static_cast<char*>(task.out) + from * size, (to - from) * size);
    }
    for (int64_t n = first; n < last; ++n) body.decode(task, n, k0, k1);
    body.done();
  });
}

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
