#include "ternary_samples.h"

namespace alignops::test {
namespace {

using namespace ternary;

constexpr Act kActs[] = {Act::kNone, Act::kA8, Act::kA8G, Act::kA16};

int64_t plane_blocks(int64_t k) { return round_up(ceil_div(k, 4), 8); }

// Random canonical planes and scales.
struct Weight {
  int64_t n, k, group, blocks, groups;
  std::vector<uint8_t> idx, sign;
  std::vector<float> scale;  // (groups, rows)
  int64_t rows;

  Weight(Random& random, int64_t n_, int64_t k_, int64_t group_)
      : n(n_),
        k(k_),
        group(group_),
        blocks(plane_blocks(k)),
        groups(ceil_div(k, group)),
        idx(static_cast<size_t>(n * blocks / 2)),
        sign(static_cast<size_t>(n * blocks / 8)),
        rows(round_up(n, 64)) {
    scale.assign(static_cast<size_t>(groups * rows), 0.0f);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t b = 0; b < ceil_div(k, 4); ++b)
        set_code(r, b, static_cast<int>(random.below(32)));
      for (int64_t g = 0; g < groups; ++g)
        scale[static_cast<size_t>(g * rows + r)] = std::fabs(random.normal());
    }
  }

  void set_code(int64_t r, int64_t b, int code) {
    uint8_t& nibbles = idx[static_cast<size_t>(r * blocks / 2 + b / 2)];
    const int shift = 4 * static_cast<int>(b % 2), bit = static_cast<int>(b % 8);
    nibbles = static_cast<uint8_t>((nibbles & ~(15 << shift)) | (code & 15) << shift);
    uint8_t& signs = sign[static_cast<size_t>(r * blocks / 8 + b / 8)];
    signs = static_cast<uint8_t>((signs & ~(1 << bit)) | (code >> 4) << bit);
  }

  // Value of lane p of block b of row r, from the definition of the code; padding blocks are as
  // good as 0.
  int value(int64_t r, int64_t b, int64_t p) const {
    if (b >= blocks) return 0;
    const int code = idx[static_cast<size_t>(r * blocks / 2 + b / 2)] >> 4 * (b % 2) & 15;
    const bool negative = sign[static_cast<size_t>(r * blocks / 8 + b / 8)] >> (b % 8) & 1;
    const int zero = code >> 2;
    if (p == zero) return 0;
    const int64_t kept = p < zero ? p : p - 1;
    const bool differs = kept == 0 ? false : kept == 1 ? code & 1 : code & 2;
    return negative == differs ? 1 : -1;
  }
};

std::vector<Segment> segments_of(const Weight& w, int64_t blocks, Act act) {
  std::vector<Segment> all;
  for (int64_t b = 0; b < blocks; b += 8) {
    const int64_t weight = std::min(4 * b / w.group, w.groups - 1);
    const int64_t groups = act == Act::kA8G ? ceil_div(w.k, kActGroupColumns) : 1;
    const int64_t act_group = std::min(act == Act::kA8G ? 4 * b / kActGroupColumns : 0, groups - 1);
    if (!all.empty() && all.back().act_group == act_group && all.back().weight_group == weight) {
      all.back().end = b + 8;
    } else {
      all.push_back({b, b + 8, act_group, weight});
    }
  }
  all.back().end = blocks;
  return all;
}

struct Staged {
  Act act;
  int64_t m, blocks, panel, slots, act_groups;
  std::vector<Segment> segments;
  Guarded<int8_t> q;
  Guarded<float> f, act_scale;
  Guarded<int32_t> slot_sum;

