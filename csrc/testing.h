// The few things that the C++ tests share: a failure counter, a small generator, and the formats in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/types.h"

namespace musubi_test {

inline int failures = 0;

#define EXPECT(condition, ...)                              \
  do {                                                      \
    if (!(condition)) {                                     \
      ++musubi_test::failures;                              \
      std::fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);  \
      std::fprintf(stderr, __VA_ARGS__);                    \
      std::fprintf(stderr, " [expected %s]\n", #condition); \
    }                                                       \
  } while (false)

// Uniform in (-1, 1) from a linear congruential sequence: the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state_ >> 33);
  }
  double number() { return static_cast<double>(bits()) / 1073741824.0 - 1.0; }

 private:
  uint64_t state_;
};

// The value of an FP8 code from the formats' definition: sign, exponent, mantissa.
inline double value_of(uint8_t code, musubi::Format format) {
  const int mantissa_bits = format == musubi::Format::e4m3 ? 3 : 2;
  const int bias = format == musubi::Format::e4m3 ? 7 : 15;
  const int mantissa = code & ((1 << mantissa_bits) - 1);
  const int exponent = (code & 0x7f) >> mantissa_bits;
  const double sign = (code & 0x80) != 0 ? -1.0 : 1.0;
  if (format == musubi::Format::e4m3 && (code & 0x7f) == 0x7f) return NAN;
  if (format == musubi::Format::e5m2 && exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  const double part = mantissa / std::pow(2.0, mantissa_bits);
  return exponent == 0 ? sign * std::ldexp(part, 1 - bias) : sign * std::ldexp(1.0 + part, exponent - bias);
}

// A number held in one of the dtypes, and what it is after rounding.
inline double bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t bf16_bits(double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline double half_value(uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// A half near `value`: the nearest below in magnitude is enough for inputs of tests.
inline uint16_t half_bits(double value) {
  const uint16_t sign = value < 0 ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (!(size < 65536.0)) return static_cast<uint16_t>(sign | (size != size ? 0x7e00 : 0x7c00));
  if (size < std::ldexp(1.0, -14)) return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(size, 24)));
  int exponent;
  const double part = std::frexp(size, &exponent);  // [0.5, 1)
  const int mantissa = static_cast<int>(std::ldexp(part, 11)) - 1024;
  return static_cast<uint16_t>(sign | ((exponent + 14) << 10) | mantissa);
}

// A buffer of numbers in any dtype, of exactly the size asked for, so that a sanitizer sees a step beyond it.
class Numbers {
 public:
  Numbers(int64_t count, musubi::Dtype dtype) : dtype_(dtype), bytes_(static_cast<size_t>(count * size_of(dtype))) {}

  void set(int64_t i, double value) {
    if (dtype_ == musubi::Dtype::f32) {
      const float single = static_cast<float>(value);
      std::memcpy(bytes_.data() + i * 4, &single, 4);
      return;
    }
    const uint16_t half = dtype_ == musubi::Dtype::bf16 ? bf16_bits(value) : half_bits(value);
    std::memcpy(bytes_.data() + i * 2, &half, 2);
  }

  double get(int64_t i) const {
    if (dtype_ == musubi::Dtype::f32) {
      float single;
      std::memcpy(&single, bytes_.data() + i * 4, 4);
      return single;
    }
    uint16_t half;
    std::memcpy(&half, bytes_.data() + i * 2, 2);
    return dtype_ == musubi::Dtype::bf16 ? bf16_value(half) : half_value(half);
  }

  void fill(Random& random, double size) {
    for (int64_t i = 0; i < count(); ++i) set(i, size * random.number());
  }

  int64_t count() const { return static_cast<int64_t>(bytes_.size()) / size_of(dtype_); }
  musubi::Dtype dtype() const { return dtype_; }
  char* data() { return bytes_.data(); }

 private:
  musubi::Dtype dtype_;
  std::vector<char> bytes_;
};

void test_linear();
void test_linear_dynamic();
void test_quantize();
void test_pages();
void test_pool();

}  // namespace musubi_test
