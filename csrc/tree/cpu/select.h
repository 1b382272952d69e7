// The kernels, written over 8 float lanes `F` and their masks `M`, which the instruction set
// defines.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace alignops::tree {
namespace {

// exp(x) for x <= 0, relative error below 2e-7: 2^i * 2^f, f in [-1/2, 1/2], by a polynomial.
template <class F>
F exp_lanes(F x) {
  const F t = max(x * F(1.44269504f), F(-126.0f));
  const F i = round(t);
  const F f = t - i;
  F p(1.5403530e-4f);
  p = p * f + F(1.3333558e-3f);
  p = p * f + F(9.6181291e-3f);
  p = p * f + F(5.5504109e-2f);
  p = p * f + F(2.4022651e-1f);
  p = p * f + F(6.9314718e-1f);
  p = p * f + F(1.0f);
  return scale_by_power(p, i);
}

// Keeps the best score and its slot in each of 8 columns.
template <class F>
class Best {
 public:
  void offer(F score, int64_t slot) {
    const auto better = score > score_;
    score_ = choose(better, score, score_);
    slot_ = choose(better, F::index(slot), slot_);
  }

  // The lowest slot of the best score; -1 if there is none above -inf.
  int32_t slot() const {
    const float best = largest(score_);
    if (best == -__builtin_inff()) return -1;
    return static_cast<int32_t>(least(choose(score_ == F(best), slot_, F(__builtin_inff()))));
  }

 private:
  F score_{-__builtin_inff()};
  F slot_{0.0f};
};

template <class F>
struct Selection {
  static F value(const Edges& e, int64_t i, F unvisited) {
    const F q = F::load(e.q + i);
    return choose(is_nan(q), unvisited, q);
  }

  // Scores of lanes that cannot be chosen become -inf.
  static F open(const Edges& e, int64_t i, F score) {
    return choose(F::below(e.child + i, kNotMade), F(-__builtin_inff()), score);
  }

  static Summary summarize(const Edges& e) {
    F low(__builtin_inff()), high(-__builtin_inff());
    F sum(0.0f), seen(0.0f), visits(0.0f), most(0.0f), weight(0.0f);
    for (int64_t i = 0; i < e.cap; i += 8) {
      const F q = F::load(e.q + i);
      const auto closed = F::below(e.child + i, kPruned);
      const auto blank = is_nan(q) | closed;
      low = min(low, choose(blank, F(__builtin_inff()), q));
      high = max(high, choose(blank, F(-__builtin_inff()), q));
      sum = sum + choose(blank, F(0.0f), q);
      seen = seen + choose(blank, F(0.0f), F(1.0f));
      const F n = choose(closed, F(0.0f), F::load(e.visits + i));
      visits = visits + n;
      most = max(most, n);
      weight = weight + choose(closed, F(0.0f), F::load(e.prior + i));
    }
    return {least(low),    largest(high), total(sum),   total(seen),
            total(visits), largest(most), total(weight)};
  }

  static int32_t puct(const Edges& e, const PuctArgs& a) {
    const F low(a.low), inverse(a.inverse), unvisited(a.unvisited), scale(a.scale), one(1.0f);
    Best<F> best;
    for (int64_t i = 0; i < e.cap; i += 8) {
      const F q = F::load(e.q + i);
      F unit = (q - low) * inverse;
      if (a.clip) unit = max(min(unit, one), F(0.0f));
      unit = choose(is_nan(q), unvisited, unit);
      const F bonus = F::load(e.prior + i) * scale / (one + F::load(e.visits + i));
      best.offer(open(e, i, unit + bonus), i);
    }
    return best.slot();
  }

  static int32_t uct(const Edges& e, const UctArgs& a) {
    const F log_n(a.log_n), c(a.c), unvisited(a.unvisited);
    Best<F> best;
    for (int64_t i = 0; i < e.cap; i += 8) {
      const F visits = F::load(e.visits + i);
      const F score = value(e, i, unvisited) + c * sqrt(log_n / visits);
      best.offer(open(e, i, choose(visits == F(0.0f), F(__builtin_inff()), score)), i);
    }
    return best.slot();
  }

  static F mass(const Edges& e, int64_t i, const DrawArgs& a) {
    const F x = F(a.rate) * (value(e, i, F(a.unvisited)) - F(a.shift));
    const F m = F::load(e.prior + i) * exp_lanes(min(x, F(0.0f)));
    return choose(F::below(e.child + i, kNotMade), F(0.0f), m);
  }

  // The lane at which the running sum of masses, column after column, exceeds the word's share of
  // the total.
  static int32_t draw(const Edges& e, const DrawArgs& a) {
    F sum(0.0f);
    for (int64_t i = 0; i < e.cap; i += 8) sum = sum + mass(e, i, a);
    float columns[8];
    sum.store(columns);
    float whole = 0;
    for (const float column : columns) whole += column;
    if (!(whole > 0)) return -1;
    float left = static_cast<float>(a.word >> 8) * 0x1p-24f * whole;
    int column = 0;
    while (column < 7 && left >= columns[column]) left -= columns[column++];
    int32_t last = -1;
    for (int64_t i = 0; i < e.cap; i += 8) {
      float masses[8];
      mass(e, i, a).store(masses);
      if (!(masses[column] > 0)) continue;
      last = static_cast<int32_t>(i + column);
      if (left < masses[column]) return last;
      left -= masses[column];
    }
    return last >= 0 ? last : first_of_mass(e, a);
  }

  // Rounding left the draw in a column without mass.
  static int32_t first_of_mass(const Edges& e, const DrawArgs& a) {
    for (int64_t i = 0; i < e.cap; i += 8) {
      float masses[8];
      mass(e, i, a).store(masses);
      for (int j = 0; j < 8; ++j)
        if (masses[j] > 0) return static_cast<int32_t>(i + j);
    }
    return -1;
  }

  static int32_t greedy(const Edges& e, float unvisited) {
    Best<F> best;
    for (int64_t i = 0; i < e.cap; i += 8) best.offer(open(e, i, value(e, i, F(unvisited))), i);
    return best.slot();
  }
};

}  // namespace
}  // namespace alignops::tree
