// Search kernels for AVX-512: long matches are compared in vectors of 64 bytes.
#include <immintrin.h>

#include "search.h"

namespace alignops::spans {
namespace {

struct Avx512Compare {
  template <class Token>
  static uint64_t tokens(const uint8_t* a, const Token* b, uint64_t count) {
    constexpr uint64_t kVector = 64 / sizeof(Token);
    uint64_t i = 0;
    for (; i + kVector <= count; i += kVector) {
      const __mmask64 different = _mm512_cmpneq_epi8_mask(_mm512_loadu_si512(a + i * sizeof(Token)),
                                                          _mm512_loadu_si512(b + i));
      if (different != 0)
        return i + static_cast<uint64_t>(__builtin_ctzll(different)) / sizeof(Token);
    }
    return i + common_by_words(a + i * sizeof(Token), b + i, count - i);
  }
};

}  // namespace

const Kernels kSearchAvx512 = search_kernels<Avx512Compare>();

}  // namespace alignops::spans
