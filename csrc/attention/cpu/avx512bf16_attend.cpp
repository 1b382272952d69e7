// Attention for AVX-512 with products of pairs of bfloat16, which take half of the instructions.
// Queries are rotated in float32 and rounded once, weights are rounded, sums are in float32.
#include "attention/cpu/avx512_lanes.h"
#include "attention/cpu/vector_attend.h"

namespace alignops::attention {
namespace {

struct PairLanes : Avx512Lanes {
  static constexpr bool kHasPairs = true;

  static F pair_product(F a, F b, F c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  // The weights of keys 2 i and 2 i + 1 become pair i.
  static void pair_weights(float* row) {
    static_assert(kTileKeys == 2 * kLanes);
    const auto pairs =
        reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load(row + kLanes), load(row)));
    _mm512_storeu_si512(row, pairs);
  }

  // out[column] = (a[column], b[column]); b may be null, for 0, as is what lies behind `columns`.
  static void pair_rows(const void* a, const void* b, int64_t columns, int64_t room, float* out) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < room; i += 2 * kLanes) {
      const int64_t left = columns - i;
      const __mmask32 mask = left >= 32 ? 0xffffffffu : (__mmask32{1} << (left < 0 ? 0 : left)) - 1;
      const __m512i x = _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(a) + i);
      const __m512i y = b == nullptr
                            ? _mm512_setzero_si512()
                            : _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(b) + i);
      _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(x, low, y));
      if (i + kLanes < room)
        _mm512_storeu_si512(out + i + kLanes, _mm512_permutex2var_epi16(x, high, y));
    }
  }
};

}  // namespace

const Kernels kAttentionAvx512Bf16 = attention_kernels<PairLanes>();

}  // namespace alignops::attention
