#include "matcher.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "../common/check.h"
#include "matcher_common.h"

namespace alignops::spans {
namespace {

constexpr int64_t kSmallestCapacity = 64;

}  // namespace

void check_surprisal(std::span<const double> surprisal, const char* op) {
  for (size_t t = 0; t < surprisal.size(); ++t)
    ALIGNOPS_CHECK(std::isfinite(surprisal[t]) && surprisal[t] >= 0, op,
                   ": surprisal must be finite and not negative, got ", surprisal[t], " for token ",
                   t);
}

Matcher::Matcher(Source unsafe, std::optional<Source> allow, MatchRule rule, int64_t batch,
                 int64_t max_match)
    : rule_(std::move(rule)), max_match_(max_match) {
  const char* name = "SpanMatcher: ";
  ALIGNOPS_CHECK(batch >= 0, name, "batch must not be negative, got ", batch);
  ALIGNOPS_CHECK(max_match >= 1, name, "max_match must be positive, got ", max_match);
  ALIGNOPS_CHECK(std::isfinite(rule_.tau), name, "tau must be finite, got ", rule_.tau);
  ALIGNOPS_CHECK(std::isfinite(rule_.severity) && rule_.severity > 0, name,
                 "severity must be positive and finite, got ", rule_.severity);
  ALIGNOPS_CHECK(rule_.min_len >= 1, name, "min_len must be positive, got ", rule_.min_len);
  ALIGNOPS_CHECK(rule_.max_count >= 1, name, "max_count must be positive, got ", rule_.max_count);
  ALIGNOPS_CHECK(
      !allow || rule_.allow != MatchRule::Allow::kCover || max_match >= MatchRule::kCoverLength,
      name, "max_match must be at least ", MatchRule::kCoverLength, " for allow_mode 'cover', got ",
      max_match);
  const auto side = [](Source source) {
    Side out{std::move(source), 0, {}, {}};
    out.width = out.source.shards.empty() ? 1 : out.source.shards[0].token_bytes;
    return out;
  };
  unsafe_ = side(std::move(unsafe));
  if (allow) allow_ = side(std::move(*allow));
  each_side([&](const Side& s) {
    for (const Shard& shard : s.source.shards)
      ALIGNOPS_CHECK(shard.vocab == vocab(), name, "surprisal must have ", shard.vocab,
                     " elements (vocab_size), got ", vocab());
  });
  grow(batch, kSmallestCapacity);
  for (int64_t i = 0; i < batch; ++i) rows_.push_back({.slot = i});
  each_side([&](Side& s) {
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t j = 0; j < shards(s); ++j) s.nodes.push_back(empty(s, j));
  });
}

template <class Body>
void Matcher::each_side(const Body& body) {
  body(unsafe_);
  if (allow_) body(*allow_);
}

Matcher::Node Matcher::empty(const Side& side, int64_t shard) const {
  return {0, 0, static_cast<int64_t>(get(side.source.shards, shard).suf_size)};
}

const Matcher::Node& Matcher::node(const Side& side, int64_t row, int64_t shard) const {
  return get(side.nodes, row * shards(side) + shard);
}

int64_t Matcher::longest(const Side& side, int64_t row) const {
  int64_t length = 0;
  for (int64_t s = 0; s < shards(side); ++s) length = std::max(length, node(side, row, s).length);
  return length;
}

int64_t Matcher::token(int64_t place) const {
  uint32_t value = 0;
  const auto width = static_cast<size_t>(unsafe_.width);
  std::memcpy(&value, unsafe_.tokens.data() + static_cast<size_t>(place) * width, width);
  return value;
}

void Matcher::check_token(int64_t token, const char* what, int64_t row) const {
  if (token >= 0 && static_cast<uint64_t>(token) < vocab()) return;
  const bool sep = token == static_cast<int64_t>(separator(unsafe_.width));
  throw std::out_of_range(
      message("SpanMatcher: ", what, " must lie in [0, ", vocab(), "), got ", token, " in row ",
              row, sep ? ", the separator: no match crosses the end of a document" : ""));
}

void Matcher::check_row(int64_t row, const char* what) const {
  if (row < 0 || row >= batch())
    throw std::out_of_range(
        message("SpanMatcher: ", what, " must lie in [0, ", batch(), "), got ", row));
}

void Matcher::check_sources() const {
  if (unsafe_.source.check) unsafe_.source.check();
  if (allow_ && allow_->source.check) allow_->source.check();
}

