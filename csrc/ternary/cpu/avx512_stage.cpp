// AVX-512 matmul: packing to layout T5W, lookup tables, staging of activations (see
// avx512_linear.cpp).
#include "avx512_linear.h"

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "common/simd_avx512.h"
#include "ternary/cpu/codes.h"

namespace alignops::ternary::avx512 {

// --- packing

namespace {

// Three idx nibbles and three signs in the places of three codes of a word.
constexpr uint64_t kIdxBits = 0x3DEF, kSignBits = 0x4210;

// idx nibbles and sign bits of one row of a tile; the last tile may have half as many.
struct RowBits {
  uint64_t idx = 0;
  uint32_t sign = 0;
};

}  // namespace

void pack(const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
          int64_t begin, int64_t end) {
  const int64_t bytes = ceil_div(ceil_div(k, 4), 8), tiles = ceil_div(bytes, 2);
  for (int64_t rt = begin; rt < end; ++rt)
    for (int64_t ct = 0; ct < tiles; ++ct) {
      uint8_t* tile = packed + (rt * tiles + ct) * kTileBytes;
      for (int64_t lane = 0; lane < kTileRows; ++lane) {
        auto* w =
            reinterpret_cast<uint16_t*>(tile + lane / kHalfRows * kHalfBytes) + lane % kHalfRows;
        const int64_t r = rt * kTileRows + lane, first = r * bytes + 2 * ct;
        const size_t count = 2 * ct + 2 <= bytes ? 2 : 1;
        RowBits bits;
        if (r < n) {
          __builtin_memcpy(&bits.idx, idx + 4 * first, 4 * count);
          __builtin_memcpy(&bits.sign, sign + first, count);
        }
        const uint64_t last = bits.idx >> 60 | bits.sign >> 15 << 4;
        for (unsigned j = 0; j < 5; ++j)
          w[j * kHalfRows] = static_cast<uint16_t>(_pdep_u64(bits.idx >> 12 * j, kIdxBits) |
                                                   _pdep_u64(bits.sign >> 3 * j, kSignBits) |
                                                   (last >> j & 1U) << 15);
      }
    }
}

void unpack(const uint8_t* packed, int64_t n, int64_t k, uint8_t* idx, uint8_t* sign, int64_t begin,
            int64_t end) {
  const int64_t bytes = ceil_div(ceil_div(k, 4), 8), tiles = ceil_div(bytes, 2);
  for (int64_t rt = begin; rt < end; ++rt)
    for (int64_t ct = 0; ct < tiles; ++ct) {
      const uint8_t* tile = packed + (rt * tiles + ct) * kTileBytes;
      for (int64_t lane = 0; lane < kTileRows && rt * kTileRows + lane < n; ++lane) {
        const uint8_t* w = tile + lane / kHalfRows * kHalfBytes + 2 * (lane % kHalfRows);
        const int64_t first = (rt * kTileRows + lane) * bytes + 2 * ct;
        const size_t count = 2 * ct + 2 <= bytes ? 2 : 1;
        RowBits bits;
        for (unsigned j = 0; j < 5; ++j) {
          uint16_t half;  // at any address
          __builtin_memcpy(&half, w + 2 * j * kHalfRows, sizeof half);
          const uint64_t word = half;
          bits.idx |= _pext_u64(word, kIdxBits) << 12 * j;
          bits.sign |= static_cast<uint32_t>(_pext_u64(word, kSignBits)) << 3 * j;
          if (j < 4) {
            bits.idx |= (word >> 15) << (60 + j);
          } else {
            bits.sign |= static_cast<uint32_t>(word >> 15) << 15;
          }
        }
        __builtin_memcpy(idx + 4 * first, &bits.idx, 4 * count);
        __builtin_memcpy(sign + first, &bits.sign, count);
      }
    }
}

// --- tables

void tables(const int8_t* q, int64_t blocks, uint8_t* out) {
  __m512i lane[4];
  for (int p = 0; p < 4; ++p) lane[p] = _mm512_load_si512(kInt16Lanes.v[p]);
  for (int64_t b = 0; b < blocks; ++b, q += 4, out += 64) {
    const __m512i s01 = _mm512_add_epi16(_mm512_mullo_epi16(lane[0], _mm512_set1_epi16(q[0])),
                                         _mm512_mullo_epi16(lane[1], _mm512_set1_epi16(q[1])));
    const __m512i s23 = _mm512_add_epi16(_mm512_mullo_epi16(lane[2], _mm512_set1_epi16(q[2])),
                                         _mm512_mullo_epi16(lane[3], _mm512_set1_epi16(q[3])));
    _mm512_storeu_si512(out, _mm512_add_epi16(s01, s23));
  }
}

// Lanes are added in order; a zeroed lane adds +0, so that it hides Inf and NaN. Codes 16..31 are
// the negated 0..15.
void tables_f32(const float* f, int64_t blocks, uint8_t* out) {
  __m512i keep[4], flip[4];
  for (int p = 0; p < 4; ++p) {
    keep[p] = _mm512_load_si512(kFloatLanes.keep[p]);
    flip[p] = _mm512_load_si512(kFloatLanes.flip[p]);
  }
  const __m512i negate = _mm512_set1_epi32(INT32_MIN);
  for (int64_t b = 0; b < blocks; ++b, f += 4, out += 128) {
    __m512 sum = _mm512_setzero_ps();
    for (int p = 0; p < 4; ++p) {
      const __m512i x = _mm512_castps_si512(_mm512_set1_ps(f[p]));
      // (x & keep) ^ flip
      sum = _mm512_add_ps(
          sum, _mm512_castsi512_ps(_mm512_ternarylogic_epi32(x, keep[p], flip[p], 0x6A)));
    }
    _mm512_storeu_ps(out, sum);
    _mm512_storeu_si512(out + 64, _mm512_xor_si512(_mm512_castps_si512(sum), negate));
  }
}

// --- activations

namespace {

// Columns 64c .. 64c+63 of a token as four vectors; vector i, element e is column 64c + 16i + e.
void load64(const StageArgs& a, int64_t t, int64_t c, __m512 v[4]) {
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t first = 64 * c + 16 * i;
    v[i] = load16_f32(a.x, a.dtype, t * a.ld + first, tail_mask16(a.k - first));
  }
}

void stage_lossless(const StageArgs& a, int64_t t) {
  // Stride 16: vector p holds lane p of 16 blocks.
  const __m512i block =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(4));
  for (int64_t c = 0; c < a.blocks / 16; ++c) {
    float* out = a.f + (t * a.blocks + 16 * c) * 4;
    __m512 v[4];
    load64(a, t, c, v);
    for (int64_t i = 0; i < 4; ++i) {
      if (a.stride == 1) {
        _mm512_storeu_ps(out + 16 * i, v[i]);
      } else {
        _mm512_i32scatter_ps(out + i, block, v[i], 4);
      }
    }
  }
}

