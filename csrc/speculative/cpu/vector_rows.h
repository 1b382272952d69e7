// Row primitives in vectors, the source of AVX2 and AVX-512: an ISA file takes its table from
// `row_kernels<Lanes>()`.
//
// A tile is read twice, once for its maximum; the second time it lies in the L1 cache. Per register
// of ids: 2 operations for the maximum, about 30 for a weight and its sum, 12 more for an R. Memory
// is read once, but for `find`, which reads one tile.
#pragma once

#include "speculative/cpu/vector_peak.h"
#include "speculative/cpu/vector_race.h"

namespace alignops::speculative {
namespace {

// Values of this many ids are held in memory between two steps.
constexpr int64_t kChunk = 512, kSlack = 16;

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// -------------------------------------------------------------------------------------------------
// Largest value and sums of weights

template <class S>
void largest(const Law& law, TileStats* out, int64_t begin, int64_t end) {
  with_dtype(law.dtype, [&]<DType kType>() {
    for (int64_t tile = begin; tile < end; ++tile) peak_of<S, kType, false>(law, tile, out[tile]);
  });
}

// f(begin, end, weigher) for the parts of [begin, end) that have one limit.
template <class S, bool kGiven, int kUnits, class F>
[[gnu::always_inline]] inline void weighers(const Law& law, const Limits& limits, int32_t top,
                                            int64_t begin, int64_t end, F f) {
  limits.parts(begin, end, [&](int64_t first, int64_t last, float limit) {
    with_weigher<S, kGiven, kUnits>(law, limits, top, limit,
                                    [&](const auto& weigher) { f(first, last, weigher); });
  });
}

template <class S, DType kType, bool kGiven>
uint64_t sum_of(const Law& law, const Limits& limits, int32_t top, Range ids) {
  typename S::Sum sum;
  weighers<S, kGiven, 39>(
      law, limits, top, ids.begin, ids.end, [&](int64_t begin, int64_t end, const auto& weigher) {
        each<S, kType, false>(law.data, begin, end, [&](const auto& values, int64_t) {
          if (weigher.none(values)) return;
          for (const auto w : weigher(values).v)
            sum.add(kGiven ? S::mul(w, S::floats(0x1p40f)) : w);
        });
      });
  return sum.total();
}

template <class S>
void scan(const Law& law, TileStats* out, int64_t begin, int64_t end) {
  const Limits limits(law);
  with_row(law, [&]<DType kType, bool kGiven>() {
    for (int64_t tile = begin; tile < end; ++tile) {
      TileStats& stats = out[tile];
      peak_of<S, kType, kGiven>(law, tile, stats);
      stats.top = INT32_MIN;
      stats.sum = 0;
      // Kept are the largest ones: none at all, if not the very largest.
      if (stats.bad != 0 || !(stats.best >= limits.low)) continue;
      stats.top = kGiven ? 0 : weigh(stats.best, law.rate).exponent;
      stats.sum = sum_of<S, kType, kGiven>(law, limits, stats.top, ids_of(law, tile));
      if (stats.sum == 0) stats.top = INT32_MIN;
    }
  });
}

template <class S, DType kType>
int64_t count_of(const Law& law, const Limits& limits, Range ids) {
  int64_t found = 0;
  limits.parts(ids.begin, ids.end, [&](int64_t begin, int64_t end, float limit) {
    each<S, kType, false>(law.data, begin, end, [&](const auto& values, int64_t) {
      for (const auto value : values.v)
        found += __builtin_popcount(S::set(S::at_least(value, S::floats(limit))));
    });
  });
  return found;
}

template <class S>
void count(const Law& law, uint32_t* out, int64_t begin, int64_t end) {
  const Limits limits(law);
  with_dtype(law.dtype, [&]<DType kType>() {
    for (int64_t tile = begin; tile < end; ++tile)
      out[tile] = static_cast<uint32_t>(count_of<S, kType>(law, limits, ids_of(law, tile)));
  });
}

template <class S>
void peak(const Law& law, uint64_t* out, int64_t begin, int64_t end) {
  const Limits limits(law);
  with_dtype(law.dtype, [&]<DType kType>() {
    for (int64_t tile = begin; tile < end; ++tile) {
      const Range ids = ids_of(law, tile);
      TileStats stats;
      peak_of<S, kType, false>(law, tile, stats);
      const bool some = stats.best >= limits.high ||
                        (stats.best >= limits.low && count_of<S, kType>(law, limits, ids) > 0);
      out[tile] = some ? key_at(law, ids.begin + stats.place) : 0;
    }
  });
}

// -------------------------------------------------------------------------------------------------
// Densities: r(v) in units of 2^-40, so that R = trunc(r)

// Probabilities of a law.
template <class S>
class Reader {
 public:
  explicit Reader(const Law& law) : law_(law), limits_(law) {}

