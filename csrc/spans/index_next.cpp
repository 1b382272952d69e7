// What follows a context: the tokens at its depth ascend with the rank inside its interval.
#include <algorithm>
#include <map>
#include <utility>

#include "index.h"
#include "removed.h"

namespace alignops::spans {
namespace {

// Up to this many occurrences of a context are read one by one, rather than searched.
constexpr int64_t kEnumerate = 64;

size_t index(int64_t i) { return static_cast<size_t>(i); }

}  // namespace

std::vector<uint32_t> Index::tokens_at(const Kernels& kernels, int32_t s,
                                       const std::vector<int64_t>& ranks, int64_t depth) const {
  const std::vector<int64_t> depths(ranks.size(), depth);
  std::vector<uint32_t> tokens(ranks.size());
  search(s, static_cast<int64_t>(ranks.size()), [&](const Shard& shard, int64_t b, int64_t e) {
    return kernels.tokens_at(shard, {ranks.data(), depths.data(), tokens.data()}, b, e);
  });
  return tokens;
}

void Index::next_counts(const Batch& context, const Batch& candidates, int64_t* counts) const {
  const Kernels& kernels = begin_batch();
  const int64_t items = candidates.size(), depth = context.size();
  std::fill_n(counts, items, 0);
  if (depth == 0) {
    std::vector<int64_t> begin(index(items)), end(index(items));
    for (int64_t i = 0; i < items; ++i) end[index(i)] = (begin[index(i)] = i) + 1;
    const std::vector<int64_t> found = count_rows(kernels, candidates, begin, end);
    std::copy(found.begin(), found.end(), counts);
    return;
  }
  for (int32_t s = 0; s < store_->num_shards(); ++s) {
    const Intervals found = find_rows(kernels, s, context.tokens.data(), context.offsets.data(),
                                      context.offsets.data() + 1, 1);
    const int64_t lo = found.lo[0], hi = found.hi[0];
    if (lo == hi) continue;
    const Shard& view = store_->shard(s);
    if (hi - lo <= kEnumerate) {
      std::vector<int64_t> ranks;
      for (int64_t rank = lo; rank < hi; ++rank)
        if (live(view, rank, rank + 1) > 0) ranks.push_back(rank);
      const std::vector<uint32_t> next = tokens_at(kernels, s, ranks, depth);  // ascending
      for (int64_t i = 0; i < items; ++i) {
        const auto range = std::equal_range(next.begin(), next.end(), token(candidates, i));
        counts[i] += range.second - range.first;
      }
      continue;
    }
    std::vector<int64_t> los(index(items), lo), his(index(items), hi), depths(index(items), depth);
    const NarrowArgs args{
        candidates.tokens.data(), los.data(), his.data(), depths.data(), los.data(), his.data()};
    search(s, items, [&](const Shard& shard, int64_t b, int64_t e) {
      return kernels.narrow(shard, args, b, e);
    });
    for (int64_t i = 0; i < items; ++i) counts[i] += live(view, los[index(i)], his[index(i)]);
  }
}

Next Index::next_dist(const Batch& context) const {
  const Kernels& kernels = begin_batch();
  const int64_t depth = context.size();
  Next out;
  if (depth == 0) {
    const auto counts = store_->counts();
    const auto ids = store_->ids();
    for (size_t i = 0; i < counts.size(); ++i) {
      if (counts[i] == 0) continue;
      out.ids.push_back(static_cast<int64_t>(ids.empty() ? i : ids[i]));
      out.counts.push_back(static_cast<int64_t>(counts[i]));
    }
    return out;
  }
  std::map<uint32_t, int64_t> sum;
  for (int32_t s = 0; s < store_->num_shards(); ++s) {
    const Intervals found = find_rows(kernels, s, context.tokens.data(), context.offsets.data(),
                                      context.offsets.data() + 1, 1);
    const int64_t lo = found.lo[0], hi = found.hi[0];
    if (lo == hi) continue;
    // The next tokens ascend with the rank: all ranks between two of the same token have it, too.
    // Each round looks into the middle of every gap between two different tokens.
    struct Gap {
      int64_t from, to;  // ranks
      uint32_t first, last;
    };
    const std::vector<uint32_t> ends = tokens_at(kernels, s, {lo, hi - 1}, depth);
    std::vector<Gap> gaps{{lo, hi - 1, ends[0], ends[1]}};
    std::vector<std::pair<int64_t, uint32_t>> runs{{lo, ends[0]}};  // first rank of a token
    while (!gaps.empty()) {
      std::vector<int64_t> ranks;
      std::vector<Gap> open;
      for (const Gap& gap : gaps) {
        if (gap.first == gap.last) continue;
        if (gap.from + 1 == gap.to) {
          runs.emplace_back(gap.to, gap.last);
        } else {
          open.push_back(gap);
          ranks.push_back(gap.from + (gap.to - gap.from) / 2);
        }
      }
      const std::vector<uint32_t> middle = tokens_at(kernels, s, ranks, depth);
      gaps.clear();
      for (size_t i = 0; i < open.size(); ++i) {
        gaps.push_back({open[i].from, ranks[i], open[i].first, middle[i]});
        gaps.push_back({ranks[i], open[i].to, middle[i], open[i].last});
      }
    }
    std::sort(runs.begin(), runs.end());
    for (size_t i = 0; i < runs.size(); ++i)
      sum[runs[i].second] +=
          live(store_->shard(s), runs[i].first, i + 1 < runs.size() ? runs[i + 1].first : hi);
  }
  sum.erase(static_cast<uint32_t>(separator(store_->info().token_bytes)));
  for (const auto& [id, count] : sum) {
    if (count == 0) continue;
    out.ids.push_back(id);
    out.counts.push_back(count);
  }
  return out;
}

void Index::next_tokens(const Batch& context, std::span<const int64_t> numbers,
                        int64_t* tokens) const {
  const Kernels& kernels = begin_batch();
  const std::vector<int64_t> rows(numbers.size());
  const std::vector<Picked> picked = pick(context, rows, numbers);
  const auto end = static_cast<uint32_t>(separator(store_->info().token_bytes));
  for (int32_t s = 0; s < store_->num_shards(); ++s) {
    const Picked& here = picked[index(s)];
    const std::vector<uint32_t> next = tokens_at(kernels, s, here.rank, context.size());
    for (size_t i = 0; i < next.size(); ++i)
      tokens[here.place[i]] = next[i] == end ? -1 : static_cast<int64_t>(next[i]);
  }
}

// Separators sort last, so the ends of documents are the last ranks of an interval.
int64_t Index::eos_count(const Batch& context) const {
  const Kernels& kernels = begin_batch();
  const int64_t depth = context.size();
  if (depth == 0) return 0;
  const std::vector<uint8_t> separators(8, 0xFF);
  int64_t total = 0;
  for (int32_t s = 0; s < store_->num_shards(); ++s) {
    Intervals found = find_rows(kernels, s, context.tokens.data(), context.offsets.data(),
                                context.offsets.data() + 1, 1);
    const NarrowArgs args{separators.data(), found.lo.data(), found.hi.data(), &depth,
                          found.lo.data(),   found.hi.data()};
    search(s, 1, [&](const Shard& shard, int64_t b, int64_t e) {
      return kernels.narrow(shard, args, b, e);
    });
    total += live(store_->shard(s), found.lo[0], found.hi[0]);
  }
  return total;
}

}  // namespace alignops::spans
