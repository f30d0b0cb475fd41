// The blocked product, written once over a vector type and a kernel, and compiled once per ISA in its own namespace.
//
// Lanes run over M. x is packed in tiles of V vectors of rows, [contraction][lanes], once per call; a panel of weights
// is decoded, scaled and held in cache; the micro kernel keeps V x R sums in registers, loads V vectors of x and
// broadcasts R weights per step. So the weight's bytes are decoded once per chunk of M, whatever M is, and no scalar
// work depends on the layout of scales. A contraction unit is four bytes: one float, or two bf16. Some tens of rows of
// x do not pay for a panel: they meet the codes as they are stored, by a table of numbers.
//
// Sums are carried in float32 between contraction blocks.
#include <algorithm>

#include "common/pool.h"
#include "common/scratch.h"
#include "ops/fp8_linear/fp8_linear_floats-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr int64_t kChunkBytes = int64_t{14} << 20;  // packed x and the sums of a panel: M is done in chunks

// Rows of bytes whose lines are fetched a few rows at a time while something else is computed. All at once would have
// to wait for one another: L1 has 10 to 16 buffers for lines under way.
struct Ahead {
  const void* first = nullptr;
  int64_t rows = 0, bytes = 0, stride = 0;
  int64_t step = 0;  // rows per call

  // Spreads the rows over so many calls.
  void spread(int64_t calls) { step = (rows + calls - 1) / (calls > 0 ? calls : 1); }

  template <bool kWrite>
  void some() {
    for (int64_t i = 0; i < step && rows > 0; ++i, --rows) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(first);
      for (uintptr_t line = begin / 64 * 64; line < begin + static_cast<uintptr_t>(bytes); line += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(line), kWrite, kWrite ? 3 : 2);
      }
      first = reinterpret_cast<const void*>(begin + static_cast<uintptr_t>(stride));
    }
  }
};

// What one micro kernel after another fetches for those to come.
struct Fetches {
  Ahead codes;  // of the next panel
  Between x;    // the next tile's rows: all of x is too large for L2, and the first micro kernel would wait for L3
  Ahead out;    // where this tile's results go

  void some() {
    codes.some<false>();
    out.some<true>();
  }
};

constexpr int kTileVectors = static_cast<int>(least(kMaxVectors, 3));

// How many vectors of rows a tile has when `left` vectors are to be done: as many as are best, and four where three
// would leave a narrow tile at the end and there are registers for it.
inline int tile_vectors(int64_t left) {
  if (kMaxVectors >= 4 && (left == 4 || left == 8)) return 4;
  return static_cast<int>(least(left, kTileVectors));
}

template <class Kernel>
class Multiply {
 public:
  explicit Multiply(const LinearTask& task)
      : task_(task),
        outputs_(task.outputs()),
        contraction_(task.x.cols),
        rank_(task.low.data == nullptr ? 0 : task.low.cols),
        main_units_((contraction_ + Kernel::kPerUnit - 1) / Kernel::kPerUnit),
        units_(main_units_ + (rank_ + Kernel::kPerUnit - 1) / Kernel::kPerUnit),
        scale_late_(scales_outputs(task)),
        by_codes_(Kernel::kByCodes && !task.transposed && task.x.rows > Vec::W && task.x.rows <= kMostByCodes &&
                  (scale_late_ || task.w.block >= kLeastRun)),
        weight_(task.w) {
    if (!scale_late_) return;
    weight_.scale = &kOne;
    weight_.scale_dtype = Dtype::f32;
    weight_.scale_row = 0;
  }

  void run() {
    const int64_t fits = kChunkBytes / (4 * (units_ + kMostOutputs));
    const int64_t most = fits < kTile ? kTile : fits / kTile * kTile;
    const int64_t chunks = (task_.x.rows + most - 1) / most;
    const int64_t rows = chunks > 0 ? round_up((task_.x.rows + chunks - 1) / chunks, chunks > 1 ? kTile : Vec::W) : 0;
    for (int64_t m = 0; m < task_.x.rows; m += rows) {
      pack_part(m, least(rows, task_.x.rows - m));
      const int64_t panels = (outputs_ + wide_ - 1) / wide_;
      parallel_chunks(panels, task_.threads, [this](int64_t p) { panel(p * wide_); });
    }
  }

  // The low-rank activation alone, of rows that are few.
  void make_low() { pack_part(0, task_.x.rows); }

