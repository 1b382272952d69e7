// y = x W^T + b for few tokens: packed ternary W, or the dense int8 W of the head.
//
// A thread block computes 32 rows x 8 tokens. Its warps share the columns tile by tile (128
// columns); the partial sums meet in shared memory and are added in warp order, so results do not
// depend on timing, nor on the other tokens.
//   1. each thread loads its 32 blocks of a tile: 16 bytes of idx and 4 bytes of sign, coalesced
//   (layout.h)
//   2. a block's code is the offset into a table of 32 words in shared memory, entry c in bank c,
//   hence free of
//      conflicts: the word holds the block's four lanes as bytes
//   3. tensor cores multiply 16 rows with 8 tokens at a time: int8 (exact int32 sums), or bfloat16
//   / float16 with
//      float32 sums. +1 is the byte 0x01; in 16 bits the high byte of 0.5 (bfloat16) or of 1.0
//      (float16), low byte 0
//   4. float32 tokens are cut into three bfloat16 parts, 8 mantissa bits each, whose products are
//   exact: lossless too
// Bytes per output row: 5 K / 32. Per block and thread: about 2 instructions to extract the code, 1
// table load, 2 to widen (16 bits), 1/4 or 1/2 mma. Tables of activation sums, as on the CPU, would
// need one lookup per token and 256 rows per thread block to pay for building them; tensor cores
// make 8 tokens as cheap as one. A zero weight meets an infinite or NaN activation as a product:
// the outputs of that token are then NaN.
#include <algorithm>
#include <type_traits>

#include "device.h"
#include "layout.h"

namespace alignops::ternary::cuda {
namespace {

constexpr int kTokens = 8;  // of a thread block
constexpr int kMaxWarps = 16;

// ---------------------------------------------------------------------------------------------------------------------
// Weights of one tile, as one thread holds them: blocks j = 0..7 of rows w = 0..3.

struct TernaryWeights {
  template <class Tokens>
  static constexpr float kUnit = Tokens::kUnit;  // what the sums are to be multiplied with
  uint4 idx;
  uint32_t sign;

  // Where this thread's part of the first tile of a row lies.
  using Source = const uint32_t*;
  static __device__ __forceinline__ Source source(const MatmulArgs& a, int64_t row_tile, int lane) {
    return static_cast<const uint32_t*>(a.weights) + row_tile * column_tiles(a.k) * kTileWords +
           lane;
  }

  static __device__ __forceinline__ TernaryWeights load(const MatmulArgs&, Source source, int64_t,
                                                        int tile, int lane) {
    source += static_cast<int64_t>(tile) * kTileWords;
    return {__ldcs(reinterpret_cast<const uint4*>(source + 3 * lane)), __ldcs(source + kSignWord)};
  }

  // The four lanes of a block as bytes.
  __device__ __forceinline__ uint32_t bytes(const uint32_t* table, int w, int j) const {
    const uint32_t row = w == 0 ? idx.x : w == 1 ? idx.y : w == 2 ? idx.z : idx.w;
    const uint32_t offsets = table_offsets(row, sign, w, j % 2);
    return table_word(table, offsets, j / 2);
  }

  // Lanes 0 and 1 (2 and 3) as 16-bit floats: the bytes are their high halves.
  template <class Tokens>
  static __device__ __forceinline__ uint32_t low(uint32_t bytes) {
    return __byte_perm(bytes, 0, 0x1404);
  }
  template <class Tokens>
  static __device__ __forceinline__ uint32_t high(uint32_t bytes) {
    return __byte_perm(bytes, 0, 0x3424);
  }
};

struct Int8Weights {
  template <class Tokens>
  static constexpr float kUnit = 1.0f;
  uint4 words[4][2];

  static __device__ __forceinline__ uint4 load16(const MatmulArgs& a, int64_t row, int64_t column) {
    if (row >= a.n || column >= a.k) return {};
    const int8_t* p = static_cast<const int8_t*>(a.weights) + row * a.k + column;
    if (a.k % 16 == 0 && reinterpret_cast<uintptr_t>(a.weights) % 16 == 0)
      return __ldcs(reinterpret_cast<const uint4*>(p));
    uint32_t word[4] = {};
    for (int i = 0; i < 16 && column + i < a.k; ++i)
      word[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(p[i])) << (8 * (i % 4));
    return {word[0], word[1], word[2], word[3]};
  }

