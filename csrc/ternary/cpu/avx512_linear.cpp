// AVX-512 matmul on layout T5W.
//
// A tile is 64 rows x 64 columns in two halves. Half a tile, 32 rows x 16 blocks, is five zmm
// w_0..w_4 of 32 u16, one 16-bit lane per row:
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
#include "ternary/cpu/codes.h"

namespace alignops::ternary {

using namespace avx512;

namespace {

constexpr int64_t kLookupSlots = 3;  // with more slots, decode and dot is faster
constexpr int64_t kPanel = 12;
constexpr int64_t kPrefetchBytes = 6 * 1024;

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

// A core alone reaches the memory bandwidth only with requests this far ahead of use.
[[gnu::always_inline]] inline void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes), _MM_HINT_T0);
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

// 32 float outputs of half a row tile: rows 0..15 and 16..31.
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

// Sums of blocks [begin, end) of a segment, at most kFlushBlocks, for kSlots slots and the two
// halves of a row tile.
template <int kSlots>
[[gnu::always_inline]] inline void lookup_run(const LinearArgs& a, int64_t row_tile,
                                              const uint8_t* tables, int64_t begin, int64_t end,
                                              __m512i (&acc)[kSlots][2]) {
  const int64_t slot_bytes = a.blocks * 64;
  for (auto& slot : acc) slot[0] = slot[1] = _mm512_setzero_si512();
  for_blocks(begin, end, [&](int64_t first, auto block) __attribute__((always_inline)) {
    const uint8_t* tile = tile_at(a, row_tile, first);
    if (block.value < 10) prefetch(tile + 64 * block.value);
    const __m512i code0 = code_word<decltype(block)::value, true>(tile);
    const __m512i code1 = code_word<decltype(block)::value, true>(tile + kHalfBytes);
    for (int s = 0; s < kSlots; ++s) {
      const __m512i entries =
          _mm512_loadu_si512(tables + s * slot_bytes + (first + block.value) * 64);
      acc[s][0] = _mm512_add_epi16(acc[s][0], _mm512_permutexvar_epi16(code0, entries));
      acc[s][1] = _mm512_add_epi16(acc[s][1], _mm512_permutexvar_epi16(code1, entries));
    }
  });
}

template <int kSlots>
void lookup_tile(const LinearArgs& a, int64_t row_tile, int64_t slot) {
  const uint8_t* tables = a.tables + slot * a.blocks * 64;
  const int limbs = a.act == Act::kA16 ? 2 : 1;
  Rows out[kSlots][2] = {};
  for (int64_t i = 0; i < a.num_segments; ++i) {
    const Segment& s = a.segments[i];
    __m512i low[kSlots][2] = {}, high[kSlots][2] = {};  // rows 0..15 and 16..31 of a half in int32
    for (int64_t b = s.begin; b < s.end; b += kFlushBlocks) {
      __m512i acc[kSlots][2];
      lookup_run<kSlots>(a, row_tile, tables, b,
                         b + kFlushBlocks < s.end ? b + kFlushBlocks : s.end, acc);
      for (int t = 0; t < kSlots; ++t)
        for (int h = 0; h < 2; ++h) {
          const __m256i rows0 = _mm512_castsi512_si256(acc[t][h]);
          const __m256i rows1 = _mm512_extracti64x4_epi64(acc[t][h], 1);
          low[t][h] = _mm512_add_epi32(low[t][h], _mm512_cvtepi16_epi32(rows0));
          high[t][h] = _mm512_add_epi32(high[t][h], _mm512_cvtepi16_epi32(rows1));
        }
    }
    const float* scale = a.weight_scale + s.weight_group * a.rows + row_tile * kTileRows;
    for (int t = 0; t < kSlots; t += limbs) {
      const __m512 act =
          _mm512_set1_ps(a.act_scale[(slot + t) / limbs * a.act_groups + s.act_group]);
      for (int h = 0; h < 2; ++h) {
        __m512i i0 = low[t][h], i1 = high[t][h];
        if (limbs == 2) {
          const int limb = t + 1 < kSlots ? t + 1 : t;  // always t + 1: limbs come in pairs
          i0 = _mm512_add_epi32(_mm512_slli_epi32(i0, 8), low[limb][h]);
          i1 = _mm512_add_epi32(_mm512_slli_epi32(i1, 8), high[limb][h]);
        }
        const __m512 s0 = _mm512_mul_ps(act, _mm512_loadu_ps(scale + h * kHalfRows));
        const __m512 s1 = _mm512_mul_ps(act, _mm512_loadu_ps(scale + h * kHalfRows + 16));
        out[t][h].low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(i0), s0, out[t][h].low);
        out[t][h].high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(i1), s1, out[t][h].high);
      }
    }
  }
  for (int t = 0; t < kSlots; t += limbs)
    for (int h = 0; h < 2; ++h)
      finish(a, (slot + t) / limbs, row_tile * kTileRows + h * kHalfRows, out[t][h]);
}

