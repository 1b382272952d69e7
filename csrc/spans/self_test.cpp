#include "spans/self_test.h"

#include <cstdint>
#include <vector>

#include "spans/small_shard.h"

namespace alignops::spans {
namespace {

constexpr uint32_t kVocab = 5;

// Two documents of ids from a linear congruential generator. The second one repeats a run of 150
// tokens with one change, so that common prefixes fill several vectors of every width.
std::vector<uint32_t> text() {
  std::vector<uint32_t> out;
  uint32_t seed = 1;
  for (int i = 0; i < 300; ++i) {
    seed = seed * 1664525u + 1013904223u;
    out.push_back((seed >> 16) % kVocab);
  }
  out.push_back(SmallShard::kSep);
  for (size_t i = 0; i < 300; ++i) out.push_back(i == 150 ? (out[i] + 1) % kVocab : out[i]);
  out.push_back(SmallShard::kSep);
  return out;
}

bool failed(const Fault& fault) { return fault.status != Status::kOk; }

// Everything a table answers about a shard, one list of numbers.
std::vector<int64_t> answers(const Kernels& kernels, const SmallShard& small) {
  const Shard shard = small.view();
  std::vector<uint32_t> ids = text();
  std::erase(ids, SmallShard::kSep);
  const std::vector<uint8_t> tokens = small.tokens(ids);
  const auto count = static_cast<int64_t>(ids.size());
  std::vector<int64_t> begin, near, far, depth;
  for (int64_t i = 0; i < count; ++i) {
    begin.push_back(i);
    near.push_back(std::min(i + i % 9, count));
    far.push_back(std::min(i + 200, count));
    depth.push_back(i % 9);
  }
  const auto size = static_cast<size_t>(count);
  std::vector<int64_t> lo(size), hi(size), length(size), out;
  std::vector<uint32_t> next(size);
  const auto keep = [&](const auto& values) {
    out.insert(out.end(), values.begin(), values.end());
  };
  const Queries short_queries{tokens.data(), begin.data(), near.data()};
  const Queries long_queries{tokens.data(), begin.data(), far.data()};
  if (failed(kernels.match(shard, {long_queries, length.data(), lo.data(), hi.data()}, 0, count)))
    return {};
  keep(lo);
  keep(hi);
  keep(length);
  if (failed(kernels.find(shard, {short_queries, lo.data(), hi.data()}, 0, count))) return {};
  keep(lo);
  keep(hi);
  if (failed(kernels.narrow(
          shard, {tokens.data(), lo.data(), hi.data(), depth.data(), lo.data(), hi.data()}, 0,
          count)))
    return {};
  keep(lo);
  keep(hi);
  for (int64_t& rank : lo) rank = std::min(rank, static_cast<int64_t>(shard.suf_size) - 1);
  if (failed(kernels.tokens_at(shard, {lo.data(), depth.data(), next.data()}, 0, count))) return {};
  keep(next);
  if (failed(kernels.positions(shard, {lo.data(), hi.data()}, 0, count))) return {};
  keep(hi);
  return out;
}

}  // namespace

bool agrees_with_scalar(const Kernels& kernels) {
  for (const int32_t token_bytes : {1, 2, 4}) {
    for (const int32_t pointer_bytes : {4, 5}) {
      const SmallShard small(text(), {token_bytes, pointer_bytes, kVocab, false, true});
      const std::vector<int64_t> expected = answers(kSearchScalar, small);
      if (expected.empty() || answers(kernels, small) != expected) return false;
    }
  }
  return true;
}

}  // namespace alignops::spans
