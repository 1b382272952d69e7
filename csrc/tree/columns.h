// All trees of a store field by field, as files hold them: independent of how memory is laid out.
#pragma once

#include <cstdint>
#include <vector>

namespace alignops::tree {

struct Columns {
  // One element per tree.
  std::vector<int32_t> root, nodes, open;
  std::vector<float> low, high;
  std::vector<int64_t> uid, draws, tickets;
  // One element per open selection, tree by tree.
  std::vector<int64_t> ticket;
  std::vector<int32_t> ticket_node;
  // One element per node, tree by tree.
  std::vector<int32_t> parent, parent_slot, edges, depth, flags, fn, pending, payload;
  std::vector<double> value_sum;
  std::vector<float> n, value, raw_value, reward, aux;
  // One element per edge, node by node.
  std::vector<float> prior, q, visits;
  std::vector<int32_t> child, action;

  // visit(name, vector) for every column, in the order of files.
  template <class Self, class Visit>
  static void each(Self& c, const Visit& visit) {
    visit("root", c.root);
    visit("nodes", c.nodes);
    visit("open", c.open);
    visit("low", c.low);
    visit("high", c.high);
    visit("uid", c.uid);
    visit("draws", c.draws);
    visit("tickets", c.tickets);
    visit("ticket", c.ticket);
    visit("ticket_node", c.ticket_node);
    visit("parent", c.parent);
    visit("parent_slot", c.parent_slot);
    visit("edges", c.edges);
    visit("depth", c.depth);
    visit("flags", c.flags);
    visit("fn", c.fn);
    visit("pending", c.pending);
    visit("payload", c.payload);
    visit("value_sum", c.value_sum);
    visit("n", c.n);
    visit("value", c.value);
    visit("raw_value", c.raw_value);
    visit("reward", c.reward);
    visit("aux", c.aux);
    visit("prior", c.prior);
    visit("q", c.q);
    visit("visits", c.visits);
    visit("child", c.child);
    visit("action", c.action);
  }
};

}  // namespace alignops::tree