 private:
  static constexpr int64_t kTile = kTileVectors * Vec::W;
  static constexpr float kOne = 1.0f;
  static constexpr int64_t kMostByCodes = 128;  // rows from which on a panel pays for its decoding
  static constexpr int64_t kLeastRun = 32;      // codes with one scale
  static constexpr int64_t kNumbers = 256;

  // Rows of x, and of the low-rank activation, which is made here where it has to be.
  void pack_part(int64_t first_row, int64_t rows) {
    first_row_ = first_row;
    rows_ = rows;
    vectors_ = (rows + Vec::W - 1) / Vec::W;
    const int64_t bytes = vectors_ * Vec::W * 4;  // of one unit of all rows, and of one output's sums
    wide_ = task_.transposed ? kMostOutputs : Kernel::outputs_per_panel(bytes, bytes * units_);
    packed_ = static_cast<float*>(scratch(Slot::packed, bytes * units_));
    parallel_chunks(vectors_, task_.threads, [this](int64_t v) { pack(v); });
    if (task_.low_from.data == nullptr) return;
    int64_t tiles = 0;
    for (int64_t start = 0; start < vectors_; ++tiles) start += tile_vectors(vectors_ - start);
    const int64_t parts = least(tiles, task_.threads);  // each fills panels of its own, so there are few
    parallel_chunks(parts, task_.threads,
                    [this, tiles, parts](int64_t p) { low_rows(tiles * p / parts, tiles * (p + 1) / parts); });
  }

  // Which tile vector v of rows belongs to: its first vector and width.
  int64_t tile_start(int64_t v, int* width) const {
    for (int64_t start = 0;;) {
      *width = tile_vectors(vectors_ - start);
      if (v < start + *width) return start;
      start += *width;
    }
  }

  void pack(int64_t v) const {
    int width = 0;
    const int64_t start = tile_start(v, &width);
    float* to = packed_ + (start * units_ + (v - start)) * Vec::W;
    const int64_t first = first_row_ + v * Vec::W;
    const int64_t count = least(Vec::W, first_row_ + rows_ - first);
    pack_units(task_.x, first, count, contraction_, to, width * Vec::W);
    if (rank_ > 0 && task_.low_from.data == nullptr) pack_low(v, start, width);
  }

  // Vector v of rows of the low-rank activation, in the tile of `width` vectors from `start`.
  void pack_low(int64_t v, int64_t start, int width) const {
    float* to = packed_ + (start * units_ + main_units_ * width + (v - start)) * Vec::W;
    const int64_t first = first_row_ + v * Vec::W;
    pack_units(task_.low, first, least(Vec::W, first_row_ + rows_ - first), rank_, to, width * Vec::W);
  }

  // The low-rank activation of some tiles: their packed rows by the small matrix, which is not in FP8, and packed again
  // behind them.
  void low_rows(int64_t first_tile, int64_t last_tile) const {
    const int64_t stride = task_.transposed ? kMostOutputs : Kernel::kForwardStride;
    for (int64_t j0 = 0; j0 < rank_; j0 += kMostOutputs) {
      const int64_t jn = least(kMostOutputs, rank_ - j0), wide = round_up(jn, kGroups);
      float* const weights = static_cast<float*>(scratch(Slot::panel, (most_units() + 16) * kMostOutputs * 4));
      float* const sums = static_cast<float*>(scratch(Slot::sums, vectors_ * Vec::W * wide * 4));
      if (main_units_ == 0) std::memset(sums, 0, static_cast<size_t>(vectors_ * Vec::W * wide * 4));
      for (int64_t u = 0; u < main_units_; u += most_units()) {
        const int64_t un = least(most_units(), main_units_ - u);
        const int64_t c0 = u * Kernel::kPerUnit, cn = least(un * Kernel::kPerUnit, contraction_ - c0);
        fill_small(task_.low_from, 1.0f, c0, cn, j0, jn, weights, stride);
        for_tiles(first_tile, last_tile, [&](int64_t start, int width) {
          Fetches none;
          const float* const x = packed_ + (start * units_ + u * width) * Vec::W;
          float* const to = sums + start * Vec::W * wide;
          const Panel small{weights, j0, jn, u, un, nullptr};
          task_.transposed ? tile<true>(width, small, x, to, none) : tile<false>(width, small, x, to, none);
        });
      }
      for_tiles(first_tile, last_tile, [&](int64_t start, int width) {
        const float* const from = sums + start * Vec::W * wide;
        for (int v = 0; v < width; ++v) {
          finish_low((start + v) * Vec::W, j0, jn, from + v * Vec::W, width * Vec::W);
        }
      });
    }
    for_tiles(first_tile, last_tile, [&](int64_t start, int width) {
      for (int v = 0; v < width; ++v) pack_low(start + v, start, width);
    });
  }

