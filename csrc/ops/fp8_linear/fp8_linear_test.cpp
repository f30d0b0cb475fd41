// Every ISA of this machine against a double loop over decoded codes: ragged sizes, strides, layouts, tails.
#include "ops/fp8_linear/fp8_linear.h"

#include <algorithm>

#include "testing.h"

namespace musubi_test {
namespace {

using musubi::Dtype;
using musubi::Format;
using musubi::Isa;

struct Case {
  int64_t m, n, k;
  int64_t block;  // 0: one scale per row; -1: one in all
  int64_t rank;
  Dtype x_dtype, scale_dtype;
  Format format;
  bool transposed;
};

struct Problem {
  Case c;
  int64_t in, out_cols, x_stride, w_stride, block, blocks;
  std::vector<uint8_t> codes;
  Numbers scale, x, bias, low, tail;
  std::vector<double> expected;

  Problem(const Case& given, uint64_t seed)
      : c(given),
        in(c.transposed ? c.n : c.k),
        out_cols(c.transposed ? c.k : c.n),
        x_stride(in + 3),
        w_stride(c.k + 5),
        block(c.block > 0 ? c.block : std::max<int64_t>(c.k, 1)),
        blocks(c.block > 0 ? c.k / c.block : 1),
        codes(static_cast<size_t>(c.n > 0 ? (c.n - 1) * w_stride + c.k : 0)),
        scale(c.block < 0 ? 1 : c.n * blocks, c.scale_dtype),
        x(c.m > 0 ? (c.m - 1) * x_stride + in : 0, c.x_dtype),
        bias(out_cols, Dtype::f32),
        low(c.m * c.rank, c.x_dtype),
        tail(c.transposed ? c.rank * c.k : c.n * c.rank, Dtype::f32),
        expected(static_cast<size_t>(c.m * out_cols)) {
    Random random(seed);
    for (auto& code : codes) {
      do {
        code = static_cast<uint8_t>(random.bits());
      } while (!std::isfinite(value_of(code, c.format)) || (c.format == Format::e5m2 && (code & 0x7f) > 0x50));
    }
    for (int64_t i = 0; i < scale.count(); ++i) scale.set(i, 0.01 * (1.5 + random.number()));
    x.fill(random, 1.0);
    bias.fill(random, 1.0);
    low.fill(random, 1.0);
    tail.fill(random, 1.0);
    for (int64_t i = 0; i < c.m; ++i) {
      for (int64_t j = 0; j < out_cols; ++j) expected[static_cast<size_t>(i * out_cols + j)] = exact(i, j);
    }
  }

  double weight(int64_t n, int64_t k) const {
    const int64_t s = c.block < 0 ? 0 : n * blocks + k / block;
    return value_of(codes[static_cast<size_t>(n * w_stride + k)], c.format) * scale.get(s);
  }

