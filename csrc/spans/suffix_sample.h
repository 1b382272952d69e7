// Ranks of a sample of the suffixes, by which any two suffixes that are equal for long can be
// compared in constant time (Burkhardt, Kaerkkaeinen: Fast lightweight suffix array construction
// and checking, CPM 2003).
//
// The sample is every position whose residue modulo `period` is in a difference cover: a set D such
// that every residue is a difference of two members. Hence for positions i and j there is an offset
// below `period` that moves both into the sample, and suffixes that are equal to that offset are in
// the order of the ranks there. D has about sqrt(1.5 period) members, so a longer period needs less
// memory and more comparing of text.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "suffix_buckets.h"

namespace alignops::spans {

class DifferenceCover {
 public:
  // `period` is a power of two.
  explicit DifferenceCover(uint32_t period)
      : mask_(period - 1),
        log_(static_cast<uint32_t>(std::countr_zero(period))),
        index_(period, kNone),
        anchor_(period, kNone) {
    // Colbourn, Ling: Quorums from difference covers (IPL 2000): steps between members.
    uint32_t r = 0;
    while (24 * r * r + 36 * r + 13 < period) ++r;
    const uint32_t steps[6][2] = {
        {r, 1}, {1, r + 1}, {r, 2 * r + 1}, {2 * r + 1, 4 * r + 3}, {r + 1, 2 * r + 2}, {r, 1}};
    uint32_t member = 0;
    members_.push_back(0);
    for (const auto& [count, step] : steps)
      for (uint32_t i = 0; i < count; ++i) members_.push_back((member += step) & mask_);
    std::sort(members_.begin(), members_.end());
    members_.erase(std::unique(members_.begin(), members_.end()), members_.end());
    for (uint32_t i = 0; i < size(); ++i) index_[members_[i]] = i;
    for (const uint32_t a : members_)
      for (const uint32_t b : members_) anchor_[(b - a) & mask_] = a;
  }

  uint32_t period() const { return mask_ + 1; }
  uint32_t size() const { return static_cast<uint32_t>(members_.size()); }
  const std::vector<uint32_t>& members() const { return members_; }

  // Number of sample positions below `position`.
  uint64_t count_below(uint64_t position) const {
    const auto end = std::lower_bound(members_.begin(), members_.end(), position & mask_);
    return (position >> log_) * size() + static_cast<uint64_t>(end - members_.begin());
  }
  // Number of a sample position.
  uint64_t slot(uint64_t position) const {
    return (position >> log_) * size() + index_[position & mask_];
  }
  // Both positions plus this are in the sample.
  uint32_t offset(uint32_t i, uint32_t j) const { return (anchor_[(j - i) & mask_] - i) & mask_; }

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};
  const uint32_t mask_, log_;
  std::vector<uint32_t> members_, index_, anchor_;
};

// The ranks. Sample suffixes are sorted to `period` tokens like all others, then groups of equal
// ones by rank doubling (Larsson, Sadakane: Faster suffix sorting, 2007): if h tokens of a group
// are equal, the ranks of the suffixes h tokens later order it to 2 h tokens, and these are in the
// sample too, because h is a multiple of the period. All groups are sorted before any rank changes,
// so every thread count does the same.
template <class Token>
class Sample {
 public:
  // `order` and `heads` are work space for cover.count_below(size) entries each; a thread sorts at
  // most `capacity` entries at a time.
  Sample(const PaddedText<Token>& text, const DifferenceCover& cover,
         const TokenBuckets<Token>& buckets, const ParallelFor& parallel, Watch& watch,
         uint32_t* order, uint32_t* heads, uint64_t capacity)
      : text_(text),
        cover_(cover),
        parallel_(parallel),
        watch_(watch),
        size_(cover.count_below(text.size())),
        order_(order),
        heads_(heads),
        capacity_(capacity),
        ranks_(size_) {
    populate(parallel, watch, ranks_.data(), size_);
    watch_.start(2 * text.size() + size_);
    Collector<Token> collector(text, buckets, parallel, watch);
    collector.collect(
        [&](uint64_t begin, uint64_t end, const auto& emit) {
          for (uint64_t block = begin; block < end; block += cover_.period())
            for (const uint32_t member : cover_.members())
              if (block + member < end) emit(block + member);
        },
        order_);
    each_task(parallel_, parts(), [&](uint64_t part) {
      std::iota(heads_ + part_begin(part), heads_ + part_begin(part + 1),
                static_cast<uint32_t>(part_begin(part)));
      watch_.poll();
    });
    collector.sort(order_, ByText{text_, cover_.period(), order_, heads_}, capacity);
    for (uint64_t equal = cover_.period(); update_ranks() > 0; equal *= 2) sort_by_ranks(equal);
  }

  // Order of two suffixes that start with `depth` equal tokens.
  bool less(uint32_t p, uint32_t q, uint64_t depth) const {
    const uint32_t offset = cover_.offset(p, q);
    for (; depth < offset; depth += PaddedText<Token>::kPerKey) {
      const uint64_t a = text_.key(p + depth), b = text_.key(q + depth);
      if (a != b) return a < b;
    }
    // The one that ends first is a prefix of the other.
    if (uint64_t{std::max(p, q)} + offset >= text_.size()) return p > q;
    return ranks_[cover_.slot(uint64_t{p} + offset)] < ranks_[cover_.slot(uint64_t{q} + offset)];
  }

