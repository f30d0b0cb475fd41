// Memory that kernels reuse between calls: fresh pages cost more to touch than the work done on them.
#pragma once

#include <cstdint>

namespace musubi {

enum class Slot : int { packed, panel, sums, rows, count };

// At least `bytes`, aligned to 64, owned by the calling thread; contents are undefined. A later call for the same slot
// on the same thread may move it. Throws std::bad_alloc.
void* scratch(Slot slot, int64_t bytes);

// The most bytes that this thread has held at once, all slots together; for tests.
int64_t scratch_bytes();

}  // namespace musubi
