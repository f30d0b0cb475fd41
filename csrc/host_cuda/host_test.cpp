// The CUDA kernels on the CPU against sums in double.
//
//   host_cuda_tests run ORDER SEED late|now   every case under one schedule
//   host_cuda_tests fault NAME                succeeds where a seeded fault is caught
//   host_cuda_tests kernels                   every case once, then the symbols of the kernels that ran
#include <cstdlib>
#include <functional>
#include <string>

#include "host_cuda/run.h"
#include "ops/fp8_linear/fp8_linear_gpu.h"
#include "ops/fp8_quantize/fp8_quantize_gpu.h"
#include "testing.h"

namespace {

using musubi::Dtype;
using musubi::Format;
using musubi_test::Numbers;
using musubi_test::Random;
namespace host = musubi::host;

constexpr double kTolerance = 5e-3;  // of the largest output

// Bytes of exactly the size asked for, at an address that is a multiple of 16, or `shift` beyond one.
class Bytes {
 public:
  explicit Bytes(int64_t count, int64_t shift = 0) : shift_(shift), held_(static_cast<size_t>(count + shift)) {}
  uint8_t* data() { return held_.data() + shift_; }
  uint8_t& operator[](int64_t i) { return held_[static_cast<size_t>(i + shift_)]; }

 private:
  int64_t shift_;
  std::vector<uint8_t> held_;
};

struct LinearCase {
  const char* name;
  int64_t m, n, k, block;  // block 0: one scale per row, -1: one scale
  bool transposed = false;
  Dtype dtype = Dtype::bf16;
  Format format = Format::e4m3;
  Dtype scale_dtype = Dtype::bf16;
  int64_t rank = 0;
  Dtype tail_dtype = Dtype::f32;
  int64_t x_gap = 0;  // elements between the rows of x
  int64_t w_gap = 0;  // codes between the rows of W
  int64_t w_shift = 0;
  bool broken = false;  // a weight is NaN: so are the outputs that it meets, and no others
};

// Sizes are odd where that is allowed; each kernel is met by at least one (test_cuda_host.py compares the symbols).
const LinearCase kLinear[] = {
    {"one row", 1, 40, 320, 64},
    {"eight rows, fp16", 8, 21, 128, 128, false, Dtype::f16},
    {"three rows, channel scales", 3, 33, 704, 0},
    {"three rows, odd K", 3, 33, 203, 0},
    {"four rows, blocks of 192", 4, 33, 1152, 192},
    {"sixteen rows, tensor scale", 16, 17, 1088, -1, false, Dtype::bf16, Format::e4m3, Dtype::f32},
    {"eleven rows, e5m2", 11, 19, 192, 64, false, Dtype::bf16, Format::e5m2},
    {"two rows, fp16, e5m2", 2, 18, 192, 64, false, Dtype::f16, Format::e5m2, Dtype::f16},
    {"five rows, e5m2", 5, 18, 192, 0, false, Dtype::bf16, Format::e5m2},
    {"twelve rows, fp16", 12, 33, 256, 256, false, Dtype::f16},
    {"ten rows, fp16, e5m2", 10, 16, 64, 64, false, Dtype::f16, Format::e5m2},
    {"thirty rows", 30, 35, 384, 64},
    {"thirty-two rows, fp16", 32, 20, 192, 192, false, Dtype::f16, Format::e4m3, Dtype::f32},
    {"twenty rows, e5m2", 20, 20, 128, 64, false, Dtype::bf16, Format::e5m2},
    {"twenty-one rows, fp16, e5m2", 21, 20, 128, 0, false, Dtype::f16, Format::e5m2},
    {"strided x and W", 7, 30, 192, 64, false, Dtype::bf16, Format::e4m3, Dtype::bf16, 0, Dtype::f32, 24, 64},
    {"unaligned x and W", 7, 30, 192, 64, false, Dtype::bf16, Format::e4m3, Dtype::bf16, 0, Dtype::f32, 3, 5, 1},
    {"tile, bf16", 45, 139, 320, 64},
    {"tile, blocks of 32, rank 5", 37, 133, 352, 32, false, Dtype::bf16, Format::e4m3, Dtype::f32, 5},
    {"tile, blocks of 96, fp16", 50, 129, 288, 96, false, Dtype::f16, Format::e4m3, Dtype::f16},
    {"tile, channel scales, odd K", 33, 60, 205, 0, false, Dtype::f16, Format::e4m3, Dtype::f32, 16, Dtype::f16},
    {"tile, tensor scale, e5m2", 40, 140, 224, -1, false, Dtype::bf16, Format::e5m2},
    {"tile, fp16, e5m2", 40, 140, 256, 128, false, Dtype::f16, Format::e5m2},
    {"tall tile, rank 70", 131, 141, 448, 64, false, Dtype::bf16, Format::e4m3, Dtype::bf16, 70, Dtype::bf16},
    {"tall tile, fp16", 70, 130, 192, 64, false, Dtype::f16, Format::e4m3, Dtype::f32, 17},
    {"tile, unaligned", 34, 50, 160, 32, false, Dtype::bf16, Format::e4m3, Dtype::bf16, 3, Dtype::f32, 1, 3, 7},
    {"small, a NaN", 3, 20, 128, 64, false, Dtype::bf16, Format::e4m3, Dtype::bf16, 0, Dtype::f32, 0, 0, 0, true},
    {"tile, a NaN", 40, 20, 128, 64, false, Dtype::bf16, Format::e4m3, Dtype::bf16, 0, Dtype::f32, 0, 0, 0, true},
    {"gradient, a NaN", 9, 64, 64, 64, true, Dtype::bf16, Format::e4m3, Dtype::bf16, 0, Dtype::f32, 0, 0, 0, true},
    {"gradient, bf16", 45, 331, 192, 64, true},
    {"gradient, one row", 1, 130, 256, 64, true},
    {"gradient, blocks of 32, rank 5", 37, 133, 160, 32, true, Dtype::bf16, Format::e4m3, Dtype::f32, 5},
    {"gradient, channel scales, odd K", 33, 205, 59, 0, true, Dtype::f16, Format::e4m3, Dtype::f32, 16, Dtype::f16},
    {"gradient, tensor scale, e5m2", 40, 140, 224, -1, true, Dtype::bf16, Format::e5m2},
    {"gradient, fp16, e5m2", 40, 140, 256, 128, true, Dtype::f16, Format::e5m2},
    {"tall gradient, rank 70", 131, 448, 192, 64, true, Dtype::bf16, Format::e4m3, Dtype::bf16, 70, Dtype::bf16},
    {"tall gradient, fp16", 70, 130, 192, 64, true, Dtype::f16, Format::e4m3, Dtype::f32, 17},
    {"gradient, unaligned", 34, 150, 160, 32, true, Dtype::bf16, Format::e4m3, Dtype::bf16, 3, Dtype::f32, 1, 3, 7},
};

// What both the kernel and the sums in double are made from.
struct Layer {
  explicit Layer(const LinearCase& c)
      : contraction(c.transposed ? c.n : c.k),
        outputs(c.transposed ? c.k : c.n),
        x_stride(contraction + c.x_gap),
        w_stride(c.k + c.w_gap),
        block(c.block > 0 ? c.block : c.k),
        scale_row(c.block > 0    ? c.k / c.block
                  : c.block == 0 ? 1
                                 : 0),
        x(c.m * x_stride - c.x_gap, c.dtype),
        codes(c.n * w_stride - c.w_gap, c.w_shift),
        scales(c.block >= 0 ? c.n * scale_row : 1, c.scale_dtype),
        bias(outputs, Dtype::f32),
        low(c.m * c.rank, c.dtype),
        tail(c.rank * outputs, c.tail_dtype),
        out(c.m * outputs, c.dtype) {
    Random random(static_cast<uint64_t>(c.m * 7 + c.n * 3 + c.k));
    x.fill(random, 1.0);
    bias.fill(random, 0.1);
    low.fill(random, 1.0);
    tail.fill(random, 1.0);
    for (int64_t i = 0; i < c.n * w_stride - c.w_gap; ++i) {
      codes[i] = static_cast<uint8_t>(random.bits());
      if (!std::isfinite(musubi_test::value_of(codes[i], c.format))) codes[i] = 0x11;
      if (c.format == Format::e5m2 && (codes[i] & 0x60) == 0x60) codes[i] &= 0xdf;  // below 512, as in e4m3
    }
    if (c.broken) codes[3 * w_stride + 9] = 0xff;
    for (int64_t i = 0; i < scales.count(); ++i) scales.set(i, 0.002 + 0.001 * random.number());
    for (int64_t i = 0; i < out.count(); ++i) out.set(i, NAN);
  }

