// Search in the suffix array of a shard, the source of all instruction sets. An ISA file defines
// `LongestCommonPrefix` and takes the table from `search_kernels<LongestCommonPrefix>()`.
//
// A search looks for the interval of the suffixes that start with a query q. The bucket of q[0]
// gives the first bracket [lo, hi); a step reads the suffix at a rank inside and cuts the bracket.
// All suffixes of a bracket agree with q in as many tokens as its two ends do, so a comparison
// starts behind those. As soon as a suffix starts with q, the two ends of the interval are searched
// for, each between a suffix that does and one that does not.
//
// A step is a chain of two cache misses, SUF[rank] and the text there. kWays searches take turns:
// one pass reads the pointers of all and prefetches the texts, the next one compares the texts and
// prefetches the next pointers. A find costs about log2(bucket) + 2 log2(count) steps; with a
// directory those at multiples of kDirectoryStride read no pointer and no text.
//
// Source: Manber and Myers 1993 (carry of common prefixes).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels.h"

namespace alignops::spans {
namespace {

template <class To>
inline To load(const void* from) {
  To out;
  __builtin_memcpy(&out, from, sizeof(To));
  return out;
}

inline const uint8_t* at(const void* array, uint64_t byte) {
  return static_cast<const uint8_t*>(array) + byte;
}

inline void prefetch(const void* address) { __builtin_prefetch(address); }

inline uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

inline bool verified(const Guard& guard, uint64_t block) {
  if (guard.verified == nullptr) return true;
  const uint64_t word = __atomic_load_n(guard.verified + block / 64, __ATOMIC_ACQUIRE);
  if ((word >> (block % 64)) & 1) return true;
  return guard.verify(guard.context, block);
}

enum class Stage : uint8_t { kDirectory, kPointer, kText };

// What a search looks for: any suffix that starts with the query, then the first, then the last.
enum class Phase : uint8_t { kAny, kFirst, kLast };

template <class Token>
struct Search {
  int64_t item;
  const Token* query;
  uint64_t length;          // tokens of the query
  uint64_t depth;           // of the suffixes, where the query is compared
  uint64_t lo, hi;          // the bracket: ranks outside are ruled out
  uint64_t lcp_lo, lcp_hi;  // common prefix of the query and the suffixes next to the bracket
  uint64_t first, last;     // outermost ranks that are known to be in the interval
  uint64_t step;            // next rank at most this far from first or last; doubles with each hit
  uint64_t first_step;
  uint64_t rank, position, agreed;  // the step under way; its first `agreed` tokens are equal
  Stage stage;
  Phase phase;
};

template <class Lcp, class Token, int kPointerBytes>
class Searcher {
 public:
  using TokenType = Token;
  using Way = Search<Token>;

  explicit Searcher(const Shard& shard) : shard_(shard) {}

  // Job: start(way, item) says whether there is anything to search, settle(way, hit) whether to go
  // on when the phase kAny ends, finish(way) writes the answer.
  template <class Job>
  Fault run(const Job& job, int64_t begin, int64_t end) {
    Way ways[kWays];
    int64_t active = 0, next = begin;
    const auto refill = [&](Way& way) {
      while (next < end) {
        if (!job.start(way, next++)) continue;
        aim(way);
        return true;
      }
      return false;
    };
    while (active < kWays && refill(ways[active])) ++active;
    const auto pass = [&](const auto& turn) {
      for (int64_t i = 0; i < active;) {
        Way& way = ways[i];
        if (turn(way) || refill(way)) {
          ++i;
        } else {
          way = ways[--active];
        }
        if (fault_.status != Status::kOk) return;
      }
    };
    while (active > 0 && fault_.status == Status::kOk) {
      pass([&](Way& way) {
        if (way.stage == Stage::kDirectory) return look_up(job, way);
        point(way);
        return true;
      });
      if (fault_.status != Status::kOk) break;
      pass([&](Way& way) { return way.stage != Stage::kText || compare(job, way); });
    }
    return fault_;
  }

