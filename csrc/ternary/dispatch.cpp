#include "common/isa.h"
#include "ternary/kernels.h"
#include "ternary/self_test.h"

namespace alignops::ternary {
namespace {

// One table per level. A family of kernels that disagrees with the scalar one keeps the tables of
// the level below.
struct Tables {
  Kernels levels[kNumIsas];
  const char* failure = nullptr;

  Tables() noexcept {
    levels[0] = {&kQuantizeScalar, &kLinearScalar, &kInt8Scalar};
    for (int level = 1; level < kNumIsas; ++level) levels[level] = levels[0];
#if defined(__x86_64__)
    add(Isa::kAvx2, {&kQuantizeAvx2, &kLinearAvx2, &kInt8Avx2});
    add(Isa::kAvx512, {&kQuantizeAvx512, &kLinearAvx512, &kInt8Avx512});
#endif
  }

  void add(Isa isa, const Kernels& candidate) noexcept {
    const int level = static_cast<int>(isa);
    if (!isa_supported(isa)) return;
    const auto choose = [&](auto member, const char* family) {
      if (agrees_with_scalar(*(candidate.*member))) {
        for (int l = level; l < kNumIsas; ++l) levels[l].*member = candidate.*member;
      } else if (failure == nullptr) {
        failure = family;
      }
    };
    choose(&Kernels::quantize, "ternary quantization");
    choose(&Kernels::linear, "ternary linear");
    choose(&Kernels::int8, "ternary int8");
  }
};

const Tables& tables() noexcept {
  static const Tables instance;
  return instance;
}

}  // namespace

const Kernels& kernels() { return tables().levels[static_cast<int>(active_isa())]; }

const LinearKernels* linear_kernels(Layout layout) {
  for (const Kernels& level : tables().levels)
    if (level.linear->layout == layout) return level.linear;
  return nullptr;
}

const char* self_test_failure() { return tables().failure; }

}  // namespace alignops::ternary
