// Arithmetic of one id, shared by the scalar kernels, the tails of the others, and the rules.
#pragma once

#include <cmath>

#include "common/float16.h"
#include "speculative/kernels.h"

namespace alignops::speculative {
namespace {

inline float load(const Law& law, int64_t id) {
  switch (law.dtype) {
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(law.data)[id]);
    case DType::kFloat16:
      return fp16_to_float(static_cast<const uint16_t*>(law.data)[id]);
    default:
      return static_cast<const float*>(law.data)[id];
  }
}

// M * 2^n.
struct Weight {
  uint32_t mantissa;
  int32_t exponent;
};

// Coefficients of 2^x on [0, 1), that of x^5 first.
inline constexpr uint32_t kExp2[5] = {0x3AF4BA7E, 0x3C13BC2A, 0x3D648E73, 0x3E75EDAB, 0x3F31725D};

inline Weight weigh(float logit, Rate rate) {
  // NaN, whose row is refused, becomes a number, too.
  const float clamped = logit > -2047.0f ? (logit < 2047.0f ? logit : 2047.0f) : -2047.0f;
  const int64_t scaled = int64_t{std::lrint(clamped * 0x1p20f)} * rate.factor;
  const auto fraction = static_cast<uint32_t>(scaled >> (rate.shift - 3)) & 0x7FFFFFu;
  const float x = bits_float(fraction | 0x3F800000u) - 1.0f;
  float g = bits_float(kExp2[0]);
  for (int i = 1; i < 5; ++i) g = g * x + bits_float(kExp2[i]);
  g = g * x + 1.0f;
  const float most = bits_float(0x3FFFFFFFu);
  const uint32_t mantissa = (float_bits(g < most ? g : most) & 0x7FFFFFu) | 0x800000u;
  return {logit == -__builtin_inff() ? 0 : mantissa,
          static_cast<int32_t>(scaled >> (20 + rate.shift))};
}

inline uint64_t key_of(Weight w) {
  if (w.mantissa == 0) return 0;
  return (static_cast<uint64_t>(static_cast<uint32_t>(w.exponent) + 0x80000000u) << 24) |
         w.mantissa;
}

inline Weight weight_of(uint64_t key) {
  return {static_cast<uint32_t>(key & 0xFFFFFFu),
          static_cast<int32_t>(static_cast<uint32_t>(key >> 24) - 0x80000000u)};
}

inline uint64_t key_of(float p) { return p > 0 ? float_bits(p) : 0; }

// The key of an id, whatever the cut.
inline uint64_t key_at(const Law& law, int64_t id) {
  const float value = load(law, id);
  return law.probabilities ? key_of(value) : key_of(weigh(value, law.rate));
}

inline bool kept(const Cut& cut, uint64_t key, int64_t id) {
  return key > cut.key || (key == cut.key && id <= cut.id);
}

// (M << 16) >> min(top - n, 63)
inline uint64_t units(Weight w, int32_t top) {
  const auto below = static_cast<uint64_t>(int64_t{top} - w.exponent);
  return (static_cast<uint64_t>(w.mantissa) << 16) >> (below < 63 ? below : 63);
}

// 2^exponent of a normal double.
inline double power(int32_t exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float p32_of(Weight w, int32_t top, double inverse) {
  const int64_t below = int64_t{top} - w.exponent;
  if (w.mantissa == 0 || below > kNegligible) return 0;
  // The product with a power of two is exact, so this rounds as M * ldexp(inverse, ...) does.
  return static_cast<float>(static_cast<double>(w.mantissa) * inverse *
                            power(static_cast<int32_t>(16 - below)));
}

// Probability of the law whose kept ids have this key.
inline float p32_of_key(const Law& law, uint64_t key) {
  if (law.probabilities) return bits_float(static_cast<uint32_t>(key));
  return p32_of(weight_of(key), law.top, law.inverse);
}

inline float p32_at(const Law& law, int64_t id) {
  const uint64_t key = key_at(law, id);
  return kept(law.cut, key, id) ? p32_of_key(law, key) : 0.0f;
}

// R = trunc(r * 2^40)
inline uint64_t fixed(float r) { return static_cast<uint64_t>(static_cast<double>(r) * 0x1p40); }

inline float density_at(const Density& d, int64_t id) {
  const float r = d.scale * p32_at(*d.p, id);
  if (d.q == nullptr || id >= d.q->size) return r;
  const float beyond = r - p32_at(*d.q, id);
  return beyond > 0 ? beyond : 0.0f;
}

}  // namespace
}  // namespace alignops::speculative
