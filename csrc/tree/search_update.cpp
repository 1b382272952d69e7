// Search: edges for leaves, and values on their way up.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "common/check.h"
#include "tree/kernels.h"
#include "tree/search.h"
#include "tree/search_rows.h"

namespace alignops::tree {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Up to this action id duplicates are found by marking ids.
constexpr int32_t kMarked = 1 << 20;
constexpr float kCountable = 16777216.0f;  // 2^24: float32 counts further ones as nothing
// A soft sum is added up anew after so many updates, and when it shrank by so much at once.
constexpr int32_t kAnew = 256;
constexpr double kShrunk = 1e-3;

}  // namespace

Search::Order Search::order(std::span<const int64_t> tickets, const char* op) const {
  const int64_t trees = store_.size();
  Order out;
  out.begin.assign(static_cast<size_t>(trees) + 1, 0);
  int64_t last = 0;
  bool sorted = true;
  for (const int64_t ticket : tickets) {
    const int64_t t = ticket >> 32;
    if (ticket < 0 || t >= trees)
      throw StateError(message(op, ": ticket ", ticket, " was not given out by this store"));
    ++out.begin[static_cast<size_t>(t) + 1];
    sorted = sorted && t >= last;
    last = t;
  }
  std::partial_sum(out.begin.begin(), out.begin.end(), out.begin.begin());
  if (!sorted) {
    std::vector<int64_t> next(out.begin.begin(), out.begin.end() - 1);
    out.row.resize(tickets.size());
    for (size_t i = 0; i < tickets.size(); ++i)
      out.row[static_cast<size_t>(next[static_cast<size_t>(tickets[i] >> 32)]++)] =
          static_cast<int64_t>(i);
  }
  // Every ticket must be open, and none be here twice: checked before anything is written.
  std::vector<int64_t> ids;
  for (int64_t t = 0; t < trees; ++t) {
    const int64_t begin = out.begin[static_cast<size_t>(t)];
    const int64_t end = out.begin[static_cast<size_t>(t) + 1];
    if (begin == end) continue;
    const auto& open = store_.tree(t).open;
    ids.clear();
    for (int64_t i = begin; i < end; ++i) {
      const auto row = static_cast<size_t>(i);
      const int64_t ticket = tickets[out.row.empty() ? row : static_cast<size_t>(out.row[row])];
      const bool known = std::any_of(open.begin(), open.end(),
                                     [ticket](const Ticket& x) { return x.id == ticket; });
      if (!known || std::find(ids.begin(), ids.end(), ticket) != ids.end())
        throw StateError(message(op, ": ticket ", ticket, " of tree ", t,
                                 " is not open; a selection ends once"));
      if (end - begin > 1) ids.push_back(ticket);
    }
  }
  return out;
}

Ticket& Search::find(int64_t t, int64_t id) {
  auto& open = store_.tree(t).open;
  return *std::find_if(open.begin(), open.end(),
                       [id](const Ticket& ticket) { return ticket.id == id; });
}

// Removes an open ticket; its node.
int32_t Search::take(int64_t t, int64_t id) {
  Ticket& ticket = find(t, id);
  const int32_t node = ticket.node;
  auto& open = store_.tree(t).open;
  ticket = open.back();
  open.pop_back();
  return node;
}

