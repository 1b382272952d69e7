// Choosing an edge on any CPU: the lanes are an array.
#include <cmath>
#include <cstring>

#include "select.h"

namespace alignops::tree {
namespace {

struct Mask {
  bool at[8];

  friend Mask operator|(Mask a, Mask b) {
    for (int i = 0; i < 8; ++i) a.at[i] = a.at[i] || b.at[i];
    return a;
  }
};

struct Floats {
  float at[8];

  explicit Floats(float x) {
    for (float& v : at) v = x;
  }
  static Floats load(const float* p) {
    Floats out(0.0f);
    std::memcpy(out.at, p, sizeof out.at);
    return out;
  }
  static Floats index(int64_t first) {
    Floats out(0.0f);
    for (int i = 0; i < 8; ++i) out.at[i] = static_cast<float>(first + i);
    return out;
  }
  static Mask below(const int32_t* p, int32_t bound) {
    Mask out{};
    for (int i = 0; i < 8; ++i) out.at[i] = p[i] < bound;
    return out;
  }
  void store(float* p) const { std::memcpy(p, at, sizeof at); }
};

template <class Op>
Floats each(Floats a, const Floats& b, const Op& op) {
  for (int i = 0; i < 8; ++i) a.at[i] = op(a.at[i], b.at[i]);
  return a;
}

template <class Op>
Mask compare(const Floats& a, const Floats& b, const Op& op) {
  Mask out{};
  for (int i = 0; i < 8; ++i) out.at[i] = op(a.at[i], b.at[i]);
  return out;
}

Floats operator+(const Floats& a, const Floats& b) {
  return each(a, b, [](float x, float y) { return x + y; });
}
Floats operator-(const Floats& a, const Floats& b) {
  return each(a, b, [](float x, float y) { return x - y; });
}
Floats operator*(const Floats& a, const Floats& b) {
  return each(a, b, [](float x, float y) { return x * y; });
}
Floats operator/(const Floats& a, const Floats& b) {
  return each(a, b, [](float x, float y) { return x / y; });
}
Mask operator>(const Floats& a, const Floats& b) {
  return compare(a, b, [](float x, float y) { return x > y; });
}
Mask operator==(const Floats& a, const Floats& b) {
  return compare(a, b, [](float x, float y) { return x == y; });
}
Mask is_nan(const Floats& a) {
  return compare(a, a, [](float x, float y) { return x != y; });
}
// As the instructions: the second operand if one is NaN.
Floats min(const Floats& a, const Floats& b) {
  return each(a, b, [](float x, float y) { return x < y ? x : y; });
}
Floats max(const Floats& a, const Floats& b) {
  return each(a, b, [](float x, float y) { return x > y ? x : y; });
}
Floats sqrt(const Floats& a) {
  return each(a, a, [](float x, float) { return std::sqrt(x); });
}
Floats round(const Floats& a) {
  return each(a, a, [](float x, float) { return std::nearbyint(x); });
}
Floats scale_by_power(const Floats& a, const Floats& power) {
  return each(a, power, [](float x, float i) {
    const int32_t bits = (static_cast<int32_t>(i) + 127) << 23;
    float two = 0;
    std::memcpy(&two, &bits, sizeof two);
    return x * two;
  });
}
Floats choose(const Mask& mask, Floats yes, const Floats& no) {
  for (int i = 0; i < 8; ++i) yes.at[i] = mask.at[i] ? yes.at[i] : no.at[i];
  return yes;
}

float total(const Floats& a) {
  const float* x = a.at;
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
float least(const Floats& a) {
  float out = a.at[0];
  for (const float x : a.at) out = x < out ? x : out;
  return out;
}
float largest(const Floats& a) {
  float out = a.at[0];
  for (const float x : a.at) out = x > out ? x : out;
  return out;
}

using Scalar = Selection<Floats>;

}  // namespace

const Kernels kEdgesScalar = {Scalar::summarize, Scalar::puct, Scalar::uct, Scalar::draw,
                              Scalar::greedy};

}  // namespace alignops::tree