void Matcher::check_fault(const Side& side, int64_t shard, const Fault& fault) const {
  if (fault.status != Status::kOk) side.source.raise(static_cast<int32_t>(shard), fault);
}

// Moves every tail to the beginning of its slot in larger buffers.
void Matcher::grow(int64_t slots, int64_t capacity) {
  std::vector<double> sums(static_cast<size_t>(slots * (capacity + 1)));
  std::vector<uint8_t> covered(static_cast<size_t>(slots * capacity));
  for (const Row& row : rows_) {
    const int64_t from = row.slot * capacity_ + row.begin, count = row.end - row.begin;
    std::copy_n(sums_.begin() + from + row.slot, count + 1,
                sums.begin() + row.slot * (capacity + 1));
    std::copy_n(covered_.begin() + from, count, covered.begin() + row.slot * capacity);
  }
  each_side([&](Side& side) {
    std::vector<uint8_t> tokens(static_cast<size_t>(slots * capacity * side.width + kQueryPadding));
    for (const Row& row : rows_)
      std::copy_n(side.tokens.begin() + (row.slot * capacity_ + row.begin) * side.width,
                  (row.end - row.begin) * side.width,
                  tokens.begin() + row.slot * capacity * side.width);
    side.tokens = std::move(tokens);
  });
  sums_ = std::move(sums);
  covered_ = std::move(covered);
  slots_ = slots;
  capacity_ = capacity;
  for (Row& row : rows_) {
    row.end -= row.begin;
    row.begin = 0;
  }
}

// Lets every row take that many more tokens.
void Matcher::make_room(int64_t tokens) {
  int64_t longest_tail = 0;
  for (const Row& row : rows_) longest_tail = std::max(longest_tail, row.end - row.begin);
  const int64_t needed = longest_tail + tokens;
  if (2 * needed > capacity_) return grow(slots_, 4 * needed);
  for (Row& row : rows_) {
    if (row.end + tokens <= capacity_) continue;
    const Row old = row;
    row.end -= row.begin;
    row.begin = 0;
    copy_tail(old, row);
  }
}

// Copies may overlap: to a lower place.
void Matcher::copy_tail(const Row& from, const Row& to) {
  const int64_t source = from.slot * capacity_ + from.begin, place = to.slot * capacity_ + to.begin,
                count = from.end - from.begin;
  std::copy_n(sums_.begin() + source + from.slot, count + 1, sums_.begin() + place + to.slot);
  std::copy_n(covered_.begin() + source, count, covered_.begin() + place);
  each_side([&](Side& side) {
    std::copy_n(side.tokens.begin() + source * side.width, count * side.width,
                side.tokens.begin() + place * side.width);
  });
}

// The rows that a reordering gives, in slots of their own: the first child of a row takes over its
// slot, where its parent's tail stays as it is, others get copies in unused slots.
std::vector<Matcher::Row> Matcher::reordered(std::span<const int64_t> parent) {
  std::vector<int64_t> children(rows_.size()), unused;
  int64_t copies = 0;
  for (const int64_t p : parent) copies += get(children, p)++ > 0;
  if (slots_ < batch() + copies) grow(batch() + copies, capacity_);
  std::vector<bool> used(static_cast<size_t>(slots_));
  for (const Row& row : rows_) used[static_cast<size_t>(row.slot)] = true;
  for (int64_t s = 0; s < slots_; ++s)
    if (!used[static_cast<size_t>(s)]) unused.push_back(s);

  std::vector<Row> rows;
  rows.reserve(parent.size());
  std::vector<bool> taken(rows_.size());
  for (const int64_t p : parent) {
    Row row = at(p);
    if (taken[static_cast<size_t>(p)]) {
      row = {unused.back(), 0, row.end - row.begin, row.active, row.prompt};
      unused.pop_back();
      copy_tail(at(p), row);
    }
    taken[static_cast<size_t>(p)] = true;
    rows.push_back(row);
  }
  return rows;
}

// Behind the end of the tail, which others may still need as it is.
void Matcher::append(Row& row, int64_t token) {
  const int64_t place = row.slot * capacity_ + row.end++;
  each_side(
      [&](Side& side) { store_token(side.tokens.data() + place * side.width, side.width, token); });
  get(covered_, place) = 0;
  double* sum = &get(sums_, place + row.slot);
  sum[1] = sum[0] + surprisal(token);
}