  // Of the ids [begin, end), 0 beyond the row and from `end` to a multiple of the lanes; `out` has
  // room for kSlack more. False if all are 0 for sure.
  bool read(int64_t begin, int64_t end, float* out) const {
    const int64_t last = end < law_.size ? end : law_.size;
    bool some = false;
    with_row(law_, [&]<DType kType, bool kGiven>() {
      const typename S::Factor factor(kGiven ? 0x1p40 : law_.inverse * 0x1p79);
      weighers<S, kGiven, 0>(
          law_, limits_, law_.top, begin, last, [&](int64_t from, int64_t to, const auto& weigher) {
            each<S, kType>(law_.data, from, to, [&](const auto& values, int64_t v) {
              float* place = out + (v - begin);
              if (weigher.none(values)) {
                for (int j = 0; j < values.kCount; ++j)
                  S::store(place + j * S::kLanes, S::floats(0.0f));
                return;
              }
              some = true;
              for (const auto w : weigher(values).v) {
                S::store(place, S::scaled(w, factor));
                place += S::kLanes;
              }
            });
          });
    });
    const int64_t padded = begin + round_up(end - begin, S::kLanes);
    for (int64_t v = last > begin ? last : begin; v < padded; ++v) out[v - begin] = 0.0f;
    return some;
  }

 private:
  const Law& law_;
  Limits limits_;
};

template <class S>
class DensityReader {
 public:
  explicit DensityReader(const Density& d) : d_(d), p_(*d.p), q_(d.q != nullptr ? *d.q : *d.p) {}

  // Of the ids [begin, end), at most kChunk; 0 from there to a multiple of the lanes. Returns that.
  int64_t read(int64_t begin, int64_t end, float* out) const {
    const int64_t size = round_up(end - begin, S::kLanes);
    if (!p_.read(begin, end, out)) return size;
    const auto scale = S::floats(d_.scale);
    if (d_.q != nullptr && begin < d_.q->size) {
      alignas(64) float q[kChunk + kSlack];
      q_.read(begin, end, q);
      for (int64_t i = 0; i < size; i += S::kLanes)
        S::store(out + i,
                 S::max(S::sub(S::mul(scale, S::load(out + i)), S::load(q + i)), S::floats(0.0f)));
    } else if (d_.scale != 1.0f) {
      for (int64_t i = 0; i < size; i += S::kLanes)
        S::store(out + i, S::mul(scale, S::load(out + i)));
    }
    return size;
  }

