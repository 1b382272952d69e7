// A task of attention in vectors, the source of AVX2 and AVX-512: an ISA file takes its table from
// `attention_kernels<Lanes>()`.
//
// Per segment the queries that see it are rotated, scaled and packed; per tile of 32 keys:
//   1. keys are widened and transposed to k[d][key], once for all queries of all workers
//   2. p[m][key] = sum_d q[m][d] k[d][key], panels of up to S::kScoreRows queries in registers
//   3. softcap and bias, largest score, powers of two, sums, row by row
//   4. values are widened, unless they can be read where they lie
//   5. acc[m] = alpha[m] acc[m] + sum_key p[m][key] v[key], panels of S::kValueRows queries
// Keys and values are read once per task. Per key: M (D + Dv) multiply-adds, D transposed elements,
// M powers of two.
//
// A key that a query does not see is masked by lane before anything is added up, and its value is
// not multiplied: panels take the keys that all of their queries see, the others follow one by one.
#pragma once

#include "attention/cpu/reduce.h"
#include "attention/cpu/rows.h"
#include "attention/cpu/vector_math.h"
#include "attention/cpu/write.h"

namespace alignops::attention {
namespace {

// f.template operator()<n>() for 1 <= n <= kMost.
template <int kMost, class F>
[[gnu::always_inline]] inline void with_count(int64_t n, const F& f) {
  if constexpr (kMost == 1) {
    f.template operator()<1>();
  } else {
    if (n >= kMost) {
      f.template operator()<kMost>();
    } else {
      with_count<kMost - 1>(n, f);
    }
  }
}

// `count` rows in panels of nearly the same size, at most `most`.
struct Panels {
  int64_t number, base, longer;

  Panels(int64_t count, int64_t most_rows)
      : number((count + most_rows - 1) / most_rows),
        base(number > 0 ? count / number : 0),
        longer(number > 0 ? count % number : 0) {}
  int64_t begin(int64_t i) const { return i * base + least(i, longer); }
  int64_t size(int64_t i) const { return base + (i < longer ? 1 : 0); }
};

// c + a b, elements of pairs multiplied one by one.
template <class S, bool kPairs>
[[gnu::always_inline]] inline typename S::F product(typename S::F a, typename S::F b,
                                                    typename S::F c) {
  if constexpr (kPairs) {
    return S::pair_product(a, b, c);
  } else {
    return S::multiply_add(a, b, c);
  }
}

// Rows that are needed soon, to be fetched a few at a time while something is computed: bursts
// would wait for each other, and computing for them.
struct Ahead {
  const char* const* rows;
  int64_t count, bytes;

  // Of `parts` equal parts those from `begin` to `end`.
  Ahead slice(int64_t begin, int64_t end, int64_t parts) const {
    const int64_t first = count * begin / parts;
    return {rows + first, count * end / parts - first, bytes};
  }
  // Not to stay: what is read once would only drive out what is read again.
  void fetch(int64_t row) const {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows[row] + at, 0, 0);
  }
  // f(begin, end) for consecutive parts of [begin, end), before each of which a row is fetched.
  template <class F>
  [[gnu::always_inline]] inline void during(int64_t begin, int64_t end, const F& f) const {
    const int64_t step = count > 0 ? (end - begin) / count : 0;
    for (int64_t row = 0; row < count; ++row) {
      fetch(row);
      f(begin + step * row, row + 1 < count ? begin + step * (row + 1) : end);
    }
    if (count == 0) f(begin, end);
  }
};

// These two loops are functions of their own: inlined, compilers have been seen to keep sums in
// memory.
//
// p[r][key] for kRows queries, q[d][r] and k[d][key]; with kPairs, elements are pairs of bfloat16
// and `depth` counts pairs.
template <class S, bool kPairs, int kRows>
[[gnu::noinline]] void scores(const float* __restrict q, const float* __restrict k, int64_t depth,
                              float* __restrict p, const Ahead& ahead) {
  constexpr int kVectors = kTileKeys / S::kLanes;
  typename S::F sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sum[r][i] = S::floats(0);
  ahead.during(0, depth, [&](int64_t first, int64_t last) {
    for (int64_t d = first; d < last; ++d) {
      typename S::F key[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) key[i] = S::load(k + d * kTileKeys + i * S::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const typename S::F query = S::floats(q[d * kRows + r]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) sum[r][i] = product<S, kPairs>(query, key[i], sum[r][i]);
      }
    }
  });
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) S::store(p + r * kTileKeys + i * S::kLanes, sum[r][i]);
}

