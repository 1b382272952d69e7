// Weights on the GPU: quantization to canonical planes and back, the packed layout, the dense int8
// head.
//
// The quantizer is that of cpu/scalar_quantize.cpp, with the same order of double sums, so that
// codes and scales are bit-identical to the CPU's: 16 threads share a row's scale group, thread i
// takes the blocks b with b mod 16 = i, and their 16 partial sums are folded in halves. All of
// these run once per weight; simple forms that read and write whole sectors are enough.
#include <algorithm>

#include "device.h"
#include "layout.h"

namespace alignops::ternary::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPartials = 16;

__device__ void report(Nonfinite* nonfinite, float value, int64_t index) {
  if (fabsf(value) <= 3.402823466e38f) return;
  atomicAdd(&nonfinite->count, 1ull);
  atomicMin(&nonfinite->first, static_cast<unsigned long long>(index));
}

__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const QuantizeArgs a, const int64_t groups, uint8_t* idx, uint8_t* sign,
                    float* scale, Nonfinite* nonfinite) {
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kPartials;
  if (unit >= a.n * groups) return;
  const int64_t row = unit / groups, group = unit % groups;
  const int thread = static_cast<int>(threadIdx.x) % kPartials,
            half = static_cast<int>(threadIdx.x) % 32 / kPartials;
  const unsigned mask = 0xffffu << (kPartials * half);
  const bool last = group == groups - 1;
  const int64_t blocks = (a.k + 3) / 4, padded = (blocks + 7) / 8 * 8;
  const int64_t begin = group * a.group / 4, end = last ? padded : begin + a.group / 4;

  double partial = 0;
  for (int64_t first = begin / kPartials * kPartials; first < end; first += kPartials) {
    const int64_t b = first + thread;
    const bool inside = b >= begin && b < end;
    float w[4] = {};
    int real = 0, zero = 0;
    if (inside && b < blocks) {
      int64_t smallest = INT64_MAX;
      for (int p = 0; p < 4; ++p) {
        const int64_t c = column_of(b, p, a.stride);
        int64_t magnitude = -1;  // padding lanes lose first
        if (c < a.k) {
          w[p] = load(a.w, a.dtype, row * a.ld + c);
          report(nonfinite, w[p], row * a.k + c);
          magnitude = __float_as_uint(w[p]) & 0x7fffffffu;
          ++real;
        }
        if (magnitude < smallest) {
          smallest = magnitude;
          zero = p;
        }
      }
      double sum = 0;
      for (int p = 0; p < real; ++p)
        if (p != zero) sum += fabs(static_cast<double>(w[p]));
      partial += sum;
    }
    bool negative[3] = {};
    for (int i = 0; i < 3; ++i) negative[i] = w[i + (i >= zero)] < 0;
    const unsigned nibble =
        4 * zero + 2 * (negative[2] != negative[0]) + (negative[1] != negative[0]);
    const unsigned signs = __ballot_sync(mask, negative[0]) >> (kPartials * half);
    const unsigned right = __shfl_down_sync(mask, nibble, 1, kPartials);
    if (inside && thread % 2 == 0)
      idx[row * (padded / 2) + b / 2] = static_cast<uint8_t>(nibble | right << 4);
    if (inside && thread % 8 == 0)
      sign[row * (padded / 8) + b / 8] = static_cast<uint8_t>(signs >> thread);
  }

  for (int step = kPartials / 2; step > 0; step /= 2)
    partial += __shfl_down_sync(mask, partial, step, kPartials);
  const int64_t columns = last ? a.k - group * a.group : a.group;
  const int64_t kept = 3 * (columns / 4) + columns % 4;
  if (thread == 0) scale[unit] = static_cast<float>(partial / static_cast<double>(kept));
}

// One thread per four adjacent columns.
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const DequantizeArgs a, const int64_t quads) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.n * quads) return;
  const int64_t row = i / quads, padded = (quads + 7) / 8 * 8,
                groups = (a.k + a.group - 1) / a.group;
  for (int64_t c = i % quads * 4, end = min(c + 4, a.k); c < end; ++c) {
    const int64_t b = a.stride == 1 ? c / 4 : c / 64 * 16 + c % 16;
    const int p = static_cast<int>(a.stride == 1 ? c % 4 : c % 64 / 16);
    const unsigned low = a.idx[row * (padded / 2) + b / 2] >> 4 * (b % 2) & 15;
    const unsigned high = a.sign[row * (padded / 8) + b / 8] >> b % 8 & 1;
    const float scale = a.scale[row * groups + c / a.group];
    store(a.out, a.out_dtype, row * a.k + c,
          scale * static_cast<float>(lane_value(16 * high + low, p)));
  }
}

// One thread per lane of a tile: 8 blocks of 4 rows.
struct Cell {
  int64_t tile, rows[4], bytes;  // sign bytes of a row
  int64_t column;  // sign byte of the lane's blocks; their idx bytes are 4 column .. 4 column + 3
  int lane;
};

