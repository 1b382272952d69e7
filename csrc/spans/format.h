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
  kDel = 9,   // optional, written later: removed documents and the ranks of their suffixes
};
inline constexpr int32_t kNumKinds = 10;
// Shard s has the files <name>.<s>; the codes stand in headers.
inline constexpr const char* kNames[kNumKinds] = {"tok",  "doc",  "uni", "lab", "meta",
                                                  "moff", "boff", "suf", "dir", "del"};
inline constexpr std::array<char, 4> kCodes[kNumKinds] = {
    {'T', 'O', 'K', ' '}, {'D', 'O', 'C', ' '}, {'U', 'N', 'I', ' '}, {'L', 'A', 'B', ' '},
    {'M', 'E', 'T', 'A'}, {'M', 'O', 'F', 'F'}, {'B', 'O', 'F', 'F'}, {'S', 'U', 'F', ' '},
    {'D', 'I', 'R', ' '}, {'D', 'E', 'L', ' '}};

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

// What was removed changes while the other files stay: each list has a name of its own, with its
// table checksum, so that an index that is being opened finds the list that its manifest means.
inline std::string removal_name(uint32_t shard, uint32_t table_crc) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string name = file_name(kDel, shard) + ".";
  for (int shift = 28; shift >= 0; shift -= 4) name += kDigits[table_crc >> shift & 15];
  return name;
}

}  // namespace alignops::spans
