// The packed layout that the CUDA and Triton kernels read, and the arithmetic of indices and codes
// around it. Plain functions of integers, so that host code can call them too.
//
// A tile is 32 rows x 128 columns = 32 lanes x 5 words (little endian), 640 bytes; tiles lie row
// tile by row tile, column tiles inside. Lane 4 g + t (g = 0..7, t = 0..3) holds rows g, g + 8, g +
// 16, g + 24 of the tile at columns 32 t .. 32 t + 31, that is 8 blocks j of each row w = 0..3:
//   bytes 16 lane + 4 w + i, i = 0..3   idx of blocks 2 i (low nibble) and 2 i + 1 (high) of row g
//   + 8 w word 128 + lane                     sign of block j of row g + 8 w in bit 8 (j / 2) + 2 w
//   + j % 2
// A warp therefore reads a tile as one 16-byte and one 4-byte load per thread, both coalesced, and
// holds exactly the fragments that mma.sync wants: rows g + 8 w in lane group g. Rows and columns
// beyond the matrix are code 0.
#pragma once

#include <cstdint>

#include "../../common/host_device.h"

namespace alignops::ternary::cuda {

inline constexpr int kTileRows = 32;
inline constexpr int kTileColumns = 128;
inline constexpr int kTileWords = 160;
inline constexpr int kTileBytes = 4 * kTileWords;
inline constexpr int kSignWord = 128;  // first sign word of a tile
inline constexpr int kLaneBlocks = 8;  // blocks of one row that a lane holds

// Tiles that cover the columns of a row.
ALIGNOPS_HD int64_t column_tiles(int64_t k) { return (k + kTileColumns - 1) / kTileColumns; }

ALIGNOPS_HD int sign_bit(int w, int j) { return 8 * (j / 2) + 2 * w + j % 2; }

// Column of lane p of block b in the matrix: the lanes of a block are `stride` columns apart.
ALIGNOPS_HD int64_t column_of(int64_t block, int p, int64_t stride) {
  return stride == 1 ? 4 * block + p : 64 * (block / 16) + block % 16 + 16 * p;
}

// Value of lane p of a code: bits 2 idx and 2 idx + 1 of kLanes[p] hold it plus one.
ALIGNOPS_HD int lane_value(unsigned code, int p) {
  const uint32_t lanes = p == 0   ? 0xaaaaaa55u
                         : p == 1 ? 0x222255aau
                         : p == 2 ? 0x0a552222u
                                  : 0x550a0a0au;
  const int value = static_cast<int>(lanes >> (2 * (code & 15)) & 3) - 1;
  return code & 16 ? -value : value;
}

// The four lanes of a code as bytes: `plus` for +1, `minus` for -1, 0 for 0.
ALIGNOPS_HD uint32_t lane_bytes(unsigned code, uint32_t plus, uint32_t minus) {
  uint32_t bytes = 0;
  for (int p = 0; p < 4; ++p) {
    const int value = lane_value(code, p);
    bytes |= (value > 0 ? plus : value < 0 ? minus : 0u) << (8 * p);
  }
  return bytes;
}

// 4 * code of blocks 2 i + parity, i = 0..3, of row w of a lane, one per byte: offsets into a table
// of 32 words.
ALIGNOPS_HD uint32_t table_offsets(uint32_t idx, uint32_t sign, int w, int parity) {
  const uint32_t index = parity == 0 ? idx << 2 : idx >> 2;
  const int shift = 6 - 2 * w - parity;  // moves bits 8 i + 2 w + parity to 8 i + 6
  const uint32_t signs = shift >= 0 ? sign << shift : sign >> -shift;
  return (index & 0x3c3c3c3cu) | (signs & 0x40404040u);
}

}  // namespace alignops::ternary::cuda