  int64_t contraction, outputs, x_stride, w_stride, block, scale_row;
  Numbers x;
  Bytes codes;
  Numbers scales, bias, low, tail, out;
};

musubi::LinearTask task_of(const LinearCase& c, Layer& layer) {
  musubi::LinearTask task;
  task.x = {layer.x.data(), c.m, layer.contraction, layer.x_stride, c.dtype};
  task.transposed = c.transposed;
  task.w.codes = layer.codes.data();
  task.w.rows = c.n, task.w.cols = c.k, task.w.stride = layer.w_stride;
  task.w.scale = layer.scales.data(), task.w.scale_dtype = c.scale_dtype;
  task.w.scale_row = layer.scale_row, task.w.scale_block = c.block >= 0 ? 1 : 0;
  task.w.block = layer.block, task.w.format = c.format;
  task.bias = {layer.bias.data(), 1, layer.outputs, 0, Dtype::f32};
  if (c.rank > 0) {
    task.low = {layer.low.data(), c.m, c.rank, c.rank, c.dtype};
    task.tail = {layer.tail.data(), c.transposed ? c.rank : c.n, c.transposed ? c.k : c.rank,
                 c.transposed ? c.k : c.rank, c.tail_dtype};
    task.strength = 0.5f;
  }
  task.out = layer.out.data();
  task.out_dtype = c.dtype;
  return task;
}

std::vector<double> exact_of(const LinearCase& c, Layer& layer) {
  std::vector<double> w(static_cast<size_t>(c.n * c.k));
  for (int64_t n = 0; n < c.n; ++n) {
    for (int64_t k = 0; k < c.k; ++k) {
      const int64_t s = n * layer.scale_row + (c.block > 0 ? k / c.block : 0);
      w[static_cast<size_t>(n * c.k + k)] =
          musubi_test::value_of(layer.codes[n * layer.w_stride + k], c.format) * layer.scales.get(s);
    }
  }
  std::vector<double> exact;
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t o = 0; o < layer.outputs; ++o) {
      double sum = layer.bias.get(o);
      for (int64_t i = 0; i < layer.contraction; ++i) {
        sum += layer.x.get(m * layer.x_stride + i) * w[static_cast<size_t>(c.transposed ? i * c.k + o : o * c.k + i)];
      }
      for (int64_t r = 0; r < c.rank; ++r) {
        const int64_t at = c.transposed ? r * c.k + o : o * c.rank + r;
        sum += 0.5 * layer.low.get(m * c.rank + r) * layer.tail.get(at);
      }
      exact.push_back(sum);
    }
  }
  return exact;
}

