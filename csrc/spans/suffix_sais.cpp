// Suffix array by induced sorting (Nong, Zhang, Chan: Linear suffix array construction by almost
// pure induced sorting, DCC 2009).
//
// A suffix is S if it is smaller than its right neighbour, else L; the last one is L. LMS: an S
// suffix whose left neighbour is L.
//   1 sort the LMS substrings (from one LMS position to the next): bucket them by first token, then
//     from them the L, from those the S suffixes, each in one scan
//   2 name equal substrings equally; unless all names differ, sort the string of names by recursion
//   3 with the LMS suffixes in order, induce the L, then the S suffixes in the same way
//
// The scans are bound by memory latency, so entries are laid out to decide as much as possible
// without the text, and text is prefetched. In step 1 suffixes are kept in four zones, each
// bucketed by first token: LMS, L before L, L before S, S before S. What one scan reads and needs
// not is in another zone, and the sorted LMS positions come out dense. In step 3 the top bit of an
// entry says that the current scan has nothing to induce from it.
//
// Memory: the array itself serves as work space of every level. Three counters per symbol of a
// level are in the array's unused tail if it is large enough there, else allocated.
#include <algorithm>
#include <utility>

#include "suffix.h"
#include "suffix_common.h"

namespace alignops::spans {
namespace {

constexpr uint32_t kDone = uint32_t{1} << 31;
constexpr uint32_t kNone = ~uint32_t{0};
// Entries between a prefetch of text and its use.
constexpr uint32_t kAhead = 32;

// How a token becomes an index: as it is, or with SEP moved down to the vocabulary's end.
struct Direct {
  template <class Token>
  uint32_t operator()(Token token) const {
    return token;
  }
};
struct Clamped {
  uint32_t vocab;
  uint32_t operator()(uint32_t token) const { return std::min(token, vocab); }
};

// One level: `text` of `n` symbols, which as array indices are below `k`; `sa` has room for `room`
// >= n entries and gets the sorted positions of all suffixes.
template <class Token, class Symbol>
class Level {
 public:
  Level(const Token* text, uint32_t n, Symbol symbol, uint32_t k, uint32_t* sa, uint32_t room,
        Watch& watch)
      : text_(text), n_(n), symbol_(symbol), k_(k), sa_(sa), room_(room), watch_(watch) {}

  void sort() {
    if (n_ == 0) return;
    watch_.start(uint64_t{4} * n_);
    sort_lms_substrings();
    if (lms_ > 1) sort_lms_suffixes();
    watch_.start(uint64_t{3} * n_);
    induce_all();
  }

 private:
  // Text from right to left with types: body(position, class of it), the class being
  // 2 * (position is S) + (left neighbour is S); position 0 is left out.
  template <class Body>
  void classify(Body body) const {
    uint32_t type = 0;
    for (uint32_t end = n_; end > 1;) {
      const uint32_t begin = end > kChunk ? end - kChunk : 1;
      for (uint32_t i = end; i-- > begin;) {
        const Token left = text_[i - 1], here = text_[i];
        const uint32_t left_type =
            static_cast<uint32_t>(left < here) | (static_cast<uint32_t>(left == here) & type);
        body(i, here, 2 * type + left_type);
        type = left_type;
      }
      watch_.add(end - begin);
      end = begin;
    }
  }

  // LMS positions from right to left, dense blocks at a time.
  template <class Body>
  void each_lms(Body body) const {
    uint32_t found[kBlock + 1], count = 0;
    classify([&](uint32_t i, Token, uint32_t kind) {
      found[count] = i;
      count += kind == 2;
      if (count == kBlock) {
        for (uint32_t f = 0; f < count; ++f) body(found[f]);
        count = 0;
      }
    });
    for (uint32_t f = 0; f < count; ++f) body(found[f]);
  }

  static void prefetch(const void* p) { __builtin_prefetch(p); }
  void prefetch_text(uint32_t entry) const {
    // Unwritten entries point anywhere, where a pointer must not; nothing is read here.
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(text_) +
                                           uintptr_t{entry & ~kDone} * sizeof(Token)));
  }

  // Reports work; buckets can be tiny.
  void tick(uint32_t count) {
    ticked_ += count;
    if (ticked_ < kChunk) return;
    watch_.add(ticked_);
    ticked_ = 0;
  }

