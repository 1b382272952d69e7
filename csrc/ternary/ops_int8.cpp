// Ops of the dense int8 head: quantize a weight per row, multiply by it. Schemas and CPU
// implementations.
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <tuple>

#include "ops_common.h"

namespace alignops::ternary {
namespace {

// 256 * I_high + I_low is formed from two int32 sums, each at most 128 * 127 * k.
constexpr int64_t kMaxColumns = 131072;

std::tuple<Tensor, Tensor> int8_quantize(const Tensor& w) {
  const char* op = "ternary_int8_quantize";
  ALIGNOPS_CHECK(w.dim() == 2, op, ": w must have shape (n, k), got ", shape_string(w.sizes()));
  const Rows rows = as_rows(w, op, "w");
  const int64_t n = rows.rows, k = rows.columns;
  ALIGNOPS_CHECK(n > 0 && k > 0, op, ": w must not be empty, got shape ", shape_string(w.sizes()));

  Tensor q = torch::stable::new_empty(w, {n, k}, ScalarType::Char);
  Tensor scale = torch::stable::new_empty(w, {n}, ScalarType::Float);
  const Int8QuantizeArgs args{rows.data,
                              rows.dtype,
                              n,
                              k,
                              rows.ld,
                              q.mutable_data_ptr<int8_t>(),
                              scale.mutable_data_ptr<float>(),
                              0,
                              INT64_MAX};
  Int8QuantizeArgs total = args;
  std::mutex mutex;
  const Int8Kernels& table = *kernels().int8;
  torch::stable::parallel_for(0, n, grain_rows(k * dtype_bytes(rows.dtype)),
                              [&](int64_t begin, int64_t end) noexcept {
                                Int8QuantizeArgs part = args;
                                table.quantize(part, begin, end);
                                const std::lock_guard lock(mutex);
                                total.nonfinite += part.nonfinite;
                                total.first = std::min(total.first, part.first);
                              });
  ALIGNOPS_CHECK(total.nonfinite == 0, op, ": w must be finite, got ", total.nonfinite,
                 " NaN or Inf, the first at (row, column) = (", total.first / k, ", ",
                 total.first % k, ")");
  return {q, scale};
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale,
                   const std::optional<Tensor>& bias, int64_t act_code) {
  const char* op = "ternary_int8_linear";
  const Act act = act_mode(act_code, op);
  ALIGNOPS_CHECK(weight.dim() == 2, op, ": weight must have shape (n, k), got ",
                 shape_string(weight.sizes()));
  const int64_t n = weight.size(0), k = weight.size(1);
  check_layout(weight, ScalarType::Char, {n, k}, op, "weight");
  check_layout(scale, ScalarType::Float, {n}, op, "scale");
  ALIGNOPS_CHECK(act == Act::kNone || k <= kMaxColumns, op, ": weight must have at most ",
                 kMaxColumns, " columns in the integer modes, got ", k);
  const Rows rows = as_rows(x, op, "x");
  ALIGNOPS_CHECK(rows.columns == k, op, ": x must have last dimension k=", k,
                 " (from weight), got shape ", shape_string(x.sizes()));
  const Bias bias_arg = as_bias(bias, x, n, op);

  Tensor y = new_output(x, n);
  const int64_t m = rows.rows;
  if (m == 0 || n == 0) return y;

  const int64_t k_pad = round_up(k, 64), slots = act == Act::kA16 ? 2 * m : m;
  const std::vector<Segment> segments = make_segments(k, k_pad / 4, k, act);
  const auto num_segments = static_cast<int64_t>(segments.size());
  const int64_t act_groups = act == Act::kA8G ? num_segments : 1;
  const bool lossless = act == Act::kNone;
  const Scratch<int8_t> q(lossless ? 0 : slots * k_pad);
  const Scratch<float> f(lossless ? m * k_pad : 0);
  const Scratch<float> act_scale(m * act_groups);
  const Scratch<int32_t> slot_sum(slots * num_segments);

  const Kernels& table = kernels();
  const StageArgs stage{rows.data,
                        rows.dtype,
                        m,
                        k,
                        rows.ld,
                        1,
                        act,
                        k_pad / 4,
                        segments.data(),
                        num_segments,
                        act_groups,
                        0,
                        q.data(),
                        f.data(),
                        act_scale.data(),
                        slot_sum.data()};
  torch::stable::parallel_for(
      0, m, grain_rows(k * dtype_bytes(rows.dtype)),
      [&](int64_t begin, int64_t end) noexcept { table.linear->stage(stage, begin, end); });
  const Int8LinearArgs args{weight.const_data_ptr<int8_t>(),
                            scale.const_data_ptr<float>(),
                            n,
                            k,
                            m,
                            act,
                            q.data(),
                            f.data(),
                            k_pad,
                            segments.data(),
                            num_segments,
                            slot_sum.data(),
                            act_scale.data(),
                            act_groups,
                            bias_arg.data,
                            bias_arg.dtype,
                            y.mutable_data_ptr(),
                            rows.dtype,
                            n};
  torch::stable::parallel_for(
      0, n, grain_rows(k * std::max<int64_t>(1, slots / 4)),
      [&](int64_t begin, int64_t end) noexcept { table.int8->linear(args, begin, end); });
  return y;
}

}  // namespace
}  // namespace alignops::ternary

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def("ternary_int8_quantize(Tensor w) -> (Tensor q, Tensor scale)");
  m.def(
      "ternary_int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int act) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("ternary_int8_quantize", TORCH_BOX(&alignops::ternary::int8_quantize));
  m.impl("ternary_int8_linear", TORCH_BOX(&alignops::ternary::int8_linear));
}
