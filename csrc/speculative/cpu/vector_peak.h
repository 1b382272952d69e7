// The largest value of a tile. Floats are compared as the integers of their bits: the largest of
// signed ones is that of the floats if one of them is positive, else the smallest of unsigned ones
// is. The largest unsigned one tells whether there is a NaN with a sign.
#pragma once

#include "speculative/cpu/vector_weights.h"

namespace alignops::speculative {
namespace {

template <DType kType>
struct Bits {
  using Word = uint16_t;
  static constexpr Word kOne = kType == DType::kBFloat16 ? 0x3f80 : 0x3c00;
  static constexpr Word kInfinity = kType == DType::kBFloat16 ? 0x7f80 : 0x7c00, kSign = 0x8000;
};

template <>
struct Bits<DType::kFloat32> {
  using Word = uint32_t;
  static constexpr Word kOne = 0x3f800000, kInfinity = 0x7f800000, kSign = 0x80000000;
};

// combine(accumulator, words, number) for the words [begin, end) in two alternating accumulators;
// what lies beyond the end is -inf.
template <class Packed, class Word, class Combine>
[[gnu::always_inline]] inline void each_words(const Word* row, int64_t begin, int64_t end,
                                              Word beyond, Combine combine) {
  int64_t i = begin;
  for (; i + 2 * Packed::kCount <= end; i += 2 * Packed::kCount) {
    combine(Packed::load(row + i), 0, i);
    combine(Packed::load(row + i + Packed::kCount), 1, i + Packed::kCount);
  }
  for (; i < end; i += Packed::kCount)
    combine(
        end - i >= Packed::kCount ? Packed::load(row + i) : Packed::load(row + i, end - i, beyond),
        0, i);
}

// best, place and bad of a tile; of probabilities also those outside [0, 1] are bad.
template <class S, DType kType, bool kGiven>
void peak_of(const Law& law, int64_t tile, TileStats& out) {
  using B = Bits<kType>;
  using Word = typename B::Word;
  using Packed = typename S::template Packed<Word>;
  constexpr Word kNegative = B::kSign | B::kInfinity;
  const Range ids = ids_of(law, tile);
  const Word* row = static_cast<const Word*>(law.data);
  Packed positive[2] = {Packed::all(kNegative), Packed::all(kNegative)};
  Packed any[2] = {Packed::all(0), Packed::all(0)};
  each_words<Packed, Word>(row, ids.begin, ids.end, kGiven ? 0 : kNegative,
                           [&](Packed w, int j, int64_t) {
                             positive[j] = Packed::largest_signed(positive[j], w);
                             any[j] = Packed::largest(any[j], w);
                           });
  Word best = Packed::largest_signed(positive[0], positive[1]).top_signed();
  const Word top = Packed::largest(any[0], any[1]).top();
  out.bad = 0;
  if (kGiven && top > B::kOne) {
    for (int64_t v = ids.begin; v < ids.end; ++v)
      if (!(load(law, v) >= 0.0f && load(law, v) <= 1.0f)) out.bad = 1;  // else it is -0
  } else {
    out.bad = top > kNegative || ((best & B::kSign) == 0 && best >= B::kInfinity);
  }
  if ((best & B::kSign) != 0) {
    Packed least[2] = {Packed::all(kNegative), Packed::all(kNegative)};
    each_words<Packed, Word>(row, ids.begin, ids.end, kNegative, [&](Packed w, int j, int64_t) {
      least[j] = Packed::smallest(least[j], w);
    });
    best = Packed::smallest(least[0], least[1]).bottom();
  }
  // 0 and -0 are equal.
  const Packed wanted = Packed::all(best);
  const Packed other = Packed::all((best & ~B::kSign) == 0 ? best ^ B::kSign : best);
  out.place = 0;
  for (int64_t v = ids.begin; v < ids.end; v += Packed::kCount) {
    const Packed w = ids.end - v >= Packed::kCount ? Packed::load(row + v)
                                                   : Packed::load(row + v, ids.end - v, kNegative);
    const uint64_t hit = Packed::equal(w, wanted, other);
    if (hit == 0) continue;
    out.place = static_cast<int32_t>(v - ids.begin + __builtin_ctzll(hit) / Packed::kHitBits);
    break;
  }
  out.best = load(law, ids.begin + out.place);
}

}  // namespace
}  // namespace alignops::speculative
