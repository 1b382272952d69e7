#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <exception>
#include <mutex>
#include <utility>

#include "check.h"
#include "crc32c.h"

namespace alignops {
namespace {

static_assert(std::endian::native == std::endian::little, "files hold the machine's own words");

constexpr uint32_t kEndianTag = 0x0A0B0C0D;
constexpr std::array<char, 8> kEndMagic = {'A', 'L', 'N', 'E', 'N', 'D', '\x1A', '\n'};
constexpr size_t kHeaderBytes = 128, kHeaderCrc = 120;
constexpr size_t kBuffer = size_t{1} << 20;
constexpr uint64_t kWritebackStep = uint64_t{8} << 20;
// Space is taken ahead of the data in steps that double, within these bounds.
constexpr uint64_t kFirstReserve = uint64_t{1} << 16, kLargestReserve = uint64_t{256} << 20;
// Blocks that one thread reads or checks at least: a millisecond of work, since threads that wake
// up late are all that a small file would gain.
constexpr int64_t kBlockGrain = 128;

uint64_t block_count(uint64_t payload_bytes) {
  return (payload_bytes + kFileBlock - 1) >> kFileBlockShift;
}

uint64_t table_offset(uint64_t payload_bytes) {
  return kPayloadOffset + (payload_bytes + 7) / 8 * 8;
}

template <class T>
void put(unsigned char* header, size_t offset, T value) {
  std::memcpy(header + offset, &value, sizeof(T));
}

template <class T>
T get(const unsigned char* header, size_t offset) {
  T value;
  std::memcpy(&value, header + offset, sizeof(T));
  return value;
}

void encode(const FileFormat& format, const FileHeader& h, unsigned char* out) {
  std::memset(out, 0, kHeaderBytes);
  put(out, 0, format.magic);
  put(out, 8, kEndianTag);
  put(out, 12, format.major);
  put(out, 14, format.minor);
  put(out, 16, h.kind);
  put(out, 20, h.token_bytes);
  put(out, 21, h.pointer_bytes);
  put(out, 22, h.flags);
  put(out, 24, h.uuid);
  put(out, 40, h.shard);
  put(out, 44, h.shards);
  put(out, 48, h.payload_bytes);
  put(out, 56, h.elements);
  put(out, 64, h.vocab_size);
  put(out, 72, uint32_t{kFileBlockShift});
  put(out, 76, static_cast<uint32_t>(block_count(h.payload_bytes)));
  put(out, 80, table_offset(h.payload_bytes));
  put(out, kHeaderCrc, crc32c(out, kHeaderCrc));
}

[[noreturn]] void fail(const char* what, const std::string& path) {
  const int code = errno;
  throw FileError(message("cannot ", what, ": ", std::strerror(code)), code, path);
}

void read_exactly(int fd, void* out, size_t size, uint64_t offset, const std::string& path) {
  auto* p = static_cast<unsigned char*>(out);
  while (size > 0) {
    const ssize_t got = ::pread(fd, p, size, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("read", path);
    if (got == 0) throw CorruptError(message(path, ": the file was cut off while it was read"));
    p += got;
    offset += static_cast<uint64_t>(got);
    size -= static_cast<size_t>(got);
  }
}

void write_exactly(int fd, const void* data, size_t size, uint64_t offset,
                   const std::string& path) {
  const auto* p = static_cast<const unsigned char*>(data);
  while (size > 0) {
    const ssize_t put_bytes = ::pwrite(fd, p, size, static_cast<off_t>(offset));
    if (put_bytes < 0 && errno == EINTR) continue;
    if (put_bytes < 0) fail("write", path);
    p += put_bytes;
    offset += static_cast<uint64_t>(put_bytes);
    size -= static_cast<size_t>(put_bytes);
  }
}

void sync_descriptor(int fd, const std::string& path) {
  while (::fsync(fd) != 0)
    if (errno != EINTR) fail("sync", path);
}

// Real blocks for the first `bytes` bytes of the file, or an errno.
int allocate(int fd, uint64_t bytes) {
  int code = 0;
  do code = ::posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  while (code == EINTR);
  return code;
}

bool all_zero(const unsigned char* begin, const unsigned char* end) {
  return std::all_of(begin, end, [](unsigned char byte) { return byte == 0; });
}

// Reads the start of a file and checks what it says about itself, up to the size of the file.
FileHeader read_header(int fd, uint64_t bytes, const FileFormat& format, const std::string& path) {
  unsigned char page[kPayloadOffset] = {};
  read_exactly(fd, page, std::min<uint64_t>(bytes, kPayloadOffset), 0, path);
  if (bytes < 16)
    throw CorruptError(message(path, ": the file was cut off: ", bytes, " bytes, at least ",
                               file_bytes(0), " expected"));
  if (get<std::array<char, 8>>(page, 0) != format.magic)
    throw FormatError(message(path, ": not a file of an index: it begins with other bytes than '",
                              std::string(format.magic.data(), 7), "'"));
  if (get<uint32_t>(page, 8) != kEndianTag)
    throw FormatError(message(path, ": not a file of an index: the endian tag is 0x", std::hex,
                              get<uint32_t>(page, 8), ", 0x", kEndianTag, " expected"));
  const auto major = get<uint16_t>(page, 12), minor = get<uint16_t>(page, 14);
  if (major != format.major)
    throw VersionError(message(path, ": format version ", major, ".", minor,
                               " cannot be read by this release, which reads version ",
                               format.major, ".x"));
  if (bytes < file_bytes(0))
    throw CorruptError(message(path, ": the file was cut off: ", bytes, " bytes, at least ",
                               file_bytes(0), " expected"));
  if (get<uint32_t>(page, kHeaderCrc) != crc32c(page, kHeaderCrc) ||
      get<uint32_t>(page, kHeaderCrc + 4) != 0)
    throw CorruptError(message(path, ": the header does not have its checksum"));
  if (!all_zero(page + kHeaderBytes, page + kPayloadOffset))
    throw CorruptError(
        message(path, ": bytes ", kHeaderBytes, " to ", kPayloadOffset - 1, " are not zero"));
  FileHeader h;
  h.kind = get<std::array<char, 4>>(page, 16);
  h.token_bytes = page[20];
  h.pointer_bytes = page[21];
  h.flags = get<uint16_t>(page, 22);
  h.uuid = get<Uuid>(page, 24);
  h.shard = get<uint32_t>(page, 40);
  h.shards = get<uint32_t>(page, 44);
  h.payload_bytes = get<uint64_t>(page, 48);
  h.elements = get<uint64_t>(page, 56);
  h.vocab_size = get<uint64_t>(page, 64);
  if (h.payload_bytes > bytes || file_bytes(h.payload_bytes) != bytes)
    throw CorruptError(message(path, ": the file has ", bytes, " bytes, its header says ",
                               file_bytes(h.payload_bytes)));
  if (get<uint32_t>(page, 72) != kFileBlockShift ||
      get<uint32_t>(page, 76) != block_count(h.payload_bytes) ||
      get<uint64_t>(page, 80) != table_offset(h.payload_bytes))
    throw CorruptError(message(path, ": the header describes another block table"));
  return h;
}

// A descriptor that is closed when the scope is left, unless released.
struct Descriptor {
  explicit Descriptor(int descriptor) : fd(descriptor) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  int fd;
};

uint64_t size_of(int fd, const std::string& path) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) fail("stat", path);
  return static_cast<uint64_t>(status.st_size);
}

}  // namespace

