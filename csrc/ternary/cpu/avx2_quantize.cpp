// AVX2 quantizer: 8 blocks (32 columns) at a time, one register per lane of the blocks, one 32-bit
// element per block.
//
// Stride 16 has this shape in memory; stride 1 is transposed on the way in and out, 4x4 inside the
// halves of a register, whose low half holds blocks 0..3 and whose high half holds blocks 4..7.
// Chunks of 64 columns are two such halves. The scale needs a whole group, so fake_quant visits a
// group twice; the second visit finds it in the cache. Bytes per weight: quantize reads sizeof(w)
// and writes 5/32; fake_quant reads sizeof(w) and writes sizeof(out).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "common/simd_avx2.h"
#include "ternary/cpu/codes.h"
#include "ternary/cpu/weights.h"

namespace alignops::ternary {
namespace {

// One register per lane of 8 blocks.
struct Lanes {
  __m256 v[4];
};

// Which lane of each block becomes 0 (masks); z1 is the high bit of its number.
struct Choice {
  __m256 z1;
  __m256 zero[4];
};

int64_t clamp8(int64_t count) { return count < 0 ? 0 : count > 8 ? 8 : count; }

// Rows (block i | block i + 4) to lanes, and back.
[[gnu::always_inline]] inline Lanes transpose(const Lanes& b) {
  const __m256 t0 = _mm256_unpacklo_ps(b.v[0], b.v[1]), t1 = _mm256_unpackhi_ps(b.v[0], b.v[1]);
  const __m256 t2 = _mm256_unpacklo_ps(b.v[2], b.v[3]), t3 = _mm256_unpackhi_ps(b.v[2], b.v[3]);
  const __m256d d0 = _mm256_castps_pd(t0), d1 = _mm256_castps_pd(t1), d2 = _mm256_castps_pd(t2),
                d3 = _mm256_castps_pd(t3);
  return {
      {_mm256_castpd_ps(_mm256_unpacklo_pd(d0, d2)), _mm256_castpd_ps(_mm256_unpackhi_pd(d0, d2)),
       _mm256_castpd_ps(_mm256_unpacklo_pd(d1, d3)), _mm256_castpd_ps(_mm256_unpackhi_pd(d1, d3))}};
}

__m256i load_halves(const uint16_t* low, const uint16_t* high) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// 32 columns in natural order, from element i on.
template <DType kType>
[[gnu::always_inline]] inline Lanes load_columns(const void* w, int64_t i) {
  Lanes l;
  if constexpr (kType == DType::kFloat32) {
    const float* p = static_cast<const float*>(w) + i;
    for (int j = 0; j < 4; ++j)
      l.v[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4 * j)),
                                    _mm_loadu_ps(p + 16 + 4 * j), 1);
    return transpose(l);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(w) + i;
    const __m256 a = _mm256_castsi256_ps(load_halves(p, p + 16));      // blocks 0, 1 | 4, 5
    const __m256 b = _mm256_castsi256_ps(load_halves(p + 8, p + 24));  // blocks 2, 3 | 6, 7
    // Lanes 2q and 2q+1 of a block are the halves of a 32-bit element.
    const __m256i pairs[2] = {_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)),
                              _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd))};
    for (int q = 0; q < 2; ++q) {
      if constexpr (kType == DType::kBFloat16) {
        const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000U));
        l.v[2 * q] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs[q], 16));
        l.v[2 * q + 1] = _mm256_castsi256_ps(_mm256_and_si256(pairs[q], high));
      } else {
        const __m256i even_first = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
        const __m256i lanes =
            _mm256_permute4x64_epi64(_mm256_shuffle_epi8(pairs[q], even_first), 0xd8);
        l.v[2 * q] = _mm256_cvtph_ps(_mm256_castsi256_si128(lanes));
        l.v[2 * q + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(lanes, 1));
      }
    }
    return l;
  }
}

// Half `half` of the 64 columns from element i on, of which `count` exist; 0 beyond.
template <DType kType, int64_t kStride>
[[gnu::always_inline]] inline Lanes load_lanes(const void* w, int64_t i, int half, int64_t count) {
  if constexpr (kStride == 16) {
    Lanes l;
    for (int p = 0; p < 4; ++p) l.v[p] = load8_f32(w, kType, i + 16 * p + 8 * half);
    return l;
  } else {
    i += 32 * half;
    count -= 32 * half;
    if (count >= 32) return load_columns<kType>(w, i);
    alignas(32) float tail[32];
    for (int j = 0; j < 4; ++j)
      _mm256_store_ps(tail + 8 * j, load8_f32(w, kType, i + 8 * j, clamp8(count - 8 * j)));
    return load_columns<DType::kFloat32>(tail, 0);
  }
}

