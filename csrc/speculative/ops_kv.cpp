// Moves of cache slots. Schemas and CPU implementations: every value of a plan is checked before
// any byte moves.
#include "ops_calls.h"

namespace alignops::speculative {
namespace {

void apply(const Table& from, const Table& to, const Plan& plan) {
  const Transfer transfer(from, to, plan);
  torch::stable::parallel_for(
      0, transfer.strips(), grain_rows(2 * transfer.bytes_per_strip()),
      [&](int64_t begin, int64_t end) noexcept { transfer.run(begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> realign(const Tensor& c, const Tensor& pad,
                                                   const Tensor& emitted) {
  const char* op = "speculative_plan_realign";
  const RealignCall call = realign_call(c, pad, emitted, op);
  plan_realign(op, call.args);
  return call.out;
}

void shift(Tensors caches, const Tensor& src, const Tensor& dst, const Tensor& length,
           int64_t slot_dim) {
  const char* op = "speculative_kv_shift_";
  const ShiftCall call = shift_call(caches, src, dst, length, slot_dim, op);
  if (caches.empty()) return;
  apply(call.caches, call.caches,
        plan_shift(op, call.src, call.dst, call.length, call.rows, slots_of(call.caches)));
}

void gather(Tensors caches, const Tensor& rows, const Optional& src, const Optional& dst,
            const Optional& length, Tensors out, int64_t slot_dim) {
  const char* op = "speculative_kv_gather_";
  const GatherCall call = gather_call(caches, rows, src, dst, length, out, slot_dim, op);
  if (caches.empty()) return;
  apply(call.from, call.to, plan_gather(op, call.plan));
}

void tree(Tensors caches, const Tensor& base, const Tensor& path, const Tensor& length,
          int64_t slot_dim) {
  const char* op = "speculative_kv_tree_";
  const TreeCall call = tree_call(caches, base, path, length, slot_dim, op);
  if (caches.empty()) return;
  apply(call.caches, call.caches, plan_tree(op, call.plan, slots_of(call.caches)));
}

void paged_tree(Tensors caches, const Tensor& block_table, const Tensor& base, const Tensor& path,
                const Tensor& length, int64_t slot_dim) {
  const char* op = "speculative_kv_paged_tree_";
  const PagedTreeCall call = paged_tree_call(caches, block_table, base, path, length, slot_dim, op);
  if (caches.empty()) return;
  apply(call.caches, call.caches, plan_paged_tree(op, call.plan, call.pages));
}

void packed(Tensors caches, const Tensor& cu, const Tensor& new_cu, Tensors out) {
  const char* op = "speculative_kv_packed_";
  const PackedCall call = packed_call(caches, cu, new_cu, out, op);
  if (caches.empty()) return;
  apply(call.from, call.to,
        plan_packed(op, call.cu, call.new_cu, call.rows, slots_of(call.from), slots_of(call.to),
                    call.in_place));
}

void append(Tensors caches, Tensors columns, const Tensor& lens, const Optional& counts,
            int64_t slot_dim) {
  const char* op = "speculative_ragged_append_";
  const AppendCall call = append_call(caches, columns, lens, counts, slot_dim, op);
  if (caches.empty()) return;
  apply(call.from, call.to,
        plan_append(op, call.lens, call.counts, call.rows, call.columns, slots_of(call.to)));
}

}  // namespace
}  // namespace alignops::speculative

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def(
      "speculative_plan_realign(Tensor c, Tensor pad, Tensor emitted) -> (Tensor src, Tensor dst, "
      "Tensor length, Tensor new_pad)");
  m.def(
      "speculative_kv_shift_(Tensor(a!)[] caches, Tensor src, Tensor dst, Tensor length, int "
      "slot_dim) -> ()");
  m.def(
      "speculative_kv_gather_(Tensor[] caches, Tensor rows, Tensor? src, Tensor? dst, Tensor? "
      "length, Tensor(a!)[] out, int slot_dim) -> ()");
  m.def(
      "speculative_kv_tree_(Tensor(a!)[] caches, Tensor base, Tensor path, Tensor length, int "
      "slot_dim) -> ()");
  m.def(
      "speculative_kv_paged_tree_(Tensor(a!)[] caches, Tensor block_table, Tensor base, Tensor "
      "path, Tensor length, int slot_dim) -> ()");
  m.def(
      "speculative_kv_packed_(Tensor[] caches, Tensor cu, Tensor new_cu, Tensor(a!)[] out) -> ()");
  m.def(
      "speculative_ragged_append_(Tensor(a!)[] caches, Tensor[] new, Tensor lens, Tensor? counts, "
      "int slot_dim) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("speculative_plan_realign", TORCH_BOX(&alignops::speculative::realign));
  m.impl("speculative_kv_shift_", TORCH_BOX(&alignops::speculative::shift));
  m.impl("speculative_kv_gather_", TORCH_BOX(&alignops::speculative::gather));
  m.impl("speculative_kv_tree_", TORCH_BOX(&alignops::speculative::tree));
  m.impl("speculative_kv_paged_tree_", TORCH_BOX(&alignops::speculative::paged_tree));
  m.impl("speculative_kv_packed_", TORCH_BOX(&alignops::speculative::packed));
  m.impl("speculative_ragged_append_", TORCH_BOX(&alignops::speculative::append));
}
