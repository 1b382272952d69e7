#include "speculative/laws.h"

#include <algorithm>
#include <cmath>

#include "speculative/cpu/weights.h"

namespace alignops::speculative {
namespace {

// A thread gets at least this many tiles.
constexpr int64_t kTileGrain = 4;
constexpr double kLog2E = 1.4426950408889634;
constexpr float kMinTemperature = 1e-5f, kMaxTemperature = 1e4f;

template <class T>
std::unique_ptr<T[]> memory(int64_t count) {
  return std::make_unique_for_overwrite<T[]>(static_cast<size_t>(count));
}

Rate rate_of(float temperature) {
  const double rate = kLog2E / static_cast<double>(temperature);
  const int shift = 29 - std::ilogb(rate);
  return {static_cast<int32_t>(std::lrint(std::ldexp(rate, shift))), shift};
}

}  // namespace

bool Warp::valid() const {
  const bool warm = temperature >= kMinTemperature && temperature <= kMaxTemperature;
  return (temperature == 0.0f || warm) && top_k >= 0 && top_p > 0.0f && top_p <= 1.0f &&
         min_p >= 0.0f && min_p <= 1.0f;
}

bool Warp::filters(int64_t size) const {
  return (top_k > 0 && top_k < size) || top_p < 1.0f || min_p > 0.0f;
}

RowLaw::RowLaw(const Kernels& kernels, const ParallelFor& parallel, int64_t longest)
    : kernels_(kernels),
      parallel_(parallel),
      stats_(memory<TileStats>(tiles_of(longest))),
      races_(memory<TileRace>(tiles_of(longest))),
      words_(memory<uint64_t>(tiles_of(longest))),
      numbers_(memory<uint32_t>(tiles_of(longest))),
      others_(memory<uint32_t>(tiles_of(longest))),
      reals_(memory<double>(tiles_of(longest))),
      counts_(memory<uint32_t>(kBuckets)),
      sums_(memory<uint64_t>(kBuckets)),
      entries_(memory<Entry>(kTile)) {}

void RowLaw::for_tiles(const std::function<void(int64_t begin, int64_t end)>& body) {
  parallel_(0, tiles_, kTileGrain, body);
}

void RowLaw::open(const Source& source, const Warp& warp) {
  const Rate rate = source.probabilities ? Rate{1 << 29, 29} : rate_of(warp.temperature);
  law_ = {source.data, source.dtype, source.probabilities, source.size, rate, kNoCut, 0, 1.0};
  tiles_ = tiles_of(source.size);
  restored_ = false;
}

RowError RowLaw::read_largest(const Source& source) {
  open(source, {});
  for_tiles([&](int64_t begin, int64_t end) { kernels_.largest(law_, stats_.get(), begin, end); });
  int64_t best = 0;
  for (int64_t t = 0; t < tiles_; ++t) {
    if (stats_[t].bad != 0) return RowError::kBadValue;
    if (stats_[t].best > stats_[best].best) best = t;
  }
  argmax_ = best * kTile + stats_[best].place;
  const float least = source.probabilities ? 0.0f : -__builtin_inff();
  return stats_[best].best > least ? RowError::kNone : RowError::kImpossible;
}

RowError RowLaw::read_bound(const Source& source, const Warp& warp, int64_t id, double& most) {
  if (const RowError error = read_largest(source); error != RowError::kNone) return error;
  law_.rate = rate_of(warp.temperature);
  const Weight best = weight_of(key_at(law_, argmax_));
  const Weight own = weight_of(id < source.size ? key_at(law_, id) : 0);
  const int64_t below = int64_t{best.exponent} - own.exponent;
  most = 0;
  if (own.mantissa == 0 || below > kNegligible) return RowError::kNone;
  // A is at least the largest weight; the last factor covers all roundings of p32.
  most = static_cast<double>(own.mantissa) / static_cast<double>(best.mantissa) *
         power(-static_cast<int32_t>(below)) * (1 + 0x1p-20);
  return RowError::kNone;
}

// The whole row, all ids kept.
RowError RowLaw::scan() {
  for_tiles([&](int64_t begin, int64_t end) { kernels_.scan(law_, stats_.get(), begin, end); });
  int64_t best = 0;
  bool possible = false;
  for (int64_t t = 0; t < tiles_; ++t) {
    if (stats_[t].bad != 0) return RowError::kBadValue;
    if (stats_[t].best > stats_[best].best) best = t;
    possible = possible || stats_[t].sum > 0;
  }
  argmax_ = best * kTile + stats_[best].place;
  return possible ? RowError::kNone : RowError::kImpossible;
}

// N and A from the sums of the tiles.
void RowLaw::sum_up() {
  int32_t top = INT32_MIN;
  for (int64_t t = 0; t < tiles_; ++t)
    if (stats_[t].sum > 0) top = std::max(top, stats_[t].top);
  total_ = 0;
  for (int64_t t = 0; t < tiles_; ++t)
    if (stats_[t].sum > 0)
      total_ += stats_[t].sum >> std::min<int64_t>(int64_t{top} - stats_[t].top, 63);
  law_.top = top;
  law_.inverse = 1.0 / static_cast<double>(total_);
}

RowError RowLaw::read(const Source& source, const Warp& warp) {
  open(source, warp);
  if (const RowError error = scan(); error != RowError::kNone) return error;
  if (source.probabilities) return RowError::kNone;
  sum_up();
  if (warp.filters(law_.size)) filter(warp);
  return RowError::kNone;
}

RowError RowLaw::restore(const Source& source, const Warp& warp, const LawStats& stats) {
  open(source, warp);
  restored_ = true;
  if (source.probabilities) return RowError::kNone;
  total_ = static_cast<uint64_t>(stats.total);
  if (total_ == 0 || stats.top < INT32_MIN || stats.top > INT32_MAX || stats.exponent < INT32_MIN ||
      stats.exponent > stats.top || stats.mantissa < 0 || stats.mantissa >> 24 != 0)
    return RowError::kBadArgument;
  law_.top = static_cast<int32_t>(stats.top);
  law_.inverse = 1.0 / static_cast<double>(total_);
  law_.cut = {static_cast<uint64_t>(stats.cut_key), stats.cut_id};
  return RowError::kNone;
}

LawStats RowLaw::stats_of(int64_t id) const {
  const Weight w = weight_of(key_at(law_, id));
  return {law_.top,   static_cast<int64_t>(total_),       w.mantissa,
          w.exponent, static_cast<int64_t>(law_.cut.key), law_.cut.id};
}

float RowLaw::p(int64_t id) const { return id < law_.size ? p32_at(law_, id) : 0.0f; }

float RowLaw::largest_p() {
  for_tiles([&](int64_t begin, int64_t end) { kernels_.peak(law_, words_.get(), begin, end); });
  return p32_of_key(law_, *std::max_element(words_.get(), words_.get() + tiles_));
}

double RowLaw::entropy() {
  for_tiles([&](int64_t begin, int64_t end) { kernels_.entropy(law_, reals_.get(), begin, end); });
  double sum = 0;
  for (int64_t t = 0; t < tiles_; ++t) sum += reals_[t];
  return sum;
}

int64_t RowLaw::rank(int64_t id) {
  Law before = law_;
  before.cut = {key_at(law_, id), id - 1};
  for_tiles(
      [&](int64_t begin, int64_t end) { kernels_.count(before, numbers_.get(), begin, end); });
  int64_t sum = 0;
  for (int64_t t = 0; t < tiles_; ++t) sum += numbers_[t];
  return sum;
}

// Whether a tile may hold any R above 0.
bool RowLaw::visible(int64_t tile) const {
  if (law_.probabilities || restored_) return true;
  return int64_t{law_.top} - stats_[tile].top < kInvisible;
}

uint64_t RowLaw::total(const Density& d, std::span<const int64_t> without) {
  const bool own = d.p == &law_;
  for_tiles([&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end;) {
      int64_t stop = t;
      while (stop < end && (!own || visible(stop))) ++stop;
      if (stop > t) kernels_.sums(d, words_.get(), t, stop);
      for (t = stop; t < end && own && !visible(t); ++t) words_[t] = 0;
    }
  });
  for (const int64_t id : without) words_[id / kTile] -= fixed(density_at(d, id));
  uint64_t sum = 0;
  for (int64_t t = 0; t < tiles_; ++t) sum += words_[t];
  return sum;
}

