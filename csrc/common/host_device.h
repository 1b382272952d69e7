// ALIGNOPS_HD before a function that CUDA kernels and host code both call.
#pragma once

#ifdef __CUDACC__
#define ALIGNOPS_HD __host__ __device__ __forceinline__
#else
#define ALIGNOPS_HD inline
#endif
