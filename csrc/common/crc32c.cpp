#include "crc32c.h"

#include <cstring>

#include "isa.h"

namespace alignops {
namespace {

// kTables.of[k][b]: the CRC of byte b followed by k zero bytes, without the inversions.
struct Tables {
  uint32_t of[8][256];
};

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78u : 0u);
    tables.of[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k)
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables.of[k - 1][byte];
      tables.of[k][byte] = (before >> 8) ^ tables.of[0][before & 0xFF];
    }
  return tables;
}

constexpr Tables kTables = make_tables();

#if defined(__x86_64__)
bool hardware_agrees() noexcept {
  unsigned char bytes[1000];
  for (int i = 0; i < 1000; ++i) bytes[i] = static_cast<unsigned char>(i * i + (i >> 3));
  return crc32c_avx2(bytes + 1, 999, 5) == crc32c_scalar(bytes + 1, 999, 5);
}
#endif

}  // namespace

uint32_t crc32c_scalar(const void* data, size_t size, uint32_t crc) {
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; size >= 8; size -= 8, p += 8) {
    // Byte by byte, so that the order of bytes in memory words does not matter.
    const uint32_t low =
        crc ^ (uint32_t{p[0]} | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24);
    crc = kTables.of[7][low & 0xFF] ^ kTables.of[6][low >> 8 & 0xFF] ^
          kTables.of[5][low >> 16 & 0xFF] ^ kTables.of[4][low >> 24] ^ kTables.of[3][p[4]] ^
          kTables.of[2][p[5]] ^ kTables.of[1][p[6]] ^ kTables.of[0][p[7]];
  }
  for (; size > 0; --size, ++p) crc = (crc >> 8) ^ kTables.of[0][(crc ^ *p) & 0xFF];
  return ~crc;
}

uint32_t crc32c(const void* data, size_t size, uint32_t crc) noexcept {
#if defined(__x86_64__)
  static const bool agrees = isa_supported(Isa::kAvx2) && hardware_agrees();
  if (agrees && active_isa() >= Isa::kAvx2) return crc32c_avx2(data, size, crc);
#endif
  return crc32c_scalar(data, size, crc);
}

}  // namespace alignops
