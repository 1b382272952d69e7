// Ops of the packed matmul: layouts and y = x W^T + b. Schemas and CPU implementations.
#include <algorithm>
#include <cstdint>
#include <tuple>

#include "ops_common.h"

namespace alignops::ternary {
namespace {

// 256 * I_high + I_low and I itself must fit int32.
constexpr int64_t kMaxColumnsA16 = 87000, kMaxColumnsA8 = 22000000;

// A thread gets at least this many lookups; below, waking it costs more than it saves.
constexpr int64_t kGrainLookups = 256 * 1024;

// Tables of a batch of tokens stay in a level-2 cache.
constexpr int64_t kTableBytes = 512 * 1024;

const LinearKernels& layout_kernels(int64_t layout, const char* op) {
  const LinearKernels* found =
      layout >= 0 && layout <= 2 ? linear_kernels(static_cast<Layout>(layout)) : nullptr;
  ALIGNOPS_CHECK(found != nullptr, op,
                 ": layout must be 0 (planes), 1 (T2P, AVX2) or 2 (T5W, AVX-512) and supported by "
                 "this CPU, got ",
                 layout);
  return *found;
}

// Blocks of a row, and bytes of a packed weight, after padding to the tile.
int64_t padded_blocks(const LinearKernels& table, int64_t k) {
  return round_up(ceil_div(k, 4), table.tile_blocks);
}

int64_t packed_bytes(const LinearKernels& table, int64_t n, int64_t k) {
  return round_up(n, table.tile_rows) * padded_blocks(table, k) / 8 * 5;
}

int64_t plane_blocks(int64_t k) { return round_up(ceil_div(k, 4), 8); }

Tensor prepack(const Tensor& idx, const Tensor& sign, int64_t k, int64_t layout) {
  const char* op = "ternary_prepack";
  ALIGNOPS_CHECK(k > 0, op, ": k must be positive, got ", k);
  ALIGNOPS_CHECK(idx.dim() == 2, op, ": idx must have two dimensions, got shape ",
                 shape_string(idx.sizes()));
  const int64_t n = idx.size(0), blocks = plane_blocks(k);
  check_layout(idx, ScalarType::Byte, {n, blocks / 2}, op, "idx");
  check_layout(sign, ScalarType::Byte, {n, blocks / 8}, op, "sign");
  const LinearKernels& table = layout_kernels(layout, op);
  Tensor packed = torch::stable::new_empty(idx, {packed_bytes(table, n, k)});
  const auto* idx_data = idx.const_data_ptr<uint8_t>();
  const auto* sign_data = sign.const_data_ptr<uint8_t>();
  auto* out = packed.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, ceil_div(n, table.tile_rows),
                              grain_rows(table.tile_rows * blocks / 8 * 5),
                              [&](int64_t begin, int64_t end) noexcept {
                                table.pack(idx_data, sign_data, n, k, out, begin, end);
                              });
  return packed;
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed, int64_t n, int64_t k, int64_t layout) {
  const char* op = "ternary_unpack";
  ALIGNOPS_CHECK(n > 0, op, ": n must be positive, got ", n);
  ALIGNOPS_CHECK(k > 0, op, ": k must be positive, got ", k);
  const LinearKernels& table = layout_kernels(layout, op);
  check_layout(packed, ScalarType::Byte, {packed_bytes(table, n, k)}, op, "packed");
  const int64_t blocks = plane_blocks(k);
  Tensor idx = torch::stable::new_empty(packed, {n, blocks / 2});
  Tensor sign = torch::stable::new_empty(packed, {n, blocks / 8});
  const auto* data = packed.const_data_ptr<uint8_t>();
  auto* idx_data = idx.mutable_data_ptr<uint8_t>();
  auto* sign_data = sign.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, ceil_div(n, table.tile_rows),
                              grain_rows(table.tile_rows * blocks / 8 * 5),
                              [&](int64_t begin, int64_t end) noexcept {
                                table.unpack(data, n, k, idx_data, sign_data, begin, end);
                              });
  return {idx, sign};
}

int64_t slots_per_token(Act act) { return act == Act::kA16 ? 2 : 1; }