  struct Source {};
  static __device__ __forceinline__ Source source(const MatmulArgs&, int64_t, int) { return {}; }

  static __device__ __forceinline__ Int8Weights load(const MatmulArgs& a, Source, int64_t row_tile,
                                                     int tile, int lane) {
    Int8Weights weights;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t row = row_tile * kTileRows + lane / 4 + 8 * w;
      const int64_t column = static_cast<int64_t>(tile) * kTileColumns + 32 * (lane % 4);
      weights.words[w][0] = load16(a, row, column);
      weights.words[w][1] = load16(a, row, column + 16);
    }
    return weights;
  }

  __device__ __forceinline__ uint32_t bytes(const uint32_t*, int w, int j) const {
    const uint4& v = words[w][j / 4];
    return j % 4 == 0 ? v.x : j % 4 == 1 ? v.y : j % 4 == 2 ? v.z : v.w;
  }

  // Byte i as a float: the mantissa of 2^23 holds it, plus 128.
  static __device__ __forceinline__ float value(uint32_t bytes, int i) {
    return __uint_as_float(__byte_perm(bytes ^ 0x80808080u, 0x4b000000u, 0x7440u + i)) - 8388736.0f;
  }
  template <class Tokens>
  static __device__ __forceinline__ uint32_t low(uint32_t bytes) {
    return Tokens::pair(value(bytes, 0), value(bytes, 1));
  }
  template <class Tokens>
  static __device__ __forceinline__ uint32_t high(uint32_t bytes) {
    return Tokens::pair(value(bytes, 2), value(bytes, 3));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// 32 places of one token, as one thread holds them. `multiply` adds the products of blocks 2 i and
// 2 i + 1 (parity 0 and 1) of two rows, given as bytes[parity][row].

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

struct Int8Tokens {
  using Sum = int32_t;
  static constexpr int kBytes = 1;
  static constexpr uint32_t kPlus = 0x01, kMinus = 0xff;  // the ternary values as bytes
  static constexpr float kUnit = 1.0f;                    // 1 / what kPlus stands for
  uint4 words[2];

  template <class Weights>
  __device__ __forceinline__ void multiply(Sum (&sum)[4], const uint32_t (&bytes)[2][2],
                                           int i) const {
    const uint32_t a[4] = {bytes[0][0], bytes[0][1], bytes[1][0], bytes[1][1]};
    mma_s8(sum, a, word(words[i / 2], 2 * i % 4), word(words[i / 2], 2 * i % 4 + 1));
  }
};

struct BFloat16Tokens {
  using Sum = float;
  static constexpr int kBytes = 2;
  static constexpr uint32_t kPlus = 0x3f, kMinus = 0xbf;
  static constexpr float kUnit = 2.0f;
  uint4 words[4];

  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  template <class Weights>
  __device__ __forceinline__ void multiply(Sum (&sum)[4], const uint32_t (&bytes)[2][2],
                                           int i) const {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const uint32_t* b = bytes[parity];
      const uint32_t a[4] = {Weights::template low<BFloat16Tokens>(b[0]),
                             Weights::template low<BFloat16Tokens>(b[1]),
                             Weights::template high<BFloat16Tokens>(b[0]),
                             Weights::template high<BFloat16Tokens>(b[1])};
      mma_bf16(sum, a, word(words[i], 2 * parity), word(words[i], 2 * parity + 1));
    }
  }
};

struct Float16Tokens {
  using Sum = float;
  static constexpr int kBytes = 2;
  static constexpr uint32_t kPlus = 0x3c, kMinus = 0xbc;
  static constexpr float kUnit = 1.0f;
  uint4 words[4];

  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  template <class Weights>
  __device__ __forceinline__ void multiply(Sum (&sum)[4], const uint32_t (&bytes)[2][2],
                                           int i) const {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const uint32_t* b = bytes[parity];
      const uint32_t a[4] = {
          Weights::template low<Float16Tokens>(b[0]), Weights::template low<Float16Tokens>(b[1]),
          Weights::template high<Float16Tokens>(b[0]), Weights::template high<Float16Tokens>(b[1])};
      mma_fp16(sum, a, word(words[i], 2 * parity), word(words[i], 2 * parity + 1));
    }
  }
};

struct Float32Tokens {
  using Sum = float;
  static constexpr int kBytes = 4;
  static constexpr uint32_t kPlus = 0x3f, kMinus = 0xbf;
  static constexpr float kUnit = 2.0f;
  uint4 words[8];

