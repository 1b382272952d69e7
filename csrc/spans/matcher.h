// Follows growing sequences against an index: after each token, the longest suffix of each sequence
// that occurs in the index, and before it, what each candidate for the next token would lead to.
//
// A row is one sequence. Per shard it keeps a node: the length l of the longest suffix that occurs
// and the interval [lo, hi) of the suffixes that start with it. A token narrows the interval. Where
// that empties it, the new match starts later; whether a start is late enough is monotone, so few
// finds tell. Over shards the longest match counts, and its count is the sum over the shards that
// reach it. Nothing before the longest match can matter again: a row is a tail of tokens, with
// running sums of their surprisals.
//
// A match is flagged by a score that grows with its length, so peek needs no longest match: a
// candidate c is flagged if and only if the shortest suffix that would be, followed by c, occurs.
// Candidates that share this suffix are looked up together among the tokens that follow it.
//
// Of removed documents nothing occurs: a search that empties an interval and one that leaves only
// their suffixes in it are the same.
//
// Source: specification of TraceShield, TraceAlign (arXiv 2508.02063); the algorithm is our own.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kernels.h"
#include "range_max.h"

namespace alignops::spans {

// The shards of an index.
struct Source {
  std::vector<Shard> shards;
  std::shared_ptr<const void> owner;  // of what they point to
  // Called before each batch of searches; throws.
  std::function<void()> check;
  // Throws what a fault in this shard means.
  std::function<void(int32_t shard, const Fault& fault)> raise;
};

struct MatchRule {
  // Of a match: sum of the surprisals of its tokens, the same / ln N, the largest surprisal.
  enum class Kind : int32_t { kBci = 0, kNorm = 1, kMax = 2 };
  // Exact: a match that also occurs in the allow index is excused. Cover: tokens of a suffix that
  // occurs there, kCoverLength long or longer, have no surprisal from then on.
  enum class Allow : int32_t { kExact = 0, kCover = 1 };
  static constexpr int64_t kCoverLength = 8;

  Kind kind = Kind::kBci;
  Allow allow = Allow::kExact;
  double tau = 20;
  double severity = 1;
  int64_t min_len = 8;
  int64_t max_count = INT64_MAX;
  double log_tokens = 1;              // ln N
  std::span<const double> surprisal;  // of each token, finite and >= 0: see check_surprisal
  std::shared_ptr<const void> owner;  // of `surprisal`
  // Of `surprisal`, without tokens that do not occur, for `flagged` to look at fewer. May be null.
  std::shared_ptr<const RangeMax> occurring;
};

// Throws std::invalid_argument, with `op` in its text.
void check_surprisal(std::span<const double> surprisal, const char* op);

// The longest match at the end of a row.
struct MatchState {
  int64_t length, count;
  double bci;   // sum of surprisals
  double risk;  // severity * score if it is long and rare enough and not excused, else 0
  bool flag;    // it is, and risk > tau
};

// Not for use by several threads at once. A call that throws changes nothing.
class Matcher {
 public:
  // Rows without tokens. No match is longer than max_match.
  Matcher(Source unsafe, std::optional<Source> allow, MatchRule rule, int64_t batch,
          int64_t max_match);

  int64_t batch() const { return static_cast<int64_t>(rows_.size()); }
  uint64_t vocab() const { return rule_.surprisal.size(); }

  // Row i becomes what row parent[i] was, followed by tokens[i]; without parents, row i. With them
  // the number of rows may change. Tokens of rows that are not active are ignored. Throws
  // std::out_of_range for tokens and parents that do not exist.
  void advance(std::span<const int64_t> tokens,
               std::optional<std::span<const int64_t>> parent = std::nullopt);
  // Appends tokens[offsets[i]], ... to row i, whether it is active or not. No match is flagged
  // before the next advance.
  void extend(std::span<const int64_t> tokens, std::span<const int64_t> offsets);
  void reset(std::span<const int64_t> rows);

  MatchState state(int64_t row) const;
  // (batch, width) candidates for the next token: which would be flagged. Rows that are not active
  // have none, and their candidates are ignored.
  void peek(std::span<const int64_t> candidates, std::span<uint8_t> flags) const;
  // The states that they would lead to; zeros for rows that are not active.
  void peek_exact(std::span<const int64_t> candidates, std::span<MatchState> states) const;
  // All (row, token) that peek would flag, in order.
  std::vector<std::pair<int64_t, int64_t>> flagged() const;

  bool active(int64_t row) const { return at(row).active; }
  void set_active(int64_t row, bool active);

  // A row as plain data, independent of how the index is divided into shards.
  struct Tail {
    std::vector<int64_t> tokens;
    std::vector<uint8_t> covered;  // of each token: whether it lost its surprisal
    std::vector<double> sums;      // running sums before each token and after the last
    bool active = true, prompt = false;
  };
  Tail save(int64_t row) const;
  // Replaces all rows. Throws std::invalid_argument and std::out_of_range for impossible data.
  void restore(const std::vector<Tail>& tails);