  double exact(int64_t i, int64_t j) const {
    double sum = bias.get(j);
    for (int64_t l = 0; l < in; ++l) sum += x.get(i * x_stride + l) * (c.transposed ? weight(l, j) : weight(j, l));
    for (int64_t r = 0; r < c.rank; ++r) {
      sum += 0.5 * low.get(i * c.rank + r) * tail.get(c.transposed ? r * c.k + j : j * c.rank + r);
    }
    return sum;
  }
};

double tolerance(Dtype dtype) { return dtype == Dtype::f32 ? 1e-6 : dtype == Dtype::bf16 ? 4e-3 : 5e-4; }

// The problem as a kernel gets it, but for the result's address.
musubi::LinearTask task_of(Problem& p, int threads) {
  musubi::LinearTask task;
  task.x = {p.x.data(), p.c.m, p.in, p.x_stride, p.c.x_dtype};
  task.w = {p.codes.data(), p.c.n,   p.c.k,           p.w_stride, p.scale.data(), p.c.block < 0 ? 0 : p.blocks,
            p.c.block > 0,  p.block, p.c.scale_dtype, p.c.format};
  task.transposed = p.c.transposed;
  task.bias = {p.bias.data(), 1, p.out_cols, 0, Dtype::f32};
  if (p.c.rank > 0) {
    task.low = {p.low.data(), p.c.m, p.c.rank, p.c.rank, p.c.x_dtype};
    task.tail = {p.tail.data(), p.c.transposed ? p.c.rank : p.c.n, p.c.transposed ? p.c.k : p.c.rank,
                 p.c.transposed ? p.c.k : p.c.rank, Dtype::f32};
    task.strength = 0.5f;
  }
  task.out_dtype = p.c.x_dtype;
  task.threads = threads;
  return task;
}

// Relative norm of the error of `isa` on the problem.
double error_of(Problem& p, Isa isa, int threads) {
  Numbers out(p.c.m * p.out_cols, p.c.x_dtype);
  for (int64_t i = 0; i < out.count(); ++i) std::memset(out.data() + i * size_of(out.dtype()), 0xff, 2);
  musubi::LinearTask task = task_of(p, threads);
  task.out = out.data();
  musubi::linear_kernel(isa)(task);
  double wrong = 0.0, whole = 1e-30;
  for (int64_t i = 0; i < out.count(); ++i) {
    const double want = p.expected[static_cast<size_t>(i)];
    const double miss = out.get(i) - want;
    wrong += std::isfinite(miss) ? miss * miss : 1e30;
    whole += want * want;
  }
  return std::sqrt(wrong / whole);
}

// The low-rank activation that the product makes itself: right, and then the same product as with it given.
void made_low(const Case& c, Isa isa, int threads, bool masked, uint64_t seed) {
  Problem p(c, seed);
  Random random(seed);
  Numbers small(p.in * c.rank, seed % 2 == 0 ? Dtype::f32 : c.x_dtype), mask(c.m * c.rank, c.x_dtype);
  Numbers low(c.m * c.rank, c.x_dtype), given(c.m * p.out_cols, c.x_dtype), made(c.m * p.out_cols, c.x_dtype);
  small.fill(random, 1.0);
  for (int64_t i = 0; i < mask.count(); ++i) mask.set(i, random.bits() % 3 == 0 ? 0.0 : 1.5);
  musubi::LinearTask task = task_of(p, threads);
  task.low_from = {small.data(), c.transposed ? p.in : c.rank, c.transposed ? c.rank : p.in,
                   c.transposed ? c.rank : p.in, small.dtype()};
  if (masked) task.low_mask = {mask.data(), c.m, c.rank, c.rank, c.x_dtype};
  task.low_factor = 0.25f;
  task.low.data = task.low_out = low.data();
  task.out = made.data();
  musubi::linear_kernel(isa)(task);
  double wrong = 0.0, whole = 1e-30;
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t r = 0; r < c.rank; ++r) {
      double want = 0.0;
      for (int64_t l = 0; l < p.in; ++l) {
        want += p.x.get(i * p.x_stride + l) * small.get(c.transposed ? l * c.rank + r : r * p.in + l);
      }
      want *= 0.25 * (masked ? mask.get(i * c.rank + r) : 1.0);
      const double miss = low.get(i * c.rank + r) - want;
      wrong += std::isfinite(miss) ? miss * miss : 1e30;
      whole += want * want;
    }
  }
  const char* const way = c.transposed ? "dX" : "forward";
  EXPECT(std::sqrt(wrong / whole) <= tolerance(c.x_dtype), "%s: low of M %d N %d K %d rank %d dtype %d %s: error %.3g",
         name_of(isa), static_cast<int>(c.m), static_cast<int>(c.n), static_cast<int>(c.k), static_cast<int>(c.rank),
         static_cast<int>(c.x_dtype), way, std::sqrt(wrong / whole));
  task.low_from.data = nullptr;
  task.out = given.data();
  musubi::linear_kernel(isa)(task);
  const size_t bytes = static_cast<size_t>(made.count() * size_of(made.dtype()));
  EXPECT(std::memcmp(made.data(), given.data(), bytes) == 0, "%s: M %d N %d K %d rank %d %s: not as with low given",
         name_of(isa), static_cast<int>(c.m), static_cast<int>(c.n), static_cast<int>(c.k), static_cast<int>(c.rank),
         way);
}

void one(const Case& c, uint64_t seed) {
  Problem problem(c, seed);
  for (int i = 0; i < musubi::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!musubi::has(isa) || musubi::linear_kernel(isa) == nullptr) continue;
    for (int threads : {1, 3}) {
      const double error = error_of(problem, isa, threads);
      EXPECT(error <= tolerance(c.x_dtype), "%s: M %d N %d K %d block %d rank %d dtype %d format %d %s: error %.3g",
             name_of(isa), static_cast<int>(c.m), static_cast<int>(c.n), static_cast<int>(c.k),
             static_cast<int>(c.block), static_cast<int>(c.rank), static_cast<int>(c.x_dtype),
             static_cast<int>(c.format), c.transposed ? "dX" : "forward", error);
    }
  }
}

