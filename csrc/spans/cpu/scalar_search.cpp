// Search kernels for any machine: text is compared in words of 8 bytes.
#include "search.h"

namespace alignops::spans {
namespace {

struct WordCompare {
  template <class Token>
  static uint64_t tokens(const uint8_t* a, const Token* b, uint64_t count) {
    return common_by_words(a, b, count);
  }
};

}  // namespace

const Kernels kSearchScalar = search_kernels<WordCompare>();

}  // namespace alignops::spans
