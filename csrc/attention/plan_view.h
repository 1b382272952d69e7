// A plan as its tables, after every number in it that a kernel relies on has been checked: the
// buffer may come from anywhere.
#pragma once

#include "attention/plan.h"

namespace alignops::attention {

// Positions, rotations and slots are below this, so that sums of a few of them fit int64.
inline constexpr int64_t kMaxNumber = int64_t{1} << 48;

struct PlanView {
  Header header;
  const int64_t* row_ptr;
  const Segment* segments;
  const Pair* pairs;
  const Weight* weights;
  const int64_t* pages;
  const Row* rows;
  const Rope* ropes;
  const int64_t* words;

  const Pair& pair(int64_t segment, int64_t worker) const {
    return pairs[segment * header.workers + worker];
  }
  const Weight& weight(int64_t segment, int64_t worker) const {
    return weights[segment * header.workers + worker];
  }
  // (cos, sin) of row i of a rotation table.
  const float* rotation(int64_t rope, int64_t i) const {
    return reinterpret_cast<const float*>(words + ropes[rope].table) + 2 * i * ropes[rope].pairs;
  }
};

// Throws std::invalid_argument, which names `op` and says what is wrong, unless every offset,
// count, page (below `pool_pages`), slot and row of the plan is in range. O(pages + S W + R).
PlanView view_plan(const int64_t* words, int64_t count, int64_t pool_pages, const char* op);

}  // namespace alignops::attention
