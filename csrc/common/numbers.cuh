// Numbers on the device: 16-bit pairs, FP8 codes to floats and back. Plain C++ apart from what gpu.cuh wraps.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "common/gpu.cuh"

namespace musubi::gpu {

template <class To, class From>
MUSUBI_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

// a / b for numbers below 2^32: a few instructions, where 64 bits take a call.
MUSUBI_DEVICE int64_t divide(int64_t a, int64_t b) { return static_cast<uint32_t>(a) / static_cast<uint32_t>(b); }

// The two 16-bit types: a pair in a register, floats to a pair and back, one product of tiles.
struct Bf16 {
  static constexpr Dtype dtype = Dtype::bf16;
  static MUSUBI_DEVICE uint32_t pack(float low, float high) {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  }
  static MUSUBI_DEVICE uint16_t round(float value) { return bit_cast<uint16_t>(__float2bfloat16_rn(value)); }
  static MUSUBI_DEVICE float low(uint32_t pair) { return bits_to_float(pair << 16); }
  static MUSUBI_DEVICE float high(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }
  static MUSUBI_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_bf16(c, a, b0, b1);
  }
};

struct F16 {
  static constexpr Dtype dtype = Dtype::f16;
  static MUSUBI_DEVICE uint32_t pack(float low, float high) { return bit_cast<uint32_t>(__floats2half2_rn(low, high)); }
  static MUSUBI_DEVICE uint16_t round(float value) { return bit_cast<uint16_t>(__float2half_rn(value)); }
  static MUSUBI_DEVICE float low(uint32_t pair) { return __low2float(bit_cast<__half2>(pair)); }
  static MUSUBI_DEVICE float high(uint32_t pair) { return __high2float(bit_cast<__half2>(pair)); }
  static MUSUBI_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_add_f16(c, a, b0, b1);
  }
};

MUSUBI_DEVICE float load_as_float(const void* from, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(from)[i];
  const uint32_t bits = static_cast<const uint16_t*>(from)[i];
  return dtype == Dtype::bf16 ? Bf16::low(bits) : F16::low(bits);
}

// The same in two steps, so that a value can be under way while other work is done.
MUSUBI_DEVICE uint32_t load_raw(const void* from, Dtype dtype, int64_t i) {
  return dtype == Dtype::f32 ? static_cast<const uint32_t*>(from)[i] : static_cast<const uint16_t*>(from)[i];
}

MUSUBI_DEVICE float float_of(uint32_t raw, Dtype dtype) {
  return dtype == Dtype::f32 ? bits_to_float(raw) : dtype == Dtype::bf16 ? Bf16::low(raw) : F16::low(raw);
}

MUSUBI_DEVICE void store_float(void* to, Dtype dtype, int64_t i, float value) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] = dtype == Dtype::bf16 ? Bf16::round(value) : F16::round(value);
  }
}

#if !MUSUBI_HAS_FP8_CONVERSION
// The integer decoding of e4m3 makes 480 of NaN. One test for all words: a NaN is not worth more in a loop of products.
template <int kWords>
MUSUBI_DEVICE void restore_nan(const uint32_t (&codes)[kWords], uint32_t (&pairs)[kWords][2]) {
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) found |= (codes[i] & 0x7f7f7f7fu) + 0x01010101u;
  if ((found & 0x80808080u) == 0) return;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t nan = ((codes[i] & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
    pairs[i][0] |= (permute(nan, 0, 0x1404) >> 15) * 0x7fffu;
    pairs[i][1] |= (permute(nan, 0, 0x3424) >> 15) * 0x7fffu;
  }
}
#endif