  // The upper 16 bits of two floats.
  static __device__ __forceinline__ uint32_t upper(uint32_t low, uint32_t high) {
    return __byte_perm(low, high, 0x7632);
  }
  // What truncation to the upper 16 bits leaves; exact. Infinities leave nothing.
  static __device__ __forceinline__ uint32_t rest(uint32_t bits) {
    const uint32_t top = bits & 0xffff0000u;
    return (bits & 0x7f800000u) == 0x7f800000u
               ? 0u
               : __float_as_uint(__uint_as_float(bits) - __uint_as_float(top));
  }
  template <class Weights>
  __device__ __forceinline__ void multiply(Sum (&sum)[4], const uint32_t (&bytes)[2][2],
                                           int i) const {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const uint32_t* b = bytes[parity];
      const uint32_t a[4] = {Weights::template low<BFloat16Tokens>(b[0]),
                             Weights::template low<BFloat16Tokens>(b[1]),
                             Weights::template high<BFloat16Tokens>(b[0]),
                             Weights::template high<BFloat16Tokens>(b[1])};
      uint4 x = words[2 * i + parity];
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        mma_bf16(sum, a, upper(x.x, x.y), upper(x.z, x.w));
        x = {rest(x.x), rest(x.y), rest(x.z), rest(x.w)};
      }
    }
  }
};

template <class Tokens>
__device__ __forceinline__ Tokens load_tokens(const void* x, int64_t place) {
  const auto* p =
      reinterpret_cast<const uint4*>(static_cast<const char*>(x) + place * Tokens::kBytes);
  Tokens tokens;
#pragma unroll
  for (int i = 0; i < 2 * Tokens::kBytes; ++i) tokens.words[i] = __ldg(p + i);
  return tokens;
}

// ---------------------------------------------------------------------------------------------------------------------

// sum[h] is the mma result of rows 16 h .. 16 h + 15: element e belongs to row 16 h + lane / 4 + 8
// (e / 2) and to token 2 (lane % 4) + e % 2.
template <class Weights, class Tokens>
__device__ __forceinline__ void add_tile(typename Tokens::Sum (&sum)[2][4], const Weights& weights,
                                         const Tokens& tokens, const uint32_t* table) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < kLaneBlocks / 2; ++i) {
      const uint32_t bytes[2][2] = {
          {weights.bytes(table, 2 * h, 2 * i), weights.bytes(table, 2 * h + 1, 2 * i)},
          {weights.bytes(table, 2 * h, 2 * i + 1), weights.bytes(table, 2 * h + 1, 2 * i + 1)}};
      tokens.template multiply<Weights>(sum[h], bytes, i);
    }
  }
}

// Registers for 32 warps per multiprocessor; dense weights and float32 tokens hold too much for
// that.
template <class Weights, class Tokens>
constexpr int kBlocksPerSm = std::is_same_v<Weights, TernaryWeights> && Tokens::kBytes < 4 ? 2 : 1;

