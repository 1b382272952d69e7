// The CUDA masks, positions and trees of the speculative core, run on the CPU and compared with its
// own.
#include "cuda_on_host.h"
// The kernels come after the host's stand-ins for the CUDA language.
#include "speculative/cuda/layout.cu"

#include <memory>
#include <string>
#include <vector>

#include "harness.h"

namespace alignops::speculative {
namespace {

using cuda::Launch;
using test::expect;
using test::Guarded;
using test::Random;

constexpr const char* kOp = "test";

// Integers on the heap, in the width of a plan.
class Vector {
 public:
  template <class Draw>
  Vector(int64_t size, bool wide, const Draw& draw) : wide_(wide) {
    for (int64_t i = 0; i < size; ++i) {
      values_.push_back(draw(i));
      narrow_.push_back(static_cast<int32_t>(values_.back()));
    }
  }
  operator Ints() const {  // NOLINT(google-explicit-constructor): as a tensor would be
    return {wide_ ? static_cast<const void*>(values_.data()) : narrow_.data(), wide_};
  }
  int64_t operator[](int64_t i) const { return values_[static_cast<size_t>(i)]; }

 private:
  bool wide_;
  std::vector<int64_t> values_;
  std::vector<int32_t> narrow_;
};

constexpr Ints kAbsent{nullptr, false};

// Parents of trees of random sizes, -1 behind them.
Vector sample_parents(Random& random, int64_t rows, int64_t nodes, bool wide) {
  std::vector<int64_t> parents;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t size = 1 + random.below(nodes);
    for (int64_t i = 0; i < nodes; ++i)
      parents.push_back(i == 0 || i >= size ? -1 : random.below(i));
  }
  return {rows * nodes, wide, [&](int64_t i) { return parents[static_cast<size_t>(i)]; }};
}

struct Tables {
  Guarded<int32_t> depth, first_child, next_sibling;
  Guarded<int64_t> ancestors;
  Guarded<bool> block;
  TreeTables args;

  Tables(const Vector& parents, int64_t rows, int64_t n)
      : depth(rows * n),
        first_child(rows * n),
        next_sibling(rows * n),
        ancestors(rows * n),
        block(rows * n * n),
        args{parents,
             rows,
             n,
             depth.data(),
             ancestors.data(),
             first_child.data(),
             next_sibling.data(),
             block.data()} {}
  bool operator==(const Tables& other) const {
    return depth == other.depth && first_child == other.first_child &&
           next_sibling == other.next_sibling && ancestors == other.ancestors &&
           block == other.block;
  }
  bool intact() const {
    return depth.intact() && first_child.intact() && next_sibling.intact() && ancestors.intact() &&
           block.intact();
  }
};

const test::Register trees("tree tables equal the CPU's; bad parents write nothing outside", [] {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    const int64_t rows = random.below(4), n = random.pick<int64_t>({1, 2, 7, 63, 64});
    const Vector parents = sample_parents(random, rows, n, seed % 2 == 0);
    Tables wanted(parents, rows, n), got(parents, rows, n);
    Launch launch{};
    check_tree(kOp, wanted.args);
    fill_tree(wanted.args);
    cuda::fill_tree(got.args, launch);
    expect(got == wanted && got.intact(), "seed " + std::to_string(seed));
    const Vector bad(rows * n, seed % 2 == 0, [&](int64_t) { return random.below(2000) - 1000; });
    Tables damaged(bad, rows, n);
    cuda::fill_tree(damaged.args, launch);
    expect(damaged.intact(), "bad parents, seed " + std::to_string(seed));
  }
});

struct MaskCase {
  Random random;
  bool wide;
  int64_t rows, columns, slots;
  std::unique_ptr<Vector> content, counts, pad, first, positions, parents;
  std::unique_ptr<Tables> tree;
  std::vector<int64_t> windows;
  MaskArgs args{};

  template <class Draw>
  std::unique_ptr<Vector> vector(int64_t size, const Draw& draw) {
    return std::make_unique<Vector>(size, wide, draw);
  }