 private:
  // Members of a group have the number of its first entry as head and as rank.
  static constexpr uint32_t kSettled = uint32_t{1} << 31;  // in a head: alone, with its final rank

  struct ByText {
    const PaddedText<Token>& text;
    uint64_t depth;
    uint32_t* order;
    uint32_t* heads;

    void group(uint32_t* positions, uint64_t size) const {
      const auto head = positions - order;
      std::fill(heads + head, heads + head + static_cast<int64_t>(size),
                static_cast<uint32_t>(head));
    }
    int pair(uint32_t p, uint32_t q, uint64_t equal) const {
      for (; equal < depth; equal += PaddedText<Token>::kPerKey) {
        const uint64_t a = text.key(p + equal), b = text.key(q + equal);
        if (a != b) return a < b ? -1 : 1;
      }
      return 0;
    }
  };

  // Parts of the sample for the threads.
  uint64_t parts() const { return std::min<uint64_t>(size_ / 4096 + 1, 1024); }
  uint64_t part_begin(uint64_t part) const { return size_ * part / parts(); }

  // Parts that divide no group.
  std::vector<uint64_t> group_parts() const {
    std::vector<uint64_t> begins(parts() + 1, 0);
    for (uint64_t part = 1; part < parts(); ++part) {
      uint64_t begin = std::max(begins[part - 1], part_begin(part));
      for (; begin < size_ && (heads_[begin] & ~kSettled) != begin; ++begin)
        if (begin % kPollEvery == 0) watch_.poll();
      begins[part] = begin;
    }
    begins.back() = size_;
    return begins;
  }

  // Returns how many suffixes are not alone in their group.
  uint64_t update_ranks() {
    const std::vector<uint64_t> begins = group_parts();
    std::atomic<uint64_t> open{0};
    each_task(parallel_, parts(), [&](uint64_t part) {
      uint64_t found = 0;
      for (uint64_t i = begins[part], end = begins[part + 1]; i < end; ++i) {
        if (i % kPollEvery == 0) watch_.poll();
        const uint32_t head = heads_[i];
        if (head >= kSettled) continue;
        ranks_[cover_.slot(order_[i])] = head;
        if (head == i && (i + 1 == end || heads_[i + 1] != head))
          heads_[i] |= kSettled;
        else
          ++found;
      }
      open += found;
    });
    return open;
  }

  void sort_by_ranks(uint64_t equal) {
    const std::vector<uint64_t> begins = group_parts();
    const uint64_t skip = cover_.count_below(equal);
    const auto key = [&, equal, skip](uint32_t p) {
      // A suffix that has ended is smaller than the others. It is alone: the separator at the end
      // of the text tells those that have ended apart.
      return p + equal < text_.size() ? uint64_t{ranks_[cover_.slot(p) + skip]} + 1 : 0;
    };
    run_tasks(parallel_, parts(), [&](const auto& next) {
      std::vector<KeyedPosition> entries;
      for (uint64_t part; (part = next()) < parts();) {
        const uint64_t stop = begins[part + 1];
        for (uint64_t begin = begins[part], end; begin < stop; begin = end) {
          end = begin + 1;
          if (heads_[begin] >= kSettled) continue;
          while (end < stop && heads_[end] == heads_[begin]) ++end;
          sort_group(begin, end, key, entries);
        }
        watch_.poll();
      }
    });
  }

  template <class Key>
  void sort_group(uint64_t begin, uint64_t end, const Key& key,
                  std::vector<KeyedPosition>& entries) {
    while (end - begin > capacity_) {
      const auto [less, more] =
          split_by_key(order_ + begin, end - begin, watch_, key, [](uint32_t) {});
      sort_group(begin, begin + less, key, entries);
      std::fill(heads_ + begin + less, heads_ + begin + more, static_cast<uint32_t>(begin + less));
      begin += more;
    }
    const uint64_t size = end - begin;
    if (entries.size() < 2 * size) entries.resize(2 * size);
    for (uint64_t i = 0; i < size; ++i) entries[i] = {key(order_[begin + i]), order_[begin + i]};
    radix_sort(entries.data(), entries.data() + size, size, true, watch_);
    uint64_t head = 0;
    for (uint64_t i = 0; i < size; ++i) {
      if (entries[i].key != entries[head].key) head = i;
      order_[begin + i] = entries[i].position;
      heads_[begin + i] = static_cast<uint32_t>(begin + head);
    }
  }

  const PaddedText<Token>& text_;
  const DifferenceCover& cover_;
  const ParallelFor& parallel_;
  Watch& watch_;
  const uint64_t size_;
  uint32_t *const order_, *const heads_;  // used by the constructor only
  const uint64_t capacity_;
  HugeVector<uint32_t> ranks_;
};

}  // namespace alignops::spans
