// ALIGNOPS_CHECK(condition, message parts...): a failed check of an argument becomes Python's
// ValueError.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace alignops {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// "(2, 4095)", as Python prints a shape.
template <class Sizes>
std::string shape_string(const Sizes& sizes) {
  std::ostringstream out;
  out << '(';
  int64_t count = 0;
  for (const auto size : sizes) out << (count++ > 0 ? ", " : "") << size;
  out << (count == 1 ? ",)" : ")");
  return out.str();
}

}  // namespace alignops

#define ALIGNOPS_CHECK(condition, ...)                                               \
  do {                                                                               \
    if (!(condition)) throw std::invalid_argument(::alignops::message(__VA_ARGS__)); \
  } while (false)
