// AVX-512 dense int8 product on 16 accumulators: 16 rows x 1 slot, 8 x 2 or 4 x 4, whichever the
// number of slots fills.
//
// vpdpbusd multiplies unsigned by signed bytes: weights enter as w ^ 0x80 = w + 128, and 128 *
// sum(q), known from staging, is taken off the sum. The 16 registers of partial sums are folded
// into one register of 16 sums by shuffles, in the order that the contract of the lossless mode
// names. Reading past the end of a row is harmless, since q and f are zero there; only past the end
// of the matrix it is not. One slot runs at memory speed: per 64 weights one load, one xor, one
// multiply-add, and a prefetch of the next rows.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "common/simd_avx512.h"
#include "ternary/cpu/weights.h"

namespace alignops::ternary {
namespace {

constexpr int64_t kBlockBytes =
    256 * 1024;  // of weights, which stay in the L2 cache while all slots pass
constexpr int64_t kPrefetchBytes = 8192;

// -- quantization
// -----------------------------------------------------------------------------------------------------

template <DType kType>
void quantize_rows(Int8QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t first = row * a.ld;
    __m512i largest = _mm512_setzero_si512();  // as bits: NaN is the largest
    const auto load = [&](int64_t c) {
      return a.k - c >= 16 ? load16_f32(a.w, kType, first + c)
                           : load16_f32(a.w, kType, first + c, tail_mask16(a.k - c));
    };
    for (int64_t c = 0; c < a.k; c += 16)
      largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(load(c))));
    const float amax = __builtin_bit_cast(float, _mm512_reduce_max_epi32(largest));
    if (!is_finite(amax)) report_nonfinite(a, row, a);
    const bool zero = amax <= 1e-30f;
    a.scale[row] = zero ? 0.0f : amax / 127.0f;
    const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : 127.0f / amax);
    for (int64_t c = 0; c < a.k; c += 16) {
      // |w| * inverse is at most 127 (1 + 2^-23): no clamp.
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load(c), inverse));
      int8_t* out = a.q + row * a.k + c;
      if (a.k - c >= 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(q));
      } else {
        _mm_mask_storeu_epi8(out, tail_mask16(a.k - c), _mm512_cvtepi32_epi8(q));
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
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};

