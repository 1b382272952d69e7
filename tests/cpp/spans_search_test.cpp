// Search kernels of every level against counting by comparison, and their behaviour on damaged
// arrays.
#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "harness.h"
#include "spans/kernels.h"
#include "spans/self_test.h"
#include "spans/small_shard.h"

namespace alignops::spans {
namespace {

using test::expect;
using test::Random;
using Tokens = std::vector<uint32_t>;

constexpr uint32_t kSep = SmallShard::kSep;

std::vector<std::pair<std::string, const Kernels*>> levels() {
  std::vector<std::pair<std::string, const Kernels*>> out{{"scalar", &kSearchScalar}};
#if defined(__x86_64__)
  if (isa_supported(Isa::kAvx2)) out.emplace_back("avx2", &kSearchAvx2);
  if (isa_supported(Isa::kAvx512)) out.emplace_back("avx512", &kSearchAvx512);
#endif
  return out;
}

// Documents of random ids, of runs copied from earlier text, or of one id.
Tokens sample_text(Random& random, int64_t size, int64_t vocab) {
  Tokens text;
  while (static_cast<int64_t>(text.size()) < size) {
    const int64_t kind = random.below(4), length = random.below(200);
    const int64_t source = text.empty() ? 0 : random.below(static_cast<int64_t>(text.size()));
    const auto constant = static_cast<uint32_t>(random.below(vocab));
    for (int64_t i = 0; i < length; ++i) {
      const auto j = static_cast<size_t>(source + i);
      if (kind == 0) {
        text.push_back(constant);
      } else if (kind == 1 && j < text.size() && text[j] != kSep) {
        text.push_back(text[j]);
      } else {
        text.push_back(static_cast<uint32_t>(random.below(vocab)));
      }
    }
    text.push_back(kSep);
  }
  return text;
}

// Queries over one string of tokens: pieces of the text, changed or not, and random ids.
struct Batch {
  Tokens ids;
  std::vector<int64_t> begin, end;