// The last `length` tokens lose their surprisal.
void Matcher::cover(const Row& row, int64_t length) {
  const int64_t base = row.slot * capacity_;
  int64_t first = row.end;
  for (; first > row.end - length && get(covered_, base + first - 1) == 0; --first)
    get(covered_, base + first - 1) = 1;
  double* sums = &get(sums_, base + row.slot);
  for (int64_t p = first; p < row.end; ++p) sums[p + 1] = sums[p];
}

void Matcher::advance(std::span<const int64_t> tokens,
                      std::optional<std::span<const int64_t>> parent) {
  std::vector<int64_t> self;
  if (!parent) {
    self.resize(rows_.size());
    std::iota(self.begin(), self.end(), 0);
  }
  const std::span<const int64_t> from = parent ? *parent : self;
  ALIGNOPS_CHECK(tokens.size() == from.size(), "SpanMatcher: tokens must have ", from.size(),
                 " elements, one per row, got ", tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    check_row(from[i], "parent");
    if (at(from[i]).active) check_token(tokens[i], "tokens", static_cast<int64_t>(i));
  }
  check_sources();
  make_room(1);
  std::vector<Row> rows = parent ? reordered(from) : rows_;
  for (int64_t i = 0; i < std::ssize(rows); ++i) {
    Row& row = get(rows, i);
    if (!row.active) continue;
    append(row, tokens[static_cast<size_t>(i)]);
    row.prompt = false;
  }
  commit(std::move(rows),
         [&](const Side& side, const std::vector<Row>& grown) { return step(side, grown, from); });
}

// Becomes `rows`, with the nodes that `search(side, rows)` gives.
template <class Search>
void Matcher::commit(std::vector<Row> rows, const Search& search) {
  std::vector<Node> unsafe = search(unsafe_, rows), allowed;
  if (allow_) allowed = search(*allow_, rows);
  unsafe_.nodes = std::move(unsafe);
  if (allow_) allow_->nodes = std::move(allowed);
  rows_ = std::move(rows);
  for (int64_t i = 0; i < batch(); ++i) settle(i);
}

// After a row got tokens and nodes: covers, and forgets what cannot matter any more.
void Matcher::settle(int64_t i) {
  Row& row = get(rows_, i);
  int64_t length = longest(unsafe_, i);
  if (allow_) {
    const int64_t allowed = longest(*allow_, i);
    if (rule_.allow == MatchRule::Allow::kCover && allowed >= MatchRule::kCoverLength)
      cover(row, allowed);
    length = std::max(length, allowed);
  }
  row.begin = std::max(row.begin, row.end - length);
}

void Matcher::extend(std::span<const int64_t> tokens, std::span<const int64_t> offsets) {
  ALIGNOPS_CHECK(std::ssize(offsets) == batch() + 1, "SpanMatcher: offsets must have ", batch() + 1,
                 " elements, got ", offsets.size());
  const auto offset = [&](int64_t i) { return offsets[static_cast<size_t>(i)]; };
  ALIGNOPS_CHECK(offset(0) == 0 && offset(batch()) == std::ssize(tokens),
                 "SpanMatcher: offsets must go from 0 to ", tokens.size(), ", got ", offset(0),
                 " to ", offset(batch()));
  int64_t most = 0;
  for (int64_t i = 0; i < batch(); ++i) {
    ALIGNOPS_CHECK(offset(i) <= offset(i + 1), "SpanMatcher: offsets must not decrease, got ",
                   offset(i), " before ", offset(i + 1));
    most = std::max(most, offset(i + 1) - offset(i));
  }
  for (int64_t i = 0; i < batch(); ++i)
    for (const int64_t t : tokens.subspan(static_cast<size_t>(offset(i)),
                                          static_cast<size_t>(offset(i + 1) - offset(i))))
      check_token(t, "tokens", i);
  const auto marked = [&](Row row, int64_t i) {
    row.prompt = row.prompt || offset(i) < offset(i + 1);
    return row;
  };
  if (allow_ && rule_.allow == MatchRule::Allow::kCover) {
    // What is covered depends on every step.
    Matcher next(*this);
    for (int64_t p = 0; p < most; ++p) {
      std::vector<int64_t> column(rows_.size());
      for (int64_t i = 0; i < batch(); ++i) {
        Row& row = get(next.rows_, i);
        row.active = p < offset(i + 1) - offset(i);
        if (row.active) get(column, i) = tokens[static_cast<size_t>(offset(i) + p)];
      }
      next.advance(column);
    }
    for (int64_t i = 0; i < batch(); ++i) {
      Row& row = get(next.rows_, i);
      row.active = at(i).active;
      row.prompt = at(i).prompt;
      row = marked(row, i);
    }
    *this = std::move(next);
    return;
  }
  check_sources();
  make_room(std::min(most, max_match_) + 1);
  std::vector<Row> rows = rows_;
  for (int64_t i = 0; i < batch(); ++i) {
    Row& row = get(rows, i);
    int64_t p = offset(i);
    if (const int64_t first = offset(i + 1) - max_match_; p < first) {
      // Tokens that no match can reach only count in the sums. The old tail stays as it is.
      double sum = get(sums_, row.slot * (capacity_ + 1) + row.end);
      for (; p < first; ++p) sum += surprisal(tokens[static_cast<size_t>(p)]);
      row.begin = ++row.end;
      get(sums_, row.slot * (capacity_ + 1) + row.end) = sum;
    }
    for (; p < offset(i + 1); ++p) append(row, tokens[static_cast<size_t>(p)]);
    row = marked(row, i);
  }
  commit(std::move(rows), [&](const Side& side, const std::vector<Row>& grown) {
    return search_tails(side, grown);
  });
}

