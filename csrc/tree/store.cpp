#include "tree/store.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "common/check.h"

namespace alignops::tree {
namespace {

constexpr int64_t kMostNodes = int64_t{1} << 30;
constexpr int64_t kMostLanes = int64_t{1} << 34;
// The same node of two trees should not fall on the same set of a cache: trees lie an odd number of
// lines apart.
constexpr int64_t kNodeSkew = 61;
constexpr int64_t kBlockSkew = 31;

Limits checked(const Limits& limits) {
  ALIGNOPS_CHECK(limits.trees >= 0, "TreeStore: trees must be at least 0, got ", limits.trees);
  ALIGNOPS_CHECK(limits.nodes >= 1 && limits.nodes <= kMostNodes,
                 "TreeStore: capacity must be 1 to ", kMostNodes, " nodes, got ", limits.nodes);
  ALIGNOPS_CHECK(limits.lanes >= kLanes && limits.lanes <= kMostLanes && limits.lanes % kLanes == 0,
                 "TreeStore: edge_capacity must be ", kLanes, " to ", kMostLanes,
                 " lanes and divisible by ", kLanes, ", got ", limits.lanes);
  constexpr int64_t kBytes = int64_t{1} << 46;
  ALIGNOPS_CHECK(limits.trees <= kBytes / (limits.nodes * 64 + limits.lanes * 24),
                 "TreeStore: ", limits.trees, " trees of ", limits.nodes, " nodes and ",
                 limits.lanes, " lanes do not fit the address space; lower the capacities");
  return limits;
}

int32_t class_of(int64_t edges) {
  const auto units = static_cast<uint64_t>((edges + kLanes - 1) / kLanes);
  return units <= 1 ? 0 : static_cast<int32_t>(std::bit_width(units - 1));
}

}  // namespace

Store::Store(const Limits& limits)
    : limits_(checked(limits)),
      node_stride_(limits.nodes + kNodeSkew),
      lane_stride_(limits.lanes + kBlockSkew * kLanes),
      nodes_(static_cast<size_t>(limits.trees * node_stride_) * sizeof(Node)),
      edges_(static_cast<size_t>(limits.trees * lane_stride_ * kLaneBytes)),
      actions_(static_cast<size_t>(limits.trees * lane_stride_) * sizeof(int32_t)),
      trees_(static_cast<size_t>(limits.trees)) {
  for (int64_t t = 0; t < limits.trees; ++t) {
    Tree& tree = trees_[static_cast<size_t>(t)];
    tree.uid = static_cast<uint64_t>(t);
    tree.low = std::numeric_limits<float>::infinity();
    tree.high = -std::numeric_limits<float>::infinity();
    tree.root = make_child(t, kNowhere, 0);
  }
}

void Store::check_node(const char* op, int64_t t, int64_t node) const {
  if (t < 0 || t >= limits_.trees)
    throw NodeIndexError(message(op, ": tree must be 0 to ", limits_.trees - 1, ", got ", t));
  if (node < 0 || node >= tree(t).nodes)
    throw NodeIndexError(
        message(op, ": node of tree ", t, " must be 0 to ", tree(t).nodes - 1, ", got ", node));
}

int32_t Store::make_child(int64_t t, int32_t parent, int32_t slot) {
  Tree& tree = trees_[static_cast<size_t>(t)];
  const int32_t id = tree.nodes++;
  Node& node = nodes(t)[id];
  node = Node{};
  node.parent = parent;
  node.parent_slot = slot;
  node.edge_base = kNoEdges;
  node.raw_value = kNoValue;
  node.payload = kNowhere;
  node.flags = kPending;
  if (parent != kNowhere) {
    Node& above = nodes(t)[parent];
    node.depth = static_cast<uint16_t>(above.depth + 1);
    edges(t, above).child[slot] = id;
  }
  return id;
}

int64_t Store::lanes_for(int64_t edges) { return edges > 0 ? kLanes << class_of(edges) : 0; }

uint32_t Store::take_block(Tree& tree, int32_t size_class) {
  auto& recycled = tree.free[size_class];
  uint32_t base = tree.blocks;
  if (recycled.empty()) {
    tree.blocks += 1u << size_class;
  } else {
    base = recycled.back();
    recycled.pop_back();
  }
  return base;
}

void Store::add_edges(int64_t t, int32_t id, int64_t count) {
  Node& node = nodes(t)[id];
  const int32_t size_class = class_of(count);
  node.edge_base = take_block(trees_[static_cast<size_t>(t)], size_class);
  node.edge_cap_log2 = static_cast<uint8_t>(size_class);
  node.n_edges = static_cast<uint32_t>(count);
  const Edges e = edges(t, node);
  std::fill_n(e.prior, e.cap, 0.0f);
  std::fill_n(e.q, e.cap, kNoValue);
  std::fill_n(e.visits, e.cap, 0.0f);
  std::fill_n(e.child, count, kNotMade);
  std::fill_n(e.child + count, e.cap - count, kPadding);
}

int32_t Store::append_edge(int64_t t, int32_t id, int32_t action, float prior) {
  Node& node = nodes(t)[id];
  if (node.edge_base == kNoEdges) {
    add_edges(t, id, 1);
  } else if (static_cast<int64_t>(node.n_edges) == kLanes << node.edge_cap_log2) {
    Tree& tree = trees_[static_cast<size_t>(t)];
    const Edges old = edges(t, node);
    const int32_t* old_actions = actions(t, node);
    tree.free[node.edge_cap_log2].push_back(node.edge_base);
    add_edges(t, id, old.cap + 1);
    const Edges e = edges(t, node);
    std::copy_n(old.prior, old.cap, e.prior);
    std::copy_n(old.q, old.cap, e.q);
    std::copy_n(old.visits, old.cap, e.visits);
    std::copy_n(old.child, old.cap, e.child);
    std::copy_n(old_actions, old.cap, actions(t, node));
  } else {
    edges(t, node).child[node.n_edges++] = kNotMade;
  }
  const auto slot = static_cast<int32_t>(node.n_edges - 1);
  edges(t, node).prior[slot] = prior;
  actions(t, node)[slot] = action;
  return slot;
}

int64_t Store::bytes() const {
  int64_t total = 0;
  for (const Tree& tree : trees_)
    total += tree.nodes * static_cast<int64_t>(sizeof(Node)) +
             static_cast<int64_t>(tree.blocks) * kLanes *
                 (kLaneBytes + static_cast<int64_t>(sizeof(int32_t)));
  return total;
}

void Store::validate() const {
  for (int64_t t = 0; t < limits_.trees; ++t) validate_tree(t);
}

void Store::validate_tree(int64_t t) const {
  const Tree& tree = trees_[static_cast<size_t>(t)];
  const Node* all = nodes(t);
  const auto fail = [t](int64_t node, const char* what) {
    throw StateError(message("TreeStore.validate: node ", node, " of tree ", t, ": ", what));
  };
  std::vector<int32_t> waiting(static_cast<size_t>(tree.nodes));
  for (const Ticket& ticket : tree.open) ++waiting[static_cast<size_t>(ticket.node)];
  for (const int32_t id : below_root(t)) {
    const Node& node = all[id];
    int32_t pending = waiting[static_cast<size_t>(id)];
    int64_t backups = 0;
    if (node.edge_base != kNoEdges) {
      const Edges e = edges(t, node);
      if (node.n_edges > e.cap) fail(id, "more edges than lanes");
      for (int64_t i = 0; i < e.cap; ++i) {
        const int32_t child = e.child[i];
        if ((i >= node.n_edges) != (child == kPadding)) fail(id, "padding stands between edges");
        if (child < 0) continue;
        if (child >= tree.nodes || all[child].parent != id || all[child].parent_slot != i)
          fail(id, "a child does not know its parent");
        if (all[child].depth != node.depth + 1) fail(child, "depth is not one below the parent");
        pending += all[child].pending;
        backups += all[child].fn;
      }
    }
    if (node.pending != pending) fail(id, "selections in flight do not add up");
    if (node.fn < backups) fail(id, "fewer backups than the children have");
    if (node.parent >= id) fail(id, "is older than its parent");
  }
}

}  // namespace alignops::tree