// acc[r] = alpha[r] acc[r] + sum of p[r][key] v[key] over the keys [begin, end), for kVectors
// vectors of columns; with kPairs over pairs of keys.
template <class S, bool kPairs, int kRows, int kVectors>
[[gnu::noinline]] void weigh(const float* __restrict p, const float* const* v, int64_t begin,
                             int64_t end, int64_t column, float* const* acc, const float* alpha,
                             const Ahead& ahead) {
  typename S::F sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i)
      sum[r][i] = S::mul(S::floats(alpha[r]), S::load(acc[r] + column + i * S::kLanes));
  ahead.during(begin, end, [&](int64_t first, int64_t last) {
    for (int64_t key = first; key < last; ++key) {
      typename S::F value[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) value[i] = S::load(v[key] + column + i * S::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const typename S::F weight = S::floats(p[r * kTileKeys + key]);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i)
          sum[r][i] = product<S, kPairs>(weight, value[i], sum[r][i]);
      }
    }
  });
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) S::store(acc[r] + column + i * S::kLanes, sum[r][i]);
}

template <class S, bool kPairs, int kRows>
void weigh_columns(const float* p, const float* const* v, int64_t begin, int64_t end,
                   int64_t columns, float* const* acc, const float* alpha, const Ahead& ahead) {
  const int64_t vectors = columns / S::kLanes;
  for (int64_t i = 0; i < vectors;) {
    const int64_t left = vectors - i, step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    with_count<4>(step, [&]<int kVectors>() {
      if constexpr (kVectors != 3)
        weigh<S, kPairs, kRows, kVectors>(p, v, begin, end, i * S::kLanes, acc, alpha,
                                          ahead.slice(i, i + step, vectors));
    });
    i += step;
  }
}

// Keys [first, first + count) of a segment.
struct Tile {
  int64_t first, count;
  const char* keys[kTileKeys];
  const char* values[kTileKeys];
};

// What one task works with.
template <class S>
class Work {
 public:
  Work(const Attend& a, const Task& task)
      : a_(a),
        task_(task),
        queries_((task.row_end - task.row_begin) * a.group),
        columns_(padded(a.v.columns)),
        key_bytes_(a.k.columns * bytes_of(a.k.dtype)),
        value_bytes_(a.v.columns * bytes_of(a.v.dtype)),
        places_(queries_, task.row_end - task.row_begin, a.k.columns, a.v.columns, a.rotary.pairs) {
  }

  void run() {
    clear(a_, task_);
    each_segment(a_, task_, [&](int64_t s) {
      const Visible visible =
          visible_rows(a_, task_, s, reinterpret_cast<VisibleRow*>(at(places_.rows)));
      if (visible.count > 0) segment(s, visible);
    });
  }

 private:
  float* at(int64_t place) const { return task_.workspace + place; }

  // The state's number of a query, the g-th of a row.
  int64_t number(const VisibleRow& row, int64_t g) const {
    return (row.row - task_.row_begin) * a_.group + g;
  }

  // Whether products of a segment are those of bfloat16: the query is rounded to it, which a sum
  // over few keys would show.
  bool in_pairs(const Visible& visible) const {
    constexpr int64_t kLeastKeys = 2 * kTileKeys;
    return S::kHasPairs && a_.q.dtype == DType::kBFloat16 && a_.k.dtype == DType::kBFloat16 &&
           a_.k.columns % 2 == 0 && visible.end - visible.begin >= kLeastKeys;
  }

  void segment(int64_t s, const Visible& visible) {
    if constexpr (S::kHasPairs) {
      if (in_pairs(visible)) return segment_of<true>(s, visible);
    }
    segment_of<false>(s, visible);
  }

  template <bool kPairs>
  void segment_of(int64_t s, const Visible& visible) {
    const int64_t count = visible.count * a_.group;
    const int64_t depth = kPairs ? a_.k.columns / 2 : a_.k.columns;
    const Panels panels(count, S::kScoreRows);
    pack_queries<kPairs>(s, visible, panels);
    float* sums = at(places_.sums);
    for (int64_t i = 0; i < count * S::kLanes; ++i) sums[i] = 0;
    Tile tiles[2];
    find(s, visible.begin, least(kTileKeys, visible.end - visible.begin), tiles[0]);
    for (int64_t first = visible.begin, i = 0; first < visible.end; first += kTileKeys, ++i) {
      const Tile& tile = tiles[i % 2];
      Tile& next = tiles[(i + 1) % 2];
      find_next(s, first + kTileKeys, visible.end, next);
      // A pair is moved like a float.
      with_dtype(kPairs ? DType::kFloat32 : a_.k.dtype, [&]<DType kType>() {
        S::template transpose<kType>(tile.keys, tile.count, depth, at(places_.k));
      });
      const Ahead ahead{next.keys, next.count, key_bytes_};
      for (int64_t j = 0; j < panels.number; ++j) {
        const int64_t begin = panels.begin(j);
        with_count<S::kScoreRows>(panels.size(j), [&]<int kRows>() {
          scores<S, kPairs, kRows>(at(places_.q) + begin * depth, at(places_.k), depth,
                                   at(places_.p) + begin * kTileKeys,
                                   ahead.slice(j, j + 1, panels.number));
        });
      }
      const bool whole = soften(visible, tile);
      const Ahead values_ahead{next.values, next.count, value_bytes_};
      if constexpr (kPairs) {
        if (whole) {
          add_value_pairs(visible, tile, values_ahead);
          continue;
        }
      }
      add_values(visible, tile, whole, values_ahead);
    }
    for (int64_t i = 0; i < visible.count; ++i)
      for (int64_t g = 0; g < a_.group; ++g) {
        const int64_t m = number(visible.rows[i], g);
        const float sum = S::total(S::load(sums + (i * a_.group + g) * S::kLanes));
        task_.state.l[m] += sum;
        if (task_.pieces != nullptr) piece_of(a_, task_, m, s) = {task_.state.m[m], sum};
      }
  }

