// Searches of the matcher. Every round of them is one call of a kernel per shard, which keeps the
// searches of all rows and candidates in flight together.
#include <algorithm>
#include <iterator>
#include <utility>

#include "matcher.h"
#include "matcher_common.h"
#include "removed.h"

namespace alignops::spans {
namespace {

// Finds per row and round of a search for a longest suffix: they wait for memory together.
constexpr int64_t kProbes = 4;
// Intervals up to this size are read whole where enough candidates ask for them.
constexpr int64_t kEnumerate = 64, kReadsPerCandidate = 8;

// Tokens as queries of a kernel.
class Tokens {
 public:
  explicit Tokens(int32_t width) : width_(width), bytes_(kQueryPadding) {}

  void push(int64_t token) {
    const size_t place = bytes_.size() - kQueryPadding;
    bytes_.resize(bytes_.size() + static_cast<size_t>(width_));
    store_token(bytes_.data() + place, width_, token);
  }
  const void* data() const { return bytes_.data(); }

 private:
  int32_t width_;
  std::vector<uint8_t> bytes_;
};

struct Finds {
  std::vector<int64_t> begin, end, lo, hi;

  void push(int64_t from, int64_t to) {
    begin.push_back(from);
    end.push_back(to);
  }
  Fault run(const Shard& shard, const void* tokens) {
    lo.resize(begin.size());
    hi.resize(begin.size());
    return kernels().find(shard, {{tokens, begin.data(), end.data()}, lo.data(), hi.data()}, 0,
                          std::ssize(begin));
  }
};

struct Narrows {
  explicit Narrows(int32_t width) : tokens(width) {}

  Tokens tokens;
  std::vector<int64_t> lo, hi, depth, item;

