// Weights of a register of ids, the same for every vector instruction set. `S` is Avx2Lanes or
// Avx512Lanes.
//
// The weight of an id with logit l is M 2^n, see kernels.h. With
//
//   y = floor(F C / 2^(k-3))       n = y >> 23, and the low 23 bits make x in [0, 1)
//   g = polynomial(x) ~ 2^x        M = 2^23 g
//
// (F, C, k: fixed-point logit, factor and shift of the rate) the exponent field of a float takes n
// as it is, and g 2^(n - N + e) needs no 64-bit lane. What a sum takes of an id is
// trunc(M 2^16 / 2^(N - n)) = trunc(g 2^(39 - N + n)). The low 32 bits of y suffice, because ids
// about 100 powers of two below N are left out: they add nothing to a sum, have no part in an R,
// and never win a race.
//
// The polynomial grows with x and stays below 2 (all 2^23 values are tested), so keys grow with
// logits: N is that of the largest logit, a cut by keys is one by logits, and g needs no limit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "speculative/cpu/random.h"
#include "speculative/cpu/weights.h"
#include "speculative/kernels.h"

namespace alignops::speculative {
namespace {

constexpr float kInfinity = __builtin_inff(), kLargest = 0x1.fffffep127f;

struct Range {
  int64_t begin, end;
};

inline Range ids_of(const Law& law, int64_t tile) {
  const int64_t end = (tile + 1) * kTile;
  return {tile * kTile, end < law.size ? end : law.size};
}

// f.operator()<kType, kGiven>() for the element type of a row, and whether it holds probabilities.
template <class F>
auto with_row(const Law& law, const F& f) {
  return with_dtype(law.dtype, [&]<DType kType>() {
    return law.probabilities ? f.template operator()<kType, true>()
                             : f.template operator()<kType, false>();
  });
}

// Registers that take each step together: while one waits for the result of a step, the others go
// on.
template <class S, int kN>
struct Group {
  static constexpr int kCount = kN;
  typename S::F v[kN];
};

// Calls f(group, first id) for the ids [begin, end) of a row; lanes beyond the end are -inf.
// Without order, the ids of two registers may be mixed.
template <class S, DType kType, bool kOrdered = true, class Each>
[[gnu::always_inline]] inline void each(const void* row, int64_t begin, int64_t end, Each f) {
  constexpr int64_t kStep = S::kGroup * S::kLanes;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    Group<S, S::kGroup> group;
    if constexpr (kType == DType::kBFloat16 && !kOrdered) {
      for (int j = 0; j < S::kGroup; j += 2)
        S::load_two(row, i + j * S::kLanes, group.v[j], group.v[j + 1]);
    } else {
      for (int j = 0; j < S::kGroup; ++j)
        group.v[j] = S::template load<kType>(row, i + j * S::kLanes);
    }
    f(group, i);
  }
  for (; i < end; i += S::kLanes)
    f(Group<S, 1>{{end - i >= S::kLanes ? S::template load<kType>(row, i)
                                        : S::template load<kType>(row, i, end - i)}},
      i);
}

// -------------------------------------------------------------------------------------------------
// Cuts as limits of the values of a row.

// Floats in order as unsigned integers.
inline float from_order(uint32_t u) {
  return bits_float((u & 0x80000000u) != 0 ? u ^ 0x80000000u : ~u);
}

inline uint32_t order_of(float v) {
  const uint32_t b = float_bits(v);
  return (b & 0x80000000u) != 0 ? ~b : b | 0x80000000u;
}

// The least finite value whose key is `key` or more; +inf if there is none. key > 0.
inline float least_value(const Law& law, uint64_t key) {
  if (law.probabilities)
    return key < 0x7f800000u ? bits_float(static_cast<uint32_t>(key)) : kInfinity;
  uint32_t low = order_of(-kLargest), high = order_of(kInfinity);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (key_of(weigh(from_order(middle), law.rate)) >= key) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return from_order(low);
}

// Kept are values from `low` on up to the id `last`, and from `high` on behind it.
struct Limits {
  float low, high;
  int64_t last;
  int32_t ceiling;   // exponent of the largest logit that is not cut off
  double per_power;  // logits by which weights double

  explicit Limits(const Law& law)
      : last(law.cut.id < law.size ? law.cut.id : law.size - 1),
        ceiling(weigh(2047.0f, law.rate).exponent),
        per_power(power(law.rate.shift) / law.rate.factor) {
    if (law.cut.key == 0) {
      low = high = law.probabilities ? bits_float(1) : -kLargest;
    } else {
      low = least_value(law, law.cut.key);
      high = least_value(law, law.cut.key + 1);
    }
  }

  // A logit below which weights are 2^75 to 2^125 times smaller than 2^top, or nothing finite is.
  float least_visible(int32_t top) const {
    const double l = (static_cast<double>(top) - 100.0) * per_power;
    return l < -2047.0 ? -kLargest : static_cast<float>(l);
  }