void Search::expand(const Proposals& rows, const ParallelFor& parallel) {
  const char* op = "TreeStore.expand";
  const auto count = static_cast<int64_t>(rows.tree.size());
  std::vector<int64_t> lanes(static_cast<size_t>(store_.size()));
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t t = rows.tree[static_cast<size_t>(i)];
    const int32_t id = rows.node[static_cast<size_t>(i)];
    store_.check_node(op, t, id);
    const Node& node = store_.nodes(t)[id];
    if ((node.flags & (kExpanded | kTerminal)) != 0)
      throw StateError(message(op, ": node ", id, " of tree ", t, " (row ", i, ") is ",
                               (node.flags & kExpanded) != 0 ? "expanded already" : "terminal"));
    const int64_t begin = rows.begin(i), end = rows.begin(i + 1);
    double sum = 0;
    for (int64_t j = begin; j < end; ++j) {
      const float prior = rows.priors[j];
      if (!(prior >= 0) || !std::isfinite(prior))
        throw InvalidPriorError(message(op, ": priors of row ", i, " (tree ", t,
                                        ") must be finite and at least 0, got ", prior));
      sum += prior;
      largest = std::max(largest, rows.actions[j]);
      ALIGNOPS_CHECK(rows.actions[j] >= 0, op, ": actions of row ", i, " must be at least 0, got ",
                     rows.actions[j]);
    }
    if (end > begin && !(sum > 0))
      throw InvalidPriorError(message(op, ": priors of row ", i, " (tree ", t, ") sum to 0"));
    lanes[static_cast<size_t>(t)] += Store::lanes_for(end - begin);
  }
  for (int64_t t = 0; t < store_.size(); ++t) {
    if (store_.lanes_used(t) + lanes[static_cast<size_t>(t)] <= store_.limits().lanes) continue;
    throw CapacityError(message(op, ": tree ", t, " has ", store_.lanes_used(t), " of ",
                                store_.limits().lanes, " lanes and needs ",
                                lanes[static_cast<size_t>(t)], " more"));
  }
  check_distinct(rows, largest);
  const auto write = [&](int64_t i) {
    const int32_t t = rows.tree[static_cast<size_t>(i)];
    const int32_t id = rows.node[static_cast<size_t>(i)];
    Node& node = store_.nodes(t)[id];
    const int64_t begin = rows.begin(i), edges = rows.begin(i + 1) - begin;
    if (edges == 0) {
      node.flags |= kDead;
      return;
    }
    store_.add_edges(t, id, edges);
    node.flags |= kExpanded;
    const Edges e = store_.edges(t, node);
    float sum = 1;
    if (rows.normalize) {
      sum = 0;
      for (int64_t j = 0; j < edges; ++j) sum += rows.priors[begin + j];
    }
    for (int64_t j = 0; j < edges; ++j) e.prior[j] = rows.priors[begin + j] / sum;
    std::copy_n(rows.actions + begin, edges, store_.actions(t, node));
  };
  // Rows of one tree must stay in order: only rows that are by tree are shared out.
  bool apart = true;
  for (int64_t i = 1; i < count; ++i)
    apart = apart && rows.tree[static_cast<size_t>(i)] > rows.tree[static_cast<size_t>(i - 1)];
  if (apart) {
    parallel(0, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) write(i);
    });
  } else {
    for (int64_t i = 0; i < count; ++i) write(i);
  }
}

// Throws std::invalid_argument if a row has an action, or the rows a node, twice.
void Search::check_distinct(const Proposals& rows, int32_t largest) {
  const char* op = "TreeStore.expand";
  const auto count = static_cast<int64_t>(rows.tree.size());
  std::vector<int32_t> sorted;
  if (largest < kMarked && stamps_.size() <= static_cast<size_t>(largest))
    stamps_.resize(static_cast<size_t>(largest) + 1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = rows.begin(i), end = rows.begin(i + 1);
    bool distinct = true;
    if (largest < kMarked) {
      if (++stamp_ == 0) {
        std::fill(stamps_.begin(), stamps_.end(), 0);
        stamp_ = 1;
      }
      for (int64_t j = begin; j < end; ++j) {
        uint32_t& mark = stamps_[static_cast<size_t>(rows.actions[j])];
        distinct = distinct && mark != stamp_;
        mark = stamp_;
      }
    } else {
      sorted.assign(rows.actions + begin, rows.actions + end);
      std::sort(sorted.begin(), sorted.end());
      distinct = std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
    }
    ALIGNOPS_CHECK(distinct, op, ": actions of row ", i, " must be distinct");
  }
  std::vector<std::pair<int32_t, int32_t>> nodes;
  for (int64_t i = 1; i < count; ++i) {
    if (rows.tree[static_cast<size_t>(i)] > rows.tree[static_cast<size_t>(i - 1)]) continue;
    for (int64_t j = 0; j < count; ++j)
      nodes.emplace_back(rows.tree[static_cast<size_t>(j)], rows.node[static_cast<size_t>(j)]);
    std::sort(nodes.begin(), nodes.end());
    const auto twice = std::adjacent_find(nodes.begin(), nodes.end());
    if (twice != nodes.end())
      throw StateError(message(op, ": node ", twice->second, " of tree ", twice->first,
                               " is expanded twice in one call"));
    break;
  }
}

void Search::update_soft(Node& node, const Edges& edges, int32_t slot, float old_q) {
  const double rate = backup_.rate;
  const double q = edges.q[slot];
  const double weight = edges.prior[slot];
  const bool first = std::isnan(old_q);
  bool anew = std::isinf(rate) || (node.fn + 1) % kAnew == 0;
  if ((node.flags & kFromChildren) == 0) {
    node.flags |= kFromChildren;
    node.raw_value = 0;
    node.value_sum = 0;
    node.aux = static_cast<float>(q);
  }
  if (first) node.raw_value += static_cast<float>(weight);
  if (!anew) {
    if (!std::isfinite(node.aux) || !std::isfinite(q)) {
      anew = true;
    } else {
      if (q > node.aux) {
        node.value_sum *= std::exp(rate * (node.aux - q));
        node.aux = static_cast<float>(q);
      }
      const double before = node.value_sum;
      if (!first) node.value_sum -= weight * std::exp(rate * (old_q - node.aux));
      node.value_sum += weight * std::exp(rate * (q - node.aux));
      anew = !(node.value_sum > kShrunk * before);
    }
  }
  if (anew) {
    double best = -std::numeric_limits<double>::infinity();
    double total = 0;
    for (int64_t i = 0; i < edges.cap; ++i) {
      if (std::isnan(edges.q[i]) || !(edges.prior[i] > 0)) continue;
      best = std::max<double>(best, edges.q[i]);
      total += edges.prior[i];
    }
    double sum = 0;
    for (int64_t i = 0; i < edges.cap; ++i) {
      if (std::isnan(edges.q[i]) || !(edges.prior[i] > 0) || std::isinf(best)) continue;
      sum += edges.prior[i] * std::exp(rate * (edges.q[i] - best));
    }
    node.raw_value = static_cast<float>(total);
    node.aux = static_cast<float>(best);
    node.value_sum = sum;
  }
  set_soft(node);
}

