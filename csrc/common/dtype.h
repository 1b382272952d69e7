// Element types of activations and weights, shared by the kernel contracts of all cores.
#pragma once

#include <cstdint>

namespace alignops {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace alignops
