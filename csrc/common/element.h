// One element of float32, bfloat16 or float16, for code without vectors.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "float16.h"

namespace alignops {
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

}  // namespace
}  // namespace alignops
