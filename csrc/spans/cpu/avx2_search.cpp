// Search kernels for AVX2: long matches are compared in vectors of 32 bytes.
#include <immintrin.h>

#include "search.h"

namespace alignops::spans {
namespace {

struct Avx2Compare {
  template <class Token>
  static uint64_t tokens(const uint8_t* a, const Token* b, uint64_t count) {
    constexpr uint64_t kVector = 32 / sizeof(Token);
    uint64_t i = 0;
    for (; i + kVector <= count; i += kVector) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i * sizeof(Token)));
      const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i));
      const auto equal = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, y)));
      if (equal != 0xFFFFFFFFu)
        return i + static_cast<uint64_t>(__builtin_ctz(~equal)) / sizeof(Token);
    }
    return i + common_by_words(a + i * sizeof(Token), b + i, count - i);
  }
};

}  // namespace

const Kernels kSearchAvx2 = search_kernels<Avx2Compare>();

}  // namespace alignops::spans