// Lanes 2q and 2q+1 as the halves of 32-bit elements.
[[gnu::always_inline]] inline __m256i to_pairs(DType dtype, __m256 low, __m256 high) {
  if (dtype == DType::kBFloat16)
    return _mm256_blend_epi16(_mm256_srli_epi32(f32_to_bf16_high(low), 16), f32_to_bf16_high(high),
                              0xaa);
  const __m128i a = f32_to_fp16(low), b = f32_to_fp16(high);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(a, b)),
                                 _mm_unpackhi_epi16(a, b), 1);
}

[[gnu::always_inline]] inline void store_columns(void* out, DType dtype, int64_t i,
                                                 const Lanes& l) {
  if (dtype == DType::kFloat32) {
    const Lanes b = transpose(l);
    float* p = static_cast<float*>(out) + i;
    for (int j = 0; j < 4; ++j) {
      _mm_storeu_ps(p + 4 * j, _mm256_castps256_ps128(b.v[j]));
      _mm_storeu_ps(p + 16 + 4 * j, _mm256_extractf128_ps(b.v[j], 1));
    }
  } else {
    auto* p = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + i);
    const __m256i a = to_pairs(dtype, l.v[0], l.v[1]), b = to_pairs(dtype, l.v[2], l.v[3]);
    const __m256i even = _mm256_unpacklo_epi32(a, b), odd = _mm256_unpackhi_epi32(a, b);
    _mm_storeu_si128(p, _mm256_castsi256_si128(even));
    _mm_storeu_si128(p + 1, _mm256_castsi256_si128(odd));
    _mm_storeu_si128(p + 2, _mm256_extracti128_si256(even, 1));
    _mm_storeu_si128(p + 3, _mm256_extracti128_si256(odd, 1));
  }
}

template <int64_t kStride>
void store_lanes(void* out, DType dtype, int64_t i, int half, int64_t count, const Lanes& l) {
  if constexpr (kStride == 16) {
    for (int p = 0; p < 4; ++p) store8_f32(out, dtype, i + 16 * p + 8 * half, l.v[p]);
  } else {
    i += 32 * half;
    count -= 32 * half;
    if (count >= 32) return store_columns(out, dtype, i, l);
    alignas(32) float tail[32];
    store_columns(tail, DType::kFloat32, 0, l);
    for (int j = 0; j < 4; ++j)
      store8_f32(out, dtype, i + 8 * j, _mm256_load_ps(tail + 8 * j), clamp8(count - 8 * j));
  }
}

__m256 magnitude(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

__m256 is_negative(__m256 v) { return _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ); }

// `count` columns of the 32 exist. If they end inside a block, its missing lanes count as smaller
// than anything; whole missing blocks are zeros, which become code 0.
[[gnu::always_inline]] inline Choice choose(const Lanes& l, int64_t count) {
  __m256i m[4];
  for (int p = 0; p < 4; ++p) m[p] = _mm256_castps_si256(magnitude(l.v[p]));
  if (count < 32 && count % 4 != 0) {
    const __m256i block = _mm256_cmpeq_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                             _mm256_set1_epi32(static_cast<int>(count / 4)));
    for (int p = 1; p < 4; ++p)
      if (p >= count % 4) m[p] = _mm256_or_si256(m[p], block);
  }
  const __m256i z1 = _mm256_cmpgt_epi32(_mm256_min_epi32(m[0], m[1]), _mm256_min_epi32(m[2], m[3]));
  const __m256i low = _mm256_cmpgt_epi32(m[0], m[1]), high = _mm256_cmpgt_epi32(m[2], m[3]);
  const __m256i all = _mm256_set1_epi32(-1);
  return {_mm256_castsi256_ps(z1),
          {_mm256_castsi256_ps(_mm256_andnot_si256(_mm256_or_si256(z1, low), all)),
           _mm256_castsi256_ps(_mm256_andnot_si256(z1, low)),
           _mm256_castsi256_ps(_mm256_andnot_si256(high, z1)),
           _mm256_castsi256_ps(_mm256_and_si256(high, z1))}};
}

// The lanes that are kept, in lane order.
struct Kept {
  __m256 v[3];

  [[gnu::always_inline]] Kept(const Lanes& l, const Choice& c)
      : v{_mm256_blendv_ps(l.v[0], l.v[1], c.zero[0]), _mm256_blendv_ps(l.v[2], l.v[1], c.z1),
          _mm256_blendv_ps(l.v[3], l.v[2], c.zero[3])} {}
};

