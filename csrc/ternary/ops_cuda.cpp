// Ops of the ternary core on CUDA tensors, except fake quantization, which is a Triton kernel. The
// schemas are those of ops_quantize.cpp, ops_linear.cpp and ops_int8.cpp.
//
// Any number of tokens works here, eight at a time; for more than that the Python layer prefers the
// Triton kernels. Only the two quantizers wait for the GPU: they report NaN and Inf.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <tuple>

#include "../common/ops_cuda.h"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "ops_common.h"

namespace alignops::ternary {
namespace {

using cuda::Launch;

constexpr int64_t kCudaLayout = static_cast<int64_t>(Layout::kCuda);

// int32 sums of the integer modes; int32 column numbers in the kernels.
constexpr int64_t kMaxColumnsA8 = 22000000, kMaxColumns = int64_t{1} << 30;

// Counts NaN and Inf on the GPU.
class FiniteCheck {
 public:
  FiniteCheck(const Gpu& gpu, const Tensor& w)
      : gpu_(gpu), memory_(torch::stable::new_empty(w, {2}, ScalarType::Long)) {
    gpu_.check(cudaMemsetAsync(device(), 0, sizeof(unsigned long long), gpu_.stream()),
               "cudaMemsetAsync");
    gpu_.check(cudaMemsetAsync(&device()->first, 0xff, sizeof(unsigned long long), gpu_.stream()),
               "cudaMemsetAsync");
  }

  cuda::Nonfinite* device() const {
    return static_cast<cuda::Nonfinite*>(memory_.mutable_data_ptr());
  }

  void finish(const char* op, int64_t k) const {
    cuda::Nonfinite found{};
    gpu_.check(cudaMemcpyAsync(&found, device(), sizeof found, cudaMemcpyDefault, gpu_.stream()),
               "cudaMemcpyAsync");
    gpu_.check(cudaStreamSynchronize(gpu_.stream()), "cudaStreamSynchronize");
    const auto first = static_cast<int64_t>(found.first);
    ALIGNOPS_CHECK(found.count == 0, op, ": w must be finite, got ", found.count,
                   " NaN or Inf, the first at (row, column) = (", first / k, ", ", first % k, ")");
  }