  explicit MaskCase(uint32_t seed) : random(seed), wide(seed % 2 == 0) {
    rows = random.below(4);
    columns = random.pick<int64_t>({1, 2, 6, 20});
    const int64_t longest = random.pick<int64_t>({0, 1, 30, 1100});
    content = vector(rows, [&](int64_t) { return random.below(longest + 1); });
    const bool in_tree = random.below(3) == 0;
    if (random.below(2) == 0)
      counts = vector(rows, [&](int64_t) { return random.below(columns + 1); });
    if (random.below(2) == 0) pad = vector(rows, [&](int64_t) { return random.below(9); });
    if (random.below(2) == 0)
      first = vector(rows, [&](int64_t row) {
        return (pad ? (*pad)[row] : 0) + std::max<int64_t>((*content)[row] - 1, 0) +
               random.below(5);
      });
    slots = longest + columns + 15;
    if (random.below(3) == 0)
      positions = vector(rows * slots, [&](int64_t) { return random.below(longest + 3) - 1; });
    for (int64_t i = random.below(3) * random.below(6) + 1; i > 0; --i)
      windows.push_back(random.pick<int64_t>({0, 1, 4, 700}));
    const auto ints = [](const std::unique_ptr<Vector>& v) {
      return v ? static_cast<Ints>(*v) : kAbsent;
    };
    args.queries = {rows, columns, *content, ints(counts), kAbsent, false};
    if (in_tree) {
      args.queries.depth_shared = args.ancestors_shared = rows > 0 && random.below(2) == 0;
      parents = std::make_unique<Vector>(
          sample_parents(random, args.ancestors_shared ? 1 : rows, columns, wide));
      tree = std::make_unique<Tables>(*parents, args.ancestors_shared ? 1 : rows, columns);
      fill_tree(tree->args);
      args.queries.depth = {tree->depth.data(), false};
      args.ancestors = {tree->ancestors.data(), true};
    }
    args.slots = slots;
    args.pad = ints(pad);
    args.first = ints(first);
    args.positions = ints(positions);
    args.windows = windows.data();
    args.window_count = static_cast<int64_t>(windows.size());
    args.kind = static_cast<MaskKind>(random.below(4));
    args.element = 1;
    if (args.kind == MaskKind::kAdditive) {
      args.element = random.pick<int32_t>({2, 4, 8});
      args.hidden = 0xfbfefdfcfbfaf9f8;
    }
  }
  int64_t lines() const {
    return args.kind == MaskKind::kRow ? rows : args.window_count * rows * columns;
  }
  int64_t bytes() const {
    return lines() * (args.kind == MaskKind::kBits ? (slots + 31) / 32 * 4 : slots * args.element);
  }
};

const test::Register masks("masks of all kinds equal the CPU's", [] {
  for (uint32_t seed = 0; seed < 200; ++seed) {
    MaskCase c(seed);
    Guarded<uint64_t> wanted(c.bytes() / 8 + 1), got(c.bytes() / 8 + 1);
    check_mask(kOp, c.args);
    c.args.out = wanted.data();
    if (c.args.kind == MaskKind::kRow) {
      fill_row_mask(c.args, 0, c.lines());
    } else {
      fill_mask(c.args, 0, c.lines());
    }
    c.args.out = got.data();
    Launch launch{};
    expect(cuda::fill_mask(c.args, launch) == cudaSuccess, "launch");
    expect(got == wanted && got.intact(), "seed " + std::to_string(seed));
  }
});

const test::Register bad_lengths("lengths that do not fit write nothing outside", [] {
  for (uint32_t seed = 0; seed < 100; ++seed) {
    MaskCase c(seed);
    const auto bad = [&](int64_t size) {
      return c.vector(size, [&](int64_t) {
        return c.random.pick<int64_t>({-1000000, -1, 0, 3, 1000000, INT32_MAX});
      });
    };
    const auto content = bad(c.rows), first = bad(c.rows), counts = bad(c.rows);
    c.args.queries.content = *content;
    c.args.queries.counts = *counts;
    c.args.first = *first;
    Guarded<uint64_t> out(c.bytes() / 8 + 1);
    c.args.out = out.data();
    Launch launch{};
    cuda::fill_mask(c.args, launch);
    expect(out.intact(), "seed " + std::to_string(seed));
  }
});

