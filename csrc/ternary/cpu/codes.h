// The 5-bit code as constants, from which the vector kernels build their tables. Everything has
// internal linkage: it is compiled per instruction set.
#pragma once

#include <cstdint>

namespace alignops::ternary {
namespace {

// Lane p of idx 0..15 as value + 1, two bits per idx.
constexpr uint32_t kLane[4] = {0xAAAAAA55U, 0x222255AAU, 0x0A552222U, 0x550A0A0AU};

// Lane p of code 0..31: -1, 0 or 1.
constexpr int lane_of(uint32_t code, int p) {
  const int v = static_cast<int>(kLane[p] >> 2 * (code & 15) & 3) - 1;
  return code >= 16 ? -v : v;
}

// Factors of the four activations in the sum of each code.
struct Int16Lanes {
  alignas(64) int16_t v[4][32];
};
constexpr Int16Lanes make_int16_lanes() {
  Int16Lanes t{};
  for (int p = 0; p < 4; ++p)
    for (uint32_t c = 0; c < 32; ++c) t.v[p][c] = static_cast<int16_t>(lane_of(c, p));
  return t;
}
constexpr Int16Lanes kInt16Lanes = make_int16_lanes();

// The same as masks of float32 bits, for idx 0..15.
struct FloatLanes {
  alignas(64) uint32_t keep[4][16];  // all ones where the lane is kept
  alignas(64) uint32_t flip[4][16];  // sign bit where it is -1
};
constexpr FloatLanes make_float_lanes() {
  FloatLanes t{};
  for (int p = 0; p < 4; ++p)
    for (uint32_t c = 0; c < 16; ++c) {
      t.keep[p][c] = lane_of(c, p) != 0 ? 0xFFFFFFFFU : 0;
      t.flip[p][c] = lane_of(c, p) < 0 ? 0x80000000U : 0;
    }
  return t;
}
constexpr FloatLanes kFloatLanes = make_float_lanes();

}  // namespace
}  // namespace alignops::ternary