uint64_t file_bytes(uint64_t payload_bytes) {
  return table_offset(payload_bytes) + 4 * block_count(payload_bytes) + 4 + kEndMagic.size();
}

// -------------------------------------------------------------------------------------------------
// Writing

FileWriter::FileWriter(std::string path) : path_(std::move(path)) {
  buffer_.reserve(kBuffer);
  if (path_.empty()) return;
  fd_ = ::open(path_.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0644);
  if (fd_ < 0) fail("create", path_);
}

FileWriter::~FileWriter() {
  if (fd_ >= 0) ::close(fd_);
}

void FileWriter::reserve(uint64_t payload_bytes) {
  if (fd_ < 0 || payload_bytes <= reserved_) return;
  errno = allocate(fd_, file_bytes(payload_bytes));
  if (errno != 0) fail("reserve space", path_);
  reserved_ = payload_bytes;
}

void FileWriter::reserve_ahead(uint64_t payload_bytes) {
  if (fd_ < 0 || payload_bytes <= reserved_) return;
  const uint64_t ahead = payload_bytes + std::clamp(payload_bytes, kFirstReserve, kLargestReserve);
  if (allocate(fd_, file_bytes(ahead)) == 0)
    reserved_ = ahead;
  else
    reserve(payload_bytes);
}

