// The AVX-512 build with BF16 and VBMI: bf16 activations multiply in bf16 pairs with float32 sums.
//
// A code becomes bf16 by two table look-ups of seven bits (upper and lower byte) and its sign bit: exact for every
// code, denormals and NaN too, in both formats. Up to 16 rows of x take the form in which a block's partial sum meets
// its scale in float32; more rows take the panel, whose weights are scaled and rounded to bf16.
#define MUSUBI_ISA avx512bf16
// clang-format off: the decoder is written over the vector
#include "common/vec_avx512.h"
#include "common/decode_vbmi.h"
// clang-format on

namespace musubi {
namespace MUSUBI_ISA {
// Registers: vectors of rows per tile, and outputs that go with 1, 2, 3 and 4 of them.
constexpr int kMaxVectors = 4;
constexpr int kFewOutputs = 8;  // rows of W that few rows of x meet at once
constexpr int kOutputs1 = 24;
constexpr int kOutputs2 = 12;
constexpr int kOutputs3 = 8;
constexpr int kOutputs4 = 6;
}  // namespace MUSUBI_ISA
}  // namespace musubi

#include "ops/fp8_linear/fp8_linear_few-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

inline __m512bh pairs_of(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

// Calls body(k, count, scale) for runs of at most 64 codes of row n in [k0, k1) that share a scale.
template <class Body>
void runs(const Fp8Rows& w, int64_t n, int64_t k0, int64_t k1, const Body& body) {
  int64_t b = k0 / w.block;
  for (int64_t k = k0; k < k1; ++b) {
    const int64_t end = least(k1, (b + 1) * w.block);
    const float scale = scale_at(w, n, b);
    for (; k + 64 <= end; k += 64) body(k, 64, scale);
    if (k < end) body(k, end - k, scale);
    k = end;
  }
}

// The kernel that multiplies in bf16: a unit is the pair of two neighbours along the contraction.
struct PairKernel {
  static constexpr int64_t kPerUnit = 2;
  static constexpr bool kByCodes = false;  // decoding runs beside products of pairs
  static constexpr int64_t kForwardUnits = kMostUnits;
  static constexpr int64_t kForwardStride = kForwardUnits + 16;
  static constexpr int64_t kAhead = 12;  // units of x that are fetched ahead: 9 % at M = 64, 15 % at M = 16

  // 192 outputs are 196 KB, half of a small L2; with few rows a panel that stays in L1 is better.
  static int64_t outputs_per_panel(int64_t sums_bytes, int64_t) {
    return sums_bytes > kTileVectors * Vec::W * 4 ? kMostOutputs : 2 * kGroups;
  }

  static Vec::F load_units(const void* row, Dtype, int64_t unit) {
    return Vec::load(static_cast<const float*>(row) + unit);
  }

  static void fill_forward(const Fp8Rows& w, int64_t j0, int64_t jn, int64_t c0, int64_t cn, float* panel,
                           int64_t stride) {
    const Decoder decoder(w.format);
    const bool whole = w.block % 64 == 0 && c0 % 64 == 0 && cn % 64 == 0;
    for (int64_t j = 0; j < jn; ++j) {
      uint16_t* const row = reinterpret_cast<uint16_t*>(panel + j * stride);
      if (whole) {
        fill_row_of_chunks(w, decoder, j0 + j, c0, cn, row);
      } else {
        fill_row(w, decoder, j0 + j, c0, cn, row);
      }
    }
  }

  // The common case: chunks of 64 codes with one scale each, no masks, no branches inside.
  static void fill_row_of_chunks(const Fp8Rows& w, const Decoder decoder, int64_t n, int64_t c0, int64_t cn,
                                 uint16_t* row) {
    float scales[kMostUnits * kPerUnit / 64];
    const int64_t chunks = cn / 64, per_block = w.block / 64;
    int64_t b = c0 / w.block, left = per_block - c0 / 64 % per_block;
    for (int64_t i = 0; i < chunks; ++i) {
      scales[i] = scale_at(w, n, b);
      if (--left == 0) {
        left = per_block;
        ++b;
      }
    }
    const uint8_t* const codes = w.codes + n * w.stride + c0;
    for (int64_t i = 0; i < chunks; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * i + cn), _MM_HINT_T1);  // the next panel's part
      __m512 f[4];
      decoder.floats(_mm512_loadu_si512(codes + 64 * i), _mm512_set1_ps(scales[i]), f);
      _mm512_storeu_si512(row + 64 * i, rounded(f[0], f[1]));
      _mm512_storeu_si512(row + 64 * i + 32, rounded(f[2], f[3]));
    }
  }

  static void fill_row(const Fp8Rows& w, const Decoder& decoder, int64_t n, int64_t c0, int64_t cn, uint16_t* row) {
    const uint8_t* const codes = w.codes + n * w.stride;
    runs(w, n, c0, c0 + cn, [&](int64_t k, int64_t count, float scale) {
      __m512 f[4];
      decoder.floats(_mm512_maskz_loadu_epi8(first(count), codes + k), _mm512_set1_ps(scale), f);
      uint16_t* const to = row + (k - c0);
      _mm512_mask_storeu_epi16(to, first_words(count), rounded(f[0], f[1]));
      _mm512_mask_storeu_epi16(to + 32, first_words(count - 32), rounded(f[2], f[3]));
    });
    if (cn % 2 != 0) row[cn] = 0;
  }

  static void fill_gradient(const Fp8Rows& w, int64_t j0, int64_t jn, int64_t c0, int64_t cn, float* panel,
                            int64_t stride) {
    const Decoder decoder(w.format);
    for (int64_t k = j0; k < j0 + jn; k += 64) {
      const Columns columns(w, k, least(64, j0 + jn - k));
      uint32_t* const to = reinterpret_cast<uint32_t*>(panel) + (k - j0);
      const bool whole = columns.one_block && columns.count == 64;
      int64_t c = whole ? fill_columns(w, decoder, columns, c0, cn, to, stride) : 0;
      for (; c < cn; c += 2) {
        __m512 even[4], odd[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
        scaled(w, decoder, c0 + c, columns, even);
        if (c + 1 < cn) scaled(w, decoder, c0 + c + 1, columns, odd);
        store_pairs(even, odd, columns.count, to + c / 2 * stride);
      }
    }
  }

  // At most 64 neighbouring columns, and which block of scales they start in.
  struct Columns {
    int64_t k = 0, count = 0, block = 0;
    bool one_block = true;

    Columns() = default;
    Columns(const Fp8Rows& w, int64_t first_column, int64_t columns)
        : k(first_column),
          count(columns),
          block(first_column / w.block),
          one_block((first_column + columns - 1) / w.block == first_column / w.block) {}
  };

  // The common case, all rows of the block but an odd last one: 64 columns with one scale per row. Gives how many.
  static int64_t fill_columns(const Fp8Rows& w, const Decoder decoder, const Columns& at, int64_t c0, int64_t cn,
                              uint32_t* to, int64_t stride) {
    const __m512i weave = _mm512_loadu_si512(kWeave);
    const uint8_t* codes = w.codes + c0 * w.stride + at.k;
    for (int64_t c = 0; c + 2 <= cn; c += 2, codes += 2 * w.stride, to += stride) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + 8 * w.stride), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(codes + 9 * w.stride), _MM_HINT_T0);
      __m512 even[4], odd[4];
      decoder.floats(_mm512_loadu_si512(codes), _mm512_set1_ps(scale_at(w, c0 + c, at.block)), even);
      decoder.floats(_mm512_loadu_si512(codes + w.stride), _mm512_set1_ps(scale_at(w, c0 + c + 1, at.block)), odd);
      MUSUBI_UNROLL
      for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(to + 16 * i, _mm512_permutexvar_epi16(weave, rounded(even[i], odd[i])));
      }
    }
    return cn / 2 * 2;
  }

  // These columns of row n as floats times their scales; zeros after them.
  static void scaled(const Fp8Rows& w, const Decoder& decoder, int64_t n, const Columns& at, __m512* out) {
    const __m512i codes = _mm512_maskz_loadu_epi8(first(at.count), w.codes + n * w.stride + at.k);
    if (at.one_block) return decoder.floats(codes, _mm512_set1_ps(scale_at(w, n, at.block)), out);
    alignas(64) float scales[64] = {};
    int64_t b = at.block;
    for (int64_t i = 0; i < at.count; ++b) {
      const int64_t end = least(at.count, (b + 1) * w.block - at.k);
      const float scale = scale_at(w, n, b);
      for (; i < end; ++i) scales[i] = scale;
    }
    decoder.floats(codes, _mm512_set1_ps(1.0f), out);
    MUSUBI_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = _mm512_mul_ps(out[i], _mm512_load_ps(scales + 16 * i));
  }

  static void store_pairs(const __m512* even, const __m512* odd, int64_t count, uint32_t* to) {
    const __m512i weave = _mm512_loadu_si512(kWeave);
    MUSUBI_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m512i both = _mm512_permutexvar_epi16(weave, rounded(even[i], odd[i]));
      const __mmask16 here = static_cast<__mmask16>(first_words(count - 16 * i));
      _mm512_mask_storeu_epi32(to + 16 * i, here, both);
    }
  }

  static void fill_forward_tail(const Rows& up, float strength, int64_t j0, int64_t jn, float* panel, int64_t stride) {
    const __m512 factor = _mm512_set1_ps(strength);
    for (int64_t j = 0; j < jn; ++j) {
      uint16_t* const to = reinterpret_cast<uint16_t*>(panel + j * stride);
      for (int64_t r = 0; r < up.cols; r += 16) {
        alignas(64) float values[16] = {};
        read_row(up, j0 + j, r, least(16, up.cols - r), values);
        const __m512 scaled_values = _mm512_mul_ps(_mm512_load_ps(values), factor);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled_values)));
      }
    }
  }

  static void fill_gradient_tail(const Rows& down, float strength, int64_t j0, int64_t jn, float* panel,
                                 int64_t stride) {
    const __m512 factor = _mm512_set1_ps(strength);
    for (int64_t r = 0; r < down.rows; r += 2) {
      uint32_t* const to = reinterpret_cast<uint32_t*>(panel + r / 2 * stride);
      for (int64_t j = 0; j < jn; j += 64) {
        const int64_t count = least(64, jn - j);
        alignas(64) float values[2][64] = {};
        read_row(down, r, j0 + j, count, values[0]);
        if (r + 1 < down.rows) read_row(down, r + 1, j0 + j, count, values[1]);
        __m512 even[4], odd[4];
        MUSUBI_UNROLL
        for (int i = 0; i < 4; ++i) {
          even[i] = _mm512_mul_ps(_mm512_load_ps(values[0] + 16 * i), factor);
          odd[i] = _mm512_mul_ps(_mm512_load_ps(values[1] + 16 * i), factor);
        }
        store_pairs(even, odd, count, to + j);
      }
    }
  }

  template <int V, int R, bool kTransposed>
  MUSUBI_NOINLINE static void micro(const float* x, int64_t units, const float* panel, float* sums, bool first,
                                    Between& later) {
    constexpr int64_t stride = kTransposed ? kMostOutputs : kForwardStride;
    __m512 acc[R][V];
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) {
      MUSUBI_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = first ? Vec::zero() : Vec::load(sums + (r * V + v) * Vec::W);
    }
    Between rows = later;
    for (int64_t u = 0; u < units;) {
      rows.one<2>();
      for (const int64_t end = least(units, u + kUnitsPerFetch); u < end; ++u) {
        __m512bh xs[V];
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) {
          _mm_prefetch(reinterpret_cast<const char*>(x + ((u + kAhead) * V + v) * Vec::W), _MM_HINT_T0);
        }
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) xs[v] = pairs_of(_mm512_loadu_si512(x + (u * V + v) * Vec::W));
        MUSUBI_UNROLL
        for (int r = 0; r < R; ++r) {
          const float* const from = kTransposed ? panel + u * stride + r : panel + r * stride + u;
          if (V == 1) {
            // GCC loads the broadcast apart, which costs as much as the product when it is used only once
            __m512 sum = acc[r][0];
            asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(xs[0]), "m"(*from));
            acc[r][0] = sum;
            continue;
          }
          const __m512bh weight = pairs_of(_mm512_castps_si512(_mm512_set1_ps(*from)));
          MUSUBI_UNROLL
          for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], xs[v], weight);
        }
      }
    }
    later = rows;
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) {
      MUSUBI_UNROLL
      for (int v = 0; v < V; ++v) Vec::store(sums + (r * V + v) * Vec::W, acc[r][v]);
    }
  }

  static constexpr uint16_t kWeave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
};

