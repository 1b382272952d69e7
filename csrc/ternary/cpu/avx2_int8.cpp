// AVX2 dense int8 product on 8 sums: 8 rows x 1 slot, 4 x 2 or 2 x 4, whichever the number of slots
// fills.
//
// Weights and activations are widened to int16 and multiplied by vpmaddwd, because the byte product
// vpmaddubsw saturates: two products of 255 * 127 do not fit int16. Partial sums are folded by
// shuffles, in the order that the contract of the lossless mode names. Reading past the end of a
// row is harmless, since q and f are zero there; only past the end of the matrix it is not. One
// slot runs at memory speed: per 16 weights one widening load, one multiply-add, one addition.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "common/simd_avx2.h"
#include "ternary/cpu/weights.h"

namespace alignops::ternary {
namespace {

constexpr int64_t kBlockBytes =
    256 * 1024;  // of weights, which stay in the L2 cache while all slots pass
constexpr int64_t kPrefetchRows = 16;

__m128i load_bytes(const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// -- quantization
// -----------------------------------------------------------------------------------------------------

__m256i absolute_bits(__m256 v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}

float largest_element(__m256i bits) {
  __m128i v = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
  v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1));
  return __builtin_bit_cast(float, _mm_cvtsi128_si32(v));
}

template <DType kType>
void quantize_rows(Int8QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t first = row * a.ld;
    const auto load = [&](int64_t c) {
      return a.k - c >= 8 ? load8_f32(a.w, kType, first + c)
                          : load8_f32(a.w, kType, first + c, a.k - c);
    };
    __m256i largest = _mm256_setzero_si256();  // as bits: NaN is the largest
    for (int64_t c = 0; c < a.k; c += 8)
      largest = _mm256_max_epi32(largest, absolute_bits(load(c)));
    const float amax = largest_element(largest);
    if (!is_finite(amax)) report_nonfinite(a, row, a);
    const bool zero = amax <= 1e-30f;
    a.scale[row] = zero ? 0.0f : amax / 127.0f;
    const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : 127.0f / amax);
    for (int64_t c = 0; c < a.k; c += 8) {
      // |w| * inverse is at most 127 (1 + 2^-23): no clamp.
      const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(load(c), inverse));
      const __m128i words =
          _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
      const __m128i bytes = _mm_packs_epi16(words, words);
      int8_t* out = a.q + row * a.k + c;
      if (a.k - c >= 8) {
        _mm_storeu_si64(out, bytes);
      } else {
        __builtin_memcpy(out, &bytes, static_cast<size_t>(a.k - c));
      }
    }
  }
}

void quantize(Int8QuantizeArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&]<DType kType>() { quantize_rows<kType>(a, begin, end); });
}

// -- folding
// ----------------------------------------------------------------------------------------------------------

struct Floats {
  static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
};

struct Integers {
  static __m256 add(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
};

// Element e of the result is the sum of v[e]: elements 4 apart are added first, then 2 and 1.
template <class Type>
[[gnu::always_inline]] inline __m256 fold(const __m256* v) {
  __m256 by_lane[4];  // j: 128-bit lane l holds the four partial sums of v[4l + j]
  for (int j = 0; j < 4; ++j)
    by_lane[j] = Type::add(_mm256_permute2f128_ps(v[j], v[4 + j], 0x20),
                           _mm256_permute2f128_ps(v[j], v[4 + j], 0x31));
  __m256 by_half[2];
  for (int j = 0; j < 2; ++j) {
    const __m256d x = _mm256_castps_pd(by_lane[2 * j]), y = _mm256_castps_pd(by_lane[2 * j + 1]);
    by_half[j] = Type::add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                           _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }
  return Type::add(_mm256_shuffle_ps(by_half[0], by_half[1], 0x88),
                   _mm256_shuffle_ps(by_half[0], by_half[1], 0xdd));
}

// -- products
// ---------------------------------------------------------------------------------------------------------

// kSlots slots of 8 / kSlots rows; element slot * kRows + row of every vector.
template <int kSlots>
struct Tile {
  static constexpr int kRows = 8 / kSlots;
  const Int8LinearArgs& a;
  int64_t row, rows, slot;  // rows that exist
  const int8_t* w[kRows];
  __m256 scale;

