// Which instruction set the CPU kernels use. Levels are coarse on purpose: every level is a run of
// the test suite.
#pragma once

namespace alignops {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
inline constexpr int kNumIsas = 4;

// "scalar", "avx2", "avx512" or "avx512bf16".
const char* isa_name(Isa isa) noexcept;

// avx2 means AVX2 + FMA + F16C + BMI2; avx512 adds F, BW, DQ, VL, VNNI and VBMI;
// avx512bf16 adds BF16. The operating system must have enabled the registers.
bool isa_supported(Isa isa) noexcept;

// The best level of this machine until `set_isa` chooses another. `set_isa` throws
// std::invalid_argument, listing the choices, for a name that is unknown or a level that this
// machine lacks.
Isa active_isa() noexcept;
void set_isa(const char* name);

}  // namespace alignops
