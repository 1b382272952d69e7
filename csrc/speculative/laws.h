// Distributions of rows, over the kernel table: reading a row lazily, cutting it to top-k, top-p
// and min-p, drawing from it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "common/parallel.h"
#include "speculative/kernels.h"

namespace alignops::speculative {

// Why a row of the batch emits nothing.
enum class RowError : uint8_t {
  kNone = 0,
  kBadValue = 1,    // NaN, +inf, or a probability outside [0, 1]
  kImpossible = 2,  // no id is possible
  kBadId = 3,       // a draft is no id of the vocabulary, or a tree is none
  kBadArgument = 4  // temperature, top_k, top_p, min_p, state or statistics out of range
};

// temperature 0 stands for greedy decoding.
struct Warp {
  float temperature = 1.0f;
  int64_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;

  bool valid() const;
  bool filters(int64_t size) const;
};

// A row of logits or probabilities in memory.
struct Source {
  const void* data;
  DType dtype;
  bool probabilities;
  int64_t size;
};

// What one draft step keeps of its law, so that `verify` need not read the row again while drafts
// are accepted. All zero: nothing is known.
struct LawStats {
  int64_t top;       // N
  int64_t total;     // A
  int64_t mantissa;  // M of the draft
  int64_t exponent;  // n of the draft
  int64_t cut_key;
  int64_t cut_id;
};

inline constexpr int64_t kLawStats = sizeof(LawStats) / sizeof(int64_t);

// The law of one row at a time, and scratch memory of a few words per tile of the longest row.
class RowLaw {
 public:
  RowLaw(const Kernels& kernels, const ParallelFor& parallel, int64_t longest);

  // The largest value only: what greedy decoding needs.
  RowError read_largest(const Source& source);
  // A bound of p(id) from the largest logit, for rows of logits that are not cut: 0 if and only if
  // p(id) is. There is no law then.
  RowError read_bound(const Source& source, const Warp& warp, int64_t id, double& most);
  // The law softmax(logits / temperature) cut to top-k, then top-p, then min-p; temperature > 0.
  RowError read(const Source& source, const Warp& warp);
  // The law as `stats` of an earlier `read` of this row describe it.
  RowError restore(const Source& source, const Warp& warp, const LawStats& stats);

  // After any of `read_largest` and `read`.
  int64_t argmax() const { return argmax_; }

  // After `read` or `restore`.
  const Law& law() const { return law_; }
  LawStats stats_of(int64_t id) const;
  float p(int64_t id) const;
  float largest_p();
  double entropy();
  // Ids that come before `id` in the order of falling probability; p(id) > 0.
  int64_t rank(int64_t id);
  // The first ids in this order, at most `count` and no impossible ones; returns how many.
  int64_t best(int64_t count, int64_t* ids);

  // The total of R of the density, ids `without` left out; without.size() <= kMaxWithout, no id
  // twice. `d.p` is this law, or one that has replaced it.
  uint64_t total(const Density& d, std::span<const int64_t> without = {});
  // The id of the density that `word` draws, after `total`, which was not 0.
  int64_t draw(const Density& d, uint32_t word, std::span<const int64_t> without = {});
  // The id that `word` draws from the law.
  int64_t sample(uint32_t word);

  // out[v] = R(v) / total for all ids; `out` may be what a law of the density reads.
  void normalize(const Density& d, uint64_t total, float* out);

  static constexpr int64_t kMaxWithout = 64;

  // The winner of the race with the noise of (seed, position); reads the row.
  RowError race(const Source& source, const Warp& warp, uint64_t seed, int64_t position,
                int64_t& winner);

 private:
  void for_tiles(const std::function<void(int64_t begin, int64_t end)>& body);
  void open(const Source& source, const Warp& warp);
  RowError scan();
  void sum_up();
  bool reaches(bool by_count, uint64_t low, uint64_t high, int32_t shift, uint64_t target,
               uint64_t& reached, uint64_t& bucket);
  Cut select(bool by_count, uint64_t target);
  Cut tie(uint64_t key, uint64_t number);
  void filter(const Warp& warp);
  void cut_min_p(float min_p);
  bool visible(int64_t tile) const;

  const Kernels& kernels_;
  const ParallelFor& parallel_;
  Law law_{};
  uint64_t total_ = 0;  // A
  int64_t tiles_ = 0;
  int64_t argmax_ = -1;
  bool restored_ = false;
  std::unique_ptr<TileStats[]> stats_;
  std::unique_ptr<TileRace[]> races_;
  std::unique_ptr<uint64_t[]> words_;  // per tile
  std::unique_ptr<uint32_t[]> numbers_, others_;
  std::unique_ptr<double[]> reals_;
  std::unique_ptr<uint32_t[]> counts_;  // per bucket
  std::unique_ptr<uint64_t[]> sums_;
  std::unique_ptr<Entry[]> entries_;
};

}  // namespace alignops::speculative