  Fault tokens_at(const TokensAtArgs& args, int64_t begin, int64_t end) {
    uint64_t place[kWays];
    for (int64_t i = begin; i < end; i += kWays) {
      const int64_t count = end - i < kWays ? end - i : kWays;
      for (int64_t j = 0; j < count; ++j) prefetch(pointer(rank_of(args.rank[i + j])));
      for (int64_t j = 0; j < count; ++j) {
        if (!position(rank_of(args.rank[i + j]), place[j])) return fault_;
        place[j] += static_cast<uint64_t>(args.depth[i + j]);
        if (place[j] < shard_.text_size) prefetch(text(place[j]));
      }
      for (int64_t j = 0; j < count; ++j) {
        uint32_t token = static_cast<uint32_t>(separator(sizeof(Token)));
        if (place[j] < shard_.text_size) {
          if (!check_text(place[j])) return fault_;
          token = load<Token>(text(place[j]));
        }
        args.out[i + j] = token;
      }
    }
    return fault_;
  }

  Fault positions(const PositionsArgs& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kWays) {
      const int64_t count = end - i < kWays ? end - i : kWays;
      for (int64_t j = 0; j < count; ++j) prefetch(pointer(rank_of(args.rank[i + j])));
      for (int64_t j = 0; j < count; ++j) {
        uint64_t place;
        if (!position(rank_of(args.rank[i + j]), place)) return fault_;
        args.out[i + j] = static_cast<int64_t>(place);
      }
    }
    return fault_;
  }

 private:
  static uint64_t rank_of(int64_t rank) { return static_cast<uint64_t>(rank); }

  const uint8_t* pointer(uint64_t rank) const { return at(shard_.suf, rank * kPointerBytes); }
  const uint8_t* text(uint64_t place) const { return at(shard_.text, place * sizeof(Token)); }

  bool fail(Status status, Array array, uint64_t index) {
    fault_ = {status, array, index};
    return false;
  }

  bool check(const Guard& guard, Array array, uint64_t block) {
    return verified(guard, block) || fail(Status::kCorrupt, array, block);
  }

  bool check_text(uint64_t place) {
    return check(shard_.text_guard, Array::kText, place * sizeof(Token) >> kBlockShift);
  }

  // SUF[rank], inside the text.
  bool position(uint64_t rank, uint64_t& out) {
    const uint64_t byte = rank * kPointerBytes;
    if (!check(shard_.suf_guard, Array::kSuf, byte >> kBlockShift)) return false;
    if constexpr (kPointerBytes == 4) {
      out = load<uint32_t>(at(shard_.suf, byte));
    } else {
      // A packed entry may end in the next block.
      if (!check(shard_.suf_guard, Array::kSuf, (byte + 4) >> kBlockShift)) return false;
      out = load<uint32_t>(at(shard_.suf, byte)) | uint64_t{load<uint8_t>(at(shard_.suf, byte + 4))}
                                                       << 32;
    }
    return out < shard_.text_size || fail(Status::kBadPointer, Array::kSuf, rank);
  }

  // Chooses the next rank inside the bracket, which is not empty.
  void aim(Way& way) {
    uint64_t begin = way.lo, end = way.hi;  // ranks to choose from
    if (way.phase == Phase::kAny) {
      way.rank = way.lo + (way.hi - way.lo) / 2;
      way.agreed = smaller(way.lcp_lo, way.lcp_hi);
    } else if (way.phase == Phase::kFirst) {
      end = way.first;
      way.rank = way.first - smaller(way.step, (way.first - way.lo + 1) / 2);
      way.agreed = way.lcp_lo;
    } else {
      begin = way.last + 1;
      way.rank = way.last + smaller(way.step, (way.hi - way.last) / 2);
      way.agreed = way.lcp_hi;
    }
    if (shard_.directory != nullptr && way.depth + way.agreed < kDirectoryTokens &&
        way.step >= kDirectoryStride) {
      // The nearest entry at or below, if the bracket has one, else the nearest above.
      uint64_t entry = way.rank / kDirectoryStride;
      if (entry * kDirectoryStride < begin) ++entry;
      if (entry * kDirectoryStride < end) {
        way.rank = entry * kDirectoryStride;
        way.stage = Stage::kDirectory;
        prefetch(directory(entry));
        return;
      }
    }
    way.stage = Stage::kPointer;
    prefetch(pointer(way.rank));
  }

  const uint8_t* directory(uint64_t entry) const {
    return at(shard_.directory, entry * kDirectoryTokens * sizeof(Token));
  }