// The same for few rows of x, with weights that are not scaled yet, so exact in bf16.
class PairLanes {
 public:
  static constexpr int64_t kPerUnit = 2;
  static constexpr bool kInRegisters = true;

  explicit PairLanes(Format format) : decoder_(format) {}

  void decode(const uint8_t* codes, int64_t count, float* units) const {
    __m512i lo, hi;
    decoder_.pairs(count == 64 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(first(count), codes), &lo, &hi);
    _mm512_storeu_si512(units, lo);
    _mm512_storeu_si512(units + 16, hi);
  }

  MUSUBI_INLINE void decode_whole(const uint8_t* codes, float* units) const {
    __m512i a, b;
    decoder_.pairs_shuffled(_mm512_loadu_si512(codes), &a, &b);
    _mm512_storeu_si512(units, a);
    _mm512_storeu_si512(units + 16, b);
  }
  MUSUBI_INLINE void decode_whole(const uint8_t* codes, __m512* vectors) const {
    in_vectors(_mm512_loadu_si512(codes), vectors);
  }
  MUSUBI_INLINE void decode_part(const uint8_t* codes, int64_t count, __m512* vectors) const {
    in_vectors(_mm512_maskz_loadu_epi8(first(count), codes), vectors);
  }
  static constexpr int64_t place(int64_t i) { return Decoder::pair_at(i); }

