// Positions, masks and tree tables. Schemas and CPU implementations; values are checked first.
#include "ops_calls.h"

namespace alignops::speculative {
namespace {

Tensor positions(const Tensor& c, int64_t q_len, const Optional& pad, const Optional& counts,
                 const Optional& depth) {
  const char* op = "speculative_positions";
  const auto [queries, padding] = positions_call(c, q_len, pad, counts, depth, op);
  check_queries(op, queries);
  Tensor out = torch::stable::new_empty(c, {queries.rows, q_len}, ScalarType::Long);
  auto* values = out.mutable_data_ptr<int64_t>();
  if (padding) {
    column_positions(queries.content, padding, queries.rows, q_len, values);
  } else {
    query_positions(queries, values);
  }
  return out;
}

Tensor mask(const Tensor& c, int64_t q_len, int64_t slots, int64_t kind, ScalarType dtype,
            std::vector<int64_t> windows, const Optional& pad, const Optional& first,
            const Optional& counts, const Optional& slot_positions, const Optional& depth,
            const Optional& ancestors) {
  const char* op = "speculative_mask";
  MaskArgs args = as_mask(c, q_len, slots, kind, dtype, windows, pad, first, counts, slot_positions,
                          depth, ancestors, op);
  check_mask(op, args);
  Tensor out = new_mask(c, args, dtype);
  const int64_t rows = args.queries.rows;
  if (args.kind == MaskKind::kRow) {
    torch::stable::parallel_for(
        0, rows, grain_rows(slots),
        [&](int64_t begin, int64_t end) noexcept { fill_row_mask(args, begin, end); });
  } else {
    torch::stable::parallel_for(
        0, args.window_count * rows * q_len, grain_rows(slots * args.element),
        [&](int64_t begin, int64_t end) noexcept { fill_mask(args, begin, end); });
  }
  return out;
}

std::tuple<Tensor, Tensor> cu_seqlens(const Tensor& c, int64_t q_len, const Optional& counts) {
  const char* op = "speculative_cu_seqlens";
  OffsetsCall call = offsets_call(c, q_len, counts, op);
  offsets(op, call.queries, call.of_queries.mutable_data_ptr<int32_t>(),
          call.of_slots.mutable_data_ptr<int32_t>());
  return {call.of_queries, call.of_slots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tree_tables(const Tensor& parent) {
  const char* op = "speculative_tree_tables";
  const TreeTablesCall call = tree_tables_call(parent, op);
  check_tree(op, call.tables);
  fill_tree(call.tables);
  return call.out;
}

std::tuple<Tensor, Tensor> tree_select(const Tensor& scores, const Tensor& parents, int64_t n) {
  const char* op = "speculative_tree_select";
  const SelectCall call = select_call(scores, parents, n, op);
  select_tree(op, call.selection);
  return call.out;
}

}  // namespace
}  // namespace alignops::speculative

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def(
      "speculative_positions(Tensor c, SymInt q_len, Tensor? pad, Tensor? counts, Tensor? depth) "
      "-> "
      "Tensor");
  m.def(
      "speculative_mask(Tensor c, SymInt q_len, SymInt slots, int kind, ScalarType dtype, int[] "
      "windows, Tensor? pad, Tensor? first, Tensor? counts, Tensor? slot_positions, Tensor? depth, "
      "Tensor? ancestors) -> Tensor");
  m.def(
      "speculative_cu_seqlens(Tensor c, SymInt q_len, Tensor? counts) -> (Tensor queries, Tensor "
      "slots)");
  m.def(
      "speculative_tree_tables(Tensor parent) -> (Tensor depth, Tensor ancestors, Tensor "
      "first_child, Tensor next_sibling, Tensor block)");
  m.def(
      "speculative_tree_select(Tensor scores, Tensor parents, int n) -> (Tensor nodes, Tensor "
      "parent)");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("speculative_positions", TORCH_BOX(&alignops::speculative::positions));
  m.impl("speculative_mask", TORCH_BOX(&alignops::speculative::mask));
  m.impl("speculative_cu_seqlens", TORCH_BOX(&alignops::speculative::cu_seqlens));
  m.impl("speculative_tree_tables", TORCH_BOX(&alignops::speculative::tree_tables));
  m.impl("speculative_tree_select", TORCH_BOX(&alignops::speculative::tree_select));
}
