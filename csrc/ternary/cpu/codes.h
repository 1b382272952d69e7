// The 5-bit code as constants, for building tables at compile time.
#pragma once

#include <cstdint>

namespace alignops::ternary {

// Lane p of idx 0..15 as value + 1, two bits per idx.
inline constexpr uint32_t kLane[4] = {0xAAAAAA55U, 0x222255AAU, 0x0A552222U, 0x550A0A0AU};

// Lane p of code 0..31: -1, 0 or 1.
static constexpr int lane_of(uint32_t code, int p) {
  const int v = static_cast<int>(kLane[p] >> 2 * (code & 15) & 3) - 1;
  return code >= 16 ? -v : v;
}

// Code of block b of a row of the canonical planes.
static inline uint32_t plane_code(const uint8_t* idx, const uint8_t* sign, int64_t b) {
  const uint32_t low = idx[b >> 1] >> (b & 1) * 4 & 15U;
  return low | (sign[b >> 3] >> (b & 7) & 1U) << 4;
}

}  // namespace alignops::ternary
