// The scale of a group that leaves the least squared error, among multiples of its absmax scale.
//
// Lanes are factors: a weight is broadcast and meets all of them, so that nothing is summed across lanes. A quotient is
// rounded to its code by integer arithmetic on its bits, halves away from zero, since to either side of a half the
// error is the same. Where the code may be no normal number, the step does not follow the exponent: such weights are
// rare and go the longer way, sixteen together.
#pragma once

#include <cmath>

#include "ops/fp8_quantize/fp8_codes-inl.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

// The factors that are tried. FP8 numbers repeat with every doubling, so one octave holds all alignments of weights to
// codes; it begins where the largest weight still rounds to the largest code. Eight factors make the largest weight
// exact, which is what groups with an outlier need; the others are spread evenly.
constexpr int kFactors = 32;
constexpr int64_t kSearchPiece = 4096;  // weights whose errors are summed in float32
constexpr int64_t kSearchRun = 32;

struct Factors {
  alignas(64) float value[kFactors];

  Factors() {
    for (int i = 0; i < 8; ++i) value[i] = static_cast<float>(448.0 / (i < 7 ? 448.0 - 32.0 * i : 240.0));
    for (int i = 8; i < kFactors; ++i) value[i] = static_cast<float>(std::exp2((i == 8 ? -1 : i - 8) / 24.0));
  }
};

// Trial scales of one group, and the squared error that each would leave.
template <Format kFormat>
class Search {
 public:
  Search(Dtype scale_dtype, float start) {
    static const Factors factors;
    alignas(64) char held[4 * kFactors];
    const auto first = Vec::set1(start), floor = Vec::set1(kSmallestScale);
    for (int i = 0; i < kFactors; i += Vec::W) {
      const auto trial = Vec::max(Vec::mul(first, Vec::load(factors.value + i)), floor);
      Vec::store_as(held, scale_dtype, i, trial);
      Vec::store(scales_ + i, Vec::load_as(held, scale_dtype, i));
    }
    // one subject a loop, so that each becomes vectors
    for (int i = 0; i < kFactors; ++i) inverses_[i] = 1.0f / scales_[i];
    for (int i = 0; i < kFactors; ++i) minus_scales_[i] = -scales_[i];
    uint32_t largest = 0;
    for (int i = 0; i < kFactors; ++i) largest = bits_of(scales_[i]) > largest ? bits_of(scales_[i]) : largest;
    // below this a weight's quotient by some scale is no normal number; the margin covers the roundings
    normal_ = float_of(largest) * float_of(Numbers<kFormat>::normal) * 1.001f;
  }

  // Adds the errors of `count` weights of a row from `start`.
  void add(const void* row, Dtype dtype, int64_t start, int64_t count) {
    alignas(64) float weights[kSearchPiece];
    for (int64_t i = 0; i < count; i += kSearchPiece) {
      const int64_t here = least(kSearchPiece, count - i);
      floats_from(row, dtype, start + i, here, weights);
      if (i > 0) set_aside();
      add_piece(weights, here);
    }
  }

  void add(Search& other) {
    set_aside();
    other.set_aside();
    for (int i = 0; i < kFactors; ++i) aside_[i] += other.aside_[i];
  }

  // The scale with the least error, of equals the first: the one that the search began with before all others.
  float best() {
    if (any_aside_) {
      set_aside();
      for (int i = 0; i < kFactors; ++i) errors_[i] = static_cast<float>(aside_[i]);
    }
    // errors are not negative, so their bits are in the same order, which every compiler knows to reduce
    uint32_t bits[kFactors];
    std::memcpy(bits, errors_, sizeof bits);
    uint32_t least = bits[0];
    for (int i = 0; i < kFactors; ++i) least = bits[i] < least ? bits[i] : least;
    int first = kFactors;
    for (int i = 0; i < kFactors; ++i) {
      const int place = bits[i] == least ? i : kFactors;
      first = place < first ? place : first;
    }
    return scales_[first];
  }

 private:
  // Adds to `errors_`, which a group of one piece needs alone.
  void add_piece(const float* weights, int64_t count) {
    for (int64_t i = 0; i < count; i += kSearchRun) {
      const int64_t here = least(kSearchRun, count - i);
      here == kSearchRun && !any_below_normal(weights + i) ? add_run<false>(weights + i, here)
                                                           : add_run<true>(weights + i, here);
    }
  }

  // Float32 would lose the errors of one piece beside the sum of many.
  void set_aside() {
    for (int i = 0; i < kFactors; ++i) aside_[i] += static_cast<double>(errors_[i]);
    for (int i = 0; i < kFactors; ++i) errors_[i] = 0.0f;
    any_aside_ = true;
  }

  // Zeros are not: they leave no error either way.
  MUSUBI_INLINE bool any_below_normal(const float* weights) const {
    bool any = false;
    MUSUBI_UNROLL
    for (int i = 0; i < kSearchRun; i += Vec::W) any |= Vec::any_below(Vec::load(weights + i), Vec::set1(normal_));
    return any;
  }

  // A code that may be no normal number is rounded to the format's steps by adding and subtracting a number that is
  // 1.5 * 2^k times as large as the step.
  template <bool kBelowNormal>
  MUSUBI_INLINE void add_run(const float* weights, int64_t count) {
    constexpr int kShift = static_cast<int>(Numbers<kFormat>::shift);
    const auto smallest = Vec::set1(float_of(Numbers<kFormat>::normal));
    const auto lift = Vec::set1(1.5f * static_cast<float>(1u << kShift));
    const auto minus_lift = Vec::set1(-1.5f * static_cast<float>(1u << kShift));
    for (int f = 0; f < kFactors; f += 2 * Vec::W) {
      typename Vec::F inverse[2], minus_scale[2], sum[2][2];
      MUSUBI_UNROLL
      for (int v = 0; v < 2; ++v) {
        inverse[v] = Vec::load(inverses_ + f + v * Vec::W);
        minus_scale[v] = Vec::load(minus_scales_ + f + v * Vec::W);
        sum[0][v] = Vec::load(errors_ + f + v * Vec::W);
        sum[1][v] = Vec::zero();
      }
      const auto one = [&](int64_t i, typename Vec::F* to) {
        const auto weight = Vec::set1(weights[i]);
        MUSUBI_UNROLL
        for (int v = 0; v < 2; ++v) {
          const auto q = Vec::mul(weight, inverse[v]);
          auto code = q;
          if constexpr (kBelowNormal) {
            const auto step = Vec::max(Vec::power_of(q), smallest);
            code = Vec::fma(step, minus_lift, Vec::fma(step, lift, q));
          } else {
            code = Vec::template shortened<kShift>(q);
          }
          const auto error = Vec::fma(code, minus_scale[v], weight);
          to[v] = Vec::fma(error, error, to[v]);
        }
      };
      int64_t i = 0;
      for (; i + 2 <= count; i += 2) {  // two sums each: one would be waited for
        one(i, sum[0]);
        one(i + 1, sum[1]);
      }
      if (i < count) one(i, sum[0]);
      MUSUBI_UNROLL
      for (int v = 0; v < 2; ++v) Vec::store(errors_ + f + v * Vec::W, Vec::add(sum[0][v], sum[1][v]));
    }
  }

  alignas(64) float scales_[kFactors];
  alignas(64) float inverses_[kFactors];
  alignas(64) float minus_scales_[kFactors];
  alignas(64) float errors_[kFactors] = {};
  alignas(64) double aside_[kFactors] = {};
  float normal_;
  bool any_aside_ = false;
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
