// Removed documents. Their text and suffixes stay where they are, and a list says which ranks are
// theirs. So the suffixes that remain are counted, and numbered, as if the others were not there:
// "rank" alone means a place in SUF, "live rank" one among the suffixes that remain.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace alignops::spans {

// How many of the ranks below `rank` belong to removed documents.
inline int64_t removed_below(const Shard& shard, int64_t rank) {
  const uint64_t* end = shard.removed + shard.removed_size;
  return std::lower_bound(shard.removed, end, static_cast<uint64_t>(rank)) - shard.removed;
}

// The suffixes that remain of the ranks [lo, hi).
inline int64_t live(const Shard& shard, int64_t lo, int64_t hi) {
  if (shard.removed_size == 0 || lo == hi) return hi - lo;
  return hi - lo - (removed_below(shard, hi) - removed_below(shard, lo));
}

inline int64_t live_size(const Shard& shard) {
  return static_cast<int64_t>(shard.suf_size - shard.removed_size);
}

// From a rank to the number of live ranks below it, and from a live rank to its rank.
inline int64_t live_rank(const Shard& shard, int64_t rank) {
  return shard.removed_size == 0 ? rank : rank - removed_below(shard, rank);
}
inline int64_t rank_of_live(const Shard& shard, int64_t number) {
  // Removed rank r, the i-th one, has r - i live ranks below it, a number that does not fall.
  int64_t low = 0, high = static_cast<int64_t>(shard.removed_size);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t below = static_cast<int64_t>(shard.removed[middle]) - middle;
    (below <= number ? low = middle + 1 : high = middle);
  }
  return number + low;
}

}  // namespace alignops::spans
