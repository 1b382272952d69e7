// Launchers of the CUDA kernels: raw pointers to device memory, sizes, a stream. No torch, no
// allocation, no synchronization.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../common/cuda_launch.h"
#include "../kernels.h"

namespace alignops::ternary::cuda {

using alignops::cuda::Launch;

// Non-finite elements of a weight: their number and the smallest flat index of one. The caller sets
// {0, UINT64_MAX}.
struct Nonfinite {
  unsigned long long count, first;
};

// Weights (weights.cu). Fields of the arguments that are marked in/out in kernels.h are not used.
cudaError_t quantize(const QuantizeArgs& args, uint8_t* idx, uint8_t* sign, float* scale,
                     Nonfinite* nonfinite, Launch& launch);
cudaError_t dequantize(const DequantizeArgs& args, Launch& launch);
cudaError_t int8_quantize(const Int8QuantizeArgs& args, Nonfinite* nonfinite, Launch& launch);

// Canonical planes to and from the layout of layout.h.
cudaError_t pack(const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
                 Launch& launch);
cudaError_t unpack(const uint8_t* packed, int64_t n, int64_t k, uint8_t* idx, uint8_t* sign,
                   Launch& launch);

// Tokens as the matmul reads them (matmul.cu): in block order, that is lane p of block b at place 4
// b + p, and padded with zeros.
struct StagingArgs {
  const void* x;  // (m, k), row stride `ld` elements
  DType dtype;
  int64_t m, k, ld;
  int64_t stride;
  int64_t places;  // of a staged token, at least k
};

// q = clamp(rint(x * (127 / amax)), -127, 127) and scale = amax / 127 (m, ceil(k / group)), one per
// `group` columns, which are a multiple of 64 or k.
cudaError_t stage_int8(const StagingArgs& args, int64_t group, int8_t* q, float* scale,
                       Launch& launch);
// The values themselves.
cudaError_t stage_copy(const StagingArgs& args, void* out, Launch& launch);

// y = x W^T + b (matmul.cu).
enum class Activations : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

struct MatmulArgs {
  const void* x;  // (m, places), rows aligned to 16 bytes
  Activations x_type;
  int64_t m, ldx;
  int64_t places;          // a multiple of 32, at most k rounded up to 128
  const float* act_scale;  // (m, act_groups); int8 only
  int64_t act_groups;      // 1, or one per kActGroupColumns places

  const void* weights;        // packed codes, or int8 (n, k) row-major
  const float* weight_scale;  // (groups, ld_scale)
  int64_t n, k, ld_scale;
  int64_t group, groups;  // columns per weight scale, a multiple of 32 or k

  const void* bias;  // (n) or null
  DType bias_dtype;
  void* y;  // (m, n) contiguous
  DType y_dtype;
};

cudaError_t ternary_matmul(const MatmulArgs& args, Launch& launch);
cudaError_t int8_matmul(const MatmulArgs& args, Launch& launch);

}  // namespace alignops::ternary::cuda
