// Element access shared by the scalar kernels.
#pragma once

#include "common/float16.h"
#include "ternary/kernels.h"

namespace alignops::ternary {
namespace {

inline float load(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
    case DType::kFloat16:
      return fp16_to_float(static_cast<const uint16_t*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

inline void store(void* p, DType dtype, int64_t i, float v) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<uint16_t*>(p)[i] = float_to_bf16(v);
      break;
    case DType::kFloat16:
      static_cast<uint16_t*>(p)[i] = float_to_fp16(v);
      break;
    default:
      static_cast<float*>(p)[i] = v;
  }
}

// Column of lane p of block b.
inline int64_t column(int64_t b, int64_t p, int64_t stride) {
  return stride == 1 ? 4 * b + p : 64 * (b / 16) + b % 16 + 16 * p;
}

}  // namespace
}  // namespace alignops::ternary
