#include "ternary_samples.h"

namespace alignops::test {
namespace {

using namespace ternary;

struct Planes {
  Guarded<uint8_t> idx, sign;
  Guarded<float> scale;
  int64_t nonfinite = 0, first = INT64_MAX;

  Planes(int64_t n, int64_t k, int64_t group)
      : idx(n * round_up(ceil_div(k, 4), 8) / 2, 1),
        sign(n * round_up(ceil_div(k, 4), 8) / 8, 1),
        scale(n * ceil_div(k, group), 1) {}
  bool intact() const { return idx.intact() && sign.intact() && scale.intact(); }
};

QuantizeArgs args_of(const Matrix& w, int64_t group, int64_t stride) {
  return {w.data(), w.dtype, w.n, w.k, w.ld, group, stride};
}

Planes quantize(const Level& level, const Matrix& w, int64_t group, int64_t stride) {
  Planes planes(w.n, w.k, group);
  QuantizeOut out{planes.idx.data(), planes.sign.data(), planes.scale.data(), 0, INT64_MAX};
  const int64_t middle = w.n / 2;
  level.quantize->quantize(args_of(w, group, stride), out, middle, w.n);
  level.quantize->quantize(args_of(w, group, stride), out, 0, middle);
  planes.nonfinite = out.nonfinite;
  planes.first = out.first;
  return planes;
}

// Normal values among ties, zeros of both signs and subnormals.
Matrix weights(Random& random, DType dtype, int64_t n, int64_t k, int64_t gap) {
  Matrix w(dtype, n, k, gap);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < k; ++c) {
      const int64_t kind = random.below(8);
      const float grid = static_cast<float>(random.below(5)) - 2.0f;
      w.set(r, c, kind < 4 ? random.normal() : kind < 6 ? grid : kind == 6 ? -0.0f : 1e-39f * grid);
    }
  return w;
}

struct Shape {
  int64_t n, k, group, stride;
};

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const int64_t k :
       {1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 129, 255, 256, 257, 576, 1001})
    all.push_back({3, k, k, 1});
  for (const int64_t group : {32, 64, 96, 128, 256}) {
    all.push_back({2, 576, group, 1});
    all.push_back({2, 1003, group, 1});
  }
  for (const int64_t k : {64, 128, 576, 1024}) all.push_back({3, k, k, 16});
  for (const int64_t group : {64, 128, 192, 256}) all.push_back({2, 576, group, 16});
  return all;
}

const Register quantize_parity("quantize, dequantize and fake_quant equal the scalar kernels", [] {
  Random random(1);
  for (const Level& level : levels())
    for (const DType dtype : dtypes())
      for (const Shape& s : shapes()) {
        const std::string what = describe(level, dtype, {s.n, s.k, s.group, s.stride});
        const Matrix w = weights(random, dtype, s.n, s.k, random.below(3));
        const Planes expected = quantize(levels()[0], w, s.group, s.stride);
        const Planes got = quantize(level, w, s.group, s.stride);
        expect(got.idx == expected.idx && got.sign == expected.sign, "planes differ: " + what);
        expect(got.scale == expected.scale, "scale differs: " + what);
        expect(got.nonfinite == 0 && got.first == INT64_MAX && got.intact(),
               "report or guards: " + what);
        for (const DType out_dtype : dtypes()) {
          const int64_t bytes = s.n * s.k * bytes_of(out_dtype);
          Guarded<char> a(bytes, 4), b(bytes, 4);
          const DequantizeArgs from{
              got.idx.data(), got.sign.data(), got.scale.data(), s.n,      s.k,
              s.group,        s.stride,        a.data(),         out_dtype};
          DequantizeArgs scalar = from;
          scalar.out = b.data();
          level.quantize->dequantize(from, 0, s.n);
          kQuantizeScalar.dequantize(scalar, 0, s.n);
          expect(same_values(a.data(), b.data(), out_dtype, s.n * s.k) && a.intact(),
                 "dequantize: " + what);
          FakeQuantArgs fake{args_of(w, s.group, s.stride), 0.37f, a.data(), out_dtype};
          level.quantize->fake_quant(fake, 0, s.n);
          fake.out = b.data();
          kQuantizeScalar.fake_quant(fake, 0, s.n);
          expect(same_values(a.data(), b.data(), out_dtype, s.n * s.k) && a.intact(),
                 "fake_quant: " + what);
        }
      }
});

