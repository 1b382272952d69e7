#include "common/isa.h"

#include <atomic>
#include <cstring>
#include <string>

#include "common/check.h"

namespace alignops {
namespace {

Isa best_isa() noexcept {
  for (int level = kNumIsas - 1; level > 0; --level) {
    if (isa_supported(static_cast<Isa>(level))) return static_cast<Isa>(level);
  }
  return Isa::kScalar;
}

std::atomic<Isa>& state() noexcept {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kScalar:
      break;
  }
  return "scalar";
}

bool isa_supported(Isa isa) noexcept {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  static const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::kAvx512Bf16) return avx512_bf16;
  if (isa == Isa::kAvx512) return avx512;
  if (isa == Isa::kAvx2) return avx2;
#endif
  return isa == Isa::kScalar;
}

Isa active_isa() noexcept { return state().load(std::memory_order_relaxed); }

void set_isa(const char* name) {
  std::string choices;
  for (int level = 0; level < kNumIsas; ++level) {
    const Isa isa = static_cast<Isa>(level);
    if (!isa_supported(isa)) continue;
    if (std::strcmp(name, isa_name(isa)) == 0) {
      state().store(isa, std::memory_order_relaxed);
      return;
    }
    choices += (choices.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  ALIGNOPS_CHECK(false, "set_isa: isa must be one of ", choices, " on this machine, got '", name,
                 "'");
}

}  // namespace alignops
