// The plan of one step: which worker's rows see which keys, and by what rotation. Made on the host
// once per step, read by every layer of it and by every kernel (CPU and Triton), so it is one
// buffer of int64 words without pointers. No torch, no Python.
//
//   R rows (new tokens of all workers, packed in worker order), W workers of this step,
//   S segments (runs of pages with one phase), B blocks, P slots per page, F pairs of rotary
//   dimensions of a rope type
//
// Word i of the header is what `Header` names; a table stands at the word offset given there. Key i
// of segment s lies in slot (first + i) % P of page pages[page + (first + i) / P] and is stored as
// R(r0 + i) k. Row t of worker w (t counts from 0 within the worker) sees the keys
//
//   max(0, distance0 + t - window + 1) <= i < min(n, limit0 + (state == kRising ? t : 0))
//
// of a segment whose state is not kHidden (no lower end without a window), and key i is
// distance0 + t - i positions before it. The query that meets these keys is rotated by
// delta0 + step * t positions, step = 1 for queries that arrive unrotated ("raw") and 0 for queries
// that the model has rotated by their storage index ("local").
//
// Rotation table of a rope type: float32 (cos, sin) [rows][F][2], rows in this order:
//   S * W  rotation by delta0 of (segment, worker), segment-major; undefined where hidden
//   T      rotation by t = 0..T-1
//   R      rotation by the storage index of each new row, for keys that arrive unrotated
// Angles are fp64(omega) * fp64(position), reduced modulo 2 pi in fp64.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alignops::attention {

inline constexpr int64_t kPlanMagic = 0x314e414c50474c41;  // "ALGPLAN1"
inline constexpr int64_t kMaxRopeTypes = 8;

struct Header {
  int64_t magic;
  int64_t words;      // of the whole plan; the buffer may be longer
  int64_t workers;    // W
  int64_t rows;       // R
  int64_t segments;   // S; each has n > 0 and is seen by some worker
  int64_t blocks;     // B
  int64_t page_size;  // P, a power of two
  int64_t pages;      // entries of the page table
  int64_t longest;    // T, the most rows of a worker
  int64_t tokens;     // sum of n
  int64_t step;       // 1: queries and keys arrive unrotated; 0: rotated by their storage index
  int64_t types;      // rope types
  // Word offsets of the tables.
  int64_t row_ptr;  // int64 [W + 1]: rows of worker w are row_ptr[w]..row_ptr[w + 1]
  int64_t segment;  // Segment [S], by block; keys of a block in order
  int64_t pair;     // Pair [S][W]
  int64_t weight;   // Weight [S][W]
  int64_t page;     // int64 [pages]
  int64_t row;      // Row [R]
  int64_t rope;     // Rope [types]
  int64_t reserved[5];
};
static_assert(sizeof(Header) == 24 * 8);

struct Segment {
  int64_t block;  // 0..B-1
  int64_t n;      // keys
  int64_t page;   // first entry of the page table
  int64_t first;  // slot of key 0 in its page
  int64_t s0;     // position of key 0 in the block
  int64_t r0;     // rotation of key 0
  int64_t token;  // keys of all segments before: the axis that work is split along
  int64_t reserved;
};
static_assert(sizeof(Segment) == 8 * 8);

inline constexpr int64_t kHidden = 0;
inline constexpr int64_t kVisible = 1;  // the same keys for all rows of the worker
inline constexpr int64_t kRising = 2;   // one key more per row: the worker's own block

struct Pair {
  int64_t state;
  int64_t limit0;
  int64_t distance0;
  int64_t delta0;
};
static_assert(sizeof(Pair) == 4 * 8);

// Of a (segment, worker): score = gain * scale * q.k, softcap, + bias.
struct Weight {
  float bias;
  float gain;
};
static_assert(sizeof(Weight) == 8);

struct Row {
  int64_t worker;
  int64_t t;
  int64_t slot;   // page * P + slot in the page: where the row's key and value go
  int64_t index;  // rotation of the row's key: its storage index
};
static_assert(sizeof(Row) == 4 * 8);

struct Rope {
  int64_t pairs;  // F
  int64_t table;  // word offset of the rotation table
};

}  // namespace alignops::attention
