// The two formats in numbers, and codes from floats by plain loops that every compiler turns into vectors.
#pragma once

#include <cstring>

#include "common/types.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

constexpr float kSmallestScale = 1e-8f;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Numbers that define a format: the bits of its largest value as a float, the mantissa bits a float has too many, the
// exponent offset in codes, the smallest normal, and the float whose last place is the format's smallest step.
template <Format kFormat>
struct Numbers;
template <>
struct Numbers<Format::e4m3> {
  static constexpr uint32_t largest = 0x43e00000, shift = 20, offset = 120u << 3, normal = 0x3c800000;
  static constexpr uint32_t step = 0x46800000;
  static constexpr float largest_value = 448.0f, step_value = 16384.0f;
  static constexpr int largest_code = 0x7e;
  // with a power of two as a float, code = (power >> shift) + steps in it + code_offset, as a byte
  static constexpr int8_t code_offset = 56;
};
template <>
struct Numbers<Format::e5m2> {
  static constexpr uint32_t largest = 0x47600000, shift = 21, offset = 112u << 2, normal = 0x38800000;
  static constexpr uint32_t step = 0x43000000;
  static constexpr float largest_value = 57344.0f, step_value = 128.0f;
  static constexpr int largest_code = 0x7b;
  static constexpr int8_t code_offset = 60;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// codes = saturating cast of values / scale, ties to even.
template <Format kFormat>
void encode(const float* values, int64_t count, float scale, uint8_t* codes) {
  using N = Numbers<kFormat>;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(values[i] / scale);
    const uint32_t all = bits & 0x7fffffffu;
    const uint32_t a = all < N::largest ? all : N::largest;
    const uint32_t rounded = ((a + ((1u << (N::shift - 1)) - 1) + ((a >> N::shift) & 1u)) >> N::shift) - N::offset;
    const uint32_t counted = bits_of(float_of(a) + N::step_value) - N::step;
    codes[i] = static_cast<uint8_t>((a < N::normal ? counted : rounded) | ((bits >> 24) & 0x80u));
  }
}

inline void floats_from(const void* from, Dtype dtype, int64_t start, int64_t count, float* out) {
  int64_t i = 0;
  const char* base = static_cast<const char*>(from) + start * size_of(dtype);
  for (; i + Vec::W <= count; i += Vec::W) Vec::store(out + i, Vec::load_as(base, dtype, i));
  for (; i < count; ++i) out[i] = Vec::one(base, dtype, i);
}

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
