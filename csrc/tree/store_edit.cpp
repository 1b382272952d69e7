// Store: a new root, cut edges, and making room.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "common/check.h"
#include "tree/store.h"

namespace alignops::tree {

void Store::check_idle(int64_t t, const char* op) const {
  const size_t open = tree(t).open.size();
  if (open > 0) throw StateError(message(op, ": tree ", t, " has ", open, " selections in flight"));
}

// The root and all nodes below it, breadth first.
std::vector<int32_t> Store::below_root(int64_t t) const {
  std::vector<int32_t> ids{tree(t).root};
  for (size_t i = 0; i < ids.size(); ++i) {
    const Node& node = nodes(t)[ids[i]];
    if (node.edge_base == kNoEdges) continue;
    const Edges e = edges(t, node);
    for (int64_t lane = 0; lane < node.n_edges; ++lane)
      if (e.child[lane] >= 0 && ids.size() < static_cast<size_t>(tree(t).nodes))
        ids.push_back(e.child[lane]);
  }
  return ids;
}

void Store::reroot(int64_t t, int64_t slot) {
  const char* op = "TreeStore.reroot";
  check_idle(t, op);
  Tree& at = trees_[static_cast<size_t>(t)];
  const Node& root = nodes(t)[at.root];
  const int64_t count = root.edge_base == kNoEdges ? 0 : root.n_edges;
  if (slot < 0 || slot >= count)
    throw NodeIndexError(
        message(op, ": edge of tree ", t, " must be 0 to ", count - 1, ", got ", slot));
  const int32_t child = edges(t, root).child[slot];
  if (child == kPruned)
    throw NodeIndexError(message(op, ": edge ", slot, " of tree ", t, " was pruned"));
  if (child == kNotMade && !has_room(t, 1))
    throw CapacityError(message(op, ": tree ", t, " has ", at.nodes, " of ", limits_.nodes,
                                " nodes and needs 1 more"));
  at.root = child == kNotMade ? make_child(t, at.root, static_cast<int32_t>(slot)) : child;
}

void Store::compact(int64_t t, std::span<int32_t> moved) {
  check_idle(t, "TreeStore.compact");
  Tree& at = trees_[static_cast<size_t>(t)];
  Node* all = nodes(t);
  const std::vector<int32_t> kept = below_root(t);
  std::fill(moved.begin(), moved.end(), kNowhere);
  for (size_t i = 0; i < kept.size(); ++i)
    moved[static_cast<size_t>(kept[i])] = static_cast<int32_t>(i);

  // Ids and blocks are given anew, so everything is read before it is written.
  std::vector<Node> records;
  records.reserve(kept.size());
  std::vector<float> lanes;
  std::vector<int32_t> acts;
  for (const int32_t id : kept) {
    records.push_back(all[id]);
    if (all[id].edge_base == kNoEdges) continue;
    const Edges e = edges(t, all[id]);
    const int32_t* a = actions(t, all[id]);
    lanes.insert(lanes.end(), e.prior, e.prior + 4 * e.cap);
    acts.insert(acts.end(), a, a + e.cap);
  }
  at.root = 0;
  at.nodes = static_cast<int32_t>(kept.size());
  at.blocks = 0;
  for (auto& blocks : at.free) blocks.clear();
  size_t lane = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    Node& node = all[i];
    node = records[i];
    node.parent = i == 0 ? kNowhere : moved[static_cast<size_t>(node.parent)];
    if (i == 0) node.parent_slot = 0;
    if (node.edge_base == kNoEdges) continue;
    node.edge_base = at.blocks;
    at.blocks += 1u << node.edge_cap_log2;
    const Edges e = edges(t, node);
    std::copy_n(lanes.data() + 4 * lane, 4 * e.cap, e.prior);
    std::copy_n(acts.data() + lane, e.cap, actions(t, node));
    for (int64_t j = 0; j < node.n_edges; ++j)
      if (e.child[j] >= 0) e.child[j] = moved[static_cast<size_t>(e.child[j])];
    lane += static_cast<size_t>(e.cap);
  }
}

int64_t Store::prune(int64_t t, const Keep& keep) {
  check_idle(t, "TreeStore.prune");
  int64_t cut = 0;
  std::vector<int64_t> order;
  for (const int32_t id : below_root(t)) {
    const Node& node = nodes(t)[id];
    if (node.edge_base == kNoEdges) continue;
    const Edges e = edges(t, node);
    order.clear();
    for (int64_t i = 0; i < node.n_edges; ++i)
      if (e.child[i] >= 0) order.push_back(i);
    const auto rank = [&](int64_t i) {
      const Node& child = nodes(t)[e.child[i]];
      if (!keep.by_value) return static_cast<double>(child.n);
      return child.fn > 0 ? static_cast<double>(child.value) : -HUGE_VAL;
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return rank(a) > rank(b); });
    for (size_t i = 0; i < order.size(); ++i) {
      int32_t& child = e.child[order[i]];
      const Node& below = nodes(t)[child];
      const bool poor = below.fn > 0 && below.value < keep.value;
      if (static_cast<int64_t>(i) < keep.top && below.n >= keep.visits && !poor) continue;
      child = kPruned;
      ++cut;
    }
  }
  return cut;
}

}  // namespace alignops::tree
