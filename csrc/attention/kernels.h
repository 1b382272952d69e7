// Contract of the attention core: one task of attention, the reduction of tasks, new and moved keys
// and values. No torch, no Python, no allocation, no exceptions.
//
//   R packed rows, Hq query heads, Hkv KV heads, g = Hq / Hkv, D and Dv columns of keys and values
//
// Scores are kept in units of log2: z = log2(e) (softcap(gain scale (R(delta) q) . k) + bias). A
// task is one KV head, a range of rows and a range of the token axis (Segment::token); its M =
// rows * g queries, row-major with the head of the group inside, meet every key of the range once.
// Its result is a State: m = max z, l = sum 2^(z - m), a = sum 2^(z - m) v; of nothing (-inf, 0,
// 0).
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/plan_view.h"
#include "common/dtype.h"

namespace alignops::attention {

inline constexpr int64_t kTileKeys = 32;
// The largest D and Dv.
inline constexpr int64_t kMaxColumns = 1024;
// Accumulators and staged values have rows of a multiple of this many columns.
inline constexpr int64_t kColumns = 16;
// Room for what a task notes of a row.
inline constexpr int64_t kVisibleRowFloats = 8;

static constexpr int64_t padded(int64_t columns) {
  return (columns + kColumns - 1) / kColumns * kColumns;
}

// Keys or values of a pool, [pages, Hkv, P, columns]; strides in elements, of columns 1, of slots
// `columns`.
struct Cache {
  char* data;
  DType dtype;
  int64_t columns, page_stride, head_stride;
};

// Rows of all heads; strides in elements, 1 of columns.
struct Packed {
  char* data;
  DType dtype;
  int64_t row_stride, head_stride;
};

// Where a head is rotated: `pairs` pairs of columns from `offset` on, (i, i + pairs) or, if
// interleaved, (2i, 2i + 1). No pairs: nowhere.
struct Rotary {
  int64_t pairs, offset;
  bool interleaved;
};

struct Attend {
  PlanView plan;
  int64_t rope;  // type of the plan's tables; not read without pairs
  Rotary rotary;
  Packed q;
  Cache k, v;
  int64_t kv_heads, group;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
  const float* sinks;    // [Hq] or null
  Packed out;            // [R, Hq, Dv]
  float* lse;            // [R, Hq] or null
  float* mass;           // [R, Hq, B] or null
};

struct State {
  float* m;    // [M]
  float* l;    // [M]
  float* acc;  // [M, padded(Dv)]
};

// m and l of what one chunk of the token axis has of one segment; segment s and chunk c make piece
// s + c of S + chunks, since every boundary of either begins a new one.
struct Piece {
  float m, l;
};

struct Task {
  int64_t head;
  int64_t row_begin, row_end;
  int64_t chunk, token_begin, token_end;
  State state;
  Piece* pieces;      // [Hkv, R, g, S + chunks] of the whole call, or null
  int64_t piece_row;  // S + chunks
  float* workspace;   // Workspace::total floats, aligned to 64 bytes
};

struct Reduce {
  State first;         // of chunk 0
  int64_t state_step;  // bytes from the state of a chunk to that of the next one
  int64_t chunks, tokens_per_chunk;
  int64_t head, row_begin, row_end;
  const Piece* pieces;  // as in Task
  int64_t piece_row;
  float* workspace;  // padded(Dv) floats
};

// New keys and values, [R, Hkv, D] and [R, Hkv, Dv], and where they go.
struct Append {
  PlanView plan;
  int64_t rope;
  Rotary rotary;
  int64_t kv_heads;
  Packed k_new, v_new;
  Cache k, v;
};

// Slots that move: run i copies tokens [source, source + tokens) to those from `target` on, keys
// rotated by rotation `turn` of the table unless it is -1.
struct Run {
  int64_t source, target, tokens, turn;
};
struct Rewrite {
  const Run* runs;
  const float* rotations;  // [.., pairs, 2]
  Rotary rotary;
  int64_t kv_heads, page_size;
  Cache k, v;
};

// Where a task of `queries` queries, `rows` rows, works, on every level: offsets in floats, each
// aligned to 64 bytes.
struct Workspace {
  int64_t q, k, v, p, sums, alphas, head, turn, rows, total;

  Workspace(int64_t queries, int64_t row_count, int64_t columns, int64_t v_columns, int64_t pairs)
      : q(0),
        k(padded(queries * columns)),
        v(k + padded(columns * kTileKeys)),
        p(v + padded(v_columns) * kTileKeys),
        sums(p + queries * kTileKeys),
        alphas(sums + queries * kColumns),
        head(alphas + padded(queries)),
        turn(head + padded(columns)),
        rows(turn + padded(2 * pairs)),
        total(rows + padded(row_count * kVisibleRowFloats)) {}
};

struct Kernels {
  void (*attend)(const Attend&, const Task&);
  // out, lse and mass of the queries [begin, end) of M of a head and a block of rows.
  void (*reduce)(const Attend&, const Reduce&, int64_t begin, int64_t end);
  void (*append)(const Append&, int64_t row_begin, int64_t row_end);
  void (*rewrite)(const Rewrite&, int64_t run_begin, int64_t run_end);
};

extern const Kernels kAttentionScalar, kAttentionAvx2, kAttentionAvx512, kAttentionAvx512Bf16;

// Table of the active ISA. Every variant is compared with the scalar one once, on first use; one
// that disagrees is replaced by the next lower level and reported by `self_test_failure()`.
const Kernels& kernels();
const char* self_test_failure();  // nullptr if all is well

}  // namespace alignops::attention