  Staged(const LinearKernels& kernels, const Matrix& x, const Weight& w, int64_t stride, Act mode,
         int64_t row_blocks, int64_t slots_per_panel)
      : act(mode),
        m(x.n),
        blocks(row_blocks),
        panel(slots_per_panel),
        slots(act == Act::kA16 ? 2 * m : m),
        act_groups(act == Act::kA8G ? ceil_div(x.k, kActGroupColumns) : 1),
        segments(segments_of(w, blocks, act)),
        q(act == Act::kNone ? 0 : round_up(slots, panel > 0 ? panel : 1) * blocks * 4),
        f(act == Act::kNone ? m * blocks * 4 : 0),
        act_scale(m * act_groups),
        slot_sum(slots * static_cast<int64_t>(segments.size())) {
    const StageArgs args{x.data(),
                         x.dtype,
                         m,
                         x.k,
                         x.ld,
                         stride,
                         act,
                         blocks,
                         segments.data(),
                         static_cast<int64_t>(segments.size()),
                         act_groups,
                         panel,
                         q.data(),
                         f.data(),
                         act_scale.data(),
                         slot_sum.data()};
    const int64_t middle = m / 2;
    kernels.stage(args, middle, m);
    kernels.stage(args, 0, middle);
  }

  bool intact() const {
    return q.intact() && f.intact() && act_scale.intact() && slot_sum.intact();
  }

  int8_t at(int64_t slot, int64_t b, int64_t p) const {
    if (panel == 0) return q.data()[(slot * blocks + b) * 4 + p];
    return q.data()[((slot / panel * blocks + b) * panel + slot % panel) * 4 + p];
  }
};

Matrix activations(Random& random, DType dtype, int64_t m, int64_t k) {
  Matrix x(dtype, m, k, random.below(3));
  for (int64_t t = 0; t < m; ++t)
    for (int64_t c = 0; c < k; ++c) x.set(t, c, random.below(9) == 0 ? 0.0f : random.normal());
  return x;
}

int64_t packed_bytes(const LinearKernels& kernels, const Weight& w) {
  return round_up(w.n, kernels.tile_rows) * round_up(ceil_div(w.k, 4), kernels.tile_blocks) / 8 * 5;
}

// Packed where an allocation begins, then moved to an odd address, as a slice of a file may have.
Guarded<uint8_t> pack(const LinearKernels& kernels, const Weight& w) {
  Guarded<uint8_t> packed(packed_bytes(kernels, w)), moved(packed_bytes(kernels, w), 1);
  const int64_t tiles = ceil_div(w.n, kernels.tile_rows), middle = tiles / 2;
  kernels.pack(w.idx.data(), w.sign.data(), w.n, w.k, packed.data(), middle, tiles);
  kernels.pack(w.idx.data(), w.sign.data(), w.n, w.k, packed.data(), 0, middle);
  expect(packed.intact(), "guards of packed");
  std::memcpy(moved.data(), packed.data(), packed.size());
  return moved;
}

struct Call {
  DType y_dtype = DType::kFloat32;
  const Matrix* bias = nullptr;
  bool dot = false;
};

// y (m, ldy) with ldy = n + 5, as the op computes it from tables or by the dot kernel.
Guarded<char> linear(const LinearKernels& kernels, const Weight& w, const Staged& x,
                     const Call& call) {
  const int64_t ldy = w.n + 5, tiles = ceil_div(w.n, kernels.tile_rows), middle = tiles / 2;
  const bool lossless = x.act == Act::kNone;
  const int64_t bytes = x.blocks * (lossless ? kernels.table_bytes_f32 : kernels.table_bytes);
  std::vector<uint8_t> tables(static_cast<size_t>(call.dot ? 0 : x.slots * bytes));
  for (int64_t s = 0; s < x.slots && !call.dot; ++s) {
    if (lossless) {
      kernels.tables_f32(x.f.data() + s * x.blocks * 4, x.blocks, tables.data() + s * bytes);
    } else {
      kernels.tables(x.q.data() + s * x.blocks * 4, x.blocks, tables.data() + s * bytes);
    }
  }
  const Guarded<uint8_t> packed = pack(kernels, w);
  Guarded<char> y(x.m * ldy * bytes_of(call.y_dtype), 4);
  const LinearArgs args{packed.data(),
                        w.scale.data(),
                        w.n,
                        w.rows,
                        x.blocks,
                        x.segments.data(),
                        static_cast<int64_t>(x.segments.size()),
                        x.act,
                        x.m,
                        x.q.data(),
                        tables.data(),
                        x.act_scale.data(),
                        x.act_groups,
                        x.slot_sum.data(),
                        call.bias != nullptr ? call.bias->data() : nullptr,
                        call.bias != nullptr ? call.bias->dtype : DType::kFloat32,
                        y.data(),
                        call.y_dtype,
                        ldy};
  const auto kernel = lossless ? kernels.lookup_f32 : call.dot ? kernels.dot : kernels.lookup;
  kernel(args, middle, tiles);
  kernel(args, 0, middle);
  expect(y.intact() && packed.intact(), "guards of y");
  for (int64_t t = 0; t < x.m; ++t)
    for (int64_t i = w.n * bytes_of(call.y_dtype); i < ldy * bytes_of(call.y_dtype); ++i)
      expect(y[t * ldy * bytes_of(call.y_dtype) + i] == static_cast<char>(0xA5),
             "gap between rows of y");
  return y;
}

