// Fresh memory is told from memory that has its pages, and a part's pages are made where it is written and nowhere
// else.
#include "common/pages.h"

#include <initializer_list>

#include "testing.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace musubi_test {

void test_pages() {
#if defined(__linux__)
  using musubi::pages_of;
  const int64_t page = sysconf(_SC_PAGESIZE), pages = 256;
  void* const made = mmap(nullptr, static_cast<size_t>(pages * page), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  EXPECT(made != MAP_FAILED, "no memory");
  if (made == MAP_FAILED) return;
  static_cast<void>(madvise(made, static_cast<size_t>(pages * page), MADV_NOHUGEPAGE));  // where they come unasked
  uint8_t* const data = static_cast<uint8_t*>(made);
  const int64_t bytes = pages * page, middle = pages / 2 * page;
  const auto there = [&](int64_t number) {
    unsigned char found = 0;
    return mincore(data + number * page, static_cast<size_t>(page), &found) == 0 && (found & 1) != 0;
  };
  const musubi::Pages fresh = pages_of(data, bytes, bytes);
  EXPECT(fresh.fresh && !fresh.stream, "memory without pages");
  EXPECT(!pages_of(data, 1024, 0).fresh, "a small result is not looked at");
  // a part that begins and ends within pages
  musubi::make_pages(data + middle - page / 2, 2 * page);
  const bool populates = there(pages / 2);  // systems before Linux 5.14 refuse, and a write makes each page
  for (int64_t number : {-1, 0, 1})
    EXPECT(!populates || there(pages / 2 + number), "page %d", static_cast<int>(number));
  for (int64_t number : {-2, 2})
    EXPECT(!there(pages / 2 + number), "page %d is not asked for", static_cast<int>(number));
  data[middle] = 1;
  musubi::make_pages(data + middle, 1);
  EXPECT(data[middle] == 1, "what is there stays");
  EXPECT(!pages_of(data, bytes, bytes).fresh && pages_of(data, bytes, bytes).stream, "memory with pages");
  EXPECT(!pages_of(data, bytes, bytes + 1).stream, "too small to be written past the caches");
  munmap(made, static_cast<size_t>(bytes));
#endif
}

}  // namespace musubi_test
