// Comparison of a kernel table with the scalar one, on fixed small rows. Everything but entropies
// must be equal bit for bit.
#pragma once

#include "speculative/kernels.h"

namespace alignops::speculative {

bool agrees_with_scalar(const Kernels& kernels);

}  // namespace alignops::speculative
