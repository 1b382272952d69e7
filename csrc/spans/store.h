// An opened index: the files of every shard, checked, as the views that the search kernels read,
// and the tables of documents. Immutable and safe to use from any thread.
//
// An index is a folder. Its manifest is read by Python (alignops/spans/store.py), which passes what
// it says as an IndexInfo.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../common/file.h"
#include "../common/parallel.h"
#include "format.h"
#include "kernels.h"

namespace alignops::spans {

// What the manifest says of a file. Absent files have no bytes.
struct FileInfo {
  uint64_t bytes = 0;
  uint32_t table_crc = 0;  // CRC32C of the block table
};

struct ShardInfo {
  uint64_t tokens = 0;  // without separators
  uint64_t documents = 0;
  std::array<FileInfo, kNumKinds> files{};  // by Kind
};

struct IndexInfo {
  std::string path;    // for messages
  int directory = -1;  // descriptor of the opened folder
  Uuid uuid{};
  uint64_t vocab_size = 0;
  int32_t token_bytes = 0;
  std::vector<ShardInfo> shards;
};

enum class Mode : int32_t { kMmap = 0, kRam = 1 };
// How much is checked when an index is opened:
//   kQuick  headers, sizes, UUIDs, the first and the last block of each file, all blocks of the
//   tables
//           of counts and of the directory, 256 pairs of neighbours in SUF
//   kLazy   kQuick, and each further block when it is first read
//   kFull   all blocks
enum class Verify : int32_t { kQuick = 0, kLazy = 1, kFull = 2 };

// Tokens [begin, end) of the text of a shard; the separator stands at `end`.
struct Extent {
  uint64_t begin, end;
};

class Store {
 public:
  // Throws NotAnIndexError, IndexVersionError, IndexCorruptError, FileError, std::bad_alloc.
  static std::shared_ptr<const Store> open(const IndexInfo& info, Mode mode, Verify verify,
                                           const ParallelFor& parallel);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  const IndexInfo& info() const;
  int32_t num_shards() const;
  uint64_t tokens() const;     // over all shards, without separators
  uint64_t documents() const;  // over all shards

  // Call this before every batch of searches: it compares the sizes of the files with those at
  // opening, since reading beyond the end of a file that shrank would be a signal. Throws
  // IndexCorruptError.
  void check_sizes() const;
  // What a kernel may search. Stays valid as long as the store.
  const Shard& shard(int32_t s) const;
  // Throws the IndexCorruptError that says what `fault`, reported by a kernel of shard s, means.
  [[noreturn]] void raise(int32_t s, const Fault& fault) const;

  // Occurrences of each token over all shards: of token i where ids() is empty, else of ids()[i].
  std::span<const uint32_t> ids() const;
  std::span<const uint64_t> counts() const;

  // Documents are numbered over all shards; shard s begins with document first_document(s). All
  // accessors below throw std::out_of_range for a document that does not exist and
  // IndexCorruptError for a block that is not intact.
  uint64_t first_document(int32_t s) const;
  struct Place {
    int32_t shard;
    Extent extent;
  };
  Place document(uint64_t d) const;
  // The document, counted over all shards, that holds a position of the text of shard s, and the
  // offset of the position in it.
  struct Owner {
    uint64_t document, offset;
  };
  Owner owner(int32_t s, uint64_t position) const;
  // Tokens [begin, end) of the text of shard s, verified, in the width of the text.
  const void* text(int32_t s, Extent extent) const;

  bool has_labels() const;
  bool has_meta() const;
  bool has_byte_offsets() const;
  uint16_t label(uint64_t d) const;
  std::string_view meta(uint64_t d) const;  // JSON
  std::span<const uint32_t> byte_offsets(uint64_t d) const;

  // Checks all blocks of all files now (kFull) or repeats the quick checks (kQuick).
  void verify(Verify level, const ParallelFor& parallel) const;

 private:
  struct Impl;
  explicit Store(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace alignops::spans