const Register lambda_zero("fake_quant with lambda 0 is quantize and dequantize", [] {
  Random random(2);
  for (const Level& level : levels())
    for (const Shape& s : shapes()) {
      const Matrix w = weights(random, DType::kFloat32, s.n, s.k, 1);
      const Planes planes = quantize(level, w, s.group, s.stride);
      Guarded<float> a(s.n * s.k), b(s.n * s.k);
      level.quantize->fake_quant({args_of(w, s.group, s.stride), 0.0f, a.data(), DType::kFloat32},
                                 0, s.n);
      level.quantize->dequantize({planes.idx.data(), planes.sign.data(), planes.scale.data(), s.n,
                                  s.k, s.group, s.stride, b.data(), DType::kFloat32},
                                 0, s.n);
      expect(same_values(a.data(), b.data(), DType::kFloat32, s.n * s.k),
             describe(level, DType::kFloat32, {s.n, s.k, s.group, s.stride}));
    }
});

const Register idempotent("quantizing a dequantized weight returns the same planes and scale", [] {
  Random random(3);
  for (const Level& level : levels())
    for (const Shape& s : shapes()) {
      Matrix w(DType::kFloat32, s.n, s.k);
      for (int64_t r = 0; r < s.n; ++r)
        for (int64_t c = 0; c < s.k; ++c) w.set(r, c, random.normal());
      const Planes planes = quantize(level, w, s.group, s.stride);
      level.quantize->dequantize({planes.idx.data(), planes.sign.data(), planes.scale.data(), s.n,
                                  s.k, s.group, s.stride, w.data(), DType::kFloat32},
                                 0, s.n);
      const Planes again = quantize(level, w, s.group, s.stride);
      expect(again.idx == planes.idx && again.sign == planes.sign && again.scale == planes.scale,
             describe(level, DType::kFloat32, {s.n, s.k, s.group, s.stride}));
    }
});

const Register nonfinite("NaN and Inf are counted and the first is named", [] {
  Random random(4);
  for (const Level& level : levels())
    for (const DType dtype : dtypes())
      for (const Shape& s : shapes())
        for (const float bad : {INFINITY, -INFINITY, NAN}) {
          Matrix w = weights(random, dtype, s.n, s.k, 2);
          int64_t count = 0, first = INT64_MAX;
          for (int64_t i = 0; i < 3; ++i) {
            const int64_t at = random.below(s.n * s.k);
            if (std::isfinite(w.at(at / s.k, at % s.k))) ++count;
            w.set(at / s.k, at % s.k, bad);
            first = std::min(first, at);
          }
          const Planes planes = quantize(level, w, s.group, s.stride);
          expect(planes.nonfinite == count && planes.first == first && planes.intact(),
                 describe(level, dtype, {s.n, s.k, s.group, s.stride, count, planes.nonfinite}));
        }
  for (const Level& level : levels())
    for (const int64_t k : {1, 4, 64, 100}) {
      Matrix w(DType::kFloat32, 1, k);
      for (int64_t c = 0; c < k; ++c) w.set(0, c, NAN);
      const Planes planes = quantize(level, w, k, 1);
      expect(planes.nonfinite == k && planes.first == 0,
             describe(level, DType::kFloat32, {k, planes.nonfinite}));
    }
});

const Register nan_spreads("fake_quant gives NaN to the group of a NaN and to no other", [] {
  for (const Level& level : levels()) {
    Matrix w(DType::kFloat32, 1, 128);
    for (int64_t c = 0; c < 128; ++c) w.set(0, c, static_cast<float>(c % 7) - 3.0f);
    w.set(0, 70, NAN);
    Guarded<float> out(128);
    level.quantize->fake_quant({args_of(w, 64, 1), 0.5f, out.data(), DType::kFloat32}, 0, 1);
    for (int64_t c = 0; c < 128; ++c)
      expect(std::isnan(out[c]) == (c >= 64), describe(level, DType::kFloat32, {c}));
  }
});

