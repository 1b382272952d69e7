#include "ternary/self_test.h"

#include <cstdint>
#include <cstring>
#include <vector>

namespace alignops::ternary {
namespace {

constexpr int64_t kRows = 64, kColumns = 256, kGroup = 128;
constexpr int64_t kBlocks = kColumns / 4, kGroups = kColumns / kGroup;
// Two weight groups under one activation scale.
constexpr Segment kSegments[] = {{0, kBlocks / 2, 0, 0}, {kBlocks / 2, kBlocks, 0, 1}};
constexpr Segment kWholeRow[] = {{0, kBlocks, 0, 0}};
constexpr int64_t kTokens[] = {1, 2, 40};
constexpr Act kActs[] = {Act::kNone, Act::kA8, Act::kA16};

// Numbers in [-1, 1) from a linear congruential generator; every 17th is zero, so that ties occur.
std::vector<float> numbers(int64_t count, uint32_t seed) {
  std::vector<float> out;
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    out.push_back(i % 17 == 5 ? 0.0f : static_cast<float>(seed >> 8) * 0x1p-23f - 1.0f);
  }
  return out;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct Weight {
  std::vector<uint8_t> idx, sign;
  std::vector<float> scale;
};

QuantizeArgs quantize_args(const std::vector<float>& w) {
  return {w.data(), DType::kFloat32, kRows, kColumns, kColumns, kGroup, 1};
}

Weight quantize(const QuantizeKernels& kernels, const std::vector<float>& w) {
  Weight out{std::vector<uint8_t>(kRows * kBlocks / 2), std::vector<uint8_t>(kRows * kBlocks / 8),
             std::vector<float>(kRows * kGroups)};
  QuantizeOut planes{out.idx.data(), out.sign.data(), out.scale.data(), 0, INT64_MAX};
  kernels.quantize(quantize_args(w), planes, 0, kRows);
  return out;
}

std::vector<float> fake_quant(const QuantizeKernels& kernels, const std::vector<float>& w) {
  std::vector<float> out(w.size());
  kernels.fake_quant({quantize_args(w), 0.25f, out.data(), DType::kFloat32}, 0, kRows);
  return out;
}

std::vector<float> dequantize(const QuantizeKernels& kernels, const Weight& w) {
  std::vector<float> out(kRows * kColumns);
  kernels.dequantize({w.idx.data(), w.sign.data(), w.scale.data(), kRows, kColumns, kGroup, 1,
                      out.data(), DType::kFloat32},
                     0, kRows);
  return out;
}

// Activations staged by `kernels`, with room for whole panels.
struct Staged {
  std::vector<int8_t> q;
  std::vector<float> f, act_scale;
  std::vector<int32_t> slot_sum;
};

int64_t slots_of(Act act, int64_t m) { return act == Act::kA16 ? 2 * m : m; }

template <int64_t kCount>
Staged stage(const LinearKernels& kernels, const std::vector<float>& x, int64_t m, Act act,
             int64_t panel, const Segment (&segments)[kCount]) {
  const int64_t slots = slots_of(act, m);
  Staged out{std::vector<int8_t>(round_up(slots, panel > 0 ? panel : 1) * kColumns),
             std::vector<float>(m * kColumns), std::vector<float>(m),
             std::vector<int32_t>(slots * kCount)};
  kernels.stage(
      {x.data(), DType::kFloat32, m, kColumns, kColumns, 1, act, kBlocks, segments, kCount, 1,
       panel, out.q.data(), out.f.data(), out.act_scale.data(), out.slot_sum.data()},
      0, m);
  return out;
}

std::vector<uint8_t> pack(const LinearKernels& kernels, const Weight& w) {
  std::vector<uint8_t> packed(kRows * (kBlocks / 2 + kBlocks / 8));
  kernels.pack(w.idx.data(), w.sign.data(), kRows, kColumns, packed.data(), 0,
               kRows / kernels.tile_rows);
  return packed;
}

Weight unpack(const LinearKernels& kernels, const std::vector<uint8_t>& packed) {
  Weight out{
      std::vector<uint8_t>(kRows * kBlocks / 2), std::vector<uint8_t>(kRows * kBlocks / 8), {}};
  kernels.unpack(packed.data(), kRows, kColumns, out.idx.data(), out.sign.data(), 0,
                 kRows / kernels.tile_rows);
  return out;
}

std::vector<float> linear(const LinearKernels& kernels, const Weight& w,
                          const std::vector<float>& x, int64_t m, Act act) {
  const int64_t slots = slots_of(act, m), tiles = kRows / kernels.tile_rows;
  const bool lossless = act == Act::kNone, dot = !lossless && slots > kernels.lookup_slots;
  const Staged in = stage(kernels, x, m, act, dot ? kernels.panel : 0, kSegments);
  const int64_t table_bytes = kBlocks * (lossless ? kernels.table_bytes_f32 : kernels.table_bytes);
  std::vector<uint8_t> tables(dot ? 0 : slots * table_bytes);
  for (int64_t s = 0; s < slots && !dot; ++s) {
    if (lossless) {
      kernels.tables_f32(in.f.data() + s * kColumns, kBlocks, tables.data() + s * table_bytes);
    } else {
      kernels.tables(in.q.data() + s * kColumns, kBlocks, tables.data() + s * table_bytes);
    }
  }
  const std::vector<uint8_t> packed = pack(kernels, w);
  std::vector<float> scale(kGroups * kRows), y(m * kRows);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t g = 0; g < kGroups; ++g) scale[g * kRows + r] = w.scale[r * kGroups + g];
  const LinearArgs args{packed.data(),
                        scale.data(),
                        kRows,
                        kRows,
                        kBlocks,
                        kSegments,
                        kGroups,
                        act,
                        m,
                        in.q.data(),
                        tables.data(),
                        in.act_scale.data(),
                        1,
                        in.slot_sum.data(),
                        nullptr,
                        DType::kFloat32,
                        y.data(),
                        DType::kFloat32,
                        kRows};
  (lossless ? kernels.lookup_f32 : dot ? kernels.dot : kernels.lookup)(args, 0, tiles);
  return y;
}

struct Int8Weight {
  std::vector<int8_t> q;
  std::vector<float> scale;
};

Int8Weight quantize(const Int8Kernels& kernels, const std::vector<float>& w) {
  Int8Weight out{std::vector<int8_t>(w.size()), std::vector<float>(kRows)};
  Int8QuantizeArgs args{w.data(),     DType::kFloat32,  kRows, kColumns, kColumns,
                        out.q.data(), out.scale.data(), 0,     INT64_MAX};
  kernels.quantize(args, 0, kRows);
  return out;
}

std::vector<float> linear(const Int8Kernels& kernels, const Int8Weight& w,
                          const std::vector<float>& x, int64_t m, Act act) {
  const Staged in = stage(kLinearScalar, x, m, act, 0, kWholeRow);
  std::vector<float> y(m * kRows);
  kernels.linear({w.q.data(), w.scale.data(), kRows, kColumns, m, act, in.q.data(), in.f.data(),
                  kColumns, kWholeRow, 1, in.slot_sum.data(), in.act_scale.data(), 1, nullptr,
                  DType::kFloat32, y.data(), DType::kFloat32, kRows},
                 0, kRows);
  return y;
}

}  // namespace