// kGrouped: more than one weight or activation scale per output; sums are scaled tile by tile.
// Otherwise the whole int32 or float32 sum is scaled once, which makes int8 results exact but for
// that one rounding.
template <class Weights, class Tokens, bool kGrouped>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocksPerSm<Weights, Tokens>)
    matmul_kernel(const MatmulArgs a, const int64_t token_tiles) {
  using Sum = typename Tokens::Sum;
  using Total = std::conditional_t<kGrouped, float, Sum>;
  constexpr float kUnit = Weights::template kUnit<Tokens>;
  __shared__ __align__(256) uint32_t table[32];
  __shared__ Total partial[kMaxWarps][kTokens][kTileRows];

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  if (threadIdx.x < 32) table[lane] = lane_bytes(lane, Tokens::kPlus, Tokens::kMinus);
  __syncthreads();

  const int64_t row_tile = blockIdx.x / token_tiles,
                first_token = blockIdx.x % token_tiles * kTokens;
  const int64_t first_row = row_tile * kTileRows, token = first_token + lane / 4;
  const int tiles = static_cast<int>(column_tiles(a.k));
  // The thread's 32 places of tile i are a row's places from 128 i + 32 (lane % 4) on.
  const int places = token < a.m ? static_cast<int>(a.places) : 0;
  const char* x = static_cast<const char*>(a.x) + (places > 0 ? token * a.ldx : 0) * Tokens::kBytes;

  // Weight scale groups end at multiples of 32 places, which are one thread's. The groups of a tile
  // take turns: threads of other groups multiply zeros.
  const auto group_of = [&](int place) {
    return a.groups == 1 ? 0
                         : min(place / static_cast<int>(a.group), static_cast<int>(a.groups) - 1);
  };

  Sum sum[2][4] = {};
  float total[2][4] = {};
  const auto source = Weights::source(a, row_tile, lane);
  Weights next = {};
  if (warp < tiles) next = Weights::load(a, source, row_tile, warp, lane);
  int next_tile = warp, next_group = kGrouped ? group_of(next_tile * kTileColumns) : 0;
#pragma unroll 1
  while (next_tile < tiles) {
    const Weights weights = next;
    const int tile = next_tile, group = next_group++;
    if (!kGrouped || next_group > group_of((tile + 1) * kTileColumns - 1)) {
      next_tile += warps;
      if (kGrouped) next_group = group_of(next_tile * kTileColumns);
    }
    if (next_tile < tiles) next = Weights::load(a, source, row_tile, next_tile, lane);

    const int place = tile * kTileColumns + 32 * (lane % 4);
    const bool live = place < places && (!kGrouped || group == group_of(place));
    const Tokens tokens = live ? load_tokens<Tokens>(x, place) : Tokens{};
    add_tile<Weights, Tokens>(sum, weights, tokens, table);

    if constexpr (kGrouped) {
      const float* act_scale =
          a.act_scale + (a.act_groups == 1 ? 0 : tile * kTileColumns / kActGroupColumns);
      const float* weight_scale = a.weight_scale + group * a.ld_scale + first_row + lane / 4;
      float unit[2] = {kUnit, kUnit};
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int64_t column = first_token + 2 * (lane % 4) + t;
        if (std::is_same_v<Tokens, Int8Tokens>)
          unit[t] = column < a.m ? act_scale[column * a.act_groups] : 0.0f;
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float scale = first_row + lane / 4 + 8 * w < a.n ? weight_scale[8 * w] : 0.0f;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          Sum& in = sum[w / 2][2 * (w % 2) + t];
          float& out = total[w / 2][2 * (w % 2) + t];
          out = __fmaf_rn(static_cast<float>(in), __fmul_rn(unit[t], scale), out);
          in = 0;
        }
      }
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Total& out = partial[warp][2 * (lane % 4) + e % 2][16 * h + lane / 4 + 8 * (e / 2)];
      if constexpr (kGrouped) {
        out = total[h][e];
      } else {
        out = sum[h][e];
      }
    }
  }
  __syncthreads();

  for (int i = static_cast<int>(threadIdx.x); i < kTokens * kTileRows;
       i += static_cast<int>(blockDim.x)) {
    const int64_t row = first_row + i % kTileRows, column = first_token + i / kTileRows;
    if (row >= a.n || column >= a.m) continue;
    Total value = 0;
    for (int w = 0; w < warps; ++w) value += partial[w][i / kTileRows][i % kTileRows];
    float y = static_cast<float>(value);
    if constexpr (!kGrouped) {
      const float act_scale = std::is_same_v<Tokens, Int8Tokens> ? a.act_scale[column] : kUnit;
      y = __fmul_rn(y, __fmul_rn(act_scale, a.weight_scale[row]));
    }
    if (a.bias != nullptr) y = __fadd_rn(y, load(a.bias, a.bias_dtype, row));
    store(a.y, a.y_dtype, column * a.n + row, y);
  }
}

template <class Weights, class Tokens>
cudaError_t matmul(const MatmulArgs& a, const char* name, Launch& launch) {
  const int64_t token_tiles = ceil_div(a.m, kTokens), tiles = column_tiles(a.k);
  const int64_t grid = ceil_div(a.n, kTileRows) * token_tiles;
  // As many warps as leave all with the same number of tiles, give or take one.
  const int threads = 32 * static_cast<int>(ceil_div(tiles, ceil_div(tiles, kMaxWarps)));
  if constexpr (std::is_same_v<Weights, TernaryWeights> || std::is_same_v<Tokens, Int8Tokens>)
    if (a.groups > 1 || a.act_groups > 1)
      return run(launch, name, matmul_kernel<Weights, Tokens, true>, grid, threads, a, token_tiles);
  return run(launch, name, matmul_kernel<Weights, Tokens, false>, grid, threads, a, token_tiles);
}