  void take_counters() {
    uint32_t* counters = sa_ + n_;
    if ((room_ - n_) / 3 < k_) {
      owned_.resize(uint64_t{3} * k_);
      counters = owned_.data();
    }
    a_ = counters;
    b_ = counters + k_;
    e_ = counters + uint64_t{2} * k_;
  }

  void clear(uint32_t* counts) const {
    watch_.in_pieces(uint32_t{0}, k_, [&](uint32_t begin, uint32_t end) {
      std::fill(counts + begin, counts + end, 0);
    });
  }
  // Counts become bucket ends, the first bucket starting at `base`. Returns the last end.
  uint32_t to_ends(uint32_t* counts, uint32_t base) const {
    watch_.in_pieces(uint32_t{0}, k_, [&](uint32_t begin, uint32_t end) {
      for (uint32_t c = begin; c < end; ++c) counts[c] = base += counts[c];
    });
    return base;
  }
  // Counts become bucket starts. Returns the end of the last bucket.
  uint32_t to_starts(uint32_t* counts, uint32_t base) const {
    watch_.in_pieces(uint32_t{0}, k_, [&](uint32_t begin, uint32_t end) {
      for (uint32_t c = begin; c < end; ++c) base += std::exchange(counts[c], base);
    });
    return base;
  }

  // Step 1. Zones of sa_: LMS (e_), L before L (a_), L before S (b_), S before S (a_ again).
  void sort_lms_substrings() {
    take_counters();
    clear(a_);
    clear(b_);
    clear(e_);
    uint32_t* const counts[4] = {a_, b_, e_, e_};
    classify(
        [&](uint32_t, Token token, uint32_t kind) { counts[kind][symbol_(token)] += kind != 3; });
    lms_ = to_ends(e_, 0);
    const uint32_t before_s = to_starts(a_, lms_);
    const uint32_t s_zone = to_starts(b_, before_s);
    each_lms([&](uint32_t i) { sa_[--e_[symbol_(text_[i])]] = i; });
    // e_ is now starts; the end of a bucket is the start of the next.
    induce_l_of_substrings();
    clear(a_);
    clear(e_);
    uint32_t* const counts_s[4] = {a_, a_, e_, a_};
    classify(
        [&](uint32_t, Token token, uint32_t kind) { counts_s[kind][symbol_(token)] += kind >> 1; });
    to_ends(e_, 0);
    to_ends(a_, s_zone);
    induce_s_of_substrings(before_s);
  }

  void induce_l_of_substrings() {
    const auto induce = [this](uint32_t entry) {
      const uint32_t j = entry - 1;
      if (j == 0) return;
      const Token token = text_[j];
      const uint32_t c = symbol_(token);
      uint32_t* const zone = text_[j - 1] >= token ? a_ : b_;
      sa_[zone[c]++] = j;
    };
    induce(n_);
    uint32_t i = lms_, s = 0;
    for (uint32_t c = 0; c < k_; ++c) {
      while (i < a_[c]) {
        uint32_t chunk = kChunk;
        const uint32_t before = i;
        for (; i < a_[c] && chunk-- > 0; ++i) {
          prefetch_text(sa_[std::min(i + kAhead, n_ - 1)]);
          induce(sa_[i]);
        }
        tick(i - before);
      }
      const uint32_t end = c + 1 < k_ ? e_[c + 1] : lms_;
      while (s < end) {
        const uint32_t stop = std::min(end, s + kChunk);
        tick(stop - s);
        for (; s < stop; ++s) {
          prefetch_text(sa_[std::min(s + kAhead, n_ - 1)]);
          induce(sa_[s]);
        }
      }
    }
  }

