// How a tree lies in memory.
//
// A node is one record of one cache line. Its edges are a block of `cap` lanes, cap = 8 * 2^j, in
// four runs: prior[cap] | q[cap] | visits[cap] | child[cap]. Lanes hold what selection must see of
// a child, so choosing an edge reads the node's record and its block and nothing else:
//   q       reward + discount * value of the child; NaN while nothing was backed up through it
//   visits  the child's visits, with those in flight as the policy counts them
//   child   the child's id, or kNotMade, kPruned, kPadding
// Padded lanes have prior 0, q NaN, visits 0. Cold columns, one element per lane, stand elsewhere.
//
// Source: specification of the tree core; 64 bytes per node and 24 per lane in all.
#pragma once

#include <cstdint>
#include <limits>

namespace alignops::tree {

inline constexpr int32_t kNotMade = -1;
inline constexpr int32_t kPruned = -2;
inline constexpr int32_t kPadding = -3;
inline constexpr int32_t kNowhere = -1;  // no node, no payload

inline constexpr int64_t kLanes = 8;       // lanes of the smallest block
inline constexpr int64_t kLaneBytes = 16;  // of a block
inline constexpr uint32_t kNoEdges = ~uint32_t{0};
inline constexpr int32_t kMaxDepth = 65535;
inline constexpr float kNoValue = std::numeric_limits<float>::quiet_NaN();

enum Flag : uint16_t {
  kExpanded = 1,
  kTerminal = 2,
  kPending = 4,  // selected for the first time, nothing backed up yet
  kTruncated = 32,
  kDead = 64,           // expanded without an edge that could be chosen
  kFromChildren = 512,  // soft: the value is that of the children
};

struct alignas(64) Node {
  int32_t parent;
  int32_t parent_slot;
  uint32_t edge_base;  // first lane of the block / kLanes
  uint32_t n_edges;
  uint16_t depth;
  uint16_t flags;
  uint8_t edge_cap_log2;  // cap = kLanes << edge_cap_log2
  uint8_t unused[3];
  double value_sum;  // mean: sum of returns; soft: sum of w exp(lambda (v - aux))
  float n;           // visits; fractional where siblings share
  int32_t fn;        // backups through the node
  int32_t pending;   // selections not yet backed up
  float value;
  float raw_value;  // what the evaluator said, NaN before; soft, inside: sum of evaluated weights
  float reward;     // of the edge into the node
  float aux;        // soft: the shift M
  int32_t payload;
};
static_assert(sizeof(Node) == 64);

// The lanes of one node.
struct Edges {
  float* prior;
  float* q;
  float* visits;
  int32_t* child;
  int64_t cap;
};

}  // namespace alignops::tree