  Tile(const Int8LinearArgs& args, int64_t first_row, int64_t row_end, int64_t first_slot)
      : a(args),
        row(first_row),
        rows(row_end - first_row < kRows ? row_end - first_row : kRows),
        slot(first_slot) {
    for (int r = 0; r < kRows; ++r) w[r] = a.w + (row + (r < rows ? r : rows - 1)) * a.k;
    const __m256i repeat = _mm256_and_si256(element(), _mm256_set1_epi32(kRows - 1));
    scale = _mm256_permutevar8x32_ps(load8_f32(a.scale, DType::kFloat32, row, rows), repeat);
  }

  static __m256i element() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

  // Columns [begin, end) in steps of 16: step(c, bytes of a row at c, with zeros beyond the
  // matrix).
  template <class Step>
  [[gnu::always_inline]] void for_columns(int64_t begin, int64_t end, const Step& step) const {
    end = end < round_up(a.k, 16) ? end : round_up(a.k, 16);
    const bool inside = (row + rows - 1) * a.k + end <= a.n * a.k;
    const int64_t whole = inside ? end : end - 16;
    for (int64_t c = begin; c < whole; c += 16) {
      step(c, [&](int r) {
        if (slot == 0)
          _mm_prefetch(reinterpret_cast<const char*>(w[r] + c + kPrefetchRows * a.k), _MM_HINT_T0);
        return load_bytes(w[r] + c);
      });
    }
    if (whole < end)
      step(whole, [&](int r) {
        int8_t tail[16] = {};
        __builtin_memcpy(tail, w[r] + whole, static_cast<size_t>(a.k - whole));
        return load_bytes(tail);
      });
  }

  [[gnu::always_inline]] __m256i integer_sums(const Segment& s) const {
    __m256i acc[kSlots][kRows];
    for (int t = 0; t < kSlots; ++t)
      for (int r = 0; r < kRows; ++r) acc[t][r] = _mm256_setzero_si256();
    for_columns(4 * s.begin, 4 * s.end,
                [&](int64_t c, const auto& load) __attribute__((always_inline)) {
                  __m256i q[kSlots];
                  for (int t = 0; t < kSlots; ++t)
                    q[t] = _mm256_cvtepi8_epi16(load_bytes(a.q + (slot + t) * a.k_pad + c));
                  for (int r = 0; r < kRows; ++r) {
                    const __m256i v = _mm256_cvtepi8_epi16(load(r));
                    for (int t = 0; t < kSlots; ++t)
                      acc[t][r] = _mm256_add_epi32(acc[t][r], _mm256_madd_epi16(v, q[t]));
                  }
                });
    return _mm256_castps_si256(fold<Integers>(reinterpret_cast<const __m256*>(&acc[0][0])));
  }

  // 16 partial sums of an output are two registers, so half the rows at a time.
  [[gnu::always_inline]] __m256 lossless_sums() const {
    __m256 v[8];
    for (int part = 0; part < 2; ++part) {
      constexpr int kPart = kRows / 2;
      __m256 acc[kSlots][kPart][2];
      for (int t = 0; t < kSlots; ++t)
        for (int r = 0; r < kPart; ++r) acc[t][r][0] = acc[t][r][1] = _mm256_setzero_ps();
      for_columns(0, a.k_pad, [&](int64_t c, const auto& load) __attribute__((always_inline)) {
        for (int r = 0; r < kPart; ++r) {
          const __m128i bytes = load(part * kPart + r);
          const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
          const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
          for (int t = 0; t < kSlots; ++t) {
            const float* f = a.f + (slot + t) * a.k_pad + c;
            acc[t][r][0] = _mm256_fmadd_ps(_mm256_loadu_ps(f), low, acc[t][r][0]);
            acc[t][r][1] = _mm256_fmadd_ps(_mm256_loadu_ps(f + 8), high, acc[t][r][1]);
          }
        }
      });
      for (int t = 0; t < kSlots; ++t)
        for (int r = 0; r < kPart; ++r)
          v[t * kRows + part * kPart + r] = _mm256_add_ps(acc[t][r][0], acc[t][r][1]);
    }
    return fold<Floats>(v);
  }

