// Every chunk runs once, nested calls run, several callers do not wait for each other, and a forked child works.
#include "common/pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "testing.h"

namespace musubi_test {
namespace {

bool each_once(int64_t chunks, int threads) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(chunks));
  musubi::parallel_chunks(chunks, threads, [&](int64_t i) { seen[static_cast<size_t>(i)].fetch_add(1); });
  for (const auto& each : seen) {
    if (each.load() != 1) return false;
  }
  return true;
}

void chunks_run_once() {
  for (int round = 0; round < 300; ++round) {
    EXPECT(each_once(round % 17, 1 + round % 5), "round %d", round);
  }
}

void nested_calls_run() {
  std::atomic<int> runs{0};
  musubi::parallel_chunks(4, 3, [&](int64_t) { musubi::parallel_chunks(5, 3, [&](int64_t) { runs.fetch_add(1); }); });
  EXPECT(runs.load() == 20, "%d runs", runs.load());
}

void callers_do_not_disturb_each_other() {
  std::atomic<bool> good{true};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 100; ++round) good = each_once(11, 3) && good;
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT(good.load(), "a chunk was lost or run twice");
}

void a_forked_child_works() {
  const pid_t child = fork();
  if (child == 0) _exit(musubi::pool_workers() == 0 && each_once(50, 3) && musubi::pool_workers() == 2 ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d", status);
  EXPECT(each_once(50, 3), "the parent goes on");
}

}  // namespace

void test_pool() {
  chunks_run_once();
  nested_calls_run();
  callers_do_not_disturb_each_other();
  a_forked_child_works();
}

}  // namespace musubi_test
