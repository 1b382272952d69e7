// A cache and its plans as tensors, for the CPU and the CUDA ops: checks of everything but values.
//
// A cache is a list of tensors (B, H, S, D), or (B, S, H, D) with slot_dim 1: any element of 1, 2,
// 4 or 8 bytes, any strides but 1 for D. H, S and D may differ from tensor to tensor, B may not.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "../common/ops_common.h"
#include "moves.h"

namespace alignops::speculative {

// Which of a tensor's dimensions are rows, heads and slots.
struct Axes {
  int64_t row, head, slot;
};

inline Axes axes_of(int64_t slot_dim, const char* op) {
  ALIGNOPS_CHECK(slot_dim == 1 || slot_dim == 2, op, ": slot_dim must be 1 or 2, got ", slot_dim);
  return {0, 3 - slot_dim, slot_dim};
}

// (slots, H, D): one long row.
inline constexpr Axes kPackedAxes{-1, 1, 0};

inline CacheTensor as_cache(const Tensor& t, const Axes& axes, const char* op, const char* argument,
                            int64_t index, int32_t device) {
  check_device(t, device, op, argument);
  const int64_t dims = axes.row < 0 ? 3 : 4;
  ALIGNOPS_CHECK(t.dim() == dims, op, ": ", argument, " must have ", dims,
                 " dimensions, got shape ", shape_string(t.sizes()), " at ", index);
  const auto element = static_cast<int64_t>(t.element_size());
  ALIGNOPS_CHECK(element == 1 || element == 2 || element == 4 || element == 8, op, ": ", argument,
                 " must have elements of 1, 2, 4 or 8 bytes, got ", element, " at ", index);
  const int64_t width = t.size(dims - 1);
  ALIGNOPS_CHECK(width <= 1 || t.stride(dims - 1) == 1, op, ": ", argument,
                 " must have stride 1 in the last dimension, got strides ",
                 shape_string(t.strides()), " at ", index);
  const auto size = [&](int64_t axis) { return axis < 0 ? 1 : t.size(axis); };
  const auto stride = [&](int64_t axis) { return axis < 0 ? 0 : t.stride(axis) * element; };
  // The data is written only where the schema says so.
  return {static_cast<char*>(const_cast<void*>(t.const_data_ptr())),
          size(axes.row),
          size(axes.head),
          size(axes.slot),
          width * element,
          stride(axes.row),
          stride(axes.head),
          stride(axes.slot)};
}

using Table = std::vector<CacheTensor>;

// Tensors that agree on the number of rows; those that are written may not overlap themselves.
inline Table as_table(const std::vector<Tensor>& tensors, const Axes& axes, bool written,
                      const char* op, const char* argument, int32_t device = kCpu) {
  Table table;
  for (const Tensor& t : tensors) {
    const auto index = static_cast<int64_t>(table.size());
    table.push_back(as_cache(t, axes, op, argument, index, device));
    ALIGNOPS_CHECK(table.back().rows == table.front().rows, op, ": ", argument,
                   " must have the same number of rows, got ", table.front().rows, " at 0 and ",
                   table.back().rows, " at ", index);
    ALIGNOPS_CHECK(!written || !overlaps_itself(table.back()), op, ": ", argument,
                   " must not overlap themselves, got strides ", shape_string(t.strides()), " at ",
                   index);
  }
  return table;
}

inline int64_t rows_of(const Table& table) { return table.empty() ? 0 : table.front().rows; }

// The smallest number of slots of any tensor.
inline int64_t slots_of(const Table& table) {
  int64_t slots = table.empty() ? 0 : std::numeric_limits<int64_t>::max();
  for (const CacheTensor& t : table) slots = std::min(slots, t.slots);
  return slots;
}

// Tensor by tensor the same dtype, heads and head size.
inline void check_pairs(const std::vector<Tensor>& from, const Table& from_table,
                        const std::vector<Tensor>& to, const Table& to_table, const char* op,
                        const char* argument) {
  ALIGNOPS_CHECK(from.size() == to.size(), op, ": ", argument, " must have ", to.size(),
                 " tensors (as caches), got ", from.size());
  for (size_t i = 0; i < from.size(); ++i) {
    const CacheTensor &a = from_table[i], &b = to_table[i];
    ALIGNOPS_CHECK(from[i].scalar_type() == to[i].scalar_type(), op, ": ", argument, " must be ",
                   dtype_name(to[i].scalar_type()), " (as caches) at ", i, ", got ",
                   dtype_name(from[i].scalar_type()));
    ALIGNOPS_CHECK(a.heads == b.heads && a.bytes == b.bytes, op, ": ", argument,
                   " must have the heads and the head size of caches at ", i, ", got shape ",
                   shape_string(from[i].sizes()), " for ", shape_string(to[i].sizes()));
  }
}

// Whole rows go to other tensors: all have the same number of slots, and the others have room.
inline void check_whole_rows(const Table& from, const Table& to, const char* op) {
  const int64_t slots = slots_of(from);
  for (size_t i = 0; i < from.size(); ++i) {
    ALIGNOPS_CHECK(from[i].slots == slots, op, ": length must be given for tensors of ", slots,
                   " and ", from[i].slots, " slots, got none");
    ALIGNOPS_CHECK(to[i].slots >= slots, op, ": out must have at least ", slots,
                   " slots (those of caches), got ", to[i].slots, " at ", i);
  }
}

// No two written tensors, and no written one and one that is read, may share memory.
inline void check_memory(const Table& written, const Table& read, const char* op,
                         const char* argument) {
  struct Place {
    const CacheTensor* tensor;
    bool written;
  };
  std::vector<Place> places;
  for (const CacheTensor& t : written) places.push_back({&t, true});
  for (const CacheTensor& t : read) places.push_back({&t, false});
  std::sort(places.begin(), places.end(),
            [](const Place& a, const Place& b) { return a.tensor->data < b.tensor->data; });
  for (size_t i = 0; i < places.size(); ++i)
    for (size_t j = i + 1; j < places.size(); ++j) {
      if (places[j].tensor->data >= end_of(*places[i].tensor)) break;
      ALIGNOPS_CHECK(!(places[i].written || places[j].written) ||
                         !share_memory(*places[i].tensor, *places[j].tensor),
                     op, ": ", argument,
                     " must not share memory with any other tensor of the call");
    }
}

inline bool is_integer(ScalarType dtype) {
  return dtype == ScalarType::Int || dtype == ScalarType::Long;
}

// Part of a plan: int32 or int64, contiguous.
template <class Shape = std::initializer_list<int64_t>>
Ints as_ints(const Tensor& t, const Shape& shape, const char* op, const char* argument,
             int32_t device = kCpu) {
  const ScalarType dtype = t.scalar_type();
  ALIGNOPS_CHECK(is_integer(dtype), op, ": ", argument, " must be int32 or int64, got ",
                 dtype_name(dtype));
  check_layout(t, dtype, shape, op, argument, device);
  return {t.const_data_ptr(), dtype == ScalarType::Long};
}

template <class Shape = std::initializer_list<int64_t>>
Ints as_ints(const std::optional<Tensor>& t, const Shape& shape, const char* op,
             const char* argument, int32_t device = kCpu) {
  return t.has_value() ? as_ints(*t, shape, op, argument, device) : Ints{nullptr, false};
}

// (rows), for any number of rows.
inline int64_t check_vector(const Tensor& t, const char* op, const char* argument) {
  ALIGNOPS_CHECK(t.dim() == 1, op, ": ", argument, " must have one dimension, got shape ",
                 shape_string(t.sizes()));
  return t.size(0);
}

inline int64_t check_matrix(const Tensor& t, int64_t rows, const char* op, const char* argument) {
  ALIGNOPS_CHECK(t.dim() == 2 && t.size(0) == rows, op, ": ", argument, " must have ", rows,
                 " rows of one dimension, got shape ", shape_string(t.sizes()));
  return t.size(1);
}

}  // namespace alignops::speculative
