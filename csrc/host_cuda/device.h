// The host's answer to common/gpu.cuh: the same names, run by fibers on the CPU (run.h). Kernels never include more.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "host_cuda/run.h"

#define MUSUBI_DEVICE inline
#define MUSUBI_KERNEL(threads, blocks) void
#define MUSUBI_SHARED(name) unsigned char* const name = ::musubi::host::shared_memory()
#define MUSUBI_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  ::musubi::gpu::launch(kernel, grid, threads, shared_bytes, stream, __VA_ARGS__)
#define MUSUBI_FAULT(name) (::musubi::host::settings().fault == ::musubi::host::Fault::name)
// 1: as sm_89 and later convert codes; 0: as sm_80 and sm_86 do. Both are built and run.
#ifndef MUSUBI_HAS_FP8_CONVERSION
#define MUSUBI_HAS_FP8_CONVERSION 0
#endif

namespace musubi::gpu {

struct Grid {
  int64_t x = 1;
  int64_t y = 1;
};

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, int64_t,
           const Arguments&... arguments) {
  if (grid.x <= 0 || grid.y <= 0) return 0;
  const std::tuple<Parameters...> held(arguments...);
  host::run(reinterpret_cast<const void*>(kernel), grid.x, grid.y, threads, shared_bytes,
            [&] { std::apply(kernel, held); });
  return 0;
}

inline int thread_index() { return host::thread(); }
inline int64_t block_index() { return host::block_x(); }
inline int64_t block_row() { return host::block_y(); }
inline int64_t grid_width() { return host::grid_x(); }
inline void barrier() { host::block_barrier(); }
inline uint32_t shuffle_xor(uint32_t value, int mask) { return host::shuffle_xor(value, mask); }
inline void atomic_max(uint32_t* to, uint32_t value) { *to = value > *to ? value : *to; }
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
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t bytes) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = static_cast<uint32_t>(both >> (8 * ((bytes >> (4 * i)) & 7u))) & 0xffu;
    result |= byte << (8 * i);
  }
  return result;
}
inline void copy_async(void* shared, const void* global, int valid) { host::copy_async(shared, global, valid); }
inline void copy_commit() { host::copy_commit(); }
template <int kPending>
void copy_wait() {
  host::copy_wait(kPending);
}
inline void load_matrices(uint32_t (&to)[4], const void* row) { host::load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { host::load_matrices(to, row, true); }
inline uint4 load_once(const void* from) {
  host::check_alignment(from, 16, "a 16-byte load");
  uint4 v;
  std::memcpy(&v, from, 16);
  return v;
}
inline uint2 load_pair_once(const void* from) {
  host::check_alignment(from, 8, "an 8-byte load");
  uint2 v;
  std::memcpy(&v, from, 8);
  return v;
}
inline void multiply_add_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::multiply_add(c, a, b0, b1, true);
}
inline void multiply_add_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::multiply_add(c, a, b0, b1, false);
}
inline uint32_t e4m3_pair_to_f16(uint32_t codes) { return host::e4m3_pair_to_f16(codes); }

}  // namespace musubi::gpu
