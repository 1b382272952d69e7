// AVX2 matmul on layout T2P.
//
// Tile of 32 rows x 32 columns = 8 blocks: four vectors of idx (byte r: blocks 2j and 2j+1 of row r
// in its low and high nibble) and one vector of signs (byte r: block b in bit 7-b, so that doubling
// the byte brings up the next block).
// pshufb looks up 32 rows at once in a 16-byte table. A table entry, |v| <= 384, is wider than a
// byte: it is stored as two signed digits of base 31, whose sums over the 8 blocks of a tile still
// fit bytes. So a block costs two shuffles, two sign flips and two additions of bytes, and digits
// are only joined (maddubs with 1, 31) once a tile. The usual form joins bytes to words per block.
//   bytes per output row: 5K/32;  lookups: K/4 per slot.
// Float tables are four byte planes: four shuffles and eight interleavings per block.
// There is no decode and dot product: for every number of slots it came out slower, 0.5x to 0.75x
// (maddubs needs as many instructions for 8 rows as a lookup for 32).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "avx2_linear.h"
#include "common/simd_avx2.h"

namespace alignops::ternary {

using namespace avx2;

namespace {

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
__m256i table16(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

const uint8_t* tile_at(const LinearArgs& a, int64_t row_tile, int64_t block) {
  return a.packed + (row_tile * (a.blocks / kTileBlocks) + block / kTileBlocks) * kTileBytes;
}

// idx of block i of a tile in the low nibbles.
[[gnu::always_inline]] inline __m256i nibbles(const uint8_t* tile, int i) {
  const __m256i v = load(tile + i / 2 * 32);
  return _mm256_and_si256(i % 2 == 0 ? v : _mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
}

// Walks over the signs of a tile for psignb: bit 7 is the sign of the current block, and no byte is
// zero (a bit shifted in behind the signs keeps it so).
struct Signs {
  __m256i next;
  [[gnu::always_inline]] __m256i take(int i) {
    const __m256i one = _mm256_set1_epi8(1);
    if (i == 1) next = _mm256_or_si256(next, one);
    const __m256i now = i == 0 ? _mm256_or_si256(next, one) : next;
    next = _mm256_add_epi8(next, next);
    return now;
  }
};

// 32 float outputs of a row tile, 8 rows each.
struct Rows {
  __m256 v[4];
};

void finish(const LinearArgs& a, int64_t t, int64_t row, Rows out) {
  for (int64_t i = 0; i < 4 && row + 8 * i < a.n; ++i) {
    const int64_t r = row + 8 * i, left = a.n - r < 8 ? a.n - r : 8;
    if (a.bias != nullptr)
      out.v[i] = _mm256_add_ps(out.v[i], left == 8 ? load8_f32(a.bias, a.bias_dtype, r)
                                                   : load8_f32(a.bias, a.bias_dtype, r, left));
    if (left == 8) {
      store8_f32(a.y, a.y_dtype, t * a.ldy + r, out.v[i]);
    } else {
      store8_f32(a.y, a.y_dtype, t * a.ldy + r, out.v[i], left);
    }
  }
}

const float* row_scale(const LinearArgs& a, const Segment& s, int64_t row_tile) {
  return a.weight_scale + s.weight_group * a.rows + row_tile * kTileRows;
}

// --- integer lookup

// Sums of blocks [begin, end), at most kFlushBlocks, added to int32 rows.
template <int kTiles, int kSlots>
[[gnu::always_inline]] inline void lookup_run(const LinearArgs& a, int64_t row_tile,
                                              const uint8_t* tables, int64_t begin, int64_t end,
                                              __m256i (&sums)[kSlots][kTiles][4]) {
  const __m256i weights = _mm256_set1_epi16(kBase * 256 + 1);  // bytes 1, 31
  // rows 0..7 and 16..23; rows 8..15 and 24..31
  __m256i acc[kSlots][kTiles][2] = {};
  for (int64_t b = begin; b < end; b += kTileBlocks) {
    __m256i low[kSlots][kTiles] = {}, high[kSlots][kTiles] = {};
    const uint8_t* tile[kTiles];
    Signs signs[kTiles];
    for (int r = 0; r < kTiles; ++r) {
      tile[r] = tile_at(a, row_tile + r, b);
      signs[r].next = load(tile[r] + 128);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileBlocks; ++i) {
      __m256i code[kTiles], sign[kTiles];
      for (int r = 0; r < kTiles; ++r) {
        code[r] = nibbles(tile[r], i);
        sign[r] = signs[r].take(i);
      }
      for (int s = 0; s < kSlots; ++s) {
        const uint8_t* table = tables + (s * a.blocks + b + i) * 32;
        const __m256i digit0 = table16(table), digit1 = table16(table + 16);
        for (int r = 0; r < kTiles; ++r) {
          low[s][r] = _mm256_add_epi8(
              low[s][r], _mm256_sign_epi8(_mm256_shuffle_epi8(digit0, code[r]), sign[r]));
          high[s][r] = _mm256_add_epi8(
              high[s][r], _mm256_sign_epi8(_mm256_shuffle_epi8(digit1, code[r]), sign[r]));
        }
      }
    }
    for (int s = 0; s < kSlots; ++s)
      for (int r = 0; r < kTiles; ++r) {
        const __m256i d0 = _mm256_unpacklo_epi8(low[s][r], high[s][r]);
        const __m256i d1 = _mm256_unpackhi_epi8(low[s][r], high[s][r]);
        acc[s][r][0] = _mm256_add_epi16(acc[s][r][0], _mm256_maddubs_epi16(weights, d0));
        acc[s][r][1] = _mm256_add_epi16(acc[s][r][1], _mm256_maddubs_epi16(weights, d1));
      }
  }
  for (int s = 0; s < kSlots; ++s)
    for (int r = 0; r < kTiles; ++r)
      for (int i = 0; i < 4; ++i) {
        const __m256i half = acc[s][r][i % 2];
        const __m128i rows =
            i < 2 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
        sums[s][r][i] = _mm256_add_epi32(sums[s][r][i], _mm256_cvtepi16_epi32(rows));
      }
}

// One token: one slot, or the two limbs of a16.
template <int kTiles, int kSlots>
void lookup_tiles(const LinearArgs& a, int64_t row_tile, int64_t token) {
  const uint8_t* tables = a.tables + token * kSlots * a.blocks * 32;
  Rows out[kTiles] = {};
  for (int64_t i = 0; i < a.num_segments; ++i) {
    const Segment& s = a.segments[i];
    __m256i sums[kSlots][kTiles][4] = {};
    for (int64_t b = s.begin; b < s.end; b += kFlushBlocks)
      lookup_run<kTiles, kSlots>(a, row_tile, tables, b,
                                 b + kFlushBlocks < s.end ? b + kFlushBlocks : s.end, sums);
    const __m256 act = _mm256_set1_ps(a.act_scale[token * a.act_groups + s.act_group]);
    for (int r = 0; r < kTiles; ++r) {
      const float* scale = row_scale(a, s, row_tile + r);
      for (int j = 0; j < 4; ++j) {
        __m256i sum = sums[0][r][j];
        if (kSlots == 2) sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 8), sums[kSlots - 1][r][j]);
        const __m256 product = _mm256_mul_ps(act, _mm256_loadu_ps(scale + 8 * j));
        out[r].v[j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), product, out[r].v[j]);
      }
    }
  }
  for (int r = 0; r < kTiles; ++r) finish(a, token, (row_tile + r) * kTileRows, out[r]);
}

// Two row tiles share a table load, or the two limbs of a16 the codes of one.
void lookup(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.act == Act::kA16) {
    for (int64_t rt = begin; rt < end; ++rt)
      for (int64_t t = 0; t < a.m; ++t) lookup_tiles<1, 2>(a, rt, t);
    return;
  }
  int64_t rt = begin;
  for (; rt + 2 <= end; rt += 2)
    for (int64_t t = 0; t < a.m; ++t) lookup_tiles<2, 1>(a, rt, t);
  for (; rt < end; ++rt)
    for (int64_t t = 0; t < a.m; ++t) lookup_tiles<1, 1>(a, rt, t);
}