// Sums of a row of 64 blocks that lie on a tie between two floats: 192 (1 + 2^-24) over 192 kept
// lanes rounds to 1, but to the next float if as little as `unit`, the last bit of the double sum,
// is added. `half` alone is absorbed by the large number; two of them count where they meet first.
const Register sum_order("the kept magnitudes are summed in the order of the contract", [] {
  const float unit = 0x1p-45f, half = 0x1p-46f, tie = 1.5f * 0x1p-17f, next = 1.0f + 0x1p-23f;
  struct Case {
    const char* name;
    std::vector<std::pair<int64_t, float>> columns;
    float scale;
  };
  const std::vector<Case> cases = {
      {"nothing added", {{0, 192}, {1, tie}}, 1.0f},
      {"one unit", {{0, 192}, {1, tie}, {64, unit}}, next},
      {"lanes in order", {{0, 192}, {1, half}, {2, half}, {64, tie}}, 1.0f},
      {"a block before its partial sum", {{0, 192}, {1, tie}, {64, half}, {67, half}}, next},
      {"blocks 16 apart after each other", {{0, 192}, {1, tie}, {64, half}, {128, half}}, 1.0f},
      {"blocks 8 and 24 meet", {{0, 192}, {1, tie}, {32, half}, {96, half}}, next},
      {"8 apart before 4 apart", {{0, 192}, {1, tie}, {32, half}, {16, half}}, 1.0f},
      {"4 and 12 meet before 0", {{0, 192}, {1, tie}, {16, half}, {48, half}}, next},
      {"2 and 6 meet before 0", {{0, 192}, {1, tie}, {8, half}, {24, half}}, next},
      {"1 and 3 meet before 0", {{0, 192}, {1, tie}, {4, half}, {12, half}}, next},
      {"2 before 1", {{0, 192}, {1, tie}, {8, half}, {4, half}}, 1.0f},
  };
  for (const Level& level : levels())
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
      for (const Case& c : cases) {
        Matrix w(dtype, 1, 256), spread(dtype, 1, 256);
        for (const auto& [column, value] : c.columns) {
          w.set(0, column, value);
          // The same place of the same block in stride 16.
          const int64_t b = column / 4;
          spread.set(0, 64 * (b / 16) + b % 16 + 16 * (column % 4), value);
        }
        const std::string what = describe(level, dtype, {}) + " " + c.name;
        expect(quantize(level, w, 256, 1).scale[0] == c.scale, what);
        expect(quantize(level, spread, 256, 16).scale[0] == c.scale, "stride 16, " + what);
      }
});

bool equal_bytes(const Guarded<uint8_t>& got, const std::string& hex) {
  std::string text;
  for (size_t i = 0; i < got.size(); ++i) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", got.data()[i]);
    text += digits;
  }
  return text == hex;
}

const Register known_vectors("known vectors", [] {
  const std::vector<float> a = {.5f, -.1f, -.7f, .2f, -.3f, .3f,  .3f, -.3f, 0, 0, 0,
                                0,   -1,   -2,   -3,  4,    -0.f, 1,   1,    1, 2, 2,
                                2,   -1,   1,    -1,  0,    0,    5,   6,    7, 8};
  const std::vector<float> b = {1, -2, 3, -4, 5, -6};
  for (const Level& level : levels()) {
    const std::string isa = isa_name(level.isa);
    Matrix first(DType::kFloat32, 1, 32), second(DType::kFloat32, 1, 6),
        third(DType::kFloat32, 1, 256);
    for (int64_t i = 0; i < 32; ++i) first.set(0, i, a[static_cast<size_t>(i)]);
    for (int64_t i = 0; i < 6; ++i) second.set(0, i, b[static_cast<size_t>(i)]);
    for (int64_t i = 0; i < 256; ++i)
      third.set(0, i, static_cast<float>((37 * i + 11) % 101 - 50) / 64.0f);

    Planes p = quantize(level, first, 32, 1);
    expect(equal_bytes(p.idx, "2520c009") && equal_bytes(p.sign, "08"), isa + " first");
    expect(std::fabs(p.scale[0] - 43.3f / 24.0f) < 1e-6f, isa + " first scale");
    p = quantize(level, second, 6, 1);
    expect(equal_bytes(p.idx, "91000000") && equal_bytes(p.sign, "01") && p.scale[0] == 4.0f,
           isa + " second");
    p = quantize(level, third, 256, 16);
    expect(equal_bytes(p.idx, "0f3ac7722feac073c0722ffac0732cf72ffaa00e2cf7a20fa00e2cf7a20f3ac7") &&
               equal_bytes(p.sign, "4b5bb5a5dbdaad2d") && p.scale[0] == 0.47265625f,
           isa + " third, stride 16");
    p = quantize(level, third, 256, 1);
    expect(equal_bytes(p.idx, "1515d6dbd959595151619d9d9d95151515dbd95959595161b19d9d95951515d6") &&
               equal_bytes(p.sign, "a5aa5255a92a5495") &&
               std::fabs(p.scale[0] - 0.4873861f) < 1e-7f,
           isa + " third, stride 1");
  }
});

}  // namespace
}  // namespace alignops::test