  // b_ holds the ends of the zone "L before S", which starts at `l_begin`.
  void induce_s_of_substrings(uint32_t l_begin) {
    const auto induce = [this](uint32_t entry) {
      const uint32_t j = entry - 1;
      if (j == 0) return;
      const Token token = text_[j];
      const uint32_t c = symbol_(token);
      uint32_t* const zone = text_[j - 1] > token ? e_ : a_;
      sa_[--zone[c]] = j;
    };
    uint32_t i = a_[k_ - 1];
    uint32_t l = b_[k_ - 1];
    for (uint32_t c = k_; c-- > 0;) {
      while (i > a_[c]) {
        uint32_t chunk = kChunk;
        const uint32_t before = i;
        while (i > a_[c] && chunk-- > 0) {
          prefetch_text(sa_[i - std::min(i, kAhead)]);
          induce(sa_[--i]);
        }
        tick(before - i);
      }
      const uint32_t begin = c > 0 ? b_[c - 1] : l_begin;
      while (l > begin) {
        const uint32_t stop = std::max(begin, l - std::min(l, kChunk));
        tick(l - stop);
        while (l > stop) {
          prefetch_text(sa_[l - std::min(l, kAhead)]);
          induce(sa_[--l]);
        }
      }
    }
  }

  // Tokens of the LMS substring at `p`, its last one (that of the next LMS position) included, or
  // kNone for the last substring, which ends with the text and equals no other.
  uint32_t substring_length(uint32_t p) const {
    uint32_t i = p;
    while (i + 1 < n_ && text_[i + 1] >= text_[i]) ++i;
    // Down to the last strict descent before the next rise.
    uint32_t end = kNone;
    for (; i + 1 < n_; ++i) {
      if (text_[i + 1] > text_[i]) return end - p + 1;
      if (text_[i + 1] < text_[i]) end = i + 1;
    }
    return kNone;
  }

  // Step 2: sa_[0, lms_) holds the LMS positions by substring; afterwards by suffix.
  void sort_lms_suffixes() {
    uint32_t* const by_position = sa_ + lms_;
    watch_.in_pieces(uint32_t{0}, n_ / 2, [&](uint32_t begin, uint32_t end) {
      std::fill(by_position + begin, by_position + end, kNone);
    });
    watch_.start(lms_);
    uint32_t name = 0, last = 0, last_length = kNone;
    for (uint32_t i = 0; i < lms_; ++i) {
      if (i % kChunk == 0) watch_.add(std::min(kChunk, lms_ - i));
      prefetch_text(sa_[std::min(i + kAhead, lms_ - 1)]);
      const uint32_t p = sa_[i];
      const uint32_t length = substring_length(p);
      const bool same = length == last_length && length != kNone &&
                        std::equal(text_ + p, text_ + p + length, text_ + last);
      if (i > 0 && !same) ++name;
      by_position[p / 2] = name;
      last = p;
      last_length = length;
    }
    if (name + 1 == lms_) return;
    // Names in text order to the end of the array. From the right: nothing is overwritten unread.
    uint32_t* const reduced = sa_ + (n_ - lms_);
    uint32_t to = lms_;
    watch_.in_pieces(uint32_t{0}, n_ / 2, [&](uint32_t begin, uint32_t end) {
      for (uint32_t from = n_ / 2 - begin; from-- > n_ / 2 - end;)
        if (by_position[from] != kNone) reduced[--to] = by_position[from];
    });
    owned_.resize(0);
    Level<uint32_t, Direct>(reduced, lms_, {}, name + 1, sa_, n_ - lms_, watch_).sort();
    watch_.start(n_);
    to = lms_;
    each_lms([&](uint32_t i) { reduced[--to] = i; });
    watch_.in_pieces(uint32_t{0}, lms_, [&](uint32_t begin, uint32_t end) {
      for (uint32_t i = begin; i < end; ++i) {
        prefetch(reduced + sa_[std::min(i + kAhead, lms_ - 1)]);
        sa_[i] = reduced[sa_[i]];
      }
    });
  }

  // Step 3.
  void induce_all() {
    take_counters();
    clear(a_);
    clear(e_);
    uint32_t* const counts[4] = {a_, a_, e_, a_};
    // a_ counts all but LMS, e_ LMS.
    classify([&](uint32_t, Token token, uint32_t kind) { ++counts[kind][symbol_(token)]; });
    ++a_[symbol_(text_[0])];
    uint32_t end = 0;
    for (uint32_t c = 0; c < k_; ++c) {
      const uint32_t begin = end;
      end += a_[c] + e_[c];
      a_[c] = begin;
      b_[c] = end;
    }
    for (uint32_t c = k_, from = lms_; c-- > 0;) {
      std::copy_backward(sa_ + (from - e_[c]), sa_ + from, sa_ + b_[c]);
      from -= e_[c];
      if (c % kChunk == 0) watch_.poll();
    }
    induce_l();
    induce_s();
  }