  // f(begin, end, limit) for the parts of [begin, end) with one limit each.
  template <class F>
  [[gnu::always_inline]] void parts(int64_t begin, int64_t end, F f) const {
    const int64_t middle = last < begin ? begin : last < end ? last + 1 : end;
    if (begin < middle) f(begin, middle, low);
    if (middle < end) f(middle, end, high);
  }
};

// -------------------------------------------------------------------------------------------------

// The float with these bits, in all lanes.
template <class S>
typename S::F constant(uint32_t bits) {
  return S::bits(S::ints(static_cast<int32_t>(bits)));
}

// Whether no lane of a group is `limit` or more.
template <class S, int kN>
[[gnu::always_inline]] inline bool none_from(const Group<S, kN>& values, typename S::F limit) {
  auto some = S::at_least(values.v[0], limit);
  for (int j = 1; j < kN; ++j) some = S::either(some, S::at_least(values.v[j], limit));
  return S::set(some) == 0;
}

// Turns logits into weights relative to 2^top: floats g 2^(n - top + kUnits), 0 below the limit.
// The plain form is for rows without a cut whose visible logits lie in (-2047, 2047), at a
// temperature below 90: what lies below the limit has the weight of the limit, which is as good as
// 0.
template <class S, int kUnits, bool kPlain>
class Weigher {
 public:
  using F = typename S::F;
  using I = typename S::I;

  Weigher(const Law& law, int32_t top, float limit)
      : scale_(law.rate.factor, law.rate.shift - 3), limit_(S::floats(limit)) {
    const uint32_t exponent = static_cast<uint32_t>(S::kBias + kUnits) - static_cast<uint32_t>(top);
    const uint32_t excess = kPlain ? 0 : S::Scale::excess(law.rate.shift - 3);
    offset_ = S::ints(static_cast<int32_t>((exponent << 23) - excess));
  }

  // Whether all weights are 0. A cut leaves few ids, so that this is worth asking.
  template <int kN>
  [[gnu::always_inline]] bool none(const Group<S, kN>& l) const {
    if constexpr (kPlain) return false;
    return none_from(l, limit_);
  }

  // log2 of the weights: exponent field and fraction; the exponent is kBias too large.
  template <int kN>
  [[gnu::always_inline]] void positions(const Group<S, kN>& l, I (&z)[kN]) const {
    for (int j = 0; j < kN; ++j) {
      const F inside = kPlain ? S::max(l.v[j], limit_)
                              : S::max(S::min(l.v[j], S::floats(2047.0f)), S::floats(-2047.0f));
      // Times 2^20. A zero or a subnormal number becomes another one that is rounded to 0.
      z[j] = S::rounded(S::bits(S::add(S::bits(inside), S::ints(20 << 23))));
    }
    for (int j = 0; j < kN; ++j) z[j] = S::add(S::template scaled<kPlain>(z[j], scale_), offset_);
  }

  template <int kN>
  [[gnu::always_inline]] Group<S, kN> weights(const Group<S, kN>& l, const I (&z)[kN]) const {
    const F one = S::floats(1.0f);
    F x[kN];
    Group<S, kN> g;
    for (int j = 0; j < kN; ++j) {
      x[j] = S::sub(S::bits(S::fraction(z[j], S::bits(one))), one);
      g.v[j] = constant<S>(kExp2[0]);
    }
    for (int i = 1; i < 6; ++i) {
      const F c = i < 5 ? constant<S>(kExp2[i]) : one;
      for (int j = 0; j < kN; ++j) g.v[j] = S::add(S::mul(g.v[j], x[j]), c);
    }
    for (int j = 0; j < kN; ++j) {
      g.v[j] = S::scaled_by(g.v[j], z[j]);
      if constexpr (!kPlain) g.v[j] = S::keep(S::at_least(l.v[j], limit_), g.v[j]);
    }
    return g;
  }

  template <int kN>
  [[gnu::always_inline]] Group<S, kN> operator()(const Group<S, kN>& l) const {
    I z[kN];
    positions(l, z);
    return weights(l, z);
  }

 private:
  typename S::Scale scale_;
  I offset_;
  F limit_;
};

// The same for given probabilities.
template <class S>
class Chooser {
 public:
  using F = typename S::F;
  explicit Chooser(float limit) : limit_(S::floats(limit)) {}
  template <int kN>
  [[gnu::always_inline]] bool none(const Group<S, kN>& p) const {
    return none_from(p, limit_);
  }
  template <int kN>
  [[gnu::always_inline]] Group<S, kN> operator()(const Group<S, kN>& p) const {
    Group<S, kN> kept;
    for (int j = 0; j < kN; ++j) kept.v[j] = S::keep(S::at_least(p.v[j], limit_), p.v[j]);
    return kept;
  }

 private:
  F limit_;
};

// f(weigher) for the ids of a row that are kept from `limit` on.
template <class S, bool kGiven, int kUnits, class F>
[[gnu::always_inline]] inline void with_weigher(const Law& law, const Limits& limits, int32_t top,
                                                float limit, F f) {
  if constexpr (kGiven) {
    f(Chooser<S>(limit));
  } else {
    const float visible = limits.least_visible(top);
    if (law.cut.key == 0 && visible >= -2047.0f && law.rate.shift - 3 <= 32 &&
        top < limits.ceiling) {
      f(Weigher<S, kUnits, true>(law, top, visible));
    } else {
      f(Weigher<S, kUnits, false>(law, top, visible > limit ? visible : limit));
    }
  }
}

}  // namespace
}  // namespace alignops::speculative
