// What the files of Search share: selections on their way, and the rows of a call, tree by tree.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace alignops::tree {

// A range of trees that is worth a thread.
inline constexpr int64_t kGrain = 32;

// What a random word is for: the last counter of the generator.
enum class Purpose : uint32_t { kDraw = 0, kDescent = 1 };

// Where a selection stands on its way down.
struct Search::Cursor {
  int64_t tree;
  int32_t node;
  bool loaded;  // the node's lanes are on their way
};

struct Search::Order {
  std::vector<int64_t> row;    // all rows of a tree in turn; empty: they are so already
  std::vector<int64_t> begin;  // [trees + 1] into `row`

  // body(tree, row) for all rows; those of one tree in turn, on one thread.
  template <class Body>
  void each(const ParallelFor& parallel, const Body& body) const {
    parallel(0, static_cast<int64_t>(begin.size()) - 1, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        for (auto i = static_cast<size_t>(begin[static_cast<size_t>(t)]);
             i < static_cast<size_t>(begin[static_cast<size_t>(t) + 1]); ++i)
          body(t, row.empty() ? i : static_cast<size_t>(row[i]));
    });
  }

  int64_t rows_of(int64_t t) const {
    return begin[static_cast<size_t>(t) + 1] - begin[static_cast<size_t>(t)];
  }
};

}  // namespace alignops::tree
