// What all products share, and the kernel that multiplies in float32, written over a vector type.
#pragma once

#include <cstring>

#include "ops/fp8_linear/fp8_linear.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr int64_t kCachedBytes = int64_t{1} << 20;  // packed rows up to this size stay in L2
constexpr int64_t kSumsBytes = int64_t{768} << 10;  // sums of a panel up to this size stay there with it
constexpr int64_t kMostUnits = 256;                 // contraction units per panel
constexpr int64_t kMostOutputs = 192;               // outputs per panel
constexpr int64_t kGroups = 24;                     // outputs that are whole groups, however wide the tile

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

inline const void* at(const Rows& m, int64_t row, int64_t col) {
  return static_cast<const char*>(m.data) + (row * m.stride + col) * size_of(m.dtype);
}

inline void copy_bytes(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

// Memory that a micro kernel fetches between its products, some bytes further in every kUnitsPerFetch units. So many
// lines at the beginning of each call would hold up the sums and weights that it waits for.
struct Between {
  const char* next = "";  // an address that exists: looking for another costs a walk through the page tables each time
  int64_t step = 0;

  template <int kLocality>  // 2: into L2, 3: into L1
  MUSUBI_INLINE void one() {
    __builtin_prefetch(next, 0, kLocality);
    next += step;
  }
};
constexpr int64_t kUnitsPerFetch = 4;

inline const char* bytes_at(const float* floats) { return reinterpret_cast<const char*>(floats); }

// Up to seven times a stride in four registers, by what an x86 address can scale. Left to itself, GCC keeps one
// address for each row and pointer, in vector registers for want of others.
struct Multiples {
  int64_t one, three, five, seven;
  explicit Multiples(int64_t stride) : one(stride), three(3 * stride), five(5 * stride), seven(7 * stride) {
    asm volatile("" : "+r"(one), "+r"(three), "+r"(five), "+r"(seven));
  }
  MUSUBI_INLINE int64_t times(int r) const {
    switch (r) {
      case 0:
        return 0;
      case 3:
        return three;
      case 5:
        return five;
      case 6:
        return 2 * three;
      case 7:
        return seven;
      default:
        return r * one;
    }
  }
};

// A scale that all codes of an output share need not touch the weights: it multiplies the finished sum, which is exact
// and cheaper. That holds for one scale per row in the forward and for one in all.
inline bool scales_outputs(const LinearTask& task) {
  return task.w.scale_block == 0 && (!task.transposed || task.w.scale_row == 0);
}

// The scale of block b of row n.
inline float scale_at(const Fp8Rows& w, int64_t n, int64_t b) {
  return Vec::one(w.scale, w.scale_dtype, n * w.scale_row + b * w.scale_block);
}

// out[0 .. k1 - k0) = row n of the weight from k0 to k1, each code times its scale; k0 is in block b.
MUSUBI_INLINE void decode_row(const Fp8Rows& w, const Codes& codes, int64_t n, int64_t b, int64_t k0, int64_t k1,
                              float* out) {
  const uint8_t* row = w.codes + n * w.stride;
  for (int64_t k = k0; k < k1; ++b) {
    const int64_t end = least(k1, (b + 1) * w.block);
    codes.floats(row + k, end - k, scale_at(w, n, b), out + (k - k0));
    k = end;
  }
}

// A row of any dtype as floats.
inline void read_row(const Rows& m, int64_t row, int64_t c0, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + Vec::W <= count; i += Vec::W) Vec::store(out + i, Vec::load_as(at(m, row, c0), m.dtype, i));
  for (; i < count; ++i) out[i] = Vec::one(at(m, row, c0), m.dtype, i);
}

// Weights of some outputs and a part of the contraction as they are stored, in runs of codes that share a scale.
struct Coded {
  static constexpr int64_t kMostRuns = 6;
  const uint8_t* codes = nullptr;
  int64_t stride = 0;
  const float* numbers = nullptr;  // of the 256 codes
  const float* scales = nullptr;   // [runs][wide]
  int64_t wide = 0;
  int64_t runs = 0;
  int64_t lengths[kMostRuns] = {};
};

