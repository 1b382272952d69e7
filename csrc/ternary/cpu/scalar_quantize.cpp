// Scalar quantizer: the readable ground truth of "Sparse-AbsMean" (arXiv 2601.07892, section 3.1)
// and of the 5-bit code.
//
//   z = lane of the smallest |w| in a block of four, the lowest on a tie;  T_z = 0, T_p = w_p < 0 ?
//   -1 : +1 scale = mean of |w| over the lanes that were kept in the scale group
//
// Magnitudes are compared as bit patterns, so a NaN counts as the largest and is never dropped.
// Padding lanes of the last block (k not a multiple of 4) count as smaller than anything; they
// decode to 0 or +1 and meet zero activations.
//
// The scale is a double sum in a fixed order, so that every implementation rounds to the same
// float: the kept |w| of a block in lane order, block b into partial sum b mod 16, the 16 partial
// sums folded in halves (8, 4, 2, 1).
#include <cmath>
#include <cstring>

#include "scalar.h"

namespace alignops::ternary {
namespace {

struct Block {
  float w[4];
  int64_t real;  // lanes from here on are padding
  int64_t zero;  // the lane that becomes 0
};

int64_t magnitude(float v) { return float_bits(v) & 0x7fffffffu; }

Block load_block(const QuantizeArgs& a, int64_t row, int64_t b) {
  Block block{};
  int64_t smallest = INT64_MAX;
  for (int64_t p = 0; p < 4; ++p) {
    const int64_t c = column(b, p, a.stride);
    const bool real = c < a.k;
    if (real) {
      block.w[p] = load(a.w, a.dtype, row * a.ld + c);
      ++block.real;
    }
    const int64_t m = real ? magnitude(block.w[p]) : -1;
    if (m < smallest) {
      smallest = m;
      block.zero = p;
    }
  }
  return block;
}

int value(const Block& block, int64_t p) { return p == block.zero ? 0 : block.w[p] < 0 ? -1 : 1; }

// code = 16 * sign + 4 * z + 2 * r3 + r2: `sign` is set if the first kept lane is -1, r2 and r3 if
// the second and third kept lane differ from the first in sign.
int encode(const Block& block) {
  bool negative[3];
  for (int64_t i = 0; i < 3; ++i) negative[i] = value(block, i + (i >= block.zero)) < 0;
  return 16 * negative[0] + 4 * static_cast<int>(block.zero) + 2 * (negative[2] != negative[0]) +
         (negative[1] != negative[0]);
}

int decode(int code, int64_t p) {
  const int64_t zero = code >> 2 & 3;
  if (p == zero) return 0;
  const int64_t i = p - (p > zero);  // which kept lane
  const bool differs = i == 1 ? code & 1 : i == 2 ? code & 2 : false;
  return differs == (code >= 16) ? 1 : -1;
}

float group_scale(const QuantizeArgs& a, int64_t row, int64_t begin, int64_t end) {
  double partial[16] = {};
  int64_t kept = 0;
  for (int64_t b = begin / 4; b < ceil_div(end, 4); ++b) {
    const Block block = load_block(a, row, b);
    double sum = 0;
    for (int64_t p = 0; p < block.real; ++p)
      if (p != block.zero) {
        sum += std::fabs(static_cast<double>(block.w[p]));
        ++kept;
      }
    partial[b % 16] += sum;
  }
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
  return static_cast<float>(partial[0] / static_cast<double>(kept));
}

void report_nonfinite(const QuantizeArgs& a, int64_t row, QuantizeOut& out) {
  for (int64_t c = 0; c < a.k; ++c)
    if (!std::isfinite(load(a.w, a.dtype, row * a.ld + c))) {
      ++out.nonfinite;
      if (row * a.k + c < out.first) out.first = row * a.k + c;
    }
}

void quantize(const QuantizeArgs& a, QuantizeOut& out, int64_t row_begin, int64_t row_end) {
  const int64_t blocks = ceil_div(a.k, 4), padded = round_up(blocks, 8),
                groups = ceil_div(a.k, a.group);
  for (int64_t row = row_begin; row < row_end; ++row) {
    report_nonfinite(a, row, out);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * a.group, end = begin + a.group < a.k ? begin + a.group : a.k;
      out.scale[row * groups + g] = group_scale(a, row, begin, end);
    }
    uint8_t* idx = out.idx + row * (padded / 2);
    uint8_t* sign = out.sign + row * (padded / 8);
    std::memset(idx, 0, static_cast<size_t>(padded / 2));
    std::memset(sign, 0, static_cast<size_t>(padded / 8));
    for (int64_t b = 0; b < blocks; ++b) {
      const int code = encode(load_block(a, row, b));
      idx[b / 2] = static_cast<uint8_t>(idx[b / 2] | (code & 15) << 4 * (b % 2));
      sign[b / 8] = static_cast<uint8_t>(sign[b / 8] | (code >> 4) << (b % 8));
    }
  }
}

void fake_quant(const FakeQuantArgs& a, int64_t row_begin, int64_t row_end) {
  const QuantizeArgs& in = a.in;
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t begin = 0; begin < in.k; begin += in.group) {
      const int64_t end = begin + in.group < in.k ? begin + in.group : in.k;
      const float scale = group_scale(in, row, begin, end);
      for (int64_t b = begin / 4; b < ceil_div(end, 4); ++b) {
        const Block block = load_block(in, row, b);
        for (int64_t p = 0; p < block.real; ++p) {
          const float v = scale * static_cast<float>(value(block, p)) + a.lambda * block.w[p];
          store(a.out, a.out_dtype, row * in.k + column(b, p, in.stride), v);
        }
      }
    }
}

void dequantize(const DequantizeArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t blocks = ceil_div(a.k, 4), padded = round_up(blocks, 8),
                groups = ceil_div(a.k, a.group);
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t b = 0; b < blocks; ++b) {
      const int idx = a.idx[row * (padded / 2) + b / 2] >> 4 * (b % 2) & 15;
      const int sign = a.sign[row * (padded / 8) + b / 8] >> (b % 8) & 1;
      const float scale = a.scale[row * groups + 4 * b / a.group];
      for (int64_t p = 0; p < 4; ++p) {
        const int64_t c = column(b, p, a.stride);
        if (c < a.k)
          store(a.out, a.out_dtype, row * a.k + c,
                scale * static_cast<float>(decode(16 * sign + idx, p)));
      }
    }
}

}  // namespace

const QuantizeKernels kQuantizeScalar = {quantize, fake_quant, dequantize};

}  // namespace alignops::ternary