// Tables of `count` slots, in parallel if they outgrow the first-level cache.
template <class Build>
void build_tables(int64_t count, int64_t blocks, int64_t table_bytes, const Build& build) {
  constexpr int64_t kChunk = 256;  // blocks
  const int64_t chunks = ceil_div(blocks, kChunk);
  torch::stable::parallel_for(
      0, count * chunks, std::max<int64_t>(1, 4 * kGrainBytes / (kChunk * table_bytes)),
      [&](int64_t begin, int64_t end) noexcept {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = i % chunks * kChunk;
          build(i / chunks * blocks + first, std::min(kChunk, blocks - first));
        }
      });
}

// Tokens [first, first + count) of a call.
void select_tokens(StageArgs& stage, LinearArgs& args, int64_t first, int64_t count) {
  stage.m = args.m = count;
  stage.x = static_cast<const uint8_t*>(stage.x) + first * stage.ld * dtype_bytes(stage.dtype);
  args.y = static_cast<uint8_t*>(args.y) + first * args.ldy * dtype_bytes(args.y_dtype);
}

template <class Kernel>
void for_row_tiles(const LinearKernels& table, const LinearArgs& args, int64_t slots,
                   Kernel kernel) {
  // Tasks of at least kGrainLookups lookups.
  const int64_t lookups = table.tile_rows * args.blocks * slots;
  torch::stable::parallel_for(
      0, ceil_div(args.n, table.tile_rows), std::max<int64_t>(1, kGrainLookups / lookups),
      [&](int64_t begin, int64_t end) noexcept { kernel(args, begin, end); });
}

void stage_tokens(const LinearKernels& table, const StageArgs& stage) {
  torch::stable::parallel_for(
      0, stage.m, grain_rows(stage.blocks * 16),
      [&](int64_t begin, int64_t end) noexcept { table.stage(stage, begin, end); });
}

// Integer modes by decoding and dot products: all tokens in one pass.
void linear_dot(const LinearKernels& table, StageArgs stage, LinearArgs args) {
  const int64_t slots = args.m * slots_per_token(args.act);
  const Scratch<int8_t> q(round_up(slots, table.panel) * args.blocks * 4);
  const Scratch<float> act_scale(args.m * args.act_groups);
  const Scratch<int32_t> slot_sum(slots * args.num_segments);
  stage.panel = table.panel;
  args.q = stage.q = q.data();
  args.act_scale = stage.act_scale = act_scale.data();
  args.slot_sum = stage.slot_sum = slot_sum.data();
  stage_tokens(table, stage);
  for_row_tiles(table, args, slots, table.dot);
}

