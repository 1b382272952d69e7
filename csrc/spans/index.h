// Queries over all shards of an index. Counts add up over the shards, longest matches take the
// longest, so no answer depends on how the documents were spread; nor on the number of threads.
// Answers are those of the documents that were not removed, and ranks are live ones (removed.h).
//
// All methods are const and safe to call from any thread. They throw std::out_of_range for ids
// outside the vocabulary, std::invalid_argument for other bad arguments, IndexCorruptError for
// damaged files.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "../common/parallel.h"
#include "kernels.h"
#include "store.h"

namespace alignops::spans {

// Token ids of a caller.
using Ids =
    std::variant<std::span<const uint8_t>, std::span<const uint16_t>, std::span<const uint32_t>,
                 std::span<const int32_t>, std::span<const int64_t>>;

// Checked token ids in the width of the text, with padding for the kernels. Row i is the tokens
// [offsets[i], offsets[i + 1]).
struct Batch {
  std::vector<uint8_t> tokens;
  std::vector<int64_t> offsets;

  int64_t rows() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t size() const { return offsets.back(); }
};

struct Hits {
  std::vector<int64_t> row, shard, position, document, offset;
};

struct SpanFilter {
  int64_t min_len = 1;
  std::optional<int64_t> max_count;
  std::span<const uint8_t>
      word_start;  // per token of the batch, not 0 where a word starts; or none
  std::optional<Ids> delimiters;
};

// Spans [start, end) of rows; places count from the start of the row.
struct SpanList {
  std::vector<int64_t> row, start, end, count;
};

struct Next {
  std::vector<int64_t> ids, counts;
};

class Index {
 public:
  Index(std::shared_ptr<const Store> store, ParallelFor parallel);

  const Store& store() const { return *store_; }
  int64_t num_shards() const { return store_->num_shards(); }

  // `op` and `argument` name the call in messages. Without offsets: one row.
  Batch encode(const char* op, const char* argument, const Ids& ids) const;
  Batch encode(const char* op, const char* argument, const Ids& ids,
               std::span<const int64_t> offsets) const;

  // (rows, shards, 2): ranks [lo, hi) of the suffixes that start with the row.
  void find(const Batch& batch, int64_t* intervals) const;
  // (rows)
  void count(const Batch& batch, int64_t* counts) const;
  // Occurrences of rows by number: occurrence i of a row is the i-th one in the intervals of all
  // shards, one after the other. Throws std::out_of_range for what does not exist.
  Hits occurrences(const Batch& batch, std::span<const int64_t> rows,
                   std::span<const int64_t> numbers) const;
  // The suffixes at these ranks of a shard, without rows. Throws std::out_of_range for what does
  // not exist.
  Hits hits(int64_t shard, std::span<const int64_t> ranks) const;

  // Matching statistics, (size): from each token of a row the longest match inside the row, at
  // most max_match, and its count unless `counts` is null.
  void match(const Batch& batch, int64_t max_match, int64_t* lengths, int64_t* counts) const;
  // Lengths, (rows), of the longest prefix and suffix that occur.
  void longest_prefix(const Batch& batch, int64_t max_match, int64_t* lengths) const;
  void longest_suffix(const Batch& batch, int64_t max_match, int64_t* lengths) const;
  // From each token (each word start): the longest match, cut after its first delimiter, backed off
  // until a word starts behind it; kept if it is long and rare enough and ends after every kept one
  // before it.
  SpanList maximal_spans(const char* op, const Batch& batch, int64_t max_match,
                         const SpanFilter& filter) const;

  // Of one context, the only row of the batch. (tokens of candidates): counts of context +
  // candidate.
  void next_counts(const Batch& context, const Batch& candidates, int64_t* counts) const;
  // The tokens that follow it, ascending.
  Next next_dist(const Batch& context) const;
  // (numbers) the token that follows each of these occurrences, -1 at the end of a document.
  void next_tokens(const Batch& context, std::span<const int64_t> numbers, int64_t* tokens) const;
  // How often it ends a document.
  int64_t eos_count(const Batch& context) const;

 private:
  // Ranks, those of removed documents among them.
  struct Intervals {
    std::vector<int64_t> lo, hi;
  };
  // Ranks of one shard and the places of the answers.
  struct Picked {
    std::vector<int64_t> rank, place;
  };

  const Kernels& begin_batch() const;
  Hits hits_at(const Kernels& kernels, int32_t s, std::span<const int64_t> ranks) const;
  uint32_t token(const Batch& batch, int64_t i) const;
  template <class Call>
  void search(int32_t s, int64_t items, const Call& call) const;
  Intervals find_rows(const Kernels& kernels, int32_t s, const uint8_t* tokens,
                      const int64_t* begin, const int64_t* end, int64_t rows) const;
  std::vector<int64_t> count_rows(const Kernels& kernels, const Batch& batch,
                                  const std::vector<int64_t>& begin,
                                  const std::vector<int64_t>& end) const;
  std::vector<Picked> pick(const Batch& batch, std::span<const int64_t> rows,
                           std::span<const int64_t> numbers) const;
  void longest(const Batch& batch, const std::vector<int64_t>& begin,
               const std::vector<int64_t>& end, int64_t* lengths, int64_t* counts) const;
  void shorten(const Kernels& kernels, int32_t s, const Batch& batch,
               const std::vector<int64_t>& begin, std::vector<int64_t>& length,
               Intervals& found) const;
  std::vector<uint32_t> tokens_at(const Kernels& kernels, int32_t s,
                                  const std::vector<int64_t>& ranks, int64_t depth) const;

  std::shared_ptr<const Store> store_;
  ParallelFor parallel_;
};

// Rank i of k spread evenly over m: floor((2 i + 1) m / (2 k)), for k <= 2^31.
inline int64_t spread(int64_t i, int64_t k, int64_t m) {
  const auto part = static_cast<uint64_t>(2 * i + 1), parts = static_cast<uint64_t>(2 * k);
  const auto whole = static_cast<uint64_t>(m);
  return static_cast<int64_t>(part * (whole / parts) + part * (whole % parts) / parts);
}

// Calls call(shard, begin, end), which returns a Fault, for ranges of items.
template <class Call>
void Index::search(int32_t s, int64_t items, const Call& call) const {
  // About 50 us of searching, and enough to keep kWays searches in flight.
  constexpr int64_t kGrain = 2 * kWays;
  std::atomic<bool> failed{false};
  Fault first;
  parallel_(0, items, kGrain, [&](int64_t begin, int64_t end) {
    if (failed.load(std::memory_order_relaxed)) return;
    const Fault fault = call(store_->shard(s), begin, end);
    if (fault.status != Status::kOk && !failed.exchange(true)) first = fault;
  });
  if (failed.load()) store_->raise(s, first);
}

}  // namespace alignops::spans
