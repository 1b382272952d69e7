// Contract of the ternary core: everything a CPU kernel may know. No torch, no Python, no
// allocation, no exceptions.
//
// Shape letters: N rows (outputs), K columns (inputs), M tokens, B = ceil(K/4) blocks of a row. A
// block is 4 weights that share one 5-bit code (4 idx bits, 1 sign bit); its 4 places are lanes.
// `stride` s: lanes of a block are s columns apart (1, or 16 inside chunks of 64 columns). Only
// quantization and activation staging know about s: every layout and every matmul kernel works on
// blocks in lane order.
//
// Integer modes are exact: I = sum T q is the same number on every ISA, and outputs are formed as
//   acc = 0; for segments in order: acc = fma(float(I_seg), act_scale * weight_scale, acc);
//   y = cast(acc + bias).
// The lossless mode sums table entries ((+-x_a) + (+-x_b)) + (+-x_c), lanes ascending, block after
// block in float32, and applies acc = fma(sum_seg, weight_scale, acc): the same order on every ISA
// and for every batch size.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

namespace alignops::ternary {

enum class Act : int32_t { kNone = 0, kA8 = 1, kA8G = 2, kA16 = 3 };

// Kernel layouts; each holds exactly 5 bytes per 32 weights, rows and columns padded to the tile.
//   kPlanes: row-major; per row the idx bytes (B8/2), then the sign bytes (B8/8);
//     B8 = B rounded up to 8
//   kT2P: tiles of 32 rows x 32 columns for byte shuffles
//   kT5W: tiles of 64 rows x 64 columns for 16-bit permutes
//   kCuda: tiles of 32 rows x 128 columns for the GPU kernels, see cuda/layout.h
enum class Layout : int32_t { kPlanes = 0, kT2P = 1, kT5W = 2, kCuda = 3 };

// Columns that share one activation scale in mode a8g.
inline constexpr int64_t kActGroupColumns = 256;
// int16 partial sums are widened at least this often.
inline constexpr int64_t kFlushBlocks = 64;

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// -------------------------------------------------------------------------------------------------
// Quantization of weights (rows are independent: kernels take a row range).

struct QuantizeArgs {
  const void* w;  // (n, k), row stride `ld` elements, unit column stride
  DType dtype;
  int64_t n, k, ld;
  int64_t group;   // columns per scale group: k, or a multiple of 32 (of 64 for stride 16)
  int64_t stride;  // 1 or 16
};

struct QuantizeOut {
  uint8_t* idx;       // (n, B8/2), padding blocks are code 0
  uint8_t* sign;      // (n, B8/8)
  float* scale;       // (n, groups)
  int64_t nonfinite;  // in/out: NaN or Inf seen in the rows of this call are added
  int64_t first;      // in/out: smallest flat index row*k + column of one, or INT64_MAX
};

struct FakeQuantArgs {
  QuantizeArgs in;
  float lambda;  // W_eff = scale * T + lambda * W
  void* out;     // (n, k) contiguous
  DType out_dtype;
};

struct DequantizeArgs {
  const uint8_t* idx;
  const uint8_t* sign;
  const float* scale;  // (n, groups)
  int64_t n, k, group, stride;
  void* out;  // (n, k) contiguous
  DType out_dtype;
};

struct QuantizeKernels {
  void (*quantize)(const QuantizeArgs&, QuantizeOut&, int64_t row_begin, int64_t row_end);
  void (*fake_quant)(const FakeQuantArgs&, int64_t row_begin, int64_t row_end);
  void (*dequantize)(const DequantizeArgs&, int64_t row_begin, int64_t row_end);
};

// -------------------------------------------------------------------------------------------------
// y = x W^T + b with packed ternary W.

// A run of blocks with one activation scale and one weight scale. Segments are adjacent, cover all
// (padded) blocks and begin at multiples of 8 blocks.
struct Segment {
  int64_t begin, end;    // blocks
  int64_t act_group;     // row of act_scale
  int64_t weight_group;  // row of weight_scale
};

// Activations after staging. "Slots" are what the integer kernels multiply: one per token, or two
// for a16, whose even slot is the high limb and odd slot the low one (I = 256 * I_even + I_odd).
struct StageArgs {
  const void* x;  // (m, k), row stride `ld` elements, unit column stride
  DType dtype;
  int64_t m, k, ld;
  int64_t stride;
  Act act;
  int64_t blocks;  // padded to the column tile of the layout; padding lanes are staged as 0
  const Segment* segments;
  int64_t num_segments;
  int64_t act_groups;
  int64_t panel;      // 0: slot-major (slots, blocks, 4); P: (ceil(slots/P), blocks, P, 4)
  int8_t* q;          // integer modes
  float* f;           // kNone: (m, blocks, 4)
  float* act_scale;   // (m, act_groups)
  int32_t* slot_sum;  // (slots, num_segments): sum of q over the segment; null if not wanted
};

struct LinearArgs {
  const uint8_t* packed;
  const float* weight_scale;  // (weight groups, rows padded to the row tile); padding is 0
  int64_t n, rows;            // rows = n padded to the row tile
  int64_t blocks;             // padded to the column tile
  const Segment* segments;
  int64_t num_segments;
  Act act;
  int64_t m;  // tokens
  const int8_t* q;
  const uint8_t* tables;  // lookup kernels: (slots or tokens, blocks, table bytes)
  const float* act_scale;
  int64_t act_groups;
  const int32_t* slot_sum;
  const void* bias;  // (n) or null
  DType bias_dtype;
  void* y;  // (m, n), row stride `ldy`
  DType y_dtype;
  int64_t ldy;
};

struct LinearKernels {
  Layout layout;
  int64_t tile_rows, tile_blocks;
  int64_t lookup_slots;     // integer modes: lookup up to this many slots, `dot` beyond
  int64_t panel;            // slots per panel of the dot kernel
  int64_t table_bytes;      // of one block, integer tables
  int64_t table_bytes_f32;  // of one block, float32 tables
  // Canonical planes to and from the layout, row tiles [begin, end). Rows beyond n are code 0.
  void (*pack)(const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
               int64_t begin, int64_t end);
  void (*unpack)(const uint8_t* packed, int64_t n, int64_t k, uint8_t* idx, uint8_t* sign,
                 int64_t begin, int64_t end);
  void (*stage)(const StageArgs&, int64_t token_begin, int64_t token_end);
  void (*tables)(const int8_t* q, int64_t blocks, uint8_t* tables);     // one slot, `blocks` blocks
  void (*tables_f32)(const float* f, int64_t blocks, uint8_t* tables);  // one token
  void (*lookup)(const LinearArgs&, int64_t tile_begin, int64_t tile_end);
  void (*lookup_f32)(const LinearArgs&, int64_t tile_begin, int64_t tile_end);
  void (*dot)(const LinearArgs&, int64_t tile_begin, int64_t tile_end);
};

// -------------------------------------------------------------------------------------------------
// Dense int8 head: y = x (scale * Q)^T + b, Q int8 per row.

struct Int8QuantizeArgs {
  const void* w;
  DType dtype;
  int64_t n, k, ld;
  int8_t* q;          // (n, k): rint(w * (127 / amax)), clamped to +-127
  float* scale;       // (n): amax / 127, 0 for an all-zero row
  int64_t nonfinite;  // in/out, as QuantizeOut
  int64_t first;
};

struct Int8LinearArgs {
  const int8_t* w;     // (n, k) contiguous
  const float* scale;  // (n)
  int64_t n, k, m;
  Act act;
  const int8_t* q;          // integer modes: (slots, k_pad), zero padded
  const float* f;           // kNone: (m, k_pad)
  int64_t k_pad;            // k rounded up to 64
  const Segment* segments;  // blocks = 4 columns; weight_group is always 0
  int64_t num_segments;
  const int32_t* slot_sum;  // (slots, num_segments)
  const float* act_scale;   // (m, act_groups)
  int64_t act_groups;
  const void* bias;
  DType bias_dtype;
  void* y;  // (m, n), row stride ldy
  DType y_dtype;
  int64_t ldy;
};

struct Int8Kernels {
  void (*quantize)(Int8QuantizeArgs&, int64_t row_begin, int64_t row_end);
  void (*linear)(const Int8LinearArgs&, int64_t row_begin, int64_t row_end);
};

struct Kernels {
  const QuantizeKernels* quantize;
  const LinearKernels* linear;
  const Int8Kernels* int8;
};

extern const QuantizeKernels kQuantizeScalar, kQuantizeAvx2, kQuantizeAvx512;
extern const LinearKernels kLinearScalar, kLinearAvx2, kLinearAvx512;
extern const Int8Kernels kInt8Scalar, kInt8Avx2, kInt8Avx512;

// Table of the active ISA. Every variant is compared with the scalar one once, on first use; one
// that disagrees is replaced by the next lower level and reported by `self_test_failure()`.
const Kernels& kernels();
// The kernels that read `layout` on this machine, whatever ISA is active, or null.
const LinearKernels* linear_kernels(Layout layout);
const char* self_test_failure();  // nullptr if all is well

}  // namespace alignops::ternary
