// How the work on a plan is cut, and where its intermediate results lie in one buffer.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/kernels.h"

namespace alignops::attention {

// How the work on a plan is cut, by its sizes alone: results do not depend on threads. Task i is
// head i / (row_blocks * chunks), block of rows i / chunks % row_blocks, chunk i % chunks.
struct Partition {
  int64_t rows_per_block, row_blocks;
  int64_t tokens_per_chunk, chunks;
  int64_t tasks;

  // Enough tasks for many threads, but chunks of at least 256 tokens, whose keys and values are far
  // more than a state; blocks of rows that fill a cache, but not more.
  Partition(const Header& h, int64_t kv_heads, int64_t group) {
    constexpr int64_t kQueries = 64, kTasks = 128, kLeastTokens = 256;
    rows_per_block = std::clamp<int64_t>(kQueries / group, 1, std::max<int64_t>(h.rows, 1));
    row_blocks = ceil_div(h.rows, rows_per_block);
    const int64_t wanted =
        std::max<int64_t>(1, kTasks / std::max<int64_t>(1, kv_heads * row_blocks));
    tokens_per_chunk = h.tokens < 2 * kLeastTokens
                           ? std::max<int64_t>(h.tokens, 1)
                           : std::max(kLeastTokens, padded_tokens(ceil_div(h.tokens, wanted)));
    chunks = std::max<int64_t>(1, ceil_div(h.tokens, tokens_per_chunk));
    tasks = kv_heads * row_blocks * chunks;
  }

 private:
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t padded_tokens(int64_t n) { return ceil_div(n, kTileKeys) * kTileKeys; }
};

// The buffer: pieces, states of all tasks (with one chunk there is one state per lane instead),
// then lanes, which are what threads work in. Offsets in floats from an address aligned to 64
// bytes.
struct ScratchLayout {
  int64_t queries;  // of a task, at most
  Workspace workspace;
  int64_t piece_row;  // S + chunks, or 0
  int64_t state;      // floats of a state
  int64_t states, lanes, lane;

  ScratchLayout(const Header& h, const Partition& part, int64_t kv_heads, int64_t group,
                int64_t columns, int64_t v_columns, int64_t pairs, bool mass)
      : queries(part.rows_per_block * group),
        workspace(queries, part.rows_per_block, columns, v_columns, pairs),
        piece_row(mass ? h.segments + part.chunks : 0),
        state(2 * padded(queries) + queries * padded(v_columns)),
        states(padded(kv_heads * h.rows * group * piece_row * 2)),
        lanes(states + (part.chunks > 1 ? part.tasks * state : 0)),
        lane(workspace.total + (part.chunks > 1 ? 0 : state)) {}

  int64_t bytes(int64_t count) const { return (lanes + count * lane) * 4 + kSlack; }
  // How many lanes a buffer has room for.
  int64_t lanes_in(int64_t buffer) const { return (buffer - kSlack - lanes * 4) / (lane * 4); }

  State state_at(float* place) const {
    return {place, place + padded(queries), place + 2 * padded(queries)};
  }

  static constexpr int64_t kSlack = 64;  // to align it
};

}  // namespace alignops::attention
