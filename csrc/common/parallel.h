// How long native work is spread over threads: the caller hands in a callable. In the package it is
// torch's (common/torch_parallel.h); C++ tests take one of those below.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace alignops {

// Calls body(b, e) for ranges that together are [begin, end), each at least `grain` long (the last
// one may be shorter), possibly at the same time, and returns when all have ended. Bodies must not
// throw.
using ParallelFor = std::function<void(int64_t begin, int64_t end, int64_t grain,
                                       const std::function<void(int64_t, int64_t)>& body)>;

inline ParallelFor serial_for() {
  return
      [](int64_t begin, int64_t end, int64_t, const std::function<void(int64_t, int64_t)>& body) {
        if (begin < end) body(begin, end);
      };
}

// New threads for every call: for tests.
inline ParallelFor threads_for(int count) {
  return [count](int64_t begin, int64_t end, int64_t grain,
                 const std::function<void(int64_t, int64_t)>& body) {
    if (begin >= end) return;
    const int64_t step = std::max<int64_t>({grain, 1, (end - begin + count - 1) / count});
    std::vector<std::thread> threads;
    for (int64_t b = begin; b < end; b += step)
      threads.emplace_back([&body, b, e = std::min(b + step, end)] { body(b, e); });
    for (std::thread& thread : threads) thread.join();
  };
}

}  // namespace alignops
