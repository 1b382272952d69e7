// Whether the kernels of a level choose as the scalar ones do.
#pragma once

#include "kernels.h"

namespace alignops::tree {

bool agrees_with_scalar(const Kernels& candidate);

}  // namespace alignops::tree
