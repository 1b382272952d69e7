// Suffix arrays of a shard's text: the sorted positions of all suffixes that start with a token.
//
// Text: n tokens of 1, 2 or 4 bytes, every document closed by one separator SEP (the largest value
// of the width), so the last token is SEP. Ids are below `vocab`. Suffixes compare as sequences of
// unsigned integers; the end of the text is smaller than every id. Suffixes that start with SEP
// sort last and are not part of the result, whose length N is n minus the number of separators. The
// order is total: every builder gives the same array, for any number of threads.
//
//   sais    induced sorting, linear time, one thread, n + vocab < 2^31
//   radix   parallel radix sort of packed keys; suffixes that are equal for long are told apart by
//           the ranks of a sample of the suffixes; n < 2^32, O(n log n) also on repeats. Also
//           batch by batch, for a text and an array that do not fit in memory
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "../common/parallel.h"
#include "errors.h"

namespace alignops::spans {

// Shared with the thread that watches a build. `done` of `total` are tokens times passes of one
// phase; `phase` counts up from 1. A builder looks at `cancel` at least every 50 ms and then throws
// Cancelled; `out` is unspecified after that.
struct Progress {
  std::atomic<uint64_t> done{0}, total{0};
  std::atomic<int> phase{0};
  std::atomic<bool> cancel{false};
};

struct SuffixJob {
  const void* text;  // aligned to token_bytes
  int32_t token_bytes;
  uint64_t text_size;  // n, separators included
  uint64_t vocab;
  uint32_t* out;  // room for n entries, of which the first N are the result; unused by
                  // build_radix_stream
  const ParallelFor& parallel;
  Progress& progress;
  uint64_t mem_bytes;  // budget of build_radix_stream
};

// Takes the next `count` positions in rank order, on the thread that called the builder. May throw.
using SuffixSink = std::function<void(const uint32_t* positions, uint64_t count)>;

// Peak memory in bytes: text, `out` and the builder's own. For the stream: the least mem_bytes that
// it accepts, to which the text, a read-only mapping, does not count.
uint64_t sais_bytes(uint64_t text_size, int32_t token_bytes, uint64_t vocab);
uint64_t radix_bytes(uint64_t text_size, int32_t token_bytes, uint64_t vocab);
uint64_t radix_stream_bytes(uint64_t text_size, int32_t token_bytes, uint64_t vocab);

// Return N. The caller has checked sizes and ids. Throw std::bad_alloc and Cancelled only, and what
// the sink throws.
uint64_t build_sais(const SuffixJob& job);
uint64_t build_radix(const SuffixJob& job);
uint64_t build_radix_stream(const SuffixJob& job, const SuffixSink& sink);

}  // namespace alignops::spans