  int64_t size() const { return static_cast<int64_t>(begin.size()); }
  void add(const Tokens& query) {
    begin.push_back(static_cast<int64_t>(ids.size()));
    ids.insert(ids.end(), query.begin(), query.end());
    end.push_back(static_cast<int64_t>(ids.size()));
  }
  Tokens query(int64_t i) const {
    const auto b = begin[static_cast<size_t>(i)], e = end[static_cast<size_t>(i)];
    return Tokens(ids.begin() + b, ids.begin() + e);
  }
};

Batch sample_queries(Random& random, const Tokens& text, int64_t vocab, int64_t count) {
  Batch batch;
  for (int64_t i = 0; i < count; ++i) {
    Tokens query;
    const int64_t length = random.pick<int64_t>({0, 1, 2, 3, 5, 8, 13, 31, 70, 150});
    auto at = static_cast<size_t>(random.below(static_cast<int64_t>(text.size())));
    for (int64_t j = 0; j < length; ++j, ++at) {
      const bool copied = i % 4 != 3 && at < text.size() && text[at] != kSep;
      query.push_back(copied ? text[at] : static_cast<uint32_t>(random.below(vocab)));
    }
    if (i % 4 == 1 && length > 0) query.back() = static_cast<uint32_t>(random.below(vocab));
    batch.add(query);
  }
  return batch;
}

// Ranks of the suffixes that agree with the query in `length` tokens, as comparison tells.
std::pair<int64_t, int64_t> interval(const Tokens& text, const SmallShard& small,
                                     const Tokens& query, size_t length) {
  int64_t less = 0, equal = 0;
  for (const uint64_t position : small.suffixes()) {
    const auto from = text.begin() + static_cast<int64_t>(position);
    const auto to = from + std::min<int64_t>(static_cast<int64_t>(length), text.end() - from);
    const auto stop = query.begin() + static_cast<int64_t>(length);
    if (std::equal(from, to, query.begin(), stop)) {
      ++equal;
    } else if (std::lexicographical_compare(from, to, query.begin(), stop)) {
      ++less;
    }
  }
  return {less, less + equal};
}

struct Intervals {
  explicit Intervals(int64_t count)
      : lo(static_cast<size_t>(count)),
        hi(static_cast<size_t>(count)),
        length(static_cast<size_t>(count)) {}
  std::vector<int64_t> lo, hi, length;
  bool operator==(const Intervals&) const = default;
};

Fault find(const Kernels& kernels, const SmallShard& small, const Shard& shard, const Batch& batch,
           Intervals& out) {
  const auto tokens = small.tokens(batch.ids);
  return kernels.find(
      shard, {{tokens.data(), batch.begin.data(), batch.end.data()}, out.lo.data(), out.hi.data()},
      0, batch.size());
}

Fault match(const Kernels& kernels, const SmallShard& small, const Shard& shard, const Batch& batch,
            bool intervals, Intervals& out) {
  const auto tokens = small.tokens(batch.ids);
  return kernels.match(shard,
                       {{tokens.data(), batch.begin.data(), batch.end.data()},
                        out.length.data(),
                        intervals ? out.lo.data() : nullptr,
                        intervals ? out.hi.data() : nullptr},
                       0, batch.size());
}

bool ok(const Fault& fault) { return fault.status == Status::kOk; }

struct Case {
  SmallShard::Options options;
  int64_t alphabet;
};

const std::vector<Case> kCases = {
    {{1, 4, 1, false, false}, 1},    {{1, 4, 8, false, true}, 3},
    {{1, 5, 255, true, false}, 250}, {{2, 4, 4, false, false}, 4},
    {{2, 4, 60000, false, true}, 2}, {{2, 5, 60000, true, false}, 60000},
    {{4, 4, 70000, true, true}, 3},  {{4, 5, 100, false, true}, 90},
};

void for_each_case(const std::function<void(Random&, const Case&, const Tokens&)>& body) {
  Random random(7);
  for (const Case& c : kCases) {
    for (const int64_t size : {1, 40, 1500}) body(random, c, sample_text(random, size, c.alphabet));
  }
}

const test::Register agree("search kernels agree with counting", [] {
  for_each_case([](Random& random, const Case& c, const Tokens& text) {
    const SmallShard small(text, c.options);
    const Batch batch = sample_queries(random, text, c.alphabet, 150);
    Intervals found(batch.size()), matched(batch.size());
    for (int64_t i = 0; i < batch.size(); ++i) {
      const Tokens query = batch.query(i);
      const auto k = static_cast<size_t>(i);
      std::tie(found.lo[k], found.hi[k]) = interval(text, small, query, query.size());
      size_t length = query.size();
      auto best = interval(text, small, query, length);
      while (length > 0 && best.first == best.second) best = interval(text, small, query, --length);
      matched.length[k] = static_cast<int64_t>(length);
      std::tie(matched.lo[k], matched.hi[k]) = best;
    }
    for (const auto& [name, kernels] : levels()) {
      Intervals out(batch.size());
      expect(ok(find(*kernels, small, small.view(), batch, out)) && out == found, name + " find");
      expect(ok(match(*kernels, small, small.view(), batch, true, out)) && out == matched,
             name + " match");
      Intervals lengths(batch.size());
      expect(ok(match(*kernels, small, small.view(), batch, false, lengths)) &&
                 lengths.length == matched.length,
             name + " match, lengths only");
    }
  });
});

const test::Register steps("narrow, tokens_at and positions agree with find", [] {
  for_each_case([](Random& random, const Case& c, const Tokens& text) {
    const SmallShard small(text, c.options);
    const Shard shard = small.view();
    Batch batch = sample_queries(random, text, c.alphabet, 150);
    Batch context = batch;
    Tokens last;
    std::vector<int64_t> depth;
    for (size_t i = 0; i < batch.begin.size(); ++i) {
      const bool empty = batch.begin[i] == batch.end[i];
      if (!empty) --context.end[i];
      last.push_back(empty ? 0 : batch.ids[static_cast<size_t>(batch.end[i]) - 1]);
      depth.push_back(context.end[i] - context.begin[i]);
    }
    const auto tokens = small.tokens(last);
    for (const auto& [name, kernels] : levels()) {
      Intervals whole(batch.size()), out(batch.size());
      expect(ok(find(*kernels, small, shard, batch, whole)), name + " find");
      expect(ok(find(*kernels, small, shard, context, out)), name + " find");
      const Fault fault = kernels->narrow(
          shard,
          {tokens.data(), out.lo.data(), out.hi.data(), depth.data(), out.lo.data(), out.hi.data()},
          0, batch.size());
      expect(ok(fault), name + " narrow");
      for (size_t i = 0; i < batch.begin.size(); ++i) {
        if (batch.begin[i] == batch.end[i]) continue;
        expect(out.hi[i] - out.lo[i] == whole.hi[i] - whole.lo[i] &&
                   (out.lo[i] == whole.lo[i] || out.lo[i] == out.hi[i]),
               name + " narrow");
      }
      const auto count = static_cast<int64_t>(shard.suf_size);
      std::vector<int64_t> rank, ahead, position(shard.suf_size);
      for (int64_t r = 0; r < count; ++r) {
        rank.push_back(r);
        ahead.push_back(random.below(4) == 0 ? random.below(3000) : random.below(5));
      }
      std::vector<uint32_t> token(shard.suf_size);
      expect(ok(kernels->positions(shard, {rank.data(), position.data()}, 0, count)) &&
                 std::equal(position.begin(), position.end(), small.suffixes().begin()),
             name + " positions");
      expect(ok(kernels->tokens_at(shard, {rank.data(), ahead.data(), token.data()}, 0, count)),
             name + " tokens_at");
      for (size_t r = 0; r < token.size(); ++r) {
        const size_t at = small.suffixes()[r] + static_cast<size_t>(ahead[r]);
        const uint32_t expected = at < text.size() && text[at] != kSep
                                      ? text[at]
                                      : static_cast<uint32_t>(separator(c.options.token_bytes));
        expect(token[r] == expected, name + " tokens_at");
      }
    }
  });
});

// The empty shard has no suffix, and a range of a batch touches no other output.
const test::Register corners("empty shards and ranges", [] {
  const SmallShard none({kSep}, {2, 4, 10, false, true});
  const SmallShard some({1, 2, 1, kSep}, {2, 4, 10, false, false});
  Batch batch;
  for (const Tokens& query : std::vector<Tokens>{{}, {1}, {1, 2}, {9, 9}}) batch.add(query);
  for (const auto& [name, kernels] : levels()) {
    Intervals out(4);
    expect(ok(match(*kernels, none, none.view(), batch, true, out)) && out == Intervals(4),
           name + " empty match");
    expect(ok(find(*kernels, none, none.view(), batch, out)) && out == Intervals(4),
           name + " empty find");
    const auto tokens = some.tokens(batch.ids);
    const FindArgs args{
        {tokens.data(), batch.begin.data(), batch.end.data()}, out.lo.data(), out.hi.data()};
    out.lo = out.hi = {-1, -1, -1, -1};
    expect(ok(kernels->find(some.view(), args, 1, 3)), name + " range");
    expect(out.lo == std::vector<int64_t>{-1, 0, 0, -1} &&
               out.hi == std::vector<int64_t>{-1, 2, 1, -1},
           name + " range");
  }
});

// Blocks of an array: which are verified, and which the kernels asked for.
struct Watch {
  explicit Watch(uint64_t bytes) : blocks((bytes >> kBlockShift) + 1), bits(blocks / 64 + 1) {}
  uint64_t blocks;
  std::vector<uint64_t> bits, asked;
  uint64_t refused = UINT64_MAX;