 private:
  struct Row {
    int64_t slot = 0, begin = 0, end = 0;  // its tail: [begin, end) of a slot of the buffers
    bool active = true;
    bool prompt = false;  // nothing came after the prompt
  };
  struct Node {
    int64_t length, lo, hi;
  };
  // One of the two indexes.
  struct Side {
    Source source;
    int32_t width = 0;            // bytes of a token
    std::vector<uint8_t> tokens;  // (slots, capacity), then kQueryPadding bytes
    std::vector<Node> nodes;      // (rows, shards)
  };
  struct Candidate {
    int64_t row, token;
    int64_t place;  // in the arrays of the caller
  };
  // The last `level` tokens of a row followed by `token`: how often they occur in a shard.
  struct Probe {
    int64_t row, level, token, item;
    int64_t count = 0;
    auto operator<=>(const Probe&) const = default;
  };
  // The longest match of a row followed by `token`, if it has `floor` tokens, else length 0.
  struct Item {
    int64_t row, token, floor;
    int64_t length = 0, count = 0;
    int64_t known = 0, high = 0, found = 0;  // in the shard under way; `found` counts `known`
  };
  // The last `length` tokens of a row, the most surprising of which has `largest` (kind max only).
  struct Level {
    int64_t row, length;
    double largest;
  };
  // The longest suffix of the tokens before place `end`: `node` so far, at most `limit` long.
  struct Suffix {
    int64_t end, limit;
    Node node;
    int64_t step = 1;      // next one tried, beyond node
    bool bounded = false;  // a longer one than `limit` was tried
  };

  template <class Body>
  void each_side(const Body& body);
  const Row& at(int64_t row) const { return rows_[static_cast<size_t>(row)]; }
  int64_t shards(const Side& side) const { return static_cast<int64_t>(side.source.shards.size()); }
  Node empty(const Side& side, int64_t shard) const;
  const Node& node(const Side& side, int64_t row, int64_t shard) const;
  int64_t longest(const Side& side, int64_t row) const;
  int64_t token(int64_t place) const;
  void check_token(int64_t token, const char* what, int64_t row) const;
  void check_row(int64_t row, const char* what) const;
  void check_sources() const;
  void check_fault(const Side& side, int64_t shard, const Fault& fault) const;

  // Rows and their tokens.
  void grow(int64_t slots, int64_t capacity);
  void make_room(int64_t tokens);
  void copy_tail(const Row& from, const Row& to);
  std::vector<Row> reordered(std::span<const int64_t> parent);
  void append(Row& row, int64_t token);
  void cover(const Row& row, int64_t length);
  template <class Search>
  void commit(std::vector<Row> rows, const Search& search);
  void settle(int64_t row);

  // Searches.
  void find_suffixes(const Side& side, int64_t shard, std::vector<Suffix>& suffixes) const;
  std::vector<Node> search_tails(const Side& side, const std::vector<Row>& rows) const;
  std::vector<Node> step(const Side& side, const std::vector<Row>& rows,
                         std::span<const int64_t> parent) const;
  void solve(const Side& side, int64_t shard, std::span<Probe> probes) const;
  void find_longest(const Side& side, std::vector<Item>& items) const;
  void followers(int64_t shard, const std::vector<Level>& levels,
                 std::vector<std::pair<int64_t, int64_t>>& pairs) const;

  // Scores.
  double surprisal(int64_t token) const { return rule_.surprisal[static_cast<size_t>(token)]; }
  double risk(double bci, double largest) const;
  bool passes(int64_t length, int64_t count) const;
  std::vector<double> peaks(const Row& row, int64_t length) const;
  bool enough(const Level& level, double next) const;
  std::vector<Level> levels_of(int64_t row) const;
  int64_t fewest(int64_t row, double next, int64_t most, const std::vector<double>& peak) const;
  std::vector<Candidate> checked(std::span<const int64_t> candidates) const;
  void peek_rows(std::span<const Candidate> candidates, std::span<uint8_t> flags) const;
  std::vector<MatchState> judge(std::vector<Item>& items) const;

  MatchRule rule_;
  int64_t max_match_;
  Side unsafe_;
  std::optional<Side> allow_;
  std::vector<Row> rows_;
  // Place p of slot s is p + s * capacity_; several slots may be unused.
  int64_t slots_ = 0, capacity_ = 0;
  std::vector<uint8_t> covered_;  // (slots, capacity): the token has lost its surprisal
  std::vector<double> sums_;      // (slots, capacity + 1): of surprisals, before each place
};

}  // namespace alignops::spans