  // float(I), rounded once; for a16 of I = 256 * I_even + I_odd, which double holds exactly.
  [[gnu::always_inline]] __m256 to_float(__m256i sums) const {
    if (a.act != Act::kA16 || kSlots == 1) return _mm256_cvtepi32_ps(sums);
    const __m256i even =
        _mm256_add_epi32(element(), _mm256_andnot_si256(_mm256_set1_epi32(kRows - 1), element()));
    const __m256i odd = _mm256_add_epi32(even, _mm256_set1_epi32(kRows));
    const __m256d high =
        _mm256_cvtepi32_pd(_mm256_castsi256_si128(_mm256_permutevar8x32_epi32(sums, even)));
    const __m256d low =
        _mm256_cvtepi32_pd(_mm256_castsi256_si128(_mm256_permutevar8x32_epi32(sums, odd)));
    return _mm256_castps128_ps256(
        _mm256_cvtpd_ps(_mm256_fmadd_pd(high, _mm256_set1_pd(256.0), low)));
  }

  void run() const {
    const int per_token = a.act == Act::kA16 ? 2 : 1, tokens = kSlots / per_token;
    const int64_t token = slot / per_token;
    __m256 acc = _mm256_setzero_ps();
    if (a.act == Act::kNone) {
      acc = _mm256_mul_ps(lossless_sums(), scale);
    } else {
      for (int64_t i = 0; i < a.num_segments; ++i) {
        alignas(32) float act_scale[8] = {};
        for (int e = 0; e < tokens * kRows; ++e)
          act_scale[e] = a.act_scale[(token + e / kRows) * a.act_groups + a.segments[i].act_group];
        const __m256 factor = _mm256_mul_ps(_mm256_load_ps(act_scale), scale);
        acc = _mm256_fmadd_ps(to_float(integer_sums(a.segments[i])), factor, acc);
      }
    }
    for (int t = 0; t < tokens; ++t) {
      const __m256i index = _mm256_and_si256(
          _mm256_add_epi32(element(), _mm256_set1_epi32(t * kRows)), _mm256_set1_epi32(7));
      store_token(token + t, _mm256_permutevar8x32_ps(acc, index));
    }
  }

  void store_token(int64_t token, __m256 y) const {
    if (a.bias != nullptr) y = _mm256_add_ps(y, load8_f32(a.bias, a.bias_dtype, row, rows));
    const int64_t at = token * a.ldy + row;
    if (rows == 8) return store8_f32(a.y, a.y_dtype, at, y);
    store8_f32(a.y, a.y_dtype, at, y, rows);
  }
};

template <int kSlots>
int64_t run_slots(const Int8LinearArgs& a, int64_t begin, int64_t end, int64_t slot,
                  int64_t slots) {
  for (; slot + kSlots <= slots; slot += kSlots)
    for (int64_t row = begin; row < end; row += Tile<kSlots>::kRows)
      Tile<kSlots>(a, row, end, slot).run();
  return slot;
}

void linear(const Int8LinearArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t slots = a.act == Act::kA16 ? 2 * a.m : a.m;
  const int64_t block = round_up(kBlockBytes / (a.k + 1) + 1, 8);
  for (int64_t begin = row_begin; begin < row_end; begin += block) {
    const int64_t end = begin + block < row_end ? begin + block : row_end;
    const int64_t slot = run_slots<2>(a, begin, end, 0, slots);
    run_slots<1>(a, begin, end, slot, slots);
  }
}

}  // namespace

const Int8Kernels kInt8Avx2 = {quantize, linear};

}  // namespace alignops::ternary
