// AVX2 matmul: packing to layout T2P, lookup tables, staging of activations (see avx2_linear.cpp).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "avx2_linear.h"
#include "common/simd_avx2.h"
#include "ternary/cpu/codes.h"

namespace alignops::ternary::avx2 {

// --- packing

void pack(const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
          int64_t begin, int64_t end) {
  const int64_t tiles = ceil_div(ceil_div(k, 4), kTileBlocks);
  for (int64_t rt = begin; rt < end; ++rt)
    for (int64_t ct = 0; ct < tiles; ++ct) {
      uint8_t* tile = packed + (rt * tiles + ct) * kTileBytes;
      for (int64_t lane = 0; lane < kTileRows; ++lane) {
        const int64_t r = rt * kTileRows + lane;
        // A plane byte holds blocks 2j and 2j+1 just as the tile wants them.
        for (int64_t j = 0; j < 4; ++j)
          tile[j * kTileRows + lane] = r < n ? idx[(r * tiles + ct) * 4 + j] : 0;
        uint32_t bits = r < n ? sign[r * tiles + ct] : 0U, reversed = 0;
        for (int b = 0; b < 8; ++b) reversed |= (bits >> b & 1U) << (7 - b);
        tile[4 * kTileRows + lane] = static_cast<uint8_t>(reversed);
      }
    }
}

void unpack(const uint8_t* packed, int64_t n, int64_t k, uint8_t* idx, uint8_t* sign, int64_t begin,
            int64_t end) {
  const int64_t tiles = ceil_div(ceil_div(k, 4), kTileBlocks);
  for (int64_t rt = begin; rt < end; ++rt)
    for (int64_t ct = 0; ct < tiles; ++ct) {
      const uint8_t* tile = packed + (rt * tiles + ct) * kTileBytes;
      for (int64_t lane = 0; lane < kTileRows && rt * kTileRows + lane < n; ++lane) {
        const int64_t r = rt * kTileRows + lane;
        for (int64_t j = 0; j < 4; ++j) idx[(r * tiles + ct) * 4 + j] = tile[j * kTileRows + lane];
        uint32_t bits = tile[4 * kTileRows + lane], reversed = 0;
        for (int b = 0; b < 8; ++b) reversed |= (bits >> b & 1U) << (7 - b);
        sign[r * tiles + ct] = static_cast<uint8_t>(reversed);
      }
    }
}

// --- tables

namespace {

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

}  // namespace

// Per block 16 low digits, then 16 high ones.
void tables(const int8_t* q, int64_t blocks, uint8_t* out) {
  __m256i lane[4];
  for (int p = 0; p < 4; ++p) lane[p] = load(kInt16Lanes.v[p]);
  const __m256i base = _mm256_set1_epi16(kBase);
  const __m256i inverse = _mm256_set1_epi16((1 << 15) / kBase);  // v / 31, exact after rounding
  for (int64_t b = 0; b < blocks; ++b, q += 4, out += 32) {
    __m256i v = _mm256_mullo_epi16(lane[0], _mm256_set1_epi16(q[0]));
    for (int p = 1; p < 4; ++p)
      v = _mm256_add_epi16(v, _mm256_mullo_epi16(lane[p], _mm256_set1_epi16(q[p])));
    const __m256i high = _mm256_mulhrs_epi16(v, inverse);
    const __m256i low = _mm256_sub_epi16(v, _mm256_mullo_epi16(high, base));
    store(out, _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8));
  }
}

// Per block the four byte planes of 16 floats. Lanes are added in order; a zeroed lane adds +0, so
// that it hides Inf and NaN.
void tables_f32(const float* f, int64_t blocks, uint8_t* out) {
  const __m256i planes = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0,
                                          4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i words = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t b = 0; b < blocks; ++b, f += 4, out += 64) {
    __m256i half[2];
    for (int h = 0; h < 2; ++h) {
      __m256 sum = _mm256_setzero_ps();
      for (int p = 0; p < 4; ++p) {
        const __m256i x = _mm256_castps_si256(_mm256_set1_ps(f[p]));
        const __m256i kept = _mm256_and_si256(x, load(kFloatLanes.keep[p] + 8 * h));
        const __m256i term = _mm256_xor_si256(kept, load(kFloatLanes.flip[p] + 8 * h));
        sum = _mm256_add_ps(sum, _mm256_castsi256_ps(term));
      }
      // Eight bytes of each plane: 64-bit lane i is plane i of entries 8h .. 8h+7.
      const __m256i bytes = _mm256_shuffle_epi8(_mm256_castps_si256(sum), planes);
      half[h] = _mm256_permutevar8x32_epi32(bytes, words);
    }
    const __m256i p02 = _mm256_unpacklo_epi64(half[0], half[1]);
    const __m256i p13 = _mm256_unpackhi_epi64(half[0], half[1]);
    store(out, _mm256_permute2x128_si256(p02, p13, 0x20));
    store(out + 32, _mm256_permute2x128_si256(p02, p13, 0x31));
  }
}

// --- activations

