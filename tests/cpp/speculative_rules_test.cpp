// Rules on chains and trees over rows that are allocated to the exact size: every table of this
// machine and every number of threads decides alike, and nothing beyond the outputs is written.
#include <algorithm>

#include "common/isa.h"
#include "harness.h"
#include "speculative/rules.h"

namespace alignops::speculative {
namespace {

using test::expect;
using test::Guarded;
using test::Random;

// Rows of float32 logits with ties and impossible ids, or of their exponentials over the sum.
std::vector<float> rows_of(Random& random, int64_t count, int64_t size, bool probabilities) {
  std::vector<float> out;
  for (int64_t i = 0; i < count * size; ++i) {
    const float value = random.normal() * 3;
    const bool impossible = random.below(9) == 0 && i % size != 0;
    out.push_back(impossible ? -__builtin_inff() : random.below(3) == 0 ? 1.0f : value);
  }
  if (!probabilities) return out;
  for (float& value : out)
    value = value > 0 ? value / (32.0f * static_cast<float>(size)) : 0x1p-30f;
  return out;
}

struct Result {
  std::vector<int64_t> tokens;
  std::vector<uint8_t> sources;
  std::vector<int64_t> numbers;  // and the path of a tree
  bool operator==(const Result&) const = default;
};

Result result_of(const Emitted& out, const std::vector<int32_t>& path = {}) {
  Result found{{out.tokens, out.tokens + out.count},
               {out.sources, out.sources + out.count},
               {out.accepted, static_cast<int64_t>(out.finished), static_cast<int64_t>(out.error),
                out.state, out.zero_q}};
  found.numbers.insert(found.numbers.end(), path.begin(), path.end());
  return found;
}

struct Problem {
  int64_t size, draft_size, k;
  bool probabilities, certain;
  std::vector<float> target, draft;
  std::vector<int64_t> drafts, parent, eos;
  std::vector<uint8_t> word_start;
  Warp warp;
  uint64_t seed;

  explicit Problem(uint32_t number) {
    Random random(number);
    size = random.pick<int64_t>({1, 2, 7, 33, 500, kTile + 5, 3 * kTile});
    draft_size = random.below(2) == 0 ? size : 1 + random.below(size);
    k = random.below(6);
    probabilities = random.below(5) == 0;
    certain = random.below(3) == 0;
    target = rows_of(random, k + 1, size, probabilities);
    draft = rows_of(random, k + 1, draft_size, probabilities);
    parent.push_back(-1);
    for (int64_t i = 0; i < k; ++i) {
      const float* row = target.data() + i * size;
      const int64_t best = std::max_element(row, row + size) - row;
      drafts.push_back(random.below(2) == 0 ? best : random.below(size));
      parent.push_back(random.below(i + 1));
    }
    eos.push_back(random.below(size));
    for (int64_t i = 0; i < size; ++i) word_start.push_back(random.below(2) == 0 ? 1 : 0);
    warp.temperature = random.pick<float>({0.0f, 0.1f, 1.0f, 20.0f});
    if (!probabilities) {
      warp.top_k = random.pick<int64_t>({0, 1, 3, 400});
      warp.top_p = random.pick<float>({1.0f, 0.9f, 0.3f});
      warp.min_p = random.pick<float>({0.0f, 0.1f, 1.0f});
    }
    seed = static_cast<uint64_t>(random.below(INT64_MAX));
  }

