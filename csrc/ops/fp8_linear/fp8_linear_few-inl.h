// The forward for few rows of x (no more than a vector has lanes), written once over a vector type and a kernel.
//
// Lanes are rows of x times neighbours along K: with 16 lanes and 3 rows, 4 x 4. R rows of W are decoded, 64 codes at
// a time, into a buffer in L1, from which G neighbouring weights are repeated over the lanes; so a weight costs as many
// products as there are rows, its decoding once, and x is read once per R rows of W. The codes that come next are
// decoded between the products of those before: a processor does not look far enough ahead to mix the two itself, and
// decoding alone leaves half of its units idle. One row of x meets weights that never leave the registers, where the
// build can decode into them. A block's partial sum meets its scale in float32, one multiplication per block and row of
// W. Everything of W is read once, in order.
//
// Whole pieces of 64 codes are decoded in the order that is cheapest (`place`), and x is packed in the same; what is
// left of a block that is no multiple of 64 keeps its order.
#include "ops/fp8_linear/fp8_linear-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr int64_t kRowsPerChunk = 64;
constexpr int64_t kPiece = 64;   // codes decoded at once
constexpr int64_t kScales = 64;  // blocks of a row whose scales are read at once
constexpr int64_t kFetchBeside =
    256;  // R rows are often whole pages: what is fetched must not share a set with what is used
constexpr int64_t kFetchNear = 640;  // bytes of a row that are asked into L1 ahead of their use

// Multiplies in float32: a unit is one float.
class FloatLanes {
 public:
  static constexpr int64_t kPerUnit = 1;
  static constexpr bool kInRegisters = Codes::kInRegisters;

  explicit FloatLanes(Format format) : codes_(format) {}

  // At most kPiece codes in their order, padded with zeros to a whole vector.
  void decode(const uint8_t* codes, int64_t count, float* units) const { codes_.padded(codes, count, units); }

  // kPiece codes: unit i is unit place(i) of them.
  MUSUBI_INLINE void decode_whole(const uint8_t* codes, float* units) const {
    Vec::F vectors[kPiece / Vec::W];
    codes_.shuffled(codes, vectors);
    MUSUBI_UNROLL
    for (int i = 0; i < kPiece / Vec::W; ++i) Vec::store(units + i * Vec::W, vectors[i]);
  }
  MUSUBI_INLINE void decode_whole(const uint8_t* codes, Vec::F* vectors) const { codes_.shuffled(codes, vectors); }
  // The first `count` of kPiece codes, and zeros.
  MUSUBI_INLINE void decode_part(const uint8_t* codes, int64_t count, Vec::F* vectors) const {
    codes_.shuffled_part(codes, count, vectors);
  }
  static constexpr int64_t place(int64_t i) { return Codes::place(i); }

  template <int G>
  static Vec::F multiply(Vec::F x, const float* weights, Vec::F sum) {
    return Vec::fma(x, Vec::repeat<G>(weights), sum);
  }
  static Vec::F multiply(Vec::F x, Vec::F weights, Vec::F sum) { return Vec::fma(x, weights, sum); }

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

// The scales of `count` blocks of row n from block b0, as floats.
MUSUBI_NOINLINE void scales_of_row(const Fp8Rows& w, int64_t n, int64_t b0, int64_t count, float* out) {
  if (w.scale_block == 1) {
    Rows row{w.scale, 1, count, 0, w.scale_dtype};
    row.data = static_cast<const char*>(w.scale) + (n * w.scale_row + b0) * size_of(w.scale_dtype);
    return read_row(row, 0, 0, count, out);
  }
  for (int64_t b = 0; b < count; ++b) out[b] = scale_at(w, n, b0 + b);
}

template <class Lanes, int G>
class FewRows {
 public:
  explicit FewRows(const LinearTask& task)
      : task_(task),
        blocks_((task.w.cols + task.w.block - 1) / task.w.block),
        block_(least(task.w.block, task.w.cols)),
        groups_(whole_rows() ? (block_ + kPiece - 1) / kPiece * kSteps
                             : ((block_ + Lanes::kPerUnit - 1) / Lanes::kPerUnit + G - 1) / G),
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
  static constexpr int64_t kUnits = kPiece / Lanes::kPerUnit;
  static constexpr int64_t kSteps = kUnits / G;  // vectors of x per piece
  static constexpr bool kDirect = Lanes::kInRegisters && G == Vec::W;