// The definition: exact integers per segment, one fused multiply-add each, bias, one cast.
void expect_definition(const Guarded<char>& y, const Weight& w, const Staged& x, const Call& call,
                       const std::string& what) {
  for (int64_t t = 0; t < x.m; ++t)
    for (int64_t r = 0; r < w.n; ++r) {
      float acc = 0.0f;
      for (const Segment& s : x.segments) {
        int64_t sum = 0;
        for (int64_t b = s.begin; b < s.end; ++b)
          for (int64_t p = 0; p < 4; ++p) {
            const int64_t q = x.act == Act::kA16 ? 256 * x.at(2 * t, b, p) + x.at(2 * t + 1, b, p)
                                                 : x.at(t, b, p);
            sum += w.value(r, b, p) * q;
          }
        const float scale = x.act_scale.data()[t * x.act_groups + s.act_group] *
                            w.scale[static_cast<size_t>(s.weight_group * w.rows + r)];
        acc = std::fma(static_cast<float>(sum), scale, acc);
      }
      if (call.bias != nullptr) acc += call.bias->at(0, r);
      std::vector<char> rounded(4);
      put(rounded.data(), call.y_dtype, 0, acc);
      const char* got = y.data() + (t * (w.n + 5) + r) * bytes_of(call.y_dtype);
      expect(same_values(got, rounded.data(), call.y_dtype, 1), what);
    }
}

// |error| <= (K/4 + 4) * 2^-24 * scale * sum |x|, and equal to the scalar kernel.
void expect_lossless(const Guarded<char>& y, const Weight& w, const Staged& x,
                     const std::string& what) {
  for (int64_t t = 0; t < x.m; ++t)
    for (int64_t r = 0; r < w.n; ++r) {
      double sum = 0, bound = 0;
      for (const Segment& s : x.segments)
        for (int64_t b = s.begin; b < s.end; ++b)
          for (int64_t p = 0; p < 4; ++p) {
            const double scale = w.scale[static_cast<size_t>(s.weight_group * w.rows + r)];
            const double v = x.f.data()[(t * x.blocks + b) * 4 + p] * scale;
            sum += w.value(r, b, p) * v;
            bound += std::fabs(v);
          }
      bound *= static_cast<double>(w.k / 4 + 4) * 0x1p-24;
      expect(std::fabs(get(y.data(), DType::kFloat32, t * (w.n + 5) + r) - sum) <= bound, what);
    }
}

const Register round_trip("pack and unpack are inverse", [] {
  Random random(21);
  for (const Level& level : levels())
    for (const int64_t n : {1, 7, 31, 32, 33, 63, 64, 65, 100, 129})
      for (const int64_t k : {1, 4, 5, 31, 32, 33, 63, 64, 65, 127, 257, 576}) {
        const Weight w(random, n, k, k);
        const Guarded<uint8_t> packed = pack(*level.linear, w);
        Guarded<uint8_t> idx(static_cast<int64_t>(w.idx.size()), 1),
            sign(static_cast<int64_t>(w.sign.size()), 1);
        const int64_t tiles = ceil_div(n, level.linear->tile_rows), middle = tiles / 2;
        level.linear->unpack(packed.data(), n, k, idx.data(), sign.data(), middle, tiles);
        level.linear->unpack(packed.data(), n, k, idx.data(), sign.data(), 0, middle);
        const std::string what = describe(level, DType::kFloat32, {n, k});
        expect(std::memcmp(idx.data(), w.idx.data(), w.idx.size()) == 0, "idx: " + what);
        expect(std::memcmp(sign.data(), w.sign.data(), w.sign.size()) == 0, "sign: " + what);
        expect(packed.intact() && idx.intact() && sign.intact(), "guards: " + what);
      }
});

