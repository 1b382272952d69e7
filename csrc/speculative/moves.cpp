#include "moves.h"

#include <algorithm>
#include <cstring>

#include "../common/check.h"

namespace alignops::speculative {
namespace {

struct Dimension {
  int64_t size, stride;
};

// Rows, heads and slots from the largest stride on; those with one index play no part.
std::vector<Dimension> dimensions(const CacheTensor& t) {
  std::vector<Dimension> all;
  for (const Dimension d : {Dimension{t.rows, t.row_stride}, Dimension{t.heads, t.head_stride},
                            Dimension{t.slots, t.slot_stride}})
    if (d.size > 1) all.push_back(d);
  std::stable_sort(all.begin(), all.end(),
                   [](const Dimension& a, const Dimension& b) { return a.stride > b.stride; });
  return all;
}

// Whether some difference of indices in the dimensions from `level` on, and of bytes, makes up
// `distance`. What the inner dimensions make up is smaller than a step of an outer one.
bool reaches(const std::vector<Dimension>& dims, size_t level, int64_t bytes, int64_t distance) {
  if (level == dims.size()) return distance > -bytes && distance < bytes;
  const auto [size, stride] = dims[level];
  const int64_t steps = distance / stride;
  for (int64_t k = steps - 1; k <= steps + 1; ++k)
    if (k > -size && k < size && reaches(dims, level + 1, bytes, distance - k * stride))
      return true;
  return false;
}

bool same_dimensions(const std::vector<Dimension>& a, const std::vector<Dimension>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.size == y.size && x.stride == y.stride;
  });
}

// Heads that lie side by side in every slot are one head.
bool heads_together(const CacheTensor& t) { return t.heads > 1 && t.head_stride == t.bytes; }

void join_heads(CacheTensor& t) {
  t.bytes *= t.heads;
  t.head_stride = t.bytes;
  t.heads = 1;
}

void move_slots(const CacheTensor& from, const CacheTensor& to, int64_t head, const Move& move) {
  const char* source = from.data + move.from_row * from.row_stride + head * from.head_stride +
                       move.from_slot * from.slot_stride;
  char* target =
      to.data + move.to_row * to.row_stride + head * to.head_stride + move.to_slot * to.slot_stride;
  if (source == target) return;
  const auto bytes = static_cast<size_t>(from.bytes);
  if (from.slot_stride == from.bytes && to.slot_stride == to.bytes) {
    std::memmove(target, source, bytes * static_cast<size_t>(move.count));
  } else if (move.to_slot > move.from_slot) {
    for (int64_t i = move.count - 1; i >= 0; --i)
      std::memcpy(target + i * to.slot_stride, source + i * from.slot_stride, bytes);
  } else {
    for (int64_t i = 0; i < move.count; ++i)
      std::memcpy(target + i * to.slot_stride, source + i * from.slot_stride, bytes);
  }
}

}  // namespace

const char* end_of(const CacheTensor& t) {
  if (t.empty()) return t.data;
  return t.data + (t.rows - 1) * t.row_stride + (t.heads - 1) * t.head_stride +
         (t.slots - 1) * t.slot_stride + t.bytes;
}

bool overlaps_itself(const CacheTensor& t) {
  if (t.empty()) return false;
  int64_t inner = t.bytes;
  const std::vector<Dimension> dims = dimensions(t);
  for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
    if (d->stride < inner) return true;
    inner += (d->size - 1) * d->stride;
  }
  return false;
}

bool share_memory(const CacheTensor& a, const CacheTensor& b) {
  if (a.empty() || b.empty()) return false;
  if (a.data >= end_of(b) || b.data >= end_of(a)) return false;
  const std::vector<Dimension> dims = dimensions(a);
  if (a.bytes != b.bytes || !same_dimensions(dims, dimensions(b))) return true;
  return reaches(dims, 0, a.bytes, b.data - a.data);
}

Transfer::Transfer(const std::vector<CacheTensor>& from, const std::vector<CacheTensor>& to,
                   const Plan& plan)
    : from_(from), to_(to), plan_(plan), strip_begin_{0} {
  int64_t slots = 0;
  for (const Move& move : plan.moves) slots += move.count;
  for (size_t i = 0; i < from_.size(); ++i) {
    if (heads_together(from_[i]) && heads_together(to_[i])) {
      join_heads(from_[i]);
      join_heads(to_[i]);
    }
    const int64_t heads = from_[i].bytes == 0 ? 0 : from_[i].heads;
    strip_begin_.push_back(strip_begin_.back() + heads * plan.groups());
    bytes_ += heads * slots * from_[i].bytes;
  }
}