bool agrees_with_scalar(const QuantizeKernels& kernels) {
  const std::vector<float> w = numbers(kRows * kColumns, 1);
  const Weight ours = quantize(kernels, w), scalar = quantize(kQuantizeScalar, w);
  return same(ours.idx, scalar.idx) && same(ours.sign, scalar.sign) &&
         same(ours.scale, scalar.scale) &&
         same(dequantize(kernels, scalar), dequantize(kQuantizeScalar, scalar)) &&
         same(fake_quant(kernels, w), fake_quant(kQuantizeScalar, w));
}

bool agrees_with_scalar(const LinearKernels& kernels) {
  const Weight w = quantize(kQuantizeScalar, numbers(kRows * kColumns, 1));
  const Weight back = unpack(kernels, pack(kernels, w));
  if (!same(back.idx, w.idx) || !same(back.sign, w.sign)) return false;
  for (const int64_t m : kTokens) {
    const std::vector<float> x = numbers(m * kColumns, 2);
    for (const Act act : kActs)
      if (!same(linear(kernels, w, x, m, act), linear(kLinearScalar, w, x, m, act))) return false;
  }
  return true;
}

bool agrees_with_scalar(const Int8Kernels& kernels) {
  const std::vector<float> w = numbers(kRows * kColumns, 1);
  const Int8Weight ours = quantize(kernels, w), scalar = quantize(kInt8Scalar, w);
  if (!same(ours.q, scalar.q) || !same(ours.scale, scalar.scale)) return false;
  for (const int64_t m : kTokens) {
    const std::vector<float> x = numbers(m * kColumns, 2);
    for (const Act act : kActs)
      if (!same(linear(kernels, scalar, x, m, act), linear(kInt8Scalar, scalar, x, m, act)))
        return false;
  }
  return true;
}

}  // namespace alignops::ternary
