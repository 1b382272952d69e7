// 16 elements of float32, bfloat16 or float16 as one register of floats, for kernels compiled with
// AVX-512 (F, BW, VL). `i` counts elements; addresses need no alignment. Masked forms touch only
// the elements of the mask and load 0 elsewhere.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "dtype.h"

namespace alignops {
namespace {

inline __m512 bf16_to_f32(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// bfloat16 in the high half of each element, garbage below. To nearest, ties to even; a NaN stays a
// NaN.
inline __m512i f32_to_bf16_high(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i half =
      _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fff), odd, _mm512_set1_epi32(0x8000));
  return _mm512_mask_or_epi32(_mm512_add_epi32(bits, half), nan, bits, _mm512_set1_epi32(0x400000));
}

inline __m256i f32_to_bf16(__m512 v) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(f32_to_bf16_high(v), 16));
}

inline __m256i f32_to_fp16(__m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline __m512 load16_f32(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return _mm512_loadu_ps(static_cast<const float*>(p) + i);
  const __m256i v =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i));
  return dtype == DType::kBFloat16 ? bf16_to_f32(v) : _mm512_cvtph_ps(v);
}

inline __m512 load16_f32(const void* p, DType dtype, int64_t i, __mmask16 mask) {
  if (mask == 0xffff) return load16_f32(p, dtype, i);
  if (dtype == DType::kFloat32)
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  const __m256i v = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
  return dtype == DType::kBFloat16 ? bf16_to_f32(v) : _mm512_cvtph_ps(v);
}

inline void store16_f32(void* p, DType dtype, int64_t i, __m512 v) {
  if (dtype == DType::kFloat32) return _mm512_storeu_ps(static_cast<float*>(p) + i, v);
  const __m256i half = dtype == DType::kBFloat16 ? f32_to_bf16(v) : f32_to_fp16(v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + i), half);
}

inline void store16_f32(void* p, DType dtype, int64_t i, __m512 v, __mmask16 mask) {
  if (mask == 0xffff) return store16_f32(p, dtype, i, v);
  if (dtype == DType::kFloat32) return _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask, v);
  const __m256i half = dtype == DType::kBFloat16 ? f32_to_bf16(v) : f32_to_fp16(v);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask, half);
}

// The first `count` of 16 elements, 0 <= count <= 16 after clamping.
inline __mmask16 tail_mask16(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

}  // namespace
}  // namespace alignops
