// Row primitives without instruction sets: the ground truth of the others.
#include <cmath>

#include "speculative/cpu/random.h"
#include "speculative/cpu/weights.h"

namespace alignops::speculative {
namespace {

constexpr float kInfinity = __builtin_inff();

struct Range {
  int64_t begin, end;
};

Range ids_of(const Law& law, int64_t tile) {
  const int64_t end = (tile + 1) * kTile;
  return {tile * kTile, end < law.size ? end : law.size};
}

bool is_bad(float value, bool probabilities) {
  return probabilities ? !(value >= 0.0f && value <= 1.0f) : !(value < kInfinity);
}

void largest_tile(const Law& law, int64_t tile, bool probabilities, TileStats& out) {
  const auto [begin, end] = ids_of(law, tile);
  out.best = -kInfinity;
  out.place = 0;
  out.bad = 0;
  for (int64_t v = begin; v < end; ++v) {
    const float value = load(law, v);
    if (is_bad(value, probabilities)) out.bad = 1;
    if (value > out.best) {
      out.best = value;
      out.place = static_cast<int32_t>(v - begin);
    }
  }
}

void largest(const Law& law, TileStats* out, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) largest_tile(law, tile, false, out[tile]);
}

// Keys of the kept ids of a tile, 0 of the others.
struct Keys {
  int64_t size = 0;
  uint64_t key[kTile];

  Keys(const Law& law, int64_t tile) {
    const auto [begin, end] = ids_of(law, tile);
    for (int64_t v = begin; v < end; ++v) {
      const uint64_t k = key_at(law, v);
      key[size++] = kept(law.cut, k, v) ? k : 0;
    }
  }

  uint64_t largest() const {
    uint64_t most = 0;
    for (int64_t i = 0; i < size; ++i) most = key[i] > most ? key[i] : most;
    return most;
  }
};

int32_t top_of(const Law& law, uint64_t largest_key) {
  if (largest_key == 0) return INT32_MIN;
  return law.probabilities ? 0 : weight_of(largest_key).exponent;
}

void scan(const Law& law, TileStats* out, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    TileStats& stats = out[tile];
    largest_tile(law, tile, law.probabilities, stats);
    const Keys keys(law, tile);
    stats.top = top_of(law, keys.largest());
    stats.sum = 0;
    for (int64_t i = 0; i < keys.size; ++i) {
      if (law.probabilities) {
        stats.sum += fixed(bits_float(static_cast<uint32_t>(keys.key[i])));
      } else {
        stats.sum += units(weight_of(keys.key[i]), stats.top);
      }
    }
  }
}

void peak(const Law& law, uint64_t* out, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) out[tile] = Keys(law, tile).largest();
}

void count(const Law& law, uint32_t* out, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const auto [first, last] = ids_of(law, tile);
    out[tile] = 0;
    for (int64_t v = first; v < last; ++v) out[tile] += kept(law.cut, key_at(law, v), v);
  }
}

void sums(const Density& d, uint64_t* out, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const auto [first, last] = ids_of(*d.p, tile);
    out[tile] = 0;
    for (int64_t v = first; v < last; ++v) out[tile] += fixed(density_at(d, v));
  }
}

int64_t find(const Density& d, int64_t tile, uint64_t bound) {
  const auto [first, last] = ids_of(*d.p, tile);
  uint64_t sum = 0;
  for (int64_t v = first; v < last; ++v) {
    sum += fixed(density_at(d, v));
    if (sum > bound) return v;
  }
  return last - 1;
}

void normalize(const Density& d, double total, float* out, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const auto [first, last] = ids_of(*d.p, tile);
    for (int64_t v = first; v < last; ++v)
      out[v] = static_cast<float>(static_cast<double>(fixed(density_at(d, v))) / total);
  }
}

void race(const Law& law, uint64_t seed, uint32_t position, TileRace* out, int64_t begin,
          int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const auto [first, last] = ids_of(law, tile);
    TileRace& best = out[tile];
    best = {kInfinity, -1, INT32_MIN, 0};
    for (int64_t v = first; v < last; ++v)
      if (is_bad(load(law, v), law.probabilities)) best.bad = 1;
    const Keys keys(law, tile);
    best.top = top_of(law, keys.largest());
    Words words{};
    for (int64_t v = first; v < last; ++v) {
      if (v % 4 == 0)  // tiles begin at multiples of 4
        words = philox(seed, position, Stream::kRace, static_cast<uint32_t>(v / 4));
      const uint64_t key = keys.key[v - first];
      if (key == 0) continue;
      float weight;
      if (law.probabilities) {
        weight = bits_float(static_cast<uint32_t>(key));
      } else {
        const Weight w = weight_of(key);
        if (int64_t{best.top} - w.exponent > kNegligible) continue;
        weight = static_cast<float>(static_cast<double>(w.mantissa) * power(w.exponent - best.top));
      }
      const float ratio = noise(words.word[v % 4]) / weight;
      if (ratio < best.ratio) {
        best.ratio = ratio;
        best.place = static_cast<int32_t>(v - first);
      }
    }
    if (best.place < 0) best.top = INT32_MIN;
  }
}

void entropy(const Law& law, double* out, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const auto [first, last] = ids_of(law, tile);
    out[tile] = 0;
    for (int64_t v = first; v < last; ++v) {
      const double p = p32_at(law, v);
      if (p > 0) out[tile] -= p * std::log(p);
    }
  }
}

void histogram(const HistogramArgs& args, int64_t begin, int64_t end) {
  const Law& law = *args.law;
  for (int64_t v = ids_of(law, begin).begin; v < end * kTile && v < law.size; ++v) {
    const uint64_t key = key_at(law, v);
    if (key < args.low || key > args.high || !kept(law.cut, key, v)) continue;
    const uint64_t bucket = (args.high - key) >> args.shift;
    ++args.counts[bucket];
    args.sums[bucket] += law.probabilities ? fixed(bits_float(static_cast<uint32_t>(key)))
                                           : units(weight_of(key), law.top);
  }
}

int64_t collect(const Law& law, uint64_t low, uint64_t high, Entry* out, int64_t capacity,
                int64_t begin, int64_t end) {
  int64_t size = 0;
  for (int64_t v = begin * kTile; v < end * kTile && v < law.size && size < capacity; ++v) {
    const uint64_t key = key_at(law, v);
    if (key >= low && key <= high && kept(law.cut, key, v)) out[size++] = {key, v};
  }
  return size;
}

}  // namespace

const Kernels kRowsScalar{largest,   scan, peak,    count,     sums,   find,
                          normalize, race, entropy, histogram, collect};

}  // namespace alignops::speculative
