// The states of all chunks of some queries become outputs. Chunks are taken in their order, so that
// results do not depend on who computed them. S::narrow(floats, dtype, count, out) rounds.
#pragma once

#include "attention/cpu/rows.h"

namespace alignops::attention {
namespace {

constexpr double kLn2 = 0.69314718055994530942;

inline State state_of(const Reduce& r, int64_t chunk) {
  const auto at = [&](float* p) {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(p) + chunk * r.state_step);
  };
  return {at(r.first.m), at(r.first.l), at(r.first.acc)};
}

// Mass of each block: what its pieces have of the whole.
inline void reduce_mass(const Attend& a, const Reduce& r, int64_t query, float m, float l,
                        float* mass) {
  const PlanView& plan = a.plan;
  for (int64_t b = 0; b < plan.header.blocks; ++b) mass[b] = 0;
  if (l == 0) return;
  const Piece* pieces = r.pieces + query * r.piece_row;
  for (int64_t s = 0; s < plan.header.segments; ++s) {
    const Segment& segment = plan.segments[s];
    const int64_t first = segment.token / r.tokens_per_chunk;
    const int64_t last = (segment.token + segment.n - 1) / r.tokens_per_chunk;
    for (int64_t chunk = first; chunk <= last; ++chunk) {
      const Piece& piece = pieces[s + chunk];
      if (piece.l != 0) mass[segment.block] += piece.l / l * __builtin_exp2f(piece.m - m);
    }
  }
}

// `sum` has room for padded(Dv) floats.
template <class S>
void reduce_query(const Attend& a, const Reduce& r, int64_t m, float* sum) {
  const int64_t row = r.row_begin + m / a.group, q_head = r.head * a.group + m % a.group;
  const int64_t columns = padded(a.v.columns);
  const float sink = a.sinks != nullptr ? a.sinks[q_head] * kLog2e : kMinusInfinity;
  float top = sink;
  for (int64_t chunk = 0; chunk < r.chunks; ++chunk) {
    const float other = state_of(r, chunk).m[m];
    if (!(top >= other)) top = other;
  }
  // Nothing is skipped where all is -inf: a NaN must get through.
  const float base = top == kMinusInfinity ? 0 : top;
  float l = a.sinks != nullptr ? __builtin_exp2f(sink - base) : 0;
  for (int64_t i = 0; i < columns; ++i) sum[i] = 0;
  for (int64_t chunk = 0; chunk < r.chunks; ++chunk) {
    const State state = state_of(r, chunk);
    const float weight = __builtin_exp2f(state.m[m] - base);
    const float* __restrict part = state.acc + m * columns;
    float* __restrict out = sum;
    l += state.l[m] * weight;
    for (int64_t i = 0; i < columns; ++i) out[i] += part[i] * weight;
  }
  const float scale = l == 0 ? 0 : 1 / l;
  for (int64_t i = 0; i < columns; ++i) sum[i] *= scale;
  S::narrow(sum, a.out.dtype, a.v.columns, row_of(a.out, row, q_head));
  const int64_t place = row * a.kv_heads * a.group + q_head;
  if (a.lse != nullptr)
    a.lse[place] = l == 0
                       ? kMinusInfinity
                       : static_cast<float>((top + __builtin_log2(static_cast<double>(l))) * kLn2);
  if (a.mass != nullptr) {
    const int64_t query = (r.head * a.plan.header.rows + r.row_begin) * a.group + m;
    reduce_mass(a, r, query, base, l, a.mass + place * a.plan.header.blocks);
  }
}

template <class S>
void reduce(const Attend& a, const Reduce& r, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) reduce_query<S>(a, r, m, r.workspace);
}

}  // namespace
}  // namespace alignops::attention
