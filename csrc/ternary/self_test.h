// Comparison of a kernel table with the scalar one, on a fixed small problem. Integer results and,
// by the fixed order of float operations, all outputs must be equal bit for bit.
#pragma once

#include "ternary/kernels.h"

namespace alignops::ternary {

bool agrees_with_scalar(const QuantizeKernels& kernels);
bool agrees_with_scalar(const LinearKernels& kernels);
bool agrees_with_scalar(const Int8Kernels& kernels);

}  // namespace alignops::ternary