void check_linear(const LinearCase& c, bool small) {
  Layer layer(c);
  const musubi::LinearTask task = task_of(c, layer);
  const int error = small ? musubi::gpu::linear_small(task, 0) : musubi::gpu::linear_tile(task, 0);
  const std::string wrong = host::take_error();
  EXPECT(error == 0 && wrong.empty(), "%s (%s): %s", c.name, small ? "small" : "tile", wrong.c_str());
  const std::vector<double> exact = exact_of(c, layer);
  double largest = 0.0, worst = 0.0, bias_only = 0.0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i);
    if (std::isnan(exact[i])) {
      EXPECT(std::isnan(layer.out.get(at)), "%s: a NaN was lost", c.name);
      continue;
    }
    const double off = std::fabs(layer.out.get(at) - exact[i]);
    worst = off > worst || std::isnan(off) ? off : worst;
    if (std::isnan(worst)) break;
    largest = std::fmax(largest, std::fabs(exact[i]));
    bias_only = std::fmax(bias_only, std::fabs(layer.bias.get(at % layer.outputs) - exact[i]));
  }
  EXPECT(worst <= kTolerance * largest, "%s (%s): %g of %g", c.name, small ? "small" : "tile", worst, largest);
  EXPECT(std::isnan(worst) || bias_only >= 0.5 * largest, "%s proves nothing: the bias alone is off by %g of %g",
         c.name, bias_only, largest);
}

