// Search: selections that go on, and trees that widen.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/philox.h"
#include "tree/kernels.h"
#include "tree/search.h"
#include "tree/search_rows.h"

namespace alignops::tree {

void Search::descend(std::span<const int64_t> tickets, std::span<Leaf> out,
                     const ParallelFor& parallel) {
  const char* op = "TreeStore.descend";
  const Order rows = order(tickets, op);
  for (const int64_t ticket : tickets) {
    const int64_t t = ticket >> 32;
    const Node& node = store_.nodes(t)[find(t, ticket).node];
    if ((node.flags & kExpanded) == 0)
      throw StateError(message(op, ": the leaf of ticket ", ticket, " of tree ", t,
                               " has no edges; expand it first"));
    if (!store_.has_room(t, rows.rows_of(t)))
      throw CapacityError(message(op, ": tree ", t, " has ", store_.tree(t).nodes, " of ",
                                  store_.limits().nodes, " nodes and may need ", rows.rows_of(t),
                                  " more"));
  }
  rows.each(parallel, [&](int64_t t, size_t row) {
    Ticket& ticket = find(t, tickets[row]);
    Node* nodes = store_.nodes(t);
    Cursor cursor{t, ticket.node, false};
    ++store_.tree(t).draws;
    while (!advance(cursor)) {
    }
    const bool collision = cursor.node != ticket.node && waits(nodes[cursor.node]);
    for (int32_t id = cursor.node; id != ticket.node; id = nodes[id].parent) {
      ++nodes[id].pending;
      refresh(t, nodes[id]);
    }
    ticket.node = cursor.node;
    out[row] = leaf_at(t, cursor.node, ticket.id);
    out[row].collision = collision;
  });
}

void Search::visit(std::span<const int32_t> tree, std::span<const int32_t> node,
                   std::span<const int32_t> slot, std::span<Leaf> out) {
  const char* op = "TreeStore.visit";
  std::vector<int64_t> more(static_cast<size_t>(store_.size()));
  for (size_t i = 0; i < tree.size(); ++i) {
    const int32_t t = tree[i];
    store_.check_node(op, t, node[i]);
    const Node& at = store_.nodes(t)[node[i]];
    int32_t above = node[i];
    while (above != store_.tree(t).root && above != kNowhere) above = store_.nodes(t)[above].parent;
    if (above == kNowhere)
      throw NodeIndexError(
          message(op, ": node ", node[i], " of tree ", t, " is not below the root"));
    const int64_t edges = at.edge_base == kNoEdges ? 0 : at.n_edges;
    if (slot[i] < 0 || slot[i] >= edges)
      throw NodeIndexError(message(op, ": slot of node ", node[i], " of tree ", t, " must be 0 to ",
                                   edges - 1, ", got ", slot[i]));
    const int32_t child = store_.edges(t, at).child[slot[i]];
    if (child == kPruned)
      throw NodeIndexError(
          message(op, ": edge ", slot[i], " of node ", node[i], " of tree ", t, " was pruned"));
    if (child == kNotMade) ++more[static_cast<size_t>(t)];
    if (!store_.has_room(t, more[static_cast<size_t>(t)]))
      throw CapacityError(message(op, ": tree ", t, " has ", store_.tree(t).nodes, " of ",
                                  store_.limits().nodes, " nodes and needs ",
                                  more[static_cast<size_t>(t)], " more"));
  }
  for (size_t i = 0; i < tree.size(); ++i) {
    const int32_t t = tree[i];
    const Node& at = store_.nodes(t)[node[i]];
    int32_t child = store_.edges(t, at).child[slot[i]];
    if (child == kNotMade) child = store_.make_child(t, node[i], slot[i]);
    out[i] = begin(t, child);
  }
}

// A child counts once more. If it has a value, those above change at once: the draw stands,
// whatever becomes of the selection.
void Search::add_weight(int64_t t, int32_t id, int32_t slot) {
  Node* nodes = store_.nodes(t);
  Node* node = nodes + id;
  const Edges edges = store_.edges(t, *node);
  edges.prior[slot] += 1;
  const double q = edges.q[slot];
  if (backup_.rule != Backing::kSoft || std::isnan(q)) return;
  node->raw_value += 1;
  if (std::isfinite(q) && std::isfinite(node->aux) && std::isfinite(backup_.rate))
    node->value_sum += std::exp(backup_.rate * (q - node->aux));
  set_soft(*node);
  while (node - nodes != store_.tree(t).root) {
    Node* parent = nodes + node->parent;
    const Edges above = store_.edges(t, *parent);
    const float old_q = above.q[node->parent_slot];
    refresh(t, *node);
    update_soft(*parent, above, node->parent_slot, old_q);
    node = parent;
  }
}

Leaf Search::grow_one(int64_t t, int64_t id, int32_t action, bool merge) {
  Ticket& ticket = find(t, id);
  Node& node = store_.nodes(t)[ticket.node];
  int32_t slot = -1;
  if (merge && node.edge_base != kNoEdges) {
    const int32_t* actions = store_.actions(t, node);
    const int32_t* end = actions + node.n_edges;
    const int32_t* same = std::find(actions, end, action);
    if (same != end) {
      slot = static_cast<int32_t>(same - actions);
      add_weight(t, ticket.node, slot);
    }
  }
  if (slot < 0) slot = store_.append_edge(t, ticket.node, action, 1.0f);
  node.flags |= kExpanded;
  int32_t child = store_.edges(t, node).child[slot];
  if (child < 0) {
    child = store_.make_child(t, ticket.node, slot);
    if (backup_.rule == Backing::kSoft) store_.nodes(t)[child].value = node.value;
  }
  Node& below = store_.nodes(t)[child];
  ++below.pending;
  refresh(t, below);
  ticket.node = child;
  return leaf_at(t, child, id);
}

void Search::grow(std::span<const int64_t> tickets, std::span<const int32_t> actions, bool merge,
                  std::span<Leaf> out, const ParallelFor& parallel) {
  const char* op = "TreeStore.grow";
  for (size_t i = 0; i < actions.size(); ++i)
    ALIGNOPS_CHECK(actions[i] >= 0, op, ": actions must be at least 0, got ", actions[i],
                   " in row ", i);
  const Order rows = order(tickets, op);
  std::vector<int64_t> lanes(static_cast<size_t>(store_.size()));
  for (const int64_t id : tickets) {
    const int64_t t = id >> 32;
    const Node& node = store_.nodes(t)[find(t, id).node];
    if ((node.flags & (kTerminal | kTruncated)) != 0)
      throw StateError(message(op, ": the leaf of ticket ", id, " of tree ", t, " is an end"));
    // Several selections may widen the same node in one call.
    lanes[static_cast<size_t>(t)] +=
        Store::lanes_for(static_cast<int64_t>(node.n_edges) + rows.rows_of(t));
  }
  for (int64_t t = 0; t < store_.size(); ++t) {
    const int64_t more = rows.rows_of(t);
    if (more == 0) continue;
    if (!store_.has_room(t, more) ||
        store_.lanes_used(t) + lanes[static_cast<size_t>(t)] > store_.limits().lanes)
      throw CapacityError(message(op, ": tree ", t, " has ", store_.tree(t).nodes, " of ",
                                  store_.limits().nodes, " nodes and ", store_.lanes_used(t),
                                  " of ", store_.limits().lanes, " lanes and may need ", more,
                                  " nodes and ", lanes[static_cast<size_t>(t)], " lanes more"));
  }
  rows.each(parallel, [&](int64_t t, size_t row) {
    out[row] = grow_one(t, tickets[row], actions[row], merge);
  });
}

void Search::descents(int64_t t, double rate, uint64_t seed, std::span<int32_t> out) const {
  const Kernels& table = kernels();
  // Lanes without a value must not be drawn: their priors are hidden.
  std::vector<float> priors;
  for (size_t i = 0; i < out.size(); ++i) {
    int32_t id = store_.tree(t).root;
    while (true) {
      const Node& node = store_.nodes(t)[id];
      if (node.edge_base == kNoEdges) break;
      Edges e = store_.edges(t, node);
      const float best = table.summarize(e).q_max;
      if (best == -std::numeric_limits<float>::infinity()) break;
      int32_t slot = -1;
      if (std::isfinite(rate)) {
        priors.assign(e.prior, e.prior + e.cap);
        for (int64_t j = 0; j < e.cap; ++j)
          if (std::isnan(e.q[j])) priors[static_cast<size_t>(j)] = 0;
        e.prior = priors.data();
        const uint32_t word = philox(seed, static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32),
                                     node.depth, static_cast<uint32_t>(Purpose::kDescent))
                                  .word[0];
        slot = table.draw(e, {static_cast<float>(rate), best, 0.0f, word});
      } else {
        slot = table.greedy(e, -std::numeric_limits<float>::infinity());
      }
      if (slot < 0 || e.child[slot] < 0) break;
      id = e.child[slot];
    }
    out[i] = id;
  }
}

}  // namespace alignops::tree
