// AVX-512 matmul on layout T5W.
//
// Tile of 32 rows x 64 columns = 16 blocks = five zmm w_0..w_4 of 32 u16, one 16-bit lane per row:
//   w_j = c_3j | c_3j+1 << 5 | c_3j+2 << 10 | bit j of c_15 << 15.
// A zmm is also a signed 32-entry int16 table, and vpermw reads only the low 5 bits of its index:
// one lookup of 32 rows is one shift, one permute, one add. Right shifts are multiplications
// (vpmulhuw by a power of two), because shifts and permutes compete for the same ports while the
// multiplier is idle. As 32-bit lanes the same words hold rows 2i (low half) and 2i+1 (high half);
// float tables and the dot kernel use them so.
//   bytes per output row: 5K/32;  lookups: K/4 per slot, 32 per instruction (16 for float32).
// The dot kernel decodes a block to one 32-bit lane (four bytes T+1) with a 32-entry vpermi2d and
// multiplies it by the slot's four activations with vpdpbusd; sum((T+1) q) - sum(q) = I.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "avx512_linear.h"
#include "common/simd_avx512.h"

namespace alignops::ternary {

using namespace avx512;

namespace {

constexpr int64_t kLookupSlots = 3;  // with more slots, decode and dot is faster
constexpr int64_t kPanel = 12;
constexpr int64_t kPrefetchBytes = 24 * 1024;

const uint8_t* tile_at(const LinearArgs& a, int64_t row_tile, int64_t block) {
  return a.packed + (row_tile * (a.blocks / kTileBlocks) + block / kTileBlocks) * kTileBytes;
}

// --- integer lookup

// Logical right shift of 16-bit lanes on the multiplier.
template <int kShift>
[[gnu::always_inline]] inline __m512i shift_by_multiplying(__m512i w) {
  return kShift == 0
             ? w
             : _mm512_mulhi_epu16(w, _mm512_set1_epi16(static_cast<int16_t>(1 << (16 - kShift))));
}

template <int kShift>
[[gnu::always_inline]] inline __m512i shift(__m512i w) {
  return kShift == 0 ? w : _mm512_srli_epi16(w, kShift);
}

// Words whose 16-bit lanes hold the code of block kBlock in their low 5 bits; the bits above are
// not cleared.
template <int kBlock, bool kMultiply>
[[gnu::always_inline]] inline __m512i code_word(const uint8_t* tile) {
  const auto word = [tile](int j) { return _mm512_loadu_si512(tile + 64 * j); };
  if constexpr (kBlock < 15) {
    constexpr int kShift = kBlock % 3 * 5;
    return kMultiply ? shift_by_multiplying<kShift>(word(kBlock / 3))
                     : shift<kShift>(word(kBlock / 3));
  } else {
    // Bit 15 of w_j becomes bit j: t | (w & mask).
    __m512i t = shift<15>(word(0));
    t = _mm512_ternarylogic_epi32(t, shift<14>(word(1)), _mm512_set1_epi16(2), 0xF8);
    t = _mm512_ternarylogic_epi32(t, shift<13>(word(2)), _mm512_set1_epi16(4), 0xF8);
    t = _mm512_ternarylogic_epi32(t, shift<12>(word(3)), _mm512_set1_epi16(8), 0xF8);
    return _mm512_ternarylogic_epi32(t, shift<11>(word(4)), _mm512_set1_epi16(16), 0xF8);
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(constants kFrom .. kTo-1).
template <int kFrom, int kTo, typename F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  if constexpr (kFrom < kTo) {
    f(Constant<kFrom>{});
    unrolled<kFrom + 1, kTo>(f);
  }
}

// Calls f(first block of the tile, constant block in the tile) for blocks [begin, end), multiples
// of 8.
template <typename F>
[[gnu::always_inline]] inline void for_blocks(int64_t begin, int64_t end, const F& f) {
  for (int64_t b = begin; b < end; b += 8) {
    if (b % kTileBlocks == 0) {
      unrolled<0, 8>([&](auto i) __attribute__((always_inline)) { f(b, i); });
      b += 8;
      if (b == end) break;
    }
    unrolled<8, 16>([&](auto i) __attribute__((always_inline)) { f(b - 8, i); });
  }
}

// The hardware prefetcher loses the several short streams of a group of row tiles. The tensor is
// contiguous, so the same place some groups further on is what will be needed about a microsecond
// later.
int64_t prefetch_distance(const LinearArgs& a, int64_t tiles) {
  const int64_t group = tiles * (a.blocks / kTileBlocks) * kTileBytes;
  return ceil_div(kPrefetchBytes, group) * group;
}

[[gnu::always_inline]] inline void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
}

// 32 float outputs of a row tile: rows 0..15 and 16..31.
struct Rows {
  __m512 low, high;
};

__mmask16 row_mask(int64_t n, int64_t row) { return tail_mask16(n - row); }

void finish(const LinearArgs& a, int64_t t, int64_t row, Rows v) {
  const __mmask16 m0 = row_mask(a.n, row), m1 = row_mask(a.n, row + 16);
  if (a.bias != nullptr) {
    v.low = _mm512_add_ps(v.low, load16_f32(a.bias, a.bias_dtype, row, m0));
    v.high = _mm512_add_ps(v.high, load16_f32(a.bias, a.bias_dtype, row + 16, m1));
  }
  store16_f32(a.y, a.y_dtype, t * a.ldy + row, v.low, m0);
  store16_f32(a.y, a.y_dtype, t * a.ldy + row + 16, v.high, m1);
}

// Sums of blocks [begin, end) of a segment, at most kFlushBlocks, for kTiles row tiles and kSlots
// slots.
template <int kTiles, int kSlots>
[[gnu::always_inline]] inline void lookup_run(const LinearArgs& a,
                                              const uint8_t* const (&row)[kTiles],
                                              const uint8_t* tables, int64_t begin, int64_t end,
                                              __m512i (&acc)[kSlots][kTiles]) {
  const int64_t slot_bytes = a.blocks * 64, ahead = prefetch_distance(a, kTiles);
  for (auto& slot : acc)
    for (__m512i& v : slot) v = _mm512_setzero_si512();
  for_blocks(begin, end, [&](int64_t tile, auto block) __attribute__((always_inline)) {
    __m512i code[kTiles];
    for (int r = 0; r < kTiles; ++r) {
      const uint8_t* words = row[r] + tile / kTileBlocks * kTileBytes;
      if (block.value < 5) prefetch(words + ahead + 64 * block.value);
      code[r] = code_word<decltype(block)::value, true>(words);
    }
    for (int s = 0; s < kSlots; ++s) {
      const __m512i entries =
          _mm512_loadu_si512(tables + s * slot_bytes + (tile + block.value) * 64);
      for (int r = 0; r < kTiles; ++r)
        acc[s][r] = _mm512_add_epi16(acc[s][r], _mm512_permutexvar_epi16(code[r], entries));
    }
  });
}

template <int kTiles, int kSlots>
void lookup_tiles(const LinearArgs& a, int64_t row_tile, int64_t slot) {
  const uint8_t* row[kTiles];
  for (int r = 0; r < kTiles; ++r) row[r] = tile_at(a, row_tile + r, 0);
  const uint8_t* tables = a.tables + slot * a.blocks * 64;
  const int64_t limbs = a.act == Act::kA16 ? 2 : 1;
  Rows out[kSlots][kTiles] = {};
  for (int64_t i = 0; i < a.num_segments; ++i) {
    const Segment& s = a.segments[i];
    __m512i low[kSlots][kTiles] = {}, high[kSlots][kTiles] = {};  // rows 0..15 and 16..31 in int32
    for (int64_t b = s.begin; b < s.end; b += kFlushBlocks) {
      __m512i acc[kSlots][kTiles];
      lookup_run<kTiles, kSlots>(a, row, tables, b,
                                 b + kFlushBlocks < s.end ? b + kFlushBlocks : s.end, acc);
      for (int t = 0; t < kSlots; ++t)
        for (int r = 0; r < kTiles; ++r) {
          low[t][r] =
              _mm512_add_epi32(low[t][r], _mm512_cvtepi16_epi32(_mm512_castsi512_si256(acc[t][r])));
          high[t][r] = _mm512_add_epi32(
              high[t][r], _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(acc[t][r], 1)));
        }
    }
    const float* scale = a.weight_scale + s.weight_group * a.rows + row_tile * kTileRows;
    for (int t = 0; t < kSlots; t += static_cast<int>(limbs)) {
      const __m512 act =
          _mm512_set1_ps(a.act_scale[(slot + t) / limbs * a.act_groups + s.act_group]);
      for (int r = 0; r < kTiles; ++r) {
        __m512i i0 = low[t][r], i1 = high[t][r];
        if (kSlots > 1 && limbs == 2) {
          i0 = _mm512_add_epi32(_mm512_slli_epi32(i0, 8), low[t + 1 < kSlots ? t + 1 : t][r]);
          i1 = _mm512_add_epi32(_mm512_slli_epi32(i1, 8), high[t + 1 < kSlots ? t + 1 : t][r]);
        }
        const __m512 s0 = _mm512_mul_ps(act, _mm512_loadu_ps(scale + r * kTileRows));
        const __m512 s1 = _mm512_mul_ps(act, _mm512_loadu_ps(scale + r * kTileRows + 16));
        out[t][r].low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(i0), s0, out[t][r].low);
        out[t][r].high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(i1), s1, out[t][r].high);
      }
    }
  }
  for (int t = 0; t < kSlots; t += static_cast<int>(limbs))
    for (int r = 0; r < kTiles; ++r)
      finish(a, (slot + t) / limbs, (row_tile + r) * kTileRows, out[t][r]);
}