  // q[d][r] of each panel.
  template <bool kPairs>
  void pack_queries(int64_t s, const Visible& visible, const Panels& panels) {
    float* cos = at(places_.turn);
    float* sin = cos + a_.rotary.pairs;
    float* head = at(places_.head);
    int64_t panel = 0, in_panel = 0;
    for (int64_t i = 0; i < visible.count; ++i) {
      const VisibleRow& row = visible.rows[i];
      if (a_.rotary.pairs > 0) query_turn(a_, s, a_.plan.rows[row.row], cos, sin);
      for (int64_t g = 0; g < a_.group; ++g) {
        S::widen(row_of(a_.q, row.row, task_.head * a_.group + g), a_.q.dtype, a_.k.columns, head);
        if (a_.rotary.pairs > 0) rotate(a_.rotary, cos, sin, head);
        const int64_t size = panels.size(panel);
        int64_t depth = a_.k.columns;
        for (int64_t d = 0; d < depth; ++d) head[d] *= row.factor;
        if constexpr (kPairs) {
          S::narrow(head, DType::kBFloat16, depth, head);
          depth /= 2;
        }
        float* out = at(places_.q) + panels.begin(panel) * depth + in_panel;
        for (int64_t d = 0; d < depth; ++d) out[d * size] = head[d];
        if (++in_panel == size) {
          ++panel;
          in_panel = 0;
        }
      }
    }
  }

  void find(int64_t s, int64_t first, int64_t count, Tile& tile) const {
    const Segment& segment = a_.plan.segments[s];
    const int64_t size = a_.plan.header.page_size;
    tile.first = first;
    tile.count = count;
    const int64_t place = segment.first + first;
    const int64_t* page = a_.plan.pages + segment.page + place / size;
    int64_t slot = place % size;
    for (int64_t i = 0; i < count; ++page, slot = 0) {
      const int64_t end = least(count, i + size - slot);
      const char* key = slot_of(a_.k, task_.head, *page, slot);
      const char* value = slot_of(a_.v, task_.head, *page, slot);
      for (; i < end; ++i, key += key_bytes_, value += value_bytes_) {
        tile.keys[i] = key;
        tile.values[i] = value;
      }
    }
  }

  // The tile after: of this segment, or the first keys of the next one, which are likely the next
  // to be read.
  void find_next(int64_t s, int64_t first, int64_t end, Tile& tile) const {
    if (first < end) return find(s, first, least(kTileKeys, end - first), tile);
    tile.count = 0;
    if (s + 1 == a_.plan.header.segments) return;
    const Segment& next = a_.plan.segments[s + 1];
    const int64_t count = least(next.n, task_.token_end - next.token);
    if (count > 0) find(s + 1, 0, least(kTileKeys, count), tile);
  }

  // Scores become weights 2^(z - m); what a query does not see has none. Returns whether all see
  // all.
  bool soften(const Visible& visible, const Tile& tile) {
    float* p = at(places_.p);
    float* sums = at(places_.sums);
    float* alphas = at(places_.alphas);
    bool whole = true;
    for (int64_t i = 0; i < visible.count; ++i) {
      const VisibleRow& row = visible.rows[i];
      const int64_t begin = most(0, row.begin - tile.first);
      const int64_t end = least(tile.count, row.end - tile.first);
      whole = whole && begin == 0 && end == tile.count;
      for (int64_t g = 0; g < a_.group; ++g) {
        const int64_t c = i * a_.group + g, m = number(row, g);
        if (a_.softcap > 0) cap<S>(p + c * kTileKeys, a_.softcap * kLog2e);
        const float before = task_.state.m[m];
        const float top = lift<S>(p + c * kTileKeys, row.bias, begin, end, before);
        const float base = top == kMinusInfinity ? 0 : top;
        float alpha = 1;
        // A NaN differs from itself, and spoils the row, as it should.
        if (top != before) {
          alpha = S::first(power_of_two<S>(S::floats(before - base)));
          task_.state.m[m] = top;
          task_.state.l[m] *= alpha;
        }
        alphas[c] = alpha;
        exponentials<S>(p + c * kTileKeys, base, alpha, sums + c * S::kLanes);
      }
    }
    return whole;
  }