  template <class Job>
  bool look_up(const Job& job, Way& way) {
    const uint8_t* entry = directory(way.rank / kDirectoryStride);
    const uint64_t known = smaller(way.length, kDirectoryTokens - way.depth);
    uint64_t lcp = way.agreed;
    Token token = 0;
    while (lcp < known) {
      token = load<Token>(entry + (way.depth + lcp) * sizeof(Token));
      if (token != way.query[lcp]) return learn(job, way, lcp, token < way.query[lcp]);
      ++lcp;
    }
    if (lcp == way.length) return learn(job, way, lcp, false);
    way.agreed = lcp;
    way.stage = Stage::kPointer;
    prefetch(pointer(way.rank));
    return true;
  }

  void point(Way& way) {
    if (!position(way.rank, way.position)) return;
    way.position += way.depth;
    way.stage = Stage::kText;
    prefetch(text(way.position + way.agreed));
  }

  template <class Job>
  bool compare(const Job& job, Way& way) {
    const uint64_t size = way.position < shard_.text_size ? shard_.text_size - way.position : 0;
    const uint64_t limit = smaller(way.length, size);
    // A suffix between two that agree in more tokens than it has: SUF is not sorted.
    if (limit < way.agreed) return fail(Status::kBadPointer, Array::kSuf, way.rank);
    uint64_t lcp = way.agreed;
    if (shard_.text_guard.verified == nullptr) {
      lcp += common(way, lcp, limit);
    } else {
      while (lcp < limit) {
        const uint64_t place = way.position + lcp;
        if (!check_text(place)) return false;
        const uint64_t block_end = ((place * sizeof(Token) >> kBlockShift) + 1) << kBlockShift;
        const uint64_t stop = smaller(limit, block_end / sizeof(Token) - way.position);
        lcp += common(way, lcp, stop);
        if (lcp < stop) break;
      }
    }
    // The end of the text is smaller than any token.
    const bool less =
        lcp == size || (lcp < limit && load<Token>(text(way.position + lcp)) < way.query[lcp]);
    return learn(job, way, lcp, less);
  }

  // Common prefix of the query and the text from token `from` on, at most up to `to`. Most end
  // within the first word: wider loads would only touch another cache line.
  uint64_t common(const Way& way, uint64_t from, uint64_t to) const {
    constexpr uint64_t kWord = 8 / sizeof(Token);
    const uint8_t* a = text(way.position + from);
    const Token* b = way.query + from;
    const uint64_t count = to - from;
    if (way.position + from + kWord <= shard_.text_size) {
      const uint64_t different = load<uint64_t>(a) ^ load<uint64_t>(b);
      if (different != 0)
        return smaller(static_cast<uint64_t>(__builtin_ctzll(different)) / (8 * sizeof(Token)),
                       count);
      if (count <= kWord) return count;
      return kWord + Lcp::template tokens<Token>(a + 8, b + kWord, count - kWord);
    }
    return Lcp::template tokens<Token>(a, b, count);
  }

  // The suffix at way.rank agrees with the query in `lcp` tokens, and is less or not less. Returns
  // whether the search goes on.
  template <class Job>
  bool learn(const Job& job, Way& way, uint64_t lcp, bool less) {
    const bool hit = lcp == way.length;
    if (way.phase == Phase::kAny) {
      if (!hit) {
        way.lo = less ? way.rank + 1 : way.lo;
        way.lcp_lo = less ? lcp : way.lcp_lo;
        way.hi = less ? way.hi : way.rank;
        way.lcp_hi = less ? way.lcp_hi : lcp;
        if (way.lo < way.hi) {
          aim(way);
          return true;
        }
      } else {
        way.first = way.last = way.rank;
      }
      if (!job.settle(way, hit)) return job.finish(way);
      way.phase = Phase::kFirst;
    } else if (way.phase == Phase::kFirst) {
      if (hit) {
        way.first = way.rank;
        way.step = 2 * way.step | 1;
      } else {
        way.lo = way.rank + 1;
        way.lcp_lo = lcp;
      }
    } else if (hit) {
      way.last = way.rank;
      way.step = 2 * way.step | 1;
    } else {
      way.hi = way.rank;
      way.lcp_hi = lcp;
    }
    if (way.phase == Phase::kFirst && way.lo == way.first) {
      way.phase = Phase::kLast;
      way.step = way.first_step;
    }
    if (way.phase == Phase::kLast && way.last + 1 == way.hi) return job.finish(way);
    aim(way);
    return true;
  }

