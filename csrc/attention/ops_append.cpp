// Writes to the cache: new keys and values, moved ones. Schemas and CPU implementations.
//
// attention_rewrite_ moves runs of slots in every layer. Row i of `runs`, int64 [N, 4], is (source,
// target, tokens, turn): the slots [source, source + tokens), a slot being page * P + place in the
// page, go to those from `target` on. A run stays inside one page on either side; a page that is a
// source is nowhere a target, and no slot is the target twice. Keys are rotated by row `turn` of
// rotations[rope[layer]], float32 [rows, F, 2]; with turn -1, or in a layer with rope -1, they are
// copied byte by byte, as values always are.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/ops_plan.h"
#include "attention/rotations.h"
#include "common/torch_parallel.h"

namespace alignops::attention {
namespace {

void append_rows(const Tensor& k_new, const Tensor& v_new, const Tensor& plan, int64_t rope,
                 int64_t rotary_offset, bool interleaved, const Tensor& k, const Tensor& v) {
  const char* op = "attention_append_";
  Append a{};
  a.k_new = as_packed(k_new, op, "k_new");
  a.v_new = as_packed(v_new, op, "v_new");
  const Caches caches = as_caches(k, v, op);
  check_apart(k, op, "k");
  check_apart(v, op, "v");
  a.k = caches.k;
  a.v = caches.v;
  a.kv_heads = caches.heads;
  const int64_t rows = k_new.size(0);
  const auto check_new = [&](const Tensor& t, const Cache& cache, const char* argument) {
    ALIGNOPS_CHECK(t.scalar_type() == k.scalar_type() || t.scalar_type() == ScalarType::Float, op,
                   ": ", argument, " must be float32 or ", dtype_name(k.scalar_type()),
                   " (as k), got ", dtype_name(t.scalar_type()));
    ALIGNOPS_CHECK(t.size(0) == rows && t.size(1) == caches.heads && t.size(2) == cache.columns, op,
                   ": ", argument, " must have shape (", rows, ", ", caches.heads, ", ",
                   cache.columns, "), got ", shape_string(t.sizes()));
  };
  check_new(k_new, a.k, "k_new");
  check_new(v_new, a.v, "v_new");
  a.plan = as_plan(plan, caches.pages, op);
  check_page_size(a.plan, caches, op);
  ALIGNOPS_CHECK(rows == a.plan.header.rows, op, ": k_new must have ", a.plan.header.rows,
                 " rows (as plan), got ", rows);
  a.rotary = as_rotary(a.plan, rope, rotary_offset, interleaved, a.k.columns, op);
  a.rope = rope;
  const Kernels& table = kernels();
  torch_parallel_for()(
      0, rows, grain_rows(caches.heads * (a.k.columns + a.v.columns) * dtype_bytes(a.k.dtype)),
      [&](int64_t begin, int64_t end) { table.append(a, begin, end); });
}

const char* kRewrite = "attention_rewrite_";

// Runs inside pages of a pool, and the number of rotations they take.
int64_t check_runs(const Run* runs, int64_t count, const Caches& caches) {
  int64_t turns = 0;
  std::vector<int64_t> sources, targets;
  for (int64_t i = 0; i < count; ++i) {
    const Run& run = runs[i];
    const auto inside = [&](int64_t slot) {
      return slot >= 0 && slot / caches.page_size < caches.pages && run.tokens >= 1 &&
             run.tokens <= caches.page_size - slot % caches.page_size;
    };
    ALIGNOPS_CHECK(inside(run.source) && inside(run.target) && run.turn >= -1, kRewrite,
                   ": runs must stay inside pages of ", caches.page_size, " slots of ",
                   caches.pages, " pages, got (", run.source, ", ", run.target, ", ", run.tokens,
                   ", ", run.turn, ") at ", i);
    turns = std::max(turns, run.turn + 1);
    sources.push_back(run.source / caches.page_size);
    targets.push_back(run.target / caches.page_size);
  }
  std::sort(sources.begin(), sources.end());
  std::sort(targets.begin(), targets.end());
  std::vector<int64_t> both;
  std::set_intersection(sources.begin(), sources.end(), targets.begin(), targets.end(),
                        std::back_inserter(both));
  ALIGNOPS_CHECK(both.empty(), kRewrite, ": runs must not read and write one page, got page ",
                 both.front());
  return turns;
}

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

void check_rotations(const Tensors& rotations, int64_t turns) {
  for (const Tensor& t : rotations) {
    check_device(t, kCpu, kRewrite, "rotations");
    ALIGNOPS_CHECK(t.scalar_type() == ScalarType::Float, kRewrite,
                   ": rotations must be float32, got ", dtype_name(t.scalar_type()));
    ALIGNOPS_CHECK(t.dim() == 3 && t.size(2) == 2 && t.is_contiguous(), kRewrite,
                   ": rotations must be contiguous with shape (rows, F, 2), got ",
                   shape_string(t.sizes()));
    ALIGNOPS_CHECK(t.size(0) >= turns, kRewrite, ": rotations must have ", turns,
                   " rows (for runs), got ", t.size(0));
  }
}

void rewrite_runs(Tensors k, Tensors v, const Tensor& runs, Tensors rotations, Ints rope,
                  Ints rotary_offset, std::vector<bool> interleaved) {
  const char* op = kRewrite;
  const size_t layers = k.size();
  ALIGNOPS_CHECK(v.size() == layers, op, ": v must have ", layers, " tensors (as k), got ",
                 v.size());
  for (const auto& [size, argument] :
       {std::pair{rope.size(), "rope"}, std::pair{rotary_offset.size(), "rotary_offset"},
        std::pair{interleaved.size(), "interleaved"}})
    ALIGNOPS_CHECK(size == layers, op, ": ", argument, " must have ", layers,
                   " entries (one per layer), got ", size);
  check_device(runs, kCpu, op, "runs");
  ALIGNOPS_CHECK(runs.scalar_type() == ScalarType::Long, op, ": runs must be int64, got ",
                 dtype_name(runs.scalar_type()));
  ALIGNOPS_CHECK(runs.dim() == 2 && runs.size(1) == 4 && runs.is_contiguous(), op,
                 ": runs must be contiguous with shape (N, 4), got ", shape_string(runs.sizes()));
  const auto* table_of_runs = reinterpret_cast<const Run*>(runs.const_data_ptr<int64_t>());
  const int64_t count = runs.size(0);
  std::vector<Rewrite> work;
  for (size_t i = 0; i < layers; ++i) {
    const Caches caches = as_caches(k[i], v[i], op);
    check_apart(k[i], op, "k");
    check_apart(v[i], op, "v");
    if (i == 0) check_rotations(rotations, check_runs(table_of_runs, count, caches));
    ALIGNOPS_CHECK(caches.pages == k[0].size(0) && caches.page_size == k[0].size(2), op,
                   ": k must have the same pages in all layers, got shapes ",
                   shape_string(k[0].sizes()), " and ", shape_string(k[i].sizes()));
    ALIGNOPS_CHECK(rope[i] >= -1 && rope[i] < static_cast<int64_t>(rotations.size()), op,
                   ": rope must be -1 or one of ", rotations.size(), " rotations, got ", rope[i]);
    Rewrite w{table_of_runs, nullptr,          {0, rotary_offset[i], interleaved[i]},
              caches.heads,  caches.page_size, caches.k,
              caches.v};
    if (rope[i] >= 0) {
      const Tensor& t = rotations[static_cast<size_t>(rope[i])];
      w.rotary.pairs = t.size(1);
      w.rotations = t.const_data_ptr<float>();
    }
    check_rotary(w.rotary.pairs, rotary_offset[i], caches.k.columns, op);
    work.push_back(w);
  }
  if (count == 0 || layers == 0) return;
  const Kernels& table = kernels();
  const int64_t slots = k[0].size(2);
  const int64_t bytes = slots * work[0].kv_heads * (work[0].k.columns + work[0].v.columns) *
                        dtype_bytes(work[0].k.dtype);
  torch_parallel_for()(
      0, count * static_cast<int64_t>(layers), grain_rows(bytes), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          table.rewrite(work[static_cast<size_t>(i / count)], i % count, i % count + 1);
      });
}

Tensor rotations_of(const Tensor& inv_freq, const Tensor& positions) {
  const char* op = "attention_rotations";
  check_device(inv_freq, kCpu, op, "inv_freq");
  ALIGNOPS_CHECK(inv_freq.scalar_type() == ScalarType::Float, op,
                 ": inv_freq must be float32, got ", dtype_name(inv_freq.scalar_type()));
  ALIGNOPS_CHECK(inv_freq.dim() == 1 && inv_freq.is_contiguous(), op,
                 ": inv_freq must be contiguous with one dimension, got shape ",
                 shape_string(inv_freq.sizes()));
  check_device(positions, kCpu, op, "positions");
  ALIGNOPS_CHECK(positions.scalar_type() == ScalarType::Long, op, ": positions must be int64, got ",
                 dtype_name(positions.scalar_type()));
  const Tensor places =
      positions.is_contiguous() ? positions : torch::stable::contiguous(positions);
  const int64_t pairs = inv_freq.size(0);
  std::vector<int64_t> shape(places.sizes().begin(), places.sizes().end());
  int64_t rows = 1;
  for (const int64_t size : shape) rows *= size;
  shape.push_back(pairs);
  shape.push_back(2);
  Tensor out = torch::stable::new_empty(inv_freq, shape);
  const auto* omega = inv_freq.const_data_ptr<float>();
  const std::vector<double> wide(omega, omega + pairs);
  const auto* place = places.const_data_ptr<int64_t>();
  auto* data = out.mutable_data_ptr<float>();
  torch_parallel_for()(0, rows, grain_rows(8 * pairs), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      rotation(wide.data(), pairs, place[i], data + 2 * pairs * i);
  });
  return out;
}

}  // namespace
}  // namespace alignops::attention

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def(
      "attention_append_(Tensor k_new, Tensor v_new, Tensor plan, int rope, int rotary_offset, "
      "bool interleaved, Tensor(a!) k, Tensor(b!) v) -> ()");
  m.def(
      "attention_rewrite_(Tensor(a!)[] k, Tensor(b!)[] v, Tensor runs, Tensor[] rotations, int[] "
      "rope, int[] rotary_offset, bool[] interleaved) -> ()");
  m.def("attention_rotations(Tensor inv_freq, Tensor positions) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("attention_append_", TORCH_BOX(&alignops::attention::append_rows));
  m.impl("attention_rewrite_", TORCH_BOX(&alignops::attention::rewrite_runs));
  m.impl("attention_rotations", TORCH_BOX(&alignops::attention::rotations_of));
}
