#include "common/isa.h"
#include "speculative/kernels.h"
#include "speculative/self_test.h"

namespace alignops::speculative {
namespace {

// One table per level. A table that disagrees with the scalar one gives way to the level below.
struct Tables {
  const Kernels* levels[kNumIsas];
  const char* failure = nullptr;

  Tables() noexcept {
    for (const Kernels*& level : levels) level = &kRowsScalar;
#if defined(__x86_64__)
    add(Isa::kAvx2, kRowsAvx2);
    add(Isa::kAvx512, kRowsAvx512);
#endif
  }

  void add(Isa isa, const Kernels& candidate) noexcept {
    const int level = static_cast<int>(isa);
    levels[level] = levels[level - 1];
    if (!isa_supported(isa)) return;
    if (agrees_with_scalar(candidate)) {
      levels[level] = &candidate;
    } else {
      failure = "speculative rows";
    }
  }
};

const Tables& tables() noexcept {
  static const Tables instance;
  return instance;
}

}  // namespace

const Kernels& kernels() { return *tables().levels[static_cast<int>(active_isa())]; }

const char* self_test_failure() { return tables().failure; }

}  // namespace alignops::speculative
