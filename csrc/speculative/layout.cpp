#include "layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "../common/check.h"

namespace alignops::speculative {
namespace {

// Beyond, sums of a few values could overflow.
constexpr int64_t kMost = INT64_C(1) << 60;

void check_range(const char* op, const char* argument, int64_t value, int64_t least, int64_t most,
                 int64_t row) {
  ALIGNOPS_CHECK(value >= least && value <= most, op, ": ", argument, " must lie in [", least, ", ",
                 most, "], got ", value, " in row ", row);
}

}  // namespace

void check_queries(const char* op, const Queries& queries) {
  for (int64_t row = 0; row < queries.rows; ++row) {
    check_range(op, "c", queries.content[row], 0, kMost, row);
    if (queries.counts) check_range(op, "counts", queries.counts[row], 0, queries.columns, row);
  }
  if (!queries.depth) return;
  const int64_t rows = queries.depth_shared ? std::min<int64_t>(queries.rows, 1) : queries.rows;
  for (int64_t i = 0; i < rows * queries.columns; ++i)
    check_range(op, "depth", queries.depth[i], 0, queries.columns, i / queries.columns);
}

void query_positions(const Queries& queries, int64_t* out) {
  for (int64_t row = 0; row < queries.rows; ++row) {
    const int64_t count = queries.count(row);
    for (int64_t j = 0; j < queries.columns; ++j)
      out[row * queries.columns + j] = j < count ? queries.position(row, j) : 0;
  }
}

void column_positions(const Ints& content, const Ints& pad, int64_t rows, int64_t columns,
                      int64_t* out) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t position = j - pad[row];
      out[row * columns + j] = position >= 0 && position < content[row] ? position : 0;
    }
}

void check_mask(const char* op, const MaskArgs& args) {
  const Queries& queries = args.queries;
  check_queries(op, queries);
  for (int64_t row = 0; row < queries.rows; ++row) {
    const int64_t content = queries.content[row], count = queries.count(row);
    const int64_t pad = args.pad ? args.pad[row] : 0;
    check_range(op, "pad", pad, 0, kMost, row);
    const int64_t first = args.first_slot(row);
    check_range(op, "first", first, 0, kMost, row);
    if (count == 0) continue;
    ALIGNOPS_CHECK(first + count <= args.slots, op, ": slots must be at least ", first + count,
                   " (behind the last query) in row ", row, ", got ", args.slots);
    ALIGNOPS_CHECK(args.positions || first >= pad + content - 1, op, ": first must be at least ",
                   pad + content - 1, " (behind the committed tokens) in row ", row, ", got ",
                   first);
  }
  if (!args.ancestors) return;
  const int64_t rows = args.ancestors_shared ? std::min<int64_t>(queries.rows, 1) : queries.rows;
  for (int64_t i = 0; i < rows * queries.columns; ++i) {
    const auto bits = static_cast<uint64_t>(args.ancestors[i]);
    const int64_t node = i % queries.columns;
    ALIGNOPS_CHECK(bits >> node == 1, op, ": ancestors must have bit ", node,
                   " as the highest one, got ", bits, " for node ", node, " in row ",
                   i / queries.columns);
  }
}

namespace {

// One line of a mask, as elements of the width of T.
template <class T>
class ElementLine {
 public:
  ElementLine(const MaskArgs& args, int64_t line)
      : out_(static_cast<T*>(args.out) + line * args.slots),
        shown_(args.kind == MaskKind::kAdditive ? T{0} : T{1}) {
    std::fill_n(out_, args.slots, static_cast<T>(args.hidden));
  }
  void show(int64_t begin, int64_t end) {
    if (begin < end) std::fill(out_ + begin, out_ + end, shown_);
  }

 private:
  T* out_;
  T shown_;
};

// The same in bits of 32-bit words.
class BitLine {
 public:
  BitLine(const MaskArgs& args, int64_t line)
      : out_(static_cast<uint32_t*>(args.out) + line * ((args.slots + 31) / 32)) {
    std::fill_n(out_, (args.slots + 31) / 32, 0U);
  }
  void show(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t bit = begin % 32, count = std::min<int64_t>(32 - bit, end - begin);
      const uint32_t ones = count == 32 ? ~0U : (1U << count) - 1;
      out_[begin / 32] |= ones << bit;
      begin += count;
    }
  }

