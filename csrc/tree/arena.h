// Memory that never moves: address space is reserved once, and the system gives pages as they are
// first written.
#pragma once

#include <cstddef>

namespace alignops::tree {

class Arena {
 public:
  Arena() = default;
  // Throws std::bad_alloc.
  explicit Arena(size_t bytes);
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace alignops::tree