void check_all_linear() {
  for (const LinearCase& c : kLinear) {
    Layer layer(c);
    const musubi::LinearTask task = task_of(c, layer);
    EXPECT(musubi::gpu::tile_serves(task), "%s", c.name);
    const bool small = musubi::gpu::small_serves(task);
    if (small) check_linear(c, true);
    if (!small || c.m > 8) check_linear(c, false);
    if (musubi_test::failures > 0 && host::settings().fault != host::Fault::none) return;  // caught
  }
}

// ---- quantise and dequantise, bit for bit ---------------------------------------------------------------------------

struct QuantizeCase {
  int64_t rows, cols, width;
  Dtype dtype;
  Format format;
  Dtype scale_dtype;
  int64_t gap = 0;
};

const QuantizeCase kQuantize[] = {
    {5, 256, 64, Dtype::bf16, Format::e4m3, Dtype::bf16},      {3, 480, 96, Dtype::f32, Format::e4m3, Dtype::f32},
    {4, 320, 64, Dtype::f16, Format::e5m2, Dtype::f32, 8},     {7, 70, 70, Dtype::bf16, Format::e4m3, Dtype::f32},
    {3, 1000, 1000, Dtype::f16, Format::e5m2, Dtype::bf16},    {2, 603, 201, Dtype::f32, Format::e4m3, Dtype::f16},
    {1, 5001, 5001, Dtype::bf16, Format::e4m3, Dtype::f32},    {1, 4096, 4096, Dtype::f32, Format::e5m2, Dtype::bf16},
    {40, 128, 128, Dtype::bf16, Format::e4m3, Dtype::bf16, 3},
};

double largest_of(Format format) { return format == Format::e4m3 ? 448.0 : 57344.0; }

float rounded_to(float value, Dtype dtype) {
  if (dtype == Dtype::f32) return value;
  if (dtype == Dtype::bf16) return static_cast<float>(musubi_test::bf16_value(musubi_test::bf16_bits(value)));
  double best = 0.0;  // the nearest float16, ties to even: searched, so that nothing is shared with the kernels
  const uint16_t below = musubi_test::half_bits(value);
  const double low = musubi_test::half_value(below), high = musubi_test::half_value(static_cast<uint16_t>(below + 1));
  const double to_low = value - low, to_high = high - value;
  best = to_low < to_high || (to_low == to_high && below % 2 == 0) ? low : high;
  return static_cast<float>(best);
}

