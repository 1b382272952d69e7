// CRC32C with the instruction of SSE 4.2, which takes 3 cycles and can start one every cycle: three
// streams side by side, 8 bytes per cycle. The CRC of a concatenation is the CRC of the first part
// moved over as many zero bytes as the second has, xor the CRC of the second; moving is linear in
// the bits, so that four table look-ups do it for a fixed distance.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "crc32c.h"

namespace alignops {
namespace {

constexpr size_t kLong = 8192, kShort = 256;  // bytes of a stream

struct Shift {
  uint32_t of[4][256];
};

// A linear map of 32 bits: the images of the single bits.
struct Matrix {
  uint32_t image[32];
};

constexpr uint32_t apply(const Matrix& m, uint32_t v) {
  uint32_t sum = 0;
  for (int bit = 0; v != 0; ++bit, v >>= 1)
    if ((v & 1) != 0) sum ^= m.image[bit];
  return sum;
}

// Moves over `bytes` zero bytes, a power of two: squares the map of one bit.
constexpr Shift make_shift(size_t bytes) {
  Matrix m{};
  m.image[0] = 0x82F63B78u;
  for (int bit = 1; bit < 32; ++bit) m.image[bit] = uint32_t{1} << (bit - 1);
  for (size_t bits = 1; bits < 8 * bytes; bits *= 2) {
    Matrix square{};
    for (int bit = 0; bit < 32; ++bit) square.image[bit] = apply(m, m.image[bit]);
    m = square;
  }
  Shift shift{};
  for (int k = 0; k < 4; ++k)
    for (uint32_t byte = 0; byte < 256; ++byte) shift.of[k][byte] = apply(m, byte << (8 * k));
  return shift;
}

constexpr Shift kShiftLong = make_shift(kLong), kShiftShort = make_shift(kShort);

uint32_t move(const Shift& shift, uint32_t crc) {
  return shift.of[0][crc & 0xFF] ^ shift.of[1][crc >> 8 & 0xFF] ^ shift.of[2][crc >> 16 & 0xFF] ^
         shift.of[3][crc >> 24];
}

uint64_t load(const unsigned char* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;
}

uint32_t three_streams(const unsigned char* p, size_t stream, const Shift& shift, uint32_t crc) {
  uint64_t a = crc, b = 0, c = 0;
  for (size_t i = 0; i < stream; i += 8) {
    a = _mm_crc32_u64(a, load(p + i));
    b = _mm_crc32_u64(b, load(p + stream + i));
    c = _mm_crc32_u64(c, load(p + 2 * stream + i));
  }
  const uint32_t ab = move(shift, static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
  return move(shift, ab) ^ static_cast<uint32_t>(c);
}

}  // namespace

uint32_t crc32c_avx2(const void* data, size_t size, uint32_t crc) {
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; size >= 3 * kLong; size -= 3 * kLong, p += 3 * kLong)
    crc = three_streams(p, kLong, kShiftLong, crc);
  for (; size >= 3 * kShort; size -= 3 * kShort, p += 3 * kShort)
    crc = three_streams(p, kShort, kShiftShort, crc);
  for (; size >= 8; size -= 8, p += 8) crc = static_cast<uint32_t>(_mm_crc32_u64(crc, load(p)));
  for (; size > 0; --size, ++p) crc = _mm_crc32_u8(crc, *p);
  return ~crc;
}

}  // namespace alignops
