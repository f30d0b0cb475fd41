// Integer products by VNNI. Rows of x become bytes (code + 128, since the instruction takes one side unsigned) in tiles
// of [four neighbours of K][lanes of rows]; eight rows of W at a time become bytes by table, and every four of them
// meet all lanes. A block's sum of 32 bits starts at -128 times the sum of its weights, which undoes the shift of x,
// and meets its scale in float32.
#define MUSUBI_ISA avx512vbmi
// clang-format off: the decoder is written over the vector
#include "common/vec_avx512.h"
#include "common/decode_vbmi.h"
// clang-format on
#include <cmath>
#include <vector>

#include "common/pool.h"
#include "common/scratch.h"
#include "ops/fp8_linear_dynamic/fp8_linear_dynamic.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kOutputs = 64;                    // per chunk of the pool
constexpr int kGroup = 8;                           // rows of W that meet a tile at once
constexpr int64_t kPackedBytes = int64_t{1} << 20;  // x is packed in chunks of rows of about this size: half of an L2
constexpr float kLargest = 127.0f, kSmallestScale = 1e-30f;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

// The integers that stand for the codes of a format, as the reference defines them: two tables of 64, and the sign.
struct Integers {
  alignas(64) int8_t of[128];

  explicit Integers(Format format) {
    const float largest = format == Format::e4m3 ? 448.0f : 57344.0f;
    for (int code = 0; code < 128; ++code) {
      const uint8_t one[Vec::W] = {static_cast<uint8_t>(code)};
      alignas(64) float wide[Vec::W];
      Vec::store(wide, Vec::decode(one, format));
      const float value = std::isfinite(wide[0]) ? wide[0] : largest;
      of[code] = static_cast<int8_t>(std::nearbyint(value * kLargest / largest));
    }
  }
};

class Product {
 public:
  explicit Product(const DynamicTask& task)
      : task_(task),
        table_(task.w.format),
        block_(least(task.w.block, task.w.cols)),
        blocks_(block_ > 0 ? task.w.cols / block_ : 0),
        units_(round_up(block_, 4) / 4),
        weight_factor_((task.w.format == Format::e4m3 ? 448.0f : 57344.0f) / kLargest) {}

  void run() {
    const int64_t row_bytes = 4 * units_ * blocks_ + 1;
    const int64_t most = kPackedBytes / row_bytes / (3 * kLanes) * (3 * kLanes) + 3 * kLanes;
    for (int64_t m = 0; m < task_.x.rows; m += most) part(m, least(most, task_.x.rows - m));
  }

 private:
  void part(int64_t first, int64_t rows) {
    first_ = first;
    rows_ = rows;
    vectors_ = (rows + kLanes - 1) / kLanes;
    const int64_t bytes = vectors_ * kLanes * blocks_ * units_ * 4;
    packed_ = static_cast<uint8_t*>(scratch(Slot::packed, bytes + vectors_ * kLanes * 4 + 64));
    row_scales_ = reinterpret_cast<float*>(packed_ + round_up(bytes, 64));
    parallel_chunks(vectors_, task_.threads, [this](int64_t v) { pack(v); });
    const int64_t n = task_.w.rows;
    parallel_chunks((n + kOutputs - 1) / kOutputs, task_.threads,
                    [this, n](int64_t c) { outputs(c * kOutputs, least(kOutputs, n - c * kOutputs)); });
  }

