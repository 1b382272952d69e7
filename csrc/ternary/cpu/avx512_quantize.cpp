// AVX-512 quantizer: 16 blocks (64 columns) at a time, one register per lane of the blocks, one
// 32-bit element per block.
//
// Stride 16 has this shape in memory; stride 1 is transposed on the way in and out by two-register
// permutes. Which lane of a block is dropped is kept in mask registers; the code's bits follow from
// it and the signs of the three kept lanes. The scale needs a whole group, so fake_quant visits a
// group twice; the second visit finds it in the cache. Bytes per weight: quantize reads sizeof(w)
// and writes 5/32; fake_quant reads sizeof(w) and writes sizeof(out).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "common/simd_avx512.h"
#include "ternary/cpu/codes.h"
#include "ternary/cpu/weights.h"

namespace alignops::ternary {
namespace {

// One register per lane of 16 blocks.
struct Lanes {
  __m512 v[4];
};

// Which lane of each block becomes 0; z1 is the high bit of its number.
struct Choice {
  __mmask16 z1;
  __mmask16 zero[4];
};

// Indices into the 64 words of two registers: w[i] = scale * (i % modulus) + step * (i / modulus) +
// first.
struct alignas(64) Words {
  uint16_t w[32];

  constexpr Words(int scale, int modulus, int step, int first) : w{} {
    for (int i = 0; i < 32; ++i)
      w[i] = static_cast<uint16_t>(scale * (i % modulus) + step * (i / modulus) + first);
  }
  __m512i load() const { return _mm512_load_si512(w); }
};

constexpr Words kHighWords(2, 32, 0, 1);  // the high halves of 32-bit elements
constexpr Words kLanes01(4, 16, 1, 0),
    kLanes23(4, 16, 1, 2);  // [lane 0 | lane 1], [lane 2 | lane 3] of 16 blocks
constexpr Words kFirstBlocks(16, 4, 1, 0),
    kLastBlocks(16, 4, 1, 8);  // and from there 8 blocks in column order

__mmask16 mask_of(int bits) { return static_cast<__mmask16>(bits); }

__mmask32 tail_mask32(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : count <= 0 ? 0 : (__mmask32{1} << count) - 1;
}

// 32 words, of which `count` exist. Masked accesses are several times slower where the cache
// misses.
__m512i load_words(const uint16_t* p, int64_t count) {
  return count >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(tail_mask32(count), p);
}

void store_words(uint16_t* p, __m512i v, int64_t count) {
  count >= 32 ? _mm512_storeu_si512(p, v) : _mm512_mask_storeu_epi16(p, tail_mask32(count), v);
}

// Floats of 64 columns in natural order to lane order, and back.
[[gnu::always_inline]] inline Lanes to_lanes(const Lanes& c) {
  const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i odd = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
  const __m512 a = _mm512_permutex2var_ps(c.v[0], even, c.v[1]),
               b = _mm512_permutex2var_ps(c.v[2], even, c.v[3]);
  const __m512 d = _mm512_permutex2var_ps(c.v[0], odd, c.v[1]),
               e = _mm512_permutex2var_ps(c.v[2], odd, c.v[3]);
  return {{_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee),
           _mm512_shuffle_f32x4(d, e, 0x44), _mm512_shuffle_f32x4(d, e, 0xee)}};
}

[[gnu::always_inline]] inline Lanes to_columns(const Lanes& l) {
  const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i second =
      _mm512_setr_epi32(4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
  const __m512 a = _mm512_shuffle_f32x4(l.v[0], l.v[1], 0x44),
               b = _mm512_shuffle_f32x4(l.v[2], l.v[3], 0x44);
  const __m512 c = _mm512_shuffle_f32x4(l.v[0], l.v[1], 0xee),
               d = _mm512_shuffle_f32x4(l.v[2], l.v[3], 0xee);
  return {{_mm512_permutex2var_ps(a, first, b), _mm512_permutex2var_ps(a, second, b),
           _mm512_permutex2var_ps(c, first, d), _mm512_permutex2var_ps(c, second, d)}};
}

// Up to 64 columns from element i on, 0 beyond `count`.
template <DType kType, int64_t kStride>
[[gnu::always_inline]] inline Lanes load_lanes(const void* w, int64_t i, int64_t count) {
  Lanes l;
  if constexpr (kStride == 1 && kType != DType::kFloat32) {
    const auto* words = static_cast<const uint16_t*>(w) + i;
    const __m512i a = load_words(words, count);
    const __m512i b = load_words(words + 32, count - 32);
    if constexpr (kType == DType::kBFloat16) {
      for (int p = 0; p < 4; ++p) {  // straight into the high halves
        const __m512i block =
            _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
        const __m512i index = _mm512_slli_epi32(_mm512_add_epi32(block, _mm512_set1_epi32(p)), 16);
        l.v[p] = _mm512_castsi512_ps(_mm512_maskz_permutex2var_epi16(0xaaaaaaaaU, a, index, b));
      }
    } else {
      const __m512i x = _mm512_permutex2var_epi16(a, kLanes01.load(), b);
      const __m512i y = _mm512_permutex2var_epi16(a, kLanes23.load(), b);
      l.v[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
      l.v[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
      l.v[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(y));
      l.v[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(y, 1));
    }
    return l;
  } else {
    for (int j = 0; j < 4; ++j)
      l.v[j] = count >= 64 ? load16_f32(w, kType, i + 16 * j)
                           : load16_f32(w, kType, i + 16 * j, tail_mask16(count - 16 * j));
    return kStride == 1 ? to_lanes(l) : l;
  }
}

// 32 bfloat16 or float16 of two registers.
[[gnu::always_inline]] inline __m512i to_words(DType dtype, __m512 a, __m512 b) {
  if (dtype == DType::kBFloat16)
    return _mm512_permutex2var_epi16(f32_to_bf16_high(a), kHighWords.load(), f32_to_bf16_high(b));
  return _mm512_inserti64x4(_mm512_castsi256_si512(f32_to_fp16(a)), f32_to_fp16(b), 1);
}

template <int64_t kStride>
[[gnu::always_inline]] inline void store_lanes(void* out, DType dtype, int64_t i, int64_t count,
                                               const Lanes& l) {
  if (dtype == DType::kFloat32) {
    const Lanes c = kStride == 1 ? to_columns(l) : l;
    for (int j = 0; j < 4; ++j)
      count >= 64 ? store16_f32(out, dtype, i + 16 * j, c.v[j])
                  : store16_f32(out, dtype, i + 16 * j, c.v[j], tail_mask16(count - 16 * j));
    return;
  }
  __m512i a = to_words(dtype, l.v[0], l.v[1]), b = to_words(dtype, l.v[2], l.v[3]);
  if (kStride == 1) {
    const __m512i first = _mm512_permutex2var_epi16(a, kFirstBlocks.load(), b);
    b = _mm512_permutex2var_epi16(a, kLastBlocks.load(), b);
    a = first;
  }
  auto* words = static_cast<uint16_t*>(out) + i;
  store_words(words, a, count);
  store_words(words + 32, b, count - 32);
}

// `count` columns of the 64 exist. If they end inside a block, its missing lanes count as smaller
// than anything; whole missing blocks are zeros, which become code 0.
[[gnu::always_inline]] inline Choice choose(const Lanes& l, int64_t count) {
  __m512i m[4];
  for (int p = 0; p < 4; ++p) m[p] = _mm512_castps_si512(_mm512_abs_ps(l.v[p]));
  if (count < 64 && count % 4 != 0) {
    const __mmask16 block = mask_of(1 << count / 4);
    for (int p = 1; p < 4; ++p)
      m[p] =
          _mm512_mask_mov_epi32(m[p], p >= count % 4 ? block : mask_of(0), _mm512_set1_epi32(-1));
  }
  Choice c;
  c.z1 = _mm512_cmplt_epi32_mask(_mm512_min_epi32(m[2], m[3]), _mm512_min_epi32(m[0], m[1]));
  c.zero[1] = _mm512_mask_cmplt_epi32_mask(mask_of(~c.z1), m[1], m[0]);
  c.zero[0] = mask_of(~(c.z1 | c.zero[1]));
  c.zero[3] = _mm512_mask_cmplt_epi32_mask(c.z1, m[3], m[2]);
  c.zero[2] = mask_of(c.z1 ^ c.zero[3]);
  return c;
}

// The lanes that are kept, in lane order.
struct Kept {
  __m512 v[3];

  [[gnu::always_inline]] Kept(const Lanes& l, const Choice& c)
      : v{_mm512_mask_mov_ps(l.v[0], c.zero[0], l.v[1]), _mm512_mask_mov_ps(l.v[2], c.z1, l.v[1]),
          _mm512_mask_mov_ps(l.v[3], c.zero[3], l.v[2])} {}
};

// Partial sums of kept |w|, one double per block modulo 16.
struct Partial {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();

  [[gnu::always_inline]] void add(const Kept& kept) {
    __m512d a = _mm512_setzero_pd(), b = _mm512_setzero_pd();
    for (int i = 0; i < 3; ++i) {
      const __m512 m = _mm512_abs_ps(kept.v[i]);
      const __m512d c = _mm512_cvtps_pd(_mm512_castps512_ps256(m)),
                    d = _mm512_cvtps_pd(_mm512_extractf32x8_ps(m, 1));
      a = i == 0 ? c : _mm512_add_pd(a, c);
      b = i == 0 ? d : _mm512_add_pd(b, d);
    }
    low = _mm512_add_pd(low, a);
    high = _mm512_add_pd(high, b);
  }

  // Mean over the kept lanes of `columns` columns; not finite if one of the weights is not.
  float mean(int64_t columns) const {
    const __m512d s8 = _mm512_add_pd(low, high);
    const __m256d s4 = _mm256_add_pd(_mm512_castpd512_pd256(s8), _mm512_extractf64x4_pd(s8, 1));
    const __m128d s2 = _mm_add_pd(_mm256_castpd256_pd128(s4), _mm256_extractf128_pd(s4, 1));
    const double sum = _mm_cvtsd_f64(_mm_add_sd(s2, _mm_unpackhi_pd(s2, s2)));
    const int64_t kept = columns / 4 * 3 + columns % 4;
    return static_cast<float>(sum / static_cast<double>(kept));
  }
};

__mmask16 is_negative(__m512 v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ); }

// 16 codes to 8 idx bytes and 2 sign bytes; half of them if only 8 blocks are asked for.
[[gnu::always_inline]] inline void store_codes(const Choice& c, const Kept& kept, uint8_t* idx,
                                               uint8_t* sign, bool half) {
  const __mmask16 s = is_negative(kept.v[0]);
  __m512i v = _mm512_maskz_set1_epi32(mask_of(s ^ is_negative(kept.v[1])), 1);
  v = _mm512_mask_or_epi32(v, mask_of(s ^ is_negative(kept.v[2])), v, _mm512_set1_epi32(2));
  v = _mm512_mask_or_epi32(v, mask_of(c.zero[1] | c.zero[3]), v, _mm512_set1_epi32(4));
  v = _mm512_mask_or_epi32(v, c.z1, v, _mm512_set1_epi32(8));
  const __m128i bytes = _mm512_cvtepi64_epi8(_mm512_or_si512(v, _mm512_srli_epi64(v, 28)));
  if (half) {
    _mm_storeu_si32(idx, bytes);
    sign[0] = static_cast<uint8_t>(s);
  } else {
    _mm_storeu_si64(idx, bytes);
    _mm_storeu_si16(sign, _mm_cvtsi32_si128(s));
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
      for (int64_t c = begin; c < end; c += 64) {
        const Lanes l = load_lanes<kType, kStride>(a.w, row * a.ld + c, end - c);
        const Choice choice = choose(l, end - c);
        const Kept kept(l, choice);
        partial.add(kept);
        store_codes(choice, kept, idx + c / 8, sign + c / 32, end - c <= 32);
      }
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
  const __m512 lambda = _mm512_set1_ps(a.lambda);
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t begin = 0; begin < in.k; begin += in.group) {
      const int64_t end = begin + in.group < in.k ? begin + in.group : in.k;
      Partial partial;
      for (int64_t c = begin; c < end; c += 64) {
        const Lanes l = load_lanes<kType, kStride>(in.w, row * in.ld + c, end - c);
        partial.add(Kept(l, choose(l, end - c)));
      }
      const float scale = partial.mean(end - begin);
      const __m512 plus = _mm512_set1_ps(scale), minus = _mm512_set1_ps(-scale),
                   zero = _mm512_set1_ps(scale * 0.0f);
      for (int64_t c = begin; c < end; c += 64) {
        Lanes l = load_lanes<kType, kStride>(in.w, row * in.ld + c, end - c);
        const Choice choice = choose(l, end - c);
        for (int p = 0; p < 4; ++p) {
          __m512 t = _mm512_mask_mov_ps(plus, is_negative(l.v[p]), minus);
          t = _mm512_mask_mov_ps(t, choice.zero[p], zero);
          l.v[p] = _mm512_add_ps(t, _mm512_mul_ps(lambda, l.v[p]));
        }
        store_lanes<kStride>(a.out, a.out_dtype, row * in.k + c, end - c, l);
      }
    }
}

// Lane p of all 32 codes as floats, two registers per lane.
struct Codebook {
  __m512 v[4][2];

  Codebook() {
    const __m512i shift = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 1);
    for (int p = 0; p < 4; ++p) {
      const __m512i two = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(kLane[p])), shift);
      const __m512i t =
          _mm512_sub_epi32(_mm512_and_si512(two, _mm512_set1_epi32(3)), _mm512_set1_epi32(1));
      v[p][0] = _mm512_cvtepi32_ps(t);
      v[p][1] = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_setzero_si512(), t));
    }
  }
};

