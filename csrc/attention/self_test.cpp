#include "attention/self_test.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "attention/partition.h"
#include "common/element.h"

namespace alignops::attention {
namespace {

constexpr float kTolerance = 1e-4f;

constexpr int64_t kWorkers = 2, kSegments = 3, kRows = 5, kLongest = 3, kPageSize = 16, kPages = 7;
constexpr int64_t kKvHeads = 2, kGroup = 7, kColumns1 = 36, kColumns2 = 20, kPairs = 7;
constexpr int64_t kTurns = kSegments * kWorkers + kLongest + kRows;

// Numbers in [-1, 1) from a linear congruential generator.
std::vector<float> numbers(uint32_t seed, int64_t count) {
  std::vector<float> out;
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    out.push_back(static_cast<float>(seed >> 8) * 0x1p-23f - 1.0f);
  }
  return out;
}

// (cos, sin) pairs.
std::vector<float> turns(uint32_t seed, int64_t count) {
  std::vector<float> out;
  for (const float t : numbers(seed, count)) {
    out.push_back((1 - t * t) / (1 + t * t));
    out.push_back(2 * t / (1 + t * t));
  }
  return out;
}

std::vector<char> elements(const std::vector<float>& values, DType dtype) {
  std::vector<char> out(values.size() * 4);
  for (size_t i = 0; i < values.size(); ++i)
    store(out.data(), dtype, static_cast<int64_t>(i), values[i]);
  return out;
}

// A common segment that is longer than a tile, one that only the second worker sees, and the first
// worker's own.
struct Sample {
  Segment segments[kSegments] = {
      {0, 70, 0, 3, 0, 0, 0, 0}, {1, 6, 5, 9, 0, 0, 70, 0}, {2, 9, 6, 0, 0, 0, 76, 0}};
  Pair pairs[kSegments * kWorkers] = {{kVisible, 70, 80, 0}, {kVisible, 70, 76, 0},
                                      {kHidden, 0, 0, 0},    {kVisible, 6, 6, 0},
                                      {kRising, 7, 6, 0},    {kVisible, 9, 9, 0}};
  Weight weights[kSegments * kWorkers] = {{0, 1},        {0.5f, 1}, {0, 1},
                                          {-1.0f, 0.7f}, {0, 1},    {-__builtin_inff(), 1}};
  int64_t row_ptr[kWorkers + 1] = {0, 3, 5};
  int64_t pages[kPages] = {4, 1, 0, 2, 6, 3, 5};
  Row rows[kRows] = {{0, 0, 86, 6}, {0, 1, 87, 7}, {0, 2, 88, 8}, {1, 0, 33, 1}, {1, 1, 34, 2}};
  Rope rope{kPairs, 0};
  std::vector<float> table = turns(9, kTurns* kPairs);

  PlanView view(int64_t step) const {
    const Header header{kPlanMagic, 0,        kWorkers, kRows, kSegments, 3, kPageSize,
                        kPages,     kLongest, 85,       step,  1,         0, 0,
                        0,          0,        0,        0,     0,         {}};
    return {header, row_ptr, segments,
            pairs,  weights, pages,
            rows,   &rope,   reinterpret_cast<const int64_t*>(table.data())};
  }
};

struct Variant {
  DType q, kv;
  int64_t step, chunk;
  bool interleaved;
  float softcap;
  int64_t window;
};

Cache cache(std::vector<char>& data, DType dtype, int64_t columns) {
  const int64_t head = kPageSize * columns;
  return {data.data(), dtype, columns, kKvHeads * head, head};
}

bool close(const std::vector<float>& a, const std::vector<float>& b, float tolerance) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(a[i] == b[i] || std::fabs(a[i] - b[i]) <= tolerance)) return false;
  return true;
}

std::vector<float> floats(const std::vector<char>& data, DType dtype, int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) out[static_cast<size_t>(i)] = load(data.data(), dtype, i);
  return out;
}

