// What one thread can compute at most: independent multiply-adds in registers. Compiled by cpu_clock.py for the vectors
// of the body whose limit it is, never shipped.
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define REGISTER "+v"
#elif defined(__x86_64__)
#define REGISTER "+x"
#else
#define REGISTER "+w"
#endif

namespace {

constexpr int kChains = 12;  // more than latency times ports, fewer than registers

#if defined(__AVX512F__)
using Vec = __m512;
Vec ones() { return _mm512_set1_ps(1.0f); }
Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
using Vec = __m256;
Vec ones() { return _mm256_set1_ps(1.0f); }
Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Vec __attribute__((vector_size(16)));
Vec ones() { return Vec{1, 1, 1, 1}; }
Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

template <class Step>
float chains(long rounds, Step step) {
  Vec sums[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sums[i] = ones();
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = step(sums[i]);
      asm volatile("" : REGISTER(sums[i]));  // stays in its register, and is not folded with the next round
    }
  }
  float total = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) total += sums[i][0];
  return total;
}

}  // namespace

// Runs `rounds` rounds and sets `operations` to how many floating-point operations that was.
extern "C" float run(int pairs, long rounds, double* operations) {
  *operations = 2.0 * kChains * static_cast<double>(rounds) * (sizeof(Vec) / sizeof(float)) * (pairs ? 2 : 1);
#if defined(__AVX512BF16__)
  if (pairs) {
    const auto half = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f00));
    return chains(rounds, [half](Vec sum) { return _mm512_dpbf16_ps(sum, half, half); });
  }
#endif
  const Vec one = ones();
  return chains(rounds, [one](Vec sum) { return multiply_add(one, one, sum); });
}