void lookup(const LinearArgs& a, int64_t begin, int64_t end) {
  const bool wide = a.act == Act::kA16;  // keep the two limbs of a token together
  const int64_t slots = wide ? 2 * a.m : a.m, pass = wide ? 2 : kLookupSlots;
  for (int64_t rt = begin; rt < end; ++rt)
    for (int64_t slot = 0; slot < slots; slot += pass)
      switch (slots - slot < pass ? slots - slot : pass) {
        case 1:
          lookup_tile<1>(a, rt, slot);
          break;
        case 2:
          lookup_tile<2>(a, rt, slot);
          break;
        default:
          lookup_tile<3>(a, rt, slot);
      }
}

// --- 32-bit lanes: rows 2i and 2i+1 of half a tile

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

void lookup_f32_tile(const LinearArgs& a, int64_t row_tile, int64_t token) {
  const uint8_t* tables = a.tables + token * a.blocks * 128;
  Pair out[2] = {};
  for (int64_t i = 0; i < a.num_segments; ++i) {
    const Segment& s = a.segments[i];
    Pair acc[2] = {};
    for_blocks(s.begin, s.end, [&](int64_t first, auto block) __attribute__((always_inline)) {
      const uint8_t* table = tables + (first + block.value) * 128;
      const __m512 plus = _mm512_loadu_ps(table), minus = _mm512_loadu_ps(table + 64);
      const uint8_t* tile = tile_at(a, row_tile, first);
      if (block.value < 10) prefetch(tile + 64 * block.value);
      for (int h = 0; h < 2; ++h) {
        const __m512i even = code_word<decltype(block)::value, true>(tile + h * kHalfBytes);
        const __m512i odd = _mm512_srli_epi32(even, 16);
        acc[h].even = _mm512_add_ps(acc[h].even, _mm512_permutex2var_ps(plus, even, minus));
        acc[h].odd = _mm512_add_ps(acc[h].odd, _mm512_permutex2var_ps(plus, odd, minus));
      }
    });
    const float* scale = a.weight_scale + s.weight_group * a.rows + row_tile * kTileRows;
    for (int h = 0; h < 2; ++h) {
      const Pair factor = split(scale + h * kHalfRows);
      out[h].even = _mm512_fmadd_ps(acc[h].even, factor.even, out[h].even);
      out[h].odd = _mm512_fmadd_ps(acc[h].odd, factor.odd, out[h].odd);
    }
  }
  for (int h = 0; h < 2; ++h) finish(a, token, row_tile * kTileRows + h * kHalfRows, join(out[h]));
}

void lookup_f32(const LinearArgs& a, int64_t begin, int64_t end) {
  for (int64_t rt = begin; rt < end; ++rt)
    for (int64_t t = 0; t < a.m; ++t) lookup_f32_tile(a, rt, t);
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

// Half a row tile times the first kSlots slots of a panel.
template <int kSlots>
void dot_panel(const LinearArgs& a, int64_t row_tile, int64_t half, int64_t panel) {
  const int64_t row = row_tile * kTileRows + half * kHalfRows;
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
    for_blocks(s.begin, s.end, [&](int64_t first, auto block) __attribute__((always_inline)) {
      const __m512i code =
          code_word<decltype(block)::value, false>(tile_at(a, row_tile, first) + half * kHalfBytes);
      const __m512i w0 = _mm512_permutex2var_epi32(codes_low, code, codes_high);
      const __m512i w1 =
          _mm512_permutex2var_epi32(codes_low, _mm512_srli_epi32(code, 16), codes_high);
      const int8_t* x = q + (first + block.value) * kPanel * 4;
      for (int t = 0; t < kSlots; ++t) {
        int32_t word;
        __builtin_memcpy(&word, x + 4 * t, 4);
        const __m512i v = _mm512_set1_epi32(word);
        even[t] = _mm512_dpbusd_epi32(even[t], w0, v);
        odd[t] = _mm512_dpbusd_epi32(odd[t], w1, v);
      }
    });
    const Pair scale = split(a.weight_scale + s.weight_group * a.rows + row);
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
    finish(a, (slot + t) / limbs, row,
           join({_mm512_load_ps(out[t][0]), _mm512_load_ps(out[t][1])}));
}

template <int kSlots>
void dot_slots(const LinearArgs& a, int64_t begin, int64_t end, int64_t panel, int64_t slots) {
  if constexpr (kSlots > 0) {
    if (slots < kSlots) return dot_slots<kSlots - 1>(a, begin, end, panel, slots);
    for (int64_t rt = begin; rt < end; ++rt)
      for (int64_t half = 0; half < 2; ++half) dot_panel<kSlots>(a, rt, half, panel);
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
