// What all levels share: which keys a row sees, how it is rotated, where a slot lies. Everything
// has internal linkage.
#pragma once

#include "attention/kernels.h"
#include "common/element.h"

namespace alignops::attention {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kMinusInfinity = -__builtin_inff();

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Row `row` sees the keys [begin, end) of a segment, as far as they are in the task's chunk.
struct VisibleRow {
  int64_t row, begin, end;
  float bias;    // in units of log2
  float factor;  // of the rotated query
};
static_assert(sizeof(VisibleRow) == kVisibleRowFloats * sizeof(float));

// Rows of a task that see a segment, and all keys that any of them sees.
struct Visible {
  VisibleRow* rows;
  int64_t count, begin, end;
};

inline Visible visible_rows(const Attend& a, const Task& task, int64_t s, VisibleRow* rows) {
  const PlanView& plan = a.plan;
  const Segment& segment = plan.segments[s];
  const int64_t first = most(0, task.token_begin - segment.token);
  const int64_t last = least(segment.n, task.token_end - segment.token);
  Visible found{rows, 0, last, first};
  for (int64_t r = task.row_begin; r < task.row_end; ++r) {
    const Row& row = plan.rows[r];
    const Pair& pair = plan.pair(s, row.worker);
    const Weight& weight = plan.weight(s, row.worker);
    if (pair.state == kHidden || weight.bias == kMinusInfinity) continue;
    const int64_t end = least(last, pair.limit0 + (pair.state == kRising ? row.t : 0));
    const int64_t begin = a.window > 0 ? most(first, pair.distance0 + row.t - a.window + 1) : first;
    if (begin >= end) continue;
    const float unit = weight.gain * a.scale;
    rows[found.count++] = {r, begin, end, weight.bias * kLog2e,
                           a.softcap > 0 ? unit / a.softcap : unit * kLog2e};
    found.begin = least(found.begin, begin);
    found.end = most(found.end, end);
  }
  return found;
}

// cos and sin, [pairs] each, of the rotation that a row's query needs for a segment.
inline void query_turn(const Attend& a, int64_t s, const Row& row, float* cos, float* sin) {
  const Header& h = a.plan.header;
  const float* base = a.plan.rotation(a.rope, s * h.workers + row.worker);
  if (h.step == 0 || row.t == 0) {
    for (int64_t i = 0; i < a.rotary.pairs; ++i) {
      cos[i] = base[2 * i];
      sin[i] = base[2 * i + 1];
    }
    return;
  }
  const float* more = a.plan.rotation(a.rope, h.segments * h.workers + row.t);
  for (int64_t i = 0; i < a.rotary.pairs; ++i) {
    cos[i] = base[2 * i] * more[2 * i] - base[2 * i + 1] * more[2 * i + 1];
    sin[i] = base[2 * i + 1] * more[2 * i] + base[2 * i] * more[2 * i + 1];
  }
}

inline void split_turn(const float* turn, int64_t pairs, float* cos, float* sin) {
  for (int64_t i = 0; i < pairs; ++i) {
    cos[i] = turn[2 * i];
    sin[i] = turn[2 * i + 1];
  }
}

inline void rotate(const Rotary& rotary, const float* __restrict cos, const float* __restrict sin,
                   float* __restrict head) {
  float* __restrict x = head + rotary.offset;
  const int64_t pairs = rotary.pairs;
  if (rotary.interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  } else {
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = x[i], b = x[i + pairs];
      x[i] = a * cos[i] - b * sin[i];
      x[i + pairs] = b * cos[i] + a * sin[i];
    }
  }
}

inline char* slot_of(const Cache& cache, int64_t head, int64_t page, int64_t slot) {
  return cache.data + (page * cache.page_stride + head * cache.head_stride + slot * cache.columns) *
                          bytes_of(cache.dtype);
}

inline char* key_of(const Attend& a, const Cache& cache, int64_t head, const Segment& segment,
                    int64_t i) {
  const int64_t place = segment.first + i, size = a.plan.header.page_size;
  return slot_of(cache, head, a.plan.pages[segment.page + place / size], place % size);
}

inline char* row_of(const Packed& t, int64_t row, int64_t head) {
  return t.data + (row * t.row_stride + head * t.head_stride) * bytes_of(t.dtype);
}

// The segment that holds a token of the plan.
inline int64_t segment_at(const PlanView& plan, int64_t token) {
  int64_t low = 0, high = plan.header.segments;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (plan.segments[middle].token <= token ? low : high) = middle;
  }
  return low;
}

// f(segment) for all segments of a task's chunk.
template <class F>
void each_segment(const Attend& a, const Task& task, const F& f) {
  const Header& h = a.plan.header;
  if (task.token_begin >= task.token_end) return;
  for (int64_t s = segment_at(a.plan, task.token_begin);
       s < h.segments && a.plan.segments[s].token < task.token_end; ++s)
    f(s);
}

// Piece of a query of the task, the m-th of M, for a segment.
inline Piece& piece_of(const Attend& a, const Task& task, int64_t m, int64_t s) {
  const int64_t query = (task.head * a.plan.header.rows + task.row_begin) * a.group + m;
  return task.pieces[query * task.piece_row + s + task.chunk];
}

// The state of nothing, and pieces of nothing.
inline void clear(const Attend& a, const Task& task) {
  const int64_t queries = (task.row_end - task.row_begin) * a.group;
  for (int64_t m = 0; m < queries; ++m) {
    task.state.m[m] = kMinusInfinity;
    task.state.l[m] = 0;
  }
  for (int64_t i = 0; i < queries * padded(a.v.columns); ++i) task.state.acc[i] = 0;
  if (task.pieces == nullptr) return;
  each_segment(a, task, [&](int64_t s) {
    for (int64_t m = 0; m < queries; ++m) piece_of(a, task, m, s) = {kMinusInfinity, 0};
  });
}

}  // namespace
}  // namespace alignops::attention
