// Moves of cache slots. Schemas and CPU implementations: every value of a plan is checked before
// any byte moves.
#include <tuple>

#include "ops_kv.h"

namespace alignops::speculative {
namespace {

using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

void apply(const Table& from, const Table& to, const Plan& plan) {
  const Transfer transfer(from, to, plan);
  torch::stable::parallel_for(
      0, transfer.strips(), grain_rows(2 * transfer.bytes_per_strip()),
      [&](int64_t begin, int64_t end) noexcept { transfer.run(begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> realign(const Tensor& c, const Tensor& pad,
                                                   const Tensor& emitted) {
  const char* op = "speculative_plan_realign";
  const int64_t rows = check_vector(c, op, "c");
  Realign args{as_ints(c, {rows}, op, "c"),
               as_ints(pad, {rows}, op, "pad"),
               as_ints(emitted, {rows}, op, "emitted"),
               rows,
               nullptr,
               nullptr,
               nullptr,
               nullptr};
  const auto make = [&] { return torch::stable::new_empty(c, {rows}, ScalarType::Int); };
  Tensor src = make(), dst = make(), length = make(), new_pad = make();
  args.src = src.mutable_data_ptr<int32_t>();
  args.dst = dst.mutable_data_ptr<int32_t>();
  args.length = length.mutable_data_ptr<int32_t>();
  args.new_pad = new_pad.mutable_data_ptr<int32_t>();
  plan_realign(op, args);
  return {src, dst, length, new_pad};
}

void shift(Tensors caches, const Tensor& src, const Tensor& dst, const Tensor& length,
           int64_t slot_dim) {
  const char* op = "speculative_kv_shift_";
  const Table table = as_table(caches, axes_of(slot_dim, op), true, op, "caches");
  const int64_t rows = caches.empty() ? check_vector(src, op, "src") : rows_of(table);
  const Ints from = as_ints(src, {rows}, op, "src"), to = as_ints(dst, {rows}, op, "dst"),
             count = as_ints(length, {rows}, op, "length");
  check_memory(table, {}, op, "caches");
  if (table.empty()) return;
  apply(table, table, plan_shift(op, from, to, count, rows, slots_of(table)));
}

// Whether the tables are the same tensors.
bool same_tables(const Table& a, const Table& b) {
  return a.size() == b.size() &&
         std::equal(a.begin(), a.end(), b.begin(), [](const CacheTensor& x, const CacheTensor& y) {
           return x.data == y.data && x.rows == y.rows && x.slots == y.slots &&
                  x.row_stride == y.row_stride && x.head_stride == y.head_stride &&
                  x.slot_stride == y.slot_stride;
         });
}

void gather(Tensors caches, const Tensor& rows, const Optional& src, const Optional& dst,
            const Optional& length, Tensors out, int64_t slot_dim) {
  const char* op = "speculative_kv_gather_";
  const Axes axes = axes_of(slot_dim, op);
  const Table from = as_table(caches, axes, false, op, "caches");
  const Table to = as_table(out, axes, true, op, "out");
  check_pairs(out, to, caches, from, op, "out");
  const int64_t count = check_vector(rows, op, "rows");
  ALIGNOPS_CHECK(out.empty() || rows_of(to) == count, op, ": out must have ", count,
                 " rows (those of rows), got ", rows_of(to));
  ALIGNOPS_CHECK(src.has_value() == length.has_value() && dst.has_value() == length.has_value(), op,
                 ": length must be given exactly if src and dst are, got ",
                 length.has_value() ? "it" : "none");
  const bool in_place = same_tables(from, to);
  const GatherPlan args{as_ints(rows, {count}, op, "rows"),
                        count,
                        as_ints(src, {count}, op, "src"),
                        as_ints(dst, {count}, op, "dst"),
                        as_ints(length, {count}, op, "length"),
                        in_place,
                        rows_of(from),
                        slots_of(from),
                        slots_of(to)};
  check_memory(to, in_place ? Table{} : from, op, "out");
  if (from.empty()) return;
  apply(from, to, plan_gather(op, args));
}

TreePlan as_tree_plan(const Tensor& base, const Tensor& path, const Tensor& length,
                      const char* op) {
  const int64_t rows = check_vector(base, op, "base");
  const int64_t nodes = check_matrix(path, rows, op, "path");
  return {as_ints(base, {rows}, op, "base"), as_ints(path, {rows, nodes}, op, "path"),
          as_ints(length, {rows}, op, "length"), rows, nodes};
}

void tree(Tensors caches, const Tensor& base, const Tensor& path, const Tensor& length,
          int64_t slot_dim) {
  const char* op = "speculative_kv_tree_";
  const Table table = as_table(caches, axes_of(slot_dim, op), true, op, "caches");
  const TreePlan args = as_tree_plan(base, path, length, op);
  ALIGNOPS_CHECK(table.empty() || rows_of(table) == args.rows, op, ": base must have shape (",
                 rows_of(table), ",), got ", shape_string(base.sizes()));
  check_memory(table, {}, op, "caches");
  if (table.empty()) return;
  apply(table, table, plan_tree(op, args, slots_of(table)));
}

void paged_tree(Tensors caches, const Tensor& block_table, const Tensor& base, const Tensor& path,
                const Tensor& length, int64_t slot_dim) {
  const char* op = "speculative_kv_paged_tree_";
  const Table table = as_table(caches, axes_of(slot_dim, op), true, op, "caches");
  const TreePlan args = as_tree_plan(base, path, length, op);
  const int64_t per_row = check_matrix(block_table, args.rows, op, "block_table");
  const Ints pages = as_ints(block_table, {args.rows, per_row}, op, "block_table");
  const int64_t page = slots_of(table);
  for (const CacheTensor& t : table)
    ALIGNOPS_CHECK(t.slots == page, op, ": caches must have pages of the same size, got ", page,
                   " and ", t.slots, " slots");
  check_memory(table, {}, op, "caches");
  if (table.empty()) return;
  apply(table, table, plan_paged_tree(op, args, {pages, per_row, page, rows_of(table)}));
}

void packed(Tensors caches, const Tensor& cu, const Tensor& new_cu, Tensors out) {
  const char* op = "speculative_kv_packed_";
  const Table from = as_table(caches, kPackedAxes, false, op, "caches");
  const Table to = as_table(out, kPackedAxes, true, op, "out");
  check_pairs(out, to, caches, from, op, "out");
  const int64_t offsets = check_vector(cu, op, "cu");
  ALIGNOPS_CHECK(offsets >= 1, op, ": cu must have shape (rows + 1,), got (0,)");
  const Ints begin = as_ints(cu, {offsets}, op, "cu"),
             new_begin = as_ints(new_cu, {offsets}, op, "new_cu");
  const bool in_place = same_tables(from, to);
  check_memory(to, in_place ? Table{} : from, op, "out");
  if (from.empty()) return;
  apply(from, to,
        plan_packed(op, begin, new_begin, offsets - 1, slots_of(from), slots_of(to), in_place));
}

void append(Tensors caches, Tensors columns, const Tensor& lens, const Optional& counts,
            int64_t slot_dim) {
  const char* op = "speculative_ragged_append_";
  const Axes axes = axes_of(slot_dim, op);
  const Table to = as_table(caches, axes, true, op, "caches");
  const Table from = as_table(columns, axes, false, op, "new");
  check_pairs(columns, from, caches, to, op, "new");
  const int64_t rows = caches.empty() ? check_vector(lens, op, "lens") : rows_of(to);
  const int64_t width = slots_of(from);
  for (const CacheTensor& t : from)
    ALIGNOPS_CHECK(t.rows == rows && t.slots == width, op, ": new must have ", rows,
                   " rows (as caches) and equally many columns, got ", t.rows, " rows and ",
                   t.slots, " columns where the first has ", width);
  const Ints start = as_ints(lens, {rows}, op, "lens"),
             count = as_ints(counts, {rows}, op, "counts");
  check_memory(to, from, op, "new");
  if (to.empty()) return;
  apply(from, to, plan_append(op, start, count, rows, width, slots_of(to)));
}

}  // namespace
}  // namespace alignops::speculative

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def(
      "speculative_plan_realign(Tensor c, Tensor pad, Tensor emitted) -> (Tensor src, Tensor dst, "
      "Tensor length, Tensor new_pad)");
  m.def(
      "speculative_kv_shift_(Tensor(a!)[] caches, Tensor src, Tensor dst, Tensor length, int "
      "slot_dim) -> ()");
  m.def(
      "speculative_kv_gather_(Tensor[] caches, Tensor rows, Tensor? src, Tensor? dst, Tensor? "
      "length, Tensor(a!)[] out, int slot_dim) -> ()");
  m.def(
      "speculative_kv_tree_(Tensor(a!)[] caches, Tensor base, Tensor path, Tensor length, int "
      "slot_dim) -> ()");
  m.def(
      "speculative_kv_paged_tree_(Tensor(a!)[] caches, Tensor block_table, Tensor base, Tensor "
      "path, Tensor length, int slot_dim) -> ()");
  m.def(
      "speculative_kv_packed_(Tensor[] caches, Tensor cu, Tensor new_cu, Tensor(a!)[] out) -> ()");
  m.def(
      "speculative_ragged_append_(Tensor(a!)[] caches, Tensor[] new, Tensor lens, Tensor? counts, "
      "int slot_dim) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("speculative_plan_realign", TORCH_BOX(&alignops::speculative::realign));
  m.impl("speculative_kv_shift_", TORCH_BOX(&alignops::speculative::shift));
  m.impl("speculative_kv_gather_", TORCH_BOX(&alignops::speculative::gather));
  m.impl("speculative_kv_tree_", TORCH_BOX(&alignops::speculative::tree));
  m.impl("speculative_kv_paged_tree_", TORCH_BOX(&alignops::speculative::paged_tree));
  m.impl("speculative_kv_packed_", TORCH_BOX(&alignops::speculative::packed));
  m.impl("speculative_ragged_append_", TORCH_BOX(&alignops::speculative::append));
}
