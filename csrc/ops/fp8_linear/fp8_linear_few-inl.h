// The forward for few rows of x (no more than a vector has lanes), written once over a vector type and a kernel.
//
// Lanes are rows of x times neighbours along K: with 16 lanes and 3 rows, 4 x 4. R rows of W are decoded, 64 codes at
// a time, into a buffer in L1, from which G neighbouring weights are repeated over the lanes; so a weight costs as many
// products as there are rows, its decoding once, and x is read once per R rows of W. A block's partial sum meets its
// scale in float32, one multiplication per block and row of W. Everything of W is read once, in order.
#include "ops/fp8_linear/fp8_linear-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr int64_t kRowsPerChunk = 64;
constexpr int64_t kPiece = 64;  // codes decoded at once

// Multiplies in float32: a unit is one float.
class FloatLanes {
 public:
  static constexpr int64_t kPerUnit = 1;

  explicit FloatLanes(Format format) : codes_(format) {}
  void decode(const uint8_t* codes, int64_t count, float* units) const { codes_.padded(codes, count, units); }

  template <int G>
  static Vec::F multiply(Vec::F x, const float* weights, Vec::F sum) {
    return Vec::fma(x, Vec::repeat<G>(weights), sum);
  }

  static void units_of(const Rows& x, int64_t row, int64_t c0, int64_t count, float* units) {
    read_row(x, row, c0, count, units);
  }

 private:
  Codes codes_;
};

