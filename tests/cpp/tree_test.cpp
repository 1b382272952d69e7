// The tree core without Python: every level against the scalar one, random operations with all
// invariants checked, values against a recomputation.
#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "harness.h"
#include "tree/kernels.h"
#include "tree/search.h"
#include "tree/self_test.h"

namespace alignops::tree {
namespace {

using test::Random;

// Draws actions, priors and values, and drives a search by random operations.
class Fuzz {
 public:
  Fuzz(int64_t trees, const Policy& policy, const Backup& rule, uint32_t seed, int threads)
      : store_({trees, 3000, 1 << 17}),
        search_(store_, policy, rule, seed),
        rule_(rule),
        grows_(policy.width > 0),
        random_(seed),
        parallel_(threads > 1 ? threads_for(threads) : serial_for()) {}

  void run(int64_t operations) {
    for (int64_t i = 0; i < operations; ++i) {
      const int64_t choice = random_.below(10);
      if (choice < 4) {
        select(random_.below(4));
      } else if (choice < 7) {
        answer(some(), false);
      } else if (choice < 8) {
        answer(some(), true);
      } else if (grows_) {
        grow();
      } else {
        descend();
      }
      if (i % 64 == 0) store_.validate();
    }
    answer(static_cast<int64_t>(open_.size()), false);
    store_.validate();
    check_values();
  }

 private:
  int64_t some() { return random_.below(static_cast<int64_t>(open_.size()) + 1); }

  void select(int64_t k) {
    std::vector<Leaf> leaves(static_cast<size_t>(k * store_.size()));
    for (int64_t t = 0; t < store_.size(); ++t)
      if (!store_.has_room(t, k)) return;
    const int64_t count = search_.select(k, leaves, parallel_);
    open_.insert(open_.end(), leaves.begin(), leaves.begin() + count);
    expand();
  }

  // Edges for some of the leaves that have none; others become ends.
  void expand() {
    std::vector<int32_t> tree, node, actions;
    std::vector<float> priors;
    std::vector<int64_t> ptr{0};
    std::map<std::pair<int32_t, int32_t>, bool> seen;
    for (const Leaf& leaf : open_) {
      const Node& at = store_.nodes(leaf.tree)[leaf.node];
      if ((at.flags & (kExpanded | kTerminal | kDead)) != 0 || at.fn > 0) continue;
      if (!seen.emplace(std::pair(leaf.tree, leaf.node), true).second) continue;
      const int64_t edges = at.depth > 6 ? 0 : random_.below(22) - 1;
      if (edges < 0) {
        search_.end(std::span(&leaf.tree, 1), std::span(&leaf.node, 1));
        continue;
      }
      if (grows_) continue;
      tree.push_back(leaf.tree);
      node.push_back(leaf.node);
      for (int64_t i = 0; i < edges; ++i) {
        actions.push_back(static_cast<int32_t>(i * 3));
        priors.push_back(0.01f + std::fabs(random_.normal()));
      }
      ptr.push_back(static_cast<int64_t>(actions.size()));
    }
    search_.expand({tree, node, ptr.data(), 0, actions.data(), priors.data(), true}, parallel_);
  }

  // Backs up or cancels `count` of the open selections, in random order.
  void answer(int64_t count, bool cancel) {
    for (auto i = static_cast<int64_t>(open_.size()); i > 1; --i)
      std::swap(open_[static_cast<size_t>(i - 1)], open_[static_cast<size_t>(random_.below(i))]);
    std::vector<int64_t> tickets;
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) {
      const Leaf& leaf = open_[static_cast<size_t>(i)];
      const Node& at = store_.nodes(leaf.tree)[leaf.node];
      const bool inside = (at.flags & kExpanded) != 0;
      tickets.push_back(leaf.ticket);
      values.push_back(at.fn > 0 && !inside ? at.raw_value : std::tanh(random_.normal()));
    }
    if (cancel) {
      search_.cancel(tickets, parallel_);
    } else {
      search_.backup(tickets, values, parallel_);
    }
    open_.erase(open_.begin(), open_.begin() + static_cast<int64_t>(tickets.size()));
  }

  void grow() {
    std::vector<int64_t> tickets;
    std::vector<int32_t> actions;
    for (const Leaf& leaf : open_) {
      const Node& at = store_.nodes(leaf.tree)[leaf.node];
      if ((at.flags & (kTerminal | kDead)) != 0 || !store_.has_room(leaf.tree, 100)) continue;
      tickets.push_back(leaf.ticket);
      actions.push_back(static_cast<int32_t>(random_.below(9 + 1)));
    }
    std::vector<Leaf> leaves(tickets.size());
    search_.grow(tickets, actions, random_.below(2) == 1, leaves, parallel_);
    move(leaves);
    expand();
  }