// Words of four codes, each as two pairs of float16 (codes 0, 1 and 2, 3), exactly.
template <Format kFormat, int kWords>
MUSUBI_DEVICE void decode_f16(const uint32_t (&codes)[kWords], uint32_t (&pairs)[kWords][2]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
#if MUSUBI_HAS_FP8_CONVERSION
    if (kFormat == Format::e4m3) {
      pairs[i][0] = e4m3_pair_to_f16(codes[i] & 0xffffu);
      pairs[i][1] = e4m3_pair_to_f16(codes[i] >> 16);
      continue;
    }
#endif
    pairs[i][0] = permute(codes[i], 0, 0x1404);  // e5m2: the upper half of a float16
    pairs[i][1] = permute(codes[i], 0, 0x3424);
#if !MUSUBI_HAS_FP8_CONVERSION
    if (kFormat == Format::e4m3) {
      const __half2 rebias = bit_cast<__half2>(0x5c005c00u);  // 2^8: the exponents of e4m3 and float16 differ by 8
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint32_t small = (pairs[i][p] & 0x80008000u) | ((pairs[i][p] >> 1) & 0x3f803f80u);
        pairs[i][p] = bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(small), rebias));
      }
    }
#endif
  }
#if !MUSUBI_HAS_FP8_CONVERSION
  if (kFormat == Format::e4m3) restore_nan(codes, pairs);
#endif
}

template <Format kFormat, int kWords>
MUSUBI_DEVICE void decode_floats(const uint32_t (&codes)[kWords], float (&values)[kWords][4]) {
  uint32_t pairs[kWords][2];
  decode_f16<kFormat>(codes, pairs);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    values[i][0] = F16::low(pairs[i][0]);
    values[i][1] = F16::high(pairs[i][0]);
    values[i][2] = F16::low(pairs[i][1]);
    values[i][3] = F16::high(pairs[i][1]);
  }
}

// Words of four codes, each as two pairs of T, exactly.
template <class T, Format kFormat, int kWords>
MUSUBI_DEVICE void decode(const uint32_t (&codes)[kWords], uint32_t (&pairs)[kWords][2]) {
  if (T::dtype == Dtype::f16) return decode_f16<kFormat>(codes, pairs);
#if !MUSUBI_HAS_FP8_CONVERSION
  if (kFormat == Format::e4m3) {                                          // integer operations and one product per pair
    const __nv_bfloat162 rebias = bit_cast<__nv_bfloat162>(0x7b807b80u);  // 2^120
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t spread[2] = {permute(codes[i], 0, 0x1404), permute(codes[i], 0, 0x3424)};
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint32_t small = (spread[p] & 0x80008000u) | ((spread[p] >> 4) & 0x07f007f0u);
        pairs[i][p] = bit_cast<uint32_t>(__hmul2(bit_cast<__nv_bfloat162>(small), rebias));
      }
    }
    return restore_nan(codes, pairs);
  }
#endif
  float values[kWords][4];
  decode_floats<kFormat>(codes, values);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    pairs[i][0] = T::pack(values[i][0], values[i][1]);
    pairs[i][1] = T::pack(values[i][2], values[i][3]);
  }
}

// Numbers that define a format: the bits of its largest value as a float, the mantissa bits that a float has too many,
// the exponent offset in codes, the smallest normal, and the float whose last place is the format's smallest step.
template <Format kFormat>
struct Numbers;
template <>
struct Numbers<Format::e4m3> {
  static constexpr uint32_t largest = 0x43e00000, shift = 20, offset = 120u << 3, normal = 0x3c800000;
  static constexpr uint32_t step = 0x46800000;
  static constexpr float largest_value = 448.0f, step_value = 16384.0f;
};
template <>
struct Numbers<Format::e5m2> {
  static constexpr uint32_t largest = 0x47600000, shift = 21, offset = 112u << 2, normal = 0x38800000;
  static constexpr uint32_t step = 0x43000000;
  static constexpr float largest_value = 57344.0f, step_value = 128.0f;
};

// The saturating cast of value / scale, ties to even.
template <Format kFormat>
MUSUBI_DEVICE uint32_t encode(float value, float scale) {
  using N = Numbers<kFormat>;
  const uint32_t bits = float_to_bits(value / scale);
  const uint32_t all = bits & 0x7fffffffu;
  const uint32_t a = all < N::largest ? all : N::largest;
  const uint32_t rounded = ((a + ((1u << (N::shift - 1)) - 1) + ((a >> N::shift) & 1u)) >> N::shift) - N::offset;
  const uint32_t counted = float_to_bits(bits_to_float(a) + N::step_value) - N::step;
  return (a < N::normal ? counted : rounded) | ((bits >> 24) & 0x80u);
}

}  // namespace musubi::gpu