MUSUBI_NOINLINE float dot(const float* a, const float* b, int64_t count) {
  auto sum = Vec::zero();
  int64_t i = 0;
  for (; i + Vec::W <= count; i += Vec::W) sum = Vec::fma(Vec::load(a + i), Vec::load(b + i), sum);
  float total = Vec::sum(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

inline const float* floats_of(const Rows& m, float* to) {
  if (m.data == nullptr) return nullptr;
  for (int64_t i = 0; i < m.rows; ++i) read_row(m, i, 0, m.cols, to + i * m.cols);
  return to;
}

// The scales of row n as floats, one per block.
MUSUBI_NOINLINE void scales_of_row(const Fp8Rows& w, int64_t n, int64_t blocks, float* out) {
  if (w.scale_block == 1) {
    Rows row{w.scale, 1, blocks, 0, w.scale_dtype};
    row.data = static_cast<const char*>(w.scale) + n * w.scale_row * size_of(w.scale_dtype);
    return read_row(row, 0, 0, blocks, out);
  }
  for (int64_t b = 0; b < blocks; ++b) out[b] = scale_at(w, n, b);
}

template <class Lanes, int G>
class FewRows {
 public:
  explicit FewRows(const LinearTask& task)
      : task_(task),
        blocks_((task.w.cols + task.w.block - 1) / task.w.block),
        block_(least(task.w.block, task.w.cols)),
        groups_(((block_ + Lanes::kPerUnit - 1) / Lanes::kPerUnit + G - 1) / G),
        rank_(task.low.data == nullptr ? 0 : task.low.cols) {}

  void run() {
    const int64_t lanes = blocks_ * groups_ * Vec::W, rows = task_.x.rows;
    float* const held = static_cast<float*>(scratch(Slot::packed, (lanes + rows * rank_ + block_ + 64) * 4));
    pack(held, held + lanes + rows * rank_);
    x_ = held;
    low_ = floats_of(task_.low, held + lanes);
    const int64_t n = task_.w.rows;
    parallel_chunks((n + kRowsPerChunk - 1) / kRowsPerChunk, task_.threads, [this, n](int64_t chunk) {
      const int64_t j0 = chunk * kRowsPerChunk;
      outputs(j0, least(kRowsPerChunk, n - j0));
    });
  }

 private:
  static constexpr int kRows = Vec::W / G;  // of x, in one vector

  // Vector g of block b: units G g .. G g + G - 1 of the block from each row, zeros where there is no row or unit.
  void pack(float* to, float* units) const {
    std::memset(to, 0, static_cast<size_t>(blocks_ * groups_ * Vec::W * 4));
    for (int64_t m = 0; m < task_.x.rows; ++m) {
      for (int64_t b = 0; b < blocks_; ++b) {
        const int64_t count = least(block_, task_.x.cols - b * block_);
        Lanes::units_of(task_.x, m, b * block_, count, units);
        const int64_t whole = (count + Lanes::kPerUnit - 1) / Lanes::kPerUnit;
        float* const block = to + b * groups_ * Vec::W + m * G;
        for (int64_t u = 0; u < whole; u += G) copy_bytes(block + u / G * Vec::W, units + u, least(G, whole - u) * 4);
      }
    }
  }

  void outputs(int64_t j0, int64_t jn) const {
    const Lanes lanes(task_.w.format);
    float* const scales = static_cast<float*>(scratch(Slot::rows, kFewOutputs * blocks_ * 4 + 4));
    float sums[kRows * kRowsPerChunk] = {};
    int64_t j = 0;
    for (; j + kFewOutputs <= jn; j += kFewOutputs) rows<kFewOutputs>(lanes, j0 + j, scales, sums + j);
    for (; j < jn; ++j) rows<1>(lanes, j0 + j, scales, sums + j);
    finish(j0, jn, sums);
  }

  template <int R>
  MUSUBI_NOINLINE void rows(const Lanes& lanes, int64_t j, float* scales, float* sums) const {
    const Fp8Rows& w = task_.w;
    typename Vec::F whole[R];
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) whole[r] = Vec::zero();
    for (int r = 0; r < R; ++r) scales_of_row(w, j + r, blocks_, scales + r * blocks_);
    const uint8_t* codes = w.codes + j * w.stride;
    const int64_t pieces = block_ / kPiece, left = block_ % kPiece;
    const float* x = x_;
    for (int64_t b = 0; b < blocks_; ++b) {
      typename Vec::F part[R];
      MUSUBI_UNROLL
      for (int r = 0; r < R; ++r) part[r] = Vec::zero();
      for (int64_t i = 0; i < pieces; ++i, codes += kPiece) {
        x = piece<R, true>(lanes, codes, w.stride, kPiece, x, part);
      }
      if (left > 0) x = piece<R, false>(lanes, codes, w.stride, left, x, part);
      codes += left;
      MUSUBI_UNROLL
      for (int r = 0; r < R; ++r) whole[r] = Vec::fma(part[r], Vec::set1(scales[r * blocks_ + b]), whole[r]);
    }
    for (int r = 0; r < R; ++r) {
      float by_lane[Vec::W];
      Vec::store(by_lane, whole[r]);
      for (int m = 0; m < kRows; ++m) {
        float sum = 0.0f;
        for (int g = 0; g < G; ++g) sum += by_lane[m * G + g];
        sums[m * kRowsPerChunk + r] = sum;
      }
    }
  }

  // `left` of the codes of R rows from column c, no more than kPiece, with the vectors of x from `x`.
  template <int R, bool kWhole>
  static MUSUBI_INLINE const float* piece(const Lanes& lanes, const uint8_t* codes, int64_t stride, int64_t left,
                                          const float* x, typename Vec::F* part) {
    alignas(64) float weights[R * kPiece];
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) {
      // the rows that come next, into L2: 21 GB/s from memory where none gives 9
      __builtin_prefetch(codes + (R + r) * stride, 0, 2);
      lanes.decode(codes + r * stride, kWhole ? kPiece : left, weights + r * kPiece);
    }
    // GCC would keep the codes in registers and shuffle them, which costs more than loads that repeat
    asm volatile("" : : "r"(weights) : "memory");
    const int64_t units = ((kWhole ? kPiece : left) + Lanes::kPerUnit - 1) / Lanes::kPerUnit;
    for (int64_t u = 0; u < units; u += G, x += Vec::W) step<R>(x, weights + u, part);
    return x;
  }

  template <int R>
  static MUSUBI_INLINE void step(const float* x, const float* weights, typename Vec::F* part) {
    const auto lanes = Vec::load(x);
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) part[r] = Lanes::template multiply<G>(lanes, weights + r * kPiece, part[r]);
  }

  // sums [M][kRowsPerChunk] of outputs j0 .. j0 + jn, plus bias and low-rank tail, to out.
  void finish(int64_t j0, int64_t jn, float* sums) const {
    const int64_t m_rows = task_.x.rows, outputs = task_.outputs();
    float bias[kRowsPerChunk] = {};
    if (task_.bias.data != nullptr) read_row(task_.bias, 0, j0, jn, bias);
    float* const up = static_cast<float*>(scratch(Slot::panel, (rank_ + Vec::W) * 4));
    for (int64_t j = 0; rank_ > 0 && j < jn; ++j) {
      read_row(task_.tail, j0 + j, 0, rank_, up);
      for (int64_t m = 0; m < m_rows; ++m) {
        sums[m * kRowsPerChunk + j] += task_.strength * dot(low_ + m * rank_, up, rank_);
      }
    }
    const int64_t bytes = size_of(task_.out_dtype);
    for (int64_t m = 0; m < m_rows; ++m) {
      char* const out = static_cast<char*>(task_.out) + (m * outputs + j0) * bytes;
      alignas(64) char wide[4 * kRowsPerChunk];
      for (int64_t j = 0; j < kRowsPerChunk; j += Vec::W) {
        const auto sum = Vec::add(Vec::load(sums + m * kRowsPerChunk + j), Vec::load(bias + j));
        Vec::store_as(wide, task_.out_dtype, j, sum);
      }
      std::memcpy(out, wide, static_cast<size_t>(jn * bytes));
    }
  }

  const LinearTask& task_;
  const int64_t blocks_;
  const int64_t block_;
  const int64_t groups_;  // vectors of x per block
  const int64_t rank_;
  const float* x_ = nullptr;
  const float* low_ = nullptr;
};

inline bool has_few_rows(const LinearTask& task) {
  return !task.transposed && task.x.rows > 0 && task.x.rows <= Vec::W && task.w.cols > 0;
}

template <class Lanes>
void linear_few_rows(const LinearTask& task) {
  constexpr int W = Vec::W;
  if (task.x.rows == 1) return FewRows<Lanes, W>(task).run();
  if (task.x.rows == 2) return FewRows<Lanes, W / 2>(task).run();
  if (task.x.rows <= 4) return FewRows<Lanes, W / 4>(task).run();
  if constexpr (W >= 8) {
    if (task.x.rows <= 8) return FewRows<Lanes, W / 8>(task).run();
  }
  if constexpr (W >= 16) return FewRows<Lanes, W / 16>(task).run();
}

inline void linear_in_floats(const LinearTask& task) {
  if (has_few_rows(task)) return linear_few_rows<FloatLanes>(task);
  Multiply<FloatKernel>(task).run();
}

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
