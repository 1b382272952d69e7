// Names and numbers of an index's files: docs/spans-format.md.
#pragma once

#include <array>
#include <cstdint>

namespace alignops::spans {

using Uuid = std::array<uint8_t, 16>;

// The kinds of files of a shard, in the order in which they are written. kNames are the names
// before the number of the shard, kCodes stand in headers.
enum class Kind : int32_t {
  kTok = 0,   // the text
  kDoc = 1,   // where documents begin in it
  kUni = 2,   // occurrences of each token
  kLab = 3,   // optional: a label per document
  kMeta = 4,  // optional: JSON per document
  kMoff = 5,  // where it begins in kMeta
  kBoff = 6,  // optional: a byte offset per token
  kSuf = 7,   // sorted suffixes
  kDir = 8,   // optional: first tokens of every 256th suffix
};
inline constexpr int32_t kNumKinds = 9;
inline constexpr const char* kNames[kNumKinds] = {"tok",  "doc",  "uni", "lab", "meta",
                                                  "moff", "boff", "suf", "dir"};
inline constexpr char kCodes[kNumKinds][5] = {"TOK ", "DOC ", "UNI ", "LAB ", "META",
                                              "MOFF", "BOFF", "SUF ", "DIR "};

// Flags of a header. kSparse, of kUni: pairs (token, occurrences), for vocabularies above
// kDenseVocab. kContinued, of kDoc: the first document continues the last one of the shard before.
inline constexpr uint16_t kSparse = 1;
inline constexpr uint16_t kContinued = 2;
inline constexpr uint64_t kDenseVocab = uint64_t{1} << 22;

}  // namespace alignops::spans
