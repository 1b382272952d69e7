// Arrays that are read in random order: on huge pages where there are any, since with pages of 4
// KiB most accesses would also miss the TLB.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace alignops {

// A hint only, for the huge pages that lie in the range; fails harmlessly.
inline void advise_huge(void* memory, uint64_t bytes) {
  constexpr uint64_t kHuge = uint64_t{1} << 21;
  const uint64_t skipped = (kHuge - reinterpret_cast<uintptr_t>(memory) % kHuge) % kHuge;
  if (bytes < skipped + kHuge) return;
  (void)madvise(static_cast<char*>(memory) + skipped, (bytes - skipped) / kHuge * kHuge,
                MADV_HUGEPAGE);
}

// An uninitialized array.
template <class T>
class HugeVector {
 public:
  HugeVector() = default;
  explicit HugeVector(uint64_t size) { resize(size); }
  HugeVector(const HugeVector&) = delete;
  HugeVector& operator=(const HugeVector&) = delete;
  ~HugeVector() { std::free(data_); }

  // Forgets the contents.
  void resize(uint64_t size) {
    std::free(std::exchange(data_, nullptr));
    constexpr uint64_t kHuge = uint64_t{1} << 21;
    const uint64_t bytes = size * sizeof(T);
    const uint64_t alignment = bytes < kHuge ? 64 : kHuge;
    data_ =
        static_cast<T*>(std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment));
    if (data_ == nullptr) throw std::bad_alloc();
    advise_huge(data_, bytes);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](uint64_t i) { return data_[i]; }
  const T& operator[](uint64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

}  // namespace alignops
