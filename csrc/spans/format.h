// What an index consists of: docs/spans-format.md.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "../common/file.h"

namespace alignops::spans {

inline constexpr FileFormat kFormat{{'A', 'L', 'N', 'S', 'P', 'A', 'N', '\x1A'}, 1, 0};

// The kinds of files of a shard, in the order in which they are written.
enum Kind : int32_t {
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
// Shard s has the files <name>.<s>; the codes stand in headers.
inline constexpr const char* kNames[kNumKinds] = {"tok",  "doc",  "uni", "lab", "meta",
                                                  "moff", "boff", "suf", "dir"};
inline constexpr std::array<char, 4> kCodes[kNumKinds] = {
    {'T', 'O', 'K', ' '}, {'D', 'O', 'C', ' '}, {'U', 'N', 'I', ' '},
    {'L', 'A', 'B', ' '}, {'M', 'E', 'T', 'A'}, {'M', 'O', 'F', 'F'},
    {'B', 'O', 'F', 'F'}, {'S', 'U', 'F', ' '}, {'D', 'I', 'R', ' '}};

// Flags in headers. kSparse, of kUni: pairs (token, occurrences), for vocabularies above
// kDenseVocab. kContinued, of kDoc: the first document is the rest of the last one of the shard
// before.
inline constexpr uint16_t kSparse = 1;
inline constexpr uint16_t kContinued = 2;
inline constexpr uint64_t kDenseVocab = uint64_t{1} << 22;

// What the manifest says of a shard. Files that it lacks have no bytes.
struct ShardInfo {
  uint64_t tokens = 0;  // without separators
  uint64_t documents = 0;
  bool continued = false;  // kContinued
  std::array<FileSummary, kNumKinds> files{};
};

struct IndexInfo {
  Uuid uuid{};
  uint64_t vocab_size = 0;
  int32_t token_bytes = 0;
  std::vector<ShardInfo> shards;
};

inline std::string file_name(int32_t kind, uint32_t shard) {
  return std::string(kNames[kind]) + "." + std::to_string(shard);
}

}  // namespace alignops::spans