// Four vectors of small int32 (see load64) as 16 blocks of four bytes in lane order.
__m512i to_blocks(const __m512i q[4], int64_t stride) {
  if (stride == 1) {
    __m512i r = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(q[0]));
    r = _mm512_inserti32x4(r, _mm512_cvtepi32_epi8(q[1]), 1);
    r = _mm512_inserti32x4(r, _mm512_cvtepi32_epi8(q[2]), 2);
    return _mm512_inserti32x4(r, _mm512_cvtepi32_epi8(q[3]), 3);
  }
  const __m512i byte = _mm512_set1_epi32(255);
  __m512i r = _mm512_and_si512(q[0], byte);
  r = _mm512_or_si512(r, _mm512_slli_epi32(_mm512_and_si512(q[1], byte), 8));
  r = _mm512_or_si512(r, _mm512_slli_epi32(_mm512_and_si512(q[2], byte), 16));
  return _mm512_or_si512(r, _mm512_slli_epi32(q[3], 24));
}

// Writes 16 blocks of a slot and adds them to the sums of their segments (which begin at multiples
// of 8 blocks).
void put_blocks(const StageArgs& a, int64_t slot, int64_t block, __m512i q, int64_t segment) {
  if (a.panel == 0) {
    _mm512_storeu_si512(a.q + (slot * a.blocks + block) * 4, q);
  } else {
    alignas(64) int32_t word[16];
    _mm512_store_si512(word, q);
    int8_t* out = a.q + ((slot / a.panel * a.blocks + block) * a.panel + slot % a.panel) * 4;
    for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(out + i * a.panel * 4, &word[i], 4);
  }
  if (a.slot_sum == nullptr) return;
  const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), q);
  int32_t* out = a.slot_sum + slot * a.num_segments;
  out[segment] += _mm512_mask_reduce_add_epi32(0x00FF, sums);
  if (segment + 1 < a.num_segments && a.segments[segment].end <= block + 8) ++segment;
  out[segment] += _mm512_mask_reduce_add_epi32(0xFF00, sums);
}

