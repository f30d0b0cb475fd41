#include "common/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

namespace musubi {
namespace {

// One call of parallel_for. It lives on the caller's stack: a worker may touch it only between enter() and leave(),
// and the caller does not return before everybody who entered has left.
struct Job {
  int64_t chunks;
  ChunkBody body;
  void* context;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) body(context, chunk);
  }
};

thread_local bool inside = false;

class Pool {
 public:
  void run(Job& job, int helpers) {
    std::unique_lock<std::mutex> turn(turns_, std::try_to_lock);
    if (!turn.owns_lock()) return job.work();  // another thread uses the workers: go on alone
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      job_ = &job;
      seats_ = helpers;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // from here on nobody enters
    idle_.wait(lock, [this] { return working_ == 0; });
  }

  int workers() {
    std::lock_guard<std::mutex> lock(mutex_);
    return workers_;
  }

 private:
  void grow(int wanted) {
    for (; workers_ < wanted; ++workers_) {
      std::thread([this] { serve(); }).detach();
    }
  }

  void serve() {
    inside = true;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ != nullptr && seats_ > 0; });
      --seats_;
      ++working_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--working_ == 0) idle_.notify_one();
    }
  }

  std::mutex turns_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  Job* job_ = nullptr;
  int seats_ = 0;
  int working_ = 0;
  int workers_ = 0;
};

// Never destroyed: workers may outlive static destruction. A forked child gets a fresh one and leaks the parent's,
// whose threads do not exist there.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  Pool* known = current.load(std::memory_order_acquire);
  if (known != nullptr) return *known;
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); }); });
  auto fresh = std::make_unique<Pool>();
  if (current.compare_exchange_strong(known, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
  return *known;
}

}  // namespace

void parallel_for(int64_t chunks, int threads, ChunkBody body, void* context) {
  Job job{chunks, body, context};
  const int helpers = static_cast<int>(std::min<int64_t>(threads, chunks)) - 1;
  if (helpers <= 0 || inside) return job.work();
  inside = true;
  pool().run(job, helpers);
  inside = false;
}

int pool_workers() { return pool().workers(); }

}  // namespace musubi