const Register staging("staging equals the scalar kernel in every layout of activations", [] {
  Random random(22);
  for (const Level& level : levels())
    for (const Act act : kActs)
      for (const DType dtype : dtypes())
        for (const int64_t stride : {1, 16})
          for (const int64_t k : {1, 3, 64, 66, 127, 192, 256, 257, 576, 640}) {
            if (stride == 16 && k % 64 != 0) continue;
            const int64_t m = 1 + random.below(5);
            Matrix x = activations(random, dtype, m, k);
            if (m > 2) {
              for (int64_t c = 0; c < k; ++c) x.set(1, c, 0.0f);
              x.set(2, k / 2, random.below(2) ? NAN : INFINITY);
            }
            const Weight w(random, 1, k, k >= 256 && k % 64 == 0 ? 64 : k);
            const int64_t blocks = round_up(ceil_div(k, 4), 16);
            const Staged expected(kLinearScalar, x, w, stride, act, blocks, 0);
            for (const int64_t panel : {int64_t{0}, level.linear->panel}) {
              const Staged got(*level.linear, x, w, stride, act, blocks,
                               act == Act::kNone ? 0 : panel);
              const std::string what =
                  describe(level, dtype, {static_cast<int64_t>(act), stride, k, m, panel});
              expect(got.intact(), "guards: " + what);
              if (act == Act::kNone) {
                expect(
                    same_values(got.f.data(), expected.f.data(), DType::kFloat32, m * blocks * 4),
                    "f: " + what);
                continue;
              }
              expect(same_values(got.act_scale.data(), expected.act_scale.data(), DType::kFloat32,
                                 m * got.act_groups),
                     "scale: " + what);
              expect(got.slot_sum == expected.slot_sum, "slot sums: " + what);
              for (int64_t s = 0; s < got.slots; ++s)
                for (int64_t b = 0; b < blocks; ++b)
                  for (int64_t p = 0; p < 4; ++p)
                    expect(got.at(s, b, p) == expected.at(s, b, p), "q: " + what);
            }
          }
});

struct Shape {
  int64_t n, k, group, stride;
};

std::vector<Shape> shapes() {
  return {{1, 1, 1, 1},       {3, 5, 5, 1},      {32, 64, 64, 1},   {33, 65, 65, 1},
          {31, 127, 127, 1},  {64, 256, 256, 1}, {65, 257, 257, 1}, {7, 576, 576, 1},
          {70, 576, 128, 1},  {40, 1003, 32, 1}, {40, 640, 64, 16}, {9, 640, 640, 16},
          {129, 300, 300, 1}, {34, 2112, 256, 1}};
}

const Register linear_definition(
    "linear equals its definition for every mode, kernel and dtype", [] {
      Random random(23);
      for (const Level& level : levels())
        for (const Shape& shape : shapes())
          for (const Act act : kActs)
            for (const int64_t m : {1, 2, 3, 5, 9, 13, 26}) {
              const LinearKernels& kernels = *level.linear;
              const DType dtype = random.pick(dtypes());
              const Matrix x = activations(random, dtype, m, shape.k);
              const Weight w(random, shape.n, shape.k, shape.group);
              const Matrix bias = activations(random, random.pick(dtypes()), 1, shape.n);
              const int64_t blocks = round_up(ceil_div(shape.k, 4), kernels.tile_blocks);
              const std::string what = describe(
                  level, dtype, {shape.n, shape.k, shape.group, static_cast<int64_t>(act), m});
              Call call;
              if (act != Act::kNone) {
                call.y_dtype = random.pick(dtypes());
                if (random.below(2)) call.bias = &bias;
              }
              const Staged staged(kernels, x, w, shape.stride, act, blocks, 0);
              if (act == Act::kNone) {
                const Guarded<char> y = linear(kernels, w, staged, call);
                expect_lossless(y, w, staged, "lossless: " + what);
                const Staged scalar(kLinearScalar, x, w, shape.stride, act, plane_blocks(shape.k),
                                    0);
                const Guarded<char> expected = linear(kLinearScalar, w, scalar, call);
                for (int64_t i = 0; i < m; ++i)
                  expect(same_values(y.data() + 4 * i * (shape.n + 5),
                                     expected.data() + 4 * i * (shape.n + 5), DType::kFloat32,
                                     shape.n),
                         "lossless, scalar: " + what);
                continue;
              }
              if (staged.slots <= kernels.lookup_slots)
                expect_definition(linear(kernels, w, staged, call), w, staged, call,
                                  "lookup: " + what);
              if (kernels.dot != nullptr) {
                call.dot = true;
                const Staged panels(kernels, x, w, shape.stride, act, blocks, kernels.panel);
                expect_definition(linear(kernels, w, panels, call), w, panels, call,
                                  "dot: " + what);
              }
            }
    });

