// Moves of cache slots. A cache is a table of tensors, one or more per layer, of any element type:
// everything here is bytes. One plan says which slots move, for all tensors of the table.
//
//   tensor   rows x heads x slots, any strides; the `bytes` of a slot of one head lie together
//   strip    the slots of one head of one row of one tensor: the unit of work
//   group    moves that happen in order on a strip; groups of one plan do not touch each other
//
// Traffic: each slot that moves is read once and written once. In place, a run of slots goes from
// the end that the other end would overwrite: memmove, and nothing is allocated.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/host_device.h"

namespace alignops::speculative {

// Integers of a plan as they lie in a tensor, int32 or int64. Without data: absent.
struct Ints {
  const void* data;
  bool wide;

  ALIGNOPS_HD explicit operator bool() const { return data != nullptr; }
  ALIGNOPS_HD int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// One tensor of a cache; strides in bytes.
struct CacheTensor {
  char* data;
  int64_t rows, heads, slots;
  int64_t bytes;  // of a slot of one head
  int64_t row_stride, head_stride, slot_stride;

  bool empty() const { return rows == 0 || heads == 0 || slots == 0 || bytes == 0; }
};

// Behind the last byte; of an empty tensor, the first one.
const char* end_of(const CacheTensor& t);

// Whether two slots of a tensor may lie on the same bytes.
bool overlaps_itself(const CacheTensor& t);

// Whether two tensors, neither of which overlaps itself, may have bytes in common. Exact for equal
// strides (views of one buffer, such as its keys and its values); otherwise, tensors whose address
// ranges intersect are taken to share.
bool share_memory(const CacheTensor& a, const CacheTensor& b);

// `count` slots of a row go from one place to another, which may overlap.
struct Move {
  int64_t from_row, from_slot, to_row, to_slot, count;
};

struct Plan {
  std::vector<Move> moves;
  std::vector<int64_t> ends;  // of the groups, in `moves`

  // The moves added since the last call form a group; without any there is none.
  void end_group() {
    const auto end = static_cast<int64_t>(moves.size());
    if (end > (ends.empty() ? 0 : ends.back())) ends.push_back(end);
  }
  int64_t groups() const { return static_cast<int64_t>(ends.size()); }
};

// A plan applied to a table: strips are counted over tensors, groups and heads, in this order.
class Transfer {
 public:
  // from[i] goes to to[i]: the same heads and bytes. In place if the tables are the same tensors.
  Transfer(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
           const Plan& plan);

  int64_t strips() const { return strip_begin_.back(); }
  // That are read, of an average strip.
  int64_t bytes_per_strip() const { return strips() == 0 ? 0 : bytes_ / strips(); }
  // Strips [begin, end), on this thread.
  void run(int64_t begin, int64_t end) const;

 private:
  std::vector<CacheTensor> from_, to_;
  const Plan& plan_;
  std::vector<int64_t> strip_begin_;
  int64_t bytes_ = 0;
};

// The planners check every value that the moves rely on and throw std::invalid_argument, which
// names `op` and the argument. `slots` is the smallest number of slots of any tensor.

// Slots [src, src + length) of each row go to [dst, dst + length) of the same row.
Plan plan_shift(const char* op, Ints src, Ints dst, Ints length, int64_t rows, int64_t slots);

// Row i of the result comes from row rows[i]; -1: it stays as it is. Without length: all of
// from_slots, which are at most to_slots, keep their places.
struct GatherPlan {
  Ints rows;
  int64_t count;  // rows of the result
  Ints src, dst, length;
  bool in_place;  // then every row comes from itself
  int64_t from_rows, from_slots, to_slots;
};
Plan plan_gather(const char* op, const GatherPlan& args);

// `counts` new columns of each row go to slots lens .. of the same row; without counts, all.
Plan plan_append(const char* op, Ints lens, Ints counts, int64_t rows, int64_t columns,
                 int64_t slots);

// Slots base + path[j] go to base + j, for j = 0 .. length - 1; path rises.
struct TreePlan {
  Ints base, path, length;
  int64_t rows, nodes;  // path is rows x nodes
};
Plan plan_tree(const char* op, const TreePlan& args, int64_t slots);

// The same where slot s of row b is slot s % page of page table[b, s / page].
struct Pages {
  Ints table;
  int64_t per_row;      // pages in a row of the table
  int64_t page, count;  // slots of a page, pages of the cache
};
Plan plan_paged_tree(const char* op, const TreePlan& args, const Pages& pages);

// Row b lies at [cu[b], cu[b + 1]) of one long row of `from_slots`, and goes to new_cu[b], as much
// of it as has room before new_cu[b + 1]. In place, no row may move to the right.
Plan plan_packed(const char* op, Ints cu, Ints new_cu, int64_t rows, int64_t from_slots,
                 int64_t to_slots, bool in_place);

// How left-padded rows move when each gets `emitted` tokens more: all outputs int32 (rows).
struct Realign {
  Ints content, pad, emitted;
  int64_t rows;
  int32_t *src, *dst, *length, *new_pad;
};
void plan_realign(const char* op, const Realign& args);

}  // namespace alignops::speculative
