// All 256 codes decode exactly; quantising finds the nearest code for every ISA, by search among all codes in double.
#include "ops/fp8_quantize/fp8_quantize.h"

#include <algorithm>
#include <cstring>

#include "testing.h"

namespace musubi_test {
namespace {

using musubi::Dtype;
using musubi::Format;
using musubi::Isa;

bool is_nan(const void* at, Dtype dtype) {
  if (dtype == Dtype::f32) {
    float value;
    std::memcpy(&value, at, 4);
    return std::isnan(value);
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return (bits & 0x7fff) > (dtype == Dtype::bf16 ? 0x7f80 : 0x7c00);
}

template <class Body>
void on_every_isa(const Body& body) {
  for (int i = 0; i < musubi::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (musubi::has(isa) && musubi::quantize_kernel(isa) != nullptr) body(isa);
  }
}

void all_codes_decode(Format format) {
  std::vector<uint8_t> codes(256);
  for (size_t i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
  const float one = 1.0f;
  on_every_isa([&](Isa isa) {
    std::vector<float> out(256, 7.0f);
    musubi::DequantizeTask task;
    task.w = {codes.data(), 1, 256, 256, &one, 0, 0, 256, Dtype::f32, format};
    task.out = out.data();
    musubi::dequantize_kernel(isa)(task);
    for (size_t i = 0; i < 256; ++i) {
      const double want = value_of(codes[i], format);
      const bool same = std::isnan(want) ? std::isnan(out[i]) : out[i] == want && std::signbit(out[i]) == (i >= 128);
      EXPECT(same, "%s: code %d decodes to %g, not %g", name_of(isa), static_cast<int>(i), static_cast<double>(out[i]),
             want);
    }
  });
}

// The nearest finite code, ties to the even one; values beyond the largest saturate.
uint8_t nearest(double value, Format format) {
  const int largest = format == Format::e4m3 ? 0x7e : 0x7b;
  const double size = std::fabs(value);
  int best = 0;
  for (int code = 1; code <= largest; ++code) {
    const double here = std::fabs(value_of(static_cast<uint8_t>(code), format) - size);
    const double before = std::fabs(value_of(static_cast<uint8_t>(best), format) - size);
    if (here < before || (here == before && code % 2 == 0)) best = code;
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

void codes_are_nearest(Format format, int64_t rows, int64_t cols, int64_t width) {
  Random random(static_cast<uint64_t>(rows * 1000 + cols + width));
  const float largest = format == Format::e4m3 ? 448.0f : 57344.0f;
  std::vector<float> w(static_cast<size_t>(rows * cols));
  for (auto& each : w) each = static_cast<float>(random.number() * std::exp2(6.0 * random.number()));
  const int64_t groups = rows * cols / width;
  on_every_isa([&](Isa isa) {
    std::vector<uint8_t> codes(w.size(), 0x55);
    std::vector<float> scales(static_cast<size_t>(groups), -1.0f);
    musubi::QuantizeTask task;
    task.w = {w.data(), rows, cols, cols, Dtype::f32};
    task.width = width;
    task.format = format;
    task.codes = codes.data();
    task.scales = scales.data();
    task.threads = 3;
    musubi::quantize_kernel(isa)(task);
    for (int64_t g = 0; g < groups; ++g) {
      const auto first = w.begin() + g * width;
      float peak = 0.0f;
      for (auto i = first; i < first + width; ++i) peak = std::max(peak, std::fabs(*i));
      const float scale = std::max(peak / largest, 1e-8f);
      EXPECT(scales[static_cast<size_t>(g)] == scale, "%s: scale %lld", name_of(isa), static_cast<long long>(g));
      for (int64_t i = g * width; i < (g + 1) * width; ++i) {
        const size_t at = static_cast<size_t>(i);
        const uint8_t want = nearest(static_cast<double>(w[at] / scale), format);
        EXPECT(codes[at] == want, "%s: weight %g by %g gives %d, not %d", name_of(isa), static_cast<double>(w[at]),
               static_cast<double>(scale), codes[at], want);
      }
    }
  });
}

// Weights whose quotients are next to the middle of two codes, where a wrong last place of a quotient shows.
std::vector<float> hard_weights(int64_t rows, int64_t width, Format format, double range) {
  Random random(static_cast<uint64_t>(width));
  const float largest = format == Format::e4m3 ? 448.0f : 57344.0f;
  std::vector<float> w(static_cast<size_t>(rows * width));
  for (int64_t r = 0; r < rows; ++r) {
    const float peak = static_cast<float>(std::exp2(range * random.number()) * (1.5 + 0.4 * random.number()));
    const float scale = std::max(peak / largest, 1e-8f);
    w[static_cast<size_t>(r * width)] = peak;
    for (int64_t i = 1; i < width; ++i) {
      const int code = static_cast<int>((random.number() + 1.0) * 61.0);
      const double middle =
          (value_of(static_cast<uint8_t>(code), format) + value_of(static_cast<uint8_t>(code + 1), format)) / 2;
      float near = static_cast<float>(middle * static_cast<double>(scale));
      for (int64_t step = 0; step < i % 3; ++step) near = std::nextafter(near, i % 2 == 0 ? 0.0f : peak);
      w[static_cast<size_t>(r * width + i)] = i % 5 < 2 ? -near : near;
    }
  }
  return w;
}

// Every body gives the bytes of the plain one, streamed or not.
void bodies_quantise_alike(Format format, Dtype dtype, Dtype scale_dtype, int64_t width) {
  const int64_t rows = 5, groups = 17, cols = width * groups;
  const std::vector<float> hard = hard_weights(rows * groups, width, format, dtype == Dtype::f16 ? 8.0 : 20.0);
  Numbers w(rows * cols, dtype);
  for (int64_t i = 0; i < w.count(); ++i) w.set(i, static_cast<double>(hard[static_cast<size_t>(i)]));
  for (int64_t i = 3 * width; i < 4 * width; ++i) w.set(i, 0.0);
  const auto run = [&](Isa isa, bool stream, std::vector<uint8_t>& codes, std::vector<uint32_t>& scales) {
    // 64 bytes more, to begin at a cache line
    codes.assign(static_cast<size_t>(rows * cols + 64), 0x55);
    scales.assign(static_cast<size_t>(rows * groups), 0u);
    musubi::QuantizeTask task;
    task.w = {w.data(), rows, cols, cols, dtype};
    task.width = width;
    task.format = format;
    task.scale_dtype = scale_dtype;
    task.codes = codes.data() + 64 - reinterpret_cast<uintptr_t>(codes.data()) % 64;
    task.scales = scales.data();
    task.pages.stream = stream;
    musubi::quantize_kernel(isa)(task);
    codes.erase(codes.begin(), codes.begin() + (task.codes - codes.data()));
    codes.resize(static_cast<size_t>(rows * cols));
  };
  std::vector<uint8_t> want, codes;
  std::vector<uint32_t> want_scales, scales;
  run(Isa::scalar, false, want, want_scales);
  on_every_isa([&](Isa isa) {
    for (bool stream : {false, true}) {
      run(isa, stream, codes, scales);
      EXPECT(codes == want && scales == want_scales, "%s: groups of %d differ from the plain body", name_of(isa),
             static_cast<int>(width));
    }
  });
}

// Every code under scales of all kinds, also those whose products are no normal numbers: the plain body's bytes.
void bodies_dequantise_alike(Format format, Dtype scale_dtype, Dtype dtype, int64_t block) {
  const int64_t rows = 3, cols = 11 * block + (block > 64 ? 13 : 0), blocks = (cols + block - 1) / block;
  Random random(static_cast<uint64_t>(block));
  std::vector<uint8_t> codes(static_cast<size_t>(rows * cols));
  for (size_t i = 0; i < codes.size(); ++i) {
    // long runs without the codes that are not finite, and every code
    codes[i] = static_cast<uint8_t>(i / 256 % 2 == 0 ? i : static_cast<uint64_t>((random.number() + 1.0) * 60.0));
  }
  Numbers scales(rows * blocks, scale_dtype);
  const double kinds[] = {1.0, -0.37, 1e-30, 0.0, 3e-39, 7e30, 0.013, NAN, 1e-8, 431.0, INFINITY};
  for (int64_t i = 0; i < scales.count(); ++i) scales.set(i, kinds[i % 11] * (1.0 + 0.3 * random.number()));
  const int64_t size = size_of(dtype);
  const auto run = [&](Isa isa, bool stream, std::vector<uint8_t>& out) {
    out.assign(static_cast<size_t>(rows * cols * size + 64), 0x55);
    musubi::DequantizeTask task;
    task.w = {codes.data(), rows, cols, cols, scales.data(), blocks, 1, block, scale_dtype, format};
    char* const to = reinterpret_cast<char*>(out.data()) + 64 - reinterpret_cast<uintptr_t>(out.data()) % 64;
    task.out = to;
    task.out_dtype = dtype;
    task.pages.stream = stream;
    musubi::dequantize_kernel(isa)(task);
    out.erase(out.begin(), out.begin() + (to - reinterpret_cast<char*>(out.data())));
    out.resize(static_cast<size_t>(rows * cols * size));
  };
  // numbers that are none are alike whatever their bits
  const auto same = [&](const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
    for (size_t i = 0; i < a.size(); i += static_cast<size_t>(size)) {
      if (std::memcmp(&a[i], &b[i], static_cast<size_t>(size)) == 0) continue;
      if (!is_nan(&a[i], dtype) || !is_nan(&b[i], dtype)) return false;
    }
    return true;
  };
  std::vector<uint8_t> want, out;
  run(Isa::scalar, false, want);
  on_every_isa([&](Isa isa) {
    for (bool stream : {false, true}) {
      run(isa, stream, out);
      EXPECT(same(out, want), "%s: blocks of %d differ from the plain body", name_of(isa), static_cast<int>(block));
    }
  });
}

// Rows that begin and end anywhere within a line, in several chunks, streamed by several threads: the plain body's
// bytes, and none before or after them.
void long_rows_meet(Format format, Dtype dtype, int64_t cols, int64_t offset) {
  const int64_t rows = 2 * 64 * 1024 / cols + 7, count = rows * cols, guard = 128;
  Random random(static_cast<uint64_t>(cols + offset));
  Numbers w(count, dtype);
  for (int64_t i = 0; i < count; ++i) w.set(i, random.number());
  for (int64_t i = cols; i < 2 * cols; ++i) w.set(i, i == cols ? 1.0 : 1e-4 * random.number());  // codes that are rare
  std::vector<uint8_t> want, out;
  std::vector<float> scales(static_cast<size_t>(rows));
  const auto run = [&](Isa isa, bool stream, bool back, std::vector<uint8_t>& bytes) {
    const std::vector<uint8_t> codes = want;  // of the plain body, for the way back
    bytes.assign(static_cast<size_t>(2 * count + 2 * guard + 64), 0x55);
    uint8_t* const line = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
    uint8_t* const to = line + guard + offset;
    if (back) {
      musubi::DequantizeTask task;
      task.w = {codes.data(), rows, cols, cols, scales.data(), 1, 0, cols, Dtype::f32, format};
      task.out = to;
      task.out_dtype = Dtype::bf16;
      task.pages.stream = stream;
      task.threads = 2;
      musubi::dequantize_kernel(isa)(task);
    } else {
      musubi::QuantizeTask task;
      task.w = {w.data(), rows, cols, cols, dtype};
      task.width = cols;
      task.format = format;
      task.scale_dtype = dtype;
      std::vector<float> found(static_cast<size_t>(rows));
      task.codes = to;
      task.scales = found.data();
      task.pages.stream = stream;
      task.threads = 2;
      musubi::quantize_kernel(isa)(task);
    }
    const auto end = to + count * (back ? 2 : 1);
    const bool kept = std::all_of(bytes.data(), to, [](uint8_t byte) { return byte == 0x55; }) &&
                      std::all_of(end, bytes.data() + bytes.size(), [](uint8_t byte) { return byte == 0x55; });
    EXPECT(kept, "%s: rows of %d, %d bytes into a line: bytes around them are written", name_of(isa),
           static_cast<int>(cols), static_cast<int>(offset));
    bytes = std::vector<uint8_t>(to, end);
  };
  for (auto& scale : scales) scale = static_cast<float>(0.5 + 0.4 * random.number());
  run(Isa::scalar, false, false, want);
  std::vector<uint8_t> want_back;
  if (offset % 2 == 0) run(Isa::scalar, false, true, want_back);
  on_every_isa([&](Isa isa) {
    for (bool stream : {false, true}) {
      run(isa, stream, false, out);
      EXPECT(out == want, "%s: codes in rows of %d, %d bytes into a line", name_of(isa), static_cast<int>(cols),
             static_cast<int>(offset));
      if (offset % 2 != 0) continue;
      run(isa, stream, true, out);
      EXPECT(out == want_back, "%s: weights in rows of %d, %d bytes into a line", name_of(isa), static_cast<int>(cols),
             static_cast<int>(offset));
    }
  });
}

void zeros_stay_zero() {
  on_every_isa([&](Isa isa) {
    std::vector<uint16_t> w(70, 0);
    std::vector<uint8_t> codes(70, 0x55);
    uint16_t scale = 0x1234;
    musubi::QuantizeTask task;
    task.w = {w.data(), 1, 70, 70, Dtype::f16};
    task.width = 70;
    task.scale_dtype = Dtype::f16;
    task.codes = codes.data();
    task.scales = &scale;
    musubi::quantize_kernel(isa)(task);
    EXPECT(scale == 0, "%s: an all-zero half group has scale %d", name_of(isa), scale);
    EXPECT(std::count(codes.begin(), codes.end(), 0) == 70, "%s: codes of zeros are zero", name_of(isa));
  });
}

// The error left by a search is that of the best of the scales that a plain loop tries.
void search_is_least(Format format, int64_t width, Dtype dtype) {
  const int64_t groups = 6;
  Random random(static_cast<uint64_t>(width));
  Numbers w(groups * width, dtype);
  for (int64_t i = 0; i < w.count(); ++i) w.set(i, random.number() * (i % 50 == 3 ? 20.0 : 1.0));
  const double largest = format == Format::e4m3 ? 448.0 : 57344.0;
  const auto left = [&](int64_t group, float scale) {
    double sum = 0.0;
    for (int64_t i = group * width; i < (group + 1) * width; ++i) {
      const double back = value_of(nearest(w.get(i) / static_cast<double>(scale), format), format);
      sum += std::pow(back * static_cast<double>(scale) - w.get(i), 2.0);
    }
    return sum;
  };
  on_every_isa([&](Isa isa) {
    std::vector<uint8_t> codes(static_cast<size_t>(w.count()));
    std::vector<float> scales(static_cast<size_t>(groups));
    musubi::QuantizeTask task;
    task.w = {w.data(), groups, width, width, dtype};
    task.width = width;
    task.format = format;
    task.search = true;
    task.codes = codes.data();
    task.scales = scales.data();
    musubi::quantize_kernel(isa)(task);
    for (int64_t g = 0; g < groups; ++g) {
      double peak = 0.0, best = 1e30;
      for (int64_t i = g * width; i < (g + 1) * width; ++i) peak = std::max(peak, std::fabs(w.get(i)));
      for (double code : {448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0}) {
        best = std::min(best, left(g, static_cast<float>(peak / largest * (448.0 / code))));
      }
      for (int f = -1; f < 24; ++f) {
        best = std::min(best, left(g, static_cast<float>(peak / largest * std::exp2(f / 24.0))));
      }
      const double ours = left(g, scales[static_cast<size_t>(g)]);
      EXPECT(ours <= best * 1.0001, "%s: a group of %d keeps %g, a scale leaves %g", name_of(isa),
             static_cast<int>(width), ours, best);
    }
  });
}

}  // namespace

void test_quantize() {
  for (Format format : {Format::e4m3, Format::e5m2}) {
    all_codes_decode(format);
    codes_are_nearest(format, 3, 192, 64);
    codes_are_nearest(format, 5, 37, 37);
    codes_are_nearest(format, 1, 70000, 70000);
    codes_are_nearest(format, 2, 1200, 600);
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (int64_t width : {64, 37, 200}) search_is_least(format, width, dtype);
    }
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (int64_t cols : {256, 391, 1999, 2001}) {
        for (int64_t offset : {0, 1, 22, 62}) long_rows_meet(format, dtype, cols, offset);
      }
      for (Dtype scale_dtype : {Dtype::f32, dtype}) {
        for (int64_t width : {32, 37, 64, 96, 256, 391}) {
          bodies_quantise_alike(format, dtype, scale_dtype, width);
          for (Dtype out : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
            bodies_dequantise_alike(format, scale_dtype, out, width);
          }
        }
      }
    }
  }
  zeros_stay_zero();
}

}  // namespace musubi_test
