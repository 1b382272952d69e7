// What the kernels need beyond plain CUDA C++: element access by dtype, tensor-core products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.h"

namespace alignops::ternary::cuda {

using alignops::cuda::run;

__device__ __forceinline__ float load(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ void store(void* p, DType dtype, int64_t i, float v) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v);
      break;
    case DType::kFloat16:
      static_cast<__half*>(p)[i] = __float2half_rn(v);
      break;
    default:
      static_cast<float*>(p)[i] = v;
  }
}

#ifdef __CUDACC__

// Word of a table in shared memory, 256-byte aligned and at most 256 bytes long, at the offset in
// byte i of `offsets`: one byte permute makes the address.
__device__ __forceinline__ uint32_t table_word(const uint32_t* table, uint32_t offsets, int i) {
  const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(table));
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];"
               : "=r"(word)
               : "r"(__byte_perm(offsets, base, 0x7650 + i)));
  return word;
}

// c += a b for a 16 x 32 (8 bit) or 16 x 16 (16 bit) matrix a and 8 columns b, one warp. Thread 4 g
// + t holds row g in a[0], a[2] and c[0], c[1], row g + 8 in a[1], a[3] and c[2], c[3]; column g of
// b; columns 2 t, 2 t + 1 of c. Its depth indices are 4 t .. 4 t + 3 (2 t, 2 t + 1) in a[0], a[1],
// b0, and 16 (8) more in a[2], a[3], b1.
__device__ __forceinline__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace alignops::ternary::cuda
