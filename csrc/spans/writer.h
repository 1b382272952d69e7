// Writes the files of one shard: documents are added in order, then their text is sorted.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "../common/file.h"
#include "../common/parallel.h"
#include "format.h"
#include "suffix.h"

namespace alignops::spans {

// Longest text of a shard, separators included: builders and pointers are of 32 bits.
inline constexpr uint64_t kMaxShardText = 2'000'000'000;
// Progress::phase while sorted suffixes are written; `done` and `total` are tokens.
inline constexpr int kWritePhase = 1000;

// What the shards of an index share.
struct ShardLayout {
  uint64_t vocab_size;  // at most the separator of the width
  int32_t token_bytes;  // 1, 2 or 4
  bool labels, meta, byte_offsets;
};

// Integers of any width, as they lie in the caller's memory.
struct Integers {
  const void* data;
  int32_t bytes;  // 1, 2, 4 or 8
  bool is_signed;
};

// A run of tokens and of the documents that end in it: document i ends after ends[i] tokens of the
// run. What follows the last end belongs to a document that goes on in the next run.
struct Run {
  Integers tokens;
  int64_t size;
  std::span<const int64_t> ends;       // not decreasing, in [0, size]
  const uint32_t* byte_offsets;        // of every token; this and what follows if the layout has it
  const uint16_t* labels;              // of every end
  const char* meta;                    // the JSON texts of the ends, one after the other
  std::span<const int64_t> meta_ends;  // where each of them ends
  // For messages: the number of the document in which the run begins, and the offset there.
  uint64_t document, offset;
};

// kRadixStream: batch by batch, within a budget of memory.
enum class Builder : int32_t { kSais = 0, kRadix = 1, kRadixStream = 2 };

// One owner thread. Throws FileError, std::bad_alloc and Cancelled; what a writer leaves behind
// when it fails is for the caller to remove.
class ShardWriter {
 public:
  // Makes the files in `folder`. If that is empty, nothing is written, and only sizes and checksums
  // are computed: to compare documents with those of a shard that exists.
  ShardWriter(std::string folder, uint32_t shard, const Uuid& uuid, const ShardLayout& layout);

  // Takes the disk space of a text of this size and its suffixes now. `add` does so step by step.
  void reserve(uint64_t text_size, uint64_t documents);
  // Throws std::out_of_range for a token that is not below vocab_size, std::invalid_argument for a
  // text longer than kMaxShardText.
  void add(const Run& run);
  // After all documents: completes every file but those of the suffixes. `continued`: the first
  // document is the rest of the last one of the shard before.
  void end_text(bool continued);
  // Sorts and writes the suffixes and, from `directory_tokens` tokens on, the directory.
  // `mem_bytes` is the budget of kRadixStream.
  void sort(Builder builder, uint64_t mem_bytes, uint64_t directory_tokens,
            const ParallelFor& parallel, Progress& progress);

  const ShardInfo& info() const { return info_; }

 private:
  template <class Token>
  void add_width(const Run& run);
  template <class Source, class Token>
  void add_run(const Run& run);
  template <class Source, class Token>
  void add_part(const Run& run, int64_t begin, int64_t end, Token* out);
  template <class Token>
  void count(const Token* tokens, size_t size);
  void end_documents(const Run& run);
  void write_counts();
  std::unique_ptr<FileWriter> create(Kind kind) const;
  void finish(Kind kind, FileWriter& file, uint64_t elements, uint16_t flags = 0);

  std::string folder_;
  uint32_t shard_;
  Uuid uuid_;
  ShardLayout layout_;
  ShardInfo info_;
  std::array<std::unique_ptr<FileWriter>, kNumKinds> files_;
  std::vector<uint64_t> dense_counts_;
  std::unordered_map<uint32_t, uint64_t> sparse_counts_;
};

}  // namespace alignops::spans