  void induce_l() {
    const auto induce = [this](uint32_t entry) {
      const uint32_t j = entry - 1;
      const Token token = text_[j];
      const bool more = j > 0 && text_[j - 1] >= token;
      sa_[a_[symbol_(token)]++] = more ? j : j | kDone;
    };
    induce(n_);
    uint32_t i = 0;
    for (uint32_t c = 0; c < k_; ++c) {
      while (i < a_[c]) {
        uint32_t chunk = kChunk;
        const uint32_t before = i;
        for (; i < a_[c] && chunk-- > 0; ++i) {
          prefetch_text(sa_[std::min(i + kAhead, n_ - 1)]);
          const uint32_t entry = sa_[i];
          sa_[i] = entry ^ kDone;
          if (entry < kDone) induce(entry);
        }
        tick(i - before);
      }
      uint32_t s = b_[c] - e_[c];
      while (s < b_[c]) {
        const uint32_t stop = std::min(b_[c], s + kChunk);
        tick(stop - s);
        for (; s < stop; ++s) {
          prefetch_text(sa_[std::min(s + kAhead, n_ - 1)]);
          induce(sa_[s]);
        }
      }
      i = b_[c];
    }
  }

  void induce_s() {
    for (uint32_t end = n_; end > 0;) {
      const uint32_t begin = end - std::min(end, kChunk);
      for (uint32_t i = end; i-- > begin;) {
        prefetch_text(sa_[i - std::min(i, kAhead)]);
        const uint32_t entry = sa_[i];
        sa_[i] = entry & ~kDone;
        if (entry == 0 || entry >= kDone) continue;
        const uint32_t j = entry - 1;
        const Token token = text_[j];
        const bool more = j > 0 && text_[j - 1] <= token;
        sa_[--b_[symbol_(token)]] = more ? j : j | kDone;
      }
      watch_.add(end - begin);
      end = begin;
    }
  }

  static constexpr uint32_t kChunk = 1 << 16;
  static constexpr uint32_t kBlock = 512;

  const Token* const text_;
  const uint32_t n_;
  const Symbol symbol_;
  const uint32_t k_;
  uint32_t* const sa_;
  const uint32_t room_;
  Watch& watch_;
  uint32_t ticked_ = 0;
  uint32_t lms_ = 0;
  // Counters per symbol; which zone they are of changes from step to step.
  uint32_t *a_ = nullptr, *b_ = nullptr, *e_ = nullptr;
  HugeVector<uint32_t> owned_;
};

template <class Token>
uint64_t sais(const SuffixJob& job) {
  const auto* text = static_cast<const Token*>(job.text);
  const uint32_t n = static_cast<uint32_t>(job.text_size);
  Watch watch(job.progress);
  advise_huge(job.out, job.text_size * sizeof(uint32_t));
  watch.populate(job.out, job.text_size);
  if constexpr (sizeof(Token) < 4) {
    Level<Token, Direct>(text, n, {}, 1u << (8 * sizeof(Token)), job.out, n, watch).sort();
  } else {
    const uint32_t vocab = static_cast<uint32_t>(job.vocab);
    Level<Token, Clamped>(text, n, {vocab}, vocab + 1, job.out, n, watch).sort();
  }
  uint64_t size = n;
  while (size > 0 && text[job.out[size - 1]] == static_cast<Token>(~Token{0})) --size;
  return size;
}

}  // namespace

uint64_t sais_bytes(uint64_t text_size, int32_t token_bytes, uint64_t vocab) {
  const uint64_t symbols = token_bytes < 4 ? uint64_t{1} << (8 * token_bytes) : vocab + 1;
  // Names are at most half as many as tokens, and so their counters take at most 6 bytes per token;
  // that much only for texts that alternate without repeats.
  return text_size * (static_cast<uint64_t>(token_bytes) + sizeof(uint32_t) + 6) + 12 * symbols;
}

uint64_t build_sais(const SuffixJob& job) {
  switch (job.token_bytes) {
    case 1:
      return sais<uint8_t>(job);
    case 2:
      return sais<uint16_t>(job);
    default:
      return sais<uint32_t>(job);
  }
}

}  // namespace alignops::spans
