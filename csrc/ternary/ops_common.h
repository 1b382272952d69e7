// What the ternary ops share: reading tensors into kernel arguments, segments, scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <new>
#include <optional>
#include <vector>

#include "../common/check.h"
#include "kernels.h"

namespace alignops::ternary {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// parallel_for gives a thread at least this much memory traffic.
inline constexpr int64_t kGrainBytes = 32 * 1024;

inline int64_t grain_rows(int64_t row_bytes) {
  return ceil_div(kGrainBytes, row_bytes > 0 ? row_bytes : 1);
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline int64_t dtype_bytes(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// The kernels' element type; anything but float32, bfloat16 and float16 is an error that names `op`
// and `argument`.
inline DType float_dtype(ScalarType t, const char* op, const char* argument) {
  switch (t) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      throw std::invalid_argument(message(
          op, ": ", argument, " must be float32, bfloat16 or float16, got ", dtype_name(t)));
  }
}

// Where the arguments of an op live: the CPU, or the GPU of this index.
inline constexpr int32_t kCpu = -1;

inline void check_device(const Tensor& t, int32_t device, const char* op, const char* argument) {
  if (device == kCpu) {
    ALIGNOPS_CHECK(t.is_cpu(), op, ": ", argument, " must be on the CPU, got another device");
  } else {
    ALIGNOPS_CHECK(t.is_cuda() && t.get_device_index() == device, op, ": ", argument,
                   " must be on cuda:", device, ", got another device");
  }
}

// A tensor that the kernels read as it lies in memory.
inline void check_layout(const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape,
                         const char* op, const char* argument, int32_t device = kCpu) {
  check_device(t, device, op, argument);
  ALIGNOPS_CHECK(t.scalar_type() == dtype, op, ": ", argument, " must be ", dtype_name(dtype),
                 ", got ", dtype_name(t.scalar_type()));
  const auto sizes = t.sizes();
  ALIGNOPS_CHECK(
      sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), op,
      ": ", argument, " must have shape ", shape_string(shape), ", got ", shape_string(sizes));
  ALIGNOPS_CHECK(t.is_contiguous(), op, ": ", argument, " must be contiguous, got strides ",
                 shape_string(t.strides()));
}

// Stride 1 or 16; scale groups of k columns, or of a multiple of 32 (64) columns.
inline void check_group(int64_t k, int64_t group, int64_t stride, const char* op) {
  ALIGNOPS_CHECK(stride == 1 || stride == 16, op, ": stride must be 1 or 16, got ", stride);
  ALIGNOPS_CHECK(stride == 1 || k % 64 == 0, op, ": k must be a multiple of 64 for stride 16, got ",
                 k);
  const int64_t unit = stride == 1 ? 32 : 64;
  ALIGNOPS_CHECK(group == k || (group > 0 && group < k && group % unit == 0), op,
                 ": group must be a multiple of ", unit, " below k=", k, ", or k, got ", group);
}

inline Act act_mode(int64_t act, const char* op) {
  ALIGNOPS_CHECK(act >= 0 && act <= 3, op,
                 ": act must be 0 (none), 1 (a8), 2 (a8g) or 3 (a16), got ", act);
  return static_cast<Act>(act);
}

// A float tensor as rows of its last dimension: what the kernels call (data, ld). Copies only if
// the rows are not evenly spaced with unit column stride.
struct Rows {
  Tensor tensor;
  const void* data;
  DType dtype;
  int64_t rows, columns, ld;
};

inline Rows as_rows(const Tensor& t, const char* op, const char* argument, int32_t device = kCpu) {
  check_device(t, device, op, argument);
  const DType dtype = float_dtype(t.scalar_type(), op, argument);
  const int64_t dim = t.dim();
  ALIGNOPS_CHECK(dim >= 1, op, ": ", argument, " must have at least one dimension, got a scalar");
  const int64_t columns = t.size(dim - 1);
  int64_t rows = 1;
  for (int64_t d = 0; d < dim - 1; ++d) rows *= t.size(d);
  if (t.is_contiguous()) return {t, t.const_data_ptr(), dtype, rows, columns, columns};
  if (dim == 2 && t.stride(1) == 1)
    return {t, t.const_data_ptr(), dtype, rows, columns, t.stride(0)};
  const Tensor copy = torch::stable::contiguous(t);
  return {copy, copy.const_data_ptr(), dtype, rows, columns, columns};
}

struct Bias {
  const void* data;  // null without a bias
  DType dtype;
};

// A bias of n elements, float32 or of x's dtype.
inline Bias as_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t n, const char* op,
                    int32_t device = kCpu) {
  if (!bias.has_value()) return {nullptr, DType::kFloat32};
  const bool same = bias->scalar_type() == x.scalar_type();
  check_layout(*bias, same ? x.scalar_type() : ScalarType::Float, {n}, op, "bias", device);
  return {bias->const_data_ptr(), float_dtype(bias->scalar_type(), op, "bias")};
}

// y of shape (..., n) for x of shape (..., k).
inline Tensor new_output(const Tensor& x, int64_t n) {
  const auto sizes = x.sizes();
  std::vector<int64_t> y_sizes(sizes.begin(), sizes.end());
  y_sizes.back() = n;
  return torch::stable::new_empty(x, y_sizes);
}

// The intervals of a row's blocks that have one activation scale and one weight scale; `blocks`
// includes padding. group >= k stands for one weight scale per row.
inline std::vector<Segment> make_segments(int64_t k, int64_t blocks, int64_t group, Act act) {
  const int64_t weight_blocks = group >= k ? blocks : group / 4;
  const int64_t act_blocks = act == Act::kA8G ? kActGroupColumns / 4 : blocks;
  const int64_t last_weight = group >= k ? 0 : ceil_div(k, group) - 1;
  const int64_t last_act = act == Act::kA8G ? ceil_div(k, kActGroupColumns) - 1 : 0;
  std::vector<Segment> segments;
  for (int64_t begin = 0; begin < blocks;) {
    const int64_t weight = std::min(begin / weight_blocks, last_weight);
    const int64_t act_group = std::min(begin / act_blocks, last_act);
    int64_t end = blocks;
    if (weight < last_weight) end = std::min(end, (weight + 1) * weight_blocks);
    if (act_group < last_act) end = std::min(end, (act_group + 1) * act_blocks);
    segments.push_back({begin, end, act_group, weight});
    begin = end;
  }
  return segments;
}

// Uninitialized memory for one call, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kAlignment))) {
  }
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace alignops::ternary
