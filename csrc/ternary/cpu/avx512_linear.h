// What the AVX-512 files of the matmul share: the T5W tile, and the functions defined in
// avx512_stage.cpp.
#pragma once

#include <cstdint>

#include "ternary/kernels.h"

namespace alignops::ternary::avx512 {

// A tile is two halves of 32 rows, one after the other: a pass over the columns reads the weight in
// one stream.
inline constexpr int64_t kHalfRows = 32, kHalfBytes = 320;
inline constexpr int64_t kTileRows = 64, kTileBlocks = 16, kTileBytes = 640;

void pack(const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
          int64_t begin, int64_t end);
void unpack(const uint8_t* packed, int64_t n, int64_t k, uint8_t* idx, uint8_t* sign, int64_t begin,
            int64_t end);
void stage(const StageArgs& a, int64_t token_begin, int64_t token_end);
void tables(const int8_t* q, int64_t blocks, uint8_t* out);
void tables_f32(const float* f, int64_t blocks, uint8_t* out);

}  // namespace alignops::ternary::avx512
