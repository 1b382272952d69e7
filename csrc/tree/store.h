// B trees that grow: nodes, blocks of edges, and what is known of each tree. One tree is one range
// of each arena, so a tree is touched by one thread and its addresses never change.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "arena.h"
#include "layout.h"

namespace alignops::tree {

// A tree has no room for what was asked; nothing was changed.
struct CapacityError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// The call does not fit the state of the trees; nothing was changed.
struct StateError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A number from outside that no tree can hold; nothing was changed.
struct InvalidValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct InvalidPriorError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
// Columns that no store can have written; the text names one.
struct FormatError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
// An id outside of its tree; nothing was changed.
struct NodeIndexError : std::out_of_range {
  using std::out_of_range::out_of_range;
};

struct Limits {
  int64_t trees;
  int64_t nodes;  // per tree
  int64_t lanes;  // per tree, a multiple of kLanes
};

// A selection that was neither backed up nor cancelled.
struct Ticket {
  int64_t id;
  int32_t node;
};

struct Tree {
  int32_t root = 0;
  int32_t nodes = 0;        // used
  uint32_t blocks = 0;      // used, in units of kLanes lanes
  float low = 0, high = 0;  // smallest and largest value seen
  uint64_t uid = 0;
  uint32_t draws = 0;    // selections that were begun
  uint32_t tickets = 0;  // given out
  std::vector<Ticket> open;
  std::vector<uint32_t> free[28];  // blocks by size class
};

// What a store was at some time.
struct Snapshot {
  struct Copy {
    Tree tree;
    std::vector<Node> nodes;
    std::vector<float> lanes;
    std::vector<int32_t> actions;
  };
  std::vector<Copy> trees;
};

struct Columns;

// Which children stay: those that are among the `top` of their siblings, by visits or by value,
// have at least so many visits, and a value of at least so much.
struct Keep {
  int64_t top;
  bool by_value;
  float visits;
  float value;
};

class Store {
 public:
  // Every tree is a root without edges. Throws std::invalid_argument, std::bad_alloc.
  explicit Store(const Limits& limits);

  const Limits& limits() const { return limits_; }
  int64_t size() const { return limits_.trees; }
  Tree& tree(int64_t t) { return trees_[static_cast<size_t>(t)]; }
  const Tree& tree(int64_t t) const { return trees_[static_cast<size_t>(t)]; }

  Node* nodes(int64_t t) const { return reinterpret_cast<Node*>(nodes_.data()) + t * node_stride_; }
  int64_t node_stride() const { return node_stride_; }

  // The lanes of a node that has some.
  Edges edges(int64_t t, const Node& node) const {
    const int64_t cap = kLanes << node.edge_cap_log2;
    auto* block = reinterpret_cast<float*>(
        edges_.data() +
        (t * lane_stride_ + static_cast<int64_t>(node.edge_base) * kLanes) * kLaneBytes);
    return {block, block + cap, block + 2 * cap, reinterpret_cast<int32_t*>(block + 3 * cap), cap};
  }
  int32_t* actions(int64_t t, const Node& node) const {
    return reinterpret_cast<int32_t*>(actions_.data()) + t * lane_stride_ +
           static_cast<int64_t>(node.edge_base) * kLanes;
  }

  // Throws NodeIndexError unless there is such a node.
  void check_node(const char* op, int64_t t, int64_t node) const;

  // Edges from the root to a node.
  int64_t steps_to(int64_t t, int32_t node) const {
    return nodes(t)[node].depth - nodes(t)[tree(t).root].depth;
  }

  // Whether so many new nodes fit.
  bool has_room(int64_t t, int64_t nodes) const { return tree(t).nodes + nodes <= limits_.nodes; }
  // A child behind an edge that has none yet; the caller has asked for room.
  int32_t make_child(int64_t t, int32_t parent, int32_t slot);
  // Lanes that `add_edges` takes at most for so many edges.
  static int64_t lanes_for(int64_t edges);
  int64_t lanes_used(int64_t t) const { return static_cast<int64_t>(tree(t).blocks) * kLanes; }
  // One more edge with this action and prior, not made yet; its slot. The caller has asked for room
  // for the lanes of `n_edges + 1`. Blocks that are outgrown are used again.
  int32_t append_edge(int64_t t, int32_t node, int32_t action, float prior);
  // A block of empty lanes for a node without edges; the caller has asked for room.
  void add_edges(int64_t t, int32_t node, int64_t edges);

  // The child behind an edge of the root becomes the root; statistics stay. What is not below it is
  // dead until `compact`. Throws NodeIndexError, StateError if a selection is in flight.
  void reroot(int64_t t, int64_t slot);
  // Moves what is below the root to the front, breadth first. `moved[id]` is the new id of a node,
  // or -1. Throws StateError if a selection is in flight.
  void compact(int64_t t, std::span<int32_t> moved);
  // Cuts the edges into children that `keep` refuses; they keep their statistics. The nodes below
  // are dead. Throws StateError if a selection is in flight.
  int64_t prune(int64_t t, const Keep& keep);

  Snapshot mark() const;
  // Throws std::invalid_argument if the mark is of another number of trees.
  void restore(const Snapshot& snapshot);
  Columns columns() const;
  // Replaces everything; a store that throws FormatError is to be thrown away.
  void load(const Columns& columns);

  // Bytes of records and lanes in use.
  int64_t bytes() const;

  // Throws StateError naming the first invariant that does not hold: links of parents and children,
  // depths, padding, flags, counts in flight against open tickets.
  void validate() const;

 private:
  void check_idle(int64_t t, const char* op) const;
  std::vector<int32_t> below_root(int64_t t) const;
  uint32_t take_block(Tree& tree, int32_t size_class);
  void validate_tree(int64_t t) const;

  Limits limits_;
  int64_t node_stride_, lane_stride_;
  Arena nodes_, edges_, actions_;
  std::vector<Tree> trees_;
};

}  // namespace alignops::tree
