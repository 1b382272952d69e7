// The table without vector instructions: one key and one query at a time, as the formulas read.
#include "attention/cpu/reduce.h"
#include "attention/cpu/rows.h"
#include "attention/cpu/write.h"

namespace alignops::attention {
namespace {

struct ScalarElements {
  static void widen(const void* p, DType dtype, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = load(p, dtype, i);
  }
  static void narrow(const float* in, DType dtype, int64_t count, void* p) {
    for (int64_t i = 0; i < count; ++i) store(p, dtype, i, in[i]);
  }
};

// One key more in the state of a query: the online softmax.
void add(const Attend& a, float z, const char* value, float& m, float& l, float& piece,
         float* acc) {
  if (!(m >= z)) {
    const float shrink = m == kMinusInfinity ? 0 : __builtin_exp2f(m - z);
    l *= shrink;
    piece *= shrink;
    for (int64_t i = 0; i < a.v.columns; ++i) acc[i] *= shrink;
    m = z;
  }
  const float p = z == kMinusInfinity ? 0 : __builtin_exp2f(z - m);
  l += p;
  piece += p;
  for (int64_t i = 0; i < a.v.columns; ++i) acc[i] += p * load(value, a.v.dtype, i);
}

void attend_query(const Attend& a, const Task& task, int64_t s, const VisibleRow& row,
                  int64_t in_group, const float* query) {
  const int64_t m = (row.row - task.row_begin) * a.group + in_group;
  const Segment& segment = a.plan.segments[s];
  float piece = 0;
  for (int64_t i = row.begin; i < row.end; ++i) {
    const char* key = key_of(a, a.k, task.head, segment, i);
    float z = 0;
    for (int64_t d = 0; d < a.k.columns; ++d) z += query[d] * load(key, a.k.dtype, d);
    if (a.softcap > 0) z = a.softcap * kLog2e * __builtin_tanhf(z);
    add(a, z + row.bias, key_of(a, a.v, task.head, segment, i), task.state.m[m], task.state.l[m],
        piece, task.state.acc + m * padded(a.v.columns));
  }
  if (task.pieces != nullptr) piece_of(a, task, m, s) = {task.state.m[m], piece};
}

void attend(const Attend& a, const Task& task) {
  const Workspace places((task.row_end - task.row_begin) * a.group, task.row_end - task.row_begin,
                         a.k.columns, a.v.columns, a.rotary.pairs);
  float* head = task.workspace + places.head;
  float* cos = task.workspace + places.turn;
  float* sin = cos + a.rotary.pairs;
  auto* rows = reinterpret_cast<VisibleRow*>(task.workspace + places.rows);
  clear(a, task);
  each_segment(a, task, [&](int64_t s) {
    const Visible visible = visible_rows(a, task, s, rows);
    for (int64_t i = 0; i < visible.count; ++i) {
      const VisibleRow& row = visible.rows[i];
      if (a.rotary.pairs > 0) query_turn(a, s, a.plan.rows[row.row], cos, sin);
      for (int64_t g = 0; g < a.group; ++g) {
        ScalarElements::widen(row_of(a.q, row.row, task.head * a.group + g), a.q.dtype, a.k.columns,
                              head);
        rotate(a.rotary, cos, sin, head);
        for (int64_t d = 0; d < a.k.columns; ++d) head[d] *= row.factor;
        attend_query(a, task, s, row, g, head);
      }
    }
  });
}

}  // namespace

const Kernels kAttentionScalar = {attend, reduce<ScalarElements>, append<ScalarElements>,
                                  rewrite<ScalarElements>};

}  // namespace alignops::attention