// Partial sums of kept |w|, one double per block modulo 16; [half][0]: blocks 0..3 of the half,
// [half][1]: 4..7.
struct Partial {
  __m256d sum[2][2] = {{_mm256_setzero_pd(), _mm256_setzero_pd()},
                       {_mm256_setzero_pd(), _mm256_setzero_pd()}};

  [[gnu::always_inline]] void add(const Kept& kept, int half) {
    __m256d a = _mm256_setzero_pd(), b = _mm256_setzero_pd();
    for (int i = 0; i < 3; ++i) {
      const __m256 m = magnitude(kept.v[i]);
      const __m256d c = _mm256_cvtps_pd(_mm256_castps256_ps128(m)),
                    d = _mm256_cvtps_pd(_mm256_extractf128_ps(m, 1));
      a = i == 0 ? c : _mm256_add_pd(a, c);
      b = i == 0 ? d : _mm256_add_pd(b, d);
    }
    sum[half][0] = _mm256_add_pd(sum[half][0], a);
    sum[half][1] = _mm256_add_pd(sum[half][1], b);
  }

  // Mean over the kept lanes of `columns` columns; not finite if one of the weights is not.
  float mean(int64_t columns) const {
    const __m256d s4 =
        _mm256_add_pd(_mm256_add_pd(sum[0][0], sum[1][0]), _mm256_add_pd(sum[0][1], sum[1][1]));
    const __m128d s2 = _mm_add_pd(_mm256_castpd256_pd128(s4), _mm256_extractf128_pd(s4, 1));
    const double total = _mm_cvtsd_f64(_mm_add_sd(s2, _mm_unpackhi_pd(s2, s2)));
    const int64_t kept = columns / 4 * 3 + columns % 4;
    return static_cast<float>(total / static_cast<double>(kept));
  }
};

// 8 codes to 4 idx bytes and 1 sign byte.
[[gnu::always_inline]] inline void store_codes(const Choice& c, const Kept& kept, uint8_t* idx,
                                               uint8_t* sign) {
  const __m256 s = is_negative(kept.v[0]);
  const __m256 r2 = _mm256_xor_ps(s, is_negative(kept.v[1])),
               r3 = _mm256_xor_ps(s, is_negative(kept.v[2]));
  const __m256 z0 = _mm256_or_ps(c.zero[1], c.zero[3]);
  const auto bit = [](__m256 mask, int value) {
    return _mm256_and_si256(_mm256_castps_si256(mask), _mm256_set1_epi32(value));
  };
  const __m256i v = _mm256_or_si256(_mm256_or_si256(bit(r2, 1), bit(r3, 2)),
                                    _mm256_or_si256(bit(z0, 4), bit(c.z1, 8)));
  const __m256i pairs =
      _mm256_or_si256(v, _mm256_srli_epi64(v, 28));  // byte 0 of each 64-bit element
  const __m128i bytes = _mm_unpacklo_epi16(
      _mm_shuffle_epi8(_mm256_castsi256_si128(pairs), _mm_set1_epi16(0x0800)),
      _mm_shuffle_epi8(_mm256_extracti128_si256(pairs, 1), _mm_set1_epi16(0x0800)));
  _mm_storeu_si32(idx, bytes);
  *sign = static_cast<uint8_t>(_mm256_movemask_ps(s));
}

// f(c, half, count) for the halves of the chunks of columns [begin, end).
template <class F>
[[gnu::always_inline]] inline void for_halves(int64_t begin, int64_t end, const F& f) {
  for (int64_t c = begin; c < end; c += 64) {
    f(c, 0, end - c);
    if (end - c > 32) f(c, 1, end - c);
  }
}

template <DType kType, int64_t kStride>
void quantize_rows(const QuantizeArgs& a, QuantizeOut& out, int64_t row_begin, int64_t row_end) {
  const int64_t padded = round_up(ceil_div(a.k, 4), 8), groups = ceil_div(a.k, a.group);
  for (int64_t row = row_begin; row < row_end; ++row) {
    uint8_t* idx = out.idx + row * (padded / 2);
    uint8_t* sign = out.sign + row * (padded / 8);
    bool finite = true;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * a.group, end = begin + a.group < a.k ? begin + a.group : a.k;
      Partial partial;
      for_halves(begin, end,
                 [&](int64_t c, int half, int64_t count) __attribute__((always_inline)) {
                   const Lanes l = load_lanes<kType, kStride>(a.w, row * a.ld + c, half, count);
                   const Choice choice = choose(l, count - 32 * half);
                   const Kept kept(l, choice);
                   partial.add(kept, half);
                   store_codes(choice, kept, idx + c / 8 + 4 * half, sign + c / 32 + half);
                 });
      const float scale = partial.mean(end - begin);
      finite = finite && is_finite(scale);
      out.scale[row * groups + g] = scale;
    }
    if (!finite) report_nonfinite(a, row, out);
  }
}