void FileWriter::write_out(const unsigned char* data, size_t size) {
  for (size_t done = 0; done < size;) {
    const uint64_t used = (written_ + done) % kFileBlock;
    const size_t part = std::min<size_t>(size - done, kFileBlock - used);
    block_crc_ = crc32c(data + done, part, block_crc_);
    done += part;
    if (used + part == kFileBlock) {
      table_.push_back(block_crc_);
      block_crc_ = 0;
    }
  }
  if (fd_ >= 0) {
    const uint64_t end = written_ + size;
    reserve_ahead(end);
    write_exactly(fd_, data, size, kPayloadOffset + written_, path_);
#ifdef SYNC_FILE_RANGE_WRITE
    // Starts the transfer to the disk now, so that the sync at the end is short.
    if (written_ / kWritebackStep != end / kWritebackStep) {
      const uint64_t from = kPayloadOffset + written_ / kWritebackStep * kWritebackStep;
      ::sync_file_range(fd_, static_cast<off_t>(from),
                        static_cast<off_t>(kPayloadOffset + end - from), SYNC_FILE_RANGE_WRITE);
    }
#endif
  }
  written_ += size;
}

void FileWriter::flush() {
  write_out(buffer_.data(), buffer_.size());
  buffer_.clear();
}

void FileWriter::append(const void* data, size_t size) {
  const auto* p = static_cast<const unsigned char*>(data);
  size_ += size;
  if (buffer_.size() + size < kBuffer) {
    buffer_.insert(buffer_.end(), p, p + size);
    return;
  }
  flush();
  const size_t direct = size / kBuffer * kBuffer;
  for (size_t done = 0; done < direct; done += kBuffer) write_out(p + done, kBuffer);
  buffer_.insert(buffer_.end(), p + direct, p + size);
}

FileSummary FileWriter::finish(const FileFormat& format, FileHeader header) {
  flush();
  if (written_ % kFileBlock != 0) table_.push_back(block_crc_);
  header.payload_bytes = written_;
  const FileSummary summary{file_bytes(written_), crc32c(table_.data(), 4 * table_.size())};
  if (fd_ < 0) return summary;

  std::vector<unsigned char> tail(table_offset(written_) - kPayloadOffset - written_);
  const auto add = [&tail](const void* data, size_t size) {
    const auto* p = static_cast<const unsigned char*>(data);
    tail.insert(tail.end(), p, p + size);
  };
  add(table_.data(), 4 * table_.size());
  add(&summary.table_crc, 4);
  add(kEndMagic.data(), kEndMagic.size());
  unsigned char page[kPayloadOffset] = {};
  encode(format, header, page);
  write_exactly(fd_, tail.data(), tail.size(), kPayloadOffset + written_, path_);
  write_exactly(fd_, page, sizeof(page), 0, path_);
  // Gives back what was reserved and not used.
  if (::ftruncate(fd_, static_cast<off_t>(summary.bytes)) != 0) fail("set the size", path_);
  sync_descriptor(fd_, path_);
  const int fd = std::exchange(fd_, -1);
  if (::close(fd) != 0 && errno != EINTR) fail("close", path_);
  return summary;
}

void restamp_file(const std::string& path, const FileFormat& format, const Uuid& uuid,
                  uint32_t shard, uint32_t shards) {
  const Descriptor file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (file.fd < 0) fail("open", path);
  FileHeader header = read_header(file.fd, size_of(file.fd, path), format, path);
  if (header.uuid == uuid && header.shard == shard && header.shards == shards) return;
  header.uuid = uuid;
  header.shard = shard;
  header.shards = shards;
  unsigned char bytes[kHeaderBytes];
  encode(format, header, bytes);
  write_exactly(file.fd, bytes, sizeof(bytes), 0, path);
  sync_descriptor(file.fd, path);
}

// -------------------------------------------------------------------------------------------------
// Reading

