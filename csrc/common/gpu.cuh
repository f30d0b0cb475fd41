// What a kernel may use of the device: indices, barriers, shuffles, copies, tensor cores, launches. Everything that is
// not plain C++ passes through here, so that the same source runs on the CPU with `MUSUBI_HOST_RUN` (host_cuda/run.h).
#pragma once

#include <cstdint>

#include "common/types.h"

#ifdef MUSUBI_HOST_RUN
#include "host_cuda/device.h"
#else
#include <cuda_runtime.h>

#define MUSUBI_DEVICE __device__ __forceinline__
#define MUSUBI_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// All shared memory of a kernel is one array of bytes whose size the launch gives.
#define MUSUBI_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// The launch's error as an int; `kernel` in parentheses.
#define MUSUBI_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  ::musubi::gpu::launch(kernel, grid, threads, shared_bytes, stream, __VA_ARGS__)
// A fault that the host run can switch on, to show that it is caught; never on a device.
#define MUSUBI_FAULT(name) false

namespace musubi::gpu {

struct Grid {
  int64_t x = 1;
  int64_t y = 1;
};

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, int64_t stream,
           const Arguments&... arguments) {
  if (grid.x <= 0 || grid.y <= 0) return 0;
  if (grid.x > 0x7fffffff || grid.y > 65535) return static_cast<int>(cudaErrorInvalidConfiguration);
  if (shared_bytes > 48 * 1024) {
    const auto set = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (set != cudaSuccess) {
      (void)cudaGetLastError();  // told to the caller; it must not be found again by the next launch
      return static_cast<int>(set);
    }
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  // clang-format off: it parts the closing brackets, which nvcc takes for comparisons
  kernel<<<blocks, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), on>>>(arguments...);
  // clang-format on
  return static_cast<int>(cudaGetLastError());
}

MUSUBI_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MUSUBI_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
MUSUBI_DEVICE int64_t block_row() { return static_cast<int64_t>(blockIdx.y); }
MUSUBI_DEVICE int64_t grid_width() { return static_cast<int64_t>(gridDim.x); }
MUSUBI_DEVICE void barrier() { __syncthreads(); }
MUSUBI_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
MUSUBI_DEVICE void atomic_max(uint32_t* to, uint32_t value) { atomicMax(to, value); }
MUSUBI_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
MUSUBI_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }
MUSUBI_DEVICE uint32_t permute(uint32_t low, uint32_t high, uint32_t bytes) { return __byte_perm(low, high, bytes); }

MUSUBI_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes to shared memory, the bytes beyond the first `valid` as zeros; there after copy_wait and a barrier.
MUSUBI_DEVICE void copy_async(void* shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid));
}
MUSUBI_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::); }
// Waits until at most kPending of this thread's newest groups are under way.
template <int kPending>
MUSUBI_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8 and gets, of each
// matrix, elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 (transposed: of column l / 4).
MUSUBI_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
MUSUBI_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes (8: the pair) that are read once: they pass by the first cache.
MUSUBI_DEVICE uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

MUSUBI_DEVICE uint2 load_pair_once(const void* from) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}

// sums[16 x 8] += a[16 x 16] b[16 x 8] for one warp, in float32.
MUSUBI_DEVICE void multiply_add_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MUSUBI_DEVICE void multiply_add_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define MUSUBI_HAS_FP8_CONVERSION 1
// Two codes in the low 16 bits as a pair of float16, exactly, NaN and infinity included.
MUSUBI_DEVICE uint32_t e4m3_pair_to_f16(uint32_t codes) {
  uint32_t pair;
  asm("{.reg .b16 c; cvt.u16.u32 c, %1; cvt.rn.f16x2.e4m3x2 %0, c;}\n" : "=r"(pair) : "r"(codes));
  return pair;
}
#else
#define MUSUBI_HAS_FP8_CONVERSION 0
#endif

}  // namespace musubi::gpu
#endif

namespace musubi::gpu {

inline constexpr int kWarp = 32;

}  // namespace musubi::gpu
