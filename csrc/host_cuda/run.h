// Runs CUDA kernels on the CPU: a fiber per thread, blocks one after another, every wait a switch to another fiber.
//
// What is modelled, and meant to catch faults: shared memory of exactly the size asked for, filled with NaN before each
// block; barriers and warp operations that wait for every thread (a thread that never comes is an error); asynchronous
// copies that arrive at their wait, or at once, as the schedule says; the order of threads, in several schedules.
// Not modelled: memory ordering, partial warps, bank conflicts, TMA, wgmma, tcgen05.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>

namespace musubi::host {

// Faults that the kernels seed where this asks for one (MUSUBI_FAULT); the tests show that each is caught.
enum class Fault {
  none,
  small_without_barrier,
  small_short_buffer,
  tile_without_barrier,
  tile_without_wait,
  tile_short_buffer,
  tile_swapped_fragment,
  gradient_swapped_bytes,
  tile_stored_too_soon,
};

enum class Order {
  forward,  // threads 0, 1, 2 ... each until it waits
  reverse,
  shuffled,  // another order in every turn
  eager,     // a warp runs as far ahead of the others as it can
};

struct Settings {
  Order order = Order::forward;
  uint64_t seed = 0;
  bool copies_arrive_late = true;  // at their wait; else at once
  Fault fault = Fault::none;
};

Settings& settings();

// The kernels that ran, by their symbols (the program must be linked with -rdynamic).
const std::set<std::string>& kernels_run();

// Why the last run failed (threads that wait for ever, a misaligned access), or nothing; reading it clears it.
std::string take_error();

void run(const void* kernel, int64_t grid_x, int64_t grid_y, int threads, int shared_bytes,
         const std::function<void()>& body);

// What a running kernel asks for.
int thread();
int64_t block_x();
int64_t block_y();
int64_t grid_x();
unsigned char* shared_memory();
void block_barrier();
uint32_t shuffle_xor(uint32_t value, int mask);
void copy_async(void* shared, const void* global, int valid);
void copy_commit();
void copy_wait(int pending);
void load_matrices(uint32_t (&to)[4], const void* row, bool transposed);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16);
uint32_t e4m3_pair_to_f16(uint32_t codes);
void check_alignment(const void* p, int bytes, const char* what);

}  // namespace musubi::host