// The code nearest to `value`, ties to an even code; what lies beyond the largest becomes the largest.
uint8_t nearest_code(float value, Format format) {
  const double size = std::fmin(std::fabs(static_cast<double>(value)), largest_of(format));
  int best = 0;
  double least = INFINITY;
  for (int code = 0; code < 0x80; ++code) {
    const double off = std::fabs(musubi_test::value_of(static_cast<uint8_t>(code), format) - size);
    if (off < least || (off == least && code % 2 == 0)) least = off, best = code;
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

void check_quantize(const QuantizeCase& c) {
  const int64_t stride = c.cols + c.gap, groups = c.rows * c.cols / c.width;
  Numbers w(c.rows * stride - c.gap, c.dtype), scales(groups, c.scale_dtype);
  Bytes codes(c.rows * c.cols);
  Random random(static_cast<uint64_t>(c.rows + c.cols));
  w.fill(random, 0.3);
  for (int64_t i = 0; c.rows > 1 && i < c.width; ++i) w.set(stride + i, 0.0);  // one group of zeros
  uint32_t peak = 0;
  musubi::QuantizeTask task;
  task.w = {w.data(), c.rows, c.cols, stride, c.dtype};
  task.width = c.width, task.format = c.format, task.scale_dtype = c.scale_dtype;
  task.codes = codes.data(), task.scales = scales.data();
  const int error = musubi::gpu::quantize(task, &peak, 0);
  const std::string wrong = host::take_error();
  EXPECT(error == 0 && wrong.empty(), "quantise: %s", wrong.c_str());
  int64_t off = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t row = g / (c.cols / c.width), start = g % (c.cols / c.width) * c.width;
    float largest = 0.0f;
    for (int64_t i = 0; i < c.width; ++i) {
      largest = std::fmax(largest, std::fabs(static_cast<float>(w.get(row * stride + start + i))));
    }
    const float smallest = rounded_to(1e-8f, c.scale_dtype);
    const float scale =
        std::fmax(rounded_to(largest / static_cast<float>(largest_of(c.format)), c.scale_dtype), smallest);
    off += static_cast<float>(scales.get(g)) != scale;
    for (int64_t i = 0; i < c.width; ++i) {
      const float value = static_cast<float>(w.get(row * stride + start + i));
      const uint8_t code = scale == 0.0f ? 0 : nearest_code(value / scale, c.format);
      off += codes[row * c.cols + start + i] != code;
    }
  }
  EXPECT(off == 0, "quantise %ld x %ld by %ld: %ld codes or scales differ", static_cast<long>(c.rows),
         static_cast<long>(c.cols), static_cast<long>(c.width), static_cast<long>(off));
}

// All 256 codes in slices of a wider matrix, to each dtype; `cols` and `shift` decide between the two kernels.
void check_dequantize(Format format, Dtype scale_dtype, Dtype out_dtype, int64_t cols, int64_t block, int64_t shift) {
  const int64_t rows = 1024 / cols + 3, stride = cols + 32;
  Bytes codes(rows * stride, shift);
  for (int64_t i = 0; i < rows * stride; ++i) codes[i] = static_cast<uint8_t>(i * 7 + i / 256);
  const int64_t blocks = cols / block;
  Numbers scales(rows * blocks, scale_dtype), out(rows * cols, out_dtype);
  Random random(3);
  for (int64_t i = 0; i < scales.count(); ++i) scales.set(i, 0.01 + 0.005 * random.number());
  musubi::DequantizeTask task;
  task.w.codes = codes.data(), task.w.rows = rows, task.w.cols = cols, task.w.stride = stride;
  task.w.scale = scales.data(), task.w.scale_row = blocks, task.w.scale_block = 1, task.w.block = block;
  task.w.scale_dtype = scale_dtype, task.w.format = format;
  task.out = out.data(), task.out_dtype = out_dtype;
  EXPECT(musubi::gpu::dequantize(task, 0) == 0, "dequantise");
  int64_t off = 0, nans = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < cols; ++k) {
      const double value = musubi_test::value_of(codes[r * stride + k], format);
      const float product = static_cast<float>(value) * static_cast<float>(scales.get(r * blocks + k / block));
      const double got = out.get(r * cols + k);
      if (std::isnan(product)) {
        // the test's own float16 reads NaN as a number above the largest
        off += !(std::isnan(got) || (out_dtype == Dtype::f16 && std::fabs(got) > 65536.0));
        ++nans;
      } else if (std::isinf(product)) {
        off += !(std::isinf(got) || (out_dtype == Dtype::f16 && std::fabs(got) == 65536.0));
      } else if (out_dtype == Dtype::f16) {
        off +=
            std::fabs(got) != rounded_to(std::fabs(product), out_dtype) || std::signbit(got) != std::signbit(product);
      } else {
        off += got != rounded_to(product, out_dtype);
      }
    }
  }
  EXPECT(off == 0 && nans > 0, "dequantise %ld columns: %ld values differ", static_cast<long>(cols),
         static_cast<long>(off));
}

