#include "speculative/self_test.h"

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "common/float16.h"
#include "speculative/cpu/weights.h"

namespace alignops::speculative {
namespace {

// Two whole tiles and a part of one.
constexpr int64_t kSize = 2 * kTile + 1003;
constexpr int64_t kDrafterSize = kTile + 77;
constexpr double kEntropyTolerance = 1e-6;

// Logits in [-12, 4) from a linear congruential generator; every 17th is one of equals, every 29th
// is impossible.
std::vector<float> logits(uint32_t seed) {
  std::vector<float> out;
  for (int64_t i = 0; i < kSize; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const float value = static_cast<float>(seed >> 8) * 0x1p-20f - 12.0f;
    out.push_back(i % 29 == 3 ? -__builtin_inff() : i % 17 == 5 ? 1.5f : value);
  }
  return out;
}

std::vector<float> probabilities(uint32_t seed) {
  std::vector<float> out = logits(seed);
  for (float& value : out) value = value > 0 ? value * 0x1p-16f : 0.0f;
  return out;
}

std::vector<uint16_t> narrow(const std::vector<float>& values, DType dtype) {
  std::vector<uint16_t> out;
  out.reserve(values.size());
  for (const float value : values)
    out.push_back(dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value));
  return out;
}

template <class T>
uint64_t bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t out = 0;
  std::memcpy(&out, &value, sizeof value);
  return out;
}

// What a table says of a row.
struct Answers {
  std::vector<uint64_t> exact;
  std::vector<double> entropies;

  bool agree(const Answers& other) const {
    for (size_t i = 0; i < entropies.size(); ++i)
      if (!(std::fabs(entropies[i] - other.entropies[i]) <= kEntropyTolerance)) return false;
    return exact == other.exact;
  }
};

void add(Answers& out, const TileStats& stats, bool all) {
  for (const uint64_t word : {bits(stats.best), bits(stats.place), bits(stats.bad)})
    out.exact.push_back(word);
  if (!all) return;
  out.exact.push_back(bits(stats.top));
  out.exact.push_back(stats.sum);
}

template <class T>
std::vector<T> per_tile(const Law& law) {
  return std::vector<T>(static_cast<size_t>(tiles_of(law.size)));
}

// The law with top and inverse of the whole row, from the scalar kernels.
Law whole(Law law) {
  auto tiles = per_tile<TileStats>(law);
  kRowsScalar.scan(law, tiles.data(), 0, tiles_of(law.size));
  law.top = INT32_MIN;
  for (const TileStats& tile : tiles) law.top = tile.top > law.top ? tile.top : law.top;
  uint64_t sum = 0;
  for (const TileStats& tile : tiles)
    if (tile.sum > 0 && int64_t{law.top} - tile.top < 64) sum += tile.sum >> (law.top - tile.top);
  law.inverse = 1.0 / static_cast<double>(sum);
  return law;
}

void ask_density(const Kernels& kernels, const Density& d, Answers& out) {
  const int64_t tiles = tiles_of(d.p->size);
  auto sums = per_tile<uint64_t>(*d.p);
  kernels.sums(d, sums.data(), 0, tiles);
  out.exact.insert(out.exact.end(), sums.begin(), sums.end());
  int64_t tile = 0;
  for (const uint64_t sum : sums) {
    for (const uint64_t part : {uint64_t{0}, sum / 3, sum - 1})
      if (part < sum) out.exact.push_back(static_cast<uint64_t>(kernels.find(d, tile, part)));
    ++tile;
  }
  std::vector<float> normal(static_cast<size_t>(d.p->size));
  kernels.normalize(d, 0x1p39, normal.data(), 0, tiles);
  for (const float value : normal) out.exact.push_back(bits(value));
}

