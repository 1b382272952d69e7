// Rotations against the C library in long double.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attention/rotations.h"
#include "harness.h"

namespace alignops::attention {
namespace {

const test::Register accurate("rotations are rounded true values at any position", [] {
  std::vector<double> omega{1.0, 0.0};
  for (int i = 0; i < 64; ++i) omega.push_back(std::pow(1e6F, -static_cast<float>(i) / 64));
  test::Guarded<float> out(2 * static_cast<int64_t>(omega.size()));
  const int64_t million = 1 << 20;
  for (const int64_t position :
       {int64_t{0}, int64_t{1}, int64_t{-1}, int64_t{2}, int64_t{3}, int64_t{22}, int64_t{-355},
        int64_t{20000}, million, -million + 1, int64_t{1} << 27}) {
    rotation(omega.data(), static_cast<int64_t>(omega.size()), position, out.data());
    double worst = 0;
    for (size_t f = 0; f < omega.size(); ++f) {
      const long double angle = omega[f] * static_cast<double>(position);
      const auto place = static_cast<int64_t>(2 * f);
      worst = std::max({worst, std::fabs(static_cast<double>(std::cos(angle) - out[place])),
                        std::fabs(static_cast<double>(std::sin(angle) - out[place + 1]))});
    }
    test::expect(worst <= 0x1p-25 + 0x1p-40,
                 "position " + std::to_string(position) + ": error " + std::to_string(worst));
  }
  test::expect(out.intact(), "writes past its end");
});

}  // namespace
}  // namespace alignops::attention
