// Baseline for the AVX2 kernel: the usual way to apply the sign bit of a table lookup, everything
// else equal.
//
// Same 1.25-bit tiles (32 rows x 32 columns: four vectors of two index nibbles, one vector of sign
// bits), same tables, same flush interval, same scales as the package's kernel in mode a8g with one
// scale per row. What differs: the two looked-up bytes are interleaved to int16 first, the sign
// mask is widened to int16 as well, and the value is negated there by (v + s) ^ s, s in {0, -1}.
// One or two row tiles share a table load; the caller times both and keeps the better.
#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

#define TARGET __attribute__((target("avx2,fma,bmi2")))
constexpr int64_t kGroup = 256, kGroupBlocks = 64, kTileBytes = 160;

// Lane p of idx 0..15 plus one, two bits per idx.
constexpr uint32_t kLane[4] = {0xAAAAAA55U, 0x222255AAU, 0x0A552222U, 0x550A0A0AU};

struct Lanes {
  alignas(32) int16_t v[4][16];
};
constexpr Lanes make_lanes() {
  Lanes lanes{};
  for (int p = 0; p < 4; ++p)
    for (int c = 0; c < 16; ++c)
      lanes.v[p][c] = static_cast<int16_t>(static_cast<int>(kLane[p] >> 2 * c & 3) - 1);
  return lanes;
}
constexpr Lanes kLanes = make_lanes();

TARGET void quantize(const float* x, int64_t columns, int8_t* q, float* scale) {
  for (int64_t g = 0; g < columns / kGroup; ++g, x += kGroup, q += kGroup) {
    __m256 top = _mm256_setzero_ps();
    const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    for (int64_t i = 0; i < kGroup; i += 8)
      top = _mm256_max_ps(top, _mm256_and_ps(absolute, _mm256_loadu_ps(x + i)));
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, top);
    float amax = 0;
    for (float v : lanes) amax = std::fmax(amax, v);
    scale[g] = amax > 1e-30F ? amax / 127.0F : 0.0F;
    const __m256 factor = _mm256_set1_ps(amax > 1e-30F ? 127.0F / amax : 0.0F);
    for (int64_t i = 0; i < kGroup; i += 32) {
      __m256i v[4];
      for (int j = 0; j < 4; ++j)
        v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(factor, _mm256_loadu_ps(x + i + 8 * j)));
      const __m256i packed =
          _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i),
                          _mm256_permutevar8x32_epi32(packed, order));
    }
  }
}

// Per block 16 low bytes, then 16 high bytes of the int16 sums.
TARGET void tables(const int8_t* q, int64_t blocks, uint8_t* out) {
  __m256i lane[4];
  for (int p = 0; p < 4; ++p)
    lane[p] = _mm256_load_si256(reinterpret_cast<const __m256i*>(kLanes.v[p]));
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2,
                                         4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  for (int64_t b = 0; b < blocks; ++b, q += 4, out += 32) {
    __m256i sum = _mm256_mullo_epi16(lane[0], _mm256_set1_epi16(q[0]));
    for (int p = 1; p < 4; ++p)
      sum = _mm256_add_epi16(sum, _mm256_mullo_epi16(lane[p], _mm256_set1_epi16(q[p])));
    sum = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(sum, split), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sum);
  }
}

TARGET inline __m256i table(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Adds scale * sum_b L_b of one group to the 32 outputs of each of T row tiles.
template <int T>
TARGET inline void group(const uint8_t* const* tile, const uint8_t* lut, float scale,
                         float* const* y) {
  const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
  __m256i even[T], odd[T];
  for (int t = 0; t < T; ++t) even[t] = odd[t] = zero;
  for (int64_t c = 0; c < kGroupBlocks / 8; ++c) {
    __m256i sign[T];
    for (int t = 0; t < T; ++t)
      sign[t] =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile[t] + c * kTileBytes + 128));
    for (int64_t j = 0; j < 4; ++j) {
      __m256i index[T];
      for (int t = 0; t < T; ++t)
        index[t] =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile[t] + c * kTileBytes + 32 * j));
      for (int half = 0; half < 2; ++half, lut += 32) {
        const __m256i low_table = table(lut), high_table = table(lut + 16);
        for (int t = 0; t < T; ++t) {
          const __m256i code =
              _mm256_and_si256(half ? _mm256_srli_epi16(index[t], 4) : index[t], nibble);
          const __m256i low = _mm256_shuffle_epi8(low_table, code),
                        high = _mm256_shuffle_epi8(high_table, code);
          const __m256i mask = _mm256_cmpgt_epi8(zero, sign[t]);
          sign[t] = _mm256_add_epi8(sign[t], sign[t]);
          const __m256i mask0 = _mm256_unpacklo_epi8(mask, mask),
                        mask1 = _mm256_unpackhi_epi8(mask, mask);
          const __m256i v0 = _mm256_add_epi16(_mm256_unpacklo_epi8(low, high), mask0);
          const __m256i v1 = _mm256_add_epi16(_mm256_unpackhi_epi8(low, high), mask1);
          even[t] = _mm256_add_epi16(even[t], _mm256_xor_si256(v0, mask0));
          odd[t] = _mm256_add_epi16(odd[t], _mm256_xor_si256(v1, mask1));
        }
      }
    }
  }
  const __m256 factor = _mm256_set1_ps(scale);
  for (int t = 0; t < T; ++t) {
    const __m128i part[4] = {_mm256_castsi256_si128(even[t]), _mm256_castsi256_si128(odd[t]),
                             _mm256_extracti128_si256(even[t], 1),
                             _mm256_extracti128_si256(odd[t], 1)};
    for (int i = 0; i < 4; ++i) {
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(part[i]));
      _mm256_storeu_ps(y[t] + 8 * i, _mm256_fmadd_ps(sum, factor, _mm256_loadu_ps(y[t] + 8 * i)));
    }
  }
}

template <int T>
TARGET void matvec(const uint8_t* packed, int64_t rows, int64_t columns, const uint8_t* luts,
                   const float* act_scale, float* y) {
  const int64_t row_bytes = columns / 32 * kTileBytes;  // of 32 rows
  for (int64_t r = 0; r < rows / 32; r += T)
    for (int64_t g = 0; g < columns / kGroup; ++g) {
      const uint8_t* tile[T];
      float* out[T];
      for (int t = 0; t < T; ++t) {
        tile[t] = packed + (r + t) * row_bytes + g * (kGroup / 32) * kTileBytes;
        out[t] = y + (r + t) * 32;
      }
      group<T>(tile, luts + g * kGroupBlocks * 32, act_scale[g], out);
    }
}

}  // namespace

extern "C" {

// y (rows) = x (columns) times the packed weight, quantizing x and building tables included. rows
// must be a multiple of 64, columns of 256; workspace holds columns * 10 bytes.
TARGET void classic_gemv(const uint8_t* packed, const float* scale, const float* x, int64_t rows,
                         int64_t columns, int row_tiles, uint8_t* workspace, float* y) {
  auto* luts = workspace;
  auto* q = reinterpret_cast<int8_t*>(workspace + columns * 8);
  auto* act_scale = reinterpret_cast<float*>(workspace + columns * 9);
  quantize(x, columns, q, act_scale);
  tables(q, columns / 4, luts);
  for (int64_t r = 0; r < rows; ++r) y[r] = 0;
  if (row_tiles == 2)
    matvec<2>(packed, rows, columns, luts, act_scale, y);
  else
    matvec<1>(packed, rows, columns, luts, act_scale, y);
  for (int64_t r = 0; r < rows; ++r) y[r] *= scale[r];
}

}  // extern "C"