// --- lossless lookup

// Interleaved byte planes give rows 0..3 and 16..19, 4..7 and 20..23, 8..11 and 24..27, 12..15 and
// 28..31; this puts them in order.
void in_order(__m256i (&v)[4]) {
  const __m256i v0 = _mm256_permute2x128_si256(v[0], v[1], 0x20);
  const __m256i v1 = _mm256_permute2x128_si256(v[2], v[3], 0x20);
  const __m256i v2 = _mm256_permute2x128_si256(v[0], v[1], 0x31);
  const __m256i v3 = _mm256_permute2x128_si256(v[2], v[3], 0x31);
  v[0] = v0, v[1] = v1, v[2] = v2, v[3] = v3;
}

// Bytes 0..3 of 32 values, one plane a vector, as 32-bit lanes in that order.
[[gnu::always_inline]] inline void interleave(const __m256i (&plane)[4], __m256i (&words)[4]) {
  const __m256i low01 = _mm256_unpacklo_epi8(plane[0], plane[1]);
  const __m256i high01 = _mm256_unpackhi_epi8(plane[0], plane[1]);
  const __m256i low23 = _mm256_unpacklo_epi8(plane[2], plane[3]);
  const __m256i high23 = _mm256_unpackhi_epi8(plane[2], plane[3]);
  words[0] = _mm256_unpacklo_epi16(low01, low23);
  words[1] = _mm256_unpackhi_epi16(low01, low23);
  words[2] = _mm256_unpacklo_epi16(high01, high23);
  words[3] = _mm256_unpackhi_epi16(high01, high23);
}

