// Random plans and all that a call of the attention operator needs, allocated to the exact size.
#pragma once

#include <cstring>
#include <vector>

#include "attention/call.h"
#include "common/element.h"
#include "harness.h"

namespace alignops::attention {

struct PlanSample {
  std::vector<int64_t> words;
  int64_t pool_pages, blocks, rows;
};

// A plan that is valid, though no workspace would make it: states, limits and distances are random.
inline PlanSample random_plan(test::Random& random, int64_t page_size, int64_t pairs) {
  const int64_t workers = 1 + random.below(4), segments = random.below(6), blocks = 1 + segments;
  std::vector<int64_t> row_ptr{0}, segment, pair, weight, page, row;
  int64_t token = 0, longest = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t n = 1 + random.below(s == 0 ? 700 : 40), first = random.below(page_size);
    for (const int64_t v : {random.below(blocks), n, static_cast<int64_t>(page.size()), first,
                            int64_t{0}, int64_t{0}, token, int64_t{0}})
      segment.push_back(v);
    for (int64_t i = 0; i < (first + n + page_size - 1) / page_size; ++i)
      page.push_back(static_cast<int64_t>(page.size()));
    token += n;
    for (int64_t w = 0; w < workers; ++w) {
      for (const int64_t v :
           {random.below(3), random.below(n + 3) - 1, random.below(n + 9), int64_t{0}})
        pair.push_back(v);
      const float knobs[2] = {random.normal(), 1.0f};
      int64_t both = 0;
      std::memcpy(&both, knobs, sizeof both);
      weight.push_back(both);
    }
  }
  const auto pool_pages = static_cast<int64_t>(page.size()) + 1;
  for (int64_t i = static_cast<int64_t>(page.size()) - 1; i > 0; --i)
    std::swap(page[static_cast<size_t>(i)], page[static_cast<size_t>(random.below(i + 1))]);
  for (int64_t w = 0; w < workers; ++w) {
    const int64_t rows = random.below(4);
    longest = std::max(longest, rows);
    for (int64_t t = 0; t < rows; ++t)
      for (const int64_t v : {w, t, random.below(pool_pages * page_size), t}) row.push_back(v);
    row_ptr.push_back(row_ptr.back() + rows);
  }
  const int64_t rows = row_ptr.back(), turns = segments * workers + longest + rows;
  std::vector<int64_t> table;
  for (int64_t i = 0; i < turns * pairs; ++i) {
    const float t = random.normal(), turn[2] = {(1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)};
    table.push_back(0);
    std::memcpy(&table.back(), turn, sizeof turn);
  }
  Header h{kPlanMagic, 0,      workers,   rows,
           segments,   blocks, page_size, static_cast<int64_t>(page.size()),
           longest,    token,  1,         1,
           0,          0,      0,         0,
           0,          0,      0,         {}};
  std::vector<int64_t> body, rope{pairs, 0};
  const auto put = [&](const std::vector<int64_t>& part) {
    const auto at = static_cast<int64_t>(sizeof h / 8 + body.size());
    body.insert(body.end(), part.begin(), part.end());
    return at;
  };
  const int64_t turned = put(table);
  rope[1] = turned;
  h.row_ptr = put(row_ptr);
  h.segment = put(segment);
  h.pair = put(pair);
  h.weight = put(weight);
  h.page = put(page);
  h.row = put(row);
  h.rope = put(rope);
  h.words = static_cast<int64_t>(sizeof h / 8 + body.size());
  std::vector<int64_t> words(sizeof h / 8);
  std::memcpy(words.data(), &h, sizeof h);
  words.insert(words.end(), body.begin(), body.end());
  return {words, pool_pages, blocks, rows};
}

// A call on random numbers. `run` computes it anew.
class CallSample {
 public:
  static constexpr int64_t kKvHeads = 2, kGroup = 3, kKeys = 24, kValues = 20, kPairs = 5;

  CallSample(test::Random& random, int64_t pool_pages, int64_t page_size, int64_t rows,
             int64_t blocks, DType dtype)
      : dtype_(dtype),
        page_size_(page_size),
        rows_(rows),
        blocks_(blocks),
        q_(numbers(random, rows * kKvHeads * kGroup * kKeys)),
        k_(numbers(random, pool_pages * kKvHeads * page_size * kKeys)),
        v_(numbers(random, pool_pages * kKvHeads * page_size * kValues)) {}

  struct Result {
    test::Guarded<char> out;
    test::Guarded<float> lse, mass;
    bool intact = false;

    bool operator==(const Result& other) const {
      return out == other.out && lse == other.lse && mass == other.mass;
    }
  };

  Result run(const Kernels& table, const PlanView& plan, int64_t lanes,
             const ParallelFor& parallel) {
    constexpr int64_t kHeads = kKvHeads * kGroup;
    const int64_t size = dtype_ == DType::kFloat32 ? 4 : 2;
    Result result{test::Guarded<char>(rows_ * kHeads * kValues * size),
                  test::Guarded<float>(rows_ * kHeads),
                  test::Guarded<float>(rows_ * kHeads * blocks_)};
    Attend a{};
    a.plan = plan;
    a.rotary = {plan.header.types > 0 ? plan.ropes[0].pairs : 0, 1, false};
    a.q = {q_.data(), dtype_, kHeads * kKeys, kKeys};
    a.k = cache(k_, kKeys);
    a.v = cache(v_, kValues);
    a.kv_heads = kKvHeads;
    a.group = kGroup;
    a.scale = 0.3f;
    a.out = {result.out.data(), dtype_, kHeads * kValues, kValues};
    a.lse = result.lse.data();
    a.mass = result.mass.data();
    const Partition part(plan.header, kKvHeads, kGroup);
    const ScratchLayout layout(plan.header, part, kKvHeads, kGroup, kKeys, kValues, a.rotary.pairs,
                               true);
    test::Guarded<char> scratch(layout.bytes(lanes), 3);
    expect_lanes(layout, lanes);
    Call(table, a, part, layout, scratch.data(), lanes).run(parallel);
    result.intact =
        scratch.intact() && result.out.intact() && result.lse.intact() && result.mass.intact();
    return result;
  }

  std::vector<char>& keys() { return k_; }
  std::vector<char>& values() { return v_; }

 private:
  static void expect_lanes(const ScratchLayout& layout, int64_t lanes) {
    test::expect(layout.lanes_in(layout.bytes(lanes)) == lanes, "bytes and lanes agree");
  }

  std::vector<char> numbers(test::Random& random, int64_t count) const {
    std::vector<char> out(static_cast<size_t>(count * (dtype_ == DType::kFloat32 ? 4 : 2)));
    for (int64_t i = 0; i < count; ++i) store(out.data(), dtype_, i, random.normal());
    return out;
  }

  Cache cache(std::vector<char>& data, int64_t columns) const {
    const int64_t head = page_size_ * columns;
    return {data.data(), dtype_, columns, kKvHeads * head, head};
  }

  DType dtype_;
  int64_t page_size_, rows_, blocks_;
  std::vector<char> q_, k_, v_;
};

}  // namespace alignops::attention
