// Integer products of every ISA that has them against a double loop over the same integers.
#include "ops/fp8_linear_dynamic/fp8_linear_dynamic.h"

#include <algorithm>

#include "testing.h"

namespace musubi_test {
namespace {

using musubi::Dtype;
using musubi::Format;
using musubi::Isa;

struct Shape {
  int64_t m, n, k, block;
};

void one(const Shape& s, Format format, Dtype dtype, int threads) {
  Random random(static_cast<uint64_t>(s.m * 100 + s.n));
  const int64_t blocks = s.k / s.block;
  const double largest = format == Format::e4m3 ? 448.0 : 57344.0;
  Numbers x(s.m * s.k, dtype), scale(s.n * blocks, Dtype::f32), bias(s.n, Dtype::f32);
  x.fill(random, 1.0);
  bias.fill(random, 1.0);
  for (int64_t i = 0; i < scale.count(); ++i) scale.set(i, 0.01 * (1.5 + random.number()));
  std::vector<uint8_t> codes(static_cast<size_t>(s.n * s.k));
  for (auto& code : codes) {
    do {
      code = static_cast<uint8_t>(random.bits());
    } while (!std::isfinite(value_of(code, format)));
  }
  for (int i = 0; i < musubi::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!musubi::has(isa) || musubi::dynamic_kernel(isa) == nullptr) continue;
    std::vector<float> out(static_cast<size_t>(s.m * s.n), NAN);
    musubi::DynamicTask task;
    task.x = {x.data(), s.m, s.k, s.k, dtype};
    task.w = {codes.data(), s.n, s.k, s.k, scale.data(), blocks, 1, s.block, Dtype::f32, format};
    task.bias = {bias.data(), 1, s.n, 0, Dtype::f32};
    task.out = out.data();
    task.threads = threads;
    musubi::dynamic_kernel(isa)(task);
    double wrong = 0.0, whole = 1e-30;
    for (int64_t m = 0; m < s.m; ++m) {
      float peak = 0.0f;
      for (int64_t k = 0; k < s.k; ++k) peak = std::max(peak, std::fabs(static_cast<float>(x.get(m * s.k + k))));
      const float row_scale = peak / 127.0f;
      for (int64_t n = 0; n < s.n; ++n) {
        double sum = 0.0;
        for (int64_t k = 0; k < s.k; ++k) {
          const double code = std::nearbyint(static_cast<float>(x.get(m * s.k + k)) / row_scale);
          const double weight =
              std::nearbyint(value_of(codes[static_cast<size_t>(n * s.k + k)], format) * 127 / largest);
          sum += code * weight * scale.get(n * blocks + k / s.block) * largest / 127.0;
        }
        const double want = sum * static_cast<double>(row_scale) + bias.get(n);
        const double miss = static_cast<double>(out[static_cast<size_t>(m * s.n + n)]) - want;
        wrong += std::isfinite(miss) ? miss * miss : 1e30;
        whole += want * want;
      }
    }
    const double error = std::sqrt(wrong / whole);
    EXPECT(error <= 1e-6, "%s: M %d N %d K %d block %d: error %.3g", name_of(isa), static_cast<int>(s.m),
           static_cast<int>(s.n), static_cast<int>(s.k), static_cast<int>(s.block), error);
  }
}

}  // namespace

void test_linear_dynamic() {
  const Shape shapes[] = {{1, 5, 64, 64},   {17, 70, 130, 130}, {50, 193, 96, 48}, {33, 64, 99, 33},
                          {16, 8, 256, 64}, {100, 9, 7, 7},     {3, 1, 1, 1}};
  int number = 0;
  for (const Shape& shape : shapes) {
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      one(shape, number % 2 == 0 ? Format::e4m3 : Format::e5m2, dtype, 1 + number % 3);
      ++number;
    }
  }
}

}  // namespace musubi_test
