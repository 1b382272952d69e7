// What this machine can do at best: sustained read bandwidth and the rate of the few vector
// instructions that bound the kernels. Nothing here is part of the package; benchmarks/native.py
// compiles it with the system compiler.
//
// probe_read streams one buffer through `threads` threads, each with `streams` sequential cursors,
// and ORs what it loads, so that no store and no copy takes part. The instruction probes run
// independent chains in registers only. probe_chase follows chains of dependent reads: one chain
// shows the latency of memory, many show how far it can be hidden.
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
typedef uint64_t Vec __attribute__((vector_size(64), aligned(8), may_alias));

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// ORs `bytes` (a multiple of 256 * streams) at p, read as `streams` equal contiguous parts side by
// side.
__attribute__((target_clones("arch=x86-64-v4", "avx2", "default"))) uint64_t
read_range(const uint8_t* p, size_t bytes, int streams) {
  const size_t part = bytes / streams;
  Vec a = {}, b = {}, c = {}, d = {};
  for (size_t i = 0; i < part; i += 256) {
    for (int s = 0; s < streams; ++s) {
      const Vec* v = reinterpret_cast<const Vec*>(p + s * part + i);
      a |= v[0];
      b |= v[1];
      c |= v[2];
      d |= v[3];
    }
  }
  a |= b | c | d;
  return a[0] | a[1] | a[2] | a[3] | a[4] | a[5] | a[6] | a[7];
}

double thread_cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Instructions per second of CPU time of BODY, which issues `per_body` of them on independent
// registers.
template <typename Body>
double rate(double seconds, int per_body, Body body) {
  int64_t bodies = 0;
  const double start = thread_cpu_seconds();
  double elapsed = 0;
  while ((elapsed = thread_cpu_seconds() - start) < seconds) {
    for (int i = 0; i < 20000; ++i) body();
    bodies += 20000;
  }
  return static_cast<double>(bodies) * per_body / elapsed;
}

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define TARGET_AVX2 __attribute__((target("avx2,fma")))

// Eight destination registers; sources never change, so only the issue rate limits.
#define EIGHT(ins, r)                                                                       \
  ins " %%" r "8, %%" r "9, %%" r "0\n" ins " %%" r "8, %%" r "9, %%" r "1\n" ins " %%" r   \
      "8, %%" r "9, %%" r "2\n" ins " %%" r "8, %%" r "9, %%" r "3\n" ins " %%" r "8, %%" r \
      "9, %%" r "4\n" ins " %%" r "8, %%" r "9, %%" r "5\n" ins " %%" r "8, %%" r "9, %%" r \
      "6\n" ins " %%" r "8, %%" r "9, %%" r "7\n"
#define THIRTY_TWO(ins, r) EIGHT(ins, r) EIGHT(ins, r) EIGHT(ins, r) EIGHT(ins, r)
#define CLOBBER "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7"

TARGET_AVX512 void body_vpermw() { asm volatile(THIRTY_TWO("vpermw", "zmm")::: CLOBBER); }
// One word vector of the T5W lookup: three codes per 16-bit lane, three table reads, three sums.
// The codes are moved down by shifts, or by multiplications where shifts and permutes share ports.
#define T5W_WORD(down5, down10, a, b, c)                                                           \
  "vpermw %%zmm8, %%zmm9, %%zmm" a "\n" down5 ", %%zmm9, %%zmm" b "\n" down10 ", %%zmm9, %%zmm" c  \
  "\nvpermw %%zmm8, %%zmm" b ", %%zmm" b "\nvpermw %%zmm8, %%zmm" c ", %%zmm" c "\nvpaddw %%zmm" a \
  ", %%zmm10, %%zmm10\nvpaddw %%zmm" b ", %%zmm11, %%zmm11\nvpaddw %%zmm" c ", %%zmm12, %%zmm12\n"
#define T5W_BODY(down5, down10)                                                              \
  asm volatile(T5W_WORD(down5, down10, "0", "1", "2") T5W_WORD(down5, down10, "3", "4", "5") \
                   T5W_WORD(down5, down10, "6", "7", "15")::                                 \
                       : CLOBBER, "xmm10", "xmm11", "xmm12", "xmm15")
