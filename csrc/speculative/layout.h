// Positions, attention masks and tree tables from lengths.
//
// Row b has `content` committed tokens. All but the last lie in the cache, at slots pad .. pad +
// content - 2; the queries of a forward are the last committed token and what follows it, at slots
// `first` .., by default right behind. The position of a token is the number of tokens before it:
// content - 1 for query 0, then one more per query, or per level of a tree.
//
// Query j sees a slot iff it holds a committed token or a query on j's own path (in a chain: j and
// those before it), and, for a window w > 0, position(j) - position(slot) < w. A query of padding
// (from `counts` on, or of a row without content) sees one slot, its own.
#pragma once

#include <cstdint>

#include "moves.h"

namespace alignops::speculative {

// The check_ functions, `offsets` and `select_tree` check every value that the others rely on,
// before anything is written: they throw std::invalid_argument, which names `op` and the argument.

struct Queries {
  int64_t rows, columns;
  Ints content;  // (rows)
  Ints counts;   // (rows), queries that are not padding; absent: all
  Ints depth;    // (rows, columns), or (columns) for all rows; absent: a chain
  bool depth_shared;

  ALIGNOPS_HD int64_t count(int64_t row) const {
    return content[row] <= 0 ? 0 : counts ? counts[row] : columns;
  }
  ALIGNOPS_HD int64_t position(int64_t row, int64_t column) const {
    const int64_t level = depth ? depth[depth_shared ? column : row * columns + column] : column;
    return content[row] - 1 + level;
  }
};
void check_queries(const char* op, const Queries& queries);

// out (rows, columns): positions of queries, 0 for padding.
void query_positions(const Queries& queries, int64_t* out);

// out (rows, columns): positions in left-padded rows, 0 for padding.
void column_positions(const Ints& content, const Ints& pad, int64_t rows, int64_t columns,
                      int64_t* out);

enum class MaskKind : int32_t { kBool = 0, kAdditive = 1, kBits = 2, kRow = 3 };

struct MaskArgs {
  Queries queries;
  int64_t slots;
  Ints pad;        // (rows); absent: 0
  Ints first;      // (rows), slot of query 0; absent: pad + content - 1
  Ints positions;  // (rows, slots) of committed tokens, below 0: none; absent: slot - pad. Not read
                   // where queries are
  Ints ancestors;  // bits (rows, columns), or (columns) for all rows: node i is j or above it
  bool ancestors_shared;
  const int64_t* windows;  // 0: none
  int64_t window_count;
  MaskKind kind;
  int32_t element;  // bytes of an element of out, 1 to 8
  uint64_t hidden;  // the bits of an element that hides a slot; 0 shows it if additive, else 1
  void* out;

  ALIGNOPS_HD int64_t first_slot(int64_t row) const {
    if (first) return first[row];
    const int64_t content = queries.content[row];
    return (pad ? pad[row] : 0) + (content > 0 ? content - 1 : 0);
  }
};
void check_mask(const char* op, const MaskArgs& args);

// Lines [begin, end) of (windows, rows, columns): kBool and kAdditive have one element per slot,
// kBits words of 32 slots, the first in bit 0.
void fill_mask(const MaskArgs& args, int64_t begin, int64_t end);

// Lines [begin, end) of (rows): kRow, true where a slot holds a committed token or a query.
void fill_row_mask(const MaskArgs& args, int64_t begin, int64_t end);

// Offsets (rows + 1) of each row's queries, and of the slots that they attend to.
void offsets(const char* op, const Queries& queries, int32_t* query_offsets, int32_t* slot_offsets);

// Trees of up to 64 nodes: node 0 is the root with parent -1, parents come before their children,
// and nodes behind the tree have parent -1.
inline constexpr int64_t kMaxNodes = 64;

struct TreeTables {
  Ints parent;  // (rows, nodes)
  int64_t rows, nodes;
  int32_t* depth;         // 0 for the root and behind the tree
  int64_t* ancestors;     // bit i: node i is the node or above it
  int32_t* first_child;   // -1: none
  int32_t* next_sibling;  // -1: none
  bool* block;            // (rows, nodes, nodes): the bits of ancestors
};
void check_tree(const char* op, const TreeTables& tables);
void fill_tree(const TreeTables& tables);

// The `best` candidates of each row by score, the earlier one among equals, as a tree under a root:
// parents come before their children, -1 stands for the root.
struct TreeSelection {
  const void* scores;  // (rows, candidates), float32 or float64
  bool wide;
  Ints parents;  // (rows, candidates)
  int64_t rows, candidates, best;
  int32_t* nodes;   // (rows, best): candidates that were chosen, rising
  int32_t* parent;  // (rows, best + 1): of the tree, whose node 0 is the root

  ALIGNOPS_HD double score(int64_t i) const {
    return wide ? static_cast<const double*>(scores)[i] : static_cast<const float*>(scores)[i];
  }
};
// Throws if a chosen candidate's parent is not chosen, too.
void select_tree(const char* op, const TreeSelection& selection);

}  // namespace alignops::speculative
