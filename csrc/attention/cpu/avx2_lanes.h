// 8 lanes of AVX2 in the terms of vector_math.h and vector_attend.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention/kernels.h"
#include "common/simd_avx2.h"

namespace alignops::attention {
namespace {

struct Avx2Lanes {
  static constexpr bool kHasPairs = false;  // products of pairs of bfloat16
  static constexpr int64_t kLanes = 8;
  // Queries of a panel: their scores of a tile, or four vectors of their columns, fill 12
  // registers.
  static constexpr int kScoreRows = 3, kValueRows = 3;
  using F = __m256;
  using M = __m256;

  static F floats(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b, if either is NaN
  static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F rounded(F a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // a 2^n for a in [1/2, 2]; 0 for n < -126.
  static F scaled(F a, F n) {
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const F y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), shift));
    // Of a NaN n is NaN, too, and the comparison false.
    const F low = _mm256_cmp_ps(n, floats(-126), _CMP_LT_OQ);
    const F bad = _mm256_cmp_ps(n, n, _CMP_UNORD_Q);
    return _mm256_blendv_ps(_mm256_andnot_ps(low, y), n, bad);
  }
  static F abs(F a) { return _mm256_andnot_ps(floats(-0.0f), a); }
  static F with_sign(F a, F sign) {  // of a >= 0
    return _mm256_or_ps(a, _mm256_and_ps(sign, floats(-0.0f)));
  }
  static M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static F choose(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  static float first(F a) { return _mm256_cvtss_f32(a); }
  static float top(F a) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
  }
  static float total(F a) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
  }
  // -inf outside the lanes [begin, end).
  static F keep_between(F a, int64_t begin, int64_t end) {
    const __m256i inside = _mm256_andnot_si256(lanes(begin), lanes(end));
    return _mm256_blendv_ps(floats(-__builtin_inff()), a, _mm256_castsi256_ps(inside));
  }

  static void widen(const void* p, DType dtype, int64_t count, float* out) {
    with_dtype(dtype, [&]<DType kType>() {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(out + i, load8_f32(p, kType, i));
      if (i < count)
        store8_f32(out, DType::kFloat32, i, load8_f32(p, kType, i, count - i), count - i);
    });
  }
  static void narrow(const float* in, DType dtype, int64_t count, void* p) {
    with_dtype(dtype, [&]<DType kType>() {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store8_f32(p, kType, i, load(in + i));
      if (i < count)
        store8_f32(p, kType, i, load8_f32(in, DType::kFloat32, i, count - i), count - i);
    });
  }

  // out[d][key], 0 for the keys from `count` on.
  template <DType kType>
  static void transpose(const char* const* keys, int64_t count, int64_t depth, float* out) {
    for (int64_t first = 0; first < kTileKeys; first += kLanes)
      for (int64_t d = 0; d < depth; d += kLanes) {
        const int64_t used = depth - d < kLanes ? depth - d : kLanes;
        F rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          rows[i] = first + i >= count ? floats(0)
                    : used == kLanes   ? load8_f32(keys[first + i], kType, d)
                                       : load8_f32(keys[first + i], kType, d, used);
        transpose8(rows);
        for (int64_t i = 0; i < used; ++i) store(out + (d + i) * kTileKeys + first, rows[i]);
      }
  }

 private:
  static __m256i lanes(int64_t count) {
    return mask8(count < 0 ? 0 : count > kLanes ? kLanes : count);
  }

  static void transpose8(F (&r)[kLanes]) {
    F t[kLanes];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace alignops::attention
