// Attention for AVX2.
#include "attention/cpu/avx2_lanes.h"
#include "attention/cpu/vector_attend.h"

namespace alignops::attention {

const Kernels kAttentionAvx2 = attention_kernels<Avx2Lanes>();

}  // namespace alignops::attention
