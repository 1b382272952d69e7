// Moves of cache slots, positions, masks and trees on CUDA tensors. The schemas are those of
// ops_kv.cpp and ops_layout.cpp. Nothing waits for the GPU, so values are not looked at: see
// cuda/launch.h.
#include <cuda_runtime_api.h>

#include "../common/ops_cuda.h"
#include "cuda/launch.h"
#include "ops_calls.h"

namespace alignops::speculative {
namespace {

// The GPU of a call: that of the first cache, or of its plan if there is none.
Gpu gpu_of(const Tensors& caches, const Tensor& plan, const char* op, const char* argument) {
  return caches.empty() ? Gpu(plan, op, argument) : Gpu(caches[0], op, "caches");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> realign(const Tensor& c, const Tensor& pad,
                                                   const Tensor& emitted) {
  const char* op = "speculative_plan_realign";
  Gpu gpu(c, op, "c");
  const RealignCall call = realign_call(c, pad, emitted, op, gpu.device());
  gpu.check_launch(cuda::plan_realign(call.args, gpu.launch()));
  return call.out;
}

void shift(Tensors caches, const Tensor& src, const Tensor& dst, const Tensor& length,
           int64_t slot_dim) {
  const char* op = "speculative_kv_shift_";
  Gpu gpu = gpu_of(caches, src, op, "src");
  const ShiftCall call = shift_call(caches, src, dst, length, slot_dim, op, gpu.device());
  gpu.check_launch(cuda::shift(call.caches, {call.src, call.dst, call.length, Ints{nullptr, false}},
                               gpu.launch()));
}

void gather(Tensors caches, const Tensor& rows, const Optional& src, const Optional& dst,
            const Optional& length, Tensors out, int64_t slot_dim) {
  const char* op = "speculative_kv_gather_";
  Gpu gpu = gpu_of(caches, rows, op, "rows");
  const GatherCall call =
      gather_call(caches, rows, src, dst, length, out, slot_dim, op, gpu.device());
  gpu.check_launch(cuda::gather(call.from, call.to, call.plan, gpu.launch()));
}

void tree(Tensors caches, const Tensor& base, const Tensor& path, const Tensor& length,
          int64_t slot_dim) {
  const char* op = "speculative_kv_tree_";
  Gpu gpu = gpu_of(caches, base, op, "base");
  const TreeCall call = tree_call(caches, base, path, length, slot_dim, op, gpu.device());
  gpu.check_launch(cuda::tree(call.caches, call.plan, gpu.launch()));
}

void paged_tree(Tensors caches, const Tensor& block_table, const Tensor& base, const Tensor& path,
                const Tensor& length, int64_t slot_dim) {
  const char* op = "speculative_kv_paged_tree_";
  Gpu gpu = gpu_of(caches, base, op, "base");
  const PagedTreeCall call =
      paged_tree_call(caches, block_table, base, path, length, slot_dim, op, gpu.device());
  const int64_t slots = call.pages.per_row * call.pages.page;
  ALIGNOPS_CHECK(slots <= INT32_MAX, op, ": block_table must name less than 2**31 slots of a row, ",
                 "got ", slots);
  gpu.check_launch(cuda::paged_tree(call.caches, call.plan, call.pages, gpu.launch()));
}

void packed(Tensors caches, const Tensor& cu, const Tensor& new_cu, Tensors out) {
  const char* op = "speculative_kv_packed_";
  Gpu gpu = gpu_of(caches, cu, op, "cu");
  const PackedCall call = packed_call(caches, cu, new_cu, out, op, gpu.device());
  gpu.check_launch(cuda::packed(call.from, call.to,
                                {call.cu, call.new_cu, call.rows, call.in_place}, gpu.launch()));
}

void append(Tensors caches, Tensors columns, const Tensor& lens, const Optional& counts,
            int64_t slot_dim) {
  const char* op = "speculative_ragged_append_";
  Gpu gpu = gpu_of(caches, lens, op, "lens");
  const AppendCall call = append_call(caches, columns, lens, counts, slot_dim, op, gpu.device());
  gpu.check_launch(cuda::append(call.from, call.to, {call.lens, call.counts}, gpu.launch()));
}

Tensor positions(const Tensor& c, int64_t q_len, const Optional& pad, const Optional& counts,
                 const Optional& depth) {
  const char* op = "speculative_positions";
  Gpu gpu(c, op, "c");
  const auto [queries, padding] = positions_call(c, q_len, pad, counts, depth, op, gpu.device());
  Tensor out = torch::stable::new_empty(c, {queries.rows, q_len}, ScalarType::Long);
  auto* values = out.mutable_data_ptr<int64_t>();
  gpu.check_launch(padding ? cuda::column_positions(queries.content, padding, queries.rows, q_len,
                                                    values, gpu.launch())
                           : cuda::query_positions(queries, values, gpu.launch()));
  return out;
}

Tensor mask(const Tensor& c, int64_t q_len, int64_t slots, int64_t kind, ScalarType dtype,
            std::vector<int64_t> windows, const Optional& pad, const Optional& first,
            const Optional& counts, const Optional& slot_positions, const Optional& depth,
            const Optional& ancestors) {
  const char* op = "speculative_mask";
  Gpu gpu(c, op, "c");
  MaskArgs args = as_mask(c, q_len, slots, kind, dtype, windows, pad, first, counts, slot_positions,
                          depth, ancestors, op, gpu.device());
  Tensor out = new_mask(c, args, dtype);
  gpu.check_launch(cuda::fill_mask(args, gpu.launch()));
  return out;
}

std::tuple<Tensor, Tensor> cu_seqlens(const Tensor& c, int64_t q_len, const Optional& counts) {
  const char* op = "speculative_cu_seqlens";
  Gpu gpu(c, op, "c");
  OffsetsCall call = offsets_call(c, q_len, counts, op, gpu.device());
  gpu.check_launch(cuda::offsets(call.queries, call.of_queries.mutable_data_ptr<int32_t>(),
                                 call.of_slots.mutable_data_ptr<int32_t>(), gpu.launch()));
  return {call.of_queries, call.of_slots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tree_tables(const Tensor& parent) {
  const char* op = "speculative_tree_tables";
  Gpu gpu(parent, op, "parent");
  const TreeTablesCall call = tree_tables_call(parent, op, gpu.device());
  gpu.check_launch(cuda::fill_tree(call.tables, gpu.launch()));
  return call.out;
}

std::tuple<Tensor, Tensor> tree_select(const Tensor& scores, const Tensor& parents, int64_t n) {
  const char* op = "speculative_tree_select";
  Gpu gpu(scores, op, "scores");
  const SelectCall call = select_call(scores, parents, n, op, gpu.device());
  gpu.check_launch(cuda::select_tree(call.selection, gpu.launch()));
  return call.out;
}

}  // namespace
}  // namespace alignops::speculative

STABLE_TORCH_LIBRARY_IMPL(alignops, CUDA, m) {
  m.impl("speculative_plan_realign", TORCH_BOX(&alignops::speculative::realign));
  m.impl("speculative_kv_shift_", TORCH_BOX(&alignops::speculative::shift));
  m.impl("speculative_kv_gather_", TORCH_BOX(&alignops::speculative::gather));
  m.impl("speculative_kv_tree_", TORCH_BOX(&alignops::speculative::tree));
  m.impl("speculative_kv_paged_tree_", TORCH_BOX(&alignops::speculative::paged_tree));
  m.impl("speculative_kv_packed_", TORCH_BOX(&alignops::speculative::packed));
  m.impl("speculative_ragged_append_", TORCH_BOX(&alignops::speculative::append));
  m.impl("speculative_positions", TORCH_BOX(&alignops::speculative::positions));
  m.impl("speculative_mask", TORCH_BOX(&alignops::speculative::mask));
  m.impl("speculative_cu_seqlens", TORCH_BOX(&alignops::speculative::cu_seqlens));
  m.impl("speculative_tree_tables", TORCH_BOX(&alignops::speculative::tree_tables));
  m.impl("speculative_tree_select", TORCH_BOX(&alignops::speculative::tree_select));
}
