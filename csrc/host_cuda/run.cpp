#include "host_cuda/run.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define MUSUBI_ASAN 1
#else
#define MUSUBI_ASAN 0
#endif

namespace musubi::host {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kLanes = 32;
constexpr int kGuard = MUSUBI_ASAN ? 0 : 64;  // bytes behind the shared memory that nothing may touch
constexpr unsigned char kUntouched = 0xa5;
constexpr int kDeposit = 64;  // bytes a lane may bring to a warp operation, and take away

struct Copy {
  void* to;
  unsigned char bytes[16];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  const uint64_t* watched = nullptr;  // runnable when this differs from `seen`
  uint64_t seen = 0;
  bool done = false;
  std::deque<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                // not committed yet
  void* asan = nullptr;
};

struct Warp {
  int arrived = 0;
  int operation = 0;
  uint64_t turn = 0;
  alignas(16) unsigned char in[kLanes][kDeposit];
  alignas(16) unsigned char out[kLanes][kDeposit];
};

struct State {
  Settings settings;
  std::set<std::string> kernels;
  std::string error;
  ucontext_t scheduler;
  void* scheduler_asan = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  const std::function<void()>* body = nullptr;
  int current = 0;
  int threads = 0;
  int64_t x = 0, y = 0, width = 1;
  int waiting = 0;
  uint64_t barrier_turn = 0;
  std::unique_ptr<unsigned char[]> shared;
  int shared_bytes = 0;
  uint64_t random = 1;
};

State& state() {
  static State s;
  return s;
}

uint64_t draw() {
  State& s = state();
  s.random = s.random * 6364136223846793005ull + 1442695040888963407ull;
  return s.random >> 33;
}

void fail(const std::string& what) {
  State& s = state();
  if (s.error.empty()) {
    s.error = what + " (block " + std::to_string(s.x) + ", " + std::to_string(s.y) + ", thread " +
              std::to_string(s.current) + ")";
  }
}

void to_scheduler(bool finished) {
  State& s = state();
  Fiber& fiber = s.fibers[static_cast<size_t>(s.current)];
#if MUSUBI_ASAN
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.asan, s.scheduler_stack, s.scheduler_size);
#else
  (void)finished;
#endif
  swapcontext(&fiber.context, &s.scheduler);
#if MUSUBI_ASAN
  __sanitizer_finish_switch_fiber(fiber.asan, &s.scheduler_stack, &s.scheduler_size);
#endif
}

void enter() {
  State& s = state();
#if MUSUBI_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &s.scheduler_stack, &s.scheduler_size);
#endif
  (*s.body)();
  s.fibers[static_cast<size_t>(s.current)].done = true;
  to_scheduler(true);
}

void resume(int thread) {
  State& s = state();
  Fiber& fiber = s.fibers[static_cast<size_t>(thread)];
  s.current = thread;
  fiber.watched = nullptr;
#if MUSUBI_ASAN
  __sanitizer_start_switch_fiber(&s.scheduler_asan, fiber.stack.get(), kStack);
#endif
  swapcontext(&s.scheduler, &fiber.context);
#if MUSUBI_ASAN
  __sanitizer_finish_switch_fiber(s.scheduler_asan, nullptr, nullptr);
#endif
}

void wait_for(const uint64_t& turn, uint64_t seen) {
  State& s = state();
  Fiber& fiber = s.fibers[static_cast<size_t>(s.current)];
  fiber.watched = &turn;
  fiber.seen = seen;
  to_scheduler(false);
}

bool runnable(const Fiber& fiber) { return !fiber.done && (fiber.watched == nullptr || *fiber.watched != fiber.seen); }

void shuffle(std::vector<int>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
}

// One turn: every runnable thread of `order` once. False where none could run.
bool turn(const std::vector<int>& order) {
  bool ran = false;
  for (const int thread : order) {
    if (!runnable(state().fibers[static_cast<size_t>(thread)])) continue;
    resume(thread);
    ran = true;
    if (!state().error.empty()) return false;
  }
  return ran;
}

