// Rows that are hard on vectors: every instruction set against the scalar kernels, bit for bit.
#include <cmath>

#include "common/isa.h"
#include "harness.h"
#include "speculative/cpu/random.h"
#include "speculative/cpu/weights.h"
#include "speculative/self_test.h"

namespace alignops::test {
namespace {

using namespace speculative;

constexpr float kInfinity = __builtin_inff();

struct Level {
  Isa isa;
  const Kernels* rows;
};

std::vector<Level> levels() {
  std::vector<Level> all = {{Isa::kScalar, &kRowsScalar}};
#if defined(__x86_64__)
  if (isa_supported(Isa::kAvx2)) all.push_back({Isa::kAvx2, &kRowsAvx2});
  if (isa_supported(Isa::kAvx512)) all.push_back({Isa::kAvx512, &kRowsAvx512});
#endif
  return all;
}

const std::vector<DType> kTypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

Rate rate_of(double temperature) {
  const double rate = 1.4426950408889634 / temperature;
  const int shift = 29 - static_cast<int>(std::floor(std::log2(rate)));
  return {static_cast<int32_t>(std::lrint(std::ldexp(rate, shift))), shift};
}

// A row that begins one element behind an aligned address and ends where its memory ends.
class Row {
 public:
  Row(const std::vector<float>& values, DType dtype, bool given = false)
      : dtype_(dtype),
        given_(given),
        size_(static_cast<int64_t>(values.size())),
        bytes_((values.size() + 1) * width()) {
    unsigned char* to = bytes_.data() + width();
    for (const float value : values) {
      const uint16_t half = dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
      if (dtype == DType::kFloat32) {
        std::memcpy(to, &value, sizeof value);
      } else {
        std::memcpy(to, &half, sizeof half);
      }
      to += width();
    }
  }

  Law law(double temperature) const {
    return {bytes_.data() + width(), dtype_, given_, size_, rate_of(temperature), kNoCut, 0, 1.0};
  }

