// Four floats at a time in plain C++: the shape of the vector headers, for any processor.
#pragma once

#include <cstring>

#include "common/types.h"

// A loop over 64 codes written out four floats at a time would make this body larger than all others together.
#undef MUSUBI_UNROLL
#define MUSUBI_UNROLL _Pragma("GCC unroll 8")

namespace musubi {
namespace scalar {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest < 0x400) {
    const float tiny = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -tiny : tiny;
  }
  return bits_to_float(sign | ((rest << 13) + (112u << 23)));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {  // subnormal: adding 2^-1 leaves the rounded count of 2^-24 in the low bits
    const uint32_t count = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | count);
  }
  const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float code_to_float(uint8_t code, Format format) {
  const uint32_t magnitude = code & 0x7fu;
  const float sign = (code & 0x80u) != 0 ? -1.0f : 1.0f;
  if (format == Format::e4m3) {
    if (magnitude == 0x7f) return bits_to_float(0x7fc00000u);
    if (magnitude < 8) return sign * static_cast<float>(magnitude) * 0x1p-9f;
    return sign * bits_to_float((magnitude << 20) + (120u << 23));
  }
  return half_to_float(static_cast<uint16_t>(static_cast<uint16_t>(code) << 8));
}

struct Vec {
  static constexpr int W = 4;
  struct F {
    float lane[W];
  };

  static F zero() { return F{}; }
  static F fresh_zero() { return zero(); }
  static F set1(float a) { return F{{a, a, a, a}}; }
  static F load(const float* p) {
    F f;
    std::memcpy(f.lane, p, sizeof f.lane);
    return f;
  }
  static void store(float* p, F f) { std::memcpy(p, f.lane, sizeof f.lane); }
  // The G floats at p, again and again.
  template <int G>
  static F repeat(const float* p) {
    F f;
    for (int i = 0; i < W; ++i) f.lane[i] = p[i % G];
    return f;
  }
  static F add(F a, F b) {
    for (int i = 0; i < W; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static F mul(F a, F b) {
    for (int i = 0; i < W; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < W; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static F max(F a, F b) {
    for (int i = 0; i < W; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  // The largest power of two that is not above |a|.
  static F power_of(F a) {
    for (int i = 0; i < W; ++i) a.lane[i] = bits_to_float(float_to_bits(a.lane[i]) & 0x7f800000u);
    return a;
  }
  // The nearest number with kBits fewer bits of mantissa, halves away from zero.
  template <int kBits>
  static F shortened(F a) {
    for (int i = 0; i < W; ++i) {
      a.lane[i] = bits_to_float((float_to_bits(a.lane[i]) + (1u << (kBits - 1))) & ~((1u << kBits) - 1u));
    }
    return a;
  }
  // Whether the magnitude of some lane is below `limit` and not zero.
  static bool any_below(F a, F limit) {
    bool any = false;
    for (int i = 0; i < W; ++i) {
      const float size = a.lane[i] < 0.0f ? -a.lane[i] : a.lane[i];
      any |= size < limit.lane[i] && size != 0.0f;
    }
    return any;
  }
  static float sum(F a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }
  static void transpose(F* r) {
    for (int i = 0; i < W; ++i) {
      for (int j = 0; j < i; ++j) {
        const float held = r[i].lane[j];
        r[i].lane[j] = r[j].lane[i];
        r[j].lane[i] = held;
      }
    }
  }
  static float one(const void* p, Dtype dtype, int64_t i) {
    float value;
    if (dtype == Dtype::f32) {
      std::memcpy(&value, static_cast<const float*>(p) + i, 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, static_cast<const uint16_t*>(p) + i, 2);
    if (dtype == Dtype::f16) return half_to_float(half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  static void put(void* p, Dtype dtype, int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == Dtype::f32) {
      std::memcpy(static_cast<float*>(p) + i, &bits, 4);
      return;
    }
    const uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    uint16_t half = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : even);
    if (dtype == Dtype::f16) half = static_cast<uint16_t>(float_to_half(value));
    std::memcpy(static_cast<uint16_t*>(p) + i, &half, 2);
  }

  static F load_as(const void* p, Dtype dtype, int64_t i) {
    if (dtype == Dtype::f32) return load(static_cast<const float*>(p) + i);
    const uint16_t* half = static_cast<const uint16_t*>(p) + i;
    F f;
    for (int l = 0; l < W; ++l) {
      f.lane[l] = dtype == Dtype::f16 ? half_to_float(half[l]) : bits_to_float(static_cast<uint32_t>(half[l]) << 16);
    }
    return f;
  }
  static void store_as(void* p, Dtype dtype, int64_t i, F f) {
    if (dtype == Dtype::f32) return store(static_cast<float*>(p) + i, f);
    uint16_t* half = static_cast<uint16_t*>(p) + i;
    for (int l = 0; l < W; ++l) {
      half[l] = dtype == Dtype::f16 ? float_to_half(f.lane[l]) : float_to_bfloat(f.lane[l]);
    }
  }
  static F decode(const uint8_t* codes, Format format) {
    F f;
    for (int l = 0; l < W; ++l) f.lane[l] = code_to_float(codes[l], format);
    return f;
  }
};

}  // namespace scalar
}  // namespace musubi
