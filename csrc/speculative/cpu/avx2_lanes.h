// 8 lanes of AVX2 in the terms of vector_weights.h and vector_rows.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/simd_avx2.h"

namespace alignops::speculative {
namespace {

struct Avx2Lanes {
  static constexpr int64_t kLanes = 8;
  static constexpr int kGroup = 4;
  using F = __m256;
  using I = __m256i;
  using M = __m256;

  static F floats(float v) { return _mm256_set1_ps(v); }
  static I ints(int32_t v) { return _mm256_set1_epi32(v); }
  static I numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

  template <DType kType>
  static F load(const void* p, int64_t i) {
    return load8_f32(p, kType, i);
  }
  // -inf beyond `count` lanes.
  template <DType kType>
  static F load(const void* p, int64_t i, int64_t count) {
    return _mm256_blendv_ps(floats(-__builtin_inff()), load8_f32(p, kType, i, count),
                            bits(mask8(count)));
  }
  // 16 of bfloat16: those with even and those with odd numbers.
  static void load_two(const void* p, int64_t i, F& even, F& odd) {
    const I words =
        _mm256_loadu_si256(reinterpret_cast<const I*>(static_cast<const uint16_t*>(p) + i));
    even = bits(_mm256_slli_epi32(words, 16));
    odd = bits(and_(words, ints(-0x10000)));
  }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<I*>(p), v); }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static I and_not(I a, I b) { return _mm256_andnot_si256(a, b); }  // ~a & b
  static I xor3(I a, I b, I c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static I shift_left(I a, I by) { return _mm256_sllv_epi32(a, by); }  // 0 from 32 on
  template <int kBy>
  static I shift_right(I a) {
    return _mm256_srli_epi32(a, kBy);
  }
  static F bits(I a) { return _mm256_castsi256_ps(a); }
  static I bits(F a) { return _mm256_castps_si256(a); }
  static I rounded(F a) { return _mm256_cvtps_epi32(a); }
  static F converted(I a) { return _mm256_cvtepi32_ps(a); }
  // Both halves are exact, so that only their sum is rounded.
  static F converted_unsigned(I a) {
    const F high = _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16));
    const F low = _mm256_cvtepi32_ps(and_(a, ints(0xffff)));
    return add(mul(high, floats(0x1p16f)), low);
  }

  static M at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static M equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static M equal(I a, I b) { return bits(_mm256_cmpeq_epi32(a, b)); }
  static M both(M a, M b) { return _mm256_and_ps(a, b); }
  static M either(M a, M b) { return _mm256_or_ps(a, b); }
  static uint32_t set(M m) {  // bit i: lane i
    return static_cast<uint32_t>(_mm256_movemask_ps(m));
  }
  static F keep(M m, F a) { return _mm256_and_ps(m, a); }  // 0 elsewhere
  static F choose(M m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  static I choose(M m, I a, I b) { return bits(_mm256_blendv_ps(bits(b), bits(a), m)); }

  // The low 23 bits of a, the others of b, whose low bits are 0.
  static I fraction(I a, I b) { return or_(and_(a, ints(0x7fffff)), b); }
  // g 2^(exponent field of z - kBias) for g in [1, 2).
  static constexpr int32_t kBias = 0;
  static F scaled_by(F g, I z) { return bits(add(bits(g), and_(z, ints(~0x7fffff)))); }

  // The low 32 bits of floor(a * factor / 2^shift). There is no arithmetic shift of 64 bits: 2^62
  // is added before a logical one, so that bits from 62 - shift on are one more.
  struct Scale {
    I factor, bias;
    __m128i shift, rest;
    Scale(int32_t f, int s)
        : factor(ints(f)),
          bias(_mm256_set1_epi64x(s > 32 ? int64_t{1} << 62 : 0)),
          shift(_mm_cvtsi32_si128(s)),
          rest(_mm_cvtsi32_si128(32 - s)) {}
    static uint32_t excess(int s) {  // what `scaled` adds to the floor
      return s > 32 ? uint32_t{1} << (62 - s) : 0;
    }
  };
  template <bool kPlain>
  static I scaled(I a, const Scale& s) {
    const I even = _mm256_mul_epi32(a, s.factor);
    const I odd = _mm256_mul_epi32(_mm256_srli_epi64(a, 32), s.factor);
    if constexpr (kPlain)
      return _mm256_blend_epi32(_mm256_srl_epi64(even, s.shift), _mm256_sll_epi64(odd, s.rest),
                                0xaa);
    return join(_mm256_srl_epi64(_mm256_add_epi64(even, s.bias), s.shift),
                _mm256_srl_epi64(_mm256_add_epi64(odd, s.bias), s.shift));
  }

  // Products of unsigned lanes: low and high halves.
  static void multiply(I a, I b, I& low, I& high) {
    const I even = _mm256_mul_epu32(a, b);
    const I odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
    low = join(even, odd);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  }

  // Transposes 4 x 4 lanes in each half of the registers.
  static void transpose(I (&w)[4]) {
    const I a = _mm256_unpacklo_epi32(w[0], w[1]), b = _mm256_unpacklo_epi32(w[2], w[3]);
    const I c = _mm256_unpackhi_epi32(w[0], w[1]), d = _mm256_unpackhi_epi32(w[2], w[3]);
    w[0] = _mm256_unpacklo_epi64(a, b);
    w[1] = _mm256_unpackhi_epi64(a, b);
    w[2] = _mm256_unpacklo_epi64(c, d);
    w[3] = _mm256_unpackhi_epi64(c, d);
  }

  // float32(float64(a) * c)
  struct Factor {
    __m256d c;
    explicit Factor(double v) : c(_mm256_set1_pd(v)) {}
  };
  static F scaled(F a, const Factor& f) {
    const __m256d low = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)), f.c);
    const __m256d high = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)), f.c);
    return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));
  }

  static F quotient(F a, const Factor& f) {  // float32(float64(a) / c)
    const __m256d low = _mm256_div_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)), f.c);
    const __m256d high = _mm256_div_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)), f.c);
    return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));
  }
  static F truncated(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }

  // Sums of trunc(a), a below 2^41, of up to 4096 numbers: exact in float64.
  struct Sum {
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    void add(F a) {
      const F whole = truncated(a);
      low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(whole)));
      high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(whole, 1)));
    }
    uint64_t total() const { return static_cast<uint64_t>(sum(_mm256_add_pd(low, high))); }
  };

  // Sums of a, or of a b, in float64.
  struct RealSum {
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    void add(F a) {
      low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
      high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
    }
    void add(F a, I b) {
      low = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                            _mm256_cvtepi32_pd(_mm256_castsi256_si128(b)), low);
      high = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)),
                             _mm256_cvtepi32_pd(_mm256_extracti128_si256(b, 1)), high);
    }
    double total() const { return sum(_mm256_add_pd(low, high)); }
  };

  // Words of 16 or 32 bits.
  template <class Word>
  struct Packed {
    static constexpr int64_t kCount = 32 / static_cast<int64_t>(sizeof(Word));
    I v;
    static Packed load(const Word* p) {
      return {_mm256_loadu_si256(reinterpret_cast<const I*>(p))};
    }
    static Packed load(const Word* p, int64_t count, Word fill) {
      alignas(32) Word words[kCount];
      for (int64_t i = 0; i < kCount; ++i) words[i] = i < count ? p[i] : fill;
      return load(words);
    }
    static Packed all(Word w) {
      if constexpr (sizeof(Word) == 2) return {_mm256_set1_epi16(static_cast<int16_t>(w))};
      return {ints(static_cast<int32_t>(w))};
    }
    static Packed largest_signed(Packed a, Packed b) {
      if constexpr (sizeof(Word) == 2) return {_mm256_max_epi16(a.v, b.v)};
      return {_mm256_max_epi32(a.v, b.v)};
    }
    static Packed largest(Packed a, Packed b) {
      if constexpr (sizeof(Word) == 2) return {_mm256_max_epu16(a.v, b.v)};
      return {_mm256_max_epu32(a.v, b.v)};
    }
    static Packed smallest(Packed a, Packed b) {
      if constexpr (sizeof(Word) == 2) return {_mm256_min_epu16(a.v, b.v)};
      return {_mm256_min_epu32(a.v, b.v)};
    }
    // Lanes equal to b or c: kHitBits bits each.
    static constexpr int64_t kHitBits = sizeof(Word);
    static uint64_t equal(Packed a, Packed b, Packed c) {
      I hit;
      if constexpr (sizeof(Word) == 2) {
        hit = or_(_mm256_cmpeq_epi16(a.v, b.v), _mm256_cmpeq_epi16(a.v, c.v));
      } else {
        hit = or_(_mm256_cmpeq_epi32(a.v, b.v), _mm256_cmpeq_epi32(a.v, c.v));
      }
      return static_cast<uint32_t>(_mm256_movemask_epi8(hit));
    }
    Word top_signed() const { return fold(largest_signed); }
    Word top() const { return fold(largest); }
    Word bottom() const { return fold(smallest); }

   private:
    template <class Combine>
    Word fold(Combine combine) const {
      Packed a = combine(*this, Packed{_mm256_permute2x128_si256(v, v, 1)});
      a = combine(a, Packed{_mm256_shuffle_epi32(a.v, 0x4e)});
      a = combine(a, Packed{_mm256_shuffle_epi32(a.v, 0xb1)});
      if constexpr (sizeof(Word) == 2) a = combine(a, Packed{_mm256_srli_epi32(a.v, 16)});
      return static_cast<Word>(_mm_cvtsi128_si32(_mm256_castsi256_si128(a.v)));
    }
  };

 private:
  // The low halves of the 64-bit lanes, alternately.
  static I join(I even, I odd) {
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  }
  static double sum(__m256d v) {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

}  // namespace
}  // namespace alignops::speculative
