// The CUDA kernels of the ternary core, run on the CPU and compared with plain loops over the
// canonical planes.
#include "cuda_on_host.h"
// The kernels come after the host's stand-ins for the CUDA language.
#include "ternary/cuda/matmul.cu"
#include "ternary/cuda/weights.cu"

#include <random>
#include <string>

#include "common/float16.h"

namespace alignops::ternary {
namespace {

using cuda::Activations;
using cuda::Launch;

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

std::mt19937 generator(20260125);

int64_t uniform(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
float normal() { return std::normal_distribution<float>()(generator); }

// The 32 codes as four 2-bit lanes (value + 1).
constexpr uint8_t kCodebook[32] = {0xa9, 0x89, 0x29, 0x09, 0xa6, 0x86, 0x26, 0x06, 0x9a, 0x92, 0x1a,
                                   0x12, 0x6a, 0x62, 0x4a, 0x42, 0x01, 0x21, 0x81, 0xa1, 0x04, 0x24,
                                   0x84, 0xa4, 0x10, 0x18, 0x90, 0x98, 0x40, 0x48, 0x60, 0x68};

// A weight as canonical planes and scales, and what they stand for in block order.
struct Weight {
  int64_t n, k, group, stride, places, groups, scale_rows;
  std::vector<uint8_t> idx, sign;
  std::vector<float> scale;          // (n, groups)
  std::vector<float> scale_columns;  // (groups, n rounded up to 64)
  std::vector<int> lanes;            // (n, places)
};

Weight random_weight(int64_t n, int64_t k, int64_t group, int64_t stride) {
  Weight w{n,
           k,
           group,
           stride,
           round_up(ceil_div(k, 4), 8) * 4,
           ceil_div(k, group),
           round_up(n, 64),
           {},
           {},
           {},
           {},
           {}};
  for (int64_t i = 0; i < n * w.places / 8; ++i)
    w.idx.push_back(static_cast<uint8_t>(uniform(0, 255)));
  for (int64_t i = 0; i < n * w.places / 32; ++i)
    w.sign.push_back(static_cast<uint8_t>(uniform(0, 255)));
  w.scale_columns.resize(static_cast<size_t>(w.groups * w.scale_rows));
  for (int64_t i = 0; i < n * w.groups; ++i) {
    w.scale.push_back(std::fabs(normal()));
    w.scale_columns[static_cast<size_t>(i % w.groups * w.scale_rows + i / w.groups)] =
        w.scale.back();
  }
  for (int64_t row = 0; row < n; ++row)
    for (int64_t place = 0; place < w.places; ++place) {
      const int64_t b = row * (w.places / 4) + place / 4;
      const int idx = w.idx[static_cast<size_t>(b / 2)] >> 4 * (b % 2) & 15;
      const int sign = w.sign[static_cast<size_t>(b / 8)] >> b % 8 & 1;
      w.lanes.push_back((kCodebook[16 * sign + idx] >> 2 * (place % 4) & 3) - 1);
    }
  return w;
}

std::vector<uint8_t> pack(const Weight& w) {
  std::vector<uint8_t> packed(static_cast<size_t>(ceil_div(w.n, cuda::kTileRows) *
                                                  cuda::column_tiles(w.k) * cuda::kTileBytes),
                              0xee);
  Launch launch{};
  cuda::pack(w.idx.data(), w.sign.data(), w.n, w.k, packed.data(), launch);
  return packed;
}

void test_layout() {
  for (int64_t n : {1, 31, 32, 33, 70})
    for (int64_t k : {1, 4, 31, 33, 127, 129, 576}) {
      const Weight w = random_weight(n, k, k, 1);
      const std::vector<uint8_t> packed = pack(w);
      std::vector<uint8_t> idx(w.idx.size(), 0xee), sign(w.sign.size(), 0xee);
      Launch launch{};
      cuda::unpack(packed.data(), n, k, idx.data(), sign.data(), launch);
      const std::string name = "layout " + std::to_string(n) + "x" + std::to_string(k);
      expect(idx == w.idx && sign == w.sign, name + ": unpack(pack(w)) == w");
      // The documented place of every block.
      bool right = true;
      for (int64_t row = 0; row < n; ++row)
        for (int64_t b = 0; b < w.places / 4; ++b) {
          const int64_t r = row % 32, t = b % 32 / 8, j = b % 8, lane = 4 * (r % 8) + t;
          const uint8_t* tile = packed.data() + (row / 32 * ceil_div(k, 128) + b / 32) * 640;
          const int nibble = tile[16 * lane + 4 * (r / 8) + j / 2] >> 4 * (j % 2) & 15;
          const int bit = tile[512 + 4 * lane + j / 2] >> (2 * (r / 8) + j % 2) & 1;
          const int64_t at = row * (w.places / 4) + b;
          right = right && nibble == (w.idx[static_cast<size_t>(at / 2)] >> 4 * (at % 2) & 15) &&
                  bit == (w.sign[static_cast<size_t>(at / 8)] >> at % 8 & 1);
        }
      expect(right, name + ": blocks lie where the documentation says");
    }
}

float to_float(uint32_t bits, Activations type) {
  return type == Activations::kFloat32    ? std::bit_cast<float>(bits)
         : type == Activations::kBFloat16 ? bf16_to_float(static_cast<uint16_t>(bits))
                                          : fp16_to_float(static_cast<uint16_t>(bits));
}

uint32_t from_float(float v, Activations type) {
  return type == Activations::kFloat32    ? std::bit_cast<uint32_t>(v)
         : type == Activations::kBFloat16 ? float_to_bf16(v)
                                          : float_to_fp16(v);
}

// Rows of elements of any of the four types, 16-byte aligned; `ld` counts elements.
struct Tokens {
  Activations type;
  int64_t m, places, ld;
  std::vector<uint4> memory;
  std::vector<double> values;  // (m, places)

  int64_t bytes() const {
    return type == Activations::kInt8 ? 1 : type == Activations::kFloat32 ? 4 : 2;
  }
};

Tokens random_tokens(Activations type, int64_t m, int64_t k, int64_t places) {
  Tokens x{type, m, places, round_up(places, 16) + 16, {}, {}};
  x.memory.resize(static_cast<size_t>(m * x.ld * x.bytes() / 16 + 1));
  auto* out = reinterpret_cast<uint8_t*>(x.memory.data());
  for (int64_t t = 0; t < m; ++t)
    for (int64_t c = 0; c < places; ++c) {
      uint8_t* at = out + (t * x.ld + c) * x.bytes();
      if (type == Activations::kInt8) {
        const auto q = static_cast<int8_t>(c < k ? uniform(-127, 127) : 0);
        *at = static_cast<uint8_t>(q);
        x.values.push_back(q);
      } else {
        const uint32_t bits = from_float(c < k ? normal() : 0.0f, type);
        std::memcpy(at, &bits, static_cast<size_t>(x.bytes()));
        x.values.push_back(to_float(bits, type));
      }
    }
  return x;
}

const char* type_name(Activations type) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int8"};
  return kNames[static_cast<int>(type)];
}

struct Scales {
  std::vector<float> values;  // (m, groups)
  int64_t groups;
};

// Every output against a double sum; without scale groups int8 outputs are exact, and compared so.
void check(const cuda::MatmulArgs& a, const Tokens& x, const std::vector<int>& lanes,
           int64_t row_places, const std::vector<float>& weight_scale, const Scales& act,
           const std::vector<float>& bias, const std::vector<float>& y, const std::string& name) {
  const bool exact = x.type == Activations::kInt8 && a.groups == 1 && a.act_groups == 1;
  for (int64_t t = 0; t < a.m; ++t)
    for (int64_t row = 0; row < a.n; ++row) {
      double sum = 0, magnitude = 1;
      int64_t integer = 0;
      for (int64_t c = 0; c < std::min(x.places, row_places); ++c) {
        const int lane = lanes[static_cast<size_t>(row * row_places + c)];
        const double v = x.values[static_cast<size_t>(t * x.places + c)];
        const int64_t g = a.groups == 1 ? 0 : std::min(c / a.group, a.groups - 1);
        const int64_t s = a.act_groups == 1 ? 0 : c / kActGroupColumns;
        const double unit = x.type == Activations::kInt8
                                ? act.values[static_cast<size_t>(t * act.groups + s)]
                                : 1.0f;
        sum += lane * v * unit * weight_scale[static_cast<size_t>(row * a.groups + g)];
        magnitude +=
            std::fabs(lane * v * unit * weight_scale[static_cast<size_t>(row * a.groups + g)]);
        integer += lane * static_cast<int64_t>(v);
      }
      const float got = y[static_cast<size_t>(t * a.n + row)];
      if (exact) {
        const float scale =
            act.values[static_cast<size_t>(t)] * weight_scale[static_cast<size_t>(row)];
        float want = static_cast<float>(integer) * scale;
        if (!bias.empty()) want += bias[static_cast<size_t>(row)];
        if (got == want) continue;
      } else if (std::fabs(got - sum - (bias.empty() ? 0.0 : bias[static_cast<size_t>(row)])) <=
                 2e-6 * magnitude) {
        continue;
      }
      expect(false, name + ": token " + std::to_string(t) + ", row " + std::to_string(row) +
                        ": got " + std::to_string(got) + ", want " + std::to_string(sum));
      return;
    }
}

struct Case {
  int64_t m, n, k, group, stride;
};

void test_ternary(const Case& c, Activations type, bool act_groups) {
  const Weight w = random_weight(c.n, c.k, c.group, c.stride);
  const std::vector<uint8_t> packed = pack(w);
  // Float tokens may come unpadded (whole groups of 32), integer ones are always padded to the
  // tile.
  const bool direct = type != Activations::kInt8 && c.k % 32 == 0;
  const Tokens x = random_tokens(type, c.m, c.k, direct ? c.k : round_up(c.k, cuda::kTileColumns));
  Scales act{{}, act_groups ? ceil_div(c.k, kActGroupColumns) : 1};
  for (int64_t i = 0; i < c.m * act.groups; ++i) act.values.push_back(std::fabs(normal()));
  std::vector<float> bias, y(static_cast<size_t>(c.m * c.n), NAN);
  if (c.n % 2 == 1)
    for (int64_t i = 0; i < c.n; ++i) bias.push_back(normal());

  const cuda::MatmulArgs args{x.memory.data(),
                              type,
                              c.m,
                              x.ld,
                              x.places,
                              act.values.data(),
                              act.groups,
                              packed.data(),
                              w.scale_columns.data(),
                              c.n,
                              c.k,
                              w.scale_rows,
                              c.group,
                              w.groups,
                              bias.empty() ? nullptr : bias.data(),
                              DType::kFloat32,
                              y.data(),
                              DType::kFloat32};
  Launch launch{};
  expect(cuda::ternary_matmul(args, launch) == cudaSuccess, "launch");
  check(args, x, w.lanes, w.places, w.scale, act, bias, y,
        std::string("ternary ") + type_name(type) + " m=" + std::to_string(c.m) +
            " n=" + std::to_string(c.n) + " k=" + std::to_string(c.k) +
            " group=" + std::to_string(c.group) + (act_groups ? " a8g" : ""));
}

void test_int8(const Case& c, Activations type, bool act_groups) {
  std::vector<int> lanes;
  std::vector<uint4> memory(static_cast<size_t>(c.n * c.k / 16 + 1));
  auto* weight = reinterpret_cast<int8_t*>(memory.data());
  for (int64_t i = 0; i < c.n * c.k; ++i) {
    lanes.push_back(static_cast<int>(uniform(-127, 127)));
    weight[i] = static_cast<int8_t>(lanes.back());
  }
  std::vector<float> scale, y(static_cast<size_t>(c.m * c.n), NAN);
  for (int64_t i = 0; i < c.n; ++i) scale.push_back(std::fabs(normal()));
  const Tokens x = random_tokens(type, c.m, c.k, round_up(c.k, cuda::kTileColumns));
  Scales act{{}, act_groups ? ceil_div(c.k, kActGroupColumns) : 1};
  for (int64_t i = 0; i < c.m * act.groups; ++i) act.values.push_back(std::fabs(normal()));

  const cuda::MatmulArgs args{x.memory.data(),
                              type,
                              c.m,
                              x.ld,
                              x.places,
                              act.values.data(),
                              act.groups,
                              weight,
                              scale.data(),
                              c.n,
                              c.k,
                              c.n,
                              c.k,
                              1,
                              nullptr,
                              DType::kFloat32,
                              y.data(),
                              DType::kFloat32};
  Launch launch{};
  expect(cuda::int8_matmul(args, launch) == cudaSuccess, "launch");
  check(args, x, lanes, c.k, scale, act, {}, y,
        std::string("int8 ") + type_name(type) + " m=" + std::to_string(c.m) +
            " n=" + std::to_string(c.n) + " k=" + std::to_string(c.k) + (act_groups ? " a8g" : ""));
}

// Worst case of the integer sums, and a token whose neighbour is not finite.
void test_extremes() {
  const int64_t n = 33, k = 1024;
  Weight w = random_weight(n, k, k, 1);
  std::fill(w.idx.begin(), w.idx.end(), uint8_t{0});
  std::fill(w.sign.begin(), w.sign.end(), uint8_t{0xff});  // code 16: 0 - - -
  w.lanes.assign(static_cast<size_t>(n * k), -1);
  for (size_t i = 0; i < w.lanes.size(); i += 4) w.lanes[i] = 0;
  const std::vector<uint8_t> packed = pack(w);
  for (const Activations type :
       {Activations::kInt8, Activations::kFloat32, Activations::kBFloat16}) {
    Tokens x = random_tokens(type, 3, k, k);
    auto* bytes = reinterpret_cast<uint8_t*>(x.memory.data());
    const Scales act{{1.0f, 1.0f, 1.0f}, 1};
    std::vector<float> y(static_cast<size_t>(3 * n), NAN);
    if (type == Activations::kInt8) {
      std::memset(bytes, 127, static_cast<size_t>(3 * x.ld));
      std::fill(x.values.begin(), x.values.end(), 127.0);
    } else {
      const uint32_t nan = from_float(NAN, type);
      for (int64_t c = 0; c < k; ++c)
        std::memcpy(bytes + (x.ld + c) * x.bytes(), &nan, static_cast<size_t>(x.bytes()));
    }
    cuda::MatmulArgs args{x.memory.data(),
                          type,
                          3,
                          x.ld,
                          k,
                          act.values.data(),
                          1,
                          packed.data(),
                          w.scale_columns.data(),
                          n,
                          k,
                          w.scale_rows,
                          k,
                          1,
                          nullptr,
                          DType::kFloat32,
                          y.data(),
                          DType::kFloat32};
    Launch launch{};
    cuda::ternary_matmul(args, launch);
    if (type != Activations::kInt8) {
      expect(std::isnan(y[static_cast<size_t>(n)]), "a NaN token gives NaN");
      for (int64_t i = 0; i < n; ++i) y[static_cast<size_t>(n + i)] = 0;
      for (int64_t c = 0; c < k; ++c) x.values[static_cast<size_t>(k + c)] = 0;
    }
    check(args, x, w.lanes, k, w.scale, act, {}, y, std::string("extremes ") + type_name(type));
  }
}

void test_stage() {
  for (const Case& c : {Case{3, 1, 7, 7, 1}, Case{2, 1, 256, 256, 1}, Case{2, 1, 700, 256, 1},
                        Case{3, 1, 320, 256, 16}, Case{1, 1, 576, 576, 16}}) {
    const int64_t places = round_up(c.k, cuda::kTileColumns), ld = c.k + 3,
                  groups = ceil_div(c.k, c.group);
    std::vector<float> x(static_cast<size_t>(c.m * ld));
    for (float& v : x) v = normal();
    std::fill(x.begin(), x.begin() + c.k, 0.0f);  // a zero token
    if (c.m > 2) x[static_cast<size_t>(2 * ld)] = NAN;
    std::vector<int8_t> q(static_cast<size_t>(c.m * places), 99);
    std::vector<float> scale(static_cast<size_t>(c.m * groups), -1.0f),
        copy(static_cast<size_t>(c.m * places), -1.0f);
    const cuda::StagingArgs args{x.data(), DType::kFloat32, c.m, c.k, ld, c.stride, places};
    Launch launch{};
    cuda::stage_int8(args, c.group, q.data(), scale.data(), launch);
    cuda::stage_copy(args, copy.data(), launch);

    std::vector<int8_t> want_q(q.size(), 0);
    std::vector<float> want_scale(scale.size()), want_copy(copy.size(), 0.0f);
    for (int64_t t = 0; t < c.m; ++t)
      for (int64_t b = 0; b < ceil_div(c.k, 4); ++b)
        for (int64_t p = 0; p < 4; ++p) {
          const int64_t column = c.stride == 1 ? 4 * b + p : 64 * (b / 16) + b % 16 + 16 * p,
                        g = column / c.group;
          if (column >= c.k) continue;
          float amax = 0;
          bool finite = true;
          for (int64_t i = g * c.group; i < std::min((g + 1) * c.group, c.k); ++i) {
            const float v = std::fabs(x[static_cast<size_t>(t * ld + i)]);
            finite = finite && std::isfinite(v);
            amax = std::max(amax, v);
          }
          const float v = x[static_cast<size_t>(t * ld + column)];
          const auto place = static_cast<size_t>(t * places + 4 * b + p);
          want_copy[place] = v;
          want_scale[static_cast<size_t>(t * groups + g)] = finite ? amax / 127.0f : NAN;
          if (finite && amax > 0)
            want_q[place] = static_cast<int8_t>(std::rint(v * (127.0f / amax)));
        }
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      for (size_t i = 0; i < a.size(); ++i)
        if (!(a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i])))) return false;
      return true;
    };
    const std::string name =
        "stage k=" + std::to_string(c.k) + " stride=" + std::to_string(c.stride);
    expect(q == want_q && same(scale, want_scale), name + ": int8");
    expect(same(copy, want_copy), name + ": copy");
  }
}

