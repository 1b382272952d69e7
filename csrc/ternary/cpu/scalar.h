// What the scalar kernels share.
#pragma once

#include "common/element.h"
#include "ternary/kernels.h"

namespace alignops::ternary {
namespace {

// Column of lane p of block b.
inline int64_t column(int64_t b, int64_t p, int64_t stride) {
  return stride == 1 ? 4 * b + p : 64 * (b / 16) + b % 16 + 16 * p;
}

}  // namespace
}  // namespace alignops::ternary
