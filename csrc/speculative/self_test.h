// Comparison of a kernel table with the scalar one, on fixed small rows. Everything but entropies
// must be equal bit for bit.
#pragma once

#include "speculative/kernels.h"

namespace alignops::speculative {

bool agrees_with_scalar(const Kernels& kernels);

// The same comparison on a given row, without a cut and with some, and with a drafter's row that is
// no longer; cuts, tops and inverses of the two are not read.
bool agrees_on(const Kernels& kernels, Law law, Law drafter);

}  // namespace alignops::speculative
