// The CUDA kernels of the spans core, run on the CPU and compared with the search kernels and the
// matcher of the CPU.
#include "cuda_on_host.h"
// The kernels come after the host's stand-ins for the CUDA language.
#include "spans/cuda/search.cu"

#include <string>
#include <vector>

#include "harness.h"
#include "spans/matcher.h"
#include "spans/small_shard.h"

namespace alignops::spans {
namespace {

using cuda::Launch;
using test::expect;
using test::Random;
using Ids = std::vector<int64_t>;

constexpr uint32_t kSep = SmallShard::kSep;

struct World {
  SmallShard::Options options;
  std::vector<uint32_t> text;
};

World sample_world(Random& random) {
  World w;
  w.options.token_bytes = random.pick<int32_t>({1, 2, 4});
  w.options.pointer_bytes = random.pick<int32_t>({4, 5});
  w.options.vocab = static_cast<uint64_t>(random.pick<int64_t>({1, 2, 5, 200}));
  const int64_t size = random.below(400);
  while (std::ssize(w.text) < size) {
    const int64_t length = random.below(60), source = random.below(std::ssize(w.text) + 1);
    const bool copied = random.below(2) == 0;
    for (int64_t i = source; i < source + length; ++i) {
      const auto j = static_cast<size_t>(i);
      w.text.push_back(
          copied && j < w.text.size() && w.text[j] != kSep
              ? w.text[j]
              : static_cast<uint32_t>(random.below(static_cast<int64_t>(w.options.vocab))));
    }
    w.text.push_back(kSep);
  }
  w.text.push_back(kSep);
  return w;
}

struct Rows {
  Ids tokens, offsets{0};

  Ids row(size_t i) const { return {tokens.begin() + offsets[i], tokens.begin() + offsets[i + 1]}; }
};

Rows sample_rows(Random& random, const World& w, int64_t count) {
  Rows rows;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = random.pick<int64_t>({0, 1, 2, 5, 20, 33, 64, 100});
    auto from = static_cast<size_t>(random.below(std::ssize(w.text)));
    for (int64_t n = 0; n < length; ++n, ++from) {
      const bool copied = from < w.text.size() && w.text[from] != kSep && random.below(30) > 0;
      rows.tokens.push_back(copied ? w.text[from]
                                   : random.below(static_cast<int64_t>(w.options.vocab)));
    }
    rows.offsets.push_back(std::ssize(rows.tokens));
  }
  return rows;
}

Ids sample_candidates(Random& random, const World& w, const Rows& rows, int64_t width) {
  Ids out;
  for (size_t r = 0; r + 1 < rows.offsets.size(); ++r)
    for (int64_t k = 0; k < width; ++k) {
      const Ids row = rows.row(r);
      int64_t next = random.below(static_cast<int64_t>(w.options.vocab));
      for (size_t i = 0; i + 1 < w.text.size() && !row.empty() && k % 2 == 0; ++i)
        if (w.text[i] == row.back() && w.text[i + 1] != kSep && random.below(3) == 0)
          next = w.text[i + 1];
      out.push_back(next);
    }
  return out;
}

void check(Random& random, const World& w, const std::string& name) {
  const SmallShard small(w.text, w.options);
  const Rows rows = sample_rows(random, w, 40);
  const int64_t count = std::ssize(rows.offsets) - 1, width = 3;
  const Ids candidates = sample_candidates(random, w, rows, width);
  const cuda::RowArgs args{small.view(), rows.tokens.data(), std::ssize(rows.tokens),
                           rows.offsets.data(), count};
  const auto items = static_cast<size_t>(count * width);
  Launch launch{};

  const auto find = [&](const Ids& query) {
    const auto tokens = small.tokens({query.begin(), query.end()});
    const int64_t begin = 0, end = std::ssize(query);
    Ids interval(2);
    kSearchScalar.find(small.view(), {{tokens.data(), &begin, &end}, &interval[0], &interval[1]}, 0,
                       1);
    return interval;
  };

  Ids intervals(static_cast<size_t>(2 * count), -1), counts(items, -1);
  cuda::find(args, intervals.data(), launch);
  cuda::next_counts(args, candidates.data(), width, counts.data(), launch);
  for (size_t r = 0; r < static_cast<size_t>(count); ++r) {
    expect(Ids{intervals[2 * r], intervals[2 * r + 1]} == find(rows.row(r)), name + ", find");
    for (size_t k = 0; k < static_cast<size_t>(width); ++k) {
      Ids query = rows.row(r);
      query.push_back(candidates[r * static_cast<size_t>(width) + k]);
      const Ids wanted = find(query);
      expect(counts[r * static_cast<size_t>(width) + k] == wanted[1] - wanted[0],
             name + ", next_counts");
    }
  }

  std::vector<double> surprisal;
  for (uint64_t t = 0; t < w.options.vocab; ++t) surprisal.push_back(std::abs(random.normal()));
  MatchRule rule;
  rule.tau = std::abs(random.normal()) * 5;
  rule.min_len = 1 + random.below(4);
  rule.max_count = random.pick<int64_t>({INT64_MAX, 1, 3});
  rule.surprisal = surprisal;
  Source source;
  source.shards = {small.view()};
  Matcher matcher(source, std::nullopt, rule, count, 4096);
  matcher.extend(rows.tokens, rows.offsets);
  std::vector<MatchState> wanted(items);
  matcher.peek_exact(candidates, wanted);

  const std::unique_ptr<bool[]> flags(new bool[items]);
  Ids length(items, -1), number(items, -1);
  std::vector<double> bci(items, -1);
  cuda::peek(args,
             {candidates.data(), width, surprisal.data(), rule.tau, rule.min_len, rule.max_count,
              flags.get(), length.data(), number.data(), bci.data()},
             launch);
  for (size_t i = 0; i < items; ++i)
    expect(flags[i] == wanted[i].flag && length[i] == wanted[i].length &&
               number[i] == wanted[i].count && bci[i] == wanted[i].bci,
           name + ", peek: " + std::to_string(length[i]) + ", " + std::to_string(number[i]) +
               "; want " + std::to_string(wanted[i].length) + ", " +
               std::to_string(wanted[i].count));
}

const test::Register parity("CUDA kernels agree with those of the CPU", [] {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    check(random, sample_world(random), "seed " + std::to_string(seed));
  }
});