template <DType kType, int64_t kStride>
void fake_quant_rows(const FakeQuantArgs& a, int64_t row_begin, int64_t row_end) {
  const QuantizeArgs& in = a.in;
  const __m256 lambda = _mm256_set1_ps(a.lambda);
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t begin = 0; begin < in.k; begin += in.group) {
      const int64_t end = begin + in.group < in.k ? begin + in.group : in.k;
      Partial partial;
      for_halves(begin, end,
                 [&](int64_t c, int half, int64_t count) __attribute__((always_inline)) {
                   const Lanes l = load_lanes<kType, kStride>(in.w, row * in.ld + c, half, count);
                   partial.add(Kept(l, choose(l, count - 32 * half)), half);
                 });
      const float scale = partial.mean(end - begin);
      const __m256 plus = _mm256_set1_ps(scale), minus = _mm256_set1_ps(-scale),
                   zero = _mm256_set1_ps(scale * 0.0f);
      for_halves(begin, end,
                 [&](int64_t c, int half, int64_t count) __attribute__((always_inline)) {
                   Lanes l = load_lanes<kType, kStride>(in.w, row * in.ld + c, half, count);
                   const Choice choice = choose(l, count - 32 * half);
                   for (int p = 0; p < 4; ++p) {
                     __m256 t = _mm256_blendv_ps(plus, minus, is_negative(l.v[p]));
                     t = _mm256_blendv_ps(t, zero, choice.zero[p]);
                     l.v[p] = _mm256_add_ps(t, _mm256_mul_ps(lambda, l.v[p]));
                   }
                   store_lanes<kStride>(a.out, a.out_dtype, row * in.k + c, half, count, l);
                 });
    }
}

template <int64_t kStride>
void dequantize_rows(const DequantizeArgs& a, int64_t row_begin, int64_t row_end) {
  const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const int64_t padded = round_up(ceil_div(a.k, 4), 8), groups = ceil_div(a.k, a.group);
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * a.group, end = begin + a.group < a.k ? begin + a.group : a.k;
      const __m256 scale = _mm256_set1_ps(a.scale[row * groups + g]);
      for_halves(begin, end,
                 [&](int64_t c, int half, int64_t count) __attribute__((always_inline)) {
                   const uint8_t* idx = a.idx + row * (padded / 2) + c / 8 + 4 * half;
                   const int sign = a.sign[row * (padded / 8) + c / 32 + half];
                   const __m256i nibble =
                       _mm256_srlv_epi32(_mm256_broadcastd_epi32(_mm_loadu_si32(idx)), shift);
                   const __m256i twice =
                       _mm256_slli_epi32(_mm256_and_si256(nibble, _mm256_set1_epi32(15)), 1);
                   const __m256i negate =
                       _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(sign), bits), bits);
                   Lanes l;
                   for (int p = 0; p < 4; ++p) {
                     const __m256i two =
                         _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(kLane[p])), twice);
                     const __m256i t = _mm256_sub_epi32(_mm256_and_si256(two, _mm256_set1_epi32(3)),
                                                        _mm256_set1_epi32(1));
                     const __m256i signed_t = _mm256_sub_epi32(_mm256_xor_si256(t, negate), negate);
                     l.v[p] = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(signed_t));
                   }
                   store_lanes<kStride>(a.out, a.out_dtype, row * a.k + c, half, count, l);
                 });
    }
}

void quantize(const QuantizeArgs& a, QuantizeOut& out, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&]<DType kType>() {
    a.stride == 1 ? quantize_rows<kType, 1>(a, out, begin, end)
                  : quantize_rows<kType, 16>(a, out, begin, end);
  });
}

void fake_quant(const FakeQuantArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.in.dtype, [&]<DType kType>() {
    a.in.stride == 1 ? fake_quant_rows<kType, 1>(a, begin, end)
                     : fake_quant_rows<kType, 16>(a, begin, end);
  });
}

void dequantize(const DequantizeArgs& a, int64_t begin, int64_t end) {
  a.stride == 1 ? dequantize_rows<1>(a, begin, end) : dequantize_rows<16>(a, begin, end);
}

}  // namespace

const QuantizeKernels kQuantizeAvx2 = {quantize, fake_quant, dequantize};

}  // namespace alignops::ternary
