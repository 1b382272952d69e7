// What the ternary tests share: the kernel tables of this machine, float data in the three dtypes.
#pragma once

#include <bit>
#include <cmath>

#include "common/float16.h"
#include "common/isa.h"
#include "harness.h"
#include "ternary/kernels.h"

namespace alignops::test {

struct Level {
  Isa isa;
  const ternary::QuantizeKernels* quantize;
  const ternary::LinearKernels* linear;
  const ternary::Int8Kernels* int8;
};

// Scalar first; levels that this machine lacks are left out.
inline std::vector<Level> levels() {
  using namespace ternary;
  std::vector<Level> all = {{Isa::kScalar, &kQuantizeScalar, &kLinearScalar, &kInt8Scalar}};
#if defined(__x86_64__)
  if (isa_supported(Isa::kAvx2))
    all.push_back({Isa::kAvx2, &kQuantizeAvx2, &kLinearAvx2, &kInt8Avx2});
  if (isa_supported(Isa::kAvx512))
    all.push_back({Isa::kAvx512, &kQuantizeAvx512, &kLinearAvx512, &kInt8Avx512});
#endif
  return all;
}

inline const std::vector<DType>& dtypes() {
  static const std::vector<DType> all = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  return all;
}

inline int64_t bytes_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

inline void put(void* p, DType t, int64_t i, float v) {
  if (t == DType::kFloat32) static_cast<float*>(p)[i] = v;
  if (t == DType::kBFloat16) static_cast<uint16_t*>(p)[i] = float_to_bf16(v);
  if (t == DType::kFloat16) static_cast<uint16_t*>(p)[i] = float_to_fp16(v);
}

inline float get(const void* p, DType t, int64_t i) {
  if (t == DType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  return t == DType::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

// Rows of floats with an odd start and a row stride; the last row ends where the memory ends.
struct Matrix {
  DType dtype;
  int64_t n, k, ld;
  std::vector<char> bytes;

  Matrix(DType type, int64_t rows, int64_t columns, int64_t gap = 0)
      : dtype(type),
        n(rows),
        k(columns),
        ld(columns + gap),
        bytes(
            static_cast<size_t>((rows > 0 ? (rows - 1) * ld + columns + 1 : 1) * bytes_of(type))) {}

  void* data() { return bytes.data() + bytes_of(dtype); }
  const void* data() const { return bytes.data() + bytes_of(dtype); }
  void set(int64_t r, int64_t c, float v) { put(data(), dtype, r * ld + c, v); }
  float at(int64_t r, int64_t c) const { return get(data(), dtype, r * ld + c); }
};

// Equal bit for bit, except that any NaN equals any NaN and 0 equals -0.
inline bool same_values(const void* a, const void* b, DType t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = get(a, t, i), y = get(b, t, i);
    if (!(x == y || (std::isnan(x) && std::isnan(y)))) return false;
  }
  return true;
}

inline std::string describe(const Level& level, DType t, std::initializer_list<int64_t> numbers) {
  std::string s =
      std::string(isa_name(level.isa)) + " dtype " + std::to_string(static_cast<int>(t));
  for (const int64_t i : numbers) s += " " + std::to_string(i);
  return s;
}

}  // namespace alignops::test
