// Runs the C++ tests: exit status 0 when all hold.
#include <cstdio>

#include "testing.h"

int main() {
  musubi_test::test_pages();
  musubi_test::test_pool();
  musubi_test::test_quantize();
  musubi_test::test_linear();
  musubi_test::test_linear_dynamic();
  if (musubi_test::failures == 0) std::printf("all C++ tests passed\n");
  return musubi_test::failures == 0 ? 0 : 1;
}