  template <class Body>
  void for_tiles(int64_t first_tile, int64_t last_tile, const Body& body) const {
    int64_t start = 0;
    for (int64_t t = 0; t < last_tile; ++t) {
      const int width = tile_vectors(vectors_ - start);
      if (t >= first_tile) body(start, width);
      start += width;
    }
  }

  // Sums of one vector of rows -> the low-rank activation.
  void finish_low(int64_t row, int64_t j0, int64_t jn, const float* from, int64_t lanes) const {
    const int64_t count = least(Vec::W, rows_ - row), bytes = size_of(task_.low.dtype);
    const auto factor = Vec::set1(task_.low_factor);
    typename Vec::F r[Vec::W];
    for (int64_t j = 0; j < jn; j += Vec::W) {
      const int64_t here = least(Vec::W, jn - j);
      for (int64_t i = 0; i < Vec::W; ++i) r[i] = i < here ? Vec::load(from + (j + i) * lanes) : Vec::zero();
      Vec::transpose(r);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t to = first_row_ + row + i;
        auto value = Vec::mul(r[i], factor);
        if (task_.low_mask.data != nullptr) {
          float mask[Vec::W] = {};
          read_row(task_.low_mask, to, j0 + j, here, mask);
          value = Vec::mul(value, Vec::load(mask));
        }
        alignas(64) char wide[4 * Vec::W];
        Vec::store_as(wide, task_.low.dtype, 0, value);
        copy_bytes(static_cast<char*>(task_.low_out) + (to * rank_ + j0 + j) * bytes, wide, here * bytes);
      }
    }
  }

  // Columns j0 .. of a small matrix from contraction c0, times a factor, as a panel.
  void fill_small(const Rows& matrix, float factor, int64_t c0, int64_t cn, int64_t j0, int64_t jn, float* weights,
                  int64_t stride) const {
    Rows part = matrix;
    part.data = task_.transposed ? at(matrix, c0, 0) : at(matrix, 0, c0);
    (task_.transposed ? part.rows : part.cols) = cn;
    if (task_.transposed) {
      Kernel::fill_gradient_tail(part, factor, j0, jn, weights, stride);
    } else {
      Kernel::fill_forward_tail(part, factor, j0, jn, weights, stride);
    }
  }

  static void pack_units(const Rows& x, int64_t first, int64_t count, int64_t cols, float* to, int64_t lanes) {
    constexpr int64_t step = Vec::W * Kernel::kPerUnit;
    typename Vec::F r[Vec::W];
    for (int64_t c = 0; c < cols; c += step) {
      const int64_t here = least(step, cols - c);
      for (int64_t i = 0; i < Vec::W; ++i) {
        if (i >= count) {
          r[i] = Vec::zero();
        } else if (here == step) {
          r[i] = Kernel::load_units(at(x, first + i, c), x.dtype, 0);
        } else {
          alignas(64) char few[4 * Vec::W * Kernel::kPerUnit] = {};
          copy_bytes(few, at(x, first + i, c), here * size_of(x.dtype));
          r[i] = Kernel::load_units(few, x.dtype, 0);
        }
      }
      Vec::transpose(r);
      const int64_t units = (here + Kernel::kPerUnit - 1) / Kernel::kPerUnit;
      for (int64_t u = 0; u < units; ++u) Vec::store(to + (c / Kernel::kPerUnit + u) * lanes, r[u]);
    }
  }

  void panel(int64_t j0) const {
    const int64_t jn = least(wide_, outputs_ - j0);
    const int64_t stride = task_.transposed ? kMostOutputs : Kernel::kForwardStride;
    const bool by_codes = by_codes_ && vectors_ > 1;  // the last rows of many may be few
    const int64_t room = by_codes ? kNumbers + blocks() * wide_ : 0;
    float* const weights = static_cast<float*>(scratch(Slot::panel, 4 * std::max((most_units() + 16) * wide_, room)));
    float* const sums = static_cast<float*>(scratch(Slot::sums, vectors_ * Vec::W * wide_ * 4));
    float* const bias = static_cast<float*>(scratch(Slot::rows, (wide_ + Vec::W) * 4));
    for (int64_t j = 0; j < wide_ + Vec::W; ++j) bias[j] = 0.0f;
    if (task_.bias.data != nullptr) read_row(task_.bias, 0, j0, jn, bias);
    if (units_ == 0) std::memset(sums, 0, static_cast<size_t>(vectors_ * Vec::W * wide_ * 4));
    if (by_codes) numbers_of(j0, jn, weights);
    int64_t u = 0;
    do {
      const bool in_tail = u >= main_units_;
      const int64_t un = least(most_units(), (in_tail ? units_ : main_units_) - u);
      Panel now{weights, j0, jn, u, un, nullptr};
      Coded coded;
      if (in_tail) {
        fill_tail(j0, jn, weights, stride, u - main_units_);
      } else if (by_codes) {
        coded = coded_at(j0, u, un, weights);
        now.coded = &coded;
      } else {
        fill(j0, jn, u, un, weights, stride);
      }
      tiles(now, sums, bias);
      u += un;
    } while (u < units_);
  }

  // What codes stand for, and the scales of `jn` outputs from j0, [blocks][wide], zeros beyond.
  void numbers_of(int64_t j0, int64_t jn, float* room) const {
    // few rows have panels of one of these widths, and a vector of scales must not reach into the next block's
    static_assert(2 * kGroups % Vec::W == 0 && kMostOutputs % Vec::W == 0, "panels are whole vectors");
    uint8_t all[kNumbers];
    for (int code = 0; code < kNumbers; ++code) all[code] = static_cast<uint8_t>(code);
    Codes(weight_.format).floats(all, kNumbers, 1.0f, room);
    const Rows scales{weight_.scale, outputs_, blocks(), weight_.scale_row, weight_.scale_dtype};
    float* const to = room + kNumbers;
    for (int64_t b = 0; b < blocks(); b += Vec::W) {
      const int64_t count = least(Vec::W, blocks() - b);
      for (int64_t j = 0; j < wide_; j += Vec::W) {
        typename Vec::F r[Vec::W];
        for (int64_t i = 0; i < Vec::W; ++i) {
          float few[Vec::W] = {};
          if (j + i < jn && weight_.scale_block == 1) read_row(scales, j0 + j + i, b, count, few);
          for (int64_t c = 0; j + i < jn && weight_.scale_block != 1 && c < count; ++c) {
            few[c] = scale_at(weight_, j0 + j + i, b + c);
          }
          r[i] = Vec::load(few);
        }
        Vec::transpose(r);
        for (int64_t c = 0; c < count; ++c) Vec::store(to + (b + c) * wide_ + j, r[c]);
      }
    }
  }

  // The codes of outputs from j0 and units from u, by what `numbers_of` has left at `room`.
  Coded coded_at(int64_t j0, int64_t u, int64_t un, const float* room) const {
    const int64_t first = u / weight_.block;
    Coded coded{
        weight_.codes + j0 * weight_.stride + u, weight_.stride, room, room + kNumbers + first * wide_, wide_, 0, {}};
    for (int64_t c = u; c < u + un; c += coded.lengths[coded.runs++]) {
      coded.lengths[coded.runs] = least(u + un, (first + coded.runs + 1) * weight_.block) - c;
    }
    return coded;
  }

  int64_t blocks() const { return (contraction_ + weight_.block - 1) / weight_.block; }

  // Units of the contraction that are decoded at once.
  int64_t most_units() const { return task_.transposed ? kMostUnits : Kernel::kForwardUnits; }

  void scale_sums(int64_t j0, int64_t jn, int width, float* sums) const {
    for (int64_t j = 0; j < jn; ++j) {
      const auto factor = Vec::set1(scale_at(task_.w, task_.transposed ? 0 : j0 + j, 0));
      float* const lanes = sums + j * width * Vec::W;
      for (int v = 0; v < width; ++v) {
        Vec::store(lanes + v * Vec::W, Vec::mul(Vec::load(lanes + v * Vec::W), factor));
      }
    }
  }

  void fill(int64_t j0, int64_t jn, int64_t u, int64_t un, float* weights, int64_t stride) const {
    const int64_t c0 = u * Kernel::kPerUnit;
    const int64_t cn = least(un * Kernel::kPerUnit, contraction_ - c0);
    if (task_.transposed) {
      Kernel::fill_gradient(weight_, j0, jn, c0, cn, weights, stride);
    } else {
      Kernel::fill_forward(weight_, j0, jn, c0, cn, weights, stride);
    }
  }

  void fill_tail(int64_t j0, int64_t jn, float* weights, int64_t stride, int64_t done) const {
    const int64_t r0 = done * Kernel::kPerUnit;
    fill_small(task_.tail, task_.strength, r0, least(most_units() * Kernel::kPerUnit, rank_ - r0), j0, jn, weights,
               stride);
  }

  // Decoded weights: `jn` outputs from j0, `un` units of the contraction from u.
  struct Panel {
    const float* weights;
    int64_t j0, jn, u, un;
    const Coded* coded;  // or null: the weights are decoded
  };

  void tiles(const Panel& panel, float* sums, const float* bias) const {
    const int64_t end = panel.u + panel.un;
    Fetches fetches;
    fetches.codes = codes_after(panel);
    fetches.codes.spread(vectors_ * panel.jn / kGroups);  // a micro kernel has 24 vectors of sums
    for (int64_t start = 0; start < vectors_;) {
      const int width = tile_vectors(vectors_ - start);
      const float* x = packed_ + (start * units_ + panel.u * width) * Vec::W;
      float* const to = sums + start * Vec::W * wide_;
      fetches.x = rows_after(panel, start + width, width * panel.jn / kGroups);
      fetches.out = end == units_ ? results(panel, start * Vec::W, width * Vec::W) : Ahead();
      fetches.out.spread(width * panel.jn / kGroups);
      if (panel.un > 0) {
        task_.transposed ? tile<true>(width, panel, x, to, fetches) : tile<false>(width, panel, x, to, fetches);
      }
      if (end == main_units_ && scale_late_) scale_sums(panel.j0, panel.jn, width, to);
      for (int v = 0; end == units_ && v < width; ++v) {
        finish_rows((start + v) * Vec::W, panel.j0, panel.jn, to + v * Vec::W, width * Vec::W, bias);
      }
      start += width;
    }
  }

  // The codes that are decoded after this panel: further along the contraction, or the beginning of the next outputs.
  Ahead codes_after(const Panel& now) const {
    const Fp8Rows& w = task_.w;
    const bool further = now.u + now.un < main_units_;
    const int64_t j0 = further ? now.j0 : now.j0 + now.jn, jn = further ? now.jn : least(wide_, outputs_ - j0);
    const int64_t c0 = further ? (now.u + now.un) * Kernel::kPerUnit : 0;
    const int64_t cn = least(most_units() * Kernel::kPerUnit, contraction_ - c0);
    if (jn <= 0 || cn <= 0) return {};
    if (task_.transposed) return {w.codes + c0 * w.stride + j0, cn, jn, w.stride};
    return {w.codes + j0 * w.stride + c0, jn, cn, w.stride};
  }

  // The packed rows of the tile after a panel's, for so many calls of a micro kernel: that from vector `start`, or the
  // first of the next contraction block. Nothing where L2 holds all of x.
  Between rows_after(const Panel& now, int64_t start, int64_t calls) const {
    const int64_t fetches = calls * (now.un / kUnitsPerFetch);
    if (vectors_ * Vec::W * 4 * units_ <= kCachedBytes || fetches == 0) return {};
    const int64_t u = start < vectors_ ? now.u : now.u + now.un < units_ ? now.u + now.un : 0;
    if (start >= vectors_) start = 0;
    const int64_t width = tile_vectors(vectors_ - start);
    return {bytes_at(packed_ + (start * units_ + u * width) * Vec::W),
            least(now.un, units_ - u) * width * Vec::W * 4 / fetches};
  }

  // Where this panel's outputs of rows of x go.
  Ahead results(const Panel& panel, int64_t row, int64_t rows) const {
    const int64_t bytes = size_of(task_.out_dtype);
    const char* const out = static_cast<const char*>(task_.out) + ((first_row_ + row) * outputs_ + panel.j0) * bytes;
    return {out, least(rows, rows_ - row), panel.jn * bytes, outputs_ * bytes};
  }

  template <bool kTransposed>
  static void tile(int width, const Panel& panel, const float* x, float* to, Fetches& fetches) {
    if constexpr (Kernel::kByCodes && !kTransposed) {
      if (panel.coded != nullptr) {
        if (width == 4) return groups_of_codes<4, 6>(panel, x, to, fetches);
        return width == 3 ? groups_of_codes<3, 8>(panel, x, to, fetches) : groups_of_codes<2, 8>(panel, x, to, fetches);
      }
    }
    switch (width) {
      case 1:
        return groups<1, kOutputs1, kTransposed>(panel, x, to, fetches);
      case 2:
        return groups<2, kOutputs2, kTransposed>(panel, x, to, fetches);
      case 4:
        return groups<kMaxVectors, kOutputs4, kTransposed>(panel, x, to, fetches);
      default:
        return groups<kTileVectors, kOutputs3, kTransposed>(panel, x, to, fetches);
    }
  }

  template <int V, int R, bool kTransposed>
  static void groups(const Panel& panel, const float* x, float* to, Fetches& fetches) {
    static_assert(kGroups % R == 0 && kMostOutputs % kGroups == 0, "a panel is whole groups");
    constexpr int64_t stride = kTransposed ? 1 : Kernel::kForwardStride;
    for (int64_t j = 0; j < panel.jn; j += R) {
      fetches.some();
      float* const sums = to + j * V * Vec::W;
      Kernel::template micro<V, R, kTransposed>(x, panel.un, panel.weights + j * stride, sums, panel.u == 0, fetches.x);
    }
  }

  template <int V, int R>
  static void groups_of_codes(const Panel& panel, const float* x, float* to, Fetches& fetches) {
    static_assert(kGroups % R == 0, "a panel is whole groups");
    const Coded& w = *panel.coded;
    for (int64_t j = 0; j < panel.jn; j += R) {
      fetches.some();
      float* const sums = to + j * V * Vec::W;
      const uint8_t* const codes = w.codes + j * w.stride;
      const bool first = panel.u == 0;
      if (j + R <= panel.jn) {
        Kernel::template micro_of_codes<V, R>(x, codes, w, w.scales + j, sums, first);
        continue;
      }
      uint8_t few[R * kMostUnits] = {};  // no row after the last is there to be read
      for (int64_t r = 0; j + r < panel.jn; ++r) copy_bytes(few + r * panel.un, codes + r * w.stride, panel.un);
      Coded last = w;
      last.stride = panel.un;
      Kernel::template micro_of_codes<V, R>(x, few, last, w.scales + j, sums, first);
    }
  }

  // Sums of one vector of rows -> out: add the bias, turn lanes into rows, round once.
  void finish_rows(int64_t row, int64_t j0, int64_t jn, const float* from, int64_t lanes, const float* bias) const {
    const int64_t count = least(Vec::W, rows_ - row);
    const int64_t bytes = size_of(task_.out_dtype);
    char* const out = static_cast<char*>(task_.out) + ((first_row_ + row) * outputs_ + j0) * bytes;
    typename Vec::F r[Vec::W];
    for (int64_t j = 0; j < jn; j += Vec::W) {
      const int64_t here = least(Vec::W, jn - j);
      MUSUBI_UNROLL
      for (int64_t i = 0; i < Vec::W; ++i) r[i] = i < here ? Vec::load(from + (j + i) * lanes) : Vec::zero();
      Vec::transpose(r);
      const auto shift = Vec::load(bias + j);
      for (int64_t i = 0; i < count; ++i) {
        char* const to = out + (i * outputs_ + j) * bytes;
        if (here == Vec::W) {
          Vec::store_as(to, task_.out_dtype, 0, Vec::add(r[i], shift));
        } else {
          alignas(64) char wide[4 * Vec::W];
          Vec::store_as(wide, task_.out_dtype, 0, Vec::add(r[i], shift));
          copy_bytes(to, wide, here * bytes);
        }
      }
    }
  }

  const LinearTask& task_;
  const int64_t outputs_;
  const int64_t contraction_;
  const int64_t rank_;
  const int64_t main_units_;
  const int64_t units_;
  const bool scale_late_;
  const bool by_codes_;
  Fp8Rows weight_;  // as the panel sees it: with scales of one where they come late
  int64_t first_row_ = 0;
  int64_t rows_ = 0;
  int64_t vectors_ = 0;
  int64_t wide_ = 0;
  float* packed_ = nullptr;
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
