// What goes wrong with an index, as C++ types. The binding turns each into the Python class of the
// same name in alignops.spans.errors; FileError (common/file.h) becomes OSError with its errno.
#pragma once

#include <stdexcept>
#include <string>

#include "../common/file.h"

namespace alignops::spans {

// Not a file of an index at all: bad magic or endian tag. ValueError.
using NotAnIndexError = FormatError;
// Written by an incompatible version. ValueError.
using IndexVersionError = VersionError;
// Truncated, checksum, UUID or size mismatch, positions out of range or order. OSError.
using IndexCorruptError = CorruptError;

// No manifest, or a build that has not finished. OSError.
struct IndexIncompleteError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Another vocabulary or fingerprint than the caller's or the other index's. ValueError.
struct TokenizerMismatchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The caller asked to stop (Progress::cancel).
struct Cancelled : std::runtime_error {
  Cancelled() : std::runtime_error("cancelled") {}
};

}  // namespace alignops::spans