  const float* const* values(const Tile& tile, const float** found) const {
    if (a_.v.dtype == DType::kFloat32 && a_.v.columns == columns_) {
      for (int64_t i = 0; i < tile.count; ++i)
        found[i] = reinterpret_cast<const float*>(tile.values[i]);
    } else {
      for (int64_t i = 0; i < tile.count; ++i) {
        float* out = at(places_.v) + i * columns_;
        for (int64_t d = a_.v.columns; d < columns_; ++d) out[d] = 0;
        S::widen(tile.values[i], a_.v.dtype, a_.v.columns, out);
        found[i] = out;
      }
    }
    return found;
  }

  // f.operator()<kRows>(first, acc) for panels of queries and their accumulators.
  template <class F>
  void each_panel(const Visible& visible, const F& f) const {
    const Panels panels(visible.count * a_.group, S::kValueRows);
    for (int64_t i = 0; i < panels.number; ++i) {
      const int64_t first = panels.begin(i), size = panels.size(i);
      float* acc[S::kValueRows];
      for (int64_t r = 0; r < size; ++r)
        acc[r] = task_.state.acc +
                 number(visible.rows[(first + r) / a_.group], (first + r) % a_.group) * columns_;
      with_count<S::kValueRows>(
          size, [&]<int kRows>() { f.template operator()<kRows>(first, acc, i, panels.number); });
    }
  }

  void add_values(const Visible& visible, const Tile& tile, bool whole, const Ahead& ahead) const {
    const float* found[kTileKeys];
    const float* const* v = values(tile, found);
    const float* p = at(places_.p);
    const float* alphas = at(places_.alphas);
    each_panel(visible, [&]<int kRows>(int64_t first, float* const* acc, int64_t i, int64_t parts) {
      const float* weights = p + first * kTileKeys;
      int64_t begins[kRows], ends[kRows];
      int64_t begin = 0, end = tile.count;
      for (int64_t r = 0; r < kRows && !whole; ++r) {
        const VisibleRow& row = visible.rows[(first + r) / a_.group];
        begins[r] = most(0, row.begin - tile.first);
        ends[r] = least(tile.count, row.end - tile.first);
        begin = most(begin, begins[r]);
        end = least(end, ends[r]);
      }
      end = most(begin, end);
      weigh_columns<S, false, kRows>(weights, v, begin, end, columns_, acc, alphas + first,
                                     ahead.slice(i, i + 1, parts));
      constexpr float kKeep = 1;
      for (int64_t r = 0; r < kRows && !whole; ++r) {
        const auto rest = [&](int64_t from, int64_t to) {
          if (from < to)
            weigh_columns<S, false, 1>(weights + r * kTileKeys, v, from, to, columns_, acc + r,
                                       &kKeep, {});
        };
        rest(begins[r], least(begin, ends[r]));
        rest(most(end, begins[r]), ends[r]);
      }
    });
  }

  // The same with weights and values in pairs of keys, where all queries see all keys.
  void add_value_pairs(const Visible& visible, const Tile& tile, const Ahead& ahead) const {
    const int64_t pairs = (tile.count + 1) / 2;
    const float* v[kTileKeys / 2];
    for (int64_t i = 0; i < pairs; ++i) {
      float* out = at(places_.v) + i * columns_;
      S::pair_rows(tile.values[2 * i], 2 * i + 1 < tile.count ? tile.values[2 * i + 1] : nullptr,
                   a_.v.columns, columns_, out);
      v[i] = out;
    }
    float* p = at(places_.p);
    for (int64_t c = 0; c < visible.count * a_.group; ++c) S::pair_weights(p + c * kTileKeys);
    const float* alphas = at(places_.alphas);
    each_panel(visible, [&]<int kRows>(int64_t first, float* const* acc, int64_t i, int64_t parts) {
      weigh_columns<S, true, kRows>(p + first * kTileKeys, v, 0, pairs, columns_, acc,
                                    alphas + first, ahead.slice(i, i + 1, parts));
    });
  }

  const Attend& a_;
  const Task& task_;
  const int64_t queries_, columns_, key_bytes_, value_bytes_;
  const Workspace places_;
};

template <class S>
void attend(const Attend& a, const Task& task) {
  Work<S>(a, task).run();
}

template <class S>
constexpr Kernels attention_kernels() noexcept {
  return {attend<S>, reduce<S>, append<S>, rewrite<S>};
}

}  // namespace
}  // namespace alignops::attention