FileReader::FileReader(int directory, const std::string& name, std::string path,
                       const FileFormat& format, FileMode mode, const ParallelFor& parallel)
    : path_(std::move(path)) {
  Descriptor file(::openat(directory, name.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.fd < 0) fail("open", path_);
  summary_.bytes = size_of(file.fd, path_);
  header_ = read_header(file.fd, summary_.bytes, format, path_);
  blocks_ = block_count(size());
  verified_ = std::make_unique<uint64_t[]>(blocks_ / 64 + 1);

  const uint64_t table = table_offset(size()), payload_end = kPayloadOffset + size();
  std::vector<unsigned char> tail(summary_.bytes - payload_end);
  read_exactly(file.fd, tail.data(), tail.size(), payload_end, path_);
  const unsigned char* at = tail.data() + (table - payload_end);
  if (!all_zero(tail.data(), at)) corrupt("the bytes after the payload are not zero");
  for (uint64_t block = 0; block < blocks_; ++block) table_.push_back(get<uint32_t>(at, 4 * block));
  summary_.table_crc = get<uint32_t>(at, 4 * blocks_);
  if (summary_.table_crc != crc32c(table_.data(), 4 * blocks_))
    corrupt("the block table does not have its checksum");
  if (std::memcmp(at + 4 * blocks_ + 4, kEndMagic.data(), kEndMagic.size()) != 0)
    corrupt("the file does not end with the end magic");

  fd_ = std::exchange(file.fd, -1);
  try {
    if (mode == FileMode::kRam) {
      read_payload(parallel);
    } else {
      map_ = ::mmap(nullptr, summary_.bytes, PROT_READ, MAP_SHARED, fd_, 0);
      if (map_ == MAP_FAILED) fail("map", path_);
      data_ = static_cast<const unsigned char*>(map_) + kPayloadOffset;
    }
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

FileReader::~FileReader() {
  if (map_ != nullptr) ::munmap(map_, summary_.bytes);
  if (fd_ >= 0) ::close(fd_);
}

// Copies the payload into memory, checks it and lets go of the file.
void FileReader::read_payload(const ParallelFor& parallel) {
  memory_.resize(size());
  unsigned char* memory = memory_.data();
  data_ = memory;
  std::mutex mutex;
  std::exception_ptr failure;
  parallel(0, static_cast<int64_t>(blocks_), kBlockGrain, [&](int64_t begin, int64_t end) {
    try {
      const uint64_t from = static_cast<uint64_t>(begin) << kFileBlockShift;
      const uint64_t to = std::min(static_cast<uint64_t>(end) << kFileBlockShift, size());
      read_exactly(fd_, memory + from, to - from, kPayloadOffset + from, path_);
      require(from, to);
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
    }
  });
  if (failure != nullptr) std::rethrow_exception(failure);
  ::close(std::exchange(fd_, -1));
}

bool FileReader::verify_block(uint64_t block) const noexcept {
  if (block >= blocks_) return false;
  const uint64_t offset = block << kFileBlockShift;
  const size_t bytes = std::min(kFileBlock, size() - offset);
  if (crc32c(data_ + offset, bytes) != table_[block]) return false;
  __atomic_fetch_or(&verified_[block / 64], uint64_t{1} << (block % 64), __ATOMIC_RELEASE);
  return true;
}

void FileReader::require(uint64_t begin, uint64_t end) const {
  if (begin >= end) return;
  for (uint64_t block = begin >> kFileBlockShift; block <= (end - 1) >> kFileBlockShift; ++block) {
    const uint64_t word = __atomic_load_n(&verified_[block / 64], __ATOMIC_ACQUIRE);
    if ((word >> (block % 64) & 1) == 0 && !verify_block(block)) raise_block(block);
  }
}

void FileReader::verify_all(const ParallelFor& parallel) const {
  check_size();
  std::atomic<uint64_t> bad{UINT64_MAX};
  parallel(0, static_cast<int64_t>(blocks_), kBlockGrain, [&](int64_t begin, int64_t end) {
    for (auto block = static_cast<uint64_t>(begin); block < static_cast<uint64_t>(end); ++block)
      if (!verify_block(block)) bad = block;
  });
  if (bad != UINT64_MAX) raise_block(bad);
}

void FileReader::raise_block(uint64_t block) const {
  corrupt(message("block ", block, " (bytes ", kPayloadOffset + (block << kFileBlockShift), " to ",
                  kPayloadOffset + std::min((block + 1) << kFileBlockShift, size()) - 1,
                  ") does not have its checksum"));
}

void FileReader::check_size() const {
  if (fd_ < 0) return;
  const uint64_t now = size_of(fd_, path_);
  if (now != summary_.bytes)
    corrupt(
        message("the file has ", now, " bytes, it had ", summary_.bytes, " when it was opened"));
}

void FileReader::corrupt(const std::string& what) const { throw CorruptError(path_ + ": " + what); }

// -------------------------------------------------------------------------------------------------
// Folders

void sync_directory(const std::string& path) {
  const Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.fd < 0) fail("open", path);
  // Some file systems cannot sync folders and say so with EINVAL; there is nothing more to do then.
  while (::fsync(folder.fd) != 0) {
    if (errno == EINVAL) return;
    if (errno != EINTR) fail("sync", path);
  }
}

bool exchange_paths(const std::string& a, const std::string& b) {
#ifdef SYS_renameat2
  constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE
  if (::syscall(SYS_renameat2, AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), kExchange) == 0)
    return true;
  if (errno != EINVAL && errno != ENOSYS && errno != EXDEV) fail("exchange", a);
#endif
  return false;
}

}  // namespace alignops