 private:
  uint32_t* out_;
};

// The slots of committed tokens that a query at `position` sees.
template <class Line>
void show_committed(const MaskArgs& args, int64_t row, int64_t position, int64_t window,
                    Line& line) {
  const int64_t committed = args.queries.content[row] - 1;
  const int64_t least = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
  if (!args.positions) {
    const int64_t pad = args.pad ? args.pad[row] : 0;
    line.show(pad + least, pad + committed);
    return;
  }
  // The slots of the queries hold nothing else, whatever the positions say of them.
  const int64_t first = args.first_slot(row), behind = first + args.queries.columns;
  const auto seen = [&](int64_t slot) {
    const int64_t at = args.positions[row * args.slots + slot];
    return at >= least && at < committed && (slot < first || slot >= behind);
  };
  for (int64_t slot = 0; slot < args.slots; ++slot) {
    const int64_t begin = slot;
    while (slot < args.slots && seen(slot)) ++slot;
    line.show(begin, slot);
  }
}

// The slots of the queries on the path of query j.
template <class Line>
void show_queries(const MaskArgs& args, int64_t row, int64_t j, int64_t window, Line& line) {
  const Queries& queries = args.queries;
  const int64_t first = args.first_slot(row);
  if (!args.ancestors) {
    line.show(first + (window > 0 ? std::max<int64_t>(0, j - window + 1) : 0), first + j + 1);
    return;
  }
  const int64_t n = queries.columns, position = queries.position(row, j);
  const auto bits = static_cast<uint64_t>(args.ancestors[args.ancestors_shared ? j : row * n + j]);
  for (int64_t i = 0; i <= j; ++i) {
    const bool near = window == 0 || position - queries.position(row, i) < window;
    if ((bits >> i & 1) != 0 && near) line.show(first + i, first + i + 1);
  }
}

template <class Line>
void fill_lines(const MaskArgs& args, int64_t begin, int64_t end) {
  const Queries& queries = args.queries;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t j = index % queries.columns, above = index / queries.columns;
    const int64_t row = above % queries.rows, window = args.windows[above / queries.rows];
    Line line(args, index);
    if (j < queries.count(row)) {
      show_committed(args, row, queries.position(row, j), window, line);
      show_queries(args, row, j, window, line);
    } else if (args.slots > 0) {
      const int64_t own = std::min(args.first_slot(row) + j, args.slots - 1);
      line.show(own, own + 1);
    }
  }
}

}  // namespace

void fill_mask(const MaskArgs& args, int64_t begin, int64_t end) {
  if (args.kind == MaskKind::kBits) return fill_lines<BitLine>(args, begin, end);
  switch (args.element) {
    case 1:
      return fill_lines<ElementLine<uint8_t>>(args, begin, end);
    case 2:
      return fill_lines<ElementLine<uint16_t>>(args, begin, end);
    case 4:
      return fill_lines<ElementLine<uint32_t>>(args, begin, end);
    default:
      return fill_lines<ElementLine<uint64_t>>(args, begin, end);
  }
}

void fill_row_mask(const MaskArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    ElementLine<uint8_t> line(args, row);
    const int64_t count = args.queries.count(row), first = args.first_slot(row);
    if (args.queries.content[row] > 0) show_committed(args, row, 0, 0, line);
    line.show(first, first + count);
  }
}

void offsets(const char* op, const Queries& queries, int32_t* query_offsets,
             int32_t* slot_offsets) {
  check_queries(op, queries);
  const auto slots = [&](int64_t row) {
    const int64_t count = queries.count(row);
    return count == 0 ? 0 : queries.content[row] - 1 + count;
  };
  int64_t total = 0;
  for (int64_t row = 0; row < queries.rows; ++row) {
    total += slots(row);
    ALIGNOPS_CHECK(total <= INT32_MAX, op, ": c must sum up to less than 2**31 slots, got ", total,
                   " up to row ", row);
  }
  query_offsets[0] = slot_offsets[0] = 0;
  for (int64_t row = 0; row < queries.rows; ++row) {
    query_offsets[row + 1] = query_offsets[row] + static_cast<int32_t>(queries.count(row));
    slot_offsets[row + 1] = slot_offsets[row] + static_cast<int32_t>(slots(row));
  }
}

