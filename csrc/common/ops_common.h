// What the ops of all cores share: checks of tensors, reading them into kernel arguments, scratch
// memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <vector>

#include "check.h"
#include "dtype.h"

namespace alignops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// parallel_for gives a thread at least this much memory traffic.
inline constexpr int64_t kGrainBytes = 32 * 1024;

inline int64_t grain_rows(int64_t row_bytes) {
  return row_bytes > 0 ? (kGrainBytes + row_bytes - 1) / row_bytes : kGrainBytes;
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
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
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
template <class Shape = std::initializer_list<int64_t>>
void check_layout(const Tensor& t, ScalarType dtype, const Shape& shape, const char* op,
                  const char* argument, int32_t device = kCpu) {
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

// y of shape (..., n) for x of shape (..., k).
inline Tensor new_output(const Tensor& x, int64_t n) {
  const auto sizes = x.sizes();
  std::vector<int64_t> y_sizes(sizes.begin(), sizes.end());
  y_sizes.back() = n;
  return torch::stable::new_empty(x, y_sizes);
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

}  // namespace alignops