void Transfer::run(int64_t begin, int64_t end) const {
  const auto after = std::upper_bound(strip_begin_.begin(), strip_begin_.end(), begin);
  auto tensor = static_cast<size_t>(after - strip_begin_.begin() - 1);
  for (int64_t strip = begin; strip < end; ++strip) {
    while (strip >= strip_begin_[tensor + 1]) ++tensor;
    const int64_t heads = from_[tensor].heads, place = strip - strip_begin_[tensor];
    const auto group = static_cast<size_t>(place / heads);
    for (int64_t i = group == 0 ? 0 : plan_.ends[group - 1]; i < plan_.ends[group]; ++i)
      move_slots(from_[tensor], to_[tensor], place % heads, plan_.moves[static_cast<size_t>(i)]);
  }
}

namespace {

// [start, start + count) must lie in [0, limit): compared so that nothing overflows.
void check_slots(const char* op, const char* argument, int64_t start, int64_t count, int64_t limit,
                 int64_t row) {
  ALIGNOPS_CHECK(start >= 0 && count <= limit && start <= limit - count, op, ": ", argument,
                 " must leave room for ", count, " slots in [0, ", limit, "), got ", start,
                 " in row ", row);
}

void check_length(const char* op, const char* argument, int64_t length, int64_t row) {
  ALIGNOPS_CHECK(length >= 0, op, ": ", argument, " must not be negative, got ", length, " in row ",
                 row);
}

// The nodes of a row's path, as runs of slots that go left by the same distance: calls
// add(from, to, count), with slots in rising order.
template <class Add>
void for_runs(const char* op, const TreePlan& args, int64_t row, int64_t slots, const Add& add) {
  const int64_t length = args.length[row], base = args.base[row];
  ALIGNOPS_CHECK(length >= 0 && length <= args.nodes, op, ": length must lie in [0, ", args.nodes,
                 "] (the nodes of path), got ", length, " in row ", row);
  if (length == 0) return;
  int64_t last = -1;
  for (int64_t j = 0; j < length; ++j) {
    const int64_t node = args.path[row * args.nodes + j];
    ALIGNOPS_CHECK(node > last, op, ": path must rise from 0 on, got ", node, " after ", last,
                   " in row ", row);
    last = node;
  }
  check_slots(op, "base", base, last < slots ? last + 1 : slots + 1, slots, row);
  for (int64_t begin = 0, end = 0; begin < length; begin = end) {
    const int64_t node = args.path[row * args.nodes + begin];
    for (end = begin + 1;
         end < length && args.path[row * args.nodes + end] == node + (end - begin);)
      ++end;
    if (node != begin) add(base + node, base + begin, end - begin);
  }
}

// A page that the moves of a row touch.
struct Touch {
  int64_t page, row;
  bool written;
};

}  // namespace

Plan plan_shift(const char* op, Ints src, Ints dst, Ints length, int64_t rows, int64_t slots) {
  Plan plan;
  for (int64_t row = 0; row < rows; ++row) {
    check_length(op, "length", length[row], row);
    check_slots(op, "src", src[row], length[row], slots, row);
    check_slots(op, "dst", dst[row], length[row], slots, row);
    if (length[row] > 0 && src[row] != dst[row])
      plan.moves.push_back({row, src[row], row, dst[row], length[row]});
    plan.end_group();
  }
  return plan;
}

Plan plan_gather(const char* op, const GatherPlan& args) {
  Plan plan;
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t row = args.rows[i];
    ALIGNOPS_CHECK(row >= -1 && row < args.from_rows, op, ": rows must lie in [0, ", args.from_rows,
                   "), or be -1, got ", row, " at ", i);
    ALIGNOPS_CHECK(!args.in_place || row == i || row == -1, op,
                   ": rows must be 0, 1, 2, ... where out is caches, got ", row, " at ", i);
    Move move{row, 0, i, 0, args.from_slots};
    if (args.length) {
      move = {row, args.src[i], i, args.dst[i], args.length[i]};
      check_length(op, "length", move.count, i);
      check_slots(op, "src", move.from_slot, move.count, args.from_slots, i);
      check_slots(op, "dst", move.to_slot, move.count, args.to_slots, i);
    }
    const bool stays = args.in_place && move.from_slot == move.to_slot;
    if (row >= 0 && move.count > 0 && !stays) plan.moves.push_back(move);
    plan.end_group();
  }
  return plan;
}

Plan plan_append(const char* op, Ints lens, Ints counts, int64_t rows, int64_t columns,
                 int64_t slots) {
  Plan plan;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t count = counts ? counts[row] : columns;
    ALIGNOPS_CHECK(count >= 0 && count <= columns, op, ": counts must lie in [0, ", columns,
                   "] (the columns of new), got ", count, " in row ", row);
    check_slots(op, "lens", lens[row], count, slots, row);
    if (count > 0) plan.moves.push_back({row, 0, row, lens[row], count});
    plan.end_group();
  }
  return plan;
}

