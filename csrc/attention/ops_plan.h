// Arguments of the attention ops, checked: caches, plans, rotations.
#pragma once

#include "../common/ops_common.h"
#include "attention/kernels.h"

namespace alignops::attention {

// [pages, Hkv, P, columns] with contiguous heads.
inline Cache as_cache(const Tensor& t, const char* op, const char* argument) {
  check_device(t, kCpu, op, argument);
  const DType dtype = float_dtype(t.scalar_type(), op, argument);
  ALIGNOPS_CHECK(t.dim() == 4, op, ": ", argument, " must have 4 dimensions, got shape ",
                 shape_string(t.sizes()));
  const int64_t columns = t.size(3);
  ALIGNOPS_CHECK(columns >= 1 && columns <= kMaxColumns, op, ": ", argument, " must have 1..",
                 kMaxColumns, " columns, got ", columns);
  ALIGNOPS_CHECK(t.stride(3) == 1 && t.stride(2) == columns, op, ": ", argument,
                 " must have contiguous slots, got strides ", shape_string(t.strides()));
  // The data is written only where the schema says so.
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype, columns, t.stride(0),
          t.stride(1)};
}

struct Caches {
  Cache k, v;
  int64_t pages, heads, page_size;
};

inline Caches as_caches(const Tensor& k, const Tensor& v, const char* op) {
  const Cache keys = as_cache(k, op, "k"), values = as_cache(v, op, "v");
  ALIGNOPS_CHECK(v.scalar_type() == k.scalar_type(), op, ": v must be ",
                 dtype_name(k.scalar_type()), " (as k), got ", dtype_name(v.scalar_type()));
  for (int64_t d = 0; d < 3; ++d)
    ALIGNOPS_CHECK(v.size(d) == k.size(d), op, ": v must have pages, heads and slots of k, ",
                   shape_string(k.sizes()), ", got shape ", shape_string(v.sizes()));
  ALIGNOPS_CHECK(k.size(1) >= 1, op, ": k must have at least one head, got shape ",
                 shape_string(k.sizes()));
  return {keys, values, k.size(0), k.size(1), k.size(2)};
}

// No two slots of a cache that is written may lie on the same memory.
inline void check_apart(const Tensor& t, const char* op, const char* argument) {
  const int64_t slots = t.size(2) * t.size(3);
  const bool apart = (t.size(1) <= 1 || t.stride(1) >= slots) &&
                     (t.size(0) <= 1 ||
                      t.stride(0) >= (t.size(1) - 1) * std::max<int64_t>(t.stride(1), 0) + slots);
  const bool turned =
      t.stride(0) >= slots &&
      (t.size(0) <= 1 || t.size(1) <= 1 || t.stride(1) >= (t.size(0) - 1) * t.stride(0) + slots);
  ALIGNOPS_CHECK(apart || turned, op, ": ", argument, " must not overlap itself, got strides ",
                 shape_string(t.strides()));
}

// [R, heads, columns] with any strides but 1 of the last dimension.
inline Packed as_packed(const Tensor& t, const char* op, const char* argument) {
  check_device(t, kCpu, op, argument);
  const DType dtype = float_dtype(t.scalar_type(), op, argument);
  ALIGNOPS_CHECK(t.dim() == 3, op, ": ", argument, " must have 3 dimensions, got shape ",
                 shape_string(t.sizes()));
  ALIGNOPS_CHECK(t.size(2) <= 1 || t.stride(2) == 1 || t.size(0) == 0, op, ": ", argument,
                 " must have stride 1 in the last dimension, got strides ",
                 shape_string(t.strides()));
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())), dtype, t.stride(0),
          t.stride(1)};
}

inline PlanView as_plan(const Tensor& plan, int64_t pages, const char* op) {
  check_device(plan, kCpu, op, "plan");
  ALIGNOPS_CHECK(plan.scalar_type() == ScalarType::Long, op, ": plan must be int64, got ",
                 dtype_name(plan.scalar_type()));
  ALIGNOPS_CHECK(plan.dim() == 1 && plan.is_contiguous(), op,
                 ": plan must be contiguous with one dimension, got shape ",
                 shape_string(plan.sizes()));
  return view_plan(plan.const_data_ptr<int64_t>(), plan.size(0), pages, op);
}

inline void check_page_size(const PlanView& plan, const Caches& caches, const char* op) {
  ALIGNOPS_CHECK(caches.page_size == plan.header.page_size, op, ": k must have ",
                 plan.header.page_size, " slots per page (as plan), got ", caches.page_size);
}

inline void check_rotary(int64_t pairs, int64_t offset, int64_t columns, const char* op) {
  ALIGNOPS_CHECK(offset >= 0 && offset <= columns && 2 * pairs <= columns - offset, op,
                 ": rotary_offset must leave room for ", 2 * pairs, " of ", columns,
                 " columns, got ", offset);
}

// Rotation of a rope type of the plan; -1: none.
inline Rotary as_rotary(const PlanView& plan, int64_t rope, int64_t offset, bool interleaved,
                        int64_t columns, const char* op) {
  ALIGNOPS_CHECK(rope >= -1 && rope < plan.header.types, op, ": rope must be -1 or one of ",
                 plan.header.types, " types of plan, got ", rope);
  const int64_t pairs = rope < 0 ? 0 : plan.ropes[rope].pairs;
  check_rotary(pairs, offset, columns, op);
  return {pairs, offset, interleaved};
}

}  // namespace alignops::attention