Answers ask(const Kernels& kernels, const Law& law, const Law& drafter) {
  Answers out;
  const int64_t tiles = tiles_of(law.size);
  auto stats = per_tile<TileStats>(law);
  kernels.largest(law, stats.data(), 0, tiles);
  for (const TileStats& tile : stats) add(out, tile, false);
  kernels.scan(law, stats.data(), 0, tiles);
  for (const TileStats& tile : stats) add(out, tile, true);
  auto peaks = per_tile<uint64_t>(law);
  kernels.peak(law, peaks.data(), 0, tiles);
  out.exact.insert(out.exact.end(), peaks.begin(), peaks.end());
  auto counts = per_tile<uint32_t>(law);
  kernels.count(law, counts.data(), 0, tiles);
  out.exact.insert(out.exact.end(), counts.begin(), counts.end());
  ask_density(kernels, {&law, nullptr, 1.0f}, out);
  ask_density(kernels, {&law, &drafter, 0.75f}, out);
  auto races = per_tile<TileRace>(law);
  kernels.race(law, 0x0123456789ABCDEF, 77, races.data(), 0, tiles);
  for (const TileRace& tile : races)
    for (const uint64_t word : {bits(tile.ratio), bits(tile.place), bits(tile.top), bits(tile.bad)})
      out.exact.push_back(word);
  out.entropies = per_tile<double>(law);
  kernels.entropy(law, out.entropies.data(), 0, tiles);
  // Buckets of whole exponents, and of one exponent.
  uint64_t high = 0;
  for (const uint64_t key : peaks) high = key > high ? key : high;
  const int32_t coarse = law.probabilities ? 23 : 24;
  for (const int32_t shift : {coarse, coarse - 12}) {
    std::vector<uint32_t> number(kBuckets);
    std::vector<uint64_t> sums(kBuckets);
    const uint64_t span = (uint64_t{kBuckets} << shift) - 1;
    kernels.histogram(
        {&law, high > span ? high - span : 1, high, shift, number.data(), sums.data()}, 0, tiles);
    out.exact.insert(out.exact.end(), number.begin(), number.end());
    out.exact.insert(out.exact.end(), sums.begin(), sums.end());
  }
  const uint64_t near = uint64_t{2} << coarse;
  for (const auto& [capacity, most] :
       {std::pair{int64_t{5}, high}, std::pair{law.size, high}, std::pair{law.size, UINT64_MAX}}) {
    std::vector<Entry> entries(static_cast<size_t>(capacity));
    const int64_t found = kernels.collect(law, high > near ? high - near : 1, most, entries.data(),
                                          capacity, 0, tiles);
    for (int64_t i = 0; i < found; ++i) {
      out.exact.push_back(entries[static_cast<size_t>(i)].key);
      out.exact.push_back(static_cast<uint64_t>(entries[static_cast<size_t>(i)].id));
    }
  }
  return out;
}

}  // namespace

bool agrees_on(const Kernels& kernels, Law law, Law drafter) {
  drafter = whole(drafter);
  auto peaks = per_tile<uint64_t>(law);
  law.cut = kNoCut;
  kRowsScalar.peak(law, peaks.data(), 0, tiles_of(law.size));
  uint64_t high = 0;
  for (const uint64_t key : peaks) high = key > high ? key : high;
  // Well below the top; among the equals of the top; at an id from the middle of the row.
  const uint64_t below = uint64_t{3} << (law.probabilities ? 22 : 23);
  const int64_t id = law.size / 3;
  for (const Cut& cut : {kNoCut, Cut{high > below ? high - below : 1, INT64_MAX},
                         Cut{peaks[0], law.size / 2}, Cut{key_at(law, id), id}}) {
    if (cut.key == 0 && cut.id >= 0) continue;
    law.cut = cut;
    const Law ready = whole(law);
    if (ready.top == INT32_MIN) continue;  // nothing is possible
    if (!ask(kernels, ready, drafter).agree(ask(kRowsScalar, ready, drafter))) return false;
  }
  return true;
}

bool agrees_with_scalar(const Kernels& kernels) {
  constexpr Rate kWarm{774541002, 29}, kCold{968176238, 26};  // T = 1 and 0.1
  const std::vector<float> p = logits(1), q = logits(2), pp = probabilities(3),
                           qq = probabilities(4);
  const auto law = [](const void* data, DType dtype, bool given, int64_t size, Rate rate) {
    return Law{data, dtype, given, size, rate, kNoCut, 0, 1.0};
  };
  if (!agrees_on(kernels, law(p.data(), DType::kFloat32, false, kSize, kWarm),
                 law(q.data(), DType::kFloat32, false, kDrafterSize, kWarm)) ||
      !agrees_on(kernels, law(pp.data(), DType::kFloat32, true, kSize, kWarm),
                 law(qq.data(), DType::kFloat32, true, kDrafterSize, kWarm)))
    return false;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const std::vector<uint16_t> narrow_p = narrow(p, dtype), narrow_q = narrow(q, dtype);
    if (!agrees_on(kernels, law(narrow_p.data(), dtype, false, kSize, kCold),
                   law(narrow_q.data(), dtype, false, kDrafterSize, kCold)))
      return false;
  }
  // What is bad is seen in every place of a vector.
  for (int64_t i = kTile; i < kTile + 40; ++i) {
    for (const float value : {__builtin_nanf(""), __builtin_inff()}) {
      std::vector<float> damaged = p;
      damaged[static_cast<size_t>(i)] = value;
      const Law bad = law(damaged.data(), DType::kFloat32, false, kSize, kWarm);
      TileStats stats[2];
      TileRace races[2];
      kernels.scan(bad, stats, 1, 2);
      kernels.race(bad, 1, 2, races, 1, 2);
      if (stats[1].bad != 1 || races[1].bad != 1) return false;
      kernels.largest(bad, stats, 1, 2);
      if (stats[1].bad != 1) return false;
    }
  }
  return true;
}

}  // namespace alignops::speculative
