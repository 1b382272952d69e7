#include "torch_parallel.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

namespace alignops {
namespace {

// The threads of OpenMP do not live on in a forked process, where the next parallel region would
// wait for them forever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

}  // namespace

ParallelFor torch_parallel_for() {
  return [](int64_t begin, int64_t end, int64_t grain,
            const std::function<void(int64_t, int64_t)>& body) {
    if (forked.load(std::memory_order_relaxed)) {
      if (begin < end) body(begin, end);
      return;
    }
    torch::stable::parallel_for(begin, end, grain,
                                [&body](int64_t b, int64_t e) noexcept { body(b, e); });
  };
}

}  // namespace alignops
