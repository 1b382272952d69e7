// CRC32C (Castagnoli polynomial, reflected; initial and final value inverted): the checksum of
// iSCSI, ext4 and RFC 3720.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alignops {

// Of `size` bytes, continuing one of earlier bytes: crc32c(ab) = crc32c(b, crc32c(a)).
uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0) noexcept;

// The implementations behind it; the second needs the avx2 level. Not noexcept, for which the
// compiler would emit a weak symbol in an object with flags of its own.
uint32_t crc32c_scalar(const void* data, size_t size, uint32_t crc);
uint32_t crc32c_avx2(const void* data, size_t size, uint32_t crc);

}  // namespace alignops