// Memory is allocated to the exact size: sanitizers see what is read outside.
const test::Register damage("ids, offsets, ranks and positions that do not exist are harmless", [] {
  Random random(99);
  World w = sample_world(random);
  while (w.text.size() < 100 || w.options.vocab < 5) w = sample_world(random);
  const SmallShard small(w.text, w.options);
  Rows rows = sample_rows(random, w, 10);
  const Ids bad{-1, static_cast<int64_t>(w.options.vocab),
                static_cast<int64_t>(separator(w.options.token_bytes)), INT64_MAX, INT64_MIN};
  Ids candidates;
  for (int64_t i = 0; i < 10; ++i) candidates.push_back(bad[static_cast<size_t>(i) % bad.size()]);
  std::vector<double> surprisal(w.options.vocab, 1.0);
  std::vector<uint64_t> first(w.options.vocab + 1);
  std::vector<uint8_t> suf(small.suffixes().size() * static_cast<size_t>(w.options.pointer_bytes),
                           0xFF);
  Launch launch{};
  const auto run = [&](const Shard& shard) {
    const cuda::RowArgs args{shard, rows.tokens.data(), std::ssize(rows.tokens),
                             rows.offsets.data(), 10};
    Ids intervals(20), counts(10), length(10), number(10);
    std::vector<double> bci(10);
    const std::unique_ptr<bool[]> flags(new bool[10]);
    cuda::find(args, intervals.data(), launch);
    cuda::next_counts(args, candidates.data(), 1, counts.data(), launch);
    cuda::peek(args,
               {candidates.data(), 1, surprisal.data(), 1, 1, INT64_MAX, flags.get(), length.data(),
                number.data(), bci.data()},
               launch);
    return std::pair(counts, length);
  };
  const auto [counts, length] = run(small.view());
  expect(counts == Ids(10) && length == Ids(10), "ids outside the vocabulary occur nowhere");
  for (int64_t& t : rows.tokens)
    if (random.below(5) == 0) t = random.pick(bad);
  run(small.view());
  Shard shard = small.view();
  shard.suf = suf.data();
  run(shard);
  shard = small.view();
  for (uint64_t& f : first) f = random.below(2) == 0 ? UINT64_MAX : 7;
  shard.first = first.data();
  run(shard);
  for (int64_t& o : rows.offsets) o = random.pick(bad);
  run(small.view());
});

const test::Register empty("no rows, no candidates, no suffixes", [] {
  const SmallShard small({kSep}, {.token_bytes = 2, .pointer_bytes = 4, .vocab = 3});
  const Ids tokens{1, 2}, offsets{0, 0, 2}, candidates{1, 2};
  Launch launch{};
  Ids intervals(4, -1), counts(2, -1);
  const cuda::RowArgs args{small.view(), tokens.data(), 2, offsets.data(), 2};
  cuda::find(args, intervals.data(), launch);
  cuda::next_counts(args, candidates.data(), 1, counts.data(), launch);
  expect(intervals == Ids(4) && counts == Ids(2), "an index without tokens");
  const Ids zero{0};
  const cuda::RowArgs none{small.view(), nullptr, 0, zero.data(), 0};
  expect(cuda::find(none, nullptr, launch) == cudaSuccess && launch.grid == 0, "no rows");
  expect(cuda::next_counts(args, nullptr, 0, nullptr, launch) == cudaSuccess && launch.grid == 0,
         "no candidates");
});

}  // namespace
}  // namespace alignops::spans

int main() { return alignops::test::run_all(); }