// By lookup, in batches of tokens whose tables stay in the cache.
void linear_lookup(const LinearKernels& table, const StageArgs& stage, const LinearArgs& args) {
  const bool lossless = args.act == Act::kNone;
  const int64_t table_bytes = lossless ? table.table_bytes_f32 : table.table_bytes;
  const int64_t slots = slots_per_token(args.act), blocks = args.blocks;
  const int64_t token_bytes = slots * blocks * table_bytes;
  const int64_t batch = std::clamp<int64_t>(kTableBytes / token_bytes, 1, args.m);
  const Scratch<int8_t> q(lossless ? 0 : batch * slots * blocks * 4);
  const Scratch<float> f(lossless ? batch * blocks * 4 : 0);
  const Scratch<float> act_scale(batch * args.act_groups);
  const Scratch<uint8_t> tables(batch * token_bytes);
  for (int64_t first = 0; first < args.m; first += batch) {
    StageArgs part = stage;
    LinearArgs part_args = args;
    select_tokens(part, part_args, first, std::min(batch, args.m - first));
    part.q = q.data();
    part.f = f.data();
    part_args.act_scale = part.act_scale = act_scale.data();
    part_args.tables = tables.data();
    stage_tokens(table, part);
    build_tables(part.m * slots, blocks, table_bytes, [&](int64_t block, int64_t count) {
      uint8_t* out = tables.data() + block * table_bytes;
      if (lossless) {
        table.tables_f32(f.data() + block * 4, count, out);
      } else {
        table.tables(q.data() + block * 4, count, out);
      }
    });
    for_row_tiles(table, part_args, part.m * slots, lossless ? table.lookup_f32 : table.lookup);
  }
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scale,
              const std::optional<Tensor>& bias, int64_t n, int64_t k, int64_t group,
              int64_t stride, int64_t act_code, int64_t layout) {
  const char* op = "ternary_linear";
  ALIGNOPS_CHECK(n > 0, op, ": n must be positive, got ", n);
  ALIGNOPS_CHECK(k > 0, op, ": k must be positive, got ", k);
  check_group(k, group, stride, op);
  const Act act = act_mode(act_code, op);
  const LinearKernels& table = *kernels().linear;
  ALIGNOPS_CHECK(layout == static_cast<int64_t>(table.layout), op,
                 ": packed must have the layout of the active instruction set, ",
                 static_cast<int64_t>(table.layout), ", got layout ", layout);
  const Rows rows = as_rows(x, op, "x");
  ALIGNOPS_CHECK(rows.columns == k, op, ": x must have last dimension K=", k,
                 " (from packed weight), got shape ", shape_string(x.sizes()));
  check_layout(packed, ScalarType::Byte, {packed_bytes(table, n, k)}, op, "packed");
  check_layout(scale, ScalarType::Float, {ceil_div(k, group), round_up(n, 64)}, op, "scale");
  const Bias bias_arg = as_bias(bias, x, n, op);
  const int64_t most = act == Act::kA16 ? kMaxColumnsA16 : kMaxColumnsA8;
  ALIGNOPS_CHECK(act == Act::kNone || k <= most, op, ": k must be at most ", most,
                 " in this mode, where sums are 32 bits wide, got ", k);

  Tensor y = new_output(x, n);
  if (rows.rows == 0) return y;
  const int64_t blocks = padded_blocks(table, k);
  const std::vector<Segment> segments = make_segments(k, blocks, group, act);
  const auto num_segments = static_cast<int64_t>(segments.size());
  const int64_t act_groups = act == Act::kA8G ? ceil_div(k, kActGroupColumns) : 1;
  const StageArgs stage{.x = rows.data,
                        .dtype = rows.dtype,
                        .m = rows.rows,
                        .k = k,
                        .ld = rows.ld,
                        .stride = stride,
                        .act = act,
                        .blocks = blocks,
                        .segments = segments.data(),
                        .num_segments = num_segments,
                        .act_groups = act_groups,
                        .panel = 0,
                        .q = nullptr,
                        .f = nullptr,
                        .act_scale = nullptr,
                        .slot_sum = nullptr};
  const LinearArgs args{.packed = packed.const_data_ptr<uint8_t>(),
                        .weight_scale = scale.const_data_ptr<float>(),
                        .n = n,
                        .rows = scale.size(1),
                        .blocks = blocks,
                        .segments = segments.data(),
                        .num_segments = num_segments,
                        .act = act,
                        .m = rows.rows,
                        .q = nullptr,
                        .tables = nullptr,
                        .act_scale = nullptr,
                        .act_groups = act_groups,
                        .slot_sum = nullptr,
                        .bias = bias_arg.data,
                        .bias_dtype = bias_arg.dtype,
                        .y = y.mutable_data_ptr(),
                        .y_dtype = rows.dtype,
                        .ldy = n};
  if (act == Act::kNone || rows.rows * slots_per_token(act) <= table.lookup_slots) {
    linear_lookup(table, stage, args);
  } else {
    linear_dot(table, stage, args);
  }
  return y;
}

}  // namespace
}  // namespace alignops::ternary

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def("ternary_prepack(Tensor idx, Tensor sign, int k, int layout) -> Tensor");
  m.def("ternary_unpack(Tensor packed, int n, int k, int layout) -> (Tensor idx, Tensor sign)");
  m.def(
      "ternary_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int n, int k, "
      "int group, int stride, int act, int layout) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("ternary_prepack", TORCH_BOX(&alignops::ternary::prepack));
  m.impl("ternary_unpack", TORCH_BOX(&alignops::ternary::unpack));
  m.impl("ternary_linear", TORCH_BOX(&alignops::ternary::linear));
}
