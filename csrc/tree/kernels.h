// Contract of the tree core: choosing among the edges of one node. No torch, no Python, no
// allocation, no exceptions.
//
// A kernel reads one block of lanes (layout.h) and returns a slot, the first of equals, or -1 if no
// edge can be chosen: pruned and padded lanes never are. What depends on the node alone (roots,
// logarithms) is an argument, computed once. Every level gives the same bits: operations are
// rounded one by one, and sums run over 8 columns (lane mod 8) that are then added pairwise.
#pragma once

#include "layout.h"

namespace alignops::tree {

// Over all lanes but padded ones: pruned edges keep their statistics.
struct Summary {
  float q_min, q_max;  // of lanes with a value; +inf, -inf without
  float q_sum;
  float seen;    // lanes with a value
  float visits;  // sum
  float most;    // largest visits
  float weight;  // sum of priors
};

// ((q or unvisited) - low) * inverse, clipped to [0, 1] if asked, + prior * scale / (1 + visits).
struct PuctArgs {
  float low, inverse;
  float unvisited;  // takes the place of the normalized value
  float scale;
  bool clip;
};

// (q or unvisited) + c sqrt(log_n / visits); +inf where visits = 0.
struct UctArgs {
  float log_n, c;
  float unvisited;
};

// A draw with probability proportional to prior * exp(rate * ((q or unvisited) - shift)), by a
// uniform word.
struct DrawArgs {
  float rate, shift;
  float unvisited;
  uint32_t word;
};

struct Kernels {
  Summary (*summarize)(const Edges&);
  int32_t (*puct)(const Edges&, const PuctArgs&);
  int32_t (*uct)(const Edges&, const UctArgs&);
  int32_t (*draw)(const Edges&, const DrawArgs&);
  int32_t (*greedy)(const Edges&, float unvisited);  // argmax q
};

extern const Kernels kEdgesScalar, kEdgesAvx2;

// Table of the active ISA, compared with the scalar one once, on first use.
const Kernels& kernels();
const char* self_test_failure();  // nullptr if all is well

}  // namespace alignops::tree