  void descend() {
    std::vector<int64_t> tickets;
    for (const Leaf& leaf : open_)
      if ((store_.nodes(leaf.tree)[leaf.node].flags & (kExpanded | kTerminal)) == kExpanded &&
          store_.has_room(leaf.tree, 100))
        tickets.push_back(leaf.ticket);
    std::vector<Leaf> leaves(tickets.size());
    search_.descend(tickets, leaves, parallel_);
    move(leaves);
    expand();
  }

  void move(const std::vector<Leaf>& leaves) {
    for (const Leaf& leaf : leaves)
      for (Leaf& open : open_)
        if (open.ticket == leaf.ticket) open = leaf;
  }

  // Values again, from the children.
  void check_values() {
    for (int64_t t = 0; t < store_.size(); ++t) {
      for (int32_t id = 0; id < store_.tree(t).nodes; ++id) {
        const Node& node = store_.nodes(t)[id];
        test::expect(node.pending == 0, "nothing is in flight");
        if (node.edge_base == kNoEdges || node.fn == 0) continue;
        const Edges e = store_.edges(t, node);
        double best = -INFINITY, sum = 0, total = 0, mass = 0;
        int64_t seen = 0;
        for (int64_t i = 0; i < e.cap; ++i) {
          if (std::isnan(e.q[i])) continue;
          const Node& child = store_.nodes(t)[e.child[i]];
          test::expect(e.q[i] == child.value && child.fn > 0, "a lane holds the child's value");
          best = std::max<double>(best, e.q[i]);
          sum += e.q[i];
          total += e.prior[i];
          mass += e.prior[i] * std::exp(rule_.rate * e.q[i]);
          ++seen;
        }
        double want = node.value;
        if (rule_.rule == Backing::kMax && seen > 0)
          want = std::isnan(node.raw_value) ? best : std::max<double>(node.raw_value, best);
        if (rule_.rule == Backing::kSoft && seen > 0) want = std::log(mass / total) / rule_.rate;
        if (rule_.rule == Backing::kMean) want = node.value_sum / node.n;
        test::expect(std::fabs(want - node.value) < 2e-5,
                     message("node ", id, " should be worth ", want, ", is ", node.value));
      }
    }
  }

  Store store_;
  Search search_;
  Backup rule_;
  bool grows_;
  Random random_;
  ParallelFor parallel_;
  std::vector<Leaf> open_;
};

Policy policy(Rule rule, Norm norm, Fpu fpu) {
  Policy p;
  p.rule = rule;
  p.norm = norm;
  p.fpu = fpu;
  return p;
}

Policy widening(Rule rule) {
  Policy p = policy(rule, Norm::kNone, Fpu::kParent);
  p.width = 2;
  p.growth = 0.8;
  p.first_visits = 1;
  return p;
}

const test::Register levels("levels choose alike", [] {
  test::expect(agrees_with_scalar(kEdgesScalar), "scalar");
  if (isa_supported(Isa::kAvx2)) test::expect(agrees_with_scalar(kEdgesAvx2), "avx2");
  test::expect(self_test_failure() == nullptr, "self test");
});

const test::Register means("random operations, means", [] {
  Policy loss = policy(Rule::kPuct, Norm::kTree, Fpu::kMeanVisited);
  loss.in_flight = InFlight::kVirtualLoss;
  Policy skip = policy(Rule::kUct, Norm::kNone, Fpu::kInfinite);
  skip.collision = Collision::kSkip;
  uint32_t seed = 1;
  for (const Policy& p : {policy(Rule::kPuct, Norm::kSiblings, Fpu::kLow), loss, skip,
                          policy(Rule::kPuctRain, Norm::kFixed, Fpu::kZero),
                          policy(Rule::kBoltzmann, Norm::kNone, Fpu::kParent)})
    Fuzz(3, p, {}, seed++, 1).run(1500);
});

const test::Register largest("random operations, largest values", [] {
  Fuzz(3, policy(Rule::kUct, Norm::kNone, Fpu::kZero), {Backing::kMax, 1.0, 1.0}, 11, 1).run(1500);
  Fuzz(3, policy(Rule::kPuct, Norm::kSiblings, Fpu::kLow), {Backing::kSubtreeMean, 1.0, 1.0}, 12, 1)
      .run(1500);
});

const test::Register soft("random operations, soft values", [] {
  Fuzz(3, widening(Rule::kBoltzmann), {Backing::kSoft, 1.0, 1.0}, 21, 1).run(1500);
  Fuzz(3, widening(Rule::kUct), {Backing::kSoft, 1.0, 5.0}, 22, 1).run(1500);
});

const test::Register threads("random operations on threads", [] {
  Fuzz(100, policy(Rule::kPuct, Norm::kSiblings, Fpu::kLow), {}, 31, 3).run(200);
  Fuzz(100, widening(Rule::kBoltzmann), {Backing::kSoft, 1.0, 1.0}, 32, 3).run(200);
});

}  // namespace
}  // namespace alignops::tree

int main() { return alignops::test::run_all(); }