// Every partial sum at its bound: all activations at the largest code, all weights of one sign.
const Register widths("sums of the largest magnitude do not overflow", [] {
  Random random(24);
  for (const Level& level : levels())
    for (const int64_t k : {256, 4096, 8640})
      for (const Act act : {Act::kA8, Act::kA8G, Act::kA16})
        for (const int code : {0, 16, 12, 3, 19, -1}) {
          const LinearKernels& kernels = *level.linear;
          Weight w(random, 40, k, k);
          for (int64_t r = 0; r < w.n; ++r)
            for (int64_t b = 0; b < k / 4; ++b)
              w.set_code(r, b, code < 0 ? (b % 2 ? 0 : 16) : code);
          Matrix x(DType::kFloat32, 2, k);
          for (int64_t c = 0; c < k; ++c) {
            x.set(0, c, 1.0f);
            // Codes whose low limb is -128: the largest entry of a table. The 1 sets the scale.
            x.set(1, c,
                  act == Act::kA16 && c > 0 ? 32384.0f / 32639.0f
                  : code == 3 && c % 4 > 1  ? -1.0f
                                            : 1.0f);
          }
          const int64_t blocks = round_up(k / 4, kernels.tile_blocks);
          const Staged staged(kernels, x, w, 1, act, blocks, 0);
          const std::string what =
              describe(level, DType::kFloat32, {k, static_cast<int64_t>(act), code});
          Call call;
          if (staged.slots <= kernels.lookup_slots)
            expect_definition(linear(kernels, w, staged, call), w, staged, call, "lookup: " + what);
          if (kernels.dot != nullptr) {
            call.dot = true;
            const Staged panels(kernels, x, w, 1, act, blocks, kernels.panel);
            expect_definition(linear(kernels, w, panels, call), w, panels, call, "dot: " + what);
          }
        }
});

const Register special_values("NaN and Inf reach only the outputs of their token", [] {
  Random random(25);
  for (const Level& level : levels())
    for (const Act act : kActs) {
      const LinearKernels& kernels = *level.linear;
      const int64_t n = 35, k = 520, m = 3;
      const Weight w(random, n, k, k);
      Matrix x = activations(random, DType::kFloat32, m, k);
      for (int64_t c = 0; c < 4; ++c)
        x.set(1, 400 + c, c % 2 ? INFINITY : NAN);  // no weight misses all four
      Call call;
      call.dot = act != Act::kNone && 2 * m > kernels.lookup_slots;
      const int64_t blocks = round_up(k / 4, kernels.tile_blocks);
      const Staged staged(kernels, x, w, 1, act, blocks, call.dot ? kernels.panel : 0);
      const Guarded<char> y = linear(kernels, w, staged, call);
      for (int64_t t = 0; t < m; ++t)
        for (int64_t r = 0; r < n; ++r)
          expect(std::isfinite(get(y.data(), DType::kFloat32, t * (n + 5) + r)) == (t != 1),
                 describe(level, DType::kFloat32, {static_cast<int64_t>(act), t, r}));
    }
});

}  // namespace
}  // namespace alignops::test