void check_tree(const char* op, const TreeTables& tables) {
  for (int64_t row = 0; row < tables.rows; ++row) {
    bool ended = false;
    for (int64_t i = 0; i < tables.nodes; ++i) {
      const int64_t parent = tables.parent[row * tables.nodes + i];
      ALIGNOPS_CHECK(i > 0 || parent == -1, op, ": parent must be -1 for node 0, the root, got ",
                     parent, " in row ", row);
      ALIGNOPS_CHECK(parent >= -1 && parent < i, op, ": parent must come before its child, got ",
                     parent, " for node ", i, " in row ", row);
      ALIGNOPS_CHECK(!ended || parent == -1, op,
                     ": parent must be -1 for all nodes behind the tree, got ", parent,
                     " for node ", i, " in row ", row);
      ended = i > 0 && parent == -1;
    }
  }
}

void fill_tree(const TreeTables& tables) {
  const int64_t n = tables.nodes;
  for (int64_t row = 0; row < tables.rows; ++row) {
    int32_t* depth = tables.depth + row * n;
    int64_t* ancestors = tables.ancestors + row * n;
    int32_t* first_child = tables.first_child + row * n;
    int32_t* next_sibling = tables.next_sibling + row * n;
    std::fill_n(first_child, n, -1);
    std::fill_n(next_sibling, n, -1);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t parent = tables.parent[row * n + i];
      depth[i] = parent < 0 ? 0 : depth[parent] + 1;
      const auto own = static_cast<int64_t>(UINT64_C(1) << i);
      ancestors[i] = parent < 0 ? own : ancestors[parent] | own;
      for (int64_t j = 0; j < n; ++j)
        tables.block[(row * n + i) * n + j] = (static_cast<uint64_t>(ancestors[i]) >> j & 1) != 0;
    }
    for (int64_t i = n - 1; i > 0; --i) {
      const int64_t parent = tables.parent[row * n + i];
      if (parent < 0) continue;
      next_sibling[i] = first_child[parent];
      first_child[parent] = static_cast<int32_t>(i);
    }
  }
}

void select_tree(const char* op, const TreeSelection& selection) {
  const int64_t m = selection.candidates, n = selection.best;
  std::vector<int32_t> order(static_cast<size_t>(m));
  std::vector<int32_t> node_of(static_cast<size_t>(m));  // in the tree; 0: not chosen
  std::vector<int32_t> nodes(static_cast<size_t>(selection.rows * n));
  std::vector<int32_t> parents(static_cast<size_t>(selection.rows * (n + 1)), -1);
  for (int64_t row = 0; row < selection.rows; ++row) {
    for (int64_t i = 0; i < m; ++i) {
      const int64_t parent = selection.parents[row * m + i];
      ALIGNOPS_CHECK(parent >= -1 && parent < i, op,
                     ": parents must come before their children, got ", parent, " for candidate ",
                     i, " in row ", row);
      ALIGNOPS_CHECK(!std::isnan(selection.score(row * m + i)), op,
                     ": scores must not be NaN, got it for candidate ", i, " in row ", row);
    }
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](int32_t a, int32_t b) {
      const double x = selection.score(row * m + a), y = selection.score(row * m + b);
      return x != y ? x > y : a < b;
    });
    std::sort(order.begin(), order.begin() + n);
    std::fill(node_of.begin(), node_of.end(), 0);
    for (int64_t k = 0; k < n; ++k) {
      const int32_t candidate = order[static_cast<size_t>(k)];
      const int64_t parent = selection.parents[row * m + candidate];
      const int32_t above = parent < 0 ? 0 : node_of[static_cast<size_t>(parent)];
      ALIGNOPS_CHECK(parent < 0 || above > 0, op, ": scores must not rise from a parent to its ",
                     "child: candidate ", candidate, " in row ", row, " is among the best ", n,
                     ", its parent ", parent, " is not");
      node_of[static_cast<size_t>(candidate)] = static_cast<int32_t>(k) + 1;
      nodes[static_cast<size_t>(row * n + k)] = candidate;
      parents[static_cast<size_t>(row * (n + 1) + k + 1)] = above;
    }
  }
  std::copy(nodes.begin(), nodes.end(), selection.nodes);
  std::copy(parents.begin(), parents.end(), selection.parent);
}

}  // namespace alignops::speculative
