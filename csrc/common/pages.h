// Pages of large results.
#pragma once

#include <cstdint>

namespace musubi {

// Asks for pages of 2 MiB where a large result is about to be written for the first time. With pages of 4 KiB the
// system's share of writing fresh memory is several times that of the arithmetic; memory that has its pages already
// stays as it is.
void prepare_pages(void* data, int64_t bytes);

// How a result is best written.
struct Pages {
  // Past the caches: it is large, and has its pages. Fresh pages are zeroed on the first write, so that their lines are
  // in a cache already, and writing past it costs more (dequantising 3072 x 3072 into fresh memory: 5.3 ms against 3.8;
  // into memory that is there 16 ms against 19 at 13824 x 5120).
  bool stream = false;
  bool fresh = false;  // it has no pages yet
};

// Of a result that is about to be written whole; asks for large pages as above.
Pages pages_of(void* data, int64_t bytes, int64_t least_streamed);

// Makes the pages of a part of a fresh result, just before it is written: one call to the system for all takes two
// thirds of the time of a fault for each, and what it has zeroed is still in a cache.
void make_pages(void* data, int64_t bytes);

}  // namespace musubi
