// A test program in one header: registered tests, expectations that report their place, memory with
// guard bytes, seeded random numbers. Sanitizers see what the guards cannot: inputs are allocated
// to the exact size.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <source_location>
#include <string>
#include <vector>

namespace alignops::test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline void expect(bool ok, const std::string& what,
                   std::source_location at = std::source_location::current()) {
  if (ok) return;
  if (++failures() <= 20) std::printf("%s:%u: %s\n", at.file_name(), at.line(), what.c_str());
}

inline int run_all() {
  for (const Test& test : tests()) {
    const int before = failures();
    test.run();
    std::printf("%s %s\n", failures() == before ? "ok    " : "FAILED", test.name);
  }
  std::printf("%d tests, %d failures\n", static_cast<int>(tests().size()), failures());
  return failures() == 0 ? 0 : 1;
}

// `count` elements between guard bytes, `offset` elements past an aligned address; new memory has a
// visible pattern.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, int64_t offset = 0)
      : count_(static_cast<size_t>(count)),
        begin_(kGuard + static_cast<size_t>(offset) * sizeof(T)),
        bytes_(begin_ + count_ * sizeof(T) + kGuard, kPattern) {}

  T* data() { return reinterpret_cast<T*>(bytes_.data() + begin_); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.data() + begin_); }
  T& operator[](int64_t i) { return data()[i]; }
  size_t size() const { return count_; }

  bool intact() const {
    for (size_t i = 0; i < bytes_.size(); ++i)
      if ((i < begin_ || i >= begin_ + count_ * sizeof(T)) && bytes_[i] != kPattern) return false;
    return true;
  }
  bool operator==(const Guarded& other) const {
    return count_ == other.count_ && std::memcmp(data(), other.data(), count_ * sizeof(T)) == 0;
  }

 private:
  static constexpr size_t kGuard = 128;
  static constexpr unsigned char kPattern = 0xA5;
  size_t count_, begin_;
  std::vector<unsigned char> bytes_;
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  template <class T>
  T pick(const std::vector<T>& from) {
    return from[static_cast<size_t>(below(static_cast<int64_t>(from.size())))];
  }

 private:
  std::mt19937 engine_;
};

}  // namespace alignops::test