const test::Register positions("positions and offsets equal the CPU's", [] {
  for (uint32_t seed = 0; seed < 80; ++seed) {
    MaskCase c(seed);
    const std::string name = "seed " + std::to_string(seed);
    Launch launch{};
    const int64_t size = c.rows * c.columns;
    Guarded<int64_t> wanted(size), got(size);
    query_positions(c.args.queries, wanted.data());
    cuda::query_positions(c.args.queries, got.data(), launch);
    expect(got == wanted && got.intact(), name);
    const Vector pad(c.rows, c.wide, [&](int64_t) { return c.random.below(9); });
    column_positions(*c.content, pad, c.rows, c.columns, wanted.data());
    cuda::column_positions(*c.content, pad, c.rows, c.columns, got.data(), launch);
    expect(got == wanted && got.intact(), name + ", columns");

    const int64_t rows = c.random.pick<int64_t>({0, 1, 255, 256, 257, 700});
    const Vector content(rows, c.wide, [&](int64_t) { return c.random.below(50); });
    const Vector counts(rows, c.wide, [&](int64_t) { return c.random.below(c.columns + 1); });
    const Queries queries{rows,    c.columns, content, seed % 3 == 0 ? kAbsent : counts,
                          kAbsent, false};
    Guarded<int32_t> a(rows + 1), b(rows + 1), x(rows + 1), y(rows + 1);
    offsets(kOp, queries, a.data(), b.data());
    cuda::offsets(queries, x.data(), y.data(), launch);
    expect(a == x && b == y && x.intact() && y.intact(), name + ", offsets");
  }
});

const test::Register realign("plans of realignment equal the CPU's", [] {
  for (uint32_t seed = 0; seed < 40; ++seed) {
    Random random(seed);
    const int64_t rows = random.pick<int64_t>({0, 1, 5, 256, 600}), width = 40;
    const bool wide = seed % 2 == 0;
    const Vector content(rows, wide, [&](int64_t) { return random.below(width + 1); });
    const Vector pad(rows, wide, [&](int64_t i) { return width - content[i]; });
    const Vector emitted(rows, wide, [&](int64_t) { return random.below(8); });
    std::vector<Guarded<int32_t>> out(8, Guarded<int32_t>(rows));
    const auto args = [&](size_t i) {
      return Realign{
          content,          pad, emitted, rows, out[i].data(), out[i + 1].data(), out[i + 2].data(),
          out[i + 3].data()};
    };
    plan_realign(kOp, args(0));
    Launch launch{};
    cuda::plan_realign(args(4), launch);
    for (size_t i = 0; i < 4; ++i)
      expect(out[i] == out[i + 4] && out[i + 4].intact(), "seed " + std::to_string(seed));
  }
});

const test::Register selection("the best nodes equal the CPU's; orphans and NaN are harmless", [] {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    const int64_t rows = random.below(4), m = random.pick<int64_t>({1, 5, 64, 300});
    const int64_t best = random.below(std::min<int64_t>(m, 63) + 1);
    std::vector<double> scores;
    const Vector parents(rows * m, seed % 2 == 0, [&](int64_t i) {
      const int64_t parent = random.below(i % m + 1) - 1;
      const double above = parent < 0 ? 0 : scores[static_cast<size_t>(i / m * m + parent)];
      scores.push_back(above - static_cast<double>(random.below(3)));  // often equal
      return parent;
    });
    const std::vector<float> narrow(scores.begin(), scores.end());
    const bool wide = random.below(2) == 0;
    const auto select = [&](const void* values, bool doubles, bool on_gpu) {
      Guarded<int32_t> nodes(rows * best), parent(rows * (best + 1));
      const TreeSelection s{values, doubles, parents, rows, m, best, nodes.data(), parent.data()};
      Launch launch{};
      if (on_gpu) {
        cuda::select_tree(s, launch);
      } else {
        select_tree(kOp, s);
      }
      expect(nodes.intact() && parent.intact(), "seed " + std::to_string(seed));
      return std::pair(nodes, parent);
    };
    const void* values = wide ? static_cast<const void*>(scores.data()) : narrow.data();
    expect(select(values, wide, true) == select(values, wide, false),
           "seed " + std::to_string(seed));
    std::vector<double> random_scores(scores.size());
    for (double& score : random_scores)
      score = random.below(4) == 0 ? std::nan("") : static_cast<double>(random.normal());
    auto [nodes, parent] = select(random_scores.data(), true, true);
    for (int64_t i = 0; i < rows * best; ++i) expect(nodes[i] >= 0 && nodes[i] < m, "a candidate");
    for (int64_t i = 0; i < rows * (best + 1); ++i)
      expect(parent[i] >= -1 && parent[i] < i % (best + 1), "a parent that comes before");
  }
});

}  // namespace
}  // namespace alignops::speculative
