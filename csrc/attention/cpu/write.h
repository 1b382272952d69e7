// New keys and values go to their slots, old ones move to other pages. Keys are rotated in float32
// and rounded once; what is not rotated is copied. S::widen(p, dtype, count, floats) and S::narrow
// convert heads.
#pragma once

#include "attention/cpu/rows.h"

namespace alignops::attention {
namespace {

template <class S>
void write_head(const char* from, DType from_dtype, const Cache& cache, char* to,
                const Rotary& rotary, const float* cos, const float* sin) {
  alignas(64) float head[kMaxColumns];
  if (cos == nullptr && from_dtype == cache.dtype) {
    __builtin_memcpy(to, from, static_cast<size_t>(cache.columns * bytes_of(cache.dtype)));
    return;
  }
  S::widen(from, from_dtype, cache.columns, head);
  if (cos != nullptr) rotate(rotary, cos, sin, head);
  S::narrow(head, cache.dtype, cache.columns, to);
}

template <class S>
void append(const Append& a, int64_t begin, int64_t end) {
  const Header& h = a.plan.header;
  const bool turned = h.step == 1 && a.rotary.pairs > 0;
  alignas(64) float cos[kMaxColumns / 2], sin[kMaxColumns / 2];
  for (int64_t r = begin; r < end; ++r) {
    const int64_t slot = a.plan.rows[r].slot;
    if (turned)
      split_turn(a.plan.rotation(a.rope, h.segments * h.workers + h.longest + r), a.rotary.pairs,
                 cos, sin);
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const auto place = [&](const Cache& cache) {
        return slot_of(cache, head, slot / h.page_size, slot % h.page_size);
      };
      write_head<S>(row_of(a.k_new, r, head), a.k_new.dtype, a.k, place(a.k), a.rotary,
                    turned ? cos : nullptr, sin);
      write_head<S>(row_of(a.v_new, r, head), a.v_new.dtype, a.v, place(a.v), a.rotary, nullptr,
                    nullptr);
    }
  }
}

template <class S>
void rewrite(const Rewrite& w, int64_t begin, int64_t end) {
  alignas(64) float cos[kMaxColumns / 2], sin[kMaxColumns / 2];
  for (int64_t i = begin; i < end; ++i) {
    const Run& run = w.runs[i];
    const bool turned = run.turn >= 0 && w.rotary.pairs > 0;
    if (turned) split_turn(w.rotations + run.turn * w.rotary.pairs * 2, w.rotary.pairs, cos, sin);
    for (int64_t head = 0; head < w.kv_heads; ++head) {
      const auto place = [&](const Cache& cache, int64_t slot) {
        return slot_of(cache, head, slot / w.page_size, slot % w.page_size);
      };
      // Slots of a page are contiguous.
      const auto copy = [&](const Cache& cache) {
        __builtin_memcpy(place(cache, run.target), place(cache, run.source),
                         static_cast<size_t>(run.tokens * cache.columns * bytes_of(cache.dtype)));
      };
      copy(w.v);
      if (!turned) {
        copy(w.k);
        continue;
      }
      for (int64_t t = 0; t < run.tokens; ++t)
        write_head<S>(place(w.k, run.source + t), w.k.dtype, w.k, place(w.k, run.target + t),
                      w.rotary, cos, sin);
    }
  }
}

}  // namespace
}  // namespace alignops::attention