  const Shard shard_;
  Fault fault_;
};

inline constexpr uint64_t kBisect = UINT64_MAX;  // a step that never limits

struct Interval {
  uint64_t lo, hi;
};

// The suffixes that start with `token`.
inline Interval bucket(const Shard& shard, uint64_t token) {
  uint64_t i = token;
  if (shard.ids != nullptr) {
    uint64_t end = shard.buckets;
    for (i = 0; i < end;) {
      const uint64_t mid = i + (end - i) / 2;
      if (shard.ids[mid] < token) {
        i = mid + 1;
      } else {
        end = mid;
      }
    }
    if (i < shard.buckets && shard.ids[i] != token) return {shard.first[i], shard.first[i]};
  }
  if (i >= shard.buckets) return {shard.suf_size, shard.suf_size};
  return {shard.first[i], shard.first[i + 1]};
}

// A search of query `item` from the bucket of its first token, which is not empty.
template <class Token>
void start_in_bucket(Search<Token>& way, int64_t item, const Token* query, uint64_t length,
                     Interval bracket) {
  way.item = item;
  way.query = query;
  way.length = length;
  way.depth = 0;
  way.lo = bracket.lo;
  way.hi = bracket.hi;
  way.lcp_lo = way.lcp_hi = 1;
  way.step = way.first_step = kBisect;
  way.phase = Phase::kAny;
}

template <class Token>
struct FindJob {
  const Shard& shard;
  const FindArgs& args;

  bool start(Search<Token>& way, int64_t item) const {
    const int64_t begin = args.queries.begin[item];
    const auto length = static_cast<uint64_t>(args.queries.end[item] - begin);
    if (length == 0) return answer(item, {0, shard.suf_size});
    const Token* query = static_cast<const Token*>(args.queries.tokens) + begin;
    const Interval bracket = bucket(shard, *query);
    if (length == 1 || bracket.lo == bracket.hi) return answer(item, bracket);
    start_in_bucket(way, item, query, length, bracket);
    return true;
  }

  bool settle(Search<Token>& way, bool hit) const {
    if (!hit) {
      way.first = way.lo;
      way.last = way.lo - 1;
    }
    return hit;
  }

  bool finish(const Search<Token>& way) const {
    return answer(way.item, {way.first, way.last + 1});
  }

  bool answer(int64_t item, Interval interval) const {
    args.lo[item] = static_cast<int64_t>(interval.lo);
    args.hi[item] = static_cast<int64_t>(interval.hi);
    return false;
  }
};

template <class Token>
struct MatchJob {
  const Shard& shard;
  const MatchArgs& args;

  bool start(Search<Token>& way, int64_t item) const {
    const int64_t begin = args.queries.begin[item];
    const auto length = static_cast<uint64_t>(args.queries.end[item] - begin);
    if (length == 0) return answer(item, 0, {0, shard.suf_size});
    const Token* query = static_cast<const Token*>(args.queries.tokens) + begin;
    const Interval bracket = bucket(shard, *query);
    if (bracket.lo == bracket.hi) return answer(item, 0, {0, shard.suf_size});
    if (length == 1) return answer(item, 1, bracket);
    start_in_bucket(way, item, query, length, bracket);
    return true;
  }

  // Without a hit the query belongs before the suffix at way.lo, and its longest match is the
  // longer common prefix with the two neighbours, as far as the bucket has them.
  bool settle(Search<Token>& way, bool hit) const {
    if (hit) return args.lo != nullptr;
    way.length = way.lcp_lo < way.lcp_hi ? way.lcp_hi : way.lcp_lo;
    if (args.lo == nullptr) return false;
    const Interval all = bucket(shard, *way.query);
    if (way.length == 1) {
      way.first = all.lo;
      way.last = all.hi - 1;
      return false;
    }
    const uint64_t rank = way.lo;
    const bool before = way.lcp_lo == way.length, after = way.lcp_hi == way.length;
    way.first = before ? rank - 1 : rank;
    way.lo = before ? all.lo : rank;
    way.last = after ? rank : rank - 1;
    way.hi = after ? all.hi : rank;
    way.lcp_lo = way.lcp_hi = 1;
    way.step = way.first_step = 1;  // most longest matches are rare
    return true;
  }

  bool finish(const Search<Token>& way) const {
    return answer(way.item, way.length, {way.first, way.last + 1});
  }