// The kernel that multiplies in float32: a unit is one float.
struct FloatKernel {
  static constexpr int64_t kPerUnit = 1;
  static constexpr int64_t kForwardUnits = 128;  // with 48 rows of x that is half of L1
  static constexpr int64_t kForwardStride = kForwardUnits + 16;

  // Where all of x stays in L2 a narrow panel stays in L1; otherwise it is as wide as its sums allow, since every panel
  // reads x again.
  static int64_t outputs_per_panel(int64_t sums_bytes, int64_t x_bytes) {
    if (x_bytes <= kCachedBytes) return 2 * kGroups;
    const int64_t fits = kSumsBytes / sums_bytes / kGroups * kGroups;
    return fits < 2 * kGroups ? 2 * kGroups : least(fits, kMostOutputs);
  }

  static typename Vec::F load_units(const void* row, Dtype dtype, int64_t unit) {
    return Vec::load_as(row, dtype, unit);
  }

  // panel[j * stride + unit]: rows j0 .. of W from contraction c0.
  static void fill_forward(const Fp8Rows& w, int64_t j0, int64_t jn, int64_t c0, int64_t cn, float* panel,
                           int64_t stride) {
    fill_rows(w, j0, jn, c0, cn, panel, stride);
  }

  // panel[unit * stride + j]: columns j0 .. of W from row c0.
  static void fill_gradient(const Fp8Rows& w, int64_t j0, int64_t jn, int64_t c0, int64_t cn, float* panel,
                            int64_t stride) {
    fill_rows(w, c0, cn, j0, jn, panel, stride);
  }

  // out[i * stride + k - k0]: rows n0 .. of W from k0, decoded and scaled.
  static void fill_rows(const Fp8Rows& w, int64_t n0, int64_t rows, int64_t k0, int64_t kn, float* out,
                        int64_t stride) {
    const Codes codes(w.format);
    const int64_t block = k0 / w.block;  // a division costs more than decoding a block
    if (w.block % 64 == 0 && k0 % 64 == 0 && kn % 64 == 0) return fill_chunks(w, codes, n0, rows, k0, kn, out, stride);
    for (int64_t i = 0; i < rows; ++i) decode_row(w, codes, n0 + i, block, k0, k0 + kn, out + i * stride);
  }

