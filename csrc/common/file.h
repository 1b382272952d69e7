// Checksummed files. A file is a header of 128 bytes, zeros up to byte 4096, the payload, zeros up
// to a multiple of 8, and the block table: one CRC32C per 64 KiB of payload, the CRC32C of these,
// and 8 bytes of end magic. Everything is little-endian. docs/spans-format.md has the byte table.
//
// Files are written once, front to back, and never through a mapping, where a full disk would be a
// signal. They are read through read-only mappings or into memory.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace alignops {

// A failed system call: Python's OSError with errno and path.
struct FileError : std::runtime_error {
  FileError(const std::string& what, int error_number, std::string file)
      : std::runtime_error(what), code(error_number), path(std::move(file)) {}
  int code;
  std::string path;
};
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct VersionError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct CorruptError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace alignops