  template <int G>
  static __m512 multiply(__m512 x, const float* weights, __m512 sum) {
    const __m512bh pairs = pairs_of(_mm512_castps_si512(x));
    if (G == 1) {
      // GCC loads the broadcast apart, which costs as much as the product
      asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pairs), "m"(*weights));
      return sum;
    }
    return _mm512_dpbf16_ps(sum, pairs, pairs_of(_mm512_castps_si512(Vec::repeat<G>(weights))));
  }
  static __m512 multiply(__m512 x, __m512 weights, __m512 sum) {
    return _mm512_dpbf16_ps(sum, pairs_of(_mm512_castps_si512(x)), pairs_of(_mm512_castps_si512(weights)));
  }

  static void units_of(const Rows& x, int64_t row, int64_t c0, int64_t count, float* units) {
    if (count % 2 != 0) units[count / 2] = 0.0f;
    copy_bytes(units, at(x, row, c0), count * 2);
  }

 private:
  MUSUBI_INLINE void in_vectors(__m512i codes, __m512* vectors) const {
    __m512i a, b;
    decoder_.pairs_shuffled(codes, &a, &b);
    vectors[0] = _mm512_castsi512_ps(a);
    vectors[1] = _mm512_castsi512_ps(b);
  }

  Decoder decoder_;
};

}  // namespace

void linear(const LinearTask& task) {
  const bool pairs = task.x.dtype == Dtype::bf16 && (task.low.data == nullptr || task.low.dtype == Dtype::bf16);
  if (!pairs) return avx512vbmi::linear(task);  // the same code, compiled once
  linear_by<PairLanes, PairKernel>(task);
}

}  // namespace MUSUBI_ISA
}  // namespace musubi
