// Cosines and sines of rotary angles: one implementation for plans and for the operator. No torch,
// no Python, no allocation.
#pragma once

#include <cstdint>

namespace alignops::attention {

// out[f] = (cos, sin) of the angle fp64(omega[f]) * fp64(position), reduced modulo 2 pi in fp64 and
// rounded to fp32: within 2^-25 + 2^-40 of the true values while |angle| < 2^28. omega are
// frequencies in float32, widened. out has 2 * pairs elements.
void rotation(const double* omega, int64_t pairs, int64_t position, float* out) noexcept;

}  // namespace alignops::attention
