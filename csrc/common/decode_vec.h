// Codes to floats with nothing but Vec::decode. MUSUBI_ISA names the namespace; decode_vbmi.h offers the same by
// tables.
#pragma once

#include <cstring>

#include "common/types.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

class Codes {
 public:
  explicit Codes(Format format) : format_(format) {}

  // out[0 .. count) = float(codes) * scale
  void floats(const uint8_t* codes, int64_t count, float scale, float* out) const {
    const auto factor = Vec::set1(scale);
    int64_t i = 0;
    for (; i + Vec::W <= count; i += Vec::W) Vec::store(out + i, Vec::mul(Vec::decode(codes + i, format_), factor));
    if (i == count) return;
    float wide[Vec::W];
    Vec::store(wide, Vec::mul(tail(codes + i, count - i), factor));
    std::memcpy(out + i, wide, static_cast<size_t>(count - i) * 4);
  }

  // out[0 .. 64) = float(codes) * scale
  MUSUBI_INLINE void floats(const uint8_t* codes, float scale, float* out) const { floats(codes, 64, scale, out); }

  // out[0 .. count) = float(codes), and zeros up to a whole vector. At most 64 codes.
  MUSUBI_INLINE void padded(const uint8_t* codes, int64_t count, float* out) const {
    int64_t i = 0;
    for (; i + Vec::W <= count; i += Vec::W) Vec::store(out + i, Vec::decode(codes + i, format_));
    if (i < count) Vec::store(out + i, tail(codes + i, count - i));
  }

  // 64 codes as floats, which decode_vbmi.h has in an order of its own: float i is code place(i).
  static constexpr bool kInRegisters = false;
  MUSUBI_INLINE void shuffled(const uint8_t* codes, Vec::F* out) const {
    MUSUBI_UNROLL
    for (int i = 0; i < 64 / Vec::W; ++i) out[i] = Vec::decode(codes + i * Vec::W, format_);
  }
  // The same of `count` codes, and zeros.
  void shuffled_part(const uint8_t* codes, int64_t count, Vec::F* out) const {
    uint8_t whole[64] = {};
    std::memcpy(whole, codes, static_cast<size_t>(count));
    shuffled(whole, out);
  }
  static constexpr int64_t place(int64_t i) { return i; }

 private:
  Vec::F tail(const uint8_t* codes, int64_t count) const {
    uint8_t few[Vec::W] = {};
    std::memcpy(few, codes, static_cast<size_t>(count));
    return Vec::decode(few, format_);
  }

  Format format_;
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
