// Contract of the speculative core: what a CPU kernel may know of one row of logits. No torch, no
// Python, no allocation, no exceptions.
//
// A row is a distribution over the ids 0..size-1. From a logit l and a temperature T every id gets
// a weight M * 2^n, exactly:
//   F = rint(clamp(l, -2047, 2047) * 2^20), S = F * factor           (int32, int64)
//   n = S >> (20 + shift), f = (S >> (shift - 3)) & 0x7fffff          (arithmetic shifts)
//   x = float(0x3f800000 | f) - 1, g = 2^x by Horner, each operation rounded by itself
//   M = (bits(min(g, 0x3fffffff)) & 0x7fffff) | 0x800000              (24 bits; -inf: M = 0)
// A tile is 4096 consecutive ids. Sums are integers, so every order of summation gives the same
// bits:
//   N_t = max n, A_t = sum (M << 16) >> min(N_t - n, 63)
//   N = max N_t, A = sum A_t >> min(N - N_t, 63)
// and the probability is p32 = float(double(M) * ldexp(1 / double(A), 16 + n - N)), 0 where
// N - n > 96. A row may instead hold probabilities: then p32 is the given value.
//
// A primitive reads the tiles [begin, end) of one row on the calling thread and writes one result
// per tile, so rows need no memory but a few words per tile: weights are computed again, not
// stored. Every primitive but `entropy` gives the same bits on every ISA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

namespace alignops::speculative {

inline constexpr int64_t kTile = 4096;
// Weights this many powers of two below the largest one have probability 0.
inline constexpr int32_t kNegligible = 96;
// A tile whose N_t is this far below N holds no probability of 2^-40 or more: its R are all 0.
inline constexpr int32_t kInvisible = 42;

// A histogram has at most this many buckets.
inline constexpr int64_t kBuckets = 4096;

static constexpr int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

// log2(e) / T in fixed point: factor = round(log2(e) / T * 2^shift), in [2^29, 2^30].
struct Rate {
  int32_t factor;
  int32_t shift;
};

// Which ids take part: those whose key is above `key`, and of those that have this very key the
// ones up to `id`. The key orders weights: (n + 2^31) << 24 | M, of probabilities the bits of p32;
// 0 for what is impossible.
struct Cut {
  uint64_t key;
  int64_t id;
};

inline constexpr Cut kNoCut{0, -1};

// A row and what is known of it. Primitives say which members they read beyond the first six.
struct Law {
  const void* data;  // `size` elements, unit stride, any alignment
  DType dtype;
  bool probabilities;  // else logits
  int64_t size;        // 0 < size < 2^31
  Rate rate;           // of logits
  Cut cut;
  int32_t top;     // N over the kept ids; of logits only
  double inverse;  // 1 / double(A)
};

struct TileStats {
  float best;     // largest value of the tile, kept or not; the first of equals
  int32_t place;  // its id - the first id of the tile
  int32_t top;    // N_t over the kept ids, INT32_MIN if there is none; 0 for probabilities
  int32_t bad;    // 1: the tile holds NaN, +inf, or a probability outside [0, 1]; the rest is then
                  // meaningless
  uint64_t sum;   // A_t over the kept ids; of probabilities the sum of R = trunc(double(p) * 2^40)
};

// The smallest ratio E / (M * 2^(n - N_t)) of the kept ids of a tile with N_t - n <= 96; of
// probabilities, E / p.
struct TileRace {
  float ratio;    // +inf if no id is kept, or none but probabilities near 0
  int32_t place;  // of the first such id; -1 if ratio is +inf
  int32_t top;    // as in TileStats
  int32_t bad;    // as in TileStats
};

// r(v) = max(0, scale * p(v) - q(v)), products and differences rounded to float32; without q,
// scale * p(v). Ids beyond q's size have q = 0. Reads top and inverse of both laws.
struct Density {
  const Law* p;
  const Law* q;  // or null
  float scale;
};

// Ids with low <= key <= high and kept by the cut, counted by (high - key) >> shift, which is below
// kBuckets.
struct HistogramArgs {
  const Law* law;  // top is read
  uint64_t low, high;
  int32_t shift;
  uint32_t* counts;  // in/out: ids are added
  uint64_t* sums;    // in/out: their (M << 16) >> min(N - n, 63) are added; of probabilities R
};

struct Entry {
  uint64_t key;
  int64_t id;
};

struct Kernels {
  // Largest value: best, place and bad (only NaN and +inf are) of each tile; top and sum are left
  // alone. Reads no rate and no cut.
  void (*largest)(const Law&, TileStats* out, int64_t begin, int64_t end);
  // All of TileStats.
  void (*scan)(const Law&, TileStats* out, int64_t begin, int64_t end);
  // Largest key of the kept ids of each tile, 0 if there is none.
  void (*peak)(const Law&, uint64_t* out, int64_t begin, int64_t end);
  // Number of kept ids of each tile.
  void (*count)(const Law&, uint32_t* out, int64_t begin, int64_t end);
  // Sum of R(v) = trunc(double(r(v)) * 2^40) of each tile.
  void (*sums)(const Density&, uint64_t* out, int64_t begin, int64_t end);
  // The first id of a tile whose sum of R, from the start of the tile and itself included, exceeds
  // `bound`; `bound` is below the sum of the tile.
  int64_t (*find)(const Density&, int64_t tile, uint64_t bound);
  // out[v] = float(double(R(v)) / total) for all ids v of the tiles; `out` may be the data of p or
  // of q.
  void (*normalize)(const Density&, double total, float* out, int64_t begin, int64_t end);
  // Race with the noise E of words of Philox4x32-10, key `seed`, counter (position, 4, id >> 2, 0),
  // word id & 3: see noise() in cpu/random.h. Reads rate and cut, not top.
  void (*race)(const Law&, uint64_t seed, uint32_t position, TileRace* out, int64_t begin,
               int64_t end);
  // -sum p32 ln p32 of each tile in nats, accurate to 1e-9. Reads top and inverse.
  void (*entropy)(const Law&, double* out, int64_t begin, int64_t end);
  // See HistogramArgs.
  void (*histogram)(const HistogramArgs&, int64_t begin, int64_t end);
  // The first `capacity` ids with low <= key <= high < UINT64_MAX and kept by the cut, ids
  // ascending; returns how many were written. Reads top.
  int64_t (*collect)(const Law&, uint64_t low, uint64_t high, Entry* out, int64_t capacity,
                     int64_t begin, int64_t end);
};

extern const Kernels kRowsScalar, kRowsAvx2, kRowsAvx512;

// Table of the active ISA. Every variant is compared with the scalar one once, on first use; one
// that disagrees is replaced by the next lower level and reported by `self_test_failure()`.
const Kernels& kernels();
const char* self_test_failure();  // nullptr if all is well

}  // namespace alignops::speculative
