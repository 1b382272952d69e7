// Sorting groups of suffixes by their next tokens, many at a time: 8 bytes of text make one integer
// key that compares like the tokens do.
//
// A group holds suffixes with equal first `depth` tokens. Its keys are fetched (text is prefetched:
// every suffix is a cache miss), sorted by bytes from the top, and groups of equal keys go on with
// the following tokens, until `Finish::depth` tokens are equal; then Finish takes over.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "suffix_common.h"

namespace alignops::spans {

// Text with zeros behind its end. The end of the text compares below token 0, so among suffixes
// that are equal with this padding the shorter one is the smaller one.
template <class Token>
class PaddedText {
 public:
  static constexpr uint32_t kPerKey = 8 / sizeof(Token);

  // Keys may start up to `reach` tokens behind the end.
  PaddedText(const void* data, uint64_t size, uint64_t reach)
      : data_(static_cast<const Token*>(data)),
        size_(size),
        direct_(size < kPerKey ? 0 : size - kPerKey + 1),
        tail_(size - direct_ + reach + 2 * kPerKey) {
    std::copy(data_ + direct_, data_ + size, tail_.begin());
  }

  uint64_t size() const { return size_; }
  Token operator[](uint64_t p) const { return data_[p]; }

  uint64_t key(uint64_t p) const {
    uint64_t key;
    std::memcpy(&key, p < direct_ ? data_ + p : tail_.data() + (p - direct_), sizeof(key));
    if constexpr (sizeof(Token) == 1) return __builtin_bswap64(key);
    key = key << 32 | key >> 32;
    if constexpr (sizeof(Token) == 4) return key;
    return (key & 0x0000FFFF0000FFFF) << 16 | (key >> 16 & 0x0000FFFF0000FFFF);
  }
  void prefetch(uint64_t p, uint64_t lines = 1) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data_) + p * sizeof(Token);
    for (uint64_t line = 0; line < lines; ++line)  // a pointer must not leave the text
      // NOLINTNEXTLINE(performance-no-int-to-ptr)
      __builtin_prefetch(reinterpret_cast<const void*>(address + 64 * line));
  }

 private:
  const Token* const data_;
  const uint64_t size_;
  const uint64_t direct_;  // keys from here on come from tail_
  std::vector<Token> tail_;
};

struct KeyedPosition {
  uint64_t key;
  uint32_t position;
};

// A group in sorting takes two entries for each suffix.
inline constexpr uint64_t sort_entry_bytes() { return 2 * sizeof(KeyedPosition); }

inline constexpr uint32_t kSmallGroup = 32;
// Suffixes between two looks at Progress::cancel.
inline constexpr uint64_t kPollEvery = 1 << 16;

inline void insertion_sort(KeyedPosition* entries, uint64_t size) {
  for (uint64_t i = 1; i < size; ++i) {
    const KeyedPosition entry = entries[i];
    uint64_t j = i;
    for (; j > 0 && entries[j - 1].key > entry.key; --j) entries[j] = entries[j - 1];
    entries[j] = entry;
  }
}

// Sorts `from` by key, into itself or into `to`; both are overwritten.
inline void radix_sort(KeyedPosition* from, KeyedPosition* to, uint64_t size, bool into_from,
                       const Watch& watch) {
  uint64_t differing = 0;
  if (size > kSmallGroup) {
    for (uint64_t i = 1; i < size; ++i) differing |= from[i].key ^ from[0].key;
  } else {
    insertion_sort(from, size);
  }
  if (differing == 0) {
    if (!into_from) std::copy(from, from + size, to);
    return;
  }
  if (size >= kPollEvery) watch.poll();
  const int shift = std::max(0, static_cast<int>(std::bit_width(differing)) - 8);
  uint32_t ends[257] = {};
  for (uint64_t i = 0; i < size; ++i) ++ends[(from[i].key >> shift & 0xFF) + 1];
  for (int digit = 0; digit < 256; ++digit) ends[digit + 1] += ends[digit];
  for (uint64_t i = 0; i < size; ++i) to[ends[from[i].key >> shift & 0xFF]++] = from[i];
  for (uint32_t digit = 0, begin = 0; digit < 256; begin = ends[digit++])
    if (const uint32_t count = ends[digit] - begin; count > 0)
      radix_sort(to + begin, from + begin, count, !into_from, watch);
}

// Parts positions in place around a key from the middle: [0, first) below it, [first, second)
// equal, the rest above.
template <class Key, class Prefetch>
std::pair<uint64_t, uint64_t> split_by_key(uint32_t* positions, uint64_t size, const Watch& watch,
                                           const Key& key, const Prefetch& prefetch) {
  constexpr uint64_t kAhead = 24;
  uint64_t sample[9];
  for (uint64_t i = 0; i < 9; ++i) sample[i] = key(positions[i * (size - 1) / 8]);
  std::nth_element(sample, sample + 4, sample + 9);
  const uint64_t pivot = sample[4];
  uint64_t less = 0, more = size;
  for (uint64_t i = 0, steps = 0; i < more; ++steps) {
    if (steps % kPollEvery == 0) watch.poll();
    prefetch(positions[std::min(i + kAhead, size - 1)]);
    const uint64_t k = key(positions[i]);
    if (k < pivot)
      std::swap(positions[i++], positions[less++]);
    else if (k > pivot)
      std::swap(positions[i], positions[--more]);
    else
      ++i;
  }
  return {less, more};
}