void stage_quantized(const StageArgs& a, int64_t t) {
  const bool wide = a.act == Act::kA16;
  const float q_max = wide ? 32639.0f : 127.0f;
  const int64_t slots = wide ? 2 : 1, slot = slots * t;
  const int64_t group_tiles = a.act == Act::kA8G ? kActGroupColumns / 64 : a.blocks / 16;
  if (a.slot_sum != nullptr)
    for (int64_t i = slot * a.num_segments; i < (slot + slots) * a.num_segments; ++i)
      a.slot_sum[i] = 0;
  int64_t segment = 0;
  for (int64_t g = 0; g < a.act_groups; ++g) {
    const int64_t c0 = g * group_tiles,
                  c1 = c0 + group_tiles < a.blocks / 16 ? c0 + group_tiles : a.blocks / 16;
    __m512 v[4], largest = _mm512_setzero_ps();
    __mmask16 odd = 0;  // NaN or Inf
    for (int64_t c = c0; c < c1; ++c) {
      load64(a, t, c, v);
      for (const __m512& x : v) {
        const __m512 magnitude = _mm512_abs_ps(x);
        odd |= _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(3.402823466e38f), _CMP_NLE_UQ);
        largest = _mm512_max_ps(largest, magnitude);
      }
    }
    const float amax = _mm512_reduce_max_ps(largest);
    const bool zero = odd != 0 || amax <= 1e-30f;
    const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : q_max / amax);
    a.act_scale[t * a.act_groups + g] = odd != 0 ? __builtin_nanf("") : zero ? 0.0f : amax / q_max;
    for (int64_t c = c0; c < c1; ++c) {
      __m512i q[4], high[4];
      load64(a, t, c, v);
      for (int i = 0; i < 4; ++i) {
        __m512 x = _mm512_mul_ps(v[i], inverse);
        x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(q_max)), _mm512_set1_ps(-q_max));
        q[i] = zero ? _mm512_setzero_si512() : _mm512_cvtps_epi32(x);
      }
      while (segment + 1 < a.num_segments && a.segments[segment].end <= 16 * c) ++segment;
      if (wide) {
        for (int i = 0; i < 4; ++i) {
          const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(q[i], 24), 24);
          high[i] = _mm512_srai_epi32(_mm512_sub_epi32(q[i], low), 8);
          q[i] = low;
        }
        put_blocks(a, slot, 16 * c, to_blocks(high, a.stride), segment);
        put_blocks(a, slot + 1, 16 * c, to_blocks(q, a.stride), segment);
      } else {
        put_blocks(a, slot, 16 * c, to_blocks(q, a.stride), segment);
      }
    }
  }
}

}  // namespace

void stage(const StageArgs& a, int64_t token_begin, int64_t token_end) {
  for (int64_t t = token_begin; t < token_end; ++t)
    if (a.act == Act::kNone) {
      stage_lossless(a, t);
    } else {
      stage_quantized(a, t);
    }
}

}  // namespace alignops::ternary::avx512