void check_conversions() {
  for (const QuantizeCase& c : kQuantize) check_quantize(c);
  for (const Format format : {Format::e4m3, Format::e5m2}) {
    for (const Dtype out : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      check_dequantize(format, Dtype::bf16, out, 128, 64, 0);
      check_dequantize(format, Dtype::f32, out, 96, 32, 0);
      check_dequantize(format, Dtype::f32, out, 120, 24, 3);
    }
  }
}

// ---- the program ----------------------------------------------------------------------------------------------------

struct Named {
  const char* name;
  host::Fault fault;
};
const Named kFaults[] = {
    {"small_without_barrier", host::Fault::small_without_barrier},
    {"small_short_buffer", host::Fault::small_short_buffer},
    {"tile_without_barrier", host::Fault::tile_without_barrier},
    {"tile_without_wait", host::Fault::tile_without_wait},
    {"tile_short_buffer", host::Fault::tile_short_buffer},
    {"tile_swapped_fragment", host::Fault::tile_swapped_fragment},
    {"gradient_swapped_bytes", host::Fault::gradient_swapped_bytes},
    {"tile_stored_too_soon", host::Fault::tile_stored_too_soon},
};

host::Order order_named(const std::string& name) {
  if (name == "reverse") return host::Order::reverse;
  if (name == "shuffled") return host::Order::shuffled;
  return name == "eager" ? host::Order::eager : host::Order::forward;
}

int run_all() {
  check_all_linear();
  check_conversions();
  if (musubi_test::failures == 0) std::printf("all host runs passed\n");
  return musubi_test::failures == 0 ? 0 : 1;
}

// Every schedule in turn, until one shows the fault. A sanitizer may end the program first, which is also caught.
int run_fault(const std::string& name) {
  for (const Named& known : kFaults) {
    if (name != known.name) continue;
    host::settings().fault = known.fault;
    for (const auto order : {host::Order::forward, host::Order::reverse, host::Order::shuffled, host::Order::eager}) {
      for (const bool late : {true, false}) {
        host::settings().order = order;
        host::settings().copies_arrive_late = late;
        host::settings().seed = 1;
        check_all_linear();
        if (musubi_test::failures > 0) return 0;
      }
    }
    std::fprintf(stderr, "no schedule shows the fault %s\n", name.c_str());
    return 1;
  }
  std::fprintf(stderr, "no such fault: %s\n", name.c_str());
  return 2;
}

}  // namespace

int main(int count, char** words) {
  const std::string mode = count > 1 ? words[1] : "";
  if (mode == "fault" && count == 3) return run_fault(words[2]);
  if (mode == "run" && count == 5) {
    host::settings().order = order_named(words[2]);
    host::settings().seed = static_cast<uint64_t>(std::atoi(words[3]));
    host::settings().copies_arrive_late = std::string(words[4]) == "late";
    return run_all();
  }
  if (mode == "kernels" && count == 2) {
    const int failed = run_all();
    for (const std::string& kernel : host::kernels_run()) std::printf("%s\n", kernel.c_str());
    return failed;
  }
  std::fprintf(stderr, "usage: host_cuda_tests run ORDER SEED late|now | fault NAME | kernels\n");
  return 2;
}
