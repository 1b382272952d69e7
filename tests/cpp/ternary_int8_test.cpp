#include "ternary_samples.h"

namespace alignops::test {
namespace {

using namespace ternary;

// Activations staged by the scalar kernel, as the op does it.
struct Staged {
  int64_t m, k, k_pad, slots, act_groups;
  Act act;
  std::vector<Segment> segments;
  std::vector<int8_t> q;
  std::vector<float> f, act_scale;
  std::vector<int32_t> slot_sum;

  Staged(const Matrix& x, Act mode)
      : m(x.n),
        k(x.k),
        k_pad(round_up(x.k, 64)),
        slots(mode == Act::kA16 ? 2 * x.n : x.n),
        act(mode) {
    const int64_t step = mode == Act::kA8G ? kActGroupColumns / 4 : k_pad / 4;
    for (int64_t b = 0, g = 0; b < k_pad / 4; b += step, ++g)
      segments.push_back({b, std::min(b + step, k_pad / 4), g, 0});
    act_groups = static_cast<int64_t>(segments.size());
    q.resize(static_cast<size_t>(slots * k_pad));
    f.resize(static_cast<size_t>(m * k_pad));
    act_scale.resize(static_cast<size_t>(m * act_groups));
    slot_sum.resize(static_cast<size_t>(slots * act_groups));
    const StageArgs stage{
        x.data(),         x.dtype,         m,          k,          x.ld, 1,        mode,
        k_pad / 4,        segments.data(), act_groups, act_groups, 0,    q.data(), f.data(),
        act_scale.data(), slot_sum.data()};
    kLinearScalar.stage(stage, 0, m);
  }

  int64_t integer(int64_t slot, int64_t c) const {
    return q[static_cast<size_t>(slot * k_pad + c)];
  }
};

struct Weight {
  int64_t n, k;
  std::vector<int8_t> q;  // exactly n * k bytes, so that reading past them is seen
  std::vector<float> scale;

