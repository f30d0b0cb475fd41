#include "common/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace musubi {

void prepare_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int64_t kLeastBytes = int64_t{4} << 20;
  if (bytes < kLeastBytes) return;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // a hint: where the system has none to give, the result is as good
  if (end > start) static_cast<void>(madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE));
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

bool better_streamed(const void* data, int64_t bytes, int64_t least) {
  if (bytes < least) return false;
#if defined(__linux__)
  // the page in the middle stands for all
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t middle = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes / 2)) / page * page;
  unsigned char there = 1;
  if (mincore(reinterpret_cast<void*>(middle), page, &there) == 0) return (there & 1) != 0;
#else
  static_cast<void>(data);
#endif
  return true;
}

}  // namespace musubi