// Finish has
//   uint64_t depth              tokens that are compared before
//   group(positions, size)      takes a group that is equal to that depth
//   pair(p, q, depth) -> int    order of two suffixes that are equal to `depth`: < 0, 0 (undecided,
//                               the pair is then given to group()) or > 0
// One object per thread. Groups larger than `capacity` are first split in place.
template <class Token, class Finish>
class GroupSorter {
 public:
  GroupSorter(const PaddedText<Token>& text, const Finish& finish, uint64_t capacity, Watch& watch)
      : text_(text), finish_(finish), capacity_(capacity), watch_(watch) {}

  void sort(uint32_t* positions, uint64_t size, uint64_t depth) {
    groups_.push_back({positions, size, depth});
    while (!groups_.empty()) {
      const Group group = groups_.back();
      groups_.pop_back();
      if (group.size <= kSmallGroup)
        sort_small(group);
      else if (group.depth >= finish_.depth)
        finish_.group(group.positions, group.size);
      else if (group.size > capacity_)
        split(group);
      else
        sort_by_keys(group);
    }
  }

 private:
  static constexpr uint64_t kPerKey = PaddedText<Token>::kPerKey;
  static constexpr uint64_t kAhead = 24;

  struct Group {
    uint32_t* positions;
    uint64_t size, depth;
  };

  void sort_by_keys(const Group& group) {
    reserve(group.size);
    KeyedPosition* const entries = entries_.data();
    uint64_t differing = 0;
    for (uint64_t i = 0; i < group.size; ++i) {
      if (i % kPollEvery == 0) watch_.poll();
      text_.prefetch(group.positions[std::min(i + kAhead, group.size - 1)] + group.depth);
      const uint32_t p = group.positions[i];
      entries[i] = {text_.key(p + group.depth), p};
      differing |= entries[i].key ^ entries[0].key;
    }
    const uint64_t next_depth = group.depth + kPerKey;
    if (differing == 0) {
      groups_.push_back({group.positions, group.size, next_depth});
      return;
    }
    radix_sort(entries, entries + group.size, group.size, true, watch_);
    for (uint64_t i = 0; i < group.size; ++i) group.positions[i] = entries[i].position;
    for (uint64_t begin = 0, end, ahead = 0, poll = kPollEvery; begin < group.size; begin = end) {
      if (begin >= poll) {
        watch_.poll();
        poll = begin + kPollEvery;
      }
      for (end = begin + 1; end < group.size && entries[end].key == entries[begin].key;) ++end;
      for (; ahead < std::min(end + kAhead, group.size - 1); ++ahead)
        if (entries[ahead].key == entries[ahead + 1].key) {
          text_.prefetch(entries[ahead].position + next_depth, 2);
          text_.prefetch(entries[ahead + 1].position + next_depth, 2);
        }
      const Group equal{group.positions + begin, end - begin, next_depth};
      if (equal.size > kSmallGroup)
        groups_.push_back(equal);
      else if (equal.size > 1)
        sort_small(equal);
    }
  }

  void sort_small(Group group) {
    if (group.size == 2) {
      uint32_t* const p = group.positions;
      const int order = finish_.pair(p[0], p[1], group.depth);
      if (order > 0) std::swap(p[0], p[1]);
      if (order == 0) finish_.group(p, 2);
      return;
    }
    KeyedPosition entries[kSmallGroup];
    for (;; group.depth += kPerKey) {
      if (group.size < 2) return;
      if (group.depth >= finish_.depth) {
        finish_.group(group.positions, group.size);
        return;
      }
      uint64_t differing = 0;
      for (uint64_t i = 0; i < group.size; ++i) {
        entries[i] = {text_.key(group.positions[i] + group.depth), group.positions[i]};
        differing |= entries[i].key ^ entries[0].key;
      }
      if (differing != 0) break;
    }
    insertion_sort(entries, group.size);
    for (uint64_t i = 0; i < group.size; ++i) group.positions[i] = entries[i].position;
    for (uint64_t begin = 0, end; begin < group.size; begin = end) {
      for (end = begin + 1; end < group.size && entries[end].key == entries[begin].key;) ++end;
      if (end - begin > 1)
        sort_small({group.positions + begin, end - begin, group.depth + kPerKey});
    }
  }

  void split(const Group& group) {
    const auto [less, more] = split_by_key(
        group.positions, group.size, watch_, [&](uint32_t p) { return text_.key(p + group.depth); },
        [&](uint32_t p) { text_.prefetch(p + group.depth); });
    groups_.push_back({group.positions, less, group.depth});
    groups_.push_back({group.positions + less, more - less, group.depth + kPerKey});
    groups_.push_back({group.positions + more, group.size - more, group.depth});
  }

  void reserve(uint64_t size) {
    if (size <= reserved_) return;
    reserved_ = 0;
    const uint64_t wanted = std::min(capacity_, std::max(size, uint64_t{1} << 12) * 5 / 4);
    entries_.resize(2 * wanted);
    reserved_ = wanted;
  }

  const PaddedText<Token>& text_;
  const Finish& finish_;
  const uint64_t capacity_;
  Watch& watch_;
  std::vector<Group> groups_;
  HugeVector<KeyedPosition> entries_;
  uint64_t reserved_ = 0;
};

}  // namespace alignops::spans
