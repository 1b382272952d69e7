// Element types of activations and weights, shared by the kernel contracts of all cores.
#pragma once

#include <cstdint>

namespace alignops {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

namespace {

// f.operator()<kType>() with the constant that equals `dtype`.
template <class F>
auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f.template operator()<DType::kBFloat16>();
    case DType::kFloat16:
      return f.template operator()<DType::kFloat16>();
    default:
      return f.template operator()<DType::kFloat32>();
  }
}

}  // namespace

}  // namespace alignops
