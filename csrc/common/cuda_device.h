// Small functions of CUDA kernels and of their launchers.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace alignops::cuda {

ALIGNOPS_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ALIGNOPS_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ALIGNOPS_HD int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Blocks that take `per_block` items each.
ALIGNOPS_HD int64_t blocks(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

}  // namespace alignops::cuda
