// Comparison of a kernel table with the scalar one, on a fixed small plan.
#pragma once

#include "attention/kernels.h"

namespace alignops::attention {

bool agrees_with_scalar(const Kernels& kernels);

}  // namespace alignops::attention
