// Quantise and dequantise, written as plain loops over short buffers that every compiler turns into vectors, and
// compiled once per ISA in its own namespace. Division and rounding are IEEE, so all of them give the same bits.
#include <cmath>
#include <cstring>
#include <vector>

#include "common/pool.h"
#include "common/scratch.h"
#include "ops/fp8_quantize/fp8_quantize.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr int64_t kPiece = 512;               // weights handled at once, held as floats
constexpr int64_t kChunkWeights = 64 * 1024;  // weights per chunk of the pool
constexpr float kSmallestScale = 1e-8f;
constexpr int64_t kStreamBytes = 8 << 20;  // results from this size on are written past the caches

inline bool streams(int64_t bytes) { return bytes >= kStreamBytes; }

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
  static constexpr int largest_code = 0x7e;
};
template <>
struct Numbers<Format::e5m2> {
  static constexpr uint32_t largest = 0x47600000, shift = 21, offset = 112u << 2, normal = 0x38800000;
  static constexpr uint32_t step = 0x43000000;
  static constexpr float largest_value = 57344.0f, step_value = 128.0f;
  static constexpr int largest_code = 0x7b;
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

// The least scale as a scale of this dtype holds it.
inline float least_scale(Dtype dtype) {
  alignas(4) char held[4];
  Vec::put(held, dtype, 0, kSmallestScale);
  return Vec::one(held, dtype, 0);
}

// Stores the scale of a group with this peak and gives it back as it was rounded.
template <Format kFormat>
MUSUBI_INLINE float store_scale(const QuantizeTask& task, int64_t group, uint32_t peak, float floor) {
  Vec::put(task.scales, task.scale_dtype, group, float_of(peak) / Numbers<kFormat>::largest_value);
  const float scale = Vec::one(task.scales, task.scale_dtype, group);
  if (!(scale < floor)) return scale;
  Vec::put(task.scales, task.scale_dtype, group, floor);
  return floor;
}

// What an instruction set may do better; the plain way serves every one.
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

  // out[i .. i + count) of a row = codes * scale
  static void run(const uint8_t* codes, int64_t count, float scale, Format format, char* out, Dtype dtype, bool) {
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

  // After the last byte of a chunk is written.
  static void done() {}
};

inline const void* row_of(const Rows& w, int64_t row) {
  return static_cast<const char*>(w.data) + row * w.stride * size_of(w.dtype);
}

// The factors of the absmax scale that `search` tries. FP8 numbers repeat with every doubling, so one octave holds all
// alignments of weights to codes; it begins where the largest weight still rounds to the largest code. Eight factors
// make the largest weight exact, which is what groups with an outlier need; the others are spread evenly.
constexpr int kFactors = 32;
constexpr int64_t kSearchPiece = 4096;

struct Factors {
  alignas(64) float value[kFactors];

  Factors() {
    for (int i = 0; i < 8; ++i) value[i] = static_cast<float>(448.0 / (i < 7 ? 448.0 - 32.0 * i : 240.0));
    for (int i = 8; i < kFactors; ++i) value[i] = static_cast<float>(std::exp2((i == 8 ? -1 : i - 8) / 24.0));
  }
};

// What the best scale of a group is looked for with: trial scales, and the squared error that each would leave.
template <Format kFormat>
class Search {
 public:
  Search(const QuantizeTask& task, float start) : task_(task) {
    static const Factors factors;
    alignas(64) char held[4 * kFactors];
    const auto first = Vec::set1(start), floor = Vec::set1(kSmallestScale);
    for (int i = 0; i < kFactors; i += Vec::W) {
      const auto trial = Vec::max(Vec::mul(first, Vec::load(factors.value + i)), floor);
      Vec::store_as(held, task.scale_dtype, i, trial);
      Vec::store(scales_ + i, Vec::load_as(held, task.scale_dtype, i));
    }
    scales_[0] = start;
    for (int i = 0; i < kFactors; ++i) inverses_[i] = 1.0f / scales_[i];
  }

  // Adds the errors of `count` weights of a row from `start`.
  void add(const void* row, int64_t start, int64_t count) {
    alignas(64) float sizes[kSearchPiece + Vec::W];
    for (int64_t i = 0; i < count; i += kSearchPiece) {
      const int64_t here = least(kSearchPiece, count - i);
      floats_from(row, task_.w.dtype, start + i, here, sizes);
      for (int64_t j = here; j % Vec::W != 0; ++j) sizes[j] = 0.0f;
      for (int f = 0; f < kFactors; f += Vec::W) add_piece(sizes, here, f);
    }
  }

  void add(const Search& other) {
    for (int i = 0; i < kFactors; ++i) errors_[i] += other.errors_[i];
  }

  // The scale with the least error, of equals the first: the one that the search began with before all others.
  float best() const {
    int found = 0;
    for (int i = 0; i < kFactors; ++i) found = errors_[i] < errors_[found] ? i : found;
    return scales_[found];
  }