  void push(int64_t from, int64_t to, int64_t level, int64_t token, int64_t of) {
    tokens.push(token);
    lo.push_back(from);
    hi.push_back(to);
    depth.push_back(level);
    item.push_back(of);
  }
  Fault run(const Shard& shard) {
    return kernels().narrow(
        shard, {tokens.data(), lo.data(), hi.data(), depth.data(), lo.data(), hi.data()}, 0,
        std::ssize(lo));
  }
};

}  // namespace

// Tries ever longer suffixes until one does not occur, then the range that is left.
void Matcher::find_suffixes(const Side& side, int64_t shard, std::vector<Suffix>& suffixes) const {
  while (true) {
    Finds finds;
    std::vector<int64_t> item;
    for (int64_t i = 0; i < std::ssize(suffixes); ++i) {
      const Suffix& x = get(suffixes, i);
      const int64_t known = x.node.length, range = x.limit - known;
      for (int64_t k = 1, beyond = 0; k <= kProbes && beyond < range; ++k) {
        beyond = range <= kProbes ? k
                 : x.bounded      ? range * k / (kProbes + 1)
                                  : std::min(range, x.step << (k - 1));
        finds.push(x.end - known - beyond, x.end);
        item.push_back(i);
      }
    }
    if (item.empty()) return;
    const Shard& view = get(side.source.shards, shard);
    check_fault(side, shard, finds.run(view, side.tokens.data()));
    for (int64_t k = 0; k < std::ssize(item); ++k) {
      Suffix& x = get(suffixes, get(item, k));
      const int64_t length = get(finds.end, k) - get(finds.begin, k);
      if (length > x.limit) continue;  // a shorter one does not occur
      if (live(view, get(finds.lo, k), get(finds.hi, k)) > 0) {
        x.node = {length, get(finds.lo, k), get(finds.hi, k)};
        x.step = length;
      } else {
        x.limit = length - 1;
        x.bounded = true;
      }
    }
  }
}

// The nodes of rows whose tails grew, whatever they were before.
std::vector<Matcher::Node> Matcher::search_tails(const Side& side,
                                                 const std::vector<Row>& rows) const {
  std::vector<Node> nodes = side.nodes;
  for (int64_t s = 0; s < shards(side); ++s) {
    std::vector<Suffix> suffixes;
    std::vector<int64_t> item;
    for (int64_t i = 0; i < batch(); ++i) {
      const Row& row = get(rows, i);
      if (row.end == at(i).end) continue;
      suffixes.push_back({row.slot * capacity_ + row.end, std::min(row.end - row.begin, max_match_),
                          empty(side, s)});
      item.push_back(i);
    }
    find_suffixes(side, s, suffixes);
    for (int64_t k = 0; k < std::ssize(item); ++k)
      get(nodes, get(item, k) * shards(side) + s) = get(suffixes, k).node;
  }
  return nodes;
}

// The nodes of rows that had those of `parent` and got one more token, if they are active.
std::vector<Matcher::Node> Matcher::step(const Side& side, const std::vector<Row>& rows,
                                         std::span<const int64_t> parent) const {
  const int64_t count = shards(side);
  std::vector<Node> nodes(rows.size() * static_cast<size_t>(count));
  for (int64_t s = 0; s < count; ++s) {
    Narrows narrows(side.width);
    std::vector<Suffix> suffixes;
    std::vector<int64_t> item;
    const auto search = [&](int64_t i, int64_t limit) {
      const Row& row = get(rows, i);
      suffixes.push_back({row.slot * capacity_ + row.end, limit, empty(side, s)});
      item.push_back(i);
    };
    for (int64_t i = 0; i < std::ssize(rows); ++i) {
      const Row& row = get(rows, i);
      const Node& old = node(side, parent[static_cast<size_t>(i)], s);
      if (!row.active) {
        get(nodes, i * count + s) = old;
      } else if (old.length == 0 || old.length == max_match_) {
        search(i, std::max<int64_t>(old.length, 1));
      } else {
        narrows.push(old.lo, old.hi, old.length, token(row.slot * capacity_ + row.end - 1), i);
      }
    }
    const Shard& view = get(side.source.shards, s);
    check_fault(side, s, narrows.run(view));
    for (int64_t k = 0; k < std::ssize(narrows.item); ++k) {
      const int64_t i = get(narrows.item, k), depth = get(narrows.depth, k);
      if (live(view, get(narrows.lo, k), get(narrows.hi, k)) > 0) {
        get(nodes, i * count + s) = {depth + 1, get(narrows.lo, k), get(narrows.hi, k)};
      } else {
        search(i, depth);
      }
    }
    find_suffixes(side, s, suffixes);
    for (int64_t k = 0; k < std::ssize(item); ++k)
      get(nodes, get(item, k) * count + s) = get(suffixes, k).node;
  }
  return nodes;
}

// Counts of probes, which are sorted by row, level and token.
void Matcher::solve(const Side& side, int64_t shard, std::span<Probe> probes) const {
  const Shard& view = get(side.source.shards, shard);
  struct Group {  // probes of one suffix
    int64_t begin, end, lo, hi;
  };
  std::vector<Group> groups;
  Finds finds;
  std::vector<int64_t> found;
  const int64_t count = std::ssize(probes);
  for (int64_t i = 0; i < count;) {
    const Probe& first = probes[static_cast<size_t>(i)];
    const Node& known = node(side, first.row, shard);
    Group group{i, i, known.lo, known.hi};
    for (; group.end < count; ++group.end) {
      const Probe& next = probes[static_cast<size_t>(group.end)];
      if (next.row != first.row || next.level != first.level) break;
    }
    if (first.level != known.length) {
      const Row& row = at(first.row);
      const int64_t end = row.slot * capacity_ + row.end;
      finds.push(end - first.level, end);
      found.push_back(std::ssize(groups));
    }
    i = group.end;
    groups.push_back(group);
  }
  check_fault(side, shard, finds.run(view, side.tokens.data()));
  for (int64_t k = 0; k < std::ssize(found); ++k) {
    get(groups, get(found, k)).lo = get(finds.lo, k);
    get(groups, get(found, k)).hi = get(finds.hi, k);
  }

  // Small intervals are read whole, the rest is searched; after no token, a find of one token does.
  Narrows narrows(side.width);
  Tokens singles(side.width);
  Finds buckets;
  std::vector<int64_t> ranks, depths, bucket_item;
  std::vector<const Group*> read;
  for (const Group& group : groups) {
    const int64_t level = probes[static_cast<size_t>(group.begin)].level,
                  reads = group.hi - group.lo;
    if (level > 0 && reads <= kEnumerate &&
        reads <= kReadsPerCandidate * (group.end - group.begin)) {
      for (int64_t r = group.lo; r < group.hi; ++r) {
        ranks.push_back(r);
        depths.push_back(level);
      }
      read.push_back(&group);
      continue;
    }
    for (int64_t i = group.begin; i < group.end; ++i) {
      const int64_t t = probes[static_cast<size_t>(i)].token;
      if (level > 0) {
        narrows.push(group.lo, group.hi, level, t, i);
      } else {
        singles.push(t);
        buckets.push(std::ssize(bucket_item), std::ssize(bucket_item) + 1);
        bucket_item.push_back(i);
      }
    }
  }
  check_fault(side, shard, narrows.run(view));
  check_fault(side, shard, buckets.run(view, singles.data()));
  for (int64_t k = 0; k < std::ssize(narrows.item); ++k) {
    probes[static_cast<size_t>(get(narrows.item, k))].count =
        live(view, get(narrows.lo, k), get(narrows.hi, k));
  }
  for (int64_t k = 0; k < std::ssize(bucket_item); ++k) {
    probes[static_cast<size_t>(get(bucket_item, k))].count =
        live(view, get(buckets.lo, k), get(buckets.hi, k));
  }
  std::vector<uint32_t> next(ranks.size());
  check_fault(
      side, shard,
      kernels().tokens_at(view, {ranks.data(), depths.data(), next.data()}, 0, std::ssize(next)));
  auto begin = next.cbegin();
  for (const Group* group : read) {
    const auto end = begin + (group->hi - group->lo);
    for (int64_t i = group->begin; i < group->end; ++i) {
      Probe& probe = probes[static_cast<size_t>(i)];
      const auto [lo, hi] = std::equal_range(begin, end, static_cast<uint32_t>(probe.token));
      probe.count = live(view, group->lo + (lo - begin), group->lo + (hi - begin));
    }
    begin = end;
  }
}

// Per shard a search over lengths: first the longest that is possible, then by halves.
void Matcher::find_longest(const Side& side, std::vector<Item>& items) const {
  for (Item& item : items) item.length = item.count = 0;
  for (int64_t s = 0; s < shards(side); ++s) {
    for (Item& item : items) {
      item.known = std::max<int64_t>(item.floor, 1) - 1;
      item.high = std::min(node(side, item.row, s).length, max_match_ - 1) + 1;
      item.found = 0;
    }
    for (bool first = true;; first = false) {
      std::vector<Probe> probes;
      for (int64_t i = 0; i < std::ssize(items); ++i) {
        const Item& item = get(items, i);
        if (item.known >= item.high) continue;
        const int64_t length = first ? item.high : item.known + (item.high - item.known + 1) / 2;
        probes.push_back({item.row, length - 1, item.token, i});
      }
      if (probes.empty()) break;
      std::sort(probes.begin(), probes.end());
      solve(side, s, probes);
      for (const Probe& probe : probes) {
        Item& item = get(items, probe.item);
        if (probe.count > 0) {
          item.known = probe.level + 1;
          item.found = probe.count;
        } else {
          item.high = probe.level;
        }
      }
    }
    for (Item& item : items) {
      if (item.found == 0 || item.known < item.length) continue;
      item.count = (item.known == item.length ? item.count : 0) + item.found;
      item.length = item.known;
    }
  }
  int64_t all = 0;
  for (const Shard& shard : side.source.shards) all += live_size(shard);
  for (Item& item : items)
    if (item.length == 0) item.count = all;
}

// Adds (row, token) for the tokens of a shard that follow the last level[row] tokens and are
// surprising enough to be flagged there. The tokens ascend with the rank: intervals whose first and
// last suffix go on with the same token are done, others are cut into halves, and those between
// whose tokens none is surprising enough are left out.
void Matcher::followers(int64_t shard, const std::vector<Level>& levels,
                        std::vector<std::pair<int64_t, int64_t>>& pairs) const {
  const Shard& view = get(unsafe_.source.shards, shard);
  struct Piece {
    const Level* level;
    int64_t lo, hi;
  };
  std::vector<Piece> pieces;
  Finds finds;
  for (const Level& level : levels) {
    if (node(unsafe_, level.row, shard).length < level.length) continue;
    if (level.length == 0) {  // any token that occurs
      for (uint64_t i = 0; i < view.buckets; ++i) {
        const int64_t token = view.ids == nullptr ? static_cast<int64_t>(i) : view.ids[i];
        if (view.first[i] < view.first[i + 1] && enough(level, surprisal(token)))
          pairs.emplace_back(level.row, token);
      }
      continue;
    }
    const int64_t end = at(level.row).slot * capacity_ + at(level.row).end;
    finds.push(end - level.length, end);
    pieces.push_back({&level, 0, 0});
  }
  check_fault(unsafe_, shard, finds.run(view, unsafe_.tokens.data()));
  for (int64_t k = 0; k < std::ssize(pieces); ++k) {
    get(pieces, k).lo = get(finds.lo, k);
    get(pieces, k).hi = get(finds.hi, k);
  }
  std::erase_if(pieces, [](const Piece& piece) { return piece.lo == piece.hi; });
  while (!pieces.empty()) {
    std::vector<int64_t> ranks, depths;
    for (const Piece& piece : pieces) {
      ranks.insert(ranks.end(), {piece.lo, piece.hi - 1});
      depths.insert(depths.end(), 2, piece.level->length);
    }
    std::vector<uint32_t> next(ranks.size());
    check_fault(
        unsafe_, shard,
        kernels().tokens_at(view, {ranks.data(), depths.data(), next.data()}, 0, std::ssize(next)));
    std::vector<Piece> halves;
    for (int64_t k = 0; k < std::ssize(pieces); ++k) {
      const auto [level, lo, hi] = get(pieces, k);
      const uint32_t first = get(next, 2 * k), last = get(next, 2 * k + 1);
      if (first == last || hi - lo == 2) {
        for (const int64_t token : {first, last})
          if (static_cast<uint64_t>(token) < vocab() && enough(*level, surprisal(token)))
            pairs.emplace_back(level->row, token);
        continue;
      }
      if (rule_.occurring != nullptr && !enough(*level, rule_.occurring->most(first, last)))
        continue;
      const int64_t mid = lo + (hi - lo) / 2;
      halves.push_back({level, lo, mid});
      halves.push_back({level, mid, hi});
    }
    pieces = std::move(halves);
  }
}

}  // namespace alignops::spans
