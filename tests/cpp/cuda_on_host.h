// Runs CUDA kernels on the CPU, one fiber per CUDA thread, so that indexing, masks and barriers can
// be tested without a GPU. Include it before a .cu file, compile both as C++ with CUDA's headers,
// and call the launchers.
//
// Thread blocks run one after another. Fibers of a block switch only at collective operations
// (__syncthreads, shuffles, ballots, tensor-core products), which wait for the threads they name as
// the hardware does; a block in which nobody can go on ends the program. Tensor-core products
// follow the fragment tables of the PTX manual, with sums in double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#undef __shared__
#undef __launch_bounds__
#define __shared__ static
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim;

namespace cuda_on_host {

constexpr size_t kStackBytes = 64 * 1024;

struct Message {
  uint32_t words[6];
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  uint64_t step = 0;  // collective operations of this thread's warp so far
  Message mail[2]{};  // what it gave to the last two
  void* fake_stack = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler{};
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  std::function<void()> body;
  size_t current = 0;
  size_t at_barrier = 0;
  uint64_t barrier = 0;
  bool progress = false;
};

inline Block* block = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void enter(Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block->fake_stack, to.stack.get(), kStackBytes);
#endif
  swapcontext(&block->scheduler, &to.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
#endif
}

inline void leave(bool forever) {
  Fiber& from = block->fibers[block->current];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake_stack, block->stack_bottom,
                                 block->stack_size);
#else
  (void)forever;
#endif
  swapcontext(&from.context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, &block->stack_bottom, &block->stack_size);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->stack_bottom, &block->stack_size);
#endif
  block->body();
  block->fibers[block->current].done = true;
  leave(true);
}

template <class Ready>
void wait(const Ready& ready) {
  while (!ready()) leave(false);
  block->progress = true;
}