void Search::set_soft(Node& node) const {
  if (std::isinf(backup_.rate) || std::isinf(node.aux)) {
    node.value = node.aux;
  } else if (node.raw_value > 0) {
    node.value =
        static_cast<float>(node.aux + std::log(node.value_sum / node.raw_value) / backup_.rate);
  }
}

// What a changed child means for its parent; `slot` is the child's, whose lanes are new.
void Search::update(Node& node, const Edges& edges, int32_t slot, float old_q) {
  switch (backup_.rule) {
    case Backing::kMean:
      node.value = static_cast<float>(node.value_sum / node.n);
      break;
    case Backing::kMax: {
      const float best = kernels().summarize(edges).q_max;
      node.value = std::isnan(node.raw_value) ? best : std::max(node.raw_value, best);
      break;
    }
    case Backing::kSubtreeMean: {
      const Summary seen = kernels().summarize(edges);
      const bool told = !std::isnan(node.raw_value);
      node.value = told ? (node.raw_value + seen.q_sum) / (1 + seen.seen) : seen.q_sum / seen.seen;
      break;
    }
    case Backing::kSoft:
      update_soft(node, edges, slot, old_q);
      break;
  }
}

void Search::backup_one(int64_t t, int32_t leaf, float value) {
  Tree& tree = store_.tree(t);
  Node* nodes = store_.nodes(t);
  Node* node = nodes + leaf;
  double g = value;
  node->flags &= static_cast<uint16_t>(~kPending);
  // A soft value that comes from children is not told by the node any more.
  if ((node->flags & kFromChildren) == 0) {
    node->raw_value = value;
    node->value = value;
  }
  int32_t slot = kNowhere;  // of the child that was updated last
  float old_q = kNoValue;
  while (true) {
    if (backup_.rule == Backing::kMean) node->value_sum += g;
    node->n += 1;
    node->pending -= 1;
    if (slot != kNowhere) {
      update(*node, store_.edges(t, *node), slot, old_q);
    } else if (backup_.rule != Backing::kSoft) {
      update(*node, node->edge_base != kNoEdges ? store_.edges(t, *node) : Edges{}, kNowhere,
             kNoValue);
    }
    node->fn += 1;
    const float seen = edge_value(*node);
    tree.low = std::min(tree.low, seen);
    tree.high = std::max(tree.high, seen);
    if (node - nodes == tree.root) return;
    slot = node->parent_slot;
    Node* parent = nodes + node->parent;
    old_q = store_.edges(t, *parent).q[slot];
    refresh(t, *node);
    g = node->reward + backup_.discount * g;
    node = parent;
  }
}

void Search::backup(std::span<const int64_t> tickets, std::span<const float> values,
                    const ParallelFor& parallel) {
  const char* op = "TreeStore.backup";
  for (size_t i = 0; i < values.size(); ++i) {
    const bool fits =
        std::isfinite(values[i]) || (backup_.rule == Backing::kSoft && values[i] == -kInfinity);
    if (!fits)
      throw InvalidValueError(message(op, ": values must be finite, got ", values[i], " in row ", i,
                                      " (ticket ", tickets[i], ")"));
  }
  const Order rows = order(tickets, op);
  for (int64_t t = 0; t < store_.size(); ++t) {
    const auto more = static_cast<float>(rows.rows_of(t));
    const Tree& tree = store_.tree(t);
    if (more > 0 && store_.nodes(t)[tree.root].n + more > kCountable)
      throw CapacityError(message(op, ": tree ", t, " would have more than 2^24 visits"));
  }
  rows.each(parallel,
            [&](int64_t t, size_t row) { backup_one(t, take(t, tickets[row]), values[row]); });
}

void Search::cancel(std::span<const int64_t> tickets, const ParallelFor& parallel) {
  const Order rows = order(tickets, "TreeStore.cancel");
  rows.each(parallel, [&](int64_t t, size_t row) {
    Node* nodes = store_.nodes(t);
    const int32_t root = store_.tree(t).root;
    for (int32_t id = take(t, tickets[row]);; id = nodes[id].parent) {
      --nodes[id].pending;
      if (id == root) break;
      refresh(t, nodes[id]);
    }
  });
}

}  // namespace alignops::tree
