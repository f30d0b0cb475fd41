// The package's own threads. The caller of `parallel_for` takes chunks itself and waits only for workers that have
// begun one, so a busy machine costs nothing but the lost help. Workers sleep between calls; a forked child starts
// without any and makes its own when it first needs them.
#pragma once

#include <cstdint>

namespace musubi {

using ChunkBody = void (*)(void* context, int64_t chunk);

// Runs body(context, 0) ... body(context, chunks - 1), each once, on at most `threads` threads, the caller among them.
// The body must not throw. Calls from inside a body run serially.
void parallel_for(int64_t chunks, int threads, ChunkBody body, void* context);

template <class Body>
void parallel_chunks(int64_t chunks, int threads, const Body& body) {
  parallel_for(
      chunks, threads, [](void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// How many worker threads exist now; for tests.
int pool_workers();

}  // namespace musubi
