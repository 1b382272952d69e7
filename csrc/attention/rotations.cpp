// The angle is k * pi/2 + r with |r| <= pi/4, by subtraction of pi/2 in three parts (Cody and
// Waite); sine and cosine of r are Taylor polynomials whose remainder is far below fp32, and k
// decides which of the two is the cosine, and their signs. No branches and no calls, so that
// compilers make vector code of it.
#include "rotations.h"

#include <bit>

namespace alignops::attention {
namespace {

// Adding and subtracting it rounds to an integer, whose low bits are then those of the sum.
constexpr double kRound = 0x1.8p52;
constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
// pi/2: two parts of 26 bits, whose products with k < 2^27 are exact, and the rest.
constexpr double kHigh = 0x1.921fb50000000p+0;
constexpr double kMiddle = 0x1.110b460000000p-26;
constexpr double kLow = 0x1.1a62633145c07p-54;

}  // namespace

void rotation(const double* omega, int64_t pairs, int64_t position, float* out) noexcept {
  const auto p = static_cast<double>(position);
  for (int64_t f = 0; f < pairs; ++f) {
    const double angle = omega[f] * p;
    const double rounded = angle * kTwoOverPi + kRound;
    const double k = rounded - kRound;
    const double r = ((angle - k * kHigh) - k * kMiddle) - k * kLow;
    const double z = r * r;
    const double sine =
        r + r * z *
                (-1.0 / 6 +
                 z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800)))));
    const double cosine =
        1.0 + z * (-0.5 + z * (1.0 / 24 +
                               z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 +
                                                                         z * (1.0 / 479001600))))));
    // Quadrants 1 and 3 exchange the two; the cosine is negative in 1 and 2, the sine in 2 and 3.
    const auto quadrant = std::bit_cast<uint64_t>(rounded);
    const uint64_t odd = uint64_t{0} - (quadrant & 1);
    const auto s = std::bit_cast<uint64_t>(sine);
    const auto c = std::bit_cast<uint64_t>(cosine);
    const uint64_t exchange = (s ^ c) & odd;
    const uint64_t cos_sign = ((quadrant + 1) & 2) << 62;
    const uint64_t sin_sign = (quadrant & 2) << 62;
    out[2 * f] = static_cast<float>(std::bit_cast<double>((c ^ exchange) ^ cos_sign));
    out[2 * f + 1] = static_cast<float>(std::bit_cast<double>((s ^ exchange) ^ sin_sign));
  }
}

}  // namespace alignops::attention
