// The matcher against counting by comparison: after every token, for every candidate, over shards,
// reorderings and rules.
#include "spans/matcher.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "harness.h"
#include "spans/small_shard.h"

namespace alignops::spans {
namespace {

using test::expect;
using test::Random;
using Ids = std::vector<int64_t>;
using Text = std::vector<uint32_t>;

constexpr uint32_t kSep = SmallShard::kSep;

// Documents in several shards. In some of the shards there are documents, too, that are removed:
// these and the same backwards.
class Corpus {
 public:
  Corpus(const std::vector<Ids>& documents, int64_t vocab, size_t shards, int32_t token_bytes)
      : documents_(documents) {
    for (size_t s = 0; s < shards; ++s) {
      Text text;
      for (size_t d = s; d < documents.size(); d += shards) {
        for (const int64_t t : documents[d]) text.push_back(static_cast<uint32_t>(t));
        text.push_back(kSep);
      }
      if (text.empty()) text.push_back(kSep);
      const uint64_t removed_from = text.size();
      for (size_t d = 0; d < documents.size() && (s + documents.size()) % 2 == 0; ++d) {
        for (auto t = documents[d].rbegin(); t != documents[d].rend(); ++t)
          text.push_back(static_cast<uint32_t>(*t));
        for (const int64_t t : documents[d]) text.push_back(static_cast<uint32_t>(t));
        text.push_back(kSep);
      }
      shards_->emplace_back(text, SmallShard::Options{.token_bytes = token_bytes,
                                                      .pointer_bytes = s % 2 == 0 ? 4 : 5,
                                                      .vocab = static_cast<uint64_t>(vocab),
                                                      .sparse = s % 3 == 1,
                                                      .removed_from = removed_from});
    }
  }

  Source source() const {
    Source out;
    for (const SmallShard& shard : *shards_) out.shards.push_back(shard.view());
    out.owner = shards_;
    out.raise = [](int32_t shard, const Fault&) {
      throw std::runtime_error("fault in shard " + std::to_string(shard));
    };
    return out;
  }

  int64_t count(std::span<const int64_t> query) const {
    int64_t found = 0;
    for (const Ids& d : documents_)
      for (size_t i = 0; i + query.size() <= d.size(); ++i)
        found += i < d.size() &&
                 std::equal(query.begin(), query.end(), d.begin() + static_cast<int64_t>(i));
    return found;
  }

