// What the vector quantizers of weights share. Everything has internal linkage: it is compiled per
// instruction set.
#pragma once

#include <cstdint>

#include "ternary/kernels.h"

namespace alignops::ternary {
namespace {

inline bool is_finite(float v) { return v - v == 0.0f; }

inline bool is_finite(const void* w, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return is_finite(static_cast<const float*>(w)[i]);
  const int exponent = dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00;
  return (static_cast<const uint16_t*>(w)[i] & exponent) != exponent;
}

// Counts NaN and Inf of a row of QuantizeArgs or Int8QuantizeArgs; a slow path, for rows known to
// have one.
template <class Args, class Report>
void report_nonfinite(const Args& a, int64_t row, Report& report) {
  for (int64_t c = 0; c < a.k; ++c)
    if (!is_finite(a.w, a.dtype, row * a.ld + c)) {
      ++report.nonfinite;
      if (row * a.k + c < report.first) report.first = row * a.k + c;
    }
}

}  // namespace
}  // namespace alignops::ternary