int64_t RowLaw::draw(const Density& d, uint32_t word, std::span<const int64_t> without) {
  uint64_t sum = 0;
  for (int64_t t = 0; t < tiles_; ++t) sum += words_[t];
  // word * sum / 2^32
  uint64_t bound = word * (sum >> 32) + (word * (sum & 0xFFFFFFFFu) >> 32);
  int64_t tile = 0;
  while (tile < tiles_ - 1 && bound >= words_[tile]) bound -= words_[tile++];

  int64_t out[kMaxWithout];
  const auto count =
      static_cast<size_t>(std::copy_if(without.begin(), without.end(), out,
                                       [&](int64_t id) { return id / kTile == tile; }) -
                          out);
  std::sort(out, out + count);
  // Ids that are left out count in the kernel's sums: those before the place that was found move
  // it on.
  int64_t id = kernels_.find(d, tile, bound);
  for (size_t i = 0; i < count && out[i] <= id;) {
    for (; i < count && out[i] <= id; ++i) bound += fixed(density_at(d, out[i]));
    id = kernels_.find(d, tile, bound);
  }
  return id;
}

void RowLaw::normalize(const Density& d, uint64_t total, float* out) {
  for_tiles([&](int64_t begin, int64_t end) {
    kernels_.normalize(d, static_cast<double>(total), out, begin, end);
  });
}

int64_t RowLaw::sample(uint32_t word) {
  const Density d{&law_, nullptr, 1.0f};
  total(d);
  return draw(d, word);
}

RowError RowLaw::race(const Source& source, const Warp& warp, uint64_t seed, int64_t position,
                      int64_t& winner) {
  if (!source.probabilities && warp.filters(source.size)) {
    if (const RowError error = read(source, warp); error != RowError::kNone) return error;
  } else {
    open(source, warp);
  }
  for_tiles([&](int64_t begin, int64_t end) {
    kernels_.race(law_, seed, static_cast<uint32_t>(position), races_.get(), begin, end);
  });
  int32_t top = INT32_MIN;
  for (int64_t t = 0; t < tiles_; ++t) {
    if (races_[t].bad != 0) return RowError::kBadValue;
    if (races_[t].place >= 0) top = std::max(top, races_[t].top);
  }
  // Ratios are relative to N_t. Those of ids with N - n > 96 are so large that they never win, so
  // the scaled ones order as those relative to N do.
  winner = -1;
  float least = 0;
  for (int64_t t = 0; t < tiles_; ++t) {
    if (races_[t].place < 0) continue;
    const int64_t below = int64_t{top} - races_[t].top;
    if (below > kNegligible) continue;
    const auto ratio = static_cast<float>(races_[t].ratio * power(static_cast<int32_t>(below)));
    if (winner < 0 || ratio < least) {
      least = ratio;
      winner = t * kTile + races_[t].place;
    }
  }
  return winner < 0 ? RowError::kImpossible : RowError::kNone;
}

}  // namespace alignops::speculative
