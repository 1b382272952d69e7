#include "tree/search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/philox.h"
#include "tree/kernels.h"
#include "tree/search_rows.h"

namespace alignops::tree {
namespace {

constexpr int64_t kGroup = 16;  // trees that descend in turns
constexpr float kInfinity = std::numeric_limits<float>::infinity();

float finite_or(float x, float otherwise) { return std::isfinite(x) ? x : otherwise; }

// Between what PUCT puts Q.
struct Range {
  float low, inverse;
};

// Equal siblings are all worth 0; a tree that has seen one value only keeps its scale.
Range between(double low, double high, const Policy& policy) {
  const double width = std::max(high - low, policy.floor) + policy.widen;
  if (!(high > low) && policy.norm == Norm::kTree) return {0.0f, 1.0f};
  if (!(high >= low) || !(width > 0)) return {0.0f, 0.0f};
  return {static_cast<float>(low), static_cast<float>(1.0 / width)};
}

}  // namespace

Search::Search(Store& store, const Policy& policy, const Backup& backup, uint64_t seed)
    : store_(store),
      policy_(policy),
      backup_(backup),
      seed_(seed),
      counts_(static_cast<size_t>(store.size())) {
  ALIGNOPS_CHECK(policy.in_flight != InFlight::kVirtualLoss || backup.rule == Backing::kMean,
                 "TreeStore: virtual loss changes the values of edges, which only backup by means "
                 "does not read");
}

double Search::visits_of(const Node& node, const Edges& edges) const {
  if (policy_.total == Total::kChildren) return kernels().summarize(edges).visits;
  const double visits = node.n + policy_.first_visits;
  switch (policy_.in_flight) {
    case InFlight::kCount:
      return visits + node.pending;
    case InFlight::kVirtualLoss:
      return visits + policy_.loss_weight * node.pending;
    case InFlight::kNone:
      break;
  }
  return visits;
}

// Progressive widening. A power that is a whole number but for its rounding counts as that number.
bool Search::may_grow(const Node& node, const Edges& edges) const {
  if (!(policy_.width > 0)) return false;
  const double visits = static_cast<double>(node.n) + node.pending + policy_.first_visits;
  const double room = std::ceil(policy_.width * std::pow(visits, policy_.growth) * (1 - 1e-12));
  return kernels().summarize(edges).weight < room;
}

// Whether a selection that ends here has to wait for another one's evaluation.
bool Search::waits(const Node& node) const {
  const bool grows = policy_.width > 0 && (node.flags & (kTerminal | kDead)) == 0;
  return node.pending > 0 && !grows;
}

int32_t Search::pick(int64_t t, const Node& node, const Edges& edges) const {
  const Kernels& table = kernels();
  const Tree& tree = store_.tree(t);
  Summary seen{};
  const bool look = policy_.norm == Norm::kSiblings || policy_.fpu == Fpu::kMeanVisited ||
                    (policy_.fpu == Fpu::kLow && policy_.norm == Norm::kNone) ||
                    policy_.rule == Rule::kBoltzmann;
  if (look) seen = table.summarize(edges);

  const auto unvisited = [&]() -> float {
    switch (policy_.fpu) {
      case Fpu::kZero:
        return 0;
      case Fpu::kLow:
        return finite_or(seen.q_min, 0);
      case Fpu::kParent:
        return node.value;
      case Fpu::kMeanVisited:
        return (node.value + seen.q_sum) / (1 + seen.seen);
      case Fpu::kInfinite:
        break;
    }
    return kInfinity;
  };

  switch (policy_.rule) {
    case Rule::kPuct:
    case Rule::kPuctRain: {
      Range range{0, 1};
      if (policy_.norm == Norm::kTree) {
        range = between(tree.low, tree.high, policy_);
      } else if (policy_.norm == Norm::kFixed) {
        range = between(policy_.low, policy_.high, policy_);
      } else if (policy_.norm == Norm::kSiblings) {
        range =
            between(std::min(seen.q_min, node.value), std::max(seen.q_max, node.value), policy_);
      }
      float blank = 0;
      if (policy_.fpu == Fpu::kLow && policy_.norm == Norm::kNone) blank = unvisited();
      if (policy_.fpu != Fpu::kZero && policy_.fpu != Fpu::kLow) {
        blank = (unvisited() - range.low) * range.inverse;
        if (policy_.clip) blank = std::clamp(blank, 0.0f, 1.0f);
      }
      const double n = visits_of(node, edges);
      const double factor = policy_.rule == Rule::kPuctRain
                                ? policy_.c
                                : policy_.c1 + std::log((n + policy_.c2 + 1) / policy_.c2);
      return table.puct(edges, {range.low, range.inverse, blank,
                                static_cast<float>(std::sqrt(n) * factor), policy_.clip});
    }
    case Rule::kUct: {
      const double n = std::max(visits_of(node, edges), 1.0);
      return table.uct(
          edges, {static_cast<float>(std::log(n)), static_cast<float>(policy_.c), unvisited()});
    }
    case Rule::kBoltzmann: {
      const float blank = unvisited();
      const uint32_t word = philox(seed_, static_cast<uint32_t>(tree.uid), tree.draws, node.depth,
                                   static_cast<uint32_t>(Purpose::kDraw))
                                .word[0];
      const bool blanks = seen.seen < static_cast<float>(node.n_edges);
      const float shift = std::max(seen.q_max, blanks ? blank : -kInfinity);
      return table.draw(edges,
                        {static_cast<float>(policy_.rate), finite_or(shift, 0), blank, word});
    }
    case Rule::kGreedy:
      break;
  }
  return table.greedy(edges, unvisited());
}

// The parent's lanes of this node.
void Search::refresh(int64_t t, const Node& node) {
  const Edges e = store_.edges(t, store_.nodes(t)[node.parent]);
  float q = node.fn > 0 ? edge_value(node) : kNoValue;
  float visits = node.n + static_cast<float>(policy_.first_visits);
  if (policy_.in_flight == InFlight::kCount) {
    visits += static_cast<float>(node.pending);
  } else if (policy_.in_flight == InFlight::kVirtualLoss && node.pending > 0) {
    const auto lost = static_cast<float>(policy_.loss_weight * node.pending);
    const auto loss = static_cast<float>(policy_.loss);
    q = node.fn > 0 ? q + (loss - q) * lost / (lost + std::max(0.25f, node.n)) : loss;
    visits += lost;
  }
  e.q[node.parent_slot] = q;
  e.visits[node.parent_slot] = visits;
}

Leaf Search::leaf_at(int64_t t, int32_t id, int64_t ticket) const {
  const Node& leaf = store_.nodes(t)[id];
  const bool end = (leaf.flags & (kTerminal | kDead | kTruncated)) != 0;
  const int32_t parent = id == store_.tree(t).root ? kNowhere : leaf.parent;
  return {static_cast<int32_t>(t), id,    parent, leaf.parent_slot, leaf.depth, false,
          end && leaf.fn > 0,      ticket};
}

// A selection of this leaf is in flight from now on.
Leaf Search::begin(int64_t t, int32_t leaf) {
  Tree& tree = store_.tree(t);
  Node* nodes = store_.nodes(t);
  const bool collision = waits(nodes[leaf]);
  const int64_t ticket = (t << 32) | tree.tickets++;
  tree.open.push_back({ticket, leaf});
  for (int32_t id = leaf;; id = nodes[id].parent) {
    ++nodes[id].pending;
    if (id == tree.root) break;
    refresh(t, nodes[id]);
  }
  Leaf out = leaf_at(t, leaf, ticket);
  out.collision = collision;
  return out;
}

void Search::arrive(int64_t t, const Cursor& cursor, Leaf* out, int32_t& count) {
  ++store_.tree(t).draws;
  if (policy_.collision == Collision::kSkip && waits(store_.nodes(t)[cursor.node])) return;
  out[count++] = begin(t, cursor.node);
}

// One edge further; true at a leaf.
bool Search::advance(Cursor& cursor) {
  const int64_t t = cursor.tree;
  Node& node = store_.nodes(t)[cursor.node];
  if ((node.flags & (kExpanded | kTerminal | kDead | kTruncated)) != kExpanded) return true;
  const Edges e = store_.edges(t, node);
  if (!cursor.loaded) {
    for (int64_t lane = 0; lane < 4 * e.cap; lane += 16) __builtin_prefetch(e.prior + lane);
    cursor.loaded = true;
    return false;
  }
  cursor.loaded = false;
  if (may_grow(node, e)) return true;
  const int32_t slot = pick(t, node, e);
  if (slot < 0) {
    node.flags |= kDead;
    return true;
  }
  if (const int32_t child = e.child[slot]; child != kNotMade) {
    cursor.node = child;
    __builtin_prefetch(store_.nodes(t) + child);
    return false;
  }
  cursor.node = store_.make_child(t, cursor.node, slot);
  // Until something is backed up, a state is worth what its parent is.
  if (backup_.rule == Backing::kSoft) store_.nodes(t)[cursor.node].value = node.value;
  return true;
}

void Search::select_range(int64_t begin, int64_t end, int64_t k, Leaf* out, int32_t* counts) {
  Cursor cursors[kGroup];
  for (int64_t first = begin; first < end; first += kGroup) {
    const int64_t trees = std::min(kGroup, end - first);
    for (int64_t i = 0; i < trees; ++i) counts[first + i] = 0;
    for (int64_t round = 0; round < k; ++round) {
      int64_t active = trees;
      for (int64_t i = 0; i < trees; ++i)
        cursors[i] = {first + i, store_.tree(first + i).root, false};
      while (active > 0) {
        for (int64_t i = 0; i < active;) {
          const int64_t t = cursors[i].tree;
          if (advance(cursors[i])) {
            arrive(t, cursors[i], out + t * k, counts[t]);
            cursors[i] = cursors[--active];
          } else {
            ++i;
          }
        }
      }
    }
  }
}

int64_t Search::select(int64_t k, std::span<Leaf> out, const ParallelFor& parallel) {
  const int64_t trees = store_.size();
  ALIGNOPS_CHECK(k >= 0, "TreeStore.select: k must be at least 0, got ", k);
  for (int64_t t = 0; t < trees; ++t) {
    if (store_.has_room(t, k)) continue;
    throw CapacityError(message("TreeStore.select: tree ", t, " has ", store_.tree(t).nodes, " of ",
                                store_.limits().nodes, " nodes and may need ", k, " more"));
  }
  for (int64_t t = 0; t < trees; ++t)
    store_.tree(t).open.reserve(store_.tree(t).open.size() + static_cast<size_t>(k));
  parallel(0, trees, kGrain, [&](int64_t begin, int64_t end) {
    select_range(begin, end, k, out.data(), counts_.data());
  });
  int64_t total = 0;
  for (int64_t t = 0; t < trees; ++t) {
    if (total != t * k)
      std::copy_n(out.data() + t * k, counts_[static_cast<size_t>(t)], out.data() + total);
    total += counts_[static_cast<size_t>(t)];
  }
  return total;
}

void Search::end(std::span<const int32_t> tree, std::span<const int32_t> node) {
  const char* op = "TreeStore.end";
  for (size_t i = 0; i < tree.size(); ++i) {
    store_.check_node(op, tree[i], node[i]);
    if ((store_.nodes(tree[i])[node[i]].flags & kExpanded) != 0)
      throw StateError(message(op, ": node ", node[i], " of tree ", tree[i], " has edges"));
  }
  for (size_t i = 0; i < tree.size(); ++i) store_.nodes(tree[i])[node[i]].flags |= kTerminal;
}

void Search::reward(std::span<const int32_t> tree, std::span<const int32_t> node,
                    std::span<const float> rewards) {
  const char* op = "TreeStore.set_rewards";
  for (size_t i = 0; i < tree.size(); ++i) {
    store_.check_node(op, tree[i], node[i]);
    if (store_.nodes(tree[i])[node[i]].fn > 0)
      throw StateError(
          message(op, ": node ", node[i], " of tree ", tree[i], " was backed up already"));
    if (!std::isfinite(rewards[i]))
      throw InvalidValueError(
          message(op, ": rewards must be finite, got ", rewards[i], " in row ", i));
  }
  for (size_t i = 0; i < tree.size(); ++i) store_.nodes(tree[i])[node[i]].reward = rewards[i];
}

}  // namespace alignops::tree
