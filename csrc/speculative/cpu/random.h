// Random words keyed by integers, and the noise of a race: the same on every device.
//
// Source: Salmon et al. 2011 (Philox4x32-10), arXiv 2408.07978 (shared noise).
#pragma once

#include "common/float16.h"
#include "speculative/kernels.h"

namespace alignops::speculative {
namespace {

// What a random word is for: the second counter of the generator.
enum class Stream : uint32_t {
  kAccept = 0,
  kSample = 1,
  kPropose = 2,
  kRetry = 3,  // lane = trial
  kRace = 4,   // lane = id >> 2, word = id & 3
  kChild = 5,  // lane = rank of the child
  kBlock = 6,
};

struct Words {
  uint32_t word[4];
};

inline Words philox(uint64_t seed, uint32_t position, Stream stream, uint32_t lane) {
  uint32_t counter[4] = {position, static_cast<uint32_t>(stream), lane, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * counter[0];
    const uint64_t second = uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<uint32_t>(second);
    counter[2] = static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<uint32_t>(first);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return {{counter[0], counter[1], counter[2], counter[3]}};
}

// Coefficients of the noise, the constant one first.
inline constexpr uint32_t kNoise[9] = {0x3FB8AA3B, 0x3F38A99D, 0x3EF67A7C, 0x3EB38315, 0x3EC6120C,
                                       0xBE923EBC, 0x3FE608F6, 0xC01B4FF0, 0x400476E5};

// Exponential noise -log2 of a word: the leading zeros are the integer part.
inline float noise(uint32_t word) {
  const int zeros = word == 0 ? 32 : __builtin_clz(word);
  const auto fraction = static_cast<uint32_t>(static_cast<uint64_t>(word) << (zeros + 1));
  const float t = static_cast<float>((uint64_t{1} << 32) - fraction) * 0x1p-33f;
  float value = bits_float(kNoise[8]);
  for (int i = 7; i >= 0; --i) value = value * t + bits_float(kNoise[i]);
  return static_cast<float>(zeros) + t * value;
}

}  // namespace
}  // namespace alignops::speculative