 private:
  const Gpu& gpu_;
  Tensor memory_;
};

Rows check_weight(const Tensor& w, const char* op) {
  ALIGNOPS_CHECK(w.dim() == 2, op, ": w must have shape (n, k), got ", shape_string(w.sizes()));
  const Rows rows = as_rows(w, op, "w", w.get_device_index());
  ALIGNOPS_CHECK(rows.rows > 0 && rows.columns > 0, op, ": w must not be empty, got shape ",
                 shape_string(w.sizes()));
  return rows;
}

int64_t plane_blocks(int64_t k) { return round_up(ceil_div(k, 4), 8); }

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& w, int64_t group, int64_t stride) {
  const char* op = "ternary_quantize";
  const Rows rows = check_weight(w, op);
  const int64_t n = rows.rows, k = rows.columns, blocks = plane_blocks(k);
  check_group(k, group, stride, op);

  Gpu gpu(w, op, "w");
  const FiniteCheck finite(gpu, w);
  Tensor idx = torch::stable::new_empty(w, {n, blocks / 2}, ScalarType::Byte);
  Tensor sign = torch::stable::new_empty(w, {n, blocks / 8}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(w, {n, ceil_div(k, group)}, ScalarType::Float);
  const QuantizeArgs args{rows.data, rows.dtype, n, k, rows.ld, group, stride};
  gpu.check_launch(cuda::quantize(args, idx.mutable_data_ptr<uint8_t>(),
                                  sign.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>(),
                                  finite.device(), gpu.launch()));
  finite.finish(op, k);
  return {idx, sign, scale};
}

Tensor dequantize(const Tensor& idx, const Tensor& sign, const Tensor& scale, int64_t k,
                  int64_t group, int64_t stride, ScalarType dtype) {
  const char* op = "ternary_dequantize";
  ALIGNOPS_CHECK(idx.dim() == 2, op, ": idx must have shape (n, bytes), got ",
                 shape_string(idx.sizes()));
  ALIGNOPS_CHECK(k > 0, op, ": k must be positive, got ", k);
  check_group(k, group, stride, op);
  Gpu gpu(idx, op, "idx");
  const int64_t n = idx.size(0), blocks = plane_blocks(k);
  check_layout(idx, ScalarType::Byte, {n, blocks / 2}, op, "idx", gpu.device());
  check_layout(sign, ScalarType::Byte, {n, blocks / 8}, op, "sign", gpu.device());
  check_layout(scale, ScalarType::Float, {n, ceil_div(k, group)}, op, "scale", gpu.device());
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
  gpu.check_launch(cuda::dequantize(args, gpu.launch()));
  return out;
}

void check_cuda_layout(int64_t layout, const char* op) {
  ALIGNOPS_CHECK(layout == kCudaLayout, op, ": layout must be ", kCudaLayout,
                 " (CUDA) for tensors on a GPU, got ", layout);
}

int64_t packed_bytes(int64_t n, int64_t k) {
  return ceil_div(n, cuda::kTileRows) * cuda::column_tiles(k) * cuda::kTileBytes;
}

Tensor prepack(const Tensor& idx, const Tensor& sign, int64_t k, int64_t layout) {
  const char* op = "ternary_prepack";
  ALIGNOPS_CHECK(k > 0, op, ": k must be positive, got ", k);
  ALIGNOPS_CHECK(idx.dim() == 2, op, ": idx must have two dimensions, got shape ",
                 shape_string(idx.sizes()));
  check_cuda_layout(layout, op);
  Gpu gpu(idx, op, "idx");
  const int64_t n = idx.size(0), blocks = plane_blocks(k);
  check_layout(idx, ScalarType::Byte, {n, blocks / 2}, op, "idx", gpu.device());
  check_layout(sign, ScalarType::Byte, {n, blocks / 8}, op, "sign", gpu.device());
  Tensor packed = torch::stable::new_empty(idx, {packed_bytes(n, k)});
  gpu.check_launch(cuda::pack(idx.const_data_ptr<uint8_t>(), sign.const_data_ptr<uint8_t>(), n, k,
                              packed.mutable_data_ptr<uint8_t>(), gpu.launch()));
  return packed;
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed, int64_t n, int64_t k, int64_t layout) {
  const char* op = "ternary_unpack";
  ALIGNOPS_CHECK(n > 0, op, ": n must be positive, got ", n);
  ALIGNOPS_CHECK(k > 0, op, ": k must be positive, got ", k);
  check_cuda_layout(layout, op);
  Gpu gpu(packed, op, "packed");
  check_layout(packed, ScalarType::Byte, {packed_bytes(n, k)}, op, "packed", gpu.device());
  Tensor idx = torch::stable::new_empty(packed, {n, plane_blocks(k) / 2});
  Tensor sign = torch::stable::new_empty(packed, {n, plane_blocks(k) / 8});
  gpu.check_launch(cuda::unpack(packed.const_data_ptr<uint8_t>(), n, k,
                                idx.mutable_data_ptr<uint8_t>(), sign.mutable_data_ptr<uint8_t>(),
                                gpu.launch()));
  return {idx, sign};
}

Act cuda_act_mode(int64_t code, int64_t k, const char* op) {
  const Act act = act_mode(code, op);
  ALIGNOPS_CHECK(act != Act::kA16, op,
                 ": act must be 0 (none), 1 (a8) or 2 (a8g) on a GPU, got 3 (a16)");
  const int64_t most = act == Act::kNone ? kMaxColumns : kMaxColumnsA8;
  ALIGNOPS_CHECK(k <= most, op, ": k must be at most ", most, " in this mode, got ", k);
  return act;
}

using Matmul = cudaError_t (*)(const cuda::MatmulArgs&, Launch&);

// Stages the tokens if they are to be int8, or do not lie as the kernel reads them, and multiplies.
// `args` holds the weights, bias and output.
void multiply(Gpu& gpu, const Tensor& x, const Rows& rows, Act act, int64_t stride,
              cuda::MatmulArgs args, Matmul matmul) {
  const int64_t m = rows.rows, k = rows.columns, places = round_up(k, cuda::kTileColumns);
  const cuda::StagingArgs staging{rows.data, rows.dtype, m, k, rows.ld, stride, places};
  args.m = m;
  args.act_groups = 1;
  Tensor staged, scale;
  if (act == Act::kNone) {
    const int64_t bytes = dtype_bytes(rows.dtype);
    const bool direct = stride == 1 && k % 32 == 0 && rows.ld * bytes % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
    args.x_type = static_cast<cuda::Activations>(rows.dtype);
    if (direct) {
      args.x = rows.data;
      args.places = k;
      args.ldx = rows.ld;
    } else {
      staged = torch::stable::new_empty(x, {m, places});
      gpu.check_launch(cuda::stage_copy(staging, staged.mutable_data_ptr(), gpu.launch()));
    }
  } else {
    const int64_t group = act == Act::kA8G ? kActGroupColumns : k;
    args.x_type = cuda::Activations::kInt8;
    args.act_groups = ceil_div(k, group);
    staged = torch::stable::new_empty(x, {m, places}, ScalarType::Char);
    scale = torch::stable::new_empty(x, {m, args.act_groups}, ScalarType::Float);
    args.act_scale = scale.mutable_data_ptr<float>();
    gpu.check_launch(cuda::stage_int8(staging, group, staged.mutable_data_ptr<int8_t>(),
                                      scale.mutable_data_ptr<float>(), gpu.launch()));
  }
  if (args.x == nullptr) {
    args.x = staged.const_data_ptr();
    args.places = args.ldx = places;
  }
  gpu.check_launch(matmul(args, gpu.launch()));
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& scale,
              const std::optional<Tensor>& bias, int64_t n, int64_t k, int64_t group,
              int64_t stride, int64_t act_code, int64_t layout) {
  const char* op = "ternary_linear";
  ALIGNOPS_CHECK(n > 0, op, ": n must be positive, got ", n);
  ALIGNOPS_CHECK(k > 0, op, ": k must be positive, got ", k);
  check_group(k, group, stride, op);
  const Act act = cuda_act_mode(act_code, k, op);
  ALIGNOPS_CHECK(layout == kCudaLayout, op, ": packed must have the layout ", kCudaLayout,
                 " (CUDA) on a GPU, got layout ", layout);
  const int32_t device = packed.is_cuda() ? packed.get_device_index() : x.get_device_index();
  const Rows rows = as_rows(x, op, "x", device);
  ALIGNOPS_CHECK(rows.columns == k, op, ": x must have last dimension K=", k,
                 " (from packed weight), got shape ", shape_string(x.sizes()));
  check_layout(packed, ScalarType::Byte, {packed_bytes(n, k)}, op, "packed", device);
  check_layout(scale, ScalarType::Float, {ceil_div(k, group), round_up(n, 64)}, op, "scale",
               device);
  const Bias bias_arg = as_bias(bias, x, n, op, device);

  Tensor y = new_output(x, n);
  if (rows.rows == 0) return y;
  Gpu gpu(x, op, "x");
  const cuda::MatmulArgs args{.x = nullptr,
                              .x_type = {},
                              .m = 0,
                              .ldx = 0,
                              .places = 0,
                              .act_scale = nullptr,
                              .act_groups = 1,
                              .weights = packed.const_data_ptr(),
                              .weight_scale = scale.const_data_ptr<float>(),
                              .n = n,
                              .k = k,
                              .ld_scale = scale.size(1),
                              .group = group,
                              .groups = scale.size(0),
                              .bias = bias_arg.data,
                              .bias_dtype = bias_arg.dtype,
                              .y = y.mutable_data_ptr(),
                              .y_dtype = rows.dtype};
  multiply(gpu, x, rows, act, stride, args, cuda::ternary_matmul);
  return y;
}

std::tuple<Tensor, Tensor> int8_quantize(const Tensor& w) {
  const char* op = "ternary_int8_quantize";
  const Rows rows = check_weight(w, op);
  const int64_t n = rows.rows, k = rows.columns;
  Gpu gpu(w, op, "w");
  const FiniteCheck finite(gpu, w);
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
                              0};
  gpu.check_launch(cuda::int8_quantize(args, finite.device(), gpu.launch()));
  finite.finish(op, k);
  return {q, scale};
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale,
                   const std::optional<Tensor>& bias, int64_t act_code) {
  const char* op = "ternary_int8_linear";
  ALIGNOPS_CHECK(weight.dim() == 2, op, ": weight must have shape (n, k), got ",
                 shape_string(weight.sizes()));
  const int64_t n = weight.size(0), k = weight.size(1);
  const Act act = cuda_act_mode(act_code, k, op);
  // 127 * 127 * k fits int32.
  ALIGNOPS_CHECK(act == Act::kNone || k <= 131072, op,
                 ": weight must have at most 131072 columns in the integer modes, got ", k);
  const int32_t device = weight.is_cuda() ? weight.get_device_index() : x.get_device_index();
  check_layout(weight, ScalarType::Char, {n, k}, op, "weight", device);
  check_layout(scale, ScalarType::Float, {n}, op, "scale", device);
  const Rows rows = as_rows(x, op, "x", device);
  ALIGNOPS_CHECK(rows.columns == k, op, ": x must have last dimension k=", k,
                 " (from weight), got shape ", shape_string(x.sizes()));
  const Bias bias_arg = as_bias(bias, x, n, op, device);

  Tensor y = new_output(x, n);
  if (rows.rows == 0 || n == 0) return y;
  Gpu gpu(x, op, "x");
  const cuda::MatmulArgs args{.x = nullptr,
                              .x_type = {},
                              .m = 0,
                              .ldx = 0,
                              .places = 0,
                              .act_scale = nullptr,
                              .act_groups = 1,
                              .weights = weight.const_data_ptr(),
                              .weight_scale = scale.const_data_ptr<float>(),
                              .n = n,
                              .k = k,
                              .ld_scale = n,
                              .group = k,
                              .groups = 1,
                              .bias = bias_arg.data,
                              .bias_dtype = bias_arg.dtype,
                              .y = y.mutable_data_ptr(),
                              .y_dtype = rows.dtype};
  multiply(gpu, x, rows, act, 1, args, cuda::int8_matmul);
  return y;
}

}  // namespace
}  // namespace alignops::ternary

STABLE_TORCH_LIBRARY_IMPL(alignops, CUDA, m) {
  m.impl("ternary_quantize", TORCH_BOX(&alignops::ternary::quantize));
  m.impl("ternary_dequantize", TORCH_BOX(&alignops::ternary::dequantize));
  m.impl("ternary_prepack", TORCH_BOX(&alignops::ternary::prepack));
  m.impl("ternary_unpack", TORCH_BOX(&alignops::ternary::unpack));
  m.impl("ternary_linear", TORCH_BOX(&alignops::ternary::linear));
  m.impl("ternary_int8_quantize", TORCH_BOX(&alignops::ternary::int8_quantize));
  m.impl("ternary_int8_linear", TORCH_BOX(&alignops::ternary::int8_linear));
}