  // The common case: chunks of 64 codes with one scale each, and no branches inside.
  static void fill_chunks(const Fp8Rows& w, const Codes codes, int64_t n0, int64_t rows, int64_t k0, int64_t kn,
                          float* out, int64_t stride) {
    static_assert(kMostUnits % 64 == 0 && kMostOutputs <= kMostUnits, "what a panel is wide at most");
    int64_t blocks[kMostUnits / 64];
    const int64_t chunks = kn / 64;
    for (int64_t c = 0; c < chunks; ++c) blocks[c] = (k0 + 64 * c) / w.block;
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* const row = w.codes + (n0 + i) * w.stride + k0;
      for (int64_t c = 0; c < chunks; ++c) {
        codes.floats(row + 64 * c, scale_at(w, n0 + i, blocks[c]), out + i * stride + 64 * c);
      }
    }
  }

  static void fill_forward_tail(const Rows& up, float strength, int64_t j0, int64_t jn, float* panel, int64_t stride) {
    for (int64_t j = 0; j < jn; ++j) {
      read_row(up, j0 + j, 0, up.cols, panel + j * stride);
      for (int64_t r = 0; r < up.cols; ++r) panel[j * stride + r] *= strength;
    }
  }

  static void fill_gradient_tail(const Rows& down, float strength, int64_t j0, int64_t jn, float* panel,
                                 int64_t stride) {
    for (int64_t r = 0; r < down.rows; ++r) {
      read_row(down, r, j0, jn, panel + r * stride);
      for (int64_t j = 0; j < jn; ++j) panel[r * stride + j] *= strength;
    }
  }

  // Without a panel, for rows of x that are too few to pay for one: a code is the address of its number, which is
  // loaded into all lanes. Loads have room beside the multiply-adds, which decoding has not. A run's sums meet its
  // scale at its end: with 64 rows of x 6 % faster than a panel, with 256 slower.
  static constexpr bool kByCodes = kMaxVectors >= 4;  // there are registers for it

  template <int V, int R>
  MUSUBI_NOINLINE static void micro_of_codes(const float* x, const uint8_t* codes, const Coded& w, const float* scales,
                                             float* sums, bool first) {
    const Multiples row(w.stride);
    const float* const numbers = w.numbers;
    // A load by the same register and offset as the store of the run before takes longer (Intel Xeon, model 207: 4 % of
    // all with tiles of three vectors); those of four want for registers.
    const float* from = sums;
    if (V < 4) asm volatile("" : "+r"(from));
    for (int64_t i = 0; i < w.runs; ++i, scales += w.wide) {
      typename Vec::F part[R][V];
      MUSUBI_UNROLL
      for (int r = 0; r < R; ++r) {
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) part[r][v] = Vec::fresh_zero();
      }
      for (const uint8_t* const end = codes + w.lengths[i]; codes < end; ++codes, x += V * Vec::W) {
        typename Vec::F xs[V];
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) xs[v] = Vec::load(x + v * Vec::W);
        MUSUBI_UNROLL
        for (int r = 0; r < R; ++r) {
          const auto weight = Vec::set1(numbers[codes[row.times(r)]]);
          MUSUBI_UNROLL
          for (int v = 0; v < V; ++v) part[r][v] = Vec::fma(xs[v], weight, part[r][v]);
        }
      }
      MUSUBI_UNROLL
      for (int r = 0; r < R; ++r) {
        const auto scale = Vec::set1(scales[r]);
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) {
          part[r][v] =
              first ? Vec::mul(part[r][v], scale) : Vec::fma(part[r][v], scale, Vec::load(from + (r * V + v) * Vec::W));
        }
      }
      MUSUBI_UNROLL
      for (int r = 0; r < R; ++r) {
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) Vec::store(sums + (r * V + v) * Vec::W, part[r][v]);
      }
      first = false;
    }
  }

  template <int V, int R, bool kTransposed>
  MUSUBI_NOINLINE static void micro(const float* x, int64_t units, const float* panel, float* sums, bool first,
                                    Between& later) {
    constexpr int64_t stride = kTransposed ? kMostOutputs : kForwardStride;
    typename Vec::F acc[R][V];
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) {
      MUSUBI_UNROLL
      for (int v = 0; v < V; ++v) acc[r][v] = first ? Vec::zero() : Vec::load(sums + (r * V + v) * Vec::W);
    }
    // what the next call begins with: its sums, and its rows of the panel, line by line but for those between the rows
    Between rows = later, next_sums = {bytes_at(sums + R * V * Vec::W), 64};
    Between next_weights = {bytes_at(panel + R * stride), stride / 2};
    constexpr int64_t kWeightLines = kTransposed ? 0 : (R * kUnitsPerFetch * 4 + 63) / 64;
    static_assert(kForwardUnits == 128, "a row of the panel is eight lines");
    for (int64_t u = 0; u < units;) {
      rows.one<2>();
      next_sums.one<3>();
      MUSUBI_UNROLL
      for (int64_t i = 0; i < kWeightLines; ++i) next_weights.one<3>();
      for (const int64_t end = least(units, u + kUnitsPerFetch); u < end; ++u) {
        typename Vec::F xs[V];
        MUSUBI_UNROLL
        for (int v = 0; v < V; ++v) xs[v] = Vec::load(x + (u * V + v) * Vec::W);
        MUSUBI_UNROLL
        for (int r = 0; r < R; ++r) {
          const auto weight = Vec::set1(kTransposed ? panel[u * stride + r] : panel[r * stride + u]);
          MUSUBI_UNROLL
          for (int v = 0; v < V; ++v) acc[r][v] = Vec::fma(xs[v], weight, acc[r][v]);
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
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
