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

}  // namespace alignops::ternary