  bool answer(int64_t item, uint64_t length, Interval interval) const {
    args.length[item] = static_cast<int64_t>(length);
    if (args.lo != nullptr) {
      args.lo[item] = static_cast<int64_t>(interval.lo);
      args.hi[item] = static_cast<int64_t>(interval.hi);
    }
    return false;
  }
};

template <class Token>
struct NarrowJob {
  const NarrowArgs& args;

  bool start(Search<Token>& way, int64_t item) const {
    way.item = item;
    way.query = static_cast<const Token*>(args.tokens) + item;
    way.length = 1;
    way.depth = static_cast<uint64_t>(args.depth[item]);
    way.lo = way.first = static_cast<uint64_t>(args.lo[item]);
    way.hi = static_cast<uint64_t>(args.hi[item]);
    way.last = way.lo - 1;
    if (way.lo >= way.hi) return finish(way);
    way.lcp_lo = way.lcp_hi = 0;
    way.step = way.first_step = kBisect;
    way.phase = Phase::kAny;
    return true;
  }

  bool settle(Search<Token>& way, bool hit) const {
    if (!hit) {
      way.first = way.lo;
      way.last = way.lo - 1;
    }
    return hit;
  }

  bool finish(const Search<Token>& way) const {
    args.out_lo[way.item] = static_cast<int64_t>(way.first);
    args.out_hi[way.item] = static_cast<int64_t>(way.last + 1);
    return false;
  }
};

// Calls body(searcher) with the types of the shard.
template <class Lcp, class Body>
Fault with_searcher(const Shard& shard, const Body& body) {
  const auto with_token = [&](auto token) {
    using Token = decltype(token);
    if (shard.pointer_bytes == 4) return body(Searcher<Lcp, Token, 4>(shard));
    return body(Searcher<Lcp, Token, 5>(shard));
  };
  if (shard.token_bytes == 1) return with_token(uint8_t{});
  if (shard.token_bytes == 2) return with_token(uint16_t{});
  return with_token(uint32_t{});
}

template <class Lcp>
Fault find(const Shard& shard, const FindArgs& args, int64_t begin, int64_t end) {
  return with_searcher<Lcp>(shard, [&](auto searcher) {
    return searcher.run(FindJob<typename decltype(searcher)::TokenType>{shard, args}, begin, end);
  });
}

template <class Lcp>
Fault match(const Shard& shard, const MatchArgs& args, int64_t begin, int64_t end) {
  return with_searcher<Lcp>(shard, [&](auto searcher) {
    return searcher.run(MatchJob<typename decltype(searcher)::TokenType>{shard, args}, begin, end);
  });
}

template <class Lcp>
Fault narrow(const Shard& shard, const NarrowArgs& args, int64_t begin, int64_t end) {
  return with_searcher<Lcp>(shard, [&](auto searcher) {
    return searcher.run(NarrowJob<typename decltype(searcher)::TokenType>{args}, begin, end);
  });
}

template <class Lcp>
Fault tokens_at(const Shard& shard, const TokensAtArgs& args, int64_t begin, int64_t end) {
  return with_searcher<Lcp>(shard,
                            [&](auto searcher) { return searcher.tokens_at(args, begin, end); });
}

template <class Lcp>
Fault positions(const Shard& shard, const PositionsArgs& args, int64_t begin, int64_t end) {
  return with_searcher<Lcp>(shard,
                            [&](auto searcher) { return searcher.positions(args, begin, end); });
}

template <class Lcp>
constexpr Kernels search_kernels() noexcept {
  return {&find<Lcp>, &match<Lcp>, &narrow<Lcp>, &tokens_at<Lcp>, &positions<Lcp>};
}

// Common prefix of two sequences of `count` tokens, a word at a time.
template <class Token>
inline uint64_t common_by_words(const uint8_t* a, const Token* b, uint64_t count) {
  constexpr uint64_t kWord = 8 / sizeof(Token);
  uint64_t i = 0;
  for (; i + kWord <= count; i += kWord) {
    const uint64_t different = load<uint64_t>(a + i * sizeof(Token)) ^ load<uint64_t>(b + i);
    if (different != 0)
      return i + static_cast<uint64_t>(__builtin_ctzll(different)) / (8 * sizeof(Token));
  }
  while (i < count && load<Token>(a + i * sizeof(Token)) == b[i]) ++i;
  return i;
}

}  // namespace
}  // namespace alignops::spans