// Weights against the scalar CPU kernels, bit for bit.
void test_weights() {
  for (const Case& c :
       {Case{0, 1, 1, 1, 1}, Case{0, 3, 6, 6, 1}, Case{0, 9, 33, 32, 1}, Case{0, 17, 100, 64, 1},
        Case{0, 5, 576, 128, 1}, Case{0, 4, 320, 64, 16}, Case{0, 6, 1024, 1024, 16}})
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      const int64_t ld = c.k + 5, blocks = round_up(ceil_div(c.k, 4), 8),
                    groups = ceil_div(c.k, c.group);
      std::vector<float> w32(static_cast<size_t>(c.n * ld));
      std::vector<uint16_t> w16;
      for (float& v : w32) {
        v = uniform(0, 9) == 0 ? 0.25f * static_cast<float>(uniform(-1, 1)) : normal();
        w16.push_back(dtype == DType::kFloat16 ? float_to_fp16(v) : float_to_bf16(v));
      }
      const void* w = dtype == DType::kFloat32 ? static_cast<const void*>(w32.data()) : w16.data();
      const QuantizeArgs args{w, dtype, c.n, c.k, ld, c.group, c.stride};
      std::vector<uint8_t> idx(static_cast<size_t>(c.n * blocks / 2), 0xee), want_idx(idx.size());
      std::vector<uint8_t> sign(static_cast<size_t>(c.n * blocks / 8), 0xee),
          want_sign(sign.size());
      std::vector<float> scale(static_cast<size_t>(c.n * groups), NAN), want_scale(scale.size());
      cuda::Nonfinite nonfinite{0, UINT64_MAX};
      Launch launch{};
      cuda::quantize(args, idx.data(), sign.data(), scale.data(), &nonfinite, launch);
      QuantizeOut out{want_idx.data(), want_sign.data(), want_scale.data(), 0, INT64_MAX};
      kQuantizeScalar.quantize(args, out, 0, c.n);
      const std::string name = "k=" + std::to_string(c.k) + " group=" + std::to_string(c.group);
      expect(idx == want_idx && sign == want_sign && scale == want_scale && nonfinite.count == 0,
             "quantize " + name);

      std::vector<uint32_t> dense(static_cast<size_t>(c.n * c.k), 0xeeeeeeee), want_dense = dense;
      DequantizeArgs back{idx.data(), sign.data(), scale.data(), c.n,  c.k,
                          c.group,    c.stride,    dense.data(), dtype};
      cuda::dequantize(back, launch);
      back.out = want_dense.data();
      kQuantizeScalar.dequantize(back, 0, c.n);
      expect(dense == want_dense, "dequantize " + name);

      std::vector<int8_t> q(static_cast<size_t>(c.n * c.k), 99), want_q(q.size());
      std::vector<float> row(static_cast<size_t>(c.n), NAN), want_row(row.size());
      Int8QuantizeArgs head{w, dtype, c.n, c.k, ld, q.data(), row.data(), 0, INT64_MAX};
      cuda::int8_quantize(head, &nonfinite, launch);
      head.q = want_q.data();
      head.scale = want_row.data();
      kInt8Scalar.quantize(head, 0, c.n);
      expect(q == want_q && row == want_row, "int8 quantize " + name);
    }
  std::vector<float> w(2 * 40, 1.0f);
  w[47] = INFINITY;
  w[43] = NAN;
  std::vector<uint8_t> idx(2 * 8), sign(2 * 2);
  std::vector<float> scale(2);
  cuda::Nonfinite nonfinite{0, UINT64_MAX};
  Launch launch{};
  cuda::quantize({w.data(), DType::kFloat32, 2, 40, 40, 40, 1}, idx.data(), sign.data(),
                 scale.data(), &nonfinite, launch);
  expect(nonfinite.count == 2 && nonfinite.first == 43, "non-finite weights are counted");
}

int run_all() {
  test_layout();
  test_stage();
  test_weights();
  test_extremes();
  const Case cases[] = {{1, 1, 4, 4, 1},       {2, 33, 100, 100, 1},    {8, 32, 128, 128, 1},
                        {9, 7, 576, 576, 1},   {1, 64, 2560, 2560, 1},  {3, 40, 256, 32, 1},
                        {5, 33, 640, 96, 1},   {7, 32, 512, 128, 1},    {2, 31, 448, 64, 16},
                        {1, 32, 4480, 160, 1}, {17, 65, 1088, 1088, 16}};
  for (const Case& c : cases)
    for (const Activations type : {Activations::kInt8, Activations::kFloat32,
                                   Activations::kBFloat16, Activations::kFloat16}) {
      test_ternary(c, type, false);
      if (type == Activations::kInt8) test_ternary(c, type, true);
      if (c.k > 2000) continue;
      test_int8(c, type, false);
      if (type == Activations::kInt8) test_int8(c, type, true);
    }
  if (failures == 0) std::printf("ternary_cuda_test: all passed\n");
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace alignops::ternary

int main() { return alignops::ternary::run_all(); }
