// 16 lanes of AVX-512 in the terms of vector_weights.h and vector_rows.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/simd_avx512.h"

namespace alignops::speculative {
namespace {

struct Avx512Lanes {
  static constexpr int64_t kLanes = 16;
  static constexpr int kGroup = 4;
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static F floats(float v) { return _mm512_set1_ps(v); }
  static I ints(int32_t v) { return _mm512_set1_epi32(v); }
  static I numbers() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }

  template <DType kType>
  static F load(const void* p, int64_t i) {
    return load16_f32(p, kType, i);
  }
  // -inf beyond `count` lanes.
  template <DType kType>
  static F load(const void* p, int64_t i, int64_t count) {
    const __mmask16 mask = tail_mask16(count);
    return _mm512_mask_mov_ps(floats(-__builtin_inff()), mask, load16_f32(p, kType, i, mask));
  }
  // 32 of bfloat16: those with even and those with odd numbers.
  static void load_two(const void* p, int64_t i, F& even, F& odd) {
    const I words = _mm512_loadu_si512(static_cast<const uint16_t*>(p) + i);
    even = bits(_mm512_slli_epi32(words, 16));
    odd = bits(and_(words, ints(-0x10000)));
  }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }
  static I and_not(I a, I b) { return _mm512_andnot_si512(a, b); }  // ~a & b
  static I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static I shift_left(I a, I by) { return _mm512_sllv_epi32(a, by); }  // 0 from 32 on
  template <int kBy>
  static I shift_right(I a) {
    return _mm512_srli_epi32(a, kBy);
  }
  static F bits(I a) { return _mm512_castsi512_ps(a); }
  static I bits(F a) { return _mm512_castps_si512(a); }
  static I rounded(F a) { return _mm512_cvtps_epi32(a); }
  static F converted(I a) { return _mm512_cvtepi32_ps(a); }
  static F converted_unsigned(I a) { return _mm512_cvtepu32_ps(a); }

  static M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static M both(M a, M b) { return static_cast<M>(a & b); }
  static M either(M a, M b) { return static_cast<M>(a | b); }
  static uint32_t set(M m) { return m; }                         // bit i: lane i
  static F keep(M m, F a) { return _mm512_maskz_mov_ps(m, a); }  // 0 elsewhere
  static F choose(M m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }
  static I choose(M m, I a, I b) { return _mm512_mask_mov_epi32(b, m, a); }

  // The low 23 bits of a, the others of b.
  static I fraction(I a, I b) { return _mm512_ternarylogic_epi32(a, b, ints(0x7fffff), 0xe4); }
  // g 2^(exponent field of z - kBias) for g in [1, 2).
  static constexpr int32_t kBias = 127;
  static F scaled_by(F g, I z) { return bits(fraction(bits(g), z)); }

  // The low 32 bits of floor(a * factor / 2^shift).
  struct Scale {
    I factor;
    __m128i shift;
    Scale(int32_t f, int s) : factor(ints(f)), shift(_mm_cvtsi32_si128(s)) {}
    static uint32_t excess(int) { return 0; }  // what `scaled` adds to the floor
  };
  template <bool kPlain>
  static I scaled(I a, const Scale& s) {
    const I even = _mm512_sra_epi64(_mm512_mul_epi32(a, s.factor), s.shift);
    const I odd = _mm512_sra_epi64(_mm512_mul_epi32(_mm512_srli_epi64(a, 32), s.factor), s.shift);
    return _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
  }