template <int kSlots>
void lookup_slots(const LinearArgs& a, int64_t begin, int64_t end, int64_t slot) {
  constexpr int kTiles = kSlots == 1 ? 4 : 2;
  int64_t rt = begin;
  for (; rt + kTiles <= end; rt += kTiles) lookup_tiles<kTiles, kSlots>(a, rt, slot);
  for (; rt < end; ++rt) lookup_tiles<1, kSlots>(a, rt, slot);
}

void lookup(const LinearArgs& a, int64_t begin, int64_t end) {
  const bool wide = a.act == Act::kA16;  // keep the two limbs of a token together
  const int64_t slots = wide ? 2 * a.m : a.m, pass = wide ? 2 : kLookupSlots;
  for (int64_t slot = 0; slot < slots; slot += pass)
    switch (slots - slot < pass ? slots - slot : pass) {
      case 1:
        lookup_slots<1>(a, begin, end, slot);
        break;
      case 2:
        lookup_slots<2>(a, begin, end, slot);
        break;
      default:
        lookup_slots<3>(a, begin, end, slot);
    }
}

// --- 32-bit lanes: rows 2i and 2i+1 of a tile

struct Pair {
  __m512 even, odd;
};

Pair split(const float* rows) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 low = _mm512_loadu_ps(rows), high = _mm512_loadu_ps(rows + 16);
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

