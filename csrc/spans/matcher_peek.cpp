// Scores of matches, and of the matches that candidates would make.
#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "../common/check.h"
#include "matcher.h"
#include "matcher_common.h"
#include "removed.h"

namespace alignops::spans {

double Matcher::risk(double bci, double largest) const {
  const double score = rule_.kind == MatchRule::Kind::kBci    ? bci
                       : rule_.kind == MatchRule::Kind::kNorm ? bci / rule_.log_tokens
                                                              : largest;
  return rule_.severity * score;
}

bool Matcher::passes(int64_t length, int64_t count) const {
  return length >= rule_.min_len && count <= rule_.max_count;
}

// The largest surprisal of the last 0, 1, ..., `length` tokens.
std::vector<double> Matcher::peaks(const Row& row, int64_t length) const {
  std::vector<double> out{0};
  for (int64_t p = row.end - 1; p >= row.end - length; --p) {
    const int64_t place = row.slot * capacity_ + p;
    const double here = get(covered_, place) != 0 ? 0 : surprisal(token(place));
    out.push_back(std::max(out.back(), here));
  }
  return out;
}

MatchState Matcher::state(int64_t i) const {
  check_row(i, "row");
  const Row& row = at(i);
  const int64_t length = longest(unsafe_, i);
  MatchState out{length, 0, 0, 0, false};
  for (int64_t s = 0; s < shards(unsafe_); ++s)
    if (const Node& n = node(unsafe_, i, s); n.length == length)
      out.count += live(get(unsafe_.source.shards, s), n.lo, n.hi);
  const double* sums = &get(sums_, row.slot * (capacity_ + 1));
  out.bci = sums[row.end] - sums[row.end - length];
  const bool excused = allow_ && rule_.allow == MatchRule::Allow::kExact && length > 0 &&
                       longest(*allow_, i) >= length;
  if (row.prompt || excused || !passes(length, out.count)) return out;
  const bool peak = rule_.kind == MatchRule::Kind::kMax;
  out.risk = risk(out.bci, peak ? peaks(row, length).back() : 0);
  out.flag = out.risk > rule_.tau;
  return out;
}

// Whether a match of these tokens and one more, of surprisal `next`, may be flagged. If so, it may
// with a larger surprisal, too.
bool Matcher::enough(const Level& level, double next) const {
  const Row& row = at(level.row);
  const double* sums = &get(sums_, row.slot * (capacity_ + 1));
  return risk(sums[row.end] + next - sums[row.end - level.length], std::max(level.largest, next)) >
         rule_.tau;
}

// How many of the last tokens a match with `next` needs so that it may be flagged: -1 if all of
// `most` are not enough.
int64_t Matcher::fewest(int64_t row, double next, int64_t most,
                        const std::vector<double>& peak) const {
  const auto reaches = [&](int64_t level) {
    return enough({row, level, peak.empty() ? 0 : get(peak, level)}, next);
  };
  int64_t low = rule_.min_len - 1, high = most;
  if (low > high) return -1;
  if (reaches(low)) return low;
  if (!reaches(high)) return -1;
  while (high - low > 1) {  // `low` is not enough, `high` is
    const int64_t mid = low + (high - low) / 2;
    (reaches(mid) ? high : low) = mid;
  }
  return high;
}

// Marks the candidates that are flagged; `item` counts them.
void Matcher::peek_rows(std::span<const Candidate> candidates, std::span<uint8_t> flags) const {
  const bool peak = rule_.kind == MatchRule::Kind::kMax;
  std::vector<Probe> probes;
  std::vector<double> peak_of_row;
  int64_t row = -1, most = 0;
  for (int64_t i = 0; i < std::ssize(candidates); ++i) {
    const Candidate& c = candidates[static_cast<size_t>(i)];
    if (c.row != row) {
      row = c.row;
      most = std::min(longest(unsafe_, row), max_match_ - 1);
      if (peak && most + 1 >= rule_.min_len) peak_of_row = peaks(at(row), most);
    }
    const int64_t level = fewest(row, surprisal(c.token), most, peak_of_row);
    if (level >= 0) probes.push_back({row, level, c.token, i});
  }
  std::sort(probes.begin(), probes.end());
  std::vector<Probe> here;
  for (int64_t s = 0; s < shards(unsafe_); ++s) {
    here.clear();
    for (const Probe& probe : probes)
      if (flags[static_cast<size_t>(probe.item)] == 0 &&
          node(unsafe_, probe.row, s).length >= probe.level)
        here.push_back(probe);
    solve(unsafe_, s, here);
    for (const Probe& probe : here)
      if (probe.count > 0) flags[static_cast<size_t>(probe.item)] = 1;
  }
  if (rule_.max_count == INT64_MAX && !allow_) return;

  // Then the longest matches of the flagged ones decide.
  std::vector<Item> items;
  std::vector<int64_t> index;
  for (const Probe& probe : probes) {
    if (flags[static_cast<size_t>(probe.item)] == 0) continue;
    items.push_back({probe.row, probe.token, probe.level + 1});
    index.push_back(probe.item);
  }
  const std::vector<MatchState> states = judge(items);
  for (int64_t k = 0; k < std::ssize(index); ++k)
    flags[static_cast<size_t>(get(index, k))] = get(states, k).flag;
}

// The states to which the items lead.
std::vector<MatchState> Matcher::judge(std::vector<Item>& items) const {
  find_longest(unsafe_, items);
  const bool peak = rule_.kind == MatchRule::Kind::kMax;
  std::vector<int64_t> covered(items.size());  // tokens at the end that lose their surprisal
  std::vector<uint8_t> excused(items.size());
  if (allow_ && rule_.allow == MatchRule::Allow::kCover) {
    std::vector<Item> allowed = items;
    for (Item& item : allowed) item.floor = MatchRule::kCoverLength;
    find_longest(*allow_, allowed);
    for (int64_t k = 0; k < std::ssize(items); ++k) get(covered, k) = get(allowed, k).length;
  } else if (allow_) {
    for (int64_t s = 0; s < shards(*allow_); ++s) {
      std::vector<Probe> probes;
      for (int64_t k = 0; k < std::ssize(items); ++k) {
        const Item& item = get(items, k);
        if (get(excused, k) == 0 && passes(item.length, item.count) &&
            node(*allow_, item.row, s).length >= item.length - 1)
          probes.push_back({item.row, item.length - 1, item.token, k});
      }
      std::sort(probes.begin(), probes.end());
      solve(*allow_, s, probes);
      for (const Probe& probe : probes)
        if (probe.count > 0) get(excused, probe.item) = 1;
    }
  }
  std::vector<MatchState> states;
  states.reserve(items.size());
  for (int64_t k = 0; k < std::ssize(items); ++k) {
    const Item& item = get(items, k);
    MatchState out{item.length, item.count, 0, 0, false};
    if (item.length > 0) {
      const Row& row = at(item.row);
      const double* sums = &get(sums_, row.slot * (capacity_ + 1));
      const double next = get(covered, k) > 0 ? 0 : surprisal(item.token);
      const int64_t begin = row.end - (item.length - 1),
                    end = row.end - std::max<int64_t>(get(covered, k) - 1, 0);
      out.bci = begin <= end ? sums[end] + next - sums[begin] : 0;
      if (get(excused, k) == 0 && passes(item.length, item.count)) {
        double largest = next;
        for (int64_t p = begin; peak && p < end; ++p) {
          const int64_t place = row.slot * capacity_ + p;
          if (get(covered_, place) == 0) largest = std::max(largest, surprisal(token(place)));
        }
        out.risk = risk(out.bci, largest);
        out.flag = out.risk > rule_.tau;
      }
    }
    states.push_back(out);
  }
  return states;
}

std::vector<Matcher::Candidate> Matcher::checked(std::span<const int64_t> candidates) const {
  const int64_t rows = std::max<int64_t>(batch(), 1), width = std::ssize(candidates) / rows;
  ALIGNOPS_CHECK(width * batch() == std::ssize(candidates),
                 "SpanMatcher: candidates must have shape (batch, width) with batch ", batch(),
                 ", got ", candidates.size(), " elements");
  std::vector<Candidate> out;
  for (int64_t i = 0; i < batch(); ++i) {
    if (!at(i).active) continue;
    for (int64_t place = i * width; place < (i + 1) * width; ++place) {
      const int64_t token = candidates[static_cast<size_t>(place)];
      check_token(token, "candidates", i);
      out.push_back({i, token, place});
    }
  }
  return out;
}

void Matcher::peek(std::span<const int64_t> candidates, std::span<uint8_t> flags) const {
  const std::vector<Candidate> rows = checked(candidates);
  check_sources();
  std::vector<uint8_t> found(rows.size());
  peek_rows(rows, found);
  std::fill(flags.begin(), flags.end(), uint8_t{0});
  for (int64_t k = 0; k < std::ssize(rows); ++k)
    flags[static_cast<size_t>(get(rows, k).place)] = get(found, k);
}

void Matcher::peek_exact(std::span<const int64_t> candidates, std::span<MatchState> states) const {
  const std::vector<Candidate> rows = checked(candidates);
  check_sources();
  std::vector<Item> items;
  items.reserve(rows.size());
  for (const Candidate& c : rows) items.push_back({c.row, c.token, 1});
  const std::vector<MatchState> found = judge(items);
  std::fill(states.begin(), states.end(), MatchState{});
  for (int64_t k = 0; k < std::ssize(rows); ++k)
    states[static_cast<size_t>(get(rows, k).place)] = get(found, k);
}

// What a token that may be flagged has to follow: the fewest of the last tokens that are enough for
// the most surprising one, and more, as far as more tokens become surprising enough. A token is
// flagged if it follows the first of them for which it is.
std::vector<Matcher::Level> Matcher::levels_of(int64_t i) const {
  const Row& row = at(i);
  const int64_t most = std::min(longest(unsafe_, i), max_match_ - 1);
  const bool maximum = rule_.kind == MatchRule::Kind::kMax;
  const std::vector<double> peak = maximum ? peaks(row, most) : std::vector<double>();
  const double surprising = rule_.occurring != nullptr ? rule_.occurring->most(0, vocab())
                                                       : std::numeric_limits<double>::infinity();
  const int64_t first = fewest(i, surprising, most, peak);
  if (first < 0) return {};
  const int64_t certain = fewest(i, 0, most, peak), last = certain < 0 ? most : certain;
  const double* sums = &get(sums_, row.slot * (capacity_ + 1));
  std::vector<Level> levels;
  for (int64_t k = first; k <= last; ++k) {
    const bool more = maximum ? k > 0 && get(peak, k) > get(peak, k - 1)
                              : k > 0 && sums[row.end - k] < sums[row.end - k + 1];
    if (k == first || more) levels.push_back({i, k, maximum ? get(peak, k) : 0});
  }
  return levels;
}

std::vector<std::pair<int64_t, int64_t>> Matcher::flagged() const {
  check_sources();
  std::vector<Level> levels;
  for (int64_t i = 0; i < batch(); ++i) {
    if (!at(i).active) continue;
    const std::vector<Level> more = levels_of(i);
    levels.insert(levels.end(), more.begin(), more.end());
  }
  std::vector<std::pair<int64_t, int64_t>> pairs;
  bool removed = false;
  for (int64_t s = 0; s < shards(unsafe_); ++s) {
    followers(s, levels, pairs);
    removed |= get(unsafe_.source.shards, s).removed_size > 0;
  }
  std::sort(pairs.begin(), pairs.end());
  pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
  if (rule_.max_count == INT64_MAX && !allow_ && !removed) return pairs;
  // What follows may do so in removed documents only, be too frequent, or be excused.
  std::vector<Candidate> candidates;
  candidates.reserve(pairs.size());
  for (const auto& [row, token] : pairs) candidates.push_back({row, token, 0});
  std::vector<uint8_t> flags(candidates.size());
  peek_rows(candidates, flags);
  std::vector<std::pair<int64_t, int64_t>> out;
  for (int64_t k = 0; k < std::ssize(pairs); ++k)
    if (get(flags, k) != 0) out.push_back(get(pairs, k));
  return out;
}

}  // namespace alignops::spans