 private:
  std::vector<Ids> documents_;
  std::shared_ptr<std::vector<SmallShard>> shards_ = std::make_shared<std::vector<SmallShard>>();
};

// The definition, from the whole row.
MatchState expected(const Ids& row, const Corpus& unsafe, const Corpus* allow,
                    const MatchRule& rule, int64_t max_match) {
  const auto tail = [&](size_t end, size_t length) {
    return std::span(row).subspan(end - length, length);
  };
  MatchState out{0, unsafe.count({}), 0, 0, false};
  while (out.length < std::min(std::ssize(row), max_match)) {
    const int64_t longer = unsafe.count(tail(row.size(), static_cast<size_t>(out.length) + 1));
    if (longer == 0) break;
    out.count = longer;
    ++out.length;
  }
  std::vector<double> u;
  for (const int64_t t : row) u.push_back(rule.surprisal[static_cast<size_t>(t)]);
  constexpr auto kCover = static_cast<size_t>(MatchRule::kCoverLength);
  if (allow != nullptr && rule.allow == MatchRule::Allow::kCover)
    for (size_t end = kCover; end <= row.size(); ++end)
      if (allow->count(tail(end, kCover)) > 0)
        std::fill_n(u.begin() + static_cast<int64_t>(end - kCover), kCover, 0.0);
  const auto begin = u.end() - out.length;
  out.bci = std::accumulate(begin, u.end(), 0.0);
  const bool excused = allow != nullptr && rule.allow == MatchRule::Allow::kExact &&
                       allow->count(tail(row.size(), static_cast<size_t>(out.length))) > 0;
  if (out.length < rule.min_len || out.count > rule.max_count || excused) return out;
  out.risk =
      rule.severity * (rule.kind == MatchRule::Kind::kBci    ? out.bci
                       : rule.kind == MatchRule::Kind::kNorm ? out.bci / rule.log_tokens
                                                             : *std::max_element(begin, u.end()));
  out.flag = out.risk > rule.tau;
  return out;
}

void compare(const MatchState& got, const MatchState& want, const std::string& what) {
  const bool near = std::abs(got.bci - want.bci) < 1e-9 && std::abs(got.risk - want.risk) < 1e-9;
  expect(got.length == want.length && got.count == want.count && near && got.flag == want.flag,
         what + ": length " + std::to_string(got.length) + ", count " + std::to_string(got.count) +
             ", bci " + std::to_string(got.bci) + ", risk " + std::to_string(got.risk) + "; want " +
             std::to_string(want.length) + ", " + std::to_string(want.count) + ", " +
             std::to_string(want.bci) + ", " + std::to_string(want.risk));
}

void set_surprisal(MatchRule& rule, std::vector<double> values) {
  const auto owned = std::make_shared<const std::vector<double>>(std::move(values));
  rule.surprisal = *owned;
  rule.owner = owned;
}

struct World {
  int64_t vocab;
  std::vector<Ids> documents, harmless;
  MatchRule rule;
  int64_t max_match;
};

World sample_world(Random& random) {
  World w;
  w.vocab = random.pick<int64_t>({1, 2, 3, 8, 200});
  const auto document = [&](const std::vector<Ids>& others) {
    Ids out;
    const int64_t size = random.below(60);
    while (std::ssize(out) < size) {
      if (!others.empty() && random.below(2) == 0) {
        const Ids& other = random.pick(others);
        const int64_t from = random.below(std::ssize(other) + 1);
        const int64_t length = std::min(random.below(30), std::ssize(other) - from);
        out.insert(out.end(), other.begin() + from, other.begin() + from + length);
      }
      out.push_back(random.below(w.vocab));
    }
    return out;
  };
  for (int64_t d = random.below(12); d >= 0; --d) w.documents.push_back(document(w.documents));
  for (int64_t d = random.below(6); d >= 0; --d) w.harmless.push_back(document(w.documents));
  std::vector<double> surprisal;
  // Eighths: sums are exact, so that no order of additions can decide about a flag.
  for (int64_t t = 0; t < w.vocab; ++t)
    surprisal.push_back(static_cast<double>(random.below(60)) / 8);
  set_surprisal(w.rule, std::move(surprisal));
  w.rule.kind = static_cast<MatchRule::Kind>(random.below(3));
  w.rule.allow = static_cast<MatchRule::Allow>(random.below(2));
  w.rule.log_tokens = 4;
  w.rule.tau = static_cast<double>(random.below(8 * 20)) / 8;
  w.rule.severity = random.pick<double>({1, 0.5, 2});
  w.rule.min_len = random.pick<int64_t>({1, 2, 5, 8});
  w.rule.max_count = random.pick<int64_t>({INT64_MAX, INT64_MAX, 1, 3});
  w.max_match = random.pick<int64_t>({1, 3, 9, 4096});
  if (w.rule.allow == MatchRule::Allow::kCover) w.max_match = std::max<int64_t>(w.max_match, 8);
  return w;
}

// Mostly goes on as some document does.
int64_t next_token(Random& random, const World& w, const Ids& row) {
  if (random.below(8) == 0) return random.below(w.vocab);
  const Ids& d = random.pick(random.below(4) == 0 ? w.harmless : w.documents);
  for (size_t i = 0; !row.empty() && i + 1 < d.size(); ++i)
    if (d[i] == row.back() && random.below(3) > 0) return d[i + 1];
  return d.empty() ? random.below(w.vocab) : random.pick(d);
}

void check(const Matcher& matcher, const std::vector<Ids>& rows, Random& random, const World& w,
           const Corpus& unsafe, const Corpus* allow, const std::string& name) {
  const int64_t width = 4;
  Ids candidates;
  for (size_t i = 0; i < rows.size(); ++i) {
    const MatchState got = matcher.state(static_cast<int64_t>(i));
    compare(got, expected(rows[i], unsafe, allow, w.rule, w.max_match), name);
    for (int64_t k = 0; k < width; ++k) candidates.push_back(next_token(random, w, rows[i]));
  }
  std::vector<uint8_t> flags(candidates.size(), 9);
  std::vector<MatchState> states(candidates.size());
  matcher.peek(candidates, flags);
  matcher.peek_exact(candidates, states);
  for (size_t i = 0; i < candidates.size(); ++i) {
    Ids longer = rows[i / width];
    longer.push_back(candidates[i]);
    const MatchState want = expected(longer, unsafe, allow, w.rule, w.max_match);
    compare(states[i], want, name + ", peek");
    expect(flags[i] == (want.flag ? 1 : 0), name + ", flag of a candidate");
  }
}

const test::Register streaming("a stream equals the definition", [] {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    const World w = sample_world(random);
    const Corpus unsafe(w.documents, w.vocab, static_cast<size_t>(1 + random.below(4)), 2);
    const Corpus harmless(w.harmless, w.vocab, static_cast<size_t>(1 + random.below(3)), 1);
    const bool allowed = random.below(2) == 0;
    const Corpus* allow = allowed ? &harmless : nullptr;
    std::vector<Ids> rows(static_cast<size_t>(1 + random.below(4)));
    Matcher matcher(unsafe.source(), allowed ? std::optional(harmless.source()) : std::nullopt,
                    w.rule, std::ssize(rows), w.max_match);
    const std::string name = "seed " + std::to_string(seed);
    for (int step = 0; step < 40; ++step) {
      std::vector<Ids> next = rows;
      Ids tokens, parent;
      const bool reorder = random.below(4) == 0;
      if (reorder) {
        next.resize(static_cast<size_t>(1 + random.below(5)));
        for (Ids& row : next) {
          parent.push_back(random.below(std::ssize(rows)));
          row = rows[static_cast<size_t>(parent.back())];
        }
      }
      for (Ids& row : next) {
        tokens.push_back(next_token(random, w, row));
        row.push_back(tokens.back());
      }
      if (reorder) {
        matcher.advance(tokens, parent);
      } else {
        matcher.advance(tokens);
      }
      rows = next;
      check(matcher, rows, random, w, unsafe, allow, name);
      if (random.below(10) == 0) {
        const int64_t r = random.below(std::ssize(rows));
        matcher.reset(Ids{r});
        rows[static_cast<size_t>(r)].clear();
      }
      if (random.below(10) == 0) {
        std::vector<Matcher::Tail> tails;
        for (int64_t r = 0; r < matcher.batch(); ++r) tails.push_back(matcher.save(r));
        Matcher other(unsafe.source(), allowed ? std::optional(harmless.source()) : std::nullopt,
                      w.rule, 0, w.max_match);
        other.restore(tails);
        matcher = other;
      }
    }
  }
});

const test::Register flagged("flagged lists what peek flags", [] {
  for (uint32_t seed = 0; seed < 200; ++seed) {
    Random random(1000 + seed);
    World w = sample_world(random);
    const Corpus unsafe(w.documents, w.vocab, static_cast<size_t>(1 + random.below(3)), 2);
    if (random.below(2) == 0) {
      std::vector<double> occurring(w.rule.surprisal.begin(), w.rule.surprisal.end());
      for (size_t t = 0; t < occurring.size(); ++t)
        if (unsafe.count(Ids{static_cast<int64_t>(t)}) == 0) occurring[t] = 0;
      w.rule.occurring = std::make_shared<const RangeMax>(occurring);
    }
    const Corpus harmless(w.harmless, w.vocab, 1, 2);
    const bool allowed = random.below(2) == 0;
    Matcher matcher(unsafe.source(), allowed ? std::optional(harmless.source()) : std::nullopt,
                    w.rule, 2, w.max_match);
    std::vector<Ids> rows(2);
    for (int step = 0; step < 12; ++step) {
      Ids tokens;
      for (Ids& row : rows) {
        tokens.push_back(next_token(random, w, row));
        row.push_back(tokens.back());
      }
      matcher.advance(tokens);
      Ids all;
      for (int64_t i = 0; i < 2 * w.vocab; ++i) all.push_back(i % w.vocab);
      std::vector<uint8_t> flags(all.size());
      matcher.peek(all, flags);
      std::vector<std::pair<int64_t, int64_t>> want;
      for (size_t i = 0; i < all.size(); ++i)
        if (flags[i] != 0) want.emplace_back(static_cast<int64_t>(i) / w.vocab, all[i]);
      expect(matcher.flagged() == want, "flagged, seed " + std::to_string(seed));
    }
  }
});

const test::Register ranges("the largest of a range", [] {
  Random random(5);
  for (const int64_t size : {1, 2, 3, 7, 8, 100}) {
    std::vector<double> values;
    for (int64_t i = 0; i < size; ++i) values.push_back(static_cast<double>(random.below(1000)));
    const RangeMax largest(values);
    for (int64_t first = 0; first <= size; ++first)
      for (int64_t last = first; last <= size + 2; ++last) {
        double want = 0;
        for (int64_t i = first; i <= std::min(last, size - 1); ++i)
          want = std::max(want, values[static_cast<size_t>(i)]);
        expect(largest.most(static_cast<uint64_t>(first), static_cast<uint64_t>(last)) == want,
               "range");
      }
  }
});

const test::Register prompts("a prompt counts, but is not flagged", [] {
  for (uint32_t seed = 0; seed < 200; ++seed) {
    Random random(2000 + seed);
    const World w = sample_world(random);
    const Corpus unsafe(w.documents, w.vocab, static_cast<size_t>(1 + random.below(3)), 2);
    const Corpus harmless(w.harmless, w.vocab, 2, 2);
    const bool allowed = random.below(2) == 0;
    const Corpus* allow = allowed ? &harmless : nullptr;
    std::vector<Ids> rows(3);
    Matcher matcher(unsafe.source(), allowed ? std::optional(harmless.source()) : std::nullopt,
                    w.rule, 3, w.max_match);
    for (int turn = 0; turn < 3; ++turn) {
      Ids flat, offsets{0}, tokens;
      for (Ids& row : rows) {
        for (int64_t n = random.below(30); n > 0; --n) {
          flat.push_back(next_token(random, w, row));
          row.push_back(flat.back());
        }
        offsets.push_back(std::ssize(flat));
      }
      matcher.extend(flat, offsets);
      for (int64_t r = 0; r < 3; ++r) {
        if (offsets[static_cast<size_t>(r)] == offsets[static_cast<size_t>(r) + 1]) continue;
        MatchState want =
            expected(rows[static_cast<size_t>(r)], unsafe, allow, w.rule, w.max_match);
        want.flag = false;
        want.risk = 0;
        compare(matcher.state(r), want, "prompt, seed " + std::to_string(seed));
      }
      for (Ids& row : rows) {
        tokens.push_back(next_token(random, w, row));
        row.push_back(tokens.back());
      }
      matcher.advance(tokens);
      check(matcher, rows, random, w, unsafe, allow,
            "after a prompt, seed " + std::to_string(seed));
    }
  }
});

template <class Error>
bool refuses(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error&) {
    return true;
  }
  return false;
}