 private:
  size_t width() const { return dtype_ == DType::kFloat32 ? 4 : 2; }
  DType dtype_;
  bool given_;
  int64_t size_;
  std::vector<unsigned char> bytes_;
};

std::vector<float> normal(Random& random, int64_t size, float scale) {
  std::vector<float> out;
  for (int64_t i = 0; i < size; ++i) out.push_back(scale * random.normal());
  return out;
}

std::vector<float> given(Random& random, int64_t size) {
  std::vector<float> out;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t kind = random.below(8);
    out.push_back(kind == 0   ? 0.0f
                  : kind == 1 ? 0x1p-41f
                              : std::exp(4.0f * random.normal() - 12.0f));
    if (out.back() > 1.0f) out.back() = 1.0f;
  }
  return out;
}

void compare(const std::vector<float>& p, const std::vector<float>& q, double temperature,
             const std::string& what, bool probabilities = false) {
  for (const Level& level : levels())
    for (const DType dtype : kTypes) {
      const Row row(p, dtype, probabilities), drafter(q, dtype, probabilities);
      expect(agrees_on(*level.rows, row.law(temperature), drafter.law(temperature)),
             std::string(isa_name(level.isa)) + " dtype " +
                 std::to_string(static_cast<int>(dtype)) + " " + what);
    }
}

const Register sizes("rows of all lengths and temperatures", [] {
  Random random(1);
  const std::vector<double> temperatures = {1.0, 0.7, 1e-5, 1e-3, 0.1, 3.0, 90.0, 100.0, 1e4};
  size_t turn = 0;
  for (const int64_t size : {1,    2,    3,    4,    5,    7,    8,    9,    15,   16,   17,
                             31,   33,   63,   64,   65,   127,  129,  255,  257,  511,  513,
                             1000, 4095, 4096, 4097, 4159, 5000, 8191, 8192, 8193, 12289}) {
    const double temperature = temperatures[turn++ % temperatures.size()];
    const std::string what = std::to_string(size) + " ids at " + std::to_string(temperature);
    const int64_t shorter = size - (size > 1 ? random.below(size / 2) : 0);
    compare(normal(random, size, 4.0f), normal(random, shorter, 4.0f), temperature, what);
    compare(given(random, size), given(random, shorter), 1.0, what + ", probabilities", true);
  }
  for (const double temperature : temperatures)
    compare(normal(random, 4500, 6.0f), normal(random, 4500, 5.0f), temperature,
            "at " + std::to_string(temperature));
});

const Register extremes("logits at the ends of the range, zeros of both signs, subnormal ones", [] {
  Random random(2);
  const std::vector<float> special = {0.0f,    -0.0f,    1e-40f,   -1e-40f, 0x1p-21f,   -0x1p-21f,
                                      2046.9f, 2047.0f,  2047.5f,  2048.0f, 6e4f,       -2046.5f,
                                      -2047.f, -2047.5f, -2048.0f, -6.5e4f, -kInfinity, 3.0f};
  for (const double temperature : {1e-5, 0.3, 1.0, 50.0, 128.0, 1e4})
    for (int turn = 0; turn < 6; ++turn) {
      std::vector<float> p = normal(random, 4300, turn < 3 ? 30.0f : 800.0f), q = p;
      for (size_t i = 0; i < p.size(); ++i) {
        if (random.below(turn % 3 == 0 ? 2 : 50) == 0) p[i] = random.pick(special);
        if (random.below(20) == 0) q[i] = random.pick(special);
      }
      // Without the large ones the plain forms are in use.
      if (turn % 3 == 2)
        for (float& value : p) value = value > 1000.0f ? 1.0f : value;
      compare(p, q, temperature, "extremes at " + std::to_string(temperature));
    }
  // Nothing but negative numbers, or but zeros of both signs.
  for (const float base : {-5.0f, -2000.0f}) {
    std::vector<float> p = normal(random, 4200, 0.5f);
    for (float& value : p) value = base - std::fabs(value);
    compare(p, p, 1.0, "negative logits");
  }
  std::vector<float> zeros(4200, -0.0f);
  zeros[17] = zeros[4100] = 0.0f;
  compare(zeros, zeros, 1.0, "zeros");
});

const Register blocks("blocks of -inf, ties, one id far above the others", [] {
  Random random(3);
  for (const int64_t begin : {0, 1, 16, 100, 4096, 8000}) {
    std::vector<float> p = normal(random, 8400, 3.0f), q = normal(random, 8400, 3.0f);
    for (int64_t i = begin; i < begin + 4096 && i < 8400; ++i)
      p[static_cast<size_t>(i)] = -kInfinity;
    compare(p, q, 1.0, "-inf from " + std::to_string(begin));
    compare(q, p, 1.0, "-inf in the drafter from " + std::to_string(begin));
  }
  const std::vector<float> equal(5000, 1.25f);
  compare(equal, equal, 1.0, "equal logits");
  std::vector<float> single(9000, -kInfinity);
  single[8999] = -3.0f;
  compare(single, equal, 0.7, "one id");
  for (const float height : {25.0f, 66.0f, 67.0f, 69.0f, 70.0f, 72.0f, 90.0f}) {
    // Around 2^-40 of a sum and 2^-96 of a probability.
    std::vector<float> p = normal(random, 8400, 1.0f);
    p[5000] = height;
    compare(p, normal(random, 8400, 1.0f), 1.0, "peak of " + std::to_string(height));
  }
});

const Register tied_race("the lowest of the ids that tie wins a race", [] {
  for (const Level& level : levels())
    for (const uint32_t position : {0u, 5u, 77u}) {
      std::vector<float> p;
      for (int64_t v = 0; v < 1003; ++v) {
        const Words words = philox(7, position, Stream::kRace, static_cast<uint32_t>(v / 4));
        p.push_back(v < 200 ? 0.0f : noise(words.word[v % 4]) * 0x1p-6f);
      }
      TileRace out;
      level.rows->race(Row(p, DType::kFloat32, true).law(1.0), 7, position, &out, 0, 1);
      expect(out.ratio == 64.0f && out.place == 200, isa_name(level.isa));
    }
});

const Register rounded_words("noise of words that round up to a power of two", [] {
  struct Case {
    uint32_t position, id, word;
  };
  for (const Level& level : levels())
    for (const Case& c : {Case{1800, 3826, 0xFFFFFFA7}, Case{11186, 1658, 0x3FFFFFF7},
                          Case{11588, 1287, 0x07FFFFFD}, Case{16777, 776, 0xFFFFFFB3}}) {
      expect(philox(7, c.position, Stream::kRace, c.id / 4).word[c.id % 4] == c.word, "word");
      std::vector<float> p(4096);
      p[c.id] = 1.0f;
      TileRace out;
      level.rows->race(Row(p, DType::kFloat32, true).law(1.0), 7, c.position, &out, 0, 1);
      expect(out.ratio == noise(c.word) && out.place == static_cast<int32_t>(c.id),
             isa_name(level.isa));
    }
});

// What vectors take for granted.
const Register polynomial("2^x grows and stays below 2 for all fractions", [] {
  uint32_t before = 0;
  bool grows = true;
  for (int32_t f = 0; f < 1 << 23; ++f) {
    const float x = bits_float(static_cast<uint32_t>(f) | 0x3f800000u) - 1.0f;
    float g = bits_float(kExp2[0]);
    for (int i = 1; i < 5; ++i) g = g * x + bits_float(kExp2[i]);
    g = g * x + 1.0f;
    grows = grows && float_bits(g) >= before;
    before = float_bits(g);
  }
  expect(grows && before < 0x40000000u, "polynomial");
});

const Register keys("keys grow with logits", [] {
  Random random(4);
  for (const double temperature : {1e-5, 0.01, 0.7, 1.0, 33.0, 1e4}) {
    const Rate rate = rate_of(temperature);
    for (int turn = 0; turn < 20000; ++turn) {
      const float low = 40.0f * random.normal();
      float high = low;
      for (int64_t steps = random.below(4); steps >= 0; --steps)
        high = std::nextafter(high, kInfinity);
      expect(key_of(weigh(low, rate)) <= key_of(weigh(high, rate)),
             "at " + std::to_string(temperature));
    }
  }
});

}  // namespace
}  // namespace alignops::test
