// Checksummed files. A file is a header of 128 bytes, zeros up to byte 4096, the payload, zeros up
// to a multiple of 8, and the block table: one CRC32C per 64 KiB of payload, the CRC32C of these,
// and 8 bytes of end magic. Everything is little-endian. docs/spans-format.md has the byte table.
//
// Files are written once, front to back, and never through a mapping, where a full disk would be a
// signal. They are read through read-only mappings or into memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "huge_vector.h"
#include "parallel.h"

namespace alignops {

// A failed system call: Python's OSError with errno and path.
struct FileError : std::runtime_error {
  FileError(const std::string& what, int error_number, std::string file)
      : std::runtime_error(what), code(error_number), path(std::move(file)) {}
  int code;
  std::string path;
};
// Bad magic or endian tag.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// Another major version.
struct VersionError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A checksum or a size does not fit.
struct CorruptError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Whose files these are. Files of the same major version and any minor one can be read.
struct FileFormat {
  std::array<char, 8> magic;
  uint16_t major, minor;
};

using Uuid = std::array<uint8_t, 16>;

// What the writer of a file says about it.
struct FileHeader {
  std::array<char, 4> kind{};
  uint8_t token_bytes = 0, pointer_bytes = 0;
  uint16_t flags = 0;
  Uuid uuid{};
  uint32_t shard = 0, shards = 0;
  uint64_t payload_bytes = 0, elements = 0, vocab_size = 0;
};

inline constexpr int kFileBlockShift = 16;
inline constexpr uint64_t kFileBlock = uint64_t{1} << kFileBlockShift;
inline constexpr uint64_t kPayloadOffset = 4096;

// Bytes of a whole file.
uint64_t file_bytes(uint64_t payload_bytes);

struct FileSummary {
  uint64_t bytes = 0;
  uint32_t table_crc = 0;  // CRC32C of the block checksums: stands for the whole payload
};

// Writes a new file; whatever fails throws FileError. A writer that goes away before `finish`
// leaves an incomplete file, which no reader accepts.
class FileWriter {
 public:
  // Creates `path`, which must not exist. An empty path writes nothing and only computes the
  // summary.
  explicit FileWriter(std::string path);
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  // Takes the disk space of a payload of this size now, so that a full disk shows here.
  void reserve(uint64_t payload_bytes);
  // The same, and more where there is room, so that growing by little stays cheap.
  void reserve_ahead(uint64_t payload_bytes);
  void append(const void* data, size_t size);
  uint64_t size() const { return size_; }
  // Completes and syncs the file. `header.payload_bytes` is filled in.
  FileSummary finish(const FileFormat& format, FileHeader header);

 private:
  void write_out(const unsigned char* data, size_t size);
  void flush();

  std::string path_;
  int fd_ = -1;
  uint64_t size_ = 0, written_ = 0, reserved_ = 0;  // of the payload
  uint32_t block_crc_ = 0;
  std::vector<uint32_t> table_;
  std::vector<unsigned char> buffer_;
};

// Writes the header of a finished file again with another UUID, shard and number of shards, and
// syncs it: for files that were written before these were known. Throws what opening the file
// would.
void restamp_file(const std::string& path, const FileFormat& format, const Uuid& uuid,
                  uint32_t shard, uint32_t shards);

enum class FileMode { kMmap, kRam };

// A finished file, read. The constructor checks everything but the payload (its blocks only in
// memory mode, where all of them are read anyway). Throws FileError, FormatError, VersionError or
// CorruptError, all of which name the file. Safe to use from several threads.
class FileReader {
 public:
  // `directory`: a descriptor that `name` is relative to; `path` is for messages.
  FileReader(int directory, const std::string& name, std::string path, const FileFormat& format,
             FileMode mode, const ParallelFor& parallel);
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  const std::string& path() const { return path_; }
  const FileHeader& header() const { return header_; }
  const FileSummary& summary() const { return summary_; }
  const unsigned char* data() const { return data_; }
  uint64_t size() const { return header_.payload_bytes; }
  uint64_t blocks() const { return blocks_; }

  // Bit b % 64 of verified()[b / 64]: block b was found intact.
  const uint64_t* verified() const { return verified_.get(); }
  // Checks a block now and remembers success.
  bool verify_block(uint64_t block) const noexcept;
  // Checks the blocks of payload bytes [begin, end) that have not been checked. Throws
  // CorruptError.
  void require(uint64_t begin, uint64_t end) const;
  // Checks all blocks, whether or not they have been checked before. Throws CorruptError.
  void verify_all(const ParallelFor& parallel) const;
  [[noreturn]] void raise_block(uint64_t block) const;
  // Throws CorruptError if the file no longer has the size that it had when it was opened. In
  // memory mode that does not matter.
  void check_size() const;

 private:
  void read_payload(const ParallelFor& parallel);
  [[noreturn]] void corrupt(const std::string& what) const;

  std::string path_;
  int fd_ = -1;
  FileHeader header_;
  FileSummary summary_;
  uint64_t blocks_ = 0;
  void* map_ = nullptr;               // of the whole file
  HugeVector<unsigned char> memory_;  // or a copy of the payload
  const unsigned char* data_ = nullptr;
  std::vector<uint32_t> table_;
  std::unique_ptr<uint64_t[]> verified_;
};

// Syncs a folder, so that names in it survive a power failure.
void sync_directory(const std::string& path);
// Exchanges two paths in one step. False where the file system cannot do that.
bool exchange_paths(const std::string& a, const std::string& b);

}  // namespace alignops