const test::Register failures_change_nothing("failed calls change nothing", [] {
  const Corpus unsafe({{0, 1, 2, 3, 0, 1, 2, 4}}, 6, 1, 2);
  MatchRule rule;
  set_surprisal(rule, std::vector<double>(6, 2.0));
  Source source = unsafe.source();
  bool broken = false;
  source.check = [&] {
    if (broken) throw std::runtime_error("the file shrank");
  };
  Matcher matcher(source, std::nullopt, rule, 2, 4096);
  matcher.advance(Ids{0, 1});
  matcher.advance(Ids{1, 2});
  const auto same = [&] {
    return matcher.batch() == 2 && matcher.state(0).length == 2 && matcher.state(1).length == 2;
  };
  const auto out_of_range = [&](const auto& call) {
    expect(refuses<std::out_of_range>(call) && same(), "out of range");
  };
  out_of_range([&] { matcher.advance(Ids{2, 6}); });
  out_of_range([&] { matcher.advance(Ids{-1, 1}); });
  out_of_range([&] { matcher.advance(Ids{2, 65535}); });
  out_of_range([&] { matcher.advance(Ids{2, 3}, Ids{0, 2}); });
  out_of_range([&] { matcher.extend(Ids{2, 7}, Ids{0, 1, 2}); });
  out_of_range([&] { matcher.reset(Ids{0, 2}); });
  out_of_range([&] { matcher.restore({{{6}, {0}, {0, 2}, true, false}}); });
  const auto invalid = [&](const auto& call) {
    expect(refuses<std::invalid_argument>(call) && same(), "invalid");
  };
  invalid([&] { matcher.advance(Ids{2}); });
  invalid([&] { matcher.extend(Ids{2, 3}, Ids{0, 2}); });
  invalid([&] { matcher.extend(Ids{2, 3}, Ids{0, 3, 2}); });
  invalid([&] { matcher.restore({{{1}, {0}, {0}, true, false}}); });
  invalid([&] { matcher.restore({{{1}, {0}, {0, -1}, true, false}}); });
  broken = true;
  const auto fails = [&](const auto& call) {
    expect(refuses<std::runtime_error>(call) && same(), "broken file");
  };
  fails([&] { matcher.advance(Ids{2, 3}); });
  fails([&] { matcher.advance(Ids{2, 3}, Ids{1, 1}); });
  fails([&] { matcher.extend(Ids{2, 3}, Ids{0, 1, 2}); });
  broken = false;
  matcher.advance(Ids{2, 3});
  expect(matcher.state(0).length == 3 && matcher.state(0).count == 2 &&
             matcher.state(1).length == 3 && matcher.state(1).count == 1,
         "goes on after failures");
});