  // One row of x by rows of W that have one scale each: what is left of a row is a piece too, with zeros.
  bool whole_rows() const { return kDirect && blocks_ == 1; }

  // Vector g of block b: units G g .. G g + G - 1 of the block from each row, zeros where there is no row or unit.
  void pack(float* to, float* units) const {
    if (task_.x.rows < kRows || block_ % kPiece != 0) {
      std::memset(to, 0, static_cast<size_t>(blocks_ * groups_ * Vec::W * 4));
    }
    for (int64_t b = 0; b < blocks_; ++b) {  // rows inside, so that what they write together stays in L1
      const int64_t count = least(block_, task_.x.cols - b * block_);
      for (int64_t m = 0; m < task_.x.rows; ++m) {
        for (int64_t c = 0; c < count; c += kPiece) {
          const int64_t codes = least(kPiece, count - c);
          if (codes < kPiece && whole_rows()) std::memset(units, 0, kUnits * 4);
          Lanes::units_of(task_.x, m, b * block_ + c, codes, units);
          float* const piece = to + b * groups_ * Vec::W + c / Lanes::kPerUnit / G * Vec::W + m * G;
          if (codes == kPiece || whole_rows()) {
            place_whole(units, piece);
          } else {
            const int64_t left = (codes + Lanes::kPerUnit - 1) / Lanes::kPerUnit;
            for (int64_t i = 0; i < left; ++i) piece[i / G * Vec::W + i % G] = units[i];
          }
        }
      }
    }
  }

  static MUSUBI_INLINE void place_whole(const float* units, float* piece) {
    MUSUBI_UNROLL
    for (int64_t i = 0; i < kUnits; ++i) piece[i / G * Vec::W + i % G] = units[Lanes::place(i)];
  }

  void outputs(int64_t j0, int64_t jn) const {
    const Lanes lanes(task_.w.format);
    float sums[kRows * kRowsPerChunk] = {};
    int64_t j = 0;
    for (; j + kFewOutputs <= jn; j += kFewOutputs) some<kFewOutputs>(lanes, j0 + j, sums + j);
    for (; j < jn; ++j) some<1>(lanes, j0 + j, sums + j);
    finish(j0, jn, sums);
  }

  // sums[m * kRowsPerChunk + r]: row m of x by row j + r of W, for R rows of W.
  template <int R>
  void some(const Lanes& lanes, int64_t j, float* sums) const {
    const Fp8Rows& w = task_.w;
    typename Vec::F whole[R];
    for (int r = 0; r < R; ++r) whole[r] = Vec::zero();
    float scales[R * kScales];  // at a stride that the compiler knows
    for (int64_t b = 0; b < blocks_; b += kScales) {
      const int64_t count = least(kScales, blocks_ - b);
      for (int r = 0; r < R; ++r) {
        if (blocks_ == 1) {
          scales[r * kScales] = scale_at(w, j + r, 0);
        } else {
          scales_of_row(w, j + r, b, count, scales + r * kScales);
        }
      }
      const uint8_t* const codes = w.codes + j * w.stride + b * block_;
      const float* const x = x_ + b * groups_ * Vec::W;
      if (block_ % kPiece != 0 && blocks_ > 1) {
        in_parts<R>(lanes, codes, x, count, scales, whole);
      } else if constexpr (kDirect) {
        if (blocks_ == 1) {
          in_registers<R, true>(lanes, codes, x, count, w.cols, scales, whole);
        } else {
          in_registers<R, false>(lanes, codes, x, count, w.cols - b * block_, scales, whole);
        }
      } else {
        ahead<R>(lanes, codes, x, count, scales, whole);
      }
    }
    for (int r = 0; r < R; ++r) {
      float by_lane[Vec::W];
      Vec::store(by_lane, whole[r]);
      for (int m = 0; m < kRows; ++m) {
        float sum = G == Vec::W ? Vec::sum(whole[r]) : 0.0f;
        for (int g = 0; g < G && G < Vec::W; ++g) sum += by_lane[m * G + g];
        sums[m * kRowsPerChunk + r] = sum;
      }
    }
  }

