// Attention over the segments of a plan. Schemas and CPU implementation.
#include <algorithm>
#include <cstdint>
#include <optional>

#include "attention/call.h"
#include "attention/ops_plan.h"
#include "common/torch_parallel.h"

namespace alignops::attention {
namespace {

using Optional = std::optional<Tensor>;

// Lanes that are of use now.
int64_t lanes_of(const Partition& part) {
  return std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(part.tasks, 1));
}

void concurrent(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& plan,
                const Optional& sinks, int64_t rope, int64_t rotary_offset, bool interleaved,
                double scale, double softcap, int64_t window, const Tensor& out,
                const Optional& lse, const Optional& mass, const Tensor& scratch) {
  const char* op = "attention_concurrent_";
  Attend a{};
  a.q = as_packed(q, op, "q");
  const Caches caches = as_caches(k, v, op);
  a.k = caches.k;
  a.v = caches.v;
  const int64_t rows = q.size(0), q_heads = q.size(1);
  ALIGNOPS_CHECK(k.scalar_type() == q.scalar_type() || q.scalar_type() == ScalarType::Float, op,
                 ": k must be ", dtype_name(q.scalar_type()), " (as q), got ",
                 dtype_name(k.scalar_type()));
  ALIGNOPS_CHECK(q.size(2) == a.k.columns, op, ": q must have ", a.k.columns,
                 " columns (as k), got shape ", shape_string(q.sizes()));
  ALIGNOPS_CHECK(q_heads >= 1 && q_heads % caches.heads == 0, op, ": q must have a multiple of ",
                 caches.heads, " heads (those of k), got ", q_heads);
  ALIGNOPS_CHECK(softcap >= 0, op, ": softcap must be 0 (none) or positive, got ", softcap);
  ALIGNOPS_CHECK(window >= 0 && window <= kMaxNumber, op,
                 ": window must be 0 (none) or positive, got ", window);
  if (sinks.has_value()) {
    check_layout(*sinks, ScalarType::Float, {q_heads}, op, "sinks");
    a.sinks = sinks->const_data_ptr<float>();
  }
  check_layout(out, q.scalar_type(), {rows, q_heads, a.v.columns}, op, "out");
  if (lse.has_value()) check_layout(*lse, ScalarType::Float, {rows, q_heads}, op, "lse");
  check_device(scratch, kCpu, op, "scratch");
  ALIGNOPS_CHECK(
      scratch.scalar_type() == ScalarType::Byte && scratch.dim() == 1 && scratch.is_contiguous(),
      op, ": scratch must be contiguous uint8 with one dimension, got ",
      dtype_name(scratch.scalar_type()), " of shape ", shape_string(scratch.sizes()));
  a.plan = as_plan(plan, caches.pages, op);
  check_page_size(a.plan, caches, op);
  const Header& h = a.plan.header;
  ALIGNOPS_CHECK(rows == h.rows, op, ": q must have ", h.rows, " rows (as plan), got ", rows);
  if (mass.has_value())
    check_layout(*mass, ScalarType::Float, {rows, q_heads, h.blocks}, op, "mass");
  a.rotary = as_rotary(a.plan, rope, rotary_offset, interleaved, a.k.columns, op);
  a.rope = rope;
  a.kv_heads = caches.heads;
  a.group = q_heads / caches.heads;
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.window = window;
  const Partition part(h, a.kv_heads, a.group);
  const ScratchLayout layout(h, part, a.kv_heads, a.group, a.k.columns, a.v.columns, a.rotary.pairs,
                             mass.has_value());
  const int64_t lanes = std::min(lanes_of(part), layout.lanes_in(scratch.size(0)));
  ALIGNOPS_CHECK(lanes >= 1, op, ": scratch must have at least ", layout.bytes(1), " bytes, got ",
                 scratch.size(0));
  if (rows == 0) return;
  a.out = {static_cast<char*>(out.mutable_data_ptr()), a.q.dtype, q_heads * a.v.columns,
           a.v.columns};
  if (lse.has_value()) a.lse = lse->mutable_data_ptr<float>();
  if (mass.has_value()) a.mass = mass->mutable_data_ptr<float>();
  Call(kernels(), a, part, layout, static_cast<char*>(scratch.mutable_data_ptr()), lanes)
      .run(torch_parallel_for());
}

int64_t scratch_bytes(const Tensor& plan, int64_t q_heads, int64_t kv_heads, int64_t v_head_dim,
                      bool mass) {
  const char* op = "attention_scratch";
  ALIGNOPS_CHECK(kv_heads >= 1 && q_heads >= kv_heads && q_heads % kv_heads == 0, op,
                 ": q_heads must be a multiple of kv_heads=", kv_heads, ", got ", q_heads);
  ALIGNOPS_CHECK(v_head_dim >= 1 && v_head_dim <= kMaxColumns, op, ": v_head_dim must be in 1..",
                 kMaxColumns, ", got ", v_head_dim);
  const PlanView view = as_plan(plan, kMaxNumber, op);
  const int64_t group = q_heads / kv_heads;
  const Partition part(view.header, kv_heads, group);
  // The plan does not know the head size of keys.
  return ScratchLayout(view.header, part, kv_heads, group, kMaxColumns, v_head_dim, kMaxColumns / 2,
                       mass)
      .bytes(lanes_of(part));
}

}  // namespace
}  // namespace alignops::attention

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def(
      "attention_concurrent_(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor? sinks, int rope, "
      "int rotary_offset, bool interleaved, float scale, float softcap, int window, Tensor(a!) "
      "out, Tensor(b!)? lse, Tensor(c!)? mass, Tensor(d!) scratch) -> ()");
  m.def(
      "attention_scratch(Tensor plan, int q_heads, int kv_heads, int v_head_dim, bool mass) -> "
      "SymInt");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("attention_concurrent_", TORCH_BOX(&alignops::attention::concurrent));
  m.impl("attention_scratch", TORCH_BOX(&alignops::attention::scratch_bytes));
}
