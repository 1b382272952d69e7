// An opened index: the files of every shard, checked, as the views that the search kernels read,
// and the tables of documents. Immutable and safe to use from any thread.
//
// An index is a folder. Its manifest is read by Python (alignops/spans/store.py), which passes what
// it says as an IndexInfo.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "../common/parallel.h"
#include "errors.h"
#include "format.h"
#include "kernels.h"

namespace alignops::spans {

// kMmap: read-only mappings, shared with other processes. kRam: a copy of everything, for which all
// blocks are checked at once.
enum class Mode : int32_t { kMmap = 0, kRam = 1 };

// How much is checked when an index is opened:
//   kQuick  headers, sizes, UUIDs, the first and the last block of each file, all of `uni` and
//   `dir`,
//           256 pairs of neighbours among the suffixes
//   kLazy   the same, and each further block when it is first read
//   kFull   all blocks
enum class Verify : int32_t { kQuick = 0, kLazy = 1, kFull = 2 };

// Tokens [begin, end) of the text of a shard; the separator of a document stands at `end`.
struct Extent {
  int32_t shard;
  uint64_t begin, end;
};

// A position in a document, which is counted over all shards.
struct Place {
  uint64_t document, offset;
};

class Store {
 public:
  // `folder` is a descriptor, needed during the call only, and `path` its name for messages. Throws
  // NotAnIndexError, IndexVersionError, IndexCorruptError, FileError, std::bad_alloc.
  static std::shared_ptr<const Store> open(int folder, const std::string& path,
                                           const IndexInfo& info, Mode mode, Verify verify,
                                           const ParallelFor& parallel);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  const IndexInfo& info() const;
  int32_t num_shards() const;
  uint64_t tokens() const;     // over all shards, without separators and removed documents
  uint64_t documents() const;  // over all shards; removed ones keep their numbers
  // The numbers of those, ascending.
  std::span<const uint64_t> removed() const;

  // To be called before every batch of searches: compares the sizes of the files with those at
  // opening, since reading beyond the end of a file that shrank would be a signal. Throws
  // IndexCorruptError.
  void check_sizes() const;
  // What a kernel may search. Valid as long as the store.
  const Shard& shard(int32_t s) const;
  // Throws the IndexCorruptError for what a kernel reported of shard s.
  [[noreturn]] void raise(int32_t s, const Fault& fault) const;

  // Occurrences over all shards, without those in removed documents, of token i where ids() is
  // empty (vocabularies up to kDenseVocab), else of token ids()[i].
  std::span<const uint32_t> ids() const;
  std::span<const uint64_t> counts() const;

  // Documents are counted over all shards; the first one of shard s is first_document(s), and
  // first_document(num_shards()) = documents(). What follows throws std::out_of_range for a shard,
  // document or position that does not exist, IndexCorruptError for a damaged block.
  uint64_t first_document(int32_t s) const;
  Extent document(uint64_t d) const;
  Place place(int32_t s, uint64_t position) const;
  // The tokens, checked as `verify` demands, in the width of the text.
  const void* text(const Extent& extent) const;

  bool has(Kind kind) const;  // of all shards
  uint16_t label(uint64_t d) const;
  std::string_view meta(uint64_t d) const;                   // JSON
  std::span<const uint32_t> byte_offsets(uint64_t d) const;  // per token

  // Checks as if the index were opened again at this level. For kFull, all blocks are read.
  void verify(Verify level, const ParallelFor& parallel) const;

  // Writes the list of removed documents of a shard to `folder`, syncs it, and returns its summary,
  // which the manifest has to name. `documents`, counted within the shard, ascend; they are all
  // that are removed. Reads the suffixes once.
  FileSummary write_removal(int32_t s, std::span<const uint64_t> documents,
                            const std::string& folder) const;

 private:
  struct Impl;
  explicit Store(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

}  // namespace alignops::spans