 private:
  const Density& d_;
  Reader<S> p_, q_;
};

template <class S>
uint64_t sum_of(const float* r, int64_t size) {
  typename S::Sum sum;
  for (int64_t i = 0; i < size; i += S::kLanes) sum.add(S::load(r + i));
  return sum.total();
}

// f(first id, number of ids, r, size) for the chunks of a range of ids; stops where it is true.
template <class S, class F>
void chunks(const DensityReader<S>& reader, Range ids, F f) {
  alignas(64) float r[kChunk + kSlack];
  for (int64_t v = ids.begin; v < ids.end; v += kChunk) {
    const int64_t end = v + kChunk < ids.end ? v + kChunk : ids.end;
    const int64_t size = reader.read(v, end, r);
    if (f(v, end - v, r, size)) return;
  }
}

template <class S>
void sums(const Density& d, uint64_t* out, int64_t begin, int64_t end) {
  const DensityReader<S> reader(d);
  for (int64_t tile = begin; tile < end; ++tile) {
    out[tile] = 0;
    chunks(reader, ids_of(*d.p, tile), [&](int64_t, int64_t, const float* r, int64_t size) {
      out[tile] += sum_of<S>(r, size);
      return false;
    });
  }
}

template <class S>
int64_t find(const Density& d, int64_t tile, uint64_t bound) {
  const Range ids = ids_of(*d.p, tile);
  int64_t found = ids.end - 1;
  uint64_t sum = 0;
  chunks(DensityReader<S>(d), ids, [&](int64_t v, int64_t count, const float* r, int64_t size) {
    const uint64_t after = sum + sum_of<S>(r, size);
    if (after <= bound) {
      sum = after;
      return false;
    }
    for (int64_t i = 0; i < count; ++i) {
      sum += static_cast<uint64_t>(r[i]);
      if (sum > bound) {
        found = v + i;
        break;
      }
    }
    return true;
  });
  return found;
}

template <class S>
void normalize(const Density& d, double total, float* out, int64_t begin, int64_t end) {
  const DensityReader<S> reader(d);
  const typename S::Factor divisor(total);
  for (int64_t tile = begin; tile < end; ++tile)
    chunks(reader, ids_of(*d.p, tile), [&](int64_t v, int64_t count, float* r, int64_t size) {
      for (int64_t i = 0; i < size; i += S::kLanes)
        S::store(r + i, S::quotient(S::truncated(S::load(r + i)), divisor));
      __builtin_memcpy(out + v, r, static_cast<size_t>(count) * sizeof(float));
      return false;
    });
}

// -------------------------------------------------------------------------------------------------
// Entropy

// -sum p ln p of weights w with p = w c: -c (sum w ln w + ln c sum w).
template <class S, DType kType>
double entropy_of(const Law& law, const Limits& limits, Range ids) {
  typename S::RealSum weights, logs;
  weighers<S, false, 0>(law, limits, law.top, ids.begin, ids.end,
                        [&](int64_t begin, int64_t end, const auto& weigher) {
                          each<S, kType, false>(law.data, begin, end,
                                                [&]<int kN>(const Group<S, kN>& values, int64_t) {
                                                  typename S::I z[kN];
                                                  weigher.positions(values, z);
                                                  const Group<S, kN> w = weigher.weights(values, z);
                                                  for (int j = 0; j < kN; ++j) {
                                                    weights.add(w.v[j]);
                                                    logs.add(w.v[j],
                                                             S::sub(z[j], S::ints(S::kBias << 23)));
                                                  }
                                                });
                        });
  constexpr double kLn2 = 0.6931471805599453;
  const double scale = law.inverse * 0x1p39;
  return -scale * (kLn2 * 0x1p-23 * logs.total() + __builtin_log(scale) * weights.total());
}

inline double entropy_of_given(const Law& law, Range ids) {
  double sum = 0;
  for (int64_t v = ids.begin; v < ids.end; ++v) {
    const double p = p32_at(law, v);
    if (p > 0) sum -= p * __builtin_log(p);
  }
  return sum;
}

template <class S>
void entropy(const Law& law, double* out, int64_t begin, int64_t end) {
  const Limits limits(law);
  with_row(law, [&]<DType kType, bool kGiven>() {
    for (int64_t tile = begin; tile < end; ++tile) {
      const Range ids = ids_of(law, tile);
      if constexpr (kGiven) {
        out[tile] = entropy_of_given(law, ids);
      } else {
        out[tile] = entropy_of<S, kType>(law, limits, ids);
      }
    }
  });
}

// -------------------------------------------------------------------------------------------------
// Ids by key

inline Range ids_of(const Law& law, int64_t begin, int64_t end) {
  return {begin * kTile, end * kTile < law.size ? end * kTile : law.size};
}

// f(id, key) for the kept ids of some tiles with low <= key <= high, ascending, until it returns
// true. Keys of visible weights come from vectors.
template <class S, class F>
void hits(const Law& law, uint64_t low, uint64_t high, Range ids, F f) {
  const Limits limits(law);
  const float least = least_value(law, low > 0 ? low : 1);
  const auto beyond = S::floats(high < UINT64_MAX ? least_value(law, high + 1) : kInfinity);
  bool done = false;
  with_row(law, [&]<DType kType, bool kGiven>() {
    const Weigher<S, 0, false> weigher(law, law.top, limits.least_visible(law.top));
    limits.parts(ids.begin, ids.end, [&](int64_t first, int64_t last, float limit) {
      const auto from = S::floats(limit > least ? limit : least);
      each<S, kType>(law.data, first, last, [&](const auto& values, int64_t v) {
        if (done || none_from(values, from)) return;
        for (const auto value : values.v) {
          uint32_t left = S::set(S::both(S::at_least(value, from), S::less(value, beyond)));
          int32_t weights[S::kLanes];
          if (!kGiven && left != 0) S::store(weights, S::bits(weigher(Group<S, 1>{{value}}).v[0]));
          for (; left != 0 && !done; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            const auto bits = kGiven ? 0u : static_cast<uint32_t>(weights[lane]);
            const uint64_t key =
                bits == 0 ? key_at(law, v + lane)
                          : key_of(Weight{(bits & 0x7fffffu) | 0x800000u,
                                          law.top + static_cast<int32_t>(bits >> 23) - 127});
            if (key >= low && key <= high) done = f(v + lane, key);
          }
          v += S::kLanes;
        }
      });
    });
  });
}

template <class S>
void histogram(const HistogramArgs& args, int64_t begin, int64_t end) {
  const Law& law = *args.law;
  hits<S>(law, args.low, args.high, ids_of(law, begin, end), [&](int64_t, uint64_t key) {
    const uint64_t bucket = (args.high - key) >> args.shift;
    ++args.counts[bucket];
    args.sums[bucket] += law.probabilities ? fixed(bits_float(static_cast<uint32_t>(key)))
                                           : units(weight_of(key), law.top);
    return false;
  });
}

template <class S>
int64_t collect(const Law& law, uint64_t low, uint64_t high, Entry* out, int64_t capacity,
                int64_t begin, int64_t end) {
  int64_t size = 0;
  if (capacity > 0)
    hits<S>(law, low, high, ids_of(law, begin, end), [&](int64_t v, uint64_t key) {
      out[size++] = {key, v};
      return size == capacity;
    });
  return size;
}

template <class S>
constexpr Kernels row_kernels() noexcept {
  return {largest<S>,   scan<S>, peak<S>,    count<S>,     sums<S>,   find<S>,
          normalize<S>, race<S>, entropy<S>, histogram<S>, collect<S>};
}

}  // namespace
}  // namespace alignops::speculative