const test::Register damage("a fault of a kernel reaches the caller and changes nothing", [] {
  SmallShard small({0, 1, 2, 0, 1, 3, kSep}, {.vocab = 4});
  Source source;
  source.shards = {small.view()};
  source.raise = [](int32_t, const Fault& fault) {
    expect(fault.status == Status::kCorrupt, "status");
    throw std::runtime_error("corrupt");
  };
  uint64_t verified = 0;
  source.shards[0].suf_guard = {&verified, [](void*, uint64_t) noexcept { return false; }, nullptr};
  MatchRule rule;
  rule.min_len = 2;
  rule.tau = 0;
  set_surprisal(rule, std::vector<double>(4, 2.0));
  Matcher matcher(source, std::nullopt, rule, 1, 4096);
  matcher.advance(Ids{0});  // the table of first tokens says all
  expect(refuses<std::runtime_error>([&] { matcher.advance(Ids{1}); }), "advance");
  std::vector<uint8_t> flags(1);
  expect(refuses<std::runtime_error>([&] { matcher.peek(Ids{1}, flags); }), "peek");
  expect(matcher.state(0).length == 1 && matcher.state(0).count == 2, "state");
  verified = 1;
  matcher.advance(Ids{1});
  expect(matcher.state(0).length == 2 && matcher.state(0).count == 2, "intact again");
});