namespace {

// Blocks [b, b+8) of a token as four vectors. Stride 1: vector i, element e is column 4b + 8i + e.
// Stride 16: vector i holds lane i of the eight blocks.
void load_blocks(const StageArgs& a, int64_t t, int64_t b, __m256 v[4]) {
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t first = a.stride == 1 ? 4 * b + 8 * i : 64 * (b / 16) + b % 16 + 16 * i;
    const int64_t left = a.k - first;
    v[i] = left >= 8 ? load8_f32(a.x, a.dtype, t * a.ld + first)
                     : load8_f32(a.x, a.dtype, t * a.ld + first, left > 0 ? left : 0);
  }
}

void stage_lossless(const StageArgs& a, int64_t t) {
  for (int64_t b = 0; b < a.blocks; b += 8) {
    float* out = a.f + (t * a.blocks + b) * 4;
    __m256 v[4];
    load_blocks(a, t, b, v);
    if (a.stride == 1) {
      for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + 8 * i, v[i]);
    } else {
      alignas(32) float lane[4][8];
      for (int i = 0; i < 4; ++i) _mm256_store_ps(lane[i], v[i]);
      for (int e = 0; e < 32; ++e) out[e] = lane[e % 4][e / 4];
    }
  }
}

// Four vectors of small int32 (see load_blocks) as 8 blocks of four bytes in lane order.
__m256i to_blocks(const __m256i q[4], int64_t stride) {
  if (stride == 1) {
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  const __m256i byte = _mm256_set1_epi32(255);
  __m256i r = _mm256_and_si256(q[0], byte);
  r = _mm256_or_si256(r, _mm256_slli_epi32(_mm256_and_si256(q[1], byte), 8));
  r = _mm256_or_si256(r, _mm256_slli_epi32(_mm256_and_si256(q[2], byte), 16));
  return _mm256_or_si256(r, _mm256_slli_epi32(q[3], 24));
}

int32_t sum8(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

// Writes 8 blocks of a slot and adds them to the sum of their segment.
void put_blocks(const StageArgs& a, int64_t slot, int64_t block, __m256i q, int64_t segment) {
  if (a.panel == 0) {
    store(a.q + (slot * a.blocks + block) * 4, q);
  } else {
    alignas(32) int32_t word[8];
    store(word, q);
    int8_t* out = a.q + ((slot / a.panel * a.blocks + block) * a.panel + slot % a.panel) * 4;
    for (int64_t i = 0; i < 8; ++i) __builtin_memcpy(out + i * a.panel * 4, &word[i], 4);
  }
  if (a.slot_sum == nullptr) return;
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
  a.slot_sum[slot * a.num_segments + segment] +=
      sum8(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

float max8(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

void stage_quantized(const StageArgs& a, int64_t t) {
  const bool wide = a.act == Act::kA16;
  const float q_max = wide ? 32639.0f : 127.0f;
  const int64_t slots = wide ? 2 : 1, slot = slots * t;
  const int64_t group_blocks = a.act == Act::kA8G ? kActGroupColumns / 4 : a.blocks;
  if (a.slot_sum != nullptr)
    for (int64_t i = slot * a.num_segments; i < (slot + slots) * a.num_segments; ++i)
      a.slot_sum[i] = 0;
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  int64_t segment = 0;
  for (int64_t g = 0; g < a.act_groups; ++g) {
    const int64_t b0 = g * group_blocks;
    const int64_t b1 = b0 + group_blocks < a.blocks ? b0 + group_blocks : a.blocks;
    __m256 v[4], largest = _mm256_setzero_ps(), odd = _mm256_setzero_ps();  // odd: NaN or Inf
    for (int64_t b = b0; b < b1; b += 8) {
      load_blocks(a, t, b, v);
      for (const __m256& x : v) {
        const __m256 magnitude = _mm256_and_ps(x, no_sign);
        odd = _mm256_or_ps(odd,
                           _mm256_cmp_ps(magnitude, _mm256_set1_ps(3.402823466e38f), _CMP_NLE_UQ));
        largest = _mm256_max_ps(largest, magnitude);
      }
    }
    const float amax = max8(largest);
    const bool finite = _mm256_movemask_ps(odd) == 0, zero = !finite || amax <= 1e-30f;
    const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : q_max / amax);
    a.act_scale[t * a.act_groups + g] = !finite ? __builtin_nanf("") : zero ? 0.0f : amax / q_max;
    for (int64_t b = b0; b < b1; b += 8) {
      __m256i q[4], high[4];
      load_blocks(a, t, b, v);
      for (int i = 0; i < 4; ++i) {
        __m256 x = _mm256_mul_ps(v[i], inverse);
        x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(q_max)), _mm256_set1_ps(-q_max));
        q[i] = zero ? _mm256_setzero_si256() : _mm256_cvtps_epi32(x);
      }
      while (segment + 1 < a.num_segments && a.segments[segment].end <= b) ++segment;
      if (wide) {
        for (int i = 0; i < 4; ++i) {
          const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(q[i], 24), 24);
          high[i] = _mm256_srai_epi32(_mm256_sub_epi32(q[i], low), 8);
          q[i] = low;
        }
        put_blocks(a, slot, b, to_blocks(high, a.stride), segment);
        put_blocks(a, slot + 1, b, to_blocks(q, a.stride), segment);
      } else {
        put_blocks(a, slot, b, to_blocks(q, a.stride), segment);
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

}  // namespace alignops::ternary::avx2
