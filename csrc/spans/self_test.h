// Comparison of a kernel table with the scalar one, on a fixed small problem.
#pragma once

#include "spans/kernels.h"

namespace alignops::spans {

bool agrees_with_scalar(const Kernels& kernels);

}  // namespace alignops::spans