  Rows rows(const std::vector<float>& of, int64_t width) const {
    return {of.data(), DType::kFloat32, probabilities, width, width};
  }
};

// Runs `decide(workspace, out)` with outputs of `room` entries between guards.
template <class Decide>
Result decided(const Problem& problem, const Kernels& table, const ParallelFor& parallel,
               int64_t room, const Decide& decide) {
  Workspace work(table, parallel, problem.size, problem.draft_size, true);
  Guarded<int64_t> tokens(room);
  Guarded<uint8_t> sources(room);
  Emitted out{tokens.data(), sources.data()};
  std::vector<int32_t> path;
  decide(work, out, path);
  expect(tokens.intact() && sources.intact(), "written beyond the outputs");
  return result_of(out, path);
}

Result chain(const Problem& problem, Rule rule, const Kernels& table, const ParallelFor& parallel) {
  // std::vector<bool> has no data; bytes of 0 and 1 are bools.
  Parameters parameters;
  parameters.word_start = reinterpret_cast<const bool*>(problem.word_start.data());
  parameters.eos_ids = problem.eos;
  const Chain row{problem.rows(problem.target, problem.size),
                  problem.certain ? Rows{} : problem.rows(problem.draft, problem.draft_size),
                  nullptr,
                  problem.drafts.data(),
                  problem.k,
                  problem.warp,
                  problem.seed,
                  1000,
                  nullptr,
                  kStateBase,
                  2};
  return decided(problem, table, parallel, problem.k + 1,
                 [&](Workspace& work, Emitted& out, std::vector<int32_t>&) {
                   verify_chain(work, row, rule, parameters, problem.k, out);
                 });
}

Result tree(const Problem& problem, TreeRule rule, const Kernels& table,
            const ParallelFor& parallel) {
  std::vector<int64_t> tokens{0};
  tokens.insert(tokens.end(), problem.drafts.begin(), problem.drafts.end());
  const Tree row{problem.rows(problem.target, problem.size),
                 problem.rows(problem.draft, problem.draft_size),
                 tokens.data(),
                 problem.parent.data(),
                 problem.k + 1,
                 problem.warp,
                 problem.seed,
                 1000,
                 problem.seed % 2 == 0};
  return decided(problem, table, parallel, problem.k + 1,
                 [&](Workspace& work, Emitted& out, std::vector<int32_t>& path) {
                   Guarded<int32_t> nodes(problem.k + 1);
                   verify_tree(work, row, rule, problem.eos, -1, nodes.data(), out);
                   expect(nodes.intact(), "written beyond the path");
                   if (out.error == RowError::kNone)
                     path.assign(nodes.data(), nodes.data() + out.accepted + 1);
                 });
}

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> all{&kRowsScalar};
#if defined(__x86_64__)
  if (isa_supported(Isa::kAvx2)) all.push_back(&kRowsAvx2);
  if (isa_supported(Isa::kAvx512)) all.push_back(&kRowsAvx512);
#endif
  return all;
}

template <class Decide>
void all_agree(const Decide& decide) {
  const ParallelFor serial = serial_for(), threads = threads_for(3);
  const Result one = decide(kRowsScalar, serial);
  expect(one.numbers[2] == static_cast<int64_t>(RowError::kNone), "a row has an error");
  expect(!one.tokens.empty() || one.numbers[1] != 0, "nothing is emitted");
  for (const Kernels* table : tables()) {
    expect(decide(*table, serial) == one, "a table decides otherwise");
    expect(decide(*table, threads) == one, "threads decide otherwise");
  }
}

const test::Register chains("chains: all tables and threads decide alike", [] {
  for (uint32_t number = 0; number < 60; ++number) {
    const Problem problem(number);
    for (int32_t rule = 0; rule < kNumRules; ++rule) {
      if (static_cast<Rule>(rule) == Rule::kNudge || static_cast<Rule>(rule) == Rule::kRsd)
        continue;  // they may emit nothing: below
      all_agree([&](const Kernels& table, const ParallelFor& parallel) {
        return chain(problem, static_cast<Rule>(rule), table, parallel);
      });
    }
    for (const Rule rule : {Rule::kNudge, Rule::kRsd}) {
      const Result one = chain(problem, rule, kRowsScalar, serial_for());
      for (const Kernels* table : tables())
        expect(chain(problem, rule, *table, threads_for(2)) == one, "a table decides otherwise");
    }
  }
});

const test::Register trees("trees: all tables and threads decide alike", [] {
  for (uint32_t number = 100; number < 160; ++number) {
    const Problem problem(number);
    for (int32_t rule = 0; rule < kNumTreeRules; ++rule)
      all_agree([&](const Kernels& table, const ParallelFor& parallel) {
        return tree(problem, static_cast<TreeRule>(rule), table, parallel);
      });
  }
});

const test::Register faults("faults of a row are reported, and nothing is emitted", [] {
  Problem problem(3);
  problem.probabilities = false;
  problem.warp = {};
  problem.target[0] = __builtin_nanf("");
  for (const Rule rule : {Rule::kGreedy, Rule::kLossless, Rule::kBlock, Rule::kCoupled}) {
    const Result found = chain(problem, rule, kernels(), serial_for());
    expect(found.tokens.empty(), "tokens of a row without a law");
    expect(found.numbers[2] == static_cast<int64_t>(RowError::kBadValue), "NaN");
  }
  problem.drafts.assign(1, problem.size);
  problem.k = 1;
  const Result found = chain(problem, Rule::kGreedy, kernels(), serial_for());
  expect(found.numbers[2] == static_cast<int64_t>(RowError::kBadId), "id out of range");
});

const test::Register cuts("cuts: end of text, then the limit", [] {
  int64_t tokens[] = {5, 6, 7, 8};
  uint8_t sources[4] = {};
  const int64_t eos[] = {7};
  const auto after = [&](int64_t remaining) {
    Emitted out{tokens, sources, 4, 3};
    cut(out, eos, remaining);
    return std::vector<int64_t>{out.count, out.accepted, static_cast<int64_t>(out.finished)};
  };
  expect(after(-1) == std::vector<int64_t>{3, 3, 1}, "no limit");
  expect(after(3) == std::vector<int64_t>{3, 3, 1}, "limit at the end of text");
  expect(after(2) == std::vector<int64_t>{2, 2, 2}, "limit before it");
  expect(after(0) == std::vector<int64_t>{0, 0, 2}, "nothing left");
});

}  // namespace
}  // namespace alignops::speculative
