// Attention for AVX-512.
#include "attention/cpu/avx512_lanes.h"
#include "attention/cpu/vector_attend.h"

namespace alignops::attention {

const Kernels kAttentionAvx512 = attention_kernels<Avx512Lanes>();

}  // namespace alignops::attention
