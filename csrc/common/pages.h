// Pages of large results.
#pragma once

#include <cstdint>

namespace musubi {

// Asks for pages of 2 MiB where a large result is about to be written for the first time. With pages of 4 KiB the
// system's share of writing fresh memory is several times that of the arithmetic; memory that has its pages already
// stays as it is.
void prepare_pages(void* data, int64_t bytes);

// Whether a result should be written past the caches: it has at least so many bytes, and has its pages. Fresh pages are
// zeroed on the first write, so that their lines are in a cache already, and writing past it costs more (dequantising
// 3072 x 3072 into fresh memory: 5.3 ms against 3.8; into memory that is there 16 ms against 19 at 13824 x 5120).
bool better_streamed(const void* data, int64_t bytes, int64_t least);

}  // namespace musubi
