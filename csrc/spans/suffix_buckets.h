// Parallel steps of the radix builder: tasks for the threads, positions bucketed by first token,
// buckets sorted.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "suffix_keys.h"

namespace alignops::spans {

// work(next) runs on every thread: next() gives a task number below `count`, each once, or
// something larger at the end. The first exception ends all and is thrown again here.
template <class Work>
void run_tasks(const ParallelFor& parallel, uint64_t count, const Work& work) {
  constexpr int64_t kMaxThreads = 1024;
  std::atomic<uint64_t> task{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto thread = [&](int64_t, int64_t) {
    try {
      work([&] { return task.fetch_add(1, std::memory_order_relaxed); });
    } catch (...) {
      task = count;
      const std::lock_guard lock(mutex);
      if (error == nullptr) error = std::current_exception();
    }
  };
  parallel(0, std::min(static_cast<int64_t>(count), kMaxThreads), 1, thread);
  if (error != nullptr) std::rethrow_exception(error);
}

// body(task) for all tasks below `count`, by all threads.
template <class Body>
void each_task(const ParallelFor& parallel, uint64_t count, const Body& body) {
  run_tasks(parallel, count, [&](const auto& next) {
    for (uint64_t task; (task = next()) < count;) body(task);
  });
}

// Watch::populate by all threads.
template <class T>
void populate(const ParallelFor& parallel, const Watch& watch, T* memory, uint64_t size) {
  constexpr uint64_t kBlock = uint64_t{1} << 24;
  each_task(parallel, (size + kBlock - 1) / kBlock, [&](uint64_t block) {
    watch.populate(memory + block * kBlock, std::min(kBlock, size - block * kBlock));
  });
}

// Threads for which memory is reckoned.
inline uint64_t sort_threads() { return std::max(1u, std::thread::hardware_concurrency()); }

// Most entries that one thread sorts outside the array. All threads together take about a byte per
// token; large sorts gain nothing from more.
inline uint64_t sort_capacity(uint64_t text_size) {
  return std::clamp(text_size / (sort_entry_bytes() * sort_threads()), uint64_t{1} << 15,
                    uint64_t{1} << 20);
}

// Slices of a text, each counted by itself.
inline constexpr uint64_t kTextSlices = 16;
inline constexpr uint64_t kMaxBuckets = 1 << 16;

// Counters of all slices, for any vocabulary.
inline uint64_t counter_bytes(uint64_t vocab) {
  return (kTextSlices + 2) * sizeof(uint32_t) * (std::min(vocab, kMaxBuckets) + 2);
}

// Tokens in at most 2^16 buckets, in order; SEP has the last one for itself.
template <class Token>
class TokenBuckets {
 public:
  explicit TokenBuckets(uint64_t vocab) {
    while ((vocab >> shift_) > kMaxBuckets) ++shift_;
    separator_ = static_cast<uint32_t>((vocab + (uint64_t{1} << shift_) - 1) >> shift_);
  }

  static constexpr Token kSeparator = std::numeric_limits<Token>::max();

  uint32_t operator()(Token token) const {
    return token == kSeparator ? separator_ : static_cast<uint32_t>(token >> shift_);
  }
  uint32_t size() const { return separator_ + 1; }
  // Leading tokens that are equal within a bucket.
  uint64_t depth() const { return shift_ == 0 ? 1 : 0; }

 private:
  uint32_t shift_ = 0;
  uint32_t separator_ = 0;
};

// Positions of a text, bucketed by first token, ascending in every bucket.
template <class Token>
class Collector {
 public:
  Collector(const PaddedText<Token>& text, const TokenBuckets<Token>& buckets,
            const ParallelFor& parallel, Watch& watch)
      : text_(text), buckets_(buckets), parallel_(parallel), watch_(watch) {
    const uint64_t pieces = (text.size() + kPiece - 1) / kPiece;
    slices_ = std::clamp(pieces, uint64_t{1}, kTextSlices);
    slice_ = (pieces + slices_ - 1) / slices_ * kPiece;
  }

  // body(slice, begin, end) for pieces of the text, at the same time for different slices. Pieces
  // start at multiples of 2^16.
  template <class Body>
  void each_piece(const Body& body) const {
    each_task(parallel_, slices_, [&](uint64_t slice) {
      const uint64_t stop = std::min((slice + 1) * slice_, text_.size());
      for (uint64_t begin = slice * slice_; begin < stop; begin += kPiece) {
        const uint64_t end = std::min(begin + kPiece, stop);
        body(slice, begin, end);
        watch_.add(end - begin);
      }
    });
  }
  uint64_t slices() const { return slices_; }

  // each(begin, end, emit) calls emit(p) for the chosen positions p of [begin, end). Twice, first
  // to count; `to` must have room for them. Returns how many there are.
  template <class Each>
  uint64_t collect(const Each& each, uint32_t* to) {
    const uint32_t size = buckets_.size();
    counts_.assign(slices_ * size, 0);
    each_piece([&](uint64_t slice, uint64_t begin, uint64_t end) {
      uint32_t* const counts = counts_.data() + slice * size;
      each(begin, end, [&](uint64_t p) { ++counts[buckets_(text_[p])]; });
    });
    starts_.resize(size + 1);
    uint32_t start = 0;
    for (uint32_t b = 0; b < size; ++b) {
      starts_[b] = start;
      for (uint64_t s = 0; s < slices_; ++s) start += std::exchange(counts_[s * size + b], start);
    }
    starts_[size] = start;
    each_piece([&](uint64_t slice, uint64_t begin, uint64_t end) {
      uint32_t* const next = counts_.data() + slice * size;
      each(begin, end,
           [&](uint64_t p) { to[next[buckets_(text_[p])]++] = static_cast<uint32_t>(p); });
    });
    return start;
  }

  // Sorts the buckets of `positions`, as collected. Large ones first, so that threads end together.
  template <class Finish>
  void sort(uint32_t* positions, const Finish& finish, uint64_t capacity) const {
    const auto count = [&](uint32_t b) { return starts_[b + 1] - starts_[b]; };
    std::vector<uint32_t> order;
    for (uint32_t b = 0; b < buckets_.size(); ++b)
      if (count(b) > 0) order.push_back(b);
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
      return count(a) != count(b) ? count(a) > count(b) : a < b;
    });
    run_tasks(parallel_, order.size(), [&](const auto& next) {
      GroupSorter<Token, Finish> sorter(text_, finish, capacity, watch_);
      for (uint64_t task; (task = next()) < order.size();) {
        const uint32_t b = order[task];
        sorter.sort(positions + starts_[b], count(b), buckets_.depth());
        watch_.add(count(b));
      }
    });
  }

 private:
  static constexpr uint64_t kPiece = 1 << 16;

  const PaddedText<Token>& text_;
  const TokenBuckets<Token>& buckets_;
  const ParallelFor& parallel_;
  Watch& watch_;
  uint64_t slices_, slice_;
  std::vector<uint32_t> counts_, starts_;
};

}  // namespace alignops::spans