  Weight(Random& random, int64_t rows, int64_t columns, bool extreme)
      : n(rows), k(columns), q(static_cast<size_t>(n * k)), scale(static_cast<size_t>(n)) {
    for (int8_t& v : q)
      v = static_cast<int8_t>(extreme ? (random.below(2) ? 127 : -127) : random.below(255) - 127);
    for (float& v : scale) v = std::fabs(random.normal());
  }
};

Int8LinearArgs args_of(const Weight& w, const Staged& s, void* y, DType y_dtype, int64_t ldy) {
  return {w.q.data(),
          w.scale.data(),
          w.n,
          w.k,
          s.m,
          s.act,
          s.q.data(),
          s.f.data(),
          s.k_pad,
          s.segments.data(),
          static_cast<int64_t>(s.segments.size()),
          s.slot_sum.data(),
          s.act_scale.data(),
          s.act_groups,
          nullptr,
          DType::kFloat32,
          y,
          y_dtype,
          ldy};
}

Matrix activations(Random& random, DType dtype, int64_t m, int64_t k) {
  Matrix x(dtype, m, k, random.below(3));
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < k; ++c) x.set(r, c, random.normal());
  return x;
}

constexpr Act kActs[] = {Act::kNone, Act::kA8, Act::kA8G, Act::kA16};

const Register parity("int8 linear equals the scalar kernel in every mode", [] {
  Random random(11);
  for (const Level& level : levels())
    for (const int64_t k : {1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 200, 256, 257, 576, 700})
      for (const int64_t m : {1, 2, 3, 4, 5, 7})
        for (const Act act : kActs) {
          const DType dtype = random.pick(dtypes()), y_dtype = random.pick(dtypes()),
                      b_dtype = random.pick(dtypes());
          const int64_t n = random.pick<int64_t>({1, 3, 4, 15, 16, 17, 37, 70});
          const Staged x(activations(random, dtype, m, k), act);
          const Weight w(random, n, k, false);
          const Matrix bias = activations(random, b_dtype, 1, n);
          const int64_t ldy = n + 3;
          Guarded<char> got(m * ldy * bytes_of(y_dtype), 4),
              expected(m * ldy * bytes_of(y_dtype), 4);
          Int8LinearArgs a = args_of(w, x, got.data(), y_dtype, ldy);
          if (random.below(2)) a.bias = bias.data();
          a.bias_dtype = b_dtype;
          const int64_t cut = random.below(n + 1);
          level.int8->linear(a, cut, n);
          level.int8->linear(a, 0, cut);
          a.y = expected.data();
          kInt8Scalar.linear(a, 0, n);
          const std::string what = describe(level, y_dtype, {n, k, m, static_cast<int64_t>(act)});
          for (int64_t t = 0; t < m; ++t)
            expect(same_values(got.data() + t * ldy * bytes_of(y_dtype),
                               expected.data() + t * ldy * bytes_of(y_dtype), y_dtype, n),
                   "values: " + what);
          expect(got.intact(), "guards: " + what);
          for (int64_t t = 0; t < m; ++t)  // the gap between rows of y
            for (int64_t i = n * bytes_of(y_dtype); i < ldy * bytes_of(y_dtype); ++i)
              expect(got[t * ldy * bytes_of(y_dtype) + i] == static_cast<char>(0xA5),
                     "gap: " + what);
        }
});

const Register exact("int8 sums are exact at the largest magnitudes", [] {
  Random random(12);
  for (const Level& level : levels())
    for (const int64_t k : {64, 257, 4096, 131072})
      for (const Act act : {Act::kA8, Act::kA16}) {
        Matrix x(DType::kFloat32, 2, k);
        for (int64_t c = 0; c < k; ++c) {
          x.set(0, c, 1.0f);  // all activations at the largest code
          x.set(1, c, random.below(2) ? -1.0f : 1.0f);
        }
        const Staged staged(x, act);
        Weight w(random, 5, k, true);
        for (int64_t c = 0; c < k; ++c) {
          w.q[static_cast<size_t>(c)] = 127;
          w.q[static_cast<size_t>(k + c)] = -127;
        }
        std::vector<float> y(static_cast<size_t>(2 * w.n));
        level.int8->linear(args_of(w, staged, y.data(), DType::kFloat32, w.n), 0, w.n);
        for (int64_t t = 0; t < 2; ++t)
          for (int64_t n = 0; n < w.n; ++n) {
            int64_t sum = 0;
            for (int64_t c = 0; c < k; ++c) {
              const int64_t q = act == Act::kA16
                                    ? 256 * staged.integer(2 * t, c) + staged.integer(2 * t + 1, c)
                                    : staged.integer(t, c);
              sum += q * w.q[static_cast<size_t>(n * k + c)];
            }
            const float factor =
                staged.act_scale[static_cast<size_t>(t)] * w.scale[static_cast<size_t>(n)];
            expect(y[static_cast<size_t>(t * w.n + n)] ==
                       std::fma(static_cast<float>(sum), factor, 0.0f),
                   describe(level, DType::kFloat32, {k, static_cast<int64_t>(act), t, n, sum}));
          }
      }
});

const Register lossless("int8 linear without activation quantization is close to a double sum", [] {
  Random random(13);
  for (const Level& level : levels())
    for (const int64_t k : {5, 64, 576, 3000}) {
      const Matrix x = activations(random, DType::kFloat32, 3, k);
      const Staged staged(x, Act::kNone);
      const Weight w(random, 20, k, false);
      std::vector<float> y(60);
      level.int8->linear(args_of(w, staged, y.data(), DType::kFloat32, 20), 0, 20);
      for (int64_t t = 0; t < 3; ++t)
        for (int64_t n = 0; n < 20; ++n) {
          double sum = 0, size = 0;
          for (int64_t c = 0; c < k; ++c) {
            const double product = double{x.at(t, c)} * w.q[static_cast<size_t>(n * k + c)];
            sum += product;
            size += std::fabs(product);
          }
          const double scale = w.scale[static_cast<size_t>(n)];
          const double bound = static_cast<double>(k / 16 + 8) * 0x1p-24 * size * scale;
          expect(std::fabs(y[static_cast<size_t>(t * 20 + n)] - sum * scale) <= bound,
                 describe(level, DType::kFloat32, {k, t, n}));
        }
    }
});

const Register batch_invariance("a token's int8 result does not depend on the batch", [] {
  Random random(14);
  for (const Level& level : levels())
    for (const Act act : kActs) {
      const int64_t n = 21, k = 330, m = 7;
      const Matrix x = activations(random, DType::kBFloat16, m, k);
      const Weight w(random, n, k, false);
      std::vector<float> all(static_cast<size_t>(m * n)), one(static_cast<size_t>(n));
      const Staged staged(x, act);
      level.int8->linear(args_of(w, staged, all.data(), DType::kFloat32, n), 0, n);
      for (int64_t t = 0; t < m; ++t) {
        Matrix row(DType::kBFloat16, 1, k);
        for (int64_t c = 0; c < k; ++c) row.set(0, c, x.at(t, c));
        const Staged alone(row, act);
        level.int8->linear(args_of(w, alone, one.data(), DType::kFloat32, n), 0, n);
        expect(same_values(one.data(), all.data() + t * n, DType::kFloat32, n),
               describe(level, DType::kFloat32, {static_cast<int64_t>(act), t}));
      }
    }
});

const Register quantize_parity("int8 quantize equals the scalar kernel", [] {
  Random random(15);
  for (const Level& level : levels())
    for (const DType dtype : dtypes())
      for (const int64_t k : {1, 7, 8, 9, 15, 16, 17, 33, 64, 100, 576}) {
        Matrix w = activations(random, dtype, 4, k);
        for (int64_t c = 0; c < k; ++c) w.set(2, c, 0.0f);
        for (int64_t c = 0; c < k; ++c) w.set(3, c, 1e-39f);
        for (const bool bad : {false, true}) {
          if (bad) {
            w.set(1, k - 1, INFINITY);
            w.set(0, k / 2, NAN);
          }
          Guarded<int8_t> q(4 * k, 1), expected_q(4 * k, 1);
          Guarded<float> scale(4), expected_scale(4);
          Int8QuantizeArgs a{w.data(), dtype, 4, k, w.ld, q.data(), scale.data(), 0, INT64_MAX};
          Int8QuantizeArgs b{
              w.data(), dtype, 4, k, w.ld, expected_q.data(), expected_scale.data(), 0, INT64_MAX};
          level.int8->quantize(a, 0, 4);
          kInt8Scalar.quantize(b, 0, 4);
          const std::string what = describe(level, dtype, {k, bad});
          expect(a.nonfinite == b.nonfinite && a.first == b.first, "report: " + what);
          expect(q.intact() && scale.intact(), "guards: " + what);
          if (bad) continue;
          expect(q == expected_q && scale == expected_scale, "values: " + what);
          expect(a.nonfinite == 0 && scale[2] == 0.0f && scale[3] == 0.0f, "zero rows: " + what);
        }
      }
});

}  // namespace
}  // namespace alignops::test
