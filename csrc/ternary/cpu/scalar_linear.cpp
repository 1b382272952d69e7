// Scalar matmul: the readable ground truth of the contract in kernels.h.
//
// Layout kPlanes, one row per tile. Every output is a sum of table entries: block b of a row looks
// its code up among the 32 sums +-x_a +- x_b +- x_c that the block's four activations can form.
// Work per output: K/4 lookups and additions.
#include <cmath>
#include <cstring>
#include <limits>

#include "scalar.h"

namespace alignops::ternary {
namespace {

constexpr int64_t kTileBlocks = 8;
constexpr int64_t kEntries = 32;

// Bytes of one row: idx plane, then sign plane.
int64_t row_bytes(int64_t blocks) { return blocks / 2 + blocks / 8; }

void pack(const uint8_t* idx, const uint8_t* sign, int64_t n, int64_t k, uint8_t* packed,
          int64_t begin, int64_t end) {
  const int64_t blocks = round_up(ceil_div(k, 4), kTileBlocks);
  for (int64_t r = begin; r < end && r < n; ++r) {
    uint8_t* row = packed + r * row_bytes(blocks);
    std::memcpy(row, idx + r * (blocks / 2), static_cast<size_t>(blocks / 2));
    std::memcpy(row + blocks / 2, sign + r * (blocks / 8), static_cast<size_t>(blocks / 8));
  }
}

void unpack(const uint8_t* packed, int64_t n, int64_t k, uint8_t* idx, uint8_t* sign, int64_t begin,
            int64_t end) {
  const int64_t blocks = round_up(ceil_div(k, 4), kTileBlocks);
  for (int64_t r = begin; r < end && r < n; ++r) {
    const uint8_t* row = packed + r * row_bytes(blocks);
    std::memcpy(idx + r * (blocks / 2), row, static_cast<size_t>(blocks / 2));
    std::memcpy(sign + r * (blocks / 8), row + blocks / 2, static_cast<size_t>(blocks / 8));
  }
}

// Place of lane p of block b of a slot in StageArgs::q.
int8_t* place(const StageArgs& a, int64_t slot, int64_t b, int64_t p) {
  if (a.panel == 0) return a.q + (slot * a.blocks + b) * 4 + p;
  return a.q + ((slot / a.panel * a.blocks + b) * a.panel + slot % a.panel) * 4 + p;
}

void stage_lossless(const StageArgs& a, int64_t t) {
  for (int64_t b = 0; b < a.blocks; ++b)
    for (int64_t p = 0; p < 4; ++p) {
      const int64_t c = column(b, p, a.stride);
      a.f[(t * a.blocks + b) * 4 + p] = c < a.k ? load(a.x, a.dtype, t * a.ld + c) : 0.0f;
    }
}

void stage_quantized(const StageArgs& a, int64_t t) {
  const float q_max = a.act == Act::kA16 ? 32639.0f : 127.0f;
  const int64_t slots = a.act == Act::kA16 ? 2 : 1;
  const int64_t width = a.act == Act::kA8G ? kActGroupColumns : round_up(a.k, 4);
  const int64_t group_blocks = a.act == Act::kA8G ? width / 4 : a.blocks;
  for (int64_t g = 0; g < a.act_groups; ++g) {
    const int64_t c0 = g * width, c1 = c0 + width < a.k ? c0 + width : a.k;
    float amax = 0.0f;
    bool finite = true;
    for (int64_t c = c0; c < c1; ++c) {
      const float v = std::fabs(load(a.x, a.dtype, t * a.ld + c));
      finite = finite && v <= std::numeric_limits<float>::max();
      amax = v > amax ? v : amax;
    }
    const bool zero = !finite || amax <= 1e-30f;
    const float inverse = zero ? 0.0f : q_max / amax;
    a.act_scale[t * a.act_groups + g] = !finite ? std::numeric_limits<float>::quiet_NaN()
                                        : zero  ? 0.0f
                                                : amax / q_max;
    const int64_t b1 = (g + 1) * group_blocks < a.blocks ? (g + 1) * group_blocks : a.blocks;
    for (int64_t b = g * group_blocks; b < b1; ++b)
      for (int64_t p = 0; p < 4; ++p) {
        const int64_t c = column(b, p, a.stride);
        int32_t q = 0;
        if (c < a.k && !zero) {
          const float v = std::rint(load(a.x, a.dtype, t * a.ld + c) * inverse);
          q = static_cast<int32_t>(v > q_max ? q_max : v < -q_max ? -q_max : v);
        }
        if (slots == 1) {
          *place(a, t, b, p) = static_cast<int8_t>(q);
        } else {
          const int32_t low = ((q + 128) & 255) - 128;
          *place(a, 2 * t, b, p) = static_cast<int8_t>((q - low) / 256);
          *place(a, 2 * t + 1, b, p) = static_cast<int8_t>(low);
        }
      }
  }
  if (a.slot_sum == nullptr) return;
  for (int64_t s = slots * t; s < slots * (t + 1); ++s)
    for (int64_t i = 0; i < a.num_segments; ++i) {
      int32_t sum = 0;
      for (int64_t b = a.segments[i].begin; b < a.segments[i].end; ++b)
        for (int64_t p = 0; p < 4; ++p) sum += *place(a, s, b, p);
      a.slot_sum[s * a.num_segments + i] = sum;
    }
}

void stage(const StageArgs& a, int64_t token_begin, int64_t token_end) {
  for (int64_t t = token_begin; t < token_end; ++t)
    if (a.act == Act::kNone) {
      stage_lossless(a, t);
    } else {
      stage_quantized(a, t);
    }
}

// All 32 signed sums of a block: the zeroed lane is skipped, the others are added in lane order.
template <typename In, typename Out>
void build_tables(const In* x, int64_t blocks, Out* out) {
  for (int64_t b = 0; b < blocks; ++b, x += 4, out += kEntries)
    for (int64_t code = 0; code < kEntries; ++code) {
      const int64_t zero = code >> 2 & 3;
      Out sum = 0;
      for (int64_t p = 0, kept = 0; p < 4; ++p) {
        if (p == zero) continue;
        // Sign of the kept lane: the code's sign bit, flipped by r2 (second lane) or r3 (third
        // lane).
        const int64_t relative = kept == 0 ? 0 : code >> (kept - 1) & 1;
        const Out v = static_cast<Out>(x[p]);
        const Out term = ((code >> 4 ^ relative) & 1) != 0 ? static_cast<Out>(-v) : v;
        sum = kept == 0 ? term : static_cast<Out>(sum + term);
        ++kept;
      }
      out[code] = sum;
    }
}

void tables(const int8_t* q, int64_t blocks, uint8_t* out) {
  build_tables(q, blocks, reinterpret_cast<int16_t*>(out));
}

void tables_f32(const float* f, int64_t blocks, uint8_t* out) {
  build_tables(f, blocks, reinterpret_cast<float*>(out));
}

template <typename Sum, typename Entry>
Sum lookup_segment(const uint8_t* row, int64_t blocks, const Entry* table, const Segment& s) {
  Sum sum = 0;
  for (int64_t b = s.begin; b < s.end; ++b) {
    const int code = (row[b >> 1] >> (b & 1) * 4 & 15) | (row[blocks / 2 + (b >> 3)] >> (b & 7) & 1)
                                                             << 4;
    sum += table[b * kEntries + code];
  }
  return sum;
}

void finish(const LinearArgs& a, int64_t t, int64_t r, float acc) {
  if (a.bias != nullptr) acc += load(a.bias, a.bias_dtype, r);
  store(a.y, a.y_dtype, t * a.ldy + r, acc);
}

void lookup(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  const int64_t slots = a.act == Act::kA16 ? 2 : 1;
  const auto* table = reinterpret_cast<const int16_t*>(a.tables);
  for (int64_t r = tile_begin; r < tile_end; ++r) {
    const uint8_t* row = a.packed + r * row_bytes(a.blocks);
    for (int64_t t = 0; t < a.m; ++t) {
      float acc = 0.0f;
      for (int64_t i = 0; i < a.num_segments; ++i) {
        const Segment& s = a.segments[i];
        int32_t sum =
            lookup_segment<int32_t>(row, a.blocks, table + slots * t * a.blocks * kEntries, s);
        if (slots == 2)
          sum = 256 * sum + lookup_segment<int32_t>(row, a.blocks,
                                                    table + (2 * t + 1) * a.blocks * kEntries, s);
        const float scale = a.act_scale[t * a.act_groups + s.act_group] *
                            a.weight_scale[s.weight_group * a.rows + r];
        acc = std::fma(static_cast<float>(sum), scale, acc);
      }
      finish(a, t, r, acc);
    }
  }
}

void lookup_f32(const LinearArgs& a, int64_t tile_begin, int64_t tile_end) {
  const auto* table = reinterpret_cast<const float*>(a.tables);
  for (int64_t r = tile_begin; r < tile_end; ++r) {
    const uint8_t* row = a.packed + r * row_bytes(a.blocks);
    for (int64_t t = 0; t < a.m; ++t) {
      float acc = 0.0f;
      for (int64_t i = 0; i < a.num_segments; ++i) {
        const Segment& s = a.segments[i];
        const float sum = lookup_segment<float>(row, a.blocks, table + t * a.blocks * kEntries, s);
        acc = std::fma(sum, a.weight_scale[s.weight_group * a.rows + r], acc);
      }
      finish(a, t, r, acc);
    }
  }
}

}  // namespace

extern const LinearKernels kLinearScalar = {
    .layout = Layout::kPlanes,
    .tile_rows = 1,
    .tile_blocks = kTileBlocks,
    .lookup_slots = std::numeric_limits<int64_t>::max(),
    .panel = 0,
    .table_bytes = kEntries * sizeof(int16_t),
    .table_bytes_f32 = kEntries * sizeof(float),
    .pack = pack,
    .unpack = unpack,
    .stage = stage,
    .tables = tables,
    .tables_f32 = tables_f32,
    .lookup = lookup,
    .lookup_f32 = lookup_f32,
    .dot = nullptr,
};

}  // namespace alignops::ternary
