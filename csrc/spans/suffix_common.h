// What both suffix array builders use: progress with cancelling.
#pragma once

#include <cstdint>
#include <utility>

#include "../common/huge_vector.h"
#include "suffix.h"

namespace alignops::spans {

class Watch {
 public:
  explicit Watch(Progress& progress) : progress_(progress) {}

  void start(uint64_t total) {
    progress_.done = 0;
    progress_.total = total;
    ++progress_.phase;
  }
  void add(uint64_t count) {
    progress_.done.fetch_add(count, std::memory_order_relaxed);
    poll();
  }
  void poll() const {
    if (progress_.cancel.load(std::memory_order_relaxed)) throw Cancelled();
  }
  // body(b, e) for pieces of [begin, end) in order, polling in between.
  template <class Index, class Body>
  void in_pieces(Index begin, Index end, Body body) const {
    constexpr Index kPiece = Index{1} << 18;
    while (begin < end) {
      const Index stop = end - begin > kPiece ? begin + kPiece : end;
      body(begin, stop);
      begin = stop;
      poll();
    }
  }
  // Has the system provide the pages of fresh memory, whose contents are lost. Else the first
  // random accesses would, all within a moment, without polling.
  template <class T>
  void populate(T* memory, uint64_t size) const {
    constexpr uint64_t kStep = 4096 / sizeof(T);
    in_pieces(uint64_t{0}, size, [&](uint64_t begin, uint64_t end) {
      for (uint64_t i = begin; i < end; i += kStep) memory[i] = T{};
    });
  }

 private:
  Progress& progress_;
};

}  // namespace alignops::spans
