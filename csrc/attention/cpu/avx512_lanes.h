// 16 lanes of AVX-512 in the terms of vector_math.h and vector_attend.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention/kernels.h"
#include "common/simd_avx512.h"

namespace alignops::attention {
namespace {

struct Avx512Lanes {
  static constexpr bool kHasPairs = false;  // products of pairs of bfloat16
  static constexpr int64_t kLanes = 16;
  // Queries of a panel: their scores of a tile, or four vectors of their columns, fill 24
  // registers.
  static constexpr int kScoreRows = 12, kValueRows = 6;
  using F = __m512;
  using M = __mmask16;

  static F floats(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b, if either is NaN
  static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F rounded(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F scaled(F a, F n) { return _mm512_scalef_ps(a, n); }  // a 2^n
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F with_sign(F a, F sign) {  // of a >= 0
    return _mm512_or_ps(a, _mm512_and_ps(sign, floats(-0.0f)));
  }
  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static F choose(M m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }
  static float first(F a) { return _mm512_cvtss_f32(a); }
  static float top(F a) { return _mm512_reduce_max_ps(a); }
  static float total(F a) { return _mm512_reduce_add_ps(a); }
  // -inf outside the lanes [begin, end).
  static F keep_between(F a, int64_t begin, int64_t end) {
    const auto inside = static_cast<M>(tail_mask16(end) & ~tail_mask16(begin));
    return _mm512_mask_mov_ps(floats(-__builtin_inff()), inside, a);
  }

  static void widen(const void* p, DType dtype, int64_t count, float* out) {
    with_dtype(dtype, [&]<DType kType>() {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) _mm512_storeu_ps(out + i, load16_f32(p, kType, i));
      if (i < count) {
        const M mask = tail_mask16(count - i);
        _mm512_mask_storeu_ps(out + i, mask, load16_f32(p, kType, i, mask));
      }
    });
  }
  static void narrow(const float* in, DType dtype, int64_t count, void* p) {
    with_dtype(dtype, [&]<DType kType>() {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store16_f32(p, kType, i, _mm512_loadu_ps(in + i));
      if (i < count) {
        const M mask = tail_mask16(count - i);
        store16_f32(p, kType, i, _mm512_maskz_loadu_ps(mask, in + i), mask);
      }
    });
  }

  // out[d][key], 0 for the keys from `count` on.
  template <DType kType>
  static void transpose(const char* const* keys, int64_t count, int64_t depth, float* out) {
    for (int64_t first = 0; first < kTileKeys; first += kLanes)
      for (int64_t d = 0; d < depth; d += kLanes) {
        F rows[kLanes];
        if (count - first >= kLanes && depth - d >= kLanes) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < kLanes; ++i) rows[i] = load16_f32(keys[first + i], kType, d);
          transpose16(rows);
#pragma GCC unroll 16
          for (int64_t i = 0; i < kLanes; ++i) store(out + (d + i) * kTileKeys + first, rows[i]);
          continue;
        }
        const M mask = tail_mask16(depth - d);
        for (int64_t i = 0; i < kLanes; ++i)
          rows[i] =
              first + i < count ? load16_f32(keys[first + i], kType, d, mask) : _mm512_setzero_ps();
        transpose16(rows);
        const int64_t used = depth - d < kLanes ? depth - d : kLanes;
        for (int64_t i = 0; i < used; ++i) store(out + (d + i) * kTileKeys + first, rows[i]);
      }
  }

 private:
  static void transpose16(F (&r)[kLanes]) {
    F t[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }
};

}  // namespace
}  // namespace alignops::attention
