// 8 elements of float32, bfloat16 or float16 as one register of floats, for kernels compiled with
// AVX2 and F16C. `i` counts elements; addresses need no alignment. Counted forms touch only the
// first `count` elements (0..8) and load 0 elsewhere.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "dtype.h"

namespace alignops {
namespace {

inline __m256 bf16_to_f32(__m128i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

// bfloat16 in the high half of each element, garbage below. To nearest, ties to even; a NaN stays a
// NaN.
inline __m256i f32_to_bf16_high(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(_mm256_add_epi32(bits, half)),
                                              _mm256_castsi256_ps(quiet),
                                              _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}

inline __m128i f32_to_bf16(__m256 v) {
  const __m256i words = _mm256_srli_epi32(f32_to_bf16_high(v), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline __m128i f32_to_fp16(__m256 v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 32-bit lanes 0..count-1 set.
inline __m256i mask8(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

inline __m256 load8_f32(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(p) + i);
  const __m128i v =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
  return dtype == DType::kBFloat16 ? bf16_to_f32(v) : _mm256_cvtph_ps(v);
}

inline __m256 load8_f32(const void* p, DType dtype, int64_t i, int64_t count) {
  if (dtype == DType::kFloat32)
    return _mm256_maskload_ps(static_cast<const float*>(p) + i, mask8(count));
  alignas(16) uint16_t words[8] = {};
  for (int64_t j = 0; j < count; ++j) words[j] = static_cast<const uint16_t*>(p)[i + j];
  const __m128i v = _mm_load_si128(reinterpret_cast<const __m128i*>(words));
  return dtype == DType::kBFloat16 ? bf16_to_f32(v) : _mm256_cvtph_ps(v);
}

inline void store8_f32(void* p, DType dtype, int64_t i, __m256 v) {
  if (dtype == DType::kFloat32) return _mm256_storeu_ps(static_cast<float*>(p) + i, v);
  const __m128i half = dtype == DType::kBFloat16 ? f32_to_bf16(v) : f32_to_fp16(v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i), half);
}

inline void store8_f32(void* p, DType dtype, int64_t i, __m256 v, int64_t count) {
  if (dtype == DType::kFloat32)
    return _mm256_maskstore_ps(static_cast<float*>(p) + i, mask8(count), v);
  alignas(16) uint16_t words[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(words),
                  dtype == DType::kBFloat16 ? f32_to_bf16(v) : f32_to_fp16(v));
  for (int64_t j = 0; j < count; ++j) static_cast<uint16_t*>(p)[i + j] = words[j];
}

}  // namespace
}  // namespace alignops
