// Contract of the spans core: what a search kernel may know of one shard of an index. No torch, no
// Python, no allocation, no exceptions.
//
// T is the text of the shard: all documents, each followed by one separator SEP, the largest token
// of the width. SUF holds the positions of all tokens but the separators, sorted by the unsigned
// token sequences that start there; the end of the text is smaller than any token. The suffixes
// that start with a sequence of tokens are an interval [lo, hi) of ranks, and hi - lo counts its
// occurrences. Queries hold no SEP, so no match crosses the end of a document.
//
// A kernel does the items [begin, end) of a batch on the calling thread and keeps kWays searches in
// flight: a step of a search waits twice for memory, for SUF[rank] and for the text there, and
// meanwhile the other searches go on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alignops::spans {

inline constexpr int64_t kWays = 32;
// Checksums cover blocks of this many bytes of a file's payload.
inline constexpr int32_t kBlockShift = 16;
// The directory holds the first tokens of SUF[0], SUF[256], ...; what follows a SEP is not read.
inline constexpr uint64_t kDirectoryStride = 256;
inline constexpr uint64_t kDirectoryTokens = 8;

static constexpr uint64_t separator(int32_t token_bytes) {
  return token_bytes == 4 ? 0xFFFFFFFFu : (uint64_t{1} << (8 * token_bytes)) - 1;
}

// Lazy verification of an array: bit b % 64 of verified[b / 64] tells that block b is intact. A
// kernel calls `verify` before it first reads a block whose bit is not set; any thread may.
struct Guard {
  const uint64_t* verified;  // null: all blocks are verified
  bool (*verify)(void* context, uint64_t block) noexcept;
  void* context;
};

struct Shard {
  const void* text;
  uint64_t text_size;   // tokens, separators included
  int32_t token_bytes;  // 1, 2 or 4
  Guard text_guard;
  const void* suf;
  uint64_t suf_size;
  int32_t pointer_bytes;  // 4, or 5 (packed, little-endian)
  Guard suf_guard;
  uint64_t vocab;
  // The suffixes that start with token t are [first[i], first[i + 1]): i = t if ids is null, else
  // ids[i] = t, and no i stands for no suffix. `first` has buckets + 1 entries.
  const uint32_t* ids;  // ascending
  const uint64_t* first;
  uint64_t buckets;
  const void* directory;    // directory_size times kDirectoryTokens tokens, or null
  uint64_t directory_size;  // ceil(suf_size / kDirectoryStride)
  // Ranks of the suffixes of removed documents, ascending. Kernels search all suffixes alike; who
  // calls them leaves these out (removed.h).
  const uint64_t* removed = nullptr;
  uint64_t removed_size = 0;
};

enum class Status : int32_t {
  kOk = 0,
  kCorrupt = 1,     // the guard of an array refused a block
  kBadPointer = 2,  // an entry of SUF lies outside the text
};

enum class Array : int32_t { kText = 0, kSuf = 1 };

// The first failure of a call; its outputs are then meaningless.
struct Fault {
  Status status = Status::kOk;
  Array array = Array::kText;
  uint64_t index = 0;  // kCorrupt: block of `array`; kBadPointer: rank
};

// A kernel may read, and ignore, this many bytes behind the tokens of its queries.
inline constexpr int64_t kQueryPadding = 8;

// Query i is tokens[begin[i]], ..., tokens[end[i] - 1], in the width of the text, followed by
// readable padding. Queries may overlap and be empty.
struct Queries {
  const void* tokens;
  const int64_t* begin;
  const int64_t* end;
};

// Interval of the suffixes that start with query i. No occurrence: lo = hi = the rank where they
// would stand. The empty query: [0, suf_size).
struct FindArgs {
  Queries queries;
  int64_t* lo;
  int64_t* hi;
};

// Length of the longest prefix of query i that occurs, at most the query, and its interval. Length
// 0: the interval [0, suf_size).
struct MatchArgs {
  Queries queries;
  int64_t* length;
  int64_t* lo;  // lo and hi may both be null: then the intervals are not searched
  int64_t* hi;
};

// Of the suffixes [lo[i], hi[i]), which agree in their first depth[i] tokens, those whose next
// token is tokens[i] (in the width of the text). 0 <= lo[i] <= hi[i] <= suf_size and 0 <= depth[i].
struct NarrowArgs {
  const void* tokens;
  const int64_t* lo;
  const int64_t* hi;
  const int64_t* depth;
  int64_t* out_lo;  // may be lo
  int64_t* out_hi;  // may be hi
};

// T[SUF[rank[i]] + depth[i]]; beyond the text, SEP. 0 <= rank[i] < suf_size and 0 <= depth[i].
struct TokensAtArgs {
  const int64_t* rank;
  const int64_t* depth;
  uint32_t* out;
};

// SUF[rank[i]]. 0 <= rank[i] < suf_size.
struct PositionsArgs {
  const int64_t* rank;
  int64_t* out;
};

struct Kernels {
  Fault (*find)(const Shard&, const FindArgs&, int64_t begin, int64_t end);
  Fault (*match)(const Shard&, const MatchArgs&, int64_t begin, int64_t end);
  Fault (*narrow)(const Shard&, const NarrowArgs&, int64_t begin, int64_t end);
  Fault (*tokens_at)(const Shard&, const TokensAtArgs&, int64_t begin, int64_t end);
  Fault (*positions)(const Shard&, const PositionsArgs&, int64_t begin, int64_t end);
};

extern const Kernels kSearchScalar, kSearchAvx2, kSearchAvx512;

// Table of the active ISA. Every variant is compared with the scalar one once, on first use; one
// that disagrees is replaced by the next lower level and reported by `self_test_failure()`.
const Kernels& kernels();
const char* self_test_failure();  // nullptr if all is well

}  // namespace alignops::spans