Plan plan_tree(const char* op, const TreePlan& args, int64_t slots) {
  Plan plan;
  for (int64_t row = 0; row < args.rows; ++row) {
    for_runs(op, args, row, slots, [&](int64_t from, int64_t to, int64_t count) {
      plan.moves.push_back({row, from, row, to, count});
    });
    plan.end_group();
  }
  return plan;
}

Plan plan_paged_tree(const char* op, const TreePlan& args, const Pages& pages) {
  Plan plan;
  std::vector<Touch> touches;
  const int64_t slots = pages.per_row * pages.page;
  for (int64_t row = 0; row < args.rows; ++row) {
    const auto page_of = [&](int64_t slot, bool written) {
      const int64_t page = pages.table[row * pages.per_row + slot / pages.page];
      ALIGNOPS_CHECK(page >= 0 && page < pages.count, op, ": block_table must hold pages in [0, ",
                     pages.count, ") where slots move, got ", page, " in row ", row, " at ",
                     slot / pages.page);
      // The row of the table tells pages that occur twice in it from runs in one page.
      touches.push_back({page, row * pages.per_row + slot / pages.page, written});
      return page;
    };
    for_runs(op, args, row, slots, [&](int64_t from, int64_t to, int64_t count) {
      // Cut where either end crosses the border of a page.
      while (count > 0) {
        const int64_t a = from % pages.page, b = to % pages.page;
        const int64_t part = std::min(count, pages.page - std::max(a, b));
        plan.moves.push_back({page_of(from, false), a, page_of(to, true), b, part});
        from += part;
        to += part;
        count -= part;
      }
    });
    plan.end_group();
  }
  std::sort(touches.begin(), touches.end(), [](const Touch& a, const Touch& b) {
    return a.page != b.page ? a.page < b.page : a.written > b.written;
  });
  // Of each page, the touches that write come first.
  for (size_t i = 0, first = 0; i < touches.size(); ++i) {
    if (touches[i].page != touches[first].page) first = i;
    ALIGNOPS_CHECK(!touches[first].written || touches[i].row == touches[first].row, op,
                   ": block_table must not share a page whose slots move, got page ",
                   touches[i].page, " twice, in rows ", touches[first].row / pages.per_row, " and ",
                   touches[i].row / pages.per_row);
  }
  return plan;
}

Plan plan_packed(const char* op, Ints cu, Ints new_cu, int64_t rows, int64_t from_slots,
                 int64_t to_slots, bool in_place) {
  const auto check = [&](const char* argument, Ints offsets, int64_t limit) {
    ALIGNOPS_CHECK(offsets[0] >= 0 && offsets[rows] <= limit, op, ": ", argument,
                   " must lie in [0, ", limit, "], got ", offsets[0], " to ", offsets[rows]);
    for (int64_t row = 0; row < rows; ++row)
      ALIGNOPS_CHECK(offsets[row] <= offsets[row + 1], op, ": ", argument,
                     " must not decrease, got ", offsets[row], " before ", offsets[row + 1]);
  };
  check("cu", cu, from_slots);
  check("new_cu", new_cu, to_slots);
  Plan plan;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t from = cu[row], to = new_cu[row];
    ALIGNOPS_CHECK(!in_place || to <= from, op,
                   ": new_cu must not exceed cu where out is caches, got ", to, " and ", from,
                   " in row ", row);
    const int64_t count = std::min(cu[row + 1] - from, new_cu[row + 1] - to);
    if (count > 0 && !(in_place && from == to)) plan.moves.push_back({0, from, 0, to, count});
    // In place a row goes where the rows before it were.
    if (!in_place) plan.end_group();
  }
  plan.end_group();
  return plan;
}

void plan_realign(const char* op, const Realign& args) {
  int64_t width = 0, new_width = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t content = args.content[row], pad = args.pad[row], emitted = args.emitted[row];
    constexpr int64_t kMost = INT32_MAX / 2;
    check_length(op, "c", content, row);
    check_length(op, "pad", pad, row);
    check_length(op, "emitted", emitted, row);
    ALIGNOPS_CHECK(content <= kMost && pad <= kMost && emitted <= kMost, op,
                   ": c must be below 2**30 with pad and emitted, got ", content, ", ", pad,
                   " and ", emitted, " in row ", row);
    if (row == 0) width = content + pad;
    ALIGNOPS_CHECK(content + pad == width, op, ": pad must fill every row up to ", width,
                   " columns (those of row 0), got ", content, " + ", pad, " in row ", row);
    new_width = std::max(new_width, content + emitted);
  }
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t content = args.content[row] + args.emitted[row], pad = new_width - content;
    args.src[row] = static_cast<int32_t>(args.pad[row]);
    args.dst[row] = static_cast<int32_t>(pad);
    args.length[row] = static_cast<int32_t>(std::max<int64_t>(content - 1, 0));
    args.new_pad[row] = static_cast<int32_t>(pad);
  }
}

}  // namespace alignops::speculative