// Every code alone in its row, at places that are decoded in different ways, by few rows of x.
void every_code(Isa isa, Format format, int64_t m, int64_t k, int64_t at) {
  std::vector<uint8_t> codes(static_cast<size_t>(256 * k));
  for (int64_t n = 0; n < 256; ++n) codes[static_cast<size_t>(n * k + at)] = static_cast<uint8_t>(n);
  Numbers x(m * k, Dtype::bf16), out(m * 256, Dtype::f32), scale(1, Dtype::f32);
  for (int64_t i = 0; i < x.count(); ++i) x.set(i, 1.0);
  scale.set(0, 1.0);
  musubi::LinearTask task;
  task.x = {x.data(), m, k, k, Dtype::bf16};
  task.w = {codes.data(), 256, k, k, scale.data(), 0, 0, k, Dtype::f32, format};
  task.out = out.data();
  task.out_dtype = Dtype::f32;
  musubi::linear_kernel(isa)(task);
  for (int64_t i = 0; i < out.count(); ++i) {
    const double got = out.get(i), want = value_of(static_cast<uint8_t>(i % 256), format);
    const bool same = std::isnan(want) ? std::isnan(got) : got == want;
    EXPECT(same, "%s: M %d K %d format %d: code %d became %g", name_of(isa), static_cast<int>(m), static_cast<int>(k),
           static_cast<int>(format), static_cast<int>(i % 256), got);
  }
}

}  // namespace

void test_linear() {
  for (int i = 0; i < musubi::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!musubi::has(isa) || musubi::linear_kernel(isa) == nullptr) continue;
    for (int64_t m : {1, 2, 4, 7, 16}) {
      for (int64_t at = 0; at < 100; at += 9) {
        every_code(isa, Format::e4m3, m, 100, at);
        every_code(isa, Format::e5m2, m, 100, at);
      }
    }
  }
  const int64_t sizes[][4] = {
      {1, 5, 64, 64},  {1, 67, 192, 32},  {3, 9, 7, 0},      {2, 130, 130, -1}, {4, 33, 96, 48},   {5, 64, 128, 64},
      {8, 70, 320, 0}, {9, 49, 256, 128}, {16, 200, 65, -1}, {17, 24, 640, 64}, {33, 50, 100, 50}, {49, 193, 66, 33},
      {70, 97, 65, 0}, {97, 31, 576, 96}, {1, 1, 1, 0},      {64, 3, 3, -1},    {0, 8, 64, 64},    {7, 0, 64, 64},
      {6, 8, 0, 0},    {1, 19, 4544, 64}, {3, 9, 4544, 64},  {2, 12, 256, 128}, {1, 17, 320, 160}, {6, 25, 321, 0},
      {1, 26, 321, 0}, {12, 15, 192, 96}, {15, 8, 64, 64}};
  uint64_t seed = 1;
  for (const auto& s : sizes) {
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (bool transposed : {false, true}) {
        const Format format = seed % 2 == 0 ? Format::e5m2 : Format::e4m3;
        const Dtype scale_dtype = static_cast<Dtype>(seed % 3);
        const int64_t rank = seed % 4 == 0 ? 0 : static_cast<int64_t>(seed % 4 * 5);
        one({s[0], s[1], s[2], s[3], rank, dtype, scale_dtype, format, transposed}, seed);
        ++seed;
      }
    }
  }
  const int64_t made[][4] = {{1, 30, 128, 7},   {5, 9, 70, 16},   {16, 40, 192, 3},   {17, 33, 64, 8},
                             {70, 20, 520, 32}, {131, 7, 99, 25}, {64, 50, 128, 200}, {130, 24, 1100, 5}};
  for (const auto& s : made) {
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (bool transposed : {false, true}) {
        for (int i = 0; i < musubi::kIsaCount; ++i) {
          const Isa isa = static_cast<Isa>(i);
          if (!musubi::has(isa) || musubi::linear_kernel(isa) == nullptr) continue;
          const Case c = {s[0], s[1], s[2], 0, s[3], dtype, Dtype::f32, Format::e4m3, transposed};
          made_low(c, isa, seed % 2 == 0 ? 1 : 3, seed % 3 == 0, seed);
          ++seed;
        }
      }
    }
  }
  // so many rows that a panel is neither one strip nor of full width, and some outputs are left over
  one({1050, 110, 256, 64, 5, Dtype::f32, Dtype::bf16, Format::e4m3, false}, seed);
  // so long a contraction that a hundred rows are done in parts, the last of four
  one({100, 5, 50048, 64, 0, Dtype::f16, Dtype::bf16, Format::e4m3, false}, seed);
}

}  // namespace musubi_test
