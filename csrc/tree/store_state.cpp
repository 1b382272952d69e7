// Store: copies of its state, to go back to and to keep in files.
#include <algorithm>
#include <numeric>

#include "common/check.h"
#include "tree/columns.h"
#include "tree/store.h"

namespace alignops::tree {
namespace {

template <class T>
void append(std::vector<T>& column, const T* values, int64_t count) {
  column.insert(column.end(), values, values + count);
}

int64_t sum_of(const std::vector<int32_t>& counts, const char* column) {
  int64_t total = 0;
  for (const int32_t count : counts) {
    if (count < 0) throw FormatError(message("column ", column, " has a negative count"));
    total += count;
  }
  return total;
}

template <class T>
void check_length(const std::vector<T>& column, int64_t length, const char* name) {
  if (static_cast<int64_t>(column.size()) != length)
    throw FormatError(
        message("column ", name, " must have ", length, " elements, got ", column.size()));
}

void check_range(int64_t value, int64_t low, int64_t high, const char* name) {
  if (value < low || value > high)
    throw FormatError(message("column ", name, " must hold ", low, " to ", high, ", got ", value));
}

}  // namespace

Snapshot Store::mark() const {
  Snapshot out;
  for (int64_t t = 0; t < limits_.trees; ++t) {
    const Tree& at = tree(t);
    const int64_t lanes = lanes_used(t);
    const auto* blocks =
        reinterpret_cast<const float*>(edges_.data() + t * lane_stride_ * kLaneBytes);
    const auto* acts = reinterpret_cast<const int32_t*>(actions_.data()) + t * lane_stride_;
    out.trees.push_back(
        {at, {nodes(t), nodes(t) + at.nodes}, {blocks, blocks + 4 * lanes}, {acts, acts + lanes}});
  }
  return out;
}

void Store::restore(const Snapshot& snapshot) {
  ALIGNOPS_CHECK(snapshot.trees.size() == trees_.size(), "TreeStore.restore: the mark is of ",
                 snapshot.trees.size(), " trees, the store has ", trees_.size());
  for (int64_t t = 0; t < limits_.trees; ++t) {
    const auto& copy = snapshot.trees[static_cast<size_t>(t)];
    trees_[static_cast<size_t>(t)] = copy.tree;
    std::copy(copy.nodes.begin(), copy.nodes.end(), nodes(t));
    std::copy(copy.lanes.begin(), copy.lanes.end(),
              reinterpret_cast<float*>(edges_.data() + t * lane_stride_ * kLaneBytes));
    std::copy(copy.actions.begin(), copy.actions.end(),
              reinterpret_cast<int32_t*>(actions_.data()) + t * lane_stride_);
  }
}

Columns Store::columns() const {
  Columns c;
  for (int64_t t = 0; t < limits_.trees; ++t) {
    const Tree& at = tree(t);
    c.root.push_back(at.root);
    c.nodes.push_back(at.nodes);
    c.open.push_back(static_cast<int32_t>(at.open.size()));
    c.low.push_back(at.low);
    c.high.push_back(at.high);
    c.uid.push_back(static_cast<int64_t>(at.uid));
    c.draws.push_back(at.draws);
    c.tickets.push_back(at.tickets);
    for (const Ticket& ticket : at.open) {
      c.ticket.push_back(ticket.id);
      c.ticket_node.push_back(ticket.node);
    }
    for (int32_t id = 0; id < at.nodes; ++id) {
      const Node& node = nodes(t)[id];
      const int32_t edges_of = node.edge_base == kNoEdges ? 0 : static_cast<int32_t>(node.n_edges);
      c.parent.push_back(node.parent);
      c.parent_slot.push_back(node.parent_slot);
      c.edges.push_back(edges_of);
      c.depth.push_back(node.depth);
      c.flags.push_back(node.flags);
      c.fn.push_back(node.fn);
      c.pending.push_back(node.pending);
      c.payload.push_back(node.payload);
      c.value_sum.push_back(node.value_sum);
      c.n.push_back(node.n);
      c.value.push_back(node.value);
      c.raw_value.push_back(node.raw_value);
      c.reward.push_back(node.reward);
      c.aux.push_back(node.aux);
      if (edges_of == 0) continue;
      const Edges e = edges(t, node);
      append(c.prior, e.prior, edges_of);
      append(c.q, e.q, edges_of);
      append(c.visits, e.visits, edges_of);
      append(c.child, e.child, edges_of);
      append(c.action, actions(t, node), edges_of);
    }
  }
  return c;
}

void Store::load(const Columns& c) {
  const int64_t trees = limits_.trees;
  const auto per_tree = [&](const auto& column, const char* name) {
    check_length(column, trees, name);
  };
  per_tree(c.root, "root");
  per_tree(c.nodes, "nodes");
  per_tree(c.open, "open");
  per_tree(c.low, "low");
  per_tree(c.high, "high");
  per_tree(c.uid, "uid");
  per_tree(c.draws, "draws");
  per_tree(c.tickets, "tickets");
  const int64_t nodes_in_all = sum_of(c.nodes, "nodes");
  const int64_t open_in_all = sum_of(c.open, "open");
  check_length(c.ticket, open_in_all, "ticket");
  check_length(c.ticket_node, open_in_all, "ticket_node");
  const auto per_node = [&](const auto& column, const char* name) {
    check_length(column, nodes_in_all, name);
  };
  per_node(c.parent, "parent");
  per_node(c.parent_slot, "parent_slot");
  per_node(c.edges, "edges");
  per_node(c.depth, "depth");
  per_node(c.flags, "flags");
  per_node(c.fn, "fn");
  per_node(c.pending, "pending");
  per_node(c.payload, "payload");
  per_node(c.value_sum, "value_sum");
  per_node(c.n, "n");
  per_node(c.value, "value");
  per_node(c.raw_value, "raw_value");
  per_node(c.reward, "reward");
  per_node(c.aux, "aux");
  const int64_t edges_in_all = sum_of(c.edges, "edges");
  check_length(c.prior, edges_in_all, "prior");
  check_length(c.q, edges_in_all, "q");
  check_length(c.visits, edges_in_all, "visits");
  check_length(c.child, edges_in_all, "child");
  check_length(c.action, edges_in_all, "action");

  size_t row = 0, edge = 0, open = 0;
  for (int64_t t = 0; t < trees; ++t) {
    const auto i = static_cast<size_t>(t);
    Tree at;
    at.nodes = c.nodes[i];
    if (at.nodes < 1 || at.nodes > limits_.nodes)
      throw FormatError(message("column nodes: tree ", t, " has ", at.nodes,
                                " nodes, the capacity is ", limits_.nodes));
    check_range(c.root[i], 0, at.nodes - 1, "root");
    check_range(c.draws[i], 0, UINT32_MAX, "draws");
    check_range(c.tickets[i], 0, UINT32_MAX, "tickets");
    at.root = c.root[i];
    at.low = c.low[i];
    at.high = c.high[i];
    at.uid = static_cast<uint64_t>(c.uid[i]);
    at.draws = static_cast<uint32_t>(c.draws[i]);
    at.tickets = static_cast<uint32_t>(c.tickets[i]);
    for (int32_t k = 0; k < c.open[i]; ++k, ++open) {
      check_range(c.ticket[open], t << 32, (t << 32) + at.tickets - 1, "ticket");
      check_range(c.ticket_node[open], 0, at.nodes - 1, "ticket_node");
      at.open.push_back({c.ticket[open], c.ticket_node[open]});
    }
    trees_[i] = at;
    for (int32_t id = 0; id < at.nodes; ++id, ++row) {
      Node& node = nodes(t)[id];
      node = Node{};
      check_range(c.parent[row], kNowhere, id - 1, "parent");
      check_range(c.depth[row], 0, kMaxDepth, "depth");
      check_range(c.flags[row], 0, UINT16_MAX, "flags");
      check_range(c.pending[row], 0, INT32_MAX, "pending");
      check_range(c.parent_slot[row], 0, INT32_MAX, "parent_slot");
      node.parent = c.parent[row];
      node.parent_slot = c.parent_slot[row];
      node.depth = static_cast<uint16_t>(c.depth[row]);
      node.flags = static_cast<uint16_t>(c.flags[row]);
      node.fn = c.fn[row];
      node.pending = c.pending[row];
      node.payload = c.payload[row];
      node.value_sum = c.value_sum[row];
      node.n = c.n[row];
      node.value = c.value[row];
      node.raw_value = c.raw_value[row];
      node.reward = c.reward[row];
      node.aux = c.aux[row];
      node.edge_base = kNoEdges;
      const int32_t count = c.edges[row];
      if (count == 0) {
        if ((node.flags & kExpanded) != 0)
          throw FormatError("column edges: none where flags say some");
        continue;
      }
      if (lanes_used(t) + lanes_for(count) > limits_.lanes)
        throw FormatError(message("column edges: tree ", t, " needs more lanes than its capacity ",
                                  limits_.lanes));
      add_edges(t, id, count);
      const Edges e = edges(t, node);
      for (int32_t j = 0; j < count; ++j, ++edge) {
        check_range(c.child[edge], kPruned, at.nodes - 1, "child");
        e.prior[j] = c.prior[edge];
        e.q[j] = c.q[edge];
        e.visits[j] = c.visits[edge];
        e.child[j] = c.child[edge];
        actions(t, node)[j] = c.action[edge];
      }
    }
    // A climb from any node ends at a root, and passes edges that exist.
    for (int32_t id = 0; id < at.nodes; ++id) {
      const Node& node = nodes(t)[id];
      if (node.parent == kNowhere) continue;
      const Node& above = nodes(t)[node.parent];
      const int64_t lanes = above.edge_base == kNoEdges ? 0 : above.n_edges;
      check_range(node.parent_slot, 0, lanes - 1, "parent_slot");
    }
  }
  try {
    validate();
  } catch (const StateError& error) {
    throw FormatError(error.what());
  }
}

}  // namespace alignops::tree