const test::Register inactive("finished rows stay as they are", [] {
  const Corpus unsafe({{0, 1, 2, 3}}, 4, 1, 1);
  MatchRule rule;
  rule.min_len = 2;
  rule.tau = 1;
  set_surprisal(rule, std::vector<double>(4, 2.0));
  Matcher matcher(unsafe.source(), std::nullopt, rule, 2, 4096);
  matcher.advance(Ids{0, 0});
  matcher.set_active(1, false);
  matcher.advance(Ids{1, -1});
  expect(matcher.state(0).length == 2 && matcher.state(1).length == 1, "advance");
  std::vector<uint8_t> flags(2);
  matcher.peek(Ids{2, -7}, flags);
  expect(flags[0] == 1 && flags[1] == 0, "peek");
  matcher.advance(Ids{0, 2}, Ids{1, 0});
  expect(!matcher.active(0) && matcher.active(1), "activity moves with the row");
  expect(matcher.state(0).length == 1 && matcher.state(1).length == 3, "reordered");
});

const test::Register long_runs("long verbatim runs and long prompts", [] {
  Random random(7);
  Ids document;
  for (int i = 0; i < 3000; ++i) document.push_back(random.below(50));
  const Corpus unsafe({document}, 50, 1, 2);
  MatchRule rule;
  set_surprisal(rule, std::vector<double>(50, 1.0));
  for (const int64_t max_match : {100, 4096}) {
    Matcher matcher(unsafe.source(), std::nullopt, rule, 1, max_match);
    for (int64_t t = 0; t < 2999; ++t) {
      matcher.advance(Ids{document[static_cast<size_t>(t)]});
      expect(t < 10 || matcher.state(0).length == std::min(t + 1, max_match), "verbatim run");
    }
    std::vector<uint8_t> flags(2);
    matcher.peek(Ids{document[2999]}, std::span(flags).first(1));
    expect(flags[0] == 1, "the last token");
    matcher.advance(Ids{(document[2999] + 1) % 50});
    expect(matcher.state(0).length < 10, "another token");
    Matcher prompt(unsafe.source(), std::nullopt, rule, 1, max_match);
    prompt.extend(std::span(document).first(2999), Ids{0, 2999});
    expect(prompt.state(0).length == std::min<int64_t>(2999, max_match), "prompt");
    expect(prompt.state(0).bci == static_cast<double>(prompt.state(0).length), "its sum");
  }
});

const test::Register no_rows("no rows, no candidates, no tokens", [] {
  const Corpus unsafe({{}}, 3, 1, 4);
  MatchRule rule;
  set_surprisal(rule, std::vector<double>(3, 2.0));
  Matcher none(unsafe.source(), std::nullopt, rule, 0, 4096);
  none.advance({});
  none.extend({}, Ids{0});
  none.peek({}, {});
  expect(none.flagged().empty() && none.batch() == 0, "no rows");
  Matcher one(unsafe.source(), std::nullopt, rule, 1, 4096);
  one.advance(Ids{2});
  one.peek({}, {});
  expect(one.state(0).length == 0 && one.state(0).count == 0, "an index without tokens");
});

}  // namespace
}  // namespace alignops::spans
