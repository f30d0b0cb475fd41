#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace musubi {
namespace {

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
  const int64_t rounded = ((bytes > 64 ? bytes : 64) + 63) / 64 * 64;
  buffers.bytes[i] = 0;
  buffers.data[i] = std::aligned_alloc(64, static_cast<size_t>(rounded));
  if (buffers.data[i] == nullptr) throw std::bad_alloc();
  buffers.bytes[i] = rounded;
  return buffers.data[i];
}

int64_t scratch_bytes() {
  int64_t total = 0;
  for (int64_t each : buffers.bytes) total += each;
  return total;
}

}  // namespace musubi