Rows join(Pair p) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(p.even, low, p.odd), _mm512_permutex2var_ps(p.even, high, p.odd)};
}

// --- lossless lookup

template <int kTiles>
void lookup_f32_tiles(const LinearArgs& a, int64_t row_tile, int64_t token) {
  const uint8_t* tables = a.tables + token * a.blocks * 128;
  const int64_t ahead = prefetch_distance(a, kTiles);
  Pair out[kTiles] = {};
  for (int64_t i = 0; i < a.num_segments; ++i) {
    const Segment& s = a.segments[i];
    Pair acc[kTiles] = {};
    for_blocks(s.begin, s.end, [&](int64_t tile, auto block) __attribute__((always_inline)) {
      const uint8_t* table = tables + (tile + block.value) * 128;
      const __m512 plus = _mm512_loadu_ps(table), minus = _mm512_loadu_ps(table + 64);
      for (int r = 0; r < kTiles; ++r) {
        const uint8_t* words = tile_at(a, row_tile + r, tile);
        if (block.value < 5) prefetch(words + ahead + 64 * block.value);
        const __m512i even = code_word<decltype(block)::value, true>(words);
        const __m512i odd = _mm512_srli_epi32(even, 16);
        acc[r].even = _mm512_add_ps(acc[r].even, _mm512_permutex2var_ps(plus, even, minus));
        acc[r].odd = _mm512_add_ps(acc[r].odd, _mm512_permutex2var_ps(plus, odd, minus));
      }
    });
    for (int r = 0; r < kTiles; ++r) {
      const Pair scale =
          split(a.weight_scale + s.weight_group * a.rows + (row_tile + r) * kTileRows);
      out[r].even = _mm512_fmadd_ps(acc[r].even, scale.even, out[r].even);
      out[r].odd = _mm512_fmadd_ps(acc[r].odd, scale.odd, out[r].odd);
    }
  }
  for (int r = 0; r < kTiles; ++r) finish(a, token, (row_tile + r) * kTileRows, join(out[r]));
}

void lookup_f32(const LinearArgs& a, int64_t begin, int64_t end) {
  int64_t rt = begin;
  for (; rt + 2 <= end; rt += 2)
    for (int64_t t = 0; t < a.m; ++t) lookup_f32_tiles<2>(a, rt, t);
  for (; rt < end; ++rt)
    for (int64_t t = 0; t < a.m; ++t) lookup_f32_tiles<1>(a, rt, t);
}

// --- decode and dot

struct DecodeTable {
  alignas(64) uint8_t v[32][4];  // T + 1 of the four lanes of a code
};
constexpr DecodeTable make_decode_table() {
  DecodeTable t{};
  for (uint32_t c = 0; c < 32; ++c)
    for (int p = 0; p < 4; ++p) t.v[c][p] = static_cast<uint8_t>(lane_of(c, p) + 1);
  return t;
}
constexpr DecodeTable kDecode = make_decode_table();

