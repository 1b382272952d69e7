// What the AVX-512 files of the matmul share: the T5W tile, and the functions defined in
// avx512_stage.cpp.
#pragma once

#include <cstdint>

#include "ternary/kernels.h"

namespace alignops::ternary::avx512 {

inline constexpr int64_t kTileRows = 32, kTileBlocks = 16, kTileBytes = 320;

// Lane p of idx 0..15 as value + 1, two bits per idx.
inline constexpr uint32_t kLane[4] = {0xAAAAAA55U, 0x222255AAU, 0x0A552222U, 0x550A0A0AU};

static constexpr int lane_of(uint32_t code, int p) {
  const int v = static_cast<int>(kLane[p] >> 2 * (code & 15) & 3) - 1;
  return code >= 16 ? -v : v;
}

void pack(const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
          int64_t begin, int64_t end);
void unpack(const uint8_t* packed, int64_t n, int64_t k, uint8_t* idx, uint8_t* sign, int64_t begin,
            int64_t end);
void stage(const StageArgs& a, int64_t token_begin, int64_t token_end);
void tables(const int8_t* q, int64_t blocks, uint8_t* out);
void tables_f32(const float* f, int64_t blocks, uint8_t* out);

}  // namespace alignops::ternary::avx512