void Matcher::reset(std::span<const int64_t> rows) {
  for (const int64_t i : rows) check_row(i, "rows");
  for (const int64_t i : rows) {
    const int64_t slot = at(i).slot;
    get(rows_, i) = {.slot = slot};
    get(sums_, slot * (capacity_ + 1)) = 0;
    each_side([&](Side& side) {
      for (int64_t s = 0; s < shards(side); ++s)
        get(side.nodes, i * shards(side) + s) = empty(side, s);
    });
  }
}

void Matcher::set_active(int64_t row, bool active) {
  check_row(row, "row");
  get(rows_, row).active = active;
}

Matcher::Tail Matcher::save(int64_t i) const {
  const Row& row = at(i);
  const int64_t base = row.slot * capacity_;
  Tail out;
  for (int64_t p = row.begin; p < row.end; ++p) {
    out.tokens.push_back(token(base + p));
    out.covered.push_back(get(covered_, base + p));
  }
  for (int64_t p = row.begin; p <= row.end; ++p)
    out.sums.push_back(get(sums_, base + row.slot + p));
  out.active = row.active;
  out.prompt = row.prompt;
  return out;
}

void Matcher::restore(const std::vector<Tail>& tails) {
  Matcher next(unsafe_.source, allow_ ? std::optional(allow_->source) : std::nullopt, rule_,
               std::ssize(tails), max_match_);
  int64_t most = 0;
  for (const Tail& tail : tails) {
    ALIGNOPS_CHECK(tail.covered.size() == tail.tokens.size() &&
                       tail.sums.size() == tail.tokens.size() + 1 &&
                       std::ssize(tail.tokens) <= max_match_,
                   "SpanMatcher: state must hold up to ", max_match_,
                   " tokens per row, a flag for each and one more sum, got ", tail.tokens.size(),
                   " tokens, ", tail.covered.size(), " flags, ", tail.sums.size(), " sums");
    ALIGNOPS_CHECK(
        std::isfinite(tail.sums.back()) && std::is_sorted(tail.sums.begin(), tail.sums.end()),
        "SpanMatcher: state must hold finite sums that do not decrease");
    for (const int64_t t : tail.tokens) check_token(t, "tokens", &tail - tails.data());
    most = std::max(most, std::ssize(tail.tokens));
  }
  check_sources();
  next.make_room(most);
  std::vector<Row> rows = next.rows_;
  for (int64_t i = 0; i < std::ssize(tails); ++i) {
    const Tail& tail = get(tails, i);
    Row& row = get(rows, i);
    row.active = tail.active;
    row.prompt = tail.prompt;
    for (const int64_t t : tail.tokens) next.append(row, t);
    const int64_t base = row.slot * next.capacity_;
    std::copy(tail.covered.begin(), tail.covered.end(), next.covered_.begin() + base);
    std::copy(tail.sums.begin(), tail.sums.end(), next.sums_.begin() + base + row.slot);
  }
  next.commit(std::move(rows), [&](const Side& side, const std::vector<Row>& grown) {
    return next.search_tails(side, grown);
  });
  *this = std::move(next);
}

}  // namespace alignops::spans