  // The three bodies: `blocks` blocks of R rows of W from `codes` by those of x at `x`, times their scales, onto
  // `sums`. This one is for one row of x; `rest` codes of a row are left from `codes` on. kOne: one scale each row.
  //
  // It computes nearly as long as memory takes, so it must not wait besides. A line asked into L2 is forgotten where L2
  // has no room for one request more (one in five on Sapphire Rapids at full speed); one asked into L1 is not, but
  // holds one of few buffers until it is there. So each line is asked for twice, into L2 two times R rows ahead and
  // into L1 some steps ahead, which takes a tenth off a product from memory.
  template <int R, bool kOne>
  MUSUBI_NOINLINE void in_registers(const Lanes& given, const uint8_t* codes, const float* x, int64_t blocks,
                                    int64_t rest, const float* scales, typename Vec::F* sums) const {
    const Lanes lanes = given;  // tables in registers
    const int64_t stride = task_.w.stride, pieces = block_ / kPiece, jump = R * stride - task_.w.cols;
    const uint8_t* next = codes + 2 * R * stride + kFetchBeside;
    const uint8_t* near = codes + least(kFetchNear, task_.w.cols);
    int64_t same_row = (rest - kFetchNear) / kPiece;  // steps until `near` goes on in the next R rows
    if (same_row <= 0) {
      near += jump;
      same_row = -1;
    }
    const Multiples row(stride);
    asm volatile("" : "+r"(next), "+r"(near));  // they have their own registers
    typename Vec::F whole[R];
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) whole[r] = sums[r];
    int64_t left = pieces;
    for (int64_t i = blocks * pieces; i > 0; --i, codes += kPiece, next += kPiece, near += kPiece) {
      // a scale that GCC took into a register beforehand would need a shuffle more to be repeated
      asm volatile("" : "+r"(scales));
      typename Vec::F xs[kSteps];
      MUSUBI_UNROLL
      for (int v = 0; v < kSteps; ++v) xs[v] = Vec::load(x + v * Vec::W);
      x += kSteps * Vec::W;
      if (same_row-- == 0) near += jump;
      MUSUBI_UNROLL
      for (int r = 0; r < R; ++r) {
        typename Vec::F weights[kSteps];
        lanes.decode_whole(codes + row.times(r), weights);
        ask<1>(near + row.times(r), weights[0]);
        ask<2>(next + row.times(r), weights[kSteps - 1]);
        auto part = kOne ? whole[r] : Vec::zero();
        MUSUBI_UNROLL
        for (int v = 0; v < kSteps; ++v) part = Lanes::multiply(xs[v], weights[v], part);
        // every piece meets its scale, so that no loop is inside another
        whole[r] = kOne ? part : Vec::fma(part, Vec::set1(scales[r * kScales]), whole[r]);
      }
      if (!kOne && --left == 0 && i > 1) {
        left = pieces;
        ++scales;
      }
    }
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) {
      if (kOne && block_ % kPiece != 0) {
        typename Vec::F weights[kSteps];
        lanes.decode_part(codes + row.times(r), block_ % kPiece, weights);
        MUSUBI_UNROLL
        for (int v = 0; v < kSteps; ++v) whole[r] = Lanes::multiply(Vec::load(x + v * Vec::W), weights[v], whole[r]);
      }
      sums[r] = kOne ? Vec::mul(whole[r], Vec::set1(scales[r * kScales])) : whole[r];
    }
  }

  // Several rows of x: the next piece is decoded meanwhile.
  template <int R>
  MUSUBI_NOINLINE void ahead(const Lanes& given, const uint8_t* codes, const float* x, int64_t blocks,
                             const float* scales, typename Vec::F* sums) const {
    const Lanes lanes = given;
    const int64_t stride = task_.w.stride, pieces = block_ / kPiece;
    typename Vec::F part[R], whole[R];
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) {
      part[r] = Vec::zero();
      whole[r] = sums[r];
    }
    alignas(64) float weights[2][R * kUnits];
    float *now = weights[0], *next = weights[1];
    if (pieces > 0) decode<R>(lanes, codes, stride, now);
    int64_t left = pieces;
    for (int64_t i = blocks * pieces; i > 0; --i, x += kSteps * Vec::W) {
      if (i > 1) codes += kPiece;  // the last piece is decoded twice
      meet<R>(lanes, codes, stride, x, now, next, part);
      float* const done = now;
      now = next;
      next = done;
      if (--left == 0) {
        MUSUBI_UNROLL
        for (int r = 0; r < R; ++r) {
          whole[r] = Vec::fma(part[r], Vec::set1(scales[r * kScales]), whole[r]);
          part[r] = Vec::zero();
        }
        left = pieces;
        if (i > 1) ++scales;
      }
    }
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) sums[r] = whole[r];
    if (block_ % kPiece != 0) add_tail<R>(given, pieces > 0 ? codes + kPiece : codes, x, scales, sums);
  }

  // The codes after the whole pieces of a row with one scale.
  template <int R>
  MUSUBI_NOINLINE void add_tail(const Lanes& lanes, const uint8_t* codes, const float* x, const float* scales,
                                typename Vec::F* sums) const {
    typename Vec::F part[R];
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) part[r] = Vec::zero();
    tail<R>(lanes, codes, task_.w.stride, block_ % kPiece, x, part);
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) sums[r] = Vec::fma(part[r], Vec::set1(scales[r * kScales]), sums[r]);
  }

  // Blocks that are no multiples of kPiece.
  template <int R>
  MUSUBI_NOINLINE void in_parts(const Lanes& lanes, const uint8_t* codes, const float* x, int64_t blocks,
                                const float* scales, typename Vec::F* sums) const {
    const int64_t stride = task_.w.stride, pieces = block_ / kPiece, left = block_ % kPiece;
    for (int64_t b = 0; b < blocks; ++b) {
      typename Vec::F part[R];
      MUSUBI_UNROLL
      for (int r = 0; r < R; ++r) part[r] = Vec::zero();
      for (int64_t i = 0; i < pieces; ++i, codes += kPiece, x += kSteps * Vec::W) {
        alignas(64) float weights[R * kUnits];
        decode<R>(lanes, codes, stride, weights);
        asm volatile("" : : "r"(weights) : "memory");
        for (int64_t u = 0; u < kUnits; u += G) step<R>(x + u / G * Vec::W, weights + u, part);
      }
      x = tail<R>(lanes, codes, stride, left, x, part);
      codes += left;
      MUSUBI_UNROLL
      for (int r = 0; r < R; ++r) sums[r] = Vec::fma(part[r], Vec::set1(scales[r * kScales + b]), sums[r]);
    }
  }

  static_assert(kFewOutputs <= 8, "Multiples knows no more");

  // Asks for a line into L1 or L2 at this place of the program, between what makes `beside` and what uses it. GCC
  // gathers requests that it may move at the head of a loop, where they stand in each other's way: nothing is gained.
  template <int kLevel>
  static MUSUBI_INLINE void ask(const uint8_t* line, typename Vec::F& beside) {
#ifdef __AVX512F__
    if (kLevel == 1) {
      asm volatile("prefetcht0 %1" : "+v"(beside) : "m"(*line));
    } else {
      asm volatile("prefetcht1 %1" : "+v"(beside) : "m"(*line));
    }
#else
    (void)beside;
    __builtin_prefetch(line, 0, 4 - kLevel);
#endif
  }

  // The rows that come next, into L2: 21 GB/s from memory where none gives 9.
  template <int R>
  static MUSUBI_INLINE void fetch(const uint8_t* codes, int64_t stride) {
    __builtin_prefetch(codes + R * stride + kFetchBeside, 0, 2);
  }

  template <int R>
  static MUSUBI_INLINE void decode(const Lanes& lanes, const uint8_t* codes, int64_t stride, float* weights) {
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) {
      fetch<R>(codes + r * stride, stride);
      lanes.decode_whole(codes + r * stride, weights + r * kUnits);
    }
  }

  // The decoded piece `now` by the vectors of x at `x`, and the piece at `codes` into `next` meanwhile.
  template <int R>
  static MUSUBI_INLINE void meet(const Lanes& lanes, const uint8_t* codes, int64_t stride, const float* x,
                                 const float* now, float* next, typename Vec::F* part) {
    constexpr int64_t kTurns = R < kSteps ? R : kSteps;
    constexpr int64_t kDecoded = R / kTurns, kMet = kSteps / kTurns;
    static_assert(kDecoded * kTurns == R && kMet * kTurns == kSteps, "both are powers of two");
    // GCC would keep the codes in registers and shuffle them, which costs more than loads that repeat
    asm volatile("" : : "r"(now), "r"(next) : "memory");
    for (int64_t t = 0; t < kTurns; ++t) {
      MUSUBI_UNROLL
      for (int i = 0; i < kDecoded; ++i, codes += stride, next += kUnits) {
        fetch<R>(codes, stride);
        lanes.decode_whole(codes, next);
      }
      MUSUBI_UNROLL
      for (int i = 0; i < kMet; ++i, x += Vec::W, now += G) step<R>(x, now, part);
    }
  }

  // The `left` codes, fewer than kPiece, after the whole pieces of a block; gives where x goes on.
  template <int R>
  static MUSUBI_INLINE const float* tail(const Lanes& lanes, const uint8_t* codes, int64_t stride, int64_t left,
                                         const float* x, typename Vec::F* part) {
    // one vector more: a row's last one is written, and read, whole
    alignas(64) float weights[R * kUnits + Vec::W];
    for (int r = 0; r < R; ++r) {
      fetch<R>(codes + r * stride, stride);
      lanes.decode(codes + r * stride, left, weights + r * kUnits);
    }
    asm volatile("" : : "r"(weights) : "memory");
    const int64_t units = (left + Lanes::kPerUnit - 1) / Lanes::kPerUnit;
    for (int64_t u = 0; u < units; u += G, x += Vec::W) step<R>(x, weights + u, part);
    return x;
  }

  template <int R>
  static MUSUBI_INLINE void step(const float* x, const float* weights, typename Vec::F* part) {
    const auto lanes = Vec::load(x);
    MUSUBI_UNROLL
    for (int r = 0; r < R; ++r) part[r] = Lanes::template multiply<G>(lanes, weights + r * kUnits, part[r]);
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

// The product by the form that its rows of x take.
template <class Lanes, class Kernel>
void linear_by(const LinearTask& task) {
  if (!has_few_rows(task)) return Multiply<Kernel>(task).run();
  if (task.low_from.data != nullptr) Multiply<Kernel>(task).make_low();
  linear_few_rows<Lanes>(task);
}

inline void linear_in_floats(const LinearTask& task) { linear_by<FloatLanes, FloatKernel>(task); }

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
