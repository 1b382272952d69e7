// Ops on ternary weights: quantize, dequantize, fake quantization. Schemas and CPU implementations.
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <tuple>

#include "ops_common.h"

namespace alignops::ternary {
namespace {

Rows check_weight(const Tensor& w, const char* op) {
  ALIGNOPS_CHECK(w.dim() == 2, op, ": w must have shape (n, k), got ", shape_string(w.sizes()));
  return as_rows(w, op, "w");
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& w, int64_t group, int64_t stride) {
  const char* op = "ternary_quantize";
  const Rows rows = check_weight(w, op);
  const int64_t n = rows.rows, k = rows.columns;
  ALIGNOPS_CHECK(n > 0 && k > 0, op, ": w must not be empty, got shape ", shape_string(w.sizes()));
  check_group(k, group, stride, op);

  const int64_t blocks = round_up(ceil_div(k, 4), 8), groups = ceil_div(k, group);
  Tensor idx = torch::stable::new_empty(w, {n, blocks / 2}, ScalarType::Byte);
  Tensor sign = torch::stable::new_empty(w, {n, blocks / 8}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(w, {n, groups}, ScalarType::Float);
  const QuantizeArgs args{rows.data, rows.dtype, n, k, rows.ld, group, stride};
  const QuantizeOut out{idx.mutable_data_ptr<uint8_t>(), sign.mutable_data_ptr<uint8_t>(),
                        scale.mutable_data_ptr<float>(), 0, INT64_MAX};
  QuantizeOut total = out;
  std::mutex mutex;
  const QuantizeKernels& table = *kernels().quantize;
  torch::stable::parallel_for(0, n, grain_rows(k * dtype_bytes(rows.dtype)),
                              [&](int64_t begin, int64_t end) noexcept {
                                QuantizeOut part = out;
                                table.quantize(args, part, begin, end);
                                const std::lock_guard lock(mutex);
                                total.nonfinite += part.nonfinite;
                                total.first = std::min(total.first, part.first);
                              });
  ALIGNOPS_CHECK(total.nonfinite == 0, op, ": w must be finite, got ", total.nonfinite,
                 " NaN or Inf, the first at (row, column) = (", total.first / k, ", ",
                 total.first % k, ")");
  return {idx, sign, scale};
}

Tensor dequantize(const Tensor& idx, const Tensor& sign, const Tensor& scale, int64_t k,
                  int64_t group, int64_t stride, ScalarType dtype) {
  const char* op = "ternary_dequantize";
  ALIGNOPS_CHECK(idx.dim() == 2, op, ": idx must have shape (n, bytes), got ",
                 shape_string(idx.sizes()));
  ALIGNOPS_CHECK(k > 0, op, ": k must be positive, got ", k);
  check_group(k, group, stride, op);
  const int64_t n = idx.size(0), blocks = round_up(ceil_div(k, 4), 8);
  check_layout(idx, ScalarType::Byte, {n, blocks / 2}, op, "idx");
  check_layout(sign, ScalarType::Byte, {n, blocks / 8}, op, "sign");
  check_layout(scale, ScalarType::Float, {n, ceil_div(k, group)}, op, "scale");
  const DType out_dtype = float_dtype(dtype, op, "dtype");

  Tensor out = torch::stable::new_empty(idx, {n, k}, dtype);
  const DequantizeArgs args{idx.const_data_ptr<uint8_t>(),
                            sign.const_data_ptr<uint8_t>(),
                            scale.const_data_ptr<float>(),
                            n,
                            k,
                            group,
                            stride,
                            out.mutable_data_ptr(),
                            out_dtype};
  const QuantizeKernels& table = *kernels().quantize;
  torch::stable::parallel_for(
      0, n, grain_rows(k * dtype_bytes(out_dtype)),
      [&](int64_t begin, int64_t end) noexcept { table.dequantize(args, begin, end); });
  return out;
}

Tensor fake_quant(const Tensor& w, const Tensor& lam, int64_t group, int64_t stride,
                  ScalarType dtype) {
  const char* op = "ternary_fake_quant";
  const Rows rows = check_weight(w, op);
  const int64_t n = rows.rows, k = rows.columns;
  check_layout(lam, ScalarType::Float, {}, op, "lam");
  check_group(k, group, stride, op);
  const DType out_dtype = float_dtype(dtype, op, "dtype");

  Tensor out = torch::stable::new_empty(w, {n, k}, dtype);
  const FakeQuantArgs args{{rows.data, rows.dtype, n, k, rows.ld, group, stride},
                           *lam.const_data_ptr<float>(),
                           out.mutable_data_ptr(),
                           out_dtype};
  const QuantizeKernels& table = *kernels().quantize;
  torch::stable::parallel_for(
      0, n, grain_rows(k * (dtype_bytes(rows.dtype) + dtype_bytes(out_dtype))),
      [&](int64_t begin, int64_t end) noexcept { table.fake_quant(args, begin, end); });
  return out;
}

}  // namespace
}  // namespace alignops::ternary

STABLE_TORCH_LIBRARY_FRAGMENT(alignops, m) {
  m.def(
      "ternary_quantize(Tensor w, int group, int stride) -> (Tensor idx, Tensor sign, Tensor "
      "scale)");
  m.def(
      "ternary_dequantize(Tensor idx, Tensor sign, Tensor scale, int k, int group, int stride, "
      "ScalarType dtype) "
      "-> Tensor");
  m.def(
      "ternary_fake_quant(Tensor w, Tensor lam, int group, int stride, ScalarType dtype) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(alignops, CPU, m) {
  m.impl("ternary_quantize", TORCH_BOX(&alignops::ternary::quantize));
  m.impl("ternary_dequantize", TORCH_BOX(&alignops::ternary::dequantize));
  m.impl("ternary_fake_quant", TORCH_BOX(&alignops::ternary::fake_quant));
}