__device__ Cell cell_of(int64_t k, int64_t thread) {
  const int64_t tile = thread / 32, tiles = column_tiles(k);
  const int lane = static_cast<int>(thread % 32);
  Cell cell{tile, {}, (k + 31) / 32, tile % tiles * 4 + lane % 4, lane};
  for (int w = 0; w < 4; ++w) cell.rows[w] = tile / tiles * kTileRows + lane / 4 + 8 * w;
  return cell;
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* idx, const uint8_t* sign, const int64_t n, const int64_t k,
                const int64_t threads, uint32_t* packed) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= threads) return;
  const Cell cell = cell_of(k, thread);
  uint32_t signs = 0;
  for (int w = 0; w < 4; ++w) {
    uint32_t word = 0;
    if (cell.rows[w] < n && cell.column < cell.bytes) {
      const int64_t at = cell.rows[w] * cell.bytes + cell.column;
      for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(idx[4 * at + i]) << (8 * i);
      for (int j = 0; j < kLaneBlocks; ++j)
        signs |= static_cast<uint32_t>(sign[at] >> j & 1) << sign_bit(w, j);
    }
    packed[cell.tile * kTileWords + 4 * cell.lane + w] = word;
  }
  packed[cell.tile * kTileWords + kSignWord + cell.lane] = signs;
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint32_t* packed, const int64_t n, const int64_t k, const int64_t threads,
                  uint8_t* idx, uint8_t* sign) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= threads) return;
  const Cell cell = cell_of(k, thread);
  const uint32_t signs = packed[cell.tile * kTileWords + kSignWord + cell.lane];
  for (int w = 0; w < 4; ++w) {
    if (cell.rows[w] >= n || cell.column >= cell.bytes) continue;
    const int64_t at = cell.rows[w] * cell.bytes + cell.column;
    const uint32_t word = packed[cell.tile * kTileWords + 4 * cell.lane + w];
    for (int i = 0; i < 4; ++i) idx[4 * at + i] = static_cast<uint8_t>(word >> (8 * i));
    uint32_t byte = 0;
    for (int j = 0; j < kLaneBlocks; ++j) byte |= (signs >> sign_bit(w, j) & 1) << j;
    sign[at] = static_cast<uint8_t>(byte);
  }
}

// One thread block per row.
__global__ void __launch_bounds__(kThreads)
    int8_quantize_kernel(const Int8QuantizeArgs a, Nonfinite* nonfinite) {
  __shared__ float warp_amax[kThreads / 32];
  const int64_t row = blockIdx.x;
  float amax = 0.0f;
  for (int64_t c = threadIdx.x; c < a.k; c += kThreads) {
    const float v = load(a.w, a.dtype, row * a.ld + c);
    report(nonfinite, v, row * a.k + c);
    amax = fmaxf(amax, fabsf(v));
  }
  for (int step = 16; step > 0; step /= 2)
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
  if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = amax;
  __syncthreads();
  for (const float other : warp_amax) amax = fmaxf(amax, other);

  const bool zero = amax <= 1e-30f;  // 127 / amax would overflow
  const float inverse = zero ? 0.0f : __fdiv_rn(127.0f, amax);
  if (threadIdx.x == 0) a.scale[row] = zero ? 0.0f : __fdiv_rn(amax, 127.0f);
  for (int64_t c = threadIdx.x; c < a.k; c += kThreads) {
    const float v = rintf(__fmul_rn(load(a.w, a.dtype, row * a.ld + c), inverse));
    a.q[row * a.k + c] = static_cast<int8_t>(fminf(fmaxf(v, -127.0f), 127.0f));
  }
}

}  // namespace

cudaError_t quantize(const QuantizeArgs& a, uint8_t* idx, uint8_t* sign, float* scale,
                     Nonfinite* nonfinite, Launch& launch) {
  const int64_t groups = ceil_div(a.k, a.group);
  return run(launch, "ternary_quantize", quantize_kernel,
             ceil_div(a.n * groups, kThreads / kPartials), kThreads, a, groups, idx, sign, scale,
             nonfinite);
}

cudaError_t dequantize(const DequantizeArgs& a, Launch& launch) {
  const int64_t quads = ceil_div(a.k, 4);
  return run(launch, "ternary_dequantize", dequantize_kernel, ceil_div(a.n * quads, kThreads),
             kThreads, a, quads);
}

cudaError_t pack(const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
                 Launch& launch) {
  const int64_t threads = ceil_div(n, kTileRows) * column_tiles(k) * 32;
  return run(launch, "ternary_pack", pack_kernel, ceil_div(threads, kThreads), kThreads, idx, sign,
             n, k, threads, reinterpret_cast<uint32_t*>(packed));
}

cudaError_t unpack(const uint8_t* packed, int64_t n, int64_t k, uint8_t* idx, uint8_t* sign,
                   Launch& launch) {
  const int64_t threads = ceil_div(n, kTileRows) * column_tiles(k) * 32;
  return run(launch, "ternary_unpack", unpack_kernel, ceil_div(threads, kThreads), kThreads,
             reinterpret_cast<const uint32_t*>(packed), n, k, threads, idx, sign);
}

cudaError_t int8_quantize(const Int8QuantizeArgs& a, Nonfinite* nonfinite, Launch& launch) {
  return run(launch, "int8_quantize", int8_quantize_kernel, a.n, kThreads, a, nonfinite);
}

}  // namespace alignops::ternary::cuda
