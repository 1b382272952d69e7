// One row of scores of a tile in vectors: softcap, largest, powers of two. S is a set of lanes
// (avx2_lanes.h, avx512_lanes.h).
#pragma once

#include "attention/cpu/rows.h"

namespace alignops::attention {
namespace {

// 2^x for x <= 0, at most 1 ulp off; 0 below -126 or so; NaN stays NaN. With n = rint(x), f = x -
// n: 2^f by a polynomial that is minimal in its largest relative error (2e-9) on [-1/2, 1/2].
template <class S>
[[gnu::always_inline]] inline typename S::F power_of_two(typename S::F x) {
  const typename S::F clamped = S::max(S::floats(-160), x);
  const typename S::F n = S::rounded(clamped);
  const typename S::F f = S::sub(clamped, n);
  typename S::F y = S::floats(0x1.41fbbcp-13f);
  constexpr float kCoefficients[] = {0x1.5f3e54p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f,
                                     0x1.ebfbdcp-3f,  0x1.62e430p-1f, 1.0f};
#pragma GCC unroll 6
  for (const float c : kCoefficients) y = S::multiply_add(y, f, S::floats(c));
  return S::scaled(y, n);
}

// tanh(x): x P(x^2) near 0, where 1 - e would cancel, else (1 - e) / (1 + e) with e = exp(-2 |x|).
template <class S>
[[gnu::always_inline]] inline typename S::F tanh(typename S::F x) {
  const typename S::F size = S::abs(x);
  const typename S::F e = power_of_two<S>(S::mul(size, S::floats(-2 * kLog2e)));
  const typename S::F one = S::floats(1);
  const typename S::F far = S::div(S::sub(one, e), S::add(one, e));
  const typename S::F square = S::mul(x, x);
  typename S::F y = S::floats(-1382.0f / 155925);
  constexpr float kCoefficients[] = {62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3};
#pragma GCC unroll 4
  for (const float c : kCoefficients) y = S::multiply_add(y, square, S::floats(c));
  const typename S::F near = S::multiply_add(S::mul(y, square), x, x);
  return S::choose(S::less(size, S::floats(0.35f)), near, S::with_sign(far, x));
}

// unit tanh(row)
template <class S>
void cap(float* row, float unit) {
  for (int64_t i = 0; i < kTileKeys; i += S::kLanes)
    S::store(row + i, S::mul(S::floats(unit), tanh<S>(S::load(row + i))));
}

// Adds `bias`, makes what is outside [begin, end) impossible, and returns the largest of the row
// and `top`.
template <class S>
[[gnu::always_inline]] inline float lift(float* row, float bias, int64_t begin, int64_t end,
                                         float top) {
  typename S::F best = S::floats(top);
  for (int64_t i = 0; i < kTileKeys; i += S::kLanes) {
    typename S::F z = S::add(S::load(row + i), S::floats(bias));
    if (begin > 0 || end < kTileKeys) z = S::keep_between(z, begin - i, end - i);
    S::store(row + i, z);
    best = S::max(best, z);
  }
  return S::top(best);
}

// 2^(row - base) in place; sums = alpha sums + these.
template <class S>
[[gnu::always_inline]] inline void exponentials(float* row, float base, float alpha, float* sums) {
  typename S::F sum = S::mul(S::floats(alpha), S::load(sums));
  for (int64_t i = 0; i < kTileKeys; i += S::kLanes) {
    const typename S::F p = power_of_two<S>(S::sub(S::load(row + i), S::floats(base)));
    S::store(row + i, p);
    sum = S::add(sum, p);
  }
  S::store(sums, sum);
}

}  // namespace
}  // namespace alignops::attention