TARGET_AVX512 void body_t5w_shift() { T5W_BODY("vpsrlw $5", "vpsrlw $10"); }
TARGET_AVX512 void body_t5w_multiply() { T5W_BODY("vpmulhuw %%zmm13", "vpmulhuw %%zmm14"); }
TARGET_AVX2 void body_vpshufb() { asm volatile(THIRTY_TWO("vpshufb", "ymm")::: CLOBBER); }
TARGET_AVX512 void body_vpdpbusd() { asm volatile(THIRTY_TWO("vpdpbusd", "zmm")::: CLOBBER); }
TARGET_AVX2 void body_vpmaddubsw() { asm volatile(THIRTY_TWO("vpmaddubsw", "ymm")::: CLOBBER); }
TARGET_AVX512 void body_fma512() { asm volatile(THIRTY_TWO("vfmadd231ps", "zmm")::: CLOBBER); }
TARGET_AVX2 void body_fma256() { asm volatile(THIRTY_TWO("vfmadd231ps", "ymm")::: CLOBBER); }

// Follows `chains` cycles through lines of 64 bytes; the first 4 bytes of a line name the next one.
template <int kChains>
double chase(const uint32_t* lines, uint32_t* cursors, int64_t steps) {
  uint32_t at[kChains];
  for (int c = 0; c < kChains; ++c) at[c] = cursors[c];
  const auto start = Clock::now();
  for (int64_t s = 0; s < steps; ++s) {
    for (int c = 0; c < kChains; ++c) at[c] = lines[size_t{at[c]} * 16];
  }
  const double seconds = seconds_since(start);
  for (int c = 0; c < kChains; ++c) cursors[c] = at[c];
  return seconds;
}

}  // namespace

extern "C" {

// Seconds of each of `reps` passes over the buffer go to `seconds`; returns a value that depends on
// every byte.
uint64_t probe_read(const uint8_t* p, size_t bytes, int threads, int streams, int reps,
                    double* seconds) {
  const size_t unit = size_t{256} * streams;
  const size_t share = bytes / threads / unit * unit;
  std::barrier gate(threads);
  std::vector<uint64_t> sums(threads, 0);
  auto work = [&](int t) {
    for (int r = 0; r < reps; ++r) {
      gate.arrive_and_wait();
      const auto start = Clock::now();
      sums[t] ^= read_range(p + t * share, share, streams);
      gate.arrive_and_wait();
      if (t == 0) seconds[r] = seconds_since(start);
    }
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
  work(0);
  for (auto& thread : pool) thread.join();
  uint64_t all = 0;
  for (uint64_t s : sums) all ^= s;
  return all;
}

// Seconds of `steps` steps of each of `chains` chains on this thread; the cursors are moved on.
// Negative: this number of chains is not compiled.
double probe_chase(const uint32_t* lines, uint32_t* cursors, int chains, int64_t steps) {
  switch (chains) {
    case 1:
      return chase<1>(lines, cursors, steps);
    case 4:
      return chase<4>(lines, cursors, steps);
    case 16:
      return chase<16>(lines, cursors, steps);
    case 32:
      return chase<32>(lines, cursors, steps);
    default:
      return -1;
  }
}

// Instructions per second on one core. The caller asks only for what the CPU has.
double probe_vpermw(double seconds) { return rate(seconds, 32, body_vpermw); }
double probe_t5w_shift(double seconds) { return rate(seconds, 9, body_t5w_shift); }
double probe_t5w_multiply(double seconds) { return rate(seconds, 9, body_t5w_multiply); }
double probe_vpshufb(double seconds) { return rate(seconds, 32, body_vpshufb); }
double probe_vpdpbusd(double seconds) { return rate(seconds, 32, body_vpdpbusd); }
double probe_vpmaddubsw(double seconds) { return rate(seconds, 32, body_vpmaddubsw); }
double probe_fma512(double seconds) { return rate(seconds, 32, body_fma512); }
double probe_fma256(double seconds) { return rate(seconds, 32, body_fma256); }

}  // extern "C"