// One row tile times the first kSlots slots of a panel.
template <int kSlots>
void dot_panel(const LinearArgs& a, int64_t row_tile, int64_t panel) {
  const __m512i codes_low = _mm512_load_si512(kDecode.v[0]),
                codes_high = _mm512_load_si512(kDecode.v[16]);
  const int8_t* q = a.q + panel * a.blocks * kPanel * 4;
  const int64_t slot = panel * kPanel, limbs = a.act == Act::kA16 ? 2 : 1;
  alignas(64) float out[kSlots][2][16] = {};
  for (int64_t i = 0; i < a.num_segments; ++i) {
    const Segment& s = a.segments[i];
    __m512i even[kSlots], odd[kSlots];
    for (int t = 0; t < kSlots; ++t)
      even[t] = odd[t] = _mm512_set1_epi32(-a.slot_sum[(slot + t) * a.num_segments + i]);
    for_blocks(s.begin, s.end, [&](int64_t tile, auto block) __attribute__((always_inline)) {
      const __m512i code = code_word<decltype(block)::value, false>(tile_at(a, row_tile, tile));
      const __m512i w0 = _mm512_permutex2var_epi32(codes_low, code, codes_high);
      const __m512i w1 =
          _mm512_permutex2var_epi32(codes_low, _mm512_srli_epi32(code, 16), codes_high);
      const int8_t* x = q + (tile + block.value) * kPanel * 4;
      for (int t = 0; t < kSlots; ++t) {
        int32_t word;
        __builtin_memcpy(&word, x + 4 * t, 4);
        const __m512i v = _mm512_set1_epi32(word);
        even[t] = _mm512_dpbusd_epi32(even[t], w0, v);
        odd[t] = _mm512_dpbusd_epi32(odd[t], w1, v);
      }
    });
    const Pair scale = split(a.weight_scale + s.weight_group * a.rows + row_tile * kTileRows);
    for (int t = 0; t < kSlots; ++t) {
      if (limbs == 2) {
        if (t % 2 == 1) continue;
        const int low = t + 1 < kSlots ? t + 1 : t;
        even[t] = _mm512_add_epi32(_mm512_slli_epi32(even[t], 8), even[low]);
        odd[t] = _mm512_add_epi32(_mm512_slli_epi32(odd[t], 8), odd[low]);
      }
      const __m512 act =
          _mm512_set1_ps(a.act_scale[(slot + t) / limbs * a.act_groups + s.act_group]);
      _mm512_store_ps(out[t][0],
                      _mm512_fmadd_ps(_mm512_cvtepi32_ps(even[t]), _mm512_mul_ps(act, scale.even),
                                      _mm512_load_ps(out[t][0])));
      _mm512_store_ps(out[t][1],
                      _mm512_fmadd_ps(_mm512_cvtepi32_ps(odd[t]), _mm512_mul_ps(act, scale.odd),
                                      _mm512_load_ps(out[t][1])));
    }
  }
  for (int t = 0; t < kSlots; t += static_cast<int>(limbs))
    finish(a, (slot + t) / limbs, row_tile * kTileRows,
           join({_mm512_load_ps(out[t][0]), _mm512_load_ps(out[t][1])}));
}

template <int kSlots>
void dot_slots(const LinearArgs& a, int64_t begin, int64_t end, int64_t panel, int64_t slots) {
  if constexpr (kSlots > 0) {
    if (slots < kSlots) return dot_slots<kSlots - 1>(a, begin, end, panel, slots);
    for (int64_t rt = begin; rt < end; ++rt) dot_panel<kSlots>(a, rt, panel);
  }
}

void dot(const LinearArgs& a, int64_t begin, int64_t end) {
  const int64_t slots = a.act == Act::kA16 ? 2 * a.m : a.m;
  for (int64_t panel = 0; panel * kPanel < slots; ++panel)
    dot_slots<kPanel>(a, begin, end, panel, slots - panel * kPanel);
}

}  // namespace

extern const LinearKernels kLinearAvx512 = {
    .layout = Layout::kT5W,
    .tile_rows = kTileRows,
    .tile_blocks = kTileBlocks,
    .lookup_slots = kLookupSlots,
    .panel = kPanel,
    .table_bytes = 64,
    .table_bytes_f32 = 128,
    .pack = pack,
    .unpack = unpack,
    .stage = stage,
    .tables = tables,
    .tables_f32 = tables_f32,
    .lookup = lookup,
    .lookup_f32 = lookup_f32,
    .dot = dot,
};

}  // namespace alignops::ternary