void schedule() {
  State& s = state();
  std::vector<int> order(static_cast<size_t>(s.threads));
  for (int i = 0; i < s.threads; ++i) order[static_cast<size_t>(i)] = i;
  if (s.settings.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (s.settings.order != Order::eager) {
    do {
      if (s.settings.order == Order::shuffled) shuffle(order);
    } while (turn(order));
    return;
  }
  std::vector<int> warps(s.warps.size());
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
  for (bool ran = true; ran;) {
    ran = false;
    shuffle(warps);
    for (const int warp : warps) {
      std::vector<int> lanes;
      for (int i = warp * kLanes; i < std::min(s.threads, (warp + 1) * kLanes); ++i) lanes.push_back(i);
      shuffle(lanes);
      while (turn(lanes)) ran = true;
      if (!s.error.empty()) return;
    }
  }
}

void start_block(int shared_bytes) {
  State& s = state();
  // of exactly this size on the heap, so that a sanitizer sees a step beyond it; 0xff is NaN in every format here
  s.shared.reset(new unsigned char[static_cast<size_t>(shared_bytes + kGuard)]);
  std::memset(s.shared.get(), 0xff, static_cast<size_t>(shared_bytes));
  std::memset(s.shared.get() + shared_bytes, kUntouched, kGuard);
  s.shared_bytes = shared_bytes;
  s.waiting = 0;
  s.warps.assign(static_cast<size_t>((s.threads + kLanes - 1) / kLanes), Warp());
  s.fibers.resize(static_cast<size_t>(s.threads));
  for (Fiber& fiber : s.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.done = false;
    fiber.watched = nullptr;
    fiber.groups.clear();
    fiber.open.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
}

void arrive(const Copy& copy) {
  State& s = state();
  const auto* const to = static_cast<unsigned char*>(copy.to);
  if (to < s.shared.get() || to + 16 > s.shared.get() + s.shared_bytes) {
    return fail("an asynchronous copy ends beyond the shared memory");
  }
  std::memcpy(copy.to, copy.bytes, 16);
}

// A warp operation: every lane brings `size` bytes; the last to come computes all results.
template <class Compute>
void together(int operation, const void* in, size_t size, void* out, size_t out_size, const Compute& compute) {
  State& s = state();
  const int lane = s.current % kLanes;
  Warp& warp = s.warps[static_cast<size_t>(s.current / kLanes)];
  if (warp.arrived > 0 && warp.operation != operation) fail("lanes of a warp are at different operations");
  warp.operation = operation;
  std::memcpy(warp.in[lane], in, size);
  const int lanes = std::min(kLanes, s.threads - s.current / kLanes * kLanes);
  if (++warp.arrived == lanes) {
    compute(warp);
    warp.arrived = 0;
    ++warp.turn;
  } else {
    wait_for(warp.turn, warp.turn);
  }
  std::memcpy(out, warp.out[lane], out_size);
}

float bf16_low(uint32_t pair) {
  const uint32_t bits = pair << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float half_low(uint32_t pair) {
  __half_raw raw;
  raw.x = static_cast<uint16_t>(pair);
  return __half2float(__half(raw));
}

}  // namespace

Settings& settings() { return state().settings; }
const std::set<std::string>& kernels_run() { return state().kernels; }
std::string take_error() { return std::exchange(state().error, std::string()); }

void run(const void* kernel, int64_t grid_x, int64_t grid_y, int threads, int shared_bytes,
         const std::function<void()>& body) {
  State& s = state();
  Dl_info info;
  if (dladdr(kernel, &info) != 0 && info.dli_sname != nullptr) s.kernels.insert(info.dli_sname);
  s.random = s.settings.seed * 2654435761u + 1;
  s.body = &body;
  s.threads = threads;
  s.width = grid_x;
  for (s.y = 0; s.y < grid_y; ++s.y) {
    for (s.x = 0; s.x < grid_x; ++s.x) {
      start_block(shared_bytes);
      schedule();
      for (int i = 0; s.error.empty() && i < threads; ++i) {
        s.current = i;
        if (!s.fibers[static_cast<size_t>(i)].done) fail("this thread waits for others that never come");
      }
      for (int i = 0; s.error.empty() && i < kGuard; ++i) {
        if (s.shared[static_cast<size_t>(shared_bytes + i)] != kUntouched) fail("a write behind the shared memory");
      }
      if (!s.error.empty()) return;
    }
  }
}

int thread() { return state().current; }
int64_t block_x() { return state().x; }
int64_t block_y() { return state().y; }
int64_t grid_x() { return state().width; }
unsigned char* shared_memory() { return state().shared.get(); }

void block_barrier() {
  State& s = state();
  if (++s.waiting == s.threads) {
    s.waiting = 0;
    ++s.barrier_turn;
  } else {
    wait_for(s.barrier_turn, s.barrier_turn);
  }
}

uint32_t shuffle_xor(uint32_t value, int mask) {
  uint32_t result = 0;
  together(1, &value, 4, &result, 4, [mask](Warp& warp) {
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(warp.out[lane], warp.in[lane ^ mask], 4);
  });
  return result;
}

void copy_async(void* shared, const void* global, int valid) {
  check_alignment(global, 16, "an asynchronous copy's source");
  check_alignment(shared, 16, "an asynchronous copy's target");
  Copy copy = {shared, {}};
  std::memcpy(copy.bytes, global, static_cast<size_t>(valid));
  if (state().settings.copies_arrive_late) {
    state().fibers[static_cast<size_t>(state().current)].open.push_back(copy);
  } else {
    arrive(copy);
  }
}

void copy_commit() {
  Fiber& fiber = state().fibers[static_cast<size_t>(state().current)];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void copy_wait(int pending) {
  Fiber& fiber = state().fibers[static_cast<size_t>(state().current)];
  for (; fiber.groups.size() > static_cast<size_t>(pending); fiber.groups.pop_front()) {
    for (const Copy& copy : fiber.groups.front()) arrive(copy);
  }
}

void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  check_alignment(row, 16, "a row of a matrix load");
  together(transposed ? 3 : 2, &row, sizeof(row), to, sizeof(to), [transposed](Warp& warp) {
    uint16_t element[4][8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const void* from;
      std::memcpy(&from, warp.in[lane], sizeof(from));
      std::memcpy(element[lane / 8][lane % 8], from, 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t result[4];
      for (int m = 0; m < 4; ++m) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = transposed ? element[m][c][r] : element[m][r][c];
        const uint32_t high = transposed ? element[m][c + 1][r] : element[m][r][c + 1];
        result[m] = low | high << 16;
      }
      std::memcpy(warp.out[lane], result, sizeof(result));
    }
  });
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  struct Given {
    uint32_t a[4], b[2];
    float c[4];
  } given = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  together(bf16 ? 4 : 5, &given, sizeof(given), c, sizeof(c), [bf16](Warp& warp) {
    const auto number = [bf16](uint32_t pair) { return bf16 ? bf16_low(pair) : half_low(pair); };
    float left[16][16], right[16][8];
    Given lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(&lanes[lane], warp.in[lane], sizeof(Given));
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {  // registers 0, 1: rows g, g + 8 of columns 2t; 2, 3: the same of 2t + 8
        for (int half = 0; half < 2; ++half) {
          left[g + 8 * (r % 2)][2 * t + half + 8 * (r / 2)] = number(lanes[lane].a[r] >> (16 * half));
        }
      }
      for (int r = 0; r < 2; ++r) {
        for (int half = 0; half < 2; ++half) {
          right[2 * t + half + 8 * r][g] = number(lanes[lane].b[r] >> (16 * half));
        }
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      float sums[4];
      for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[g + 8 * (i / 2)][k] * right[k][2 * t + i % 2];
        sums[i] = lanes[lane].c[i] + sum;
      }
      std::memcpy(warp.out[lane], sums, sizeof(sums));
    }
  });
}

uint32_t e4m3_pair_to_f16(uint32_t codes) {
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes & 0xffffu), __NV_E4M3);
  return static_cast<uint32_t>(pair.x) | static_cast<uint32_t>(pair.y) << 16;
}

void check_alignment(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) {
    fail(std::string(what) + " is not aligned to " + std::to_string(bytes) + " bytes");
  }
}

}  // namespace musubi::host
