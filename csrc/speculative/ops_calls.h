// The arguments of each op that moves slots or builds tables, checked but for values, with results
// allocated: what the CPU and the CUDA op have in common.
#pragma once

#include <tuple>

#include "ops_layout.h"

namespace alignops::speculative {

using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

struct RealignCall {
  Realign args;
  std::tuple<Tensor, Tensor, Tensor, Tensor> out;
};

inline RealignCall realign_call(const Tensor& c, const Tensor& pad, const Tensor& emitted,
                                const char* op, int32_t device = kCpu) {
  const int64_t rows = check_vector(c, op, "c");
  const Ints content = as_ints(c, {rows}, op, "c", device),
             padding = as_ints(pad, {rows}, op, "pad", device),
             more = as_ints(emitted, {rows}, op, "emitted", device);
  const auto make = [&] { return torch::stable::new_empty(c, {rows}, ScalarType::Int); };
  Tensor src = make(), dst = make(), length = make(), new_pad = make();
  return {{content, padding, more, rows, src.mutable_data_ptr<int32_t>(),
           dst.mutable_data_ptr<int32_t>(), length.mutable_data_ptr<int32_t>(),
           new_pad.mutable_data_ptr<int32_t>()},
          {src, dst, length, new_pad}};
}

struct ShiftCall {
  Table caches;
  Ints src, dst, length;
  int64_t rows;
};

inline ShiftCall shift_call(const Tensors& caches, const Tensor& src, const Tensor& dst,
                            const Tensor& length, int64_t slot_dim, const char* op,
                            int32_t device = kCpu) {
  ShiftCall call{};
  call.caches = as_table(caches, axes_of(slot_dim, op), true, op, "caches", device);
  call.rows = caches.empty() ? check_vector(src, op, "src") : rows_of(call.caches);
  call.src = as_ints(src, {call.rows}, op, "src", device);
  call.dst = as_ints(dst, {call.rows}, op, "dst", device);
  call.length = as_ints(length, {call.rows}, op, "length", device);
  check_memory(call.caches, {}, op, "caches");
  return call;
}

// Whether the tables are the same tensors.
inline bool same_tables(const Table& a, const Table& b) {
  return a.size() == b.size() &&
         std::equal(a.begin(), a.end(), b.begin(), [](const CacheTensor& x, const CacheTensor& y) {
           return x.data == y.data && x.rows == y.rows && x.slots == y.slots &&
                  x.row_stride == y.row_stride && x.head_stride == y.head_stride &&
                  x.slot_stride == y.slot_stride;
         });
}

struct GatherCall {
  Table from, to;
  GatherPlan plan;
};

inline GatherCall gather_call(const Tensors& caches, const Tensor& rows, const Optional& src,
                              const Optional& dst, const Optional& length, const Tensors& out,
                              int64_t slot_dim, const char* op, int32_t device = kCpu) {
  const Axes axes = axes_of(slot_dim, op);
  GatherCall call{};
  call.from = as_table(caches, axes, false, op, "caches", device);
  call.to = as_table(out, axes, true, op, "out", device);
  check_pairs(out, call.to, caches, call.from, op, "out");
  const int64_t count = check_vector(rows, op, "rows");
  ALIGNOPS_CHECK(out.empty() || rows_of(call.to) == count, op, ": out must have ", count,
                 " rows (those of rows), got ", rows_of(call.to));
  ALIGNOPS_CHECK(src.has_value() == length.has_value() && dst.has_value() == length.has_value(), op,
                 ": length must be given exactly if src and dst are, got ",
                 length.has_value() ? "it" : "none");
  if (!length.has_value()) check_whole_rows(call.from, call.to, op);
  call.plan = {as_ints(rows, {count}, op, "rows", device),
               count,
               as_ints(src, {count}, op, "src", device),
               as_ints(dst, {count}, op, "dst", device),
               as_ints(length, {count}, op, "length", device),
               same_tables(call.from, call.to),
               rows_of(call.from),
               slots_of(call.from),
               slots_of(call.to)};
  check_memory(call.to, call.plan.in_place ? Table{} : call.from, op, "out");
  return call;
}

inline TreePlan as_tree_plan(const Tensor& base, const Tensor& path, const Tensor& length,
                             const char* op, int32_t device) {
  const int64_t rows = check_vector(base, op, "base");
  const int64_t nodes = check_matrix(path, rows, op, "path");
  return {as_ints(base, {rows}, op, "base", device),
          as_ints(path, {rows, nodes}, op, "path", device),
          as_ints(length, {rows}, op, "length", device), rows, nodes};
}

struct TreeCall {
  Table caches;
  TreePlan plan;
};

inline TreeCall tree_call(const Tensors& caches, const Tensor& base, const Tensor& path,
                          const Tensor& length, int64_t slot_dim, const char* op,
                          int32_t device = kCpu) {
  TreeCall call{as_table(caches, axes_of(slot_dim, op), true, op, "caches", device),
                as_tree_plan(base, path, length, op, device)};
  ALIGNOPS_CHECK(caches.empty() || rows_of(call.caches) == call.plan.rows, op,
                 ": base must have shape (", rows_of(call.caches), ",), got ",
                 shape_string(base.sizes()));
  check_memory(call.caches, {}, op, "caches");
  return call;
}

struct PagedTreeCall {
  Table caches;
  TreePlan plan;
  Pages pages;
};

inline PagedTreeCall paged_tree_call(const Tensors& caches, const Tensor& block_table,
                                     const Tensor& base, const Tensor& path, const Tensor& length,
                                     int64_t slot_dim, const char* op, int32_t device = kCpu) {
  PagedTreeCall call{as_table(caches, axes_of(slot_dim, op), true, op, "caches", device),
                     as_tree_plan(base, path, length, op, device),
                     {}};
  const int64_t rows = call.plan.rows, per_row = check_matrix(block_table, rows, op, "block_table");
  const int64_t page = slots_of(call.caches);
  call.pages = {as_ints(block_table, {rows, per_row}, op, "block_table", device), per_row, page,
                rows_of(call.caches)};
  for (const CacheTensor& t : call.caches)
    ALIGNOPS_CHECK(t.slots == page, op, ": caches must have pages of the same size, got ", page,
                   " and ", t.slots, " slots");
  check_memory(call.caches, {}, op, "caches");
  return call;
}

struct PackedCall {
  Table from, to;
  Ints cu, new_cu;
  int64_t rows;
  bool in_place;
};

inline PackedCall packed_call(const Tensors& caches, const Tensor& cu, const Tensor& new_cu,
                              const Tensors& out, const char* op, int32_t device = kCpu) {
  PackedCall call{};
  call.from = as_table(caches, kPackedAxes, false, op, "caches", device);
  call.to = as_table(out, kPackedAxes, true, op, "out", device);
  check_pairs(out, call.to, caches, call.from, op, "out");
  const int64_t offsets = check_vector(cu, op, "cu");
  ALIGNOPS_CHECK(offsets >= 1, op, ": cu must have shape (rows + 1,), got (0,)");
  call.cu = as_ints(cu, {offsets}, op, "cu", device);
  call.new_cu = as_ints(new_cu, {offsets}, op, "new_cu", device);
  call.rows = offsets - 1;
  call.in_place = same_tables(call.from, call.to);
  check_memory(call.to, call.in_place ? Table{} : call.from, op, "out");
  return call;
}

struct AppendCall {
  Table from, to;
  Ints lens, counts;
  int64_t rows, columns;
};

inline AppendCall append_call(const Tensors& caches, const Tensors& columns, const Tensor& lens,
                              const Optional& counts, int64_t slot_dim, const char* op,
                              int32_t device = kCpu) {
  const Axes axes = axes_of(slot_dim, op);
  AppendCall call{};
  call.to = as_table(caches, axes, true, op, "caches", device);
  call.from = as_table(columns, axes, false, op, "new", device);
  check_pairs(columns, call.from, caches, call.to, op, "new");
  call.rows = caches.empty() ? check_vector(lens, op, "lens") : rows_of(call.to);
  call.columns = slots_of(call.from);
  for (const CacheTensor& t : call.from)
    ALIGNOPS_CHECK(t.rows == call.rows && t.slots == call.columns, op, ": new must have ",
                   call.rows, " rows (as caches) and equally many columns, got ", t.rows,
                   " rows and ", t.slots, " columns where the first has ", call.columns);
  call.lens = as_ints(lens, {call.rows}, op, "lens", device);
  call.counts = as_ints(counts, {call.rows}, op, "counts", device);
  check_memory(call.to, call.from, op, "new");
  return call;
}

struct PositionsCall {
  Queries queries;
  Ints pad;
};

inline PositionsCall positions_call(const Tensor& c, int64_t q_len, const Optional& pad,
                                    const Optional& counts, const Optional& depth, const char* op,
                                    int32_t device = kCpu) {
  const Queries queries = as_queries(c, q_len, counts, depth, op, device);
  const Ints padding = as_ints(pad, {queries.rows}, op, "pad", device);
  ALIGNOPS_CHECK(!pad.has_value() || (!counts.has_value() && !depth.has_value()), op,
                 ": pad must be given without counts and depth: it is of columns, they of queries");
  return {queries, padding};
}

struct OffsetsCall {
  Queries queries;
  Tensor of_queries, of_slots;
};

inline OffsetsCall offsets_call(const Tensor& c, int64_t q_len, const Optional& counts,
                                const char* op, int32_t device = kCpu) {
  const Queries queries = as_queries(c, q_len, counts, std::nullopt, op, device);
  const auto make = [&] {
    return torch::stable::new_empty(c, {queries.rows + 1}, ScalarType::Int);
  };
  return {queries, make(), make()};
}

struct TreeTablesCall {
  TreeTables tables;
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> out;
};

inline TreeTablesCall tree_tables_call(const Tensor& parent, const char* op,
                                       int32_t device = kCpu) {
  TreeTables tables = as_tree(parent, op, device);
  const int64_t rows = tables.rows, n = tables.nodes;
  const auto make = [&](ScalarType dtype) {
    return torch::stable::new_empty(parent, {rows, n}, dtype);
  };
  Tensor depth = make(ScalarType::Int), ancestors = make(ScalarType::Long);
  Tensor first_child = make(ScalarType::Int), next_sibling = make(ScalarType::Int);
  Tensor block = torch::stable::new_empty(parent, {rows, n, n}, ScalarType::Bool);
  tables.depth = depth.mutable_data_ptr<int32_t>();
  tables.ancestors = ancestors.mutable_data_ptr<int64_t>();
  tables.first_child = first_child.mutable_data_ptr<int32_t>();
  tables.next_sibling = next_sibling.mutable_data_ptr<int32_t>();
  tables.block = block.mutable_data_ptr<bool>();
  return {tables, {depth, ancestors, first_child, next_sibling, block}};
}

struct SelectCall {
  TreeSelection selection;
  std::tuple<Tensor, Tensor> out;
};

inline SelectCall select_call(const Tensor& scores, const Tensor& parents, int64_t n,
                              const char* op, int32_t device = kCpu) {
  TreeSelection selection = as_selection(scores, parents, n, op, device);
  Tensor nodes = torch::stable::new_empty(scores, {selection.rows, n}, ScalarType::Int);
  Tensor parent = torch::stable::new_empty(scores, {selection.rows, n + 1}, ScalarType::Int);
  selection.nodes = nodes.mutable_data_ptr<int32_t>();
  selection.parent = parent.mutable_data_ptr<int32_t>();
  return {selection, {nodes, parent}};
}

}  // namespace alignops::speculative
