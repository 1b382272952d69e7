// Search kernels for AVX-512: long matches are compared in vectors of 64 bytes, the last one
// masked.
#include <immintrin.h>

#include "search.h"

namespace alignops::spans {
namespace {

struct Avx512Compare {
  template <class Token>
  static uint64_t tokens(const uint8_t* a, const Token* b, uint64_t count) {
    const auto* c = reinterpret_cast<const uint8_t*>(b);
    const uint64_t bytes = count * sizeof(Token);
    for (uint64_t i = 0; i < bytes; i += 64) {
      const __mmask64 part = bytes - i < 64 ? (uint64_t{1} << (bytes - i)) - 1 : ~uint64_t{0};
      const __mmask64 different = _mm512_cmpneq_epi8_mask(_mm512_maskz_loadu_epi8(part, a + i),
                                                          _mm512_maskz_loadu_epi8(part, c + i));
      if (different != 0)
        return (i + static_cast<uint64_t>(__builtin_ctzll(different))) / sizeof(Token);
    }
    return count;
  }
};

}  // namespace

const Kernels kSearchAvx512 = search_kernels<Avx512Compare>();

}  // namespace alignops::spans