__m512i load_codes(const uint8_t* idx, const uint8_t* sign, bool half) {
  const __m128i bytes = half ? _mm_loadu_si32(idx) : _mm_loadu_si64(idx);
  const int s = half ? sign[0] : sign[0] | sign[1] << 8;
  const __m512i pairs = _mm512_cvtepu8_epi64(bytes);
  const __m512i v =
      _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)), _mm512_set1_epi32(15));
  return _mm512_mask_or_epi32(v, mask_of(s), v, _mm512_set1_epi32(16));
}

template <int64_t kStride>
void dequantize_rows(const DequantizeArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t padded = round_up(ceil_div(a.k, 4), 8), groups = ceil_div(a.k, a.group);
  const Codebook book;
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * a.group, end = begin + a.group < a.k ? begin + a.group : a.k;
      const __m512 scale = _mm512_set1_ps(a.scale[row * groups + g]);
      for (int64_t c = begin; c < end; c += 64) {
        const __m512i code = load_codes(a.idx + row * (padded / 2) + c / 8,
                                        a.sign + row * (padded / 8) + c / 32, end - c <= 32);
        Lanes l;
        for (int p = 0; p < 4; ++p)
          l.v[p] = _mm512_mul_ps(scale, _mm512_permutex2var_ps(book.v[p][0], code, book.v[p][1]));
        store_lanes<kStride>(a.out, a.out_dtype, row * a.k + c, end - c, l);
      }
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

const QuantizeKernels kQuantizeAvx512 = {quantize, fake_quant, dequantize};

}  // namespace alignops::ternary
