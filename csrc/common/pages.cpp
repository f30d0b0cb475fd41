#include "common/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace musubi {
#if defined(__linux__)
namespace {

uintptr_t page_bytes() { return static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace
#endif

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

Pages pages_of(void* data, int64_t bytes, int64_t least_streamed) {
  constexpr int64_t kLeastBytes = int64_t{256} << 10;
  prepare_pages(data, bytes);
  if (bytes < kLeastBytes) return {};
#if defined(__linux__)
  // the page in the middle stands for all
  const uintptr_t page = page_bytes();
  const uintptr_t middle = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes / 2)) / page * page;
  unsigned char there = 1;
  if (mincore(reinterpret_cast<void*>(middle), page, &there) == 0 && (there & 1) == 0) return {false, true};
#else
  static_cast<void>(data);
#endif
  return {bytes >= least_streamed, false};
}

void make_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack; older systems (5.13) refuse it
  const uintptr_t page = page_bytes(), start = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes) + page - 1) / page * page;
  static_cast<void>(madvise(reinterpret_cast<void*>(start), end - start, kPopulateWrite));
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace musubi
