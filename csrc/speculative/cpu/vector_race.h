// Race of the ids of a tile: the smallest noise / weight. The random words of four consecutive ids
// come from one counter of Philox4x32-10, about 130 operations for four registers of ids.
#pragma once

#include "speculative/cpu/vector_peak.h"

namespace alignops::speculative {
namespace {

// Words 0..3 of the counters (position, kRace, lanes, 0).
template <class S>
void race_words(uint64_t seed, uint32_t position, typename S::I lanes, typename S::I (&words)[4]) {
  using I = typename S::I;
  const auto all = [](uint32_t v) { return S::ints(static_cast<int32_t>(v)); };
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  I c[4] = {all(position), all(static_cast<uint32_t>(Stream::kRace)), lanes, all(0)};
  for (int round = 0; round < 10; ++round) {
    I low[2], high[2];
    S::multiply(c[0], all(0xD2511F53), low[0], high[0]);
    S::multiply(c[2], all(0xCD9E8D57), low[1], high[1]);
    c[0] = S::xor3(high[1], c[1], all(key[0]));
    c[1] = low[1];
    c[2] = S::xor3(high[0], c[3], all(key[1]));
    c[3] = low[0];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  for (int j = 0; j < 4; ++j) words[j] = c[j];
}

// noise() of random.h.
template <class S>
typename S::F noise_of(typename S::I word) {
  using F = typename S::F;
  using I = typename S::I;
  // Without the bit below the leading one no conversion rounds up to the next power of two.
  const I leading = S::and_not(S::template shift_right<1>(word), word);
  const I exponent = S::template shift_right<23>(S::bits(S::converted_unsigned(leading)));
  const I zeros = S::min(S::sub(S::ints(127 + 31), exponent), S::ints(32));
  const I fraction = S::shift_left(word, S::add(zeros, S::ints(1)));
  const I rest = S::sub(S::ints(0), fraction);  // 2^32 - fraction; 0 stands for 2^32
  const F t =
      S::mul(S::choose(S::equal(rest, S::ints(0)), S::floats(0x1p32f), S::converted_unsigned(rest)),
             S::floats(0x1p-33f));
  F value = constant<S>(kNoise[8]);
  for (int i = 7; i >= 0; --i) value = S::add(S::mul(value, t), constant<S>(kNoise[i]));
  return S::add(S::converted(zeros), S::mul(t, value));
}

// The best of each lane so far, and of all.
template <class S>
struct Lead {
  using F = typename S::F;
  using I = typename S::I;
  F lane_ratio = S::floats(kInfinity), enough = S::floats(0.0f);
  I lane_place = S::ints(-1);
  float ratio = kInfinity;
  int32_t place = -1;

  // Whether some lane is better now.
  bool update(F candidate, I places) {
    const auto better = S::less(candidate, lane_ratio);
    lane_ratio = S::choose(better, candidate, lane_ratio);
    lane_place = S::choose(better, places, lane_place);
    return S::set(better) != 0;
  }

  void join_lanes() {
    float ratios[S::kLanes];
    int32_t places[S::kLanes];
    S::store(ratios, lane_ratio);
    S::store(places, lane_place);
    for (int64_t j = 0; j < S::kLanes; ++j)
      if (ratios[j] < ratio || (ratios[j] == ratio && places[j] < place)) {
        ratio = ratios[j];
        place = places[j];
      }
    enough = S::floats(0x1p-33f / ratio);
  }
};

// Noise is more than 2^-33, so an id whose weight is below 2^-33 / ratio cannot beat that ratio,
// and where all weights of four registers are such, no random words are made.
template <class S, DType kType, class Weight>
void race_tile(const Law& law, const Limits& limits, int64_t tile, uint64_t seed, uint32_t position,
               const Weight& weight, TileRace& out) {
  using I = typename S::I;
  const Range ids = ids_of(law, tile);
  const I n = S::numbers();
  // The counters whose words, transposed in quarters of a register, are those of consecutive ids.
  const I order = S::or_(S::template shift_right<2>(n),
                         S::shift_left(S::and_(n, S::ints(3)), S::ints(S::kLanes == 16 ? 2 : 1)));
  Lead<S> lead;
  for (int64_t v = ids.begin; v < ids.end; v += 4 * S::kLanes) {
    Group<S, 4> values;
    for (int r = 0; r < 4; ++r) {
      const int64_t first = v + r * S::kLanes, left = ids.end - first;
      values.v[r] = left >= S::kLanes ? S::template load<kType>(law.data, first)
                    : left > 0        ? S::template load<kType>(law.data, first, left)
                                      : S::floats(-kInfinity);
    }
    Group<S, 4> w = weight(values);
    uint32_t possible = 0;
    for (int r = 0; r < 4; ++r) {
      const int64_t first = v + r * S::kLanes;
      if (limits.last >= ids.begin && first + S::kLanes > limits.last + 1) {
        // Behind the last id of the lower limit.
        const auto before = S::floats(static_cast<float>(limits.last + 1 - first));
        w.v[r] = S::keep(S::either(S::at_least(values.v[r], S::floats(limits.high)),
                                   S::less(S::converted(n), before)),
                         w.v[r]);
      }
      possible |= S::set(S::less(lead.enough, w.v[r]));
    }
    if (possible == 0) continue;
    I words[4];
    race_words<S>(seed, position, S::add(order, S::ints(static_cast<int32_t>(v / 4))), words);
    S::transpose(words);
    bool better = false;
    for (int r = 0; r < 4; ++r) {
      const auto place = static_cast<int32_t>(v + r * S::kLanes - ids.begin);
      better |= lead.update(S::div(noise_of<S>(words[r]), w.v[r]), S::add(n, S::ints(place)));
    }
    if (better) lead.join_lanes();
  }
  out.ratio = lead.ratio;
  out.place = lead.place;
}

template <class S>
void race(const Law& law, uint64_t seed, uint32_t position, TileRace* out, int64_t begin,
          int64_t end) {
  const Limits limits(law);
  with_row(law, [&]<DType kType, bool kGiven>() {
    for (int64_t tile = begin; tile < end; ++tile) {
      TileStats stats;
      peak_of<S, kType, kGiven>(law, tile, stats);
      TileRace& best = out[tile];
      best = {kInfinity, -1, INT32_MIN, stats.bad};
      const float limit = limits.last >= tile * kTile ? limits.low : limits.high;
      if (stats.bad != 0 || !(stats.best >= limit)) continue;
      const int32_t top = kGiven ? 0 : weigh(stats.best, law.rate).exponent;
      with_weigher<S, kGiven, 23>(law, limits, top, limit, [&](const auto& weigher) {
        race_tile<S, kType>(law, limits, tile, seed, position, weigher, best);
      });
      best.top = best.place < 0 ? INT32_MIN : top;
    }
  });
}

}  // namespace
}  // namespace alignops::speculative
