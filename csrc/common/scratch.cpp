#include "common/scratch.h"

#include <cstdlib>
#include <new>

#include "common/pages.h"

namespace musubi {
namespace {

constexpr int64_t kLargeBytes = int64_t{2} << 20;

struct Buffers {
  void* data[static_cast<int>(Slot::count)] = {};
  int64_t bytes[static_cast<int>(Slot::count)] = {};
  ~Buffers() {
    for (void* each : data) std::free(each);
  }
};

thread_local Buffers buffers;

}  // namespace

void* scratch(Slot slot, int64_t bytes) {
  const int i = static_cast<int>(slot);
  if (buffers.bytes[i] >= bytes && buffers.data[i] != nullptr) return buffers.data[i];
  std::free(buffers.data[i]);
  // large buffers begin at a page of 2 MiB and ask for such pages: small ones would cost a miss of the TLB each
  const size_t alignment = bytes >= kLargeBytes ? kLargeBytes : 64;
  const int64_t rounded = ((bytes > 64 ? bytes : 64) + 63) / 64 * 64;
  buffers.bytes[i] = 0;
  buffers.data[i] = nullptr;
  if (posix_memalign(&buffers.data[i], alignment, static_cast<size_t>(rounded)) != 0) throw std::bad_alloc();
  prepare_pages(buffers.data[i], rounded);
  buffers.bytes[i] = rounded;
  return buffers.data[i];
}

int64_t scratch_bytes() {
  int64_t total = 0;
  for (int64_t each : buffers.bytes) total += each;
  return total;
}

}  // namespace musubi
