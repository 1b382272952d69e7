// One iteration of a search over all trees: select leaves, give them edges, back their values up.
//
// Trees never share anything, so threads take ranges of them, and results depend neither on the
// number of threads nor on the order of the trees. Within a thread several trees descend in turns:
// while one waits for its next record, the others compute.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/parallel.h"
#include "policy.h"
#include "store.h"

namespace alignops::tree {

// A selected leaf.
struct Leaf {
  int32_t tree, node;
  int32_t parent, slot;  // the edge into it; kNowhere, 0 at a root
  int32_t depth;
  bool collision;  // another selection in flight waits for this very leaf
  bool evaluated;  // an end that was backed up before: nothing is to be asked
  int64_t ticket;
};

// Edges for the nodes of some rows: row i has the elements [begin(i), begin(i + 1)).
struct Proposals {
  std::span<const int32_t> tree, node;
  const int64_t* ptr;  // or null: every row has `width`
  int64_t width;
  const int32_t* actions;
  const float* priors;
  bool normalize;  // to a sum of 1; else they are weights as they are

  int64_t begin(int64_t i) const { return ptr != nullptr ? ptr[i] : i * width; }
};

class Search {
 public:
  Search(Store& store, const Policy& policy, const Backup& backup, uint64_t seed);

  // Up to `k` leaves of each tree, by tree and in the order of their selection, into `out`, which
  // has room for k * trees. Returns how many. Throws CapacityError if a tree may lack room.
  int64_t select(int64_t k, std::span<Leaf> out, const ParallelFor& parallel);

  // Goes on with selections whose leaf has edges by now, each from where it stands; `out` has one
  // leaf per ticket. Throws StateError for a ticket that is not open or whose leaf has no edges,
  // CapacityError.
  void descend(std::span<const int64_t> tickets, std::span<Leaf> out, const ParallelFor& parallel);

  // Selects the child behind an edge of a node, whatever the policy would say; one leaf per row.
  // Throws NodeIndexError, CapacityError.
  void visit(std::span<const int32_t> tree, std::span<const int32_t> node,
             std::span<const int32_t> slot, std::span<Leaf> out);

  // Gives each selection's leaf one more child and moves the selection there. If `merge`, a child
  // behind an edge of the same action is taken and its weight rises by 1; a new edge has weight 1.
  // Throws StateError for a ticket that is not open or whose leaf is an end, CapacityError.
  void grow(std::span<const int64_t> tickets, std::span<const int32_t> actions, bool merge,
            std::span<Leaf> out, const ParallelFor& parallel);

  // Throws std::invalid_argument, NodeIndexError, InvalidPriorError, StateError, CapacityError.
  void expand(const Proposals& rows, const ParallelFor& parallel);

  // Ends selections. Throws InvalidValueError for a value that is NaN, or infinite unless a soft
  // value of -inf, and StateError for a ticket that is not open.
  void backup(std::span<const int64_t> tickets, std::span<const float> values,
              const ParallelFor& parallel);
  void cancel(std::span<const int64_t> tickets, const ParallelFor& parallel);

  // Ends of episodes: these nodes are evaluated, but get no edges. Throws NodeIndexError,
  // StateError.
  void end(std::span<const int32_t> tree, std::span<const int32_t> node);
  // Rewards of the edges into nodes that were not backed up yet. Throws NodeIndexError, StateError,
  // InvalidValueError.
  void reward(std::span<const int32_t> tree, std::span<const int32_t> node,
              std::span<const float> rewards);

  // Ends of `out.size()` independent descents of one tree, which change nothing and ask nothing: by
  // draws with probability proportional to prior * exp(rate * q) where `rate` is finite, else to
  // the largest q. Only edges with a value are followed; a node without any is an end.
  void descents(int64_t t, double rate, uint64_t seed, std::span<int32_t> out) const;

 private:
  struct Cursor;
  struct Order;

  void select_range(int64_t begin, int64_t end, int64_t k, Leaf* out, int32_t* counts);
  bool advance(Cursor& cursor);
  bool may_grow(const Node& node, const Edges& edges) const;
  bool waits(const Node& node) const;
  Leaf leaf_at(int64_t t, int32_t id, int64_t ticket) const;
  Leaf begin(int64_t t, int32_t id);
  void arrive(int64_t t, const Cursor& cursor, Leaf* out, int32_t& count);
  Leaf grow_one(int64_t t, int64_t ticket, int32_t action, bool merge);
  void add_weight(int64_t t, int32_t id, int32_t slot);
  void set_soft(Node& node) const;
  int32_t pick(int64_t t, const Node& node, const Edges& edges) const;
  double visits_of(const Node& node, const Edges& edges) const;
  void refresh(int64_t t, const Node& node);
  void backup_one(int64_t t, int32_t leaf, float value);
  void update(Node& node, const Edges& edges, int32_t slot, float old_q);
  void update_soft(Node& node, const Edges& edges, int32_t slot, float old_q);
  Order order(std::span<const int64_t> tickets, const char* op) const;
  Ticket& find(int64_t t, int64_t ticket);
  int32_t take(int64_t t, int64_t ticket);
  void check_distinct(const Proposals& rows, int32_t largest);
  float edge_value(const Node& node) const {
    return static_cast<float>(node.reward + backup_.discount * node.value);
  }

  Store& store_;
  Policy policy_;
  Backup backup_;
  uint64_t seed_;
  std::vector<int32_t> counts_;
  std::vector<uint32_t> stamps_;  // of the last row with this action
  uint32_t stamp_ = 0;
};

}  // namespace alignops::tree
