// What the parts of the matcher share: elements by signed index, tokens of any width.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace alignops::spans {

template <class T>
inline T& get(std::vector<T>& from, int64_t i) {
  return from[static_cast<size_t>(i)];
}
template <class T>
inline const T& get(const std::vector<T>& from, int64_t i) {
  return from[static_cast<size_t>(i)];
}

inline void store_token(uint8_t* to, int32_t width, int64_t token) {
  const auto value = static_cast<uint32_t>(token);
  std::memcpy(to, &value, static_cast<size_t>(width));
}

}  // namespace alignops::spans