  // Vector v of rows: its bytes [block][unit][lane][4], and its scales.
  void pack(int64_t v) const {
    uint8_t* const to = packed_ + v * kLanes * blocks_ * units_ * 4;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t m = v * kLanes + lane;
      row_scales_[m] = m < rows_ ? pack_row(first_ + m, to + lane * 4) : 0.0f;
      if (m < rows_) continue;
      for (int64_t u = 0; u < blocks_ * units_; ++u) std::memset(to + (u * kLanes + lane) * 4, 0, 4);
    }
  }

  float pack_row(int64_t row, uint8_t* to) const {
    const void* const x = static_cast<const char*>(task_.x.data) + row * task_.x.stride * size_of(task_.x.dtype);
    const int64_t k = task_.x.cols;
    auto peak = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += kLanes) {
      const __m512i bits = _mm512_castps_si512(floats(x, i, least(kLanes, k - i)));
      peak = _mm512_max_epu32(peak, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const uint32_t top = _mm512_reduce_max_epu32(peak);
    float largest;
    std::memcpy(&largest, &top, 4);
    const bool finite = top < 0x7f800000u;
    const float scale = largest / kLargest > kSmallestScale ? largest / kLargest : kSmallestScale;
    const __m512 divisor = _mm512_set1_ps(finite ? scale : 1.0f);
    alignas(64) uint8_t bytes[64];
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t i = 0; i < block_; i += kLanes) {
        const int64_t count = least(kLanes, block_ - i);
        const __m512 values = finite ? floats(x, b * block_ + i, count) : _mm512_setzero_ps();
        const __m512i codes =
            _mm512_cvt_roundps_epi32(_mm512_div_ps(values, divisor), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes),
                        _mm512_cvtepi32_epi8(_mm512_add_epi32(codes, _mm512_set1_epi32(128))));
        uint8_t* const at = to + (b * units_ + i / 4) * kLanes * 4;
        for (int64_t u = 0; 4 * u < count; ++u) std::memcpy(at + u * kLanes * 4, bytes + 4 * u, 4);
      }
    }
    return finite ? scale : NAN;
  }

  __m512 floats(const void* x, int64_t i, int64_t count) const {
    if (count == kLanes) return Vec::load_as(x, task_.x.dtype, i);
    alignas(64) char few[64] = {};
    std::memcpy(few, static_cast<const char*>(x) + i * size_of(task_.x.dtype),
                static_cast<size_t>(count * size_of(task_.x.dtype)));
    return Vec::load_as(few, task_.x.dtype, 0);
  }

  void outputs(int64_t j0, int64_t jn) const {
    const int64_t row_bytes = blocks_ * units_ * 4;
    int8_t* const weights = static_cast<int8_t*>(scratch(Slot::panel, kGroup * (row_bytes + 64)));
    float* const sums = static_cast<float*>(scratch(Slot::sums, vectors_ * kLanes * kOutputs * 4));
    const int64_t per_group = kGroup * blocks_;
    float* const scales = static_cast<float*>(scratch(Slot::rows, per_group * 8 + 64));
    int32_t* const shifts = reinterpret_cast<int32_t*>(scales + per_group);
    for (int64_t j = 0; j < kOutputs; j += kGroup) {
      for (int r = 0; r < kGroup; ++r) {
        const bool there = j + r < jn;
        row_of_weights(there ? j0 + j + r : j0, weights + r * row_bytes, scales + r * blocks_, shifts + r * blocks_);
      }
      for (int64_t v = 0; v < vectors_;) {
        const int64_t left = vectors_ - v;
        float* const to = sums + (v * kOutputs + j) * kLanes;
        const uint8_t* const x = packed_ + v * kLanes * row_bytes;
        if (left >= 2) {
          tile<2>(x, weights, scales, shifts, to);
          v += 2;
        } else {
          tile<1>(x, weights, scales, shifts, to);
          v += 1;
        }
      }
      if (j + kGroup >= jn) break;
    }
    for (int64_t v = 0; v < vectors_; ++v) finish(v, j0, jn, sums + v * kOutputs * kLanes);
  }

  // Row n of W as integers, each block padded with zeros; its scales, and -128 times each block's sum.
  void row_of_weights(int64_t n, int8_t* to, float* scales, int32_t* shifts) const {
    const Fp8Rows& w = task_.w;
    const __m512i lower = _mm512_load_si512(table_.of), upper = _mm512_load_si512(table_.of + 64);
    const uint8_t* codes = w.codes + n * w.stride;
    for (int64_t b = 0; b < blocks_; ++b, codes += block_, to += units_ * 4) {
      __m512i total = _mm512_setzero_si512();
      for (int64_t i = 0; i < block_; i += 64) {
        const __m512i c = _mm512_maskz_loadu_epi8(first(block_ - i), codes + i);
        const __m512i size = _mm512_permutex2var_epi8(lower, c, upper);
        const __m512i signed_size = _mm512_mask_sub_epi8(size, _mm512_movepi8_mask(c), _mm512_setzero_si512(), size);
        total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), signed_size);
        _mm512_mask_storeu_epi8(to + i, first(units_ * 4 - i), signed_size);
      }
      shifts[b] = -128 * _mm512_reduce_add_epi32(total);
      scales[b] = Vec::one(w.scale, w.scale_dtype, n * w.scale_row + b * w.scale_block) * weight_factor_;
    }
  }

  template <int V>
  void tile(const uint8_t* x, const int8_t* weights, const float* scales, const int32_t* shifts, float* to) const {
    const int64_t row_bytes = blocks_ * units_ * 4, vector_bytes = kLanes * row_bytes;
    __m512 whole[kGroup * V];
    MUSUBI_UNROLL
    for (int i = 0; i < kGroup * V; ++i) whole[i] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks_; ++b) {
      __m512i part[kGroup * V];
      MUSUBI_UNROLL
      for (int r = 0; r < kGroup; ++r) {
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) part[r * V + v] = _mm512_set1_epi32(shifts[r * blocks_ + b]);
      }
      for (int64_t u = b * units_; u < (b + 1) * units_; ++u) {
        __m512i xs[V];
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) xs[v] = _mm512_loadu_si512(x + v * vector_bytes + u * kLanes * 4);
        MUSUBI_UNROLL
        for (int r = 0; r < kGroup; ++r) {
          int32_t four;
          std::memcpy(&four, weights + r * row_bytes + u * 4, 4);
          const __m512i w = _mm512_set1_epi32(four);
          MUSUBI_UNROLL
          for (int v = 0; v < V; ++v) part[r * V + v] = _mm512_dpbusd_epi32(part[r * V + v], xs[v], w);
        }
      }
      MUSUBI_UNROLL
      for (int r = 0; r < kGroup; ++r) {
        const __m512 scale = _mm512_set1_ps(scales[r * blocks_ + b]);
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) {
          whole[r * V + v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[r * V + v]), scale, whole[r * V + v]);
        }
      }
    }
    MUSUBI_UNROLL
    for (int r = 0; r < kGroup; ++r) {
      MUSUBI_UNROLL
      for (int v = 0; v < V; ++v) Vec::store(to + (v * kOutputs + r) * kLanes, whole[r * V + v]);
    }
  }

  // sums [kOutputs][lanes] of vector v -> out: times the rows' scales, plus the bias, lanes to rows, rounded once.
  void finish(int64_t v, int64_t j0, int64_t jn, const float* sums) const {
    const int64_t rows = least(kLanes, rows_ - v * kLanes), n = task_.w.rows, bytes = size_of(task_.out_dtype);
    const __m512 row_scales = Vec::load(row_scales_ + v * kLanes);
    for (int64_t j = 0; j < jn; j += kLanes) {
      const int64_t here = least(kLanes, jn - j);
      __m512 r[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        r[i] = i < here ? _mm512_mul_ps(Vec::load(sums + (j + i) * kLanes), row_scales) : _mm512_setzero_ps();
      }
      Vec::transpose(r);
      alignas(64) float bias[kLanes] = {};
      for (int64_t i = 0; i < here && task_.bias.data != nullptr; ++i) {
        bias[i] = Vec::one(task_.bias.data, task_.bias.dtype, j0 + j + i);
      }
      for (int64_t m = 0; m < rows; ++m) {
        alignas(64) char wide[64];
        Vec::store_as(wide, task_.out_dtype, 0, _mm512_add_ps(r[m], Vec::load(bias)));
        char* const out = static_cast<char*>(task_.out) + ((first_ + v * kLanes + m) * n + j0 + j) * bytes;
        std::memcpy(out, wide, static_cast<size_t>(here * bytes));
      }
    }
  }

  const DynamicTask& task_;
  const Integers table_;
  const int64_t block_;
  const int64_t blocks_;
  const int64_t units_;  // groups of four codes per block
  const float weight_factor_;
  int64_t first_ = 0, rows_ = 0, vectors_ = 0;
  uint8_t* packed_ = nullptr;
  float* row_scales_ = nullptr;
};

}  // namespace

void linear_dynamic(const DynamicTask& task) { Product(task).run(); }

}  // namespace MUSUBI_ISA
}  // namespace musubi
