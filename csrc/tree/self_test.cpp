#include "tree/self_test.h"

#include <cstddef>
#include <vector>

namespace alignops::tree {
namespace {

// A block with holes: pruned edges, edges without a value, padding, equal scores.
struct Block {
  std::vector<float> lanes;
  std::vector<int32_t> child;
  int64_t cap;

  Block(int64_t lanes_in_block, int64_t edges, uint32_t seed)
      : lanes(static_cast<std::size_t>(3 * lanes_in_block)),
        child(static_cast<std::size_t>(lanes_in_block), kPadding),
        cap(lanes_in_block) {
    const auto next = [&seed] { return (seed = seed * 1664525u + 1013904223u) >> 8; };
    for (int64_t i = 0; i < cap; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const bool edge = i < edges;
      const bool known = edge && next() % 3 != 0;
      lanes[at] = edge ? static_cast<float>(next() % 1000) * 1e-3f : 0.0f;
      lanes[at + static_cast<std::size_t>(cap)] =
          known ? static_cast<float>(next() % 64) * 0.05f - 1.0f : kNoValue;
      lanes[at + static_cast<std::size_t>(2 * cap)] = known ? static_cast<float>(next() % 5) : 0.0f;
      if (edge) child[at] = next() % 7 == 0 ? kPruned : known ? static_cast<int32_t>(i) : kNotMade;
    }
  }

  Edges edges() {
    return {lanes.data(), lanes.data() + cap, lanes.data() + 2 * cap, child.data(), cap};
  }
};

bool same(const Summary& a, const Summary& b) {
  return a.q_min == b.q_min && a.q_max == b.q_max && a.q_sum == b.q_sum && a.seen == b.seen &&
         a.visits == b.visits && a.most == b.most && a.weight == b.weight;
}

bool agree(const Kernels& a, const Kernels& b, const Edges& e, uint32_t word) {
  const PuctArgs puct{-0.5f, 0.7f, 0.25f, 2.3f, false};
  const PuctArgs clipped{-0.5f, 0.7f, 0.25f, 2.3f, true};
  const UctArgs uct{2.1f, 0.8f, 0.1f};
  const DrawArgs draw{1.7f, 2.15f, 0.1f, word};
  return same(a.summarize(e), b.summarize(e)) && a.puct(e, puct) == b.puct(e, puct) &&
         a.puct(e, clipped) == b.puct(e, clipped) && a.uct(e, uct) == b.uct(e, uct) &&
         a.draw(e, draw) == b.draw(e, draw) && a.greedy(e, 0.1f) == b.greedy(e, 0.1f);
}

}  // namespace

bool agrees_with_scalar(const Kernels& candidate) {
  for (uint32_t seed = 1; seed <= 64; ++seed) {
    const int64_t edges = seed % 40 + 1;
    Block block(edges <= 8 ? 8 : edges <= 16 ? 16 : edges <= 32 ? 32 : 64, edges, seed);
    if (!agree(candidate, kEdgesScalar, block.edges(), seed * 2654435761u)) return false;
  }
  return true;
}

}  // namespace alignops::tree
