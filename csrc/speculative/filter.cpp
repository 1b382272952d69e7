// Cuts of a law to its most probable ids. A selection goes down in the order of falling weight by
// histograms of exponents, then of mantissas, until the bucket where the wanted number or weight is
// reached is short enough to be listed and sorted.
#include <algorithm>
#include <cmath>

#include "speculative/cpu/weights.h"
#include "speculative/laws.h"

namespace alignops::speculative {
namespace {

constexpr int32_t kMantissaBits = 24;
// Buckets with no more ids than this are listed.
constexpr int64_t kListed = 256;

// No id of the law has a larger key.
uint64_t highest_key(const Law& law) {
  return law.probabilities ? float_bits(2.0f) - 1
                           : key_of(Weight{(1u << kMantissaBits) - 1, law.top});
}

// Of two cuts the one that keeps less.
Cut tighter(const Cut& a, const Cut& b) {
  return a.key > b.key || (a.key == b.key && a.id < b.id) ? a : b;
}

}  // namespace

// Counts the ids with keys in [low, high] by (high - key) >> shift, from the largest on until
// `target` is reached; true if it is. Then `bucket` is the one where it is reached, else `reached`
// has grown by all of them.
bool RowLaw::reaches(bool by_count, uint64_t low, uint64_t high, int32_t shift, uint64_t target,
                     uint64_t& reached, uint64_t& bucket) {
  const uint64_t buckets = ((high - low) >> shift) + 1;
  std::fill_n(counts_.get(), buckets, 0u);
  std::fill_n(sums_.get(), buckets, uint64_t{0});
  kernels_.histogram({&law_, low, high, shift, counts_.get(), sums_.get()}, 0, tiles_);
  for (bucket = 0; bucket < buckets; ++bucket) {
    const uint64_t weight = by_count ? counts_[bucket] : sums_[bucket];
    if (reached + weight >= target) return true;
    reached += weight;
  }
  return false;
}

// Keeps the shortest sequence of ids in falling order, equal keys by rising id, whose number or
// weight, in units, reaches `target` > 0; all ids if they do not reach it.
Cut RowLaw::select(bool by_count, uint64_t target) {
  const int32_t exponent_bits = law_.probabilities ? kMantissaBits - 1 : kMantissaBits;
  uint64_t high = highest_key(law_);
  uint64_t low = 0, reached = 0, bucket = 0;
  // The target mostly lies among the few ids of the largest exponents, so windows of exponents are
  // small at first. Weights further than kNegligible below the largest one have probability 0.
  for (uint64_t exponents = 2, seen = 0;; ++exponents) {
    const uint64_t window = exponents << exponent_bits;
    low = high > window ? high - window + 1 : 1;
    if (reaches(by_count, low, high, exponent_bits, target, reached, bucket)) break;
    seen += exponents;
    if (low == 1 || (!law_.probabilities && seen > kNegligible + 1)) return law_.cut;
    high = low - 1;
  }
  for (const int32_t shift : {exponent_bits, 12, 0}) {
    if (shift != exponent_bits && !reaches(by_count, low, high, shift, target, reached, bucket))
      return law_.cut;
    high -= bucket << shift;
    low = std::max(low, high - (uint64_t{1} << shift) + 1);
    if (counts_[bucket] > kListed) continue;

    const int64_t listed = kernels_.collect(law_, low, high, entries_.get(), kListed, 0, tiles_);
    std::sort(entries_.get(), entries_.get() + listed, [](const Entry& a, const Entry& b) {
      return a.key > b.key || (a.key == b.key && a.id < b.id);
    });
    for (int64_t i = 0; i < listed; ++i) {
      const uint64_t key = entries_[i].key;
      reached += by_count             ? 1
                 : law_.probabilities ? fixed(bits_float(static_cast<uint32_t>(key)))
                                      : units(weight_of(key), law_.top);
      if (reached >= target) return {key, entries_[i].id};
    }
    return law_.cut;
  }
  // One key is left, which more than kListed ids have.
  const uint64_t each = by_count ? 1 : units(weight_of(high), law_.top);
  return tie(high, (target - reached + each - 1) / each);
}

// The cut at the `number`-th of the ids that have `key`, from 1.
Cut RowLaw::tie(uint64_t key, uint64_t number) {
  Law probe = law_;
  probe.cut = {key, INT64_MAX};
  kernels_.count(probe, numbers_.get(), 0, tiles_);
  probe.cut = {key, -1};
  kernels_.count(probe, others_.get(), 0, tiles_);
  int64_t tile = 0;
  for (; tile < tiles_ - 1; ++tile) {
    const uint64_t ties = numbers_[tile] - others_[tile];
    if (number <= ties) break;
    number -= ties;
  }
  probe.cut = kNoCut;
  const int64_t listed = kernels_.collect(probe, key, key, entries_.get(),
                                          static_cast<int64_t>(number), tile, tile + 1);
  return {key, entries_[listed - 1].id};
}

void RowLaw::filter(const Warp& warp) {
  const auto cut_to = [&](const Cut& cut) {
    law_.cut = cut;
    for_tiles([&](int64_t begin, int64_t end) { kernels_.scan(law_, stats_.get(), begin, end); });
    sum_up();
  };
  if (warp.top_k > 0 && warp.top_k < law_.size)
    cut_to(select(true, static_cast<uint64_t>(warp.top_k)));
  if (warp.top_p < 1.0f) {
    // The smallest sum of units s with s * 2^32 >= round(top_p * 2^32) * A.
    const auto share = static_cast<uint64_t>(std::llrint(static_cast<double>(warp.top_p) * 0x1p32));
    const uint64_t target =
        share * (total_ >> 32) + ((share * (total_ & 0xFFFFFFFFu) + 0xFFFFFFFFu) >> 32);
    cut_to(select(false, std::max<uint64_t>(target, 1)));
  }
  if (warp.min_p > 0.0f) cut_min_p(warp.min_p);
}

void RowLaw::cut_min_p(float min_p) {
  const float bound = min_p * largest_p();
  if (bound <= 0) return;
  // The smallest key of this probability: p32 does not fall where the key grows. Weights are
  // numbered from 2^(N - 96) up.
  const int32_t lowest = law_.top - kNegligible;
  const auto weight_at = [&](int64_t number) {
    return Weight{static_cast<uint32_t>((number & 0x7FFFFF) | 0x800000),
                  lowest + static_cast<int32_t>(number >> 23)};
  };
  int64_t low = 0, high = (int64_t{kNegligible + 1} << 23) - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p32_of(weight_at(middle), law_.top, law_.inverse) >= bound) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  law_.cut = tighter(law_.cut, {key_of(weight_at(low)), INT64_MAX});
  for_tiles([&](int64_t begin, int64_t end) { kernels_.scan(law_, stats_.get(), begin, end); });
  sum_up();
}

int64_t RowLaw::best(int64_t count, int64_t* ids) {
  const Law whole = law_;
  law_.cut = select(true, static_cast<uint64_t>(count));
  const Cut cut = law_.cut;
  law_ = whole;
  // Above the key of the cut, then the ids that have this key. What lies further below has
  // probability 0.
  const uint64_t least =
      law_.probabilities ? 1 : key_of(Weight{1u << (kMantissaBits - 1), law_.top - kNegligible});
  int64_t listed = kernels_.collect(law_, std::max(cut.key + 1, least), highest_key(law_),
                                    entries_.get(), count, 0, tiles_);
  if (cut.key > 0 && listed < count)
    listed += kernels_.collect(law_, cut.key, cut.key, entries_.get() + listed, count - listed, 0,
                               tiles_);
  std::sort(entries_.get(), entries_.get() + listed, [](const Entry& a, const Entry& b) {
    return a.key > b.key || (a.key == b.key && a.id < b.id);
  });
  int64_t found = 0;
  for (int64_t i = 0; i < listed; ++i)
    if (p32_of_key(law_, entries_[i].key) > 0) ids[found++] = entries_[i].id;
  return found;
}

}  // namespace alignops::speculative