void lookup_f32_tile(const LinearArgs& a, int64_t row_tile, int64_t token) {
  const uint8_t* tables = a.tables + token * a.blocks * 64;
  Rows out = {};
  for (int64_t i = 0; i < a.num_segments; ++i) {
    const Segment& s = a.segments[i];
    Rows acc = {};
    for (int64_t b = s.begin; b < s.end; b += kTileBlocks) {
      const uint8_t* tile = tile_at(a, row_tile, b);
      __m256i sign = load(tile + 128);
#pragma GCC unroll 8
      for (int j = 0; j < kTileBlocks; ++j) {
        const uint8_t* table = tables + (b + j) * 64;
        const __m256i code = nibbles(tile, j);
        __m256i plane[4], words[4];
        for (int p = 0; p < 4; ++p) plane[p] = _mm256_shuffle_epi8(table16(table + 16 * p), code);
        plane[3] = _mm256_xor_si256(
            plane[3], _mm256_and_si256(sign, _mm256_set1_epi8(static_cast<char>(0x80))));
        sign = _mm256_add_epi8(sign, sign);
        interleave(plane, words);
        for (int p = 0; p < 4; ++p)
          acc.v[p] = _mm256_add_ps(acc.v[p], _mm256_castsi256_ps(words[p]));
      }
    }
    __m256i sums[4];
    for (int p = 0; p < 4; ++p) sums[p] = _mm256_castps_si256(acc.v[p]);
    in_order(sums);
    const float* scale = row_scale(a, s, row_tile);
    for (int p = 0; p < 4; ++p)
      out.v[p] =
          _mm256_fmadd_ps(_mm256_castsi256_ps(sums[p]), _mm256_loadu_ps(scale + 8 * p), out.v[p]);
  }
  finish(a, token, row_tile * kTileRows, out);
}

void lookup_f32(const LinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t rt = begin; rt < end; ++rt)
    for (int64_t t = 0; t < a.m; ++t) lookup_f32_tile(a, rt, t);
}

}  // namespace

extern const LinearKernels kLinearAvx2 = {
    .layout = Layout::kT2P,
    .tile_rows = kTileRows,
    .tile_blocks = kTileBlocks,
    .lookup_slots = INT64_MAX,
    .panel = 0,
    .table_bytes = 32,
    .table_bytes_f32 = 64,
    .pack = pack,
    .unpack = unpack,
    .stage = stage,
    .tables = tables,
    .tables_f32 = tables_f32,
    .lookup = lookup,
    .lookup_f32 = lookup_f32,
    .dot = nullptr,
};

}  // namespace alignops::ternary