template <class Weights>
cudaError_t matmul(const MatmulArgs& a, const char* name, Launch& launch) {
  switch (a.x_type) {
    case Activations::kInt8:
      return matmul<Weights, Int8Tokens>(a, name, launch);
    case Activations::kBFloat16:
      return matmul<Weights, BFloat16Tokens>(a, name, launch);
    case Activations::kFloat16:
      return matmul<Weights, Float16Tokens>(a, name, launch);
    default:
      return matmul<Weights, Float32Tokens>(a, name, launch);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr int kStageThreads = 256;

// One thread block per token and scale group.
__global__ void __launch_bounds__(kStageThreads)
    stage_int8_kernel(const StagingArgs a, const int64_t group, const int64_t groups, int8_t* q,
                      float* scale) {
  __shared__ float warp_amax[kStageThreads / 32];
  const int64_t token = blockIdx.x / groups, g = blockIdx.x % groups;
  const int64_t begin = g * group, end = min(begin + group, a.k);
  const int thread = static_cast<int>(threadIdx.x);

  float amax = 0.0f;  // infinity as soon as one element is infinite or NaN
  for (int64_t c = begin + thread; c < end; c += kStageThreads) {
    const float v = fabsf(load(a.x, a.dtype, token * a.ld + c));
    amax = fmaxf(amax, v <= 3.402823466e38f ? v : INFINITY);
  }
  for (int step = 16; step > 0; step /= 2)
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
  if (thread % 32 == 0) warp_amax[thread / 32] = amax;
  __syncthreads();
  for (const float other : warp_amax) amax = fmaxf(amax, other);

  const bool zero = amax <= 1e-30f || amax == INFINITY;
  const float inverse = zero ? 0.0f : __fdiv_rn(127.0f, amax);
  if (thread == 0)
    scale[blockIdx.x] = amax == INFINITY ? NAN : zero ? 0.0f : __fdiv_rn(amax, 127.0f);
  const int64_t last = g == groups - 1 ? a.places : end;
  for (int64_t place = begin + thread; place < last; place += kStageThreads) {
    const int64_t c = column_of(place / 4, static_cast<int>(place % 4), a.stride);
    const float v =
        zero || c >= a.k ? 0.0f : __fmul_rn(load(a.x, a.dtype, token * a.ld + c), inverse);
    q[token * a.places + place] = static_cast<int8_t>(fminf(fmaxf(rintf(v), -127.0f), 127.0f));
  }
}

template <class Bits>
__global__ void __launch_bounds__(kStageThreads)
    stage_copy_kernel(const StagingArgs a, const int64_t chunks, Bits* out) {
  const int64_t token = blockIdx.x / chunks,
                place = blockIdx.x % chunks * kStageThreads + threadIdx.x;
  if (place >= a.places) return;
  const int64_t c = column_of(place / 4, static_cast<int>(place % 4), a.stride);
  out[token * a.places + place] =
      c < a.k ? static_cast<const Bits*>(a.x)[token * a.ld + c] : Bits{0};
}

}  // namespace

cudaError_t stage_int8(const StagingArgs& a, int64_t group, int8_t* q, float* scale,
                       Launch& launch) {
  const int64_t groups = ceil_div(a.k, group);
  return run(launch, "ternary_stage_int8", stage_int8_kernel, a.m * groups, kStageThreads, a, group,
             groups, q, scale);
}

cudaError_t stage_copy(const StagingArgs& a, void* out, Launch& launch) {
  const int64_t chunks = ceil_div(a.places, kStageThreads);
  return a.dtype == DType::kFloat32
             ? run(launch, "ternary_stage_copy", stage_copy_kernel<uint32_t>, a.m * chunks,
                   kStageThreads, a, chunks, static_cast<uint32_t*>(out))
             : run(launch, "ternary_stage_copy", stage_copy_kernel<uint16_t>, a.m * chunks,
                   kStageThreads, a, chunks, static_cast<uint16_t*>(out));
}

cudaError_t ternary_matmul(const MatmulArgs& a, Launch& launch) {
  return matmul<TernaryWeights>(a, "ternary_matmul", launch);
}

cudaError_t int8_matmul(const MatmulArgs& a, Launch& launch) {
  return matmul<Int8Weights>(a, "int8_matmul", launch);
}

}  // namespace alignops::ternary::cuda