inline void run_block(int threads, std::function<void()> body) {
  Block here;
  block = &here;
  here.body = std::move(body);
  here.fibers.resize(static_cast<size_t>(threads));
  for (Fiber& fiber : here.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  size_t running = here.fibers.size();
  while (running > 0) {
    here.progress = false;
    for (here.current = 0; here.current < here.fibers.size(); ++here.current) {
      Fiber& fiber = here.fibers[here.current];
      if (fiber.done) continue;
      threadIdx = {static_cast<unsigned>(here.current), 0, 0};
      enter(fiber);
      if (fiber.done) {
        --running;
        here.progress = true;
      }
    }
    if (here.at_barrier > 0 && here.at_barrier == running) {
      here.at_barrier = 0;
      ++here.barrier;
      here.progress = true;
    }
    if (!here.progress) fail("deadlock: some threads wait for others that do not come");
  }
  block = nullptr;
}

// Gives `mine` to the lanes of `mask` in this warp and returns a reader of what each of them gave.
inline auto exchange(uint32_t mask, const Message& mine) {
  const size_t self = block->current, warp = self / 32 * 32;
  if ((mask >> (self % 32) & 1) == 0) fail("a thread outside the mask takes part");
  Fiber& fiber = block->fibers[self];
  const uint64_t step = ++fiber.step;
  fiber.mail[step % 2] = mine;
  wait([&] {
    for (size_t lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      if (warp + lane >= block->fibers.size()) fail("the mask names a missing thread");
      const Fiber& other = block->fibers[warp + lane];
      if (other.step < step) {
        if (other.done) fail("the mask names a thread that has ended");
        return false;
      }
    }
    return true;
  });
  return [warp, step, mask](size_t lane) -> const Message& {
    if ((mask >> lane & 1) == 0) fail("reads from a thread outside the mask");
    return block->fibers[warp + lane].mail[step % 2];
  };
}

template <class T>
Message message(const T& value) {
  Message out{};
  std::memcpy(out.words, &value, sizeof value);
  return out;
}

template <class T>
T shuffle(uint32_t mask, const T& value, size_t source) {
  const auto given = exchange(mask, message(value));
  T out;
  std::memcpy(&out, given(source).words, sizeof out);
  return out;
}

// The four results of one thread; `product(row, column)` is the sum over the depth.
template <class C, class Product>
void add_products(C (&c)[4], const Product& product) {
  const size_t lane = block->current % 32;
  for (size_t e = 0; e < 4; ++e)
    c[e] = static_cast<C>(c[e] + product(lane / 4 + 8 * (e / 2), 2 * (lane % 4) + e % 2));
}

inline double half_value(uint32_t word, size_t i, bool bf16) {
  const auto bits = static_cast<uint16_t>(word >> (16 * i));
  return bf16 ? std::bit_cast<float>(static_cast<uint32_t>(bits) << 16)
              : static_cast<double>(__half2float(__half(__half_raw{bits})));
}

inline void mma_16bit(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  const auto given = exchange(~0u, Message{{a[0], a[1], a[2], a[3], b0, b1}});
  add_products(c, [&](size_t row, size_t column) {
    double sum = 0;
    for (size_t k = 0; k < 16; ++k) {
      const Message& left = given(row % 8 * 4 + k % 8 / 2);
      const Message& right = given(column * 4 + k % 8 / 2);
      sum += half_value(left.words[row / 8 + 2 * (k / 8)], k % 2, bf16) *
             half_value(right.words[4 + k / 8], k % 2, bf16);
    }
    return sum;
  });
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  using cuda_on_host::block;
  const uint64_t barrier = block->barrier;
  ++block->at_barrier;
  cuda_on_host::wait([&] { return block->barrier != barrier; });
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return cuda_on_host::shuffle(mask, value,
                               cuda_on_host::block->current % 32 ^ static_cast<size_t>(lanes));
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned lanes, int width = 32) {
  const size_t self = cuda_on_host::block->current % 32, span = static_cast<size_t>(width);
  return cuda_on_host::shuffle(mask, value, self % span + lanes < span ? self + lanes : self);
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  const auto given = cuda_on_host::exchange(mask, cuda_on_host::message(predicate));
  uint32_t votes = 0;
  for (size_t lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= (given(lane).words[0] & 1) << lane;
  return votes;
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}

template <class T>
T __ldcs(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) cuda_on_host::fail("misaligned load");
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return __ldcs(p);
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
template <class T>
void atomicAdd(T* p, T v) {
  *p += v;
}
template <class T>
void atomicMin(T* p, T v) {
  *p = std::min(*p, v);
}
using std::max;
using std::min;

namespace alignops::cuda {

template <class L, class... Parameters, class... Arguments>
cudaError_t run(L& launch, const char* name, void (*kernel)(Parameters...), int64_t grid,
                int threads, const Arguments&... arguments) {
  launch.kernel = name;
  launch.grid = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  for (int64_t i = 0; i < grid; ++i) {
    blockIdx = {static_cast<unsigned>(i), 0, 0};
    cuda_on_host::run_block(threads, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

}  // namespace alignops::cuda

namespace alignops::ternary::cuda {

inline uint32_t table_word(const uint32_t* table, uint32_t offsets, int i) {
  if (reinterpret_cast<uintptr_t>(table) % 256 != 0) cuda_on_host::fail("misaligned table");
  return table[(offsets >> (8 * i) & 0xff) / 4];
}

inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto given =
      cuda_on_host::exchange(~0u, cuda_on_host::Message{{a[0], a[1], a[2], a[3], b0, b1}});
  cuda_on_host::add_products(c, [&](size_t row, size_t column) {
    int32_t sum = 0;
    for (size_t k = 0; k < 32; ++k) {
      const uint32_t left = given(row % 8 * 4 + k % 16 / 4).words[row / 8 + 2 * (k / 16)];
      const uint32_t right = given(column * 4 + k % 16 / 4).words[4 + k / 16];
      sum +=
          static_cast<int8_t>(left >> (8 * (k % 4))) * static_cast<int8_t>(right >> (8 * (k % 4)));
    }
    return sum;
  });
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cuda_on_host::mma_16bit(c, a, b0, b1, true);
}

inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cuda_on_host::mma_16bit(c, a, b0, b1, false);
}

}  // namespace alignops::ternary::cuda
