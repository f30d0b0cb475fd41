// Pages of fresh results.
#pragma once

#include <cstdint>

namespace musubi {

// Asks for pages of 2 MiB where a large result is about to be written for the first time. With pages of 4 KiB the
// system's share of writing fresh memory is several times that of the arithmetic; memory that has its pages already
// stays as it is.
void prepare_pages(void* data, int64_t bytes);

}  // namespace musubi