 private:
  // A number is rounded to a format's steps by adding and subtracting one that is 1.5 * 2^k times as large.
  void add_piece(const float* sizes, int64_t count, int first) {
    const auto smallest = Vec::set1(float_of(Numbers<kFormat>::normal));
    const auto lift = Vec::set1(1.5f * static_cast<float>(1u << Numbers<kFormat>::shift));
    const auto minus_lift = Vec::set1(-1.5f * static_cast<float>(1u << Numbers<kFormat>::shift));
    typename Vec::F sums[Vec::W];
    for (int t = 0; t < Vec::W; ++t) {
      const auto inverse = Vec::set1(inverses_[first + t]), minus_scale = Vec::set1(-scales_[first + t]);
      auto sum = Vec::zero(), other = Vec::zero();
      int64_t i = 0;
      const auto error = [&](int64_t at) {
        const auto size = Vec::load(sizes + at);
        const auto q = Vec::mul(size, inverse);
        const auto step = Vec::max(Vec::power_of(q), smallest);
        const auto code = Vec::fma(step, minus_lift, Vec::fma(step, lift, q));
        return Vec::fma(code, minus_scale, size);
      };
      for (; i + 2 * Vec::W <= count; i += 2 * Vec::W) {
        const auto a = error(i), b = error(i + Vec::W);
        sum = Vec::fma(a, a, sum);
        other = Vec::fma(b, b, other);
      }
      for (; i < count; i += Vec::W) {
        const auto a = error(i);
        sum = Vec::fma(a, a, sum);
      }
      sums[t] = Vec::add(sum, other);
    }
    Vec::transpose(sums);
    for (int t = 1; t < Vec::W; ++t) sums[0] = Vec::add(sums[0], sums[t]);
    float totals[Vec::W];
    Vec::store(totals, sums[0]);
    for (int t = 0; t < Vec::W; ++t) errors_[first + t] += static_cast<double>(totals[t]);
  }

  const QuantizeTask& task_;
  alignas(64) float scales_[kFactors];
  alignas(64) float inverses_[kFactors];
  double errors_[kFactors] = {};
};

template <class Body, Format kFormat>
void quantize_groups(const QuantizeTask& task) {
  const int64_t per_row = task.w.cols / task.width;
  const int64_t rows = kChunkWeights / task.w.cols + 1;
  const float floor = least_scale(task.scale_dtype);
  parallel_chunks((task.w.rows + rows - 1) / rows, task.threads, [&](int64_t chunk) {
    for (int64_t r = chunk * rows; r < least(task.w.rows, (chunk + 1) * rows); ++r) {
      const void* const row = row_of(task.w, r);
      for (int64_t g = 0; g < per_row; ++g) {
        const int64_t start = g * task.width, group = r * per_row + g;
        const uint32_t peak = Body::peak_bits(row, task.w.dtype, start, task.width);
        float scale = store_scale<kFormat>(task, group, peak, floor);
        if (task.search && scale > 0.0f) {
          Search<kFormat> search(task, scale);
          search.add(row, start, task.width);
          scale = search.best();
          Vec::put(task.scales, task.scale_dtype, group, scale);
        }
        Body::template encode_run<kFormat>(task, row, start, task.width, scale, task.codes + r * task.w.cols + start);
      }
    }
    Body::done();
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
  uint32_t peak = 0;
  for (int64_t c = 0; c < chunks; ++c) peak = peaks[c] > peak ? peaks[c] : peak;
  float scale = store_scale<kFormat>(task, 0, peak, least_scale(task.scale_dtype));
  if (task.search && scale > 0.0f) {
    std::vector<Search<kFormat>> parts(static_cast<size_t>(chunks), Search<kFormat>(task, scale));
    parallel_chunks(chunks, task.threads,
                    [&](int64_t c) { parts[static_cast<size_t>(c)].add(task.w.data, c * kChunkWeights, count(c)); });
    for (size_t c = 1; c < parts.size(); ++c) parts[0].add(parts[c]);
    scale = parts[0].best();
    Vec::put(task.scales, task.scale_dtype, 0, scale);
  }
  parallel_chunks(chunks, task.threads, [&](int64_t c) {
    const int64_t start = c * kChunkWeights;
    Body::template encode_run<kFormat>(task, task.w.data, start, count(c), scale, task.codes + start);
    Body::done();
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
  const bool stream = streams(w.rows * w.cols * size_of(task.out_dtype));
  parallel_chunks(chunks, task.threads, [&](int64_t chunk) {
    const int64_t first = chunk / per_row * rows, k0 = chunk % per_row * piece, k1 = least(w.cols, k0 + piece);
    for (int64_t n = first; n < least(w.rows, first + rows); ++n) {
      char* const out = static_cast<char*>(task.out) + n * w.cols * size_of(task.out_dtype);
      for (int64_t k = k0; k < k1;) {
        const int64_t end = least(k1, (k / w.block + 1) * w.block);
        const float scale = Vec::one(w.scale, w.scale_dtype, n * w.scale_row + (k / w.block) * w.scale_block);
        Body::run(w.codes + n * w.stride + k, end - k, scale, w.format, out + k * size_of(task.out_dtype),
                  task.out_dtype, stream);
        k = end;
      }
    }
    Body::done();
  });
}

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
