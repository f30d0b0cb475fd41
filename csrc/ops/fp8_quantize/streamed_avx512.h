// Results written past the caches, whole lines at a time, wherever their rows begin.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/types.h"

namespace musubi {
namespace MUSUBI_ISA {
namespace {

MUSUBI_INLINE void put64(uint8_t* to, __m512i bytes, bool stream) {
  if (stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bytes);
  } else {
    _mm512_storeu_si512(to, bytes);
  }
}

// Bytes from which on a run that is no whole lines is written past the caches all the same.
constexpr int64_t kLeastStreamed = 256;

// Bytes from here to the next line of the caches, where long runs are written past those; 0 for shorter runs, which are
// only where they begin at a line.
inline int64_t to_next_line(const void* to, bool stream, int64_t bytes) {
  return stream && bytes >= kLeastStreamed ? static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % 64) : 0;
}

// Makes one line of the end of a run and the beginning of the next, so that long results are written past the caches
// in whole lines only: an ordinary write between takes as long as memory needs to answer, and all behind it waits.
class Seam {
 public:
  // The first `count` of `bytes` go to `to`, where a line ends after them.
  MUSUBI_INLINE void finish(uint8_t* to, __m512i bytes, int64_t count) {
    if (to == end_) {
      _mm512_storeu_si512(line_ + 64 - count, bytes);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + count - 64), _mm512_load_si512(line_));
      end_ = nullptr;
    } else {
      _mm512_mask_storeu_epi8(to, ~uint64_t{0} >> (64 - count), bytes);
    }
  }

  // The last `count` of 64 bytes go before `end`: kept, if a line begins with them and `stream`, until the next run.
  MUSUBI_INLINE void begin(uint8_t* end, __m512i bytes, int64_t count, bool stream) {
    if (stream && reinterpret_cast<uintptr_t>(end - count) % 64 == 0) {
      write_out();
      _mm512_storeu_si512(line_ + count - 64, bytes);
      end_ = end;
    } else {
      _mm512_mask_storeu_epi8(end - 64, ~uint64_t{0} << (64 - count), bytes);
    }
  }

  // What is kept.
  MUSUBI_INLINE void write_out() {
    if (end_ == nullptr) return;
    const uintptr_t held = reinterpret_cast<uintptr_t>(end_) % 64;
    _mm512_mask_storeu_epi8(end_ - held, ~uint64_t{0} >> (64 - held), _mm512_load_si512(line_));
    end_ = nullptr;
  }

 private:
  alignas(64) uint8_t space_[192];
  uint8_t* const line_ = space_ + 64;
  uint8_t* end_ = nullptr;
};

}  // namespace
}  // namespace MUSUBI_ISA
}  // namespace musubi
