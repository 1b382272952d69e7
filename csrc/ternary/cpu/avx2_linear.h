// What the AVX2 files of the matmul share: the T2P tile, and the functions defined in
// avx2_stage.cpp.
#pragma once

#include <cstdint>

#include "ternary/kernels.h"

namespace alignops::ternary::avx2 {

inline constexpr int64_t kTileRows = 32, kTileBlocks = 8, kTileBytes = 160;

// Integer tables hold a sum v, |v| <= 384, as two signed digits: v = low + kBase * high with
// |low| <= 15 and |high| <= 12, so that eight blocks add up in bytes.
inline constexpr int16_t kBase = 31;

void pack(const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
          int64_t begin, int64_t end);
void unpack(const uint8_t* packed, int64_t n, int64_t k, uint8_t* idx, uint8_t* sign, int64_t begin,
            int64_t end);
void stage(const StageArgs& a, int64_t token_begin, int64_t token_end);
void tables(const int8_t* q, int64_t blocks, uint8_t* out);
void tables_f32(const float* f, int64_t blocks, uint8_t* out);

}  // namespace alignops::ternary::avx2
