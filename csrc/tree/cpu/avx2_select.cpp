// Choosing an edge with AVX2: the lanes are one register.
#include <immintrin.h>

#include "select.h"

namespace alignops::tree {
namespace {

struct Mask {
  __m256 at;

  friend Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.at, b.at)}; }
};

struct Floats {
  __m256 at;

  explicit Floats(__m256 x) : at(x) {}
  explicit Floats(float x) : at(_mm256_set1_ps(x)) {}
  static Floats load(const float* p) { return Floats(_mm256_loadu_ps(p)); }
  static Floats index(int64_t first) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return Floats(
        _mm256_cvtepi32_ps(_mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(first)))));
  }
  static Mask below(const int32_t* p, int32_t bound) {
    const __m256i ids = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(bound), ids))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, at); }
};

inline Floats operator+(Floats a, Floats b) { return Floats(_mm256_add_ps(a.at, b.at)); }
inline Floats operator-(Floats a, Floats b) { return Floats(_mm256_sub_ps(a.at, b.at)); }
inline Floats operator*(Floats a, Floats b) { return Floats(_mm256_mul_ps(a.at, b.at)); }
inline Floats operator/(Floats a, Floats b) { return Floats(_mm256_div_ps(a.at, b.at)); }
inline Mask operator>(Floats a, Floats b) { return {_mm256_cmp_ps(a.at, b.at, _CMP_GT_OQ)}; }
inline Mask operator==(Floats a, Floats b) { return {_mm256_cmp_ps(a.at, b.at, _CMP_EQ_OQ)}; }
inline Mask is_nan(Floats a) { return {_mm256_cmp_ps(a.at, a.at, _CMP_UNORD_Q)}; }
inline Floats min(Floats a, Floats b) { return Floats(_mm256_min_ps(a.at, b.at)); }
inline Floats max(Floats a, Floats b) { return Floats(_mm256_max_ps(a.at, b.at)); }
inline Floats sqrt(Floats a) { return Floats(_mm256_sqrt_ps(a.at)); }
inline Floats round(Floats a) {
  return Floats(_mm256_round_ps(a.at, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Floats scale_by_power(Floats a, Floats power) {
  const __m256i bits =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power.at), _mm256_set1_epi32(127)), 23);
  return Floats(_mm256_mul_ps(a.at, _mm256_castsi256_ps(bits)));
}
inline Floats choose(Mask mask, Floats yes, Floats no) {
  return Floats(_mm256_blendv_ps(no.at, yes.at, mask.at));
}

// Lane i and i + 4, then i and i + 2, then the two that are left.
template <class Op>
float fold(__m256 x, Op op) {
  __m128 half = op(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = op(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(op(half, _mm_shuffle_ps(half, half, 1)));
}

inline float total(Floats a) {
  return fold(a.at, [](__m128 x, __m128 y) { return _mm_add_ps(x, y); });
}
inline float least(Floats a) {
  return fold(a.at, [](__m128 x, __m128 y) { return _mm_min_ps(x, y); });
}
inline float largest(Floats a) {
  return fold(a.at, [](__m128 x, __m128 y) { return _mm_max_ps(x, y); });
}

using Avx2 = Selection<Floats>;

}  // namespace

const Kernels kEdgesAvx2 = {Avx2::summarize, Avx2::puct, Avx2::uct, Avx2::draw, Avx2::greedy};

}  // namespace alignops::tree