  Guard guard() { return {bits.data(), &Watch::verify, this}; }
  static bool verify(void* context, uint64_t block) noexcept {
    auto& self = *static_cast<Watch*>(context);
    self.asked.push_back(block);
    if (block == self.refused) return false;
    self.bits[block / 64] |= uint64_t{1} << (block % 64);
    return true;
  }
};

const test::Register guards("every block is verified before it is read", [] {
  Random random(3);
  for (const auto& [token_bytes, pointer_bytes] : {std::pair{1, 5}, {2, 4}, {4, 5}}) {
    const SmallShard::Options options{token_bytes, pointer_bytes, 250, false, false};
    Tokens text = sample_text(random, 150000, 200);
    // A long document that occurs twice, so that comparisons cross blocks.
    const Tokens copy(text.begin(), text.begin() + 40000);
    text.insert(text.end(), copy.begin(), copy.end());
    text.push_back(kSep);
    const SmallShard small(text, options);
    Batch batch = sample_queries(random, text, 200, 400);
    for (const auto& [name, kernels] : levels()) {
      Intervals expected(batch.size());
      expect(ok(match(*kernels, small, small.view(), batch, true, expected)), name);
      for (const Array array : {Array::kText, Array::kSuf}) {
        Shard shard = small.view();
        Watch watch_text(shard.text_size * static_cast<uint64_t>(token_bytes));
        Watch watch_suf(shard.suf_size * static_cast<uint64_t>(pointer_bytes));
        shard.text_guard = watch_text.guard();
        shard.suf_guard = watch_suf.guard();
        Intervals out(batch.size());
        expect(ok(match(*kernels, small, shard, batch, true, out)) && out == expected,
               name + " guarded");
        Watch& watch = array == Array::kText ? watch_text : watch_suf;
        std::vector<uint64_t> asked = watch.asked;
        expect(asked.size() > 1, name + " guards are asked");
        std::sort(asked.begin(), asked.end());
        expect(std::adjacent_find(asked.begin(), asked.end()) == asked.end(),
               name + " a set bit is not asked again");
        watch.refused = asked[asked.size() / 2];
        std::fill(watch.bits.begin(), watch.bits.end(), 0);
        const Fault fault = match(*kernels, small, shard, batch, true, out);
        expect(fault.status == Status::kCorrupt && fault.array == array &&
                   fault.index == watch.refused,
               name + " a refused block is reported");
      }
    }
  }
});

const test::Register straddle("a comparison verifies every block it runs through", [] {
  const Tokens run(100000, 1);
  Tokens text = run;
  text.push_back(kSep);
  text.insert(text.end(), run.begin(), run.end());
  text.push_back(kSep);
  const SmallShard small({0, kSep}, {2, 4, 2, false, false});
  // Only the first and the second suffix of `text` are in SUF: sorting all would take long.
  std::vector<uint16_t> narrow_text;
  for (const uint32_t id : text) narrow_text.push_back(static_cast<uint16_t>(id));
  const std::vector<uint32_t> suf{0, 100001};
  const std::vector<uint64_t> first{0, 0, 2};
  Shard shard = small.view();
  shard.text = narrow_text.data();
  shard.text_size = narrow_text.size();
  shard.suf = suf.data();
  shard.suf_size = suf.size();
  shard.first = first.data();
  Batch batch;
  batch.add(run);
  for (const auto& [name, kernels] : levels()) {
    Watch watch(narrow_text.size() * 2);
    shard.text_guard = watch.guard();
    Intervals out(1);
    expect(ok(find(*kernels, small, shard, batch, out)) && out.hi[0] - out.lo[0] == 2, name);
    expect(watch.asked.size() == watch.blocks, name + " all blocks");
  }
});

const test::Register damaged("an entry of SUF outside the text is reported", [] {
  Random random(5);
  for (const int32_t pointer_bytes : {4, 5}) {
    const Tokens text = sample_text(random, 400, 3);
    const SmallShard small(text, {2, pointer_bytes, 3, false, false});
    Shard shard = small.view();
    const Batch batch = sample_queries(random, text, 3, 200);
    const auto width = static_cast<size_t>(pointer_bytes);
    const auto* intact = static_cast<const uint8_t*>(shard.suf);
    std::vector<uint8_t> suf(intact, intact + shard.suf_size * width);
    shard.suf = suf.data();
    for (const auto& [name, kernels] : levels()) {
      for (size_t rank = 0; rank < shard.suf_size; rank += 7) {
        std::fill_n(suf.begin() + static_cast<int64_t>(rank * width), width, uint8_t{0xFF});
        Intervals out(batch.size());
        std::vector<int64_t> ranks{static_cast<int64_t>(rank)}, zero{0}, position{0};
        std::vector<uint32_t> token{0};
        const Fault searched = match(*kernels, small, shard, batch, true, out);
        expect(ok(searched) || (searched.status == Status::kBadPointer && searched.index == rank),
               name + " match");
        const Fault listed = kernels->positions(shard, {ranks.data(), position.data()}, 0, 1);
        expect(listed.status == Status::kBadPointer && listed.index == rank, name + " positions");
        const Fault read =
            kernels->tokens_at(shard, {ranks.data(), zero.data(), token.data()}, 0, 1);
        expect(read.status == Status::kBadPointer && read.index == rank, name + " tokens_at");
        std::copy_n(intact + rank * width, width, suf.begin() + static_cast<int64_t>(rank * width));
      }
      // Any order of positions inside the text ends in an answer or a fault, never outside.
      for (int round = 0; round < 20; ++round) {
        std::vector<uint8_t> shuffled;
        for (uint64_t rank = 0; rank < shard.suf_size; ++rank) {
          const int64_t position = random.below(static_cast<int64_t>(shard.text_size));
          for (size_t i = 0; i < width; ++i)
            shuffled.push_back(static_cast<uint8_t>(position >> (8 * i)));
        }
        Shard wrong = shard;
        wrong.suf = shuffled.data();
        Intervals out(batch.size());
        match(*kernels, small, wrong, batch, true, out);
        find(*kernels, small, wrong, batch, out);
      }
    }
  }
});

const test::Register short_suffix("a suffix shorter than its neighbours agree is reported", [] {
  const SmallShard small({1, 1, 1, 1, 1, 1, 1, 3, kSep}, {2, 4, 4, false, false});
  Batch batch;
  batch.add({1, 1, 1, 1, 1, 2});
  Shard shard = small.view();
  // Ranks 3 and 5 agree with the query in five tokens; the text ends behind the one between them.
  std::vector<uint32_t> suf{0, 0, 0, 0, 8, 2, 2, 7};
  shard.suf = suf.data();
  for (const auto& [name, kernels] : levels()) {
    Intervals out(1);
    const Fault fault = find(*kernels, small, shard, batch, out);
    expect(fault.status == Status::kBadPointer && fault.index == 4, name);
    suf[4] = 9;  // the end of the text is outside
    const int64_t rank = 4;
    int64_t position = 0;
    const Fault outside = kernels->positions(shard, {&rank, &position}, 0, 1);
    expect(outside.status == Status::kBadPointer && outside.index == 4, name + " outside");
    suf[4] = 8;
  }
});

const test::Register self_test("self-test accepts this machine's tables and notices errors", [] {
  for (const auto& [name, kernels] : levels()) expect(agrees_with_scalar(*kernels), name);
  expect(self_test_failure() == nullptr, "a level was replaced");
  const auto rejects = [](const auto& change, const char* what) {
    Kernels table = kSearchScalar;
    change(table);
    expect(!agrees_with_scalar(table), what);
  };
  rejects(
      [](Kernels& t) {
        t.find = [](const Shard& shard, const FindArgs& a, int64_t begin, int64_t end) {
          const Fault fault = kSearchScalar.find(shard, a, begin, end);
          ++a.hi[end - 1];
          return fault;
        };
      },
      "find");
  rejects(
      [](Kernels& t) {
        t.match = [](const Shard& shard, const MatchArgs& a, int64_t begin, int64_t end) {
          const Fault fault = kSearchScalar.match(shard, a, begin, end);
          --a.length[begin];
          return fault;
        };
      },
      "match");
  rejects(
      [](Kernels& t) {
        t.narrow = [](const Shard& shard, const NarrowArgs& a, int64_t begin, int64_t end) {
          const Fault fault = kSearchScalar.narrow(shard, a, begin, end);
          ++a.out_lo[end - 1];
          return fault;
        };
      },
      "narrow");
  rejects(
      [](Kernels& t) {
        t.tokens_at = [](const Shard& shard, const TokensAtArgs& a, int64_t begin, int64_t end) {
          const Fault fault = kSearchScalar.tokens_at(shard, a, begin, end);
          a.out[begin] ^= 1;
          return fault;
        };
      },
      "tokens_at");
  rejects(
      [](Kernels& t) {
        t.positions = [](const Shard&, const PositionsArgs&, int64_t, int64_t) {
          return Fault{Status::kBadPointer, Array::kSuf, 0};
        };
      },
      "positions");
});

}  // namespace
}  // namespace alignops::spans
