// Lengths, trees and masks as tensors, for the CPU and the CUDA ops: checks of everything but
// values, and the allocation of results.
#pragma once

#include <optional>
#include <vector>

#include "layout.h"
#include "ops_kv.h"

namespace alignops::speculative {

// (rows, columns), or (columns) for all rows. Returns whether it is for all rows.
inline bool check_shared(const Tensor& t, int64_t rows, int64_t columns, const char* op,
                         const char* argument) {
  const bool shared = t.dim() == 1;
  ALIGNOPS_CHECK((shared && t.size(0) == columns) ||
                     (t.dim() == 2 && t.size(0) == rows && t.size(1) == columns),
                 op, ": ", argument, " must have shape (", columns, ",) or (", rows, ", ", columns,
                 "), got ", shape_string(t.sizes()));
  return shared;
}

inline Queries as_queries(const Tensor& c, int64_t q_len, const std::optional<Tensor>& counts,
                          const std::optional<Tensor>& depth, const char* op,
                          int32_t device = kCpu) {
  ALIGNOPS_CHECK(q_len >= 0, op, ": q_len must not be negative, got ", q_len);
  const int64_t rows = check_vector(c, op, "c");
  Queries queries{rows,
                  q_len,
                  as_ints(c, {rows}, op, "c", device),
                  as_ints(counts, {rows}, op, "counts", device),
                  {nullptr, false},
                  false};
  if (depth.has_value()) {
    queries.depth_shared = check_shared(*depth, rows, q_len, op, "depth");
    queries.depth = as_ints(*depth, depth->sizes(), op, "depth", device);
  }
  return queries;
}

// Bytes of an additive mask's element, and the bits of the lowest value.
struct Element {
  int32_t bytes;
  uint64_t lowest;
};

inline Element additive_element(ScalarType dtype, const char* op) {
  switch (dtype) {
    case ScalarType::Float:
      return {4, 0xff7fffff};
    case ScalarType::BFloat16:
      return {2, 0xff7f};
    case ScalarType::Half:
      return {2, 0xfbff};
    case ScalarType::Double:
      return {8, 0xffefffffffffffff};
    default:
      throw std::invalid_argument(message(
          op, ": dtype must be float32, bfloat16, float16 or float64, got ", dtype_name(dtype)));
  }
}

// Everything but `out`; `windows` must outlive the result.
inline MaskArgs as_mask(const Tensor& c, int64_t q_len, int64_t slots, int64_t kind,
                        ScalarType dtype, const std::vector<int64_t>& windows,
                        const std::optional<Tensor>& pad, const std::optional<Tensor>& first,
                        const std::optional<Tensor>& counts,
                        const std::optional<Tensor>& slot_positions,
                        const std::optional<Tensor>& depth, const std::optional<Tensor>& ancestors,
                        const char* op, int32_t device = kCpu) {
  MaskArgs args{};
  args.queries = as_queries(c, q_len, counts, depth, op, device);
  const int64_t rows = args.queries.rows;
  ALIGNOPS_CHECK(slots >= 0, op, ": slots must not be negative, got ", slots);
  args.slots = slots;
  ALIGNOPS_CHECK(kind >= 0 && kind <= 3, op,
                 ": kind must be 0 (bool), 1 (additive), 2 (bits) or 3 (rows), got ", kind);
  args.kind = static_cast<MaskKind>(kind);
  for (const int64_t window : windows)
    ALIGNOPS_CHECK(window >= 0, op, ": windows must not be negative, got ", window);
  args.windows = windows.data();
  args.window_count = static_cast<int64_t>(windows.size());
  args.pad = as_ints(pad, {rows}, op, "pad", device);
  args.first = as_ints(first, {rows}, op, "first", device);
  args.positions = as_ints(slot_positions, {rows, slots}, op, "slot_positions", device);
  ALIGNOPS_CHECK(ancestors.has_value() == depth.has_value(), op,
                 ": ancestors must be given exactly if depth is, got ",
                 ancestors.has_value() ? "them" : "none");
  if (ancestors.has_value()) {
    ALIGNOPS_CHECK(q_len <= kMaxNodes, op, ": ancestors must be of at most ", kMaxNodes,
                   " nodes, got ", q_len);
    args.ancestors_shared = check_shared(*ancestors, rows, q_len, op, "ancestors");
    check_layout(*ancestors, ScalarType::Long, ancestors->sizes(), op, "ancestors", device);
    args.ancestors = {ancestors->const_data_ptr(), true};
  }
  args.element = 1;
  if (args.kind == MaskKind::kAdditive) {
    const Element element = additive_element(dtype, op);
    args.element = element.bytes;
    args.hidden = element.lowest;
  }
  return args;
}

// The tensor that a mask fills: (windows, rows, 1, queries, slots) of bool or dtype, int32
// (windows, rows, queries, words), or bool (rows, slots).
inline Tensor new_mask(const Tensor& like, MaskArgs& args, ScalarType dtype) {
  const int64_t w = args.window_count, b = args.queries.rows, q = args.queries.columns,
                s = args.slots;
  const auto make = [&]() -> Tensor {
    switch (args.kind) {
      case MaskKind::kBits:
        return torch::stable::new_empty(like, {w, b, q, (s + 31) / 32}, ScalarType::Int);
      case MaskKind::kRow:
        return torch::stable::new_empty(like, {b, s}, ScalarType::Bool);
      case MaskKind::kAdditive:
        return torch::stable::new_empty(like, {w, b, 1, q, s}, dtype);
      default:
        return torch::stable::new_empty(like, {w, b, 1, q, s}, ScalarType::Bool);
    }
  };
  Tensor out = make();
  args.out = out.mutable_data_ptr();
  return out;
}

// (rows, nodes) of a tree.
inline TreeTables as_tree(const Tensor& parent, const char* op, int32_t device = kCpu) {
  ALIGNOPS_CHECK(parent.dim() == 2, op, ": parent must have shape (rows, nodes), got ",
                 shape_string(parent.sizes()));
  const int64_t rows = parent.size(0), nodes = parent.size(1);
  ALIGNOPS_CHECK(nodes >= 1 && nodes <= kMaxNodes, op, ": parent must have 1 to ", kMaxNodes,
                 " nodes, got ", nodes);
  return {as_ints(parent, {rows, nodes}, op, "parent", device),
          rows,
          nodes,
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          nullptr};
}

inline TreeSelection as_selection(const Tensor& scores, const Tensor& parents, int64_t n,
                                  const char* op, int32_t device = kCpu) {
  ALIGNOPS_CHECK(scores.dim() == 2, op, ": scores must have shape (rows, candidates), got ",
                 shape_string(scores.sizes()));
  const int64_t rows = scores.size(0), candidates = scores.size(1);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  check_layout(scores, wide ? ScalarType::Double : ScalarType::Float, {rows, candidates}, op,
               "scores", device);
  ALIGNOPS_CHECK(n >= 0 && n <= candidates && n < kMaxNodes, op, ": n must lie in [0, ",
                 std::min(candidates, kMaxNodes - 1), "], got ", n);
  return {scores.const_data_ptr(),
          wide,
          as_ints(parents, {rows, candidates}, op, "parents", device),
          rows,
          candidates,
          n,
          nullptr,
          nullptr};
}

}  // namespace alignops::speculative