struct Integers {
  static __m512 add(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

// Element e of the result is the sum of v[e]: elements 8 apart are added first, then 4, 2 and 1.
template <class Type>
[[gnu::always_inline]] inline __m512 fold(const __m512* v) {
  __m512 by_lane[4];  // j: 128-bit lane l holds the four partial sums of v[4l + j]
  for (int j = 0; j < 4; ++j) {
    const __m512 *a = v + j, *b = v + 4 + j, *c = v + 8 + j, *d = v + 12 + j;
    const __m512 ab =
        Type::add(_mm512_shuffle_f32x4(*a, *b, 0x44), _mm512_shuffle_f32x4(*a, *b, 0xee));
    const __m512 cd =
        Type::add(_mm512_shuffle_f32x4(*c, *d, 0x44), _mm512_shuffle_f32x4(*c, *d, 0xee));
    by_lane[j] = Type::add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  }
  __m512 by_half[2];
  for (int j = 0; j < 2; ++j) {
    const __m512d x = _mm512_castps_pd(by_lane[2 * j]), y = _mm512_castps_pd(by_lane[2 * j + 1]);
    by_half[j] = Type::add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  return Type::add(_mm512_shuffle_ps(by_half[0], by_half[1], 0x88),
                   _mm512_shuffle_ps(by_half[0], by_half[1], 0xdd));
}

// -- products
// ---------------------------------------------------------------------------------------------------------

// kSlots slots of 16 / kSlots rows; element slot * kRows + row of every vector.
template <int kSlots>
struct Tile {
  static constexpr int kRows = 16 / kSlots;
  const Int8LinearArgs& a;
  int64_t row, rows, slot;  // rows that exist
  const int8_t* w[kRows];
  __m512 scale;

  Tile(const Int8LinearArgs& args, int64_t first_row, int64_t row_end, int64_t first_slot)
      : a(args),
        row(first_row),
        rows(row_end - first_row < kRows ? row_end - first_row : kRows),
        slot(first_slot) {
    for (int r = 0; r < kRows; ++r) w[r] = a.w + (row + (r < rows ? r : rows - 1)) * a.k;
    const __m512 s = _mm512_maskz_loadu_ps(tail_mask16(rows), a.scale + row);
    const __m512i repeat =
        _mm512_and_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(kRows - 1));
    scale = _mm512_permutexvar_ps(repeat, s);
  }

  // Value i of `count`, at most kSlots, repeated kRows times.
  template <class Get>
  [[gnu::always_inline]] static __m512 spread(int count, const Get& get) {
    __m512 v = _mm512_set1_ps(get(0));
    for (int i = 1; i < kSlots && i < count; ++i)
      v = _mm512_mask_mov_ps(v, static_cast<__mmask16>(((1 << kRows) - 1) << i * kRows),
                             _mm512_set1_ps(get(i)));
    return v;
  }

  // The weights may be read up to here from any row of the tile.
  bool inside(int64_t end) const { return (row + rows - 1) * a.k + end <= a.n * a.k; }

  [[gnu::always_inline]] static __m512i with_offset(__m512i v) {
    return _mm512_xor_si512(v, _mm512_set1_epi8(-128));
  }

  __m512i load_tail(const int8_t* p) const {
    return _mm512_maskz_loadu_epi8((__mmask64{1} << a.k % 64) - 1, p);
  }

  // Segments [first, last) of row r, in the order of memory: the way to read fast what is used
  // once.
  [[gnu::always_inline]] void stream(int64_t first, int64_t last, int r, __m512i (*out)[16]) const {
    const int8_t *p = w[r], *q = a.q + slot * a.k_pad;
    const int64_t pitch = a.k_pad;
    const int64_t whole = (a.n * a.k - (p - a.w)) / 64 * 64;  // columns that can be read 64 at once
    const Segment* s = a.segments + first;
    for (int64_t i = 0; i < last - first; ++i) {
      const int64_t begin = 4 * s[i].begin, end = 4 * s[i].end;
      __m512i acc[kSlots];
      for (int t = 0; t < kSlots; ++t) acc[t] = _mm512_setzero_si512();
      const auto step = [&](int64_t c, __m512i v) __attribute__((always_inline)) {
        for (int t = 0; t < kSlots; ++t)
          acc[t] =
              _mm512_dpbusd_epi32(acc[t], with_offset(v), _mm512_loadu_si512(q + t * pitch + c));
      };
      for (int64_t c = begin; c < (end < whole ? end : whole); c += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(p + c + kPrefetchBytes), _MM_HINT_T0);
        step(c, _mm512_loadu_si512(p + c));
      }
      if (whole < end) step(whole, load_tail(p + whole));
      for (int t = 0; t < kSlots; ++t) out[i][t * kRows + r] = acc[t];
    }
  }

  // Column after column, so that every load of q serves all rows.
  [[gnu::always_inline]] void block(const Segment& s, __m512i* out) const {
    __m512i acc[kSlots][kRows];
    for (int t = 0; t < kSlots; ++t)
      for (int r = 0; r < kRows; ++r) acc[t][r] = _mm512_setzero_si512();
    const auto step = [&](int64_t c, const auto& load) __attribute__((always_inline)) {
      __m512i q[kSlots];
      for (int t = 0; t < kSlots; ++t) q[t] = _mm512_loadu_si512(a.q + (slot + t) * a.k_pad + c);
      for (int r = 0; r < kRows; ++r) {
        const __m512i u = with_offset(load(w[r] + c));
        for (int t = 0; t < kSlots; ++t) acc[t][r] = _mm512_dpbusd_epi32(acc[t][r], u, q[t]);
      }
    };
    const int64_t end = 4 * s.end, whole = inside(end) ? end : end - 64;
    for (int64_t c = 4 * s.begin; c < whole; c += 64)
      step(c, [&](const int8_t* p) {
        if (slot == 0) _mm_prefetch(reinterpret_cast<const char*>(p + 16 * a.k), _MM_HINT_T0);
        return _mm512_loadu_si512(p);
      });
    if (whole < end) step(whole, [&](const int8_t* p) { return load_tail(p); });
    for (int t = 0; t < kSlots; ++t)
      for (int r = 0; r < kRows; ++r) out[t * kRows + r] = acc[t][r];
  }

  // I of segment `index`, without the 128 * sum(q) that the offset added.
  [[gnu::always_inline]] __m512i integer_sums(const __m512i* acc, int64_t index) const {
    const __m512i sums = _mm512_castps_si512(fold<Integers>(reinterpret_cast<const __m512*>(acc)));
    const __m512 offset = spread(kSlots, [&](int t) {
      return __builtin_bit_cast(float, 128 * a.slot_sum[(slot + t) * a.num_segments + index]);
    });
    return _mm512_sub_epi32(sums, _mm512_castps_si512(offset));
  }

  [[gnu::always_inline]] __m512 lossless_sums() const {
    __m512 acc[kSlots][kRows];
    for (int t = 0; t < kSlots; ++t)
      for (int r = 0; r < kRows; ++r) acc[t][r] = _mm512_setzero_ps();
    const auto step = [&](int64_t c, const auto& load) __attribute__((always_inline)) {
      __m512 f[kSlots];
      for (int t = 0; t < kSlots; ++t) f[t] = _mm512_loadu_ps(a.f + (slot + t) * a.k_pad + c);
      for (int r = 0; r < kRows; ++r) {
        const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load(w[r] + c)));
        for (int t = 0; t < kSlots; ++t) acc[t][r] = _mm512_fmadd_ps(f[t], v, acc[t][r]);
      }
    };
    const int64_t end = round_up(a.k, 16), whole = inside(end) ? end : end - 16;
    for (int64_t c = 0; c < whole; c += 16)
      step(c, [&](const int8_t* p) {
        if (slot == 0) _mm_prefetch(reinterpret_cast<const char*>(p + 16 * a.k), _MM_HINT_T0);
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      });
    if (whole < end)
      step(whole,
           [&](const int8_t* p) { return _mm_maskz_loadu_epi8(tail_mask16(a.k - whole), p); });
    return fold<Floats>(&acc[0][0]);
  }

  // float(I), rounded once; for a16 of I = 256 * I_even + I_odd, which double holds exactly.
  [[gnu::always_inline]] __m512 to_float(__m512i sums) const {
    if (a.act != Act::kA16 || kSlots == 1) return _mm512_cvtepi32_ps(sums);
    const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i even = _mm512_add_epi32(i, _mm512_andnot_si512(_mm512_set1_epi32(kRows - 1), i));
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(kRows));
    const __m512d high =
        _mm512_cvtepi32_pd(_mm512_castsi512_si256(_mm512_permutexvar_epi32(even, sums)));
    const __m512d low =
        _mm512_cvtepi32_pd(_mm512_castsi512_si256(_mm512_permutexvar_epi32(odd, sums)));
    return _mm512_castps256_ps512(
        _mm512_cvtpd_ps(_mm512_fmadd_pd(high, _mm512_set1_pd(256.0), low)));
  }

  void run() const {
    const int per_token = a.act == Act::kA16 ? 2 : 1, tokens = kSlots / per_token;
    const int64_t token = slot / per_token;
    __m512 acc = _mm512_setzero_ps();
    if (a.act == Act::kNone) {
      acc = _mm512_mul_ps(lossless_sums(), scale);
    } else {
      constexpr bool kStream = kSlots <= 2;
      constexpr int64_t kBatch = kStream ? 8 : 1;  // segments of a row that are read together
      for (int64_t first = 0; first < a.num_segments; first += kBatch) {
        const int64_t last = first + kBatch < a.num_segments ? first + kBatch : a.num_segments;
        __m512i sums[kBatch][16];
        if constexpr (kStream) {
          for (int r = 0; r < kRows; ++r) stream(first, last, r, sums);
        } else {
          block(a.segments[first], sums[0]);
        }
        for (int64_t i = first; i < last; ++i) {
          const __m512 act_scale = spread(tokens, [&](int t) {
            return a.act_scale[(token + t) * a.act_groups + a.segments[i].act_group];
          });
          acc = _mm512_fmadd_ps(to_float(integer_sums(sums[i - first], i)),
                                _mm512_mul_ps(act_scale, scale), acc);
        }
      }
    }
    for (int t = 0; t < tokens; ++t, acc = next_rows(acc)) store_token(token + t, acc);
  }

  // Elements kRows.. move to the front.
  static __m512 next_rows(__m512 v) {
    const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_add_epi32(i, _mm512_set1_epi32(kRows)), v);
  }

  void store_token(int64_t token, __m512 y) const {
    const __mmask16 mask = tail_mask16(rows);
    if (a.bias != nullptr) y = _mm512_add_ps(y, load16_f32(a.bias, a.bias_dtype, row, mask));
    const int64_t at = token * a.ldy + row;
    if (rows < kRows || kRows == 16) return store16_f32(a.y, a.y_dtype, at, y, mask);
    if (a.y_dtype == DType::kFloat32) {
      __builtin_memcpy(static_cast<float*>(a.y) + at, &y, kRows * sizeof(float));
    } else {
      const __m256i half = a.y_dtype == DType::kBFloat16 ? f32_to_bf16(y) : f32_to_fp16(y);
      __builtin_memcpy(static_cast<uint16_t*>(a.y) + at, &half, kRows * sizeof(uint16_t));
    }
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
  const int64_t block = round_up(kBlockBytes / (a.k + 1) + 1, 16);
  for (int64_t begin = row_begin; begin < row_end; begin += block) {
    const int64_t end = begin + block < row_end ? begin + block : row_end;
    int64_t slot = run_slots<4>(a, begin, end, 0, slots);
    slot = run_slots<2>(a, begin, end, slot, slots);
    run_slots<1>(a, begin, end, slot, slots);
  }
}

}  // namespace

const Int8Kernels kInt8Avx512 = {quantize, linear};

}  // namespace alignops::ternary