  // Products of unsigned lanes: low and high halves.
  static void multiply(I a, I b, I& low, I& high) {
    const I even = _mm512_mul_epu32(a, b);
    const I odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
    low = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA);
    high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  }

  // Transposes 4 x 4 lanes in each quarter of the registers.
  static void transpose(I (&w)[4]) {
    const I a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpacklo_epi32(w[2], w[3]);
    const I c = _mm512_unpackhi_epi32(w[0], w[1]), d = _mm512_unpackhi_epi32(w[2], w[3]);
    w[0] = _mm512_unpacklo_epi64(a, b);
    w[1] = _mm512_unpackhi_epi64(a, b);
    w[2] = _mm512_unpacklo_epi64(c, d);
    w[3] = _mm512_unpackhi_epi64(c, d);
  }

  // float32(float64(a) * c)
  struct Factor {
    __m512d c;
    explicit Factor(double v) : c(_mm512_set1_pd(v)) {}
  };
  static F scaled(F a, const Factor& f) {
    const __m512d low = _mm512_mul_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)), f.c);
    const __m512d high = _mm512_mul_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)), f.c);
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high),
                              1);
  }

  static F quotient(F a, const Factor& f) {  // float32(float64(a) / c)
    const __m512d low = _mm512_div_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)), f.c);
    const __m512d high = _mm512_div_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)), f.c);
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high),
                              1);
  }
  static F truncated(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  }

  // Sums of trunc(a), a below 2^41, of up to 4096 numbers.
  struct Sum {
    I low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
    void add(F a) {
      low = _mm512_add_epi64(low, _mm512_cvttps_epi64(_mm512_castps512_ps256(a)));
      high = _mm512_add_epi64(high, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(a, 1)));
    }
    uint64_t total() const {
      return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
    }
  };

  // Sums of a, or of a b, in float64.
  struct RealSum {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    void add(F a) {
      low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(a)));
      high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
    }
    void add(F a, I b) {
      low = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)),
                            _mm512_cvtepi32_pd(_mm512_castsi512_si256(b)), low);
      high = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)),
                             _mm512_cvtepi32_pd(_mm512_extracti32x8_epi32(b, 1)), high);
    }
    double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
  };

  // Words of 16 or 32 bits.
  template <class Word>
  struct Packed {
    static constexpr int64_t kCount = 64 / static_cast<int64_t>(sizeof(Word));
    I v;
    static Packed load(const Word* p) { return {_mm512_loadu_si512(p)}; }
    static Packed load(const Word* p, int64_t count, Word fill) {
      if constexpr (sizeof(Word) == 2) {
        const __mmask32 mask = (__mmask32{1} << count) - 1;
        return {_mm512_mask_loadu_epi16(_mm512_set1_epi16(static_cast<int16_t>(fill)), mask, p)};
      } else {
        return {_mm512_mask_loadu_epi32(ints(static_cast<int32_t>(fill)), tail_mask16(count), p)};
      }
    }
    static Packed all(Word w) {
      if constexpr (sizeof(Word) == 2) return {_mm512_set1_epi16(static_cast<int16_t>(w))};
      return {ints(static_cast<int32_t>(w))};
    }
    static Packed largest_signed(Packed a, Packed b) {
      if constexpr (sizeof(Word) == 2) return {_mm512_max_epi16(a.v, b.v)};
      return {_mm512_max_epi32(a.v, b.v)};
    }
    static Packed largest(Packed a, Packed b) {
      if constexpr (sizeof(Word) == 2) return {_mm512_max_epu16(a.v, b.v)};
      return {_mm512_max_epu32(a.v, b.v)};
    }
    static Packed smallest(Packed a, Packed b) {
      if constexpr (sizeof(Word) == 2) return {_mm512_min_epu16(a.v, b.v)};
      return {_mm512_min_epu32(a.v, b.v)};
    }
    // Lanes equal to b or c: kHitBits bits each.
    static constexpr int64_t kHitBits = 1;
    static uint64_t equal(Packed a, Packed b, Packed c) {
      if constexpr (sizeof(Word) == 2)
        return _mm512_cmpeq_epi16_mask(a.v, b.v) | _mm512_cmpeq_epi16_mask(a.v, c.v);
      return static_cast<uint64_t>(_mm512_cmpeq_epi32_mask(a.v, b.v) |
                                   _mm512_cmpeq_epi32_mask(a.v, c.v));
    }
    Word top_signed() const { return fold(largest_signed); }
    Word top() const { return fold(largest); }
    Word bottom() const { return fold(smallest); }

   private:
    template <class Combine>
    Word fold(Combine combine) const {
      Packed a = combine(*this, Packed{_mm512_shuffle_i64x2(v, v, 0x4e)});
      a = combine(a, Packed{_mm512_shuffle_i64x2(a.v, a.v, 0xb1)});
      a = combine(a, Packed{_mm512_shuffle_epi32(a.v, _MM_PERM_BADC)});
      a = combine(a, Packed{_mm512_shuffle_epi32(a.v, _MM_PERM_CDAB)});
      if constexpr (sizeof(Word) == 2) a = combine(a, Packed{_mm512_srli_epi32(a.v, 16)});
      return static_cast<Word>(_mm_cvtsi128_si32(_mm512_castsi512_si128(a.v)));
    }
  };
};

}  // namespace
}  // namespace alignops::speculative