// out, lse and mass.
std::vector<float> attend(const Kernels& kernels, const Variant& variant) {
  constexpr int64_t kHeads = kKvHeads * kGroup, kBlocks = 3, kQueries = kRows * kGroup;
  const Sample sample;
  auto q = elements(numbers(1, kRows * kHeads * kColumns1), variant.q);
  auto k = elements(numbers(2, kPages * kKvHeads * kPageSize * kColumns1), variant.kv);
  auto v = elements(numbers(3, kPages * kKvHeads * kPageSize * kColumns2), variant.kv);
  std::vector<char> out(static_cast<size_t>(kRows * kHeads * kColumns2 * 4));
  std::vector<float> lse(static_cast<size_t>(kRows * kHeads));
  std::vector<float> mass(lse.size() * kBlocks);
  const std::vector<float> sinks = numbers(4, kHeads);
  Attend a{};
  a.plan = sample.view(variant.step);
  a.rotary = {kPairs, 2, variant.interleaved};
  a.q = {q.data(), variant.q, kHeads * kColumns1, kColumns1};
  a.k = cache(k, variant.kv, kColumns1);
  a.v = cache(v, variant.kv, kColumns2);
  a.kv_heads = kKvHeads;
  a.group = kGroup;
  a.scale = 0.8f;
  a.softcap = variant.softcap;
  a.window = variant.window;
  a.sinks = variant.window > 0 ? sinks.data() : nullptr;
  a.out = {out.data(), variant.q, kHeads * kColumns2, kColumns2};
  a.lse = lse.data();
  a.mass = mass.data();
  const int64_t tokens = a.plan.header.tokens;
  const int64_t chunks = (tokens + variant.chunk - 1) / variant.chunk;
  const int64_t piece_row = kSegments + chunks;
  std::vector<Piece> pieces(static_cast<size_t>(kKvHeads * kQueries * piece_row));
  const Workspace places(kQueries, kRows, kColumns1, kColumns2, kPairs);
  std::vector<float> workspace(static_cast<size_t>(places.total));
  constexpr int64_t kState = 2 * padded(kQueries) + kQueries * padded(kColumns2);
  std::vector<float> states(static_cast<size_t>(chunks * kState));
  for (int64_t head = 0; head < kKvHeads; ++head) {
    const auto state = [&](int64_t chunk) {
      float* place = states.data() + chunk * kState;
      return State{place, place + padded(kQueries), place + 2 * padded(kQueries)};
    };
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t end = (c + 1) * variant.chunk;
      kernels.attend(a, {head, 0, kRows, c, c * variant.chunk, end < tokens ? end : tokens,
                         state(c), pieces.data(), piece_row, workspace.data()});
    }
    kernels.reduce(a,
                   {state(0), kState * 4, chunks, variant.chunk, head, 0, kRows, pieces.data(),
                    piece_row, workspace.data()},
                   0, kQueries);
  }
  std::vector<float> all = floats(out, variant.q, kRows * kHeads * kColumns2);
  all.insert(all.end(), lse.begin(), lse.end());
  all.insert(all.end(), mass.begin(), mass.end());
  return all;
}

// The caches after an append and a rewrite.
std::vector<float> write(const Kernels& kernels, const Variant& variant) {
  const Sample sample;
  constexpr int64_t kCount = kPages * kKvHeads * kPageSize;
  auto k_new = elements(numbers(5, kRows * kKvHeads * kColumns1), variant.q);
  auto v_new = elements(numbers(6, kRows * kKvHeads * kColumns2), variant.q);
  auto k = elements(numbers(2, kCount * kColumns1), variant.kv);
  auto v = elements(numbers(3, kCount * kColumns2), variant.kv);
  const Rotary rotary{kPairs, 3, variant.interleaved};
  const Cache keys = cache(k, variant.kv, kColumns1), values = cache(v, variant.kv, kColumns2);
  kernels.append({sample.view(variant.step),
                  0,
                  rotary,
                  kKvHeads,
                  {k_new.data(), variant.q, kKvHeads * kColumns1, kColumns1},
                  {v_new.data(), variant.q, kKvHeads * kColumns2, kColumns2},
                  keys,
                  values},
                 0, kRows);
  const Run runs[] = {{3, 50, 9, 2}, {20, 67, 3, -1}};
  kernels.rewrite({runs, sample.table.data(), rotary, kKvHeads, kPageSize, keys, values}, 0, 2);
  std::vector<float> all = floats(k, variant.kv, kCount * kColumns1);
  const std::vector<float> more = floats(v, variant.kv, kCount * kColumns2);
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

}  // namespace

bool agrees_with_scalar(const Kernels& kernels) {
  constexpr DType kFloat = DType::kFloat32, kBrain = DType::kBFloat16, kHalf = DType::kFloat16;
  for (const Variant& variant :
       {Variant{kFloat, kFloat, 1, 1000, false, 0, 0},
        Variant{kFloat, kFloat, 0, 37, true, 2.5f, 40}, Variant{kFloat, kBrain, 1, 37, true, 0, 40},
        Variant{kBrain, kBrain, 1, 50, false, 0.3f, 0},
        Variant{kHalf, kHalf, 0, 37, false, 0, 11}}) {
    // Rounding of outputs may go the other way.
    const float tolerance = variant.q == kFloat ? kTolerance : 0x1p-6f;
    if (!close(attend(kernels, variant), attend(kAttentionScalar, variant), tolerance))
      return false;
    if (!close(write(kernels, variant), write(kAttentionScalar, variant), 0)) return false;
  }
  return true;
}

}  // namespace alignops::attention
