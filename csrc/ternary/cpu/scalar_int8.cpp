// Scalar dense int8 product: the readable ground truth of the int8 head.
//
//   scale_n = max_c |w_nc| / 127,  q_nc = rint(w_nc * (127 / max)) clamped to +-127, so -128 never
//   occurs integer modes: y = sum over segments of float(I) * (act_scale * scale_n), I an exact
//   integer lossless mode: y = scale_n * sum of x_c q_c in float32; column c goes into partial sum
//   c mod 16 by fused
//                  multiply-add, the 16 partial sums are folded in halves (8, 4, 2, 1)
// Both orders are the same on every ISA, for every batch size and thread count.
#include <cmath>
#include <cstring>

#include "scalar.h"

namespace alignops::ternary {
namespace {

void quantize(Int8QuantizeArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    float amax = 0.0f;
    for (int64_t c = 0; c < a.k; ++c) {
      const float m = std::fabs(load(a.w, a.dtype, row * a.ld + c));
      if (!std::isfinite(m)) {
        ++a.nonfinite;
        if (row * a.k + c < a.first) a.first = row * a.k + c;
      }
      amax = m > amax ? m : amax;
    }
    const bool zero = amax <= 1e-30f;  // 127 / amax would overflow
    const float inverse = zero ? 0.0f : 127.0f / amax;
    a.scale[row] = zero ? 0.0f : amax / 127.0f;
    for (int64_t c = 0; c < a.k; ++c) {
      const float v = std::rint(load(a.w, a.dtype, row * a.ld + c) * inverse);
      a.q[row * a.k + c] = static_cast<int8_t>(v > 127.0f ? 127.0f : v > -127.0f ? v : -127.0f);
    }
  }
}

int64_t integer_sum(const Int8LinearArgs& a, const int8_t* w, int64_t slot, const Segment& s) {
  const int8_t* q = a.q + slot * a.k_pad;
  int64_t sum = 0;
  for (int64_t c = 4 * s.begin; c < 4 * s.end && c < a.k; ++c) sum += w[c] * q[c];
  return sum;
}

float lossless_sum(const Int8LinearArgs& a, const int8_t* w, int64_t token) {
  const float* f = a.f + token * a.k_pad;
  float partial[16] = {};
  for (int64_t c = 0; c < a.k; ++c)
    partial[c % 16] = std::fma(f[c], static_cast<float>(w[c]), partial[c % 16]);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
  return partial[0];
}

void linear(const Int8LinearArgs& a, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int8_t* w = a.w + row * a.k;
    for (int64_t t = 0; t < a.m; ++t) {
      float acc = 0.0f;
      if (a.act == Act::kNone) {
        acc = lossless_sum(a, w, t) * a.scale[row];
      } else {
        for (int64_t i = 0; i < a.num_segments; ++i) {
          const Segment& s = a.segments[i];
          const int64_t sum = a.act == Act::kA16 ? 256 * integer_sum(a, w, 2 * t, s) +
                                                       integer_sum(a, w, 2 * t + 1, s)
                                                 : integer_sum(a, w, t, s);
          acc = std::fma(static_cast<float>(sum),
                         a.act_scale[t * a.act_groups + s.act_group] * a.scale[row], acc);
        }
      }
      if (a.bias != nullptr) acc += load(a.bias, a.bias_dtype, row);
      store(a.y, a.y_dtype, t * a.ldy + row, acc);
    }
  }
}

}  // namespace

const Int8Kernels kInt8Scalar = {quantize, linear};

}  // namespace alignops::ternary
