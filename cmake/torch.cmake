# The target alignops_torch: headers of torch's stable ABI and libtorch_cpu.so, without torch's own
# CMake package, which brings flags, RPATHs and CUDA with it.

if(NOT EXISTS "${ALIGNOPS_TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "no torch >= ${ALIGNOPS_TORCH_FLOOR} in ALIGNOPS_TORCH_ROOT='${ALIGNOPS_TORCH_ROOT}'")
endif()
file(STRINGS "${ALIGNOPS_TORCH_ROOT}/version.py" ALIGNOPS_TORCH_VERSION REGEX "^__version__ = ")
string(REGEX REPLACE "^__version__ = '(.*)'$" "\\1" ALIGNOPS_TORCH_VERSION "${ALIGNOPS_TORCH_VERSION}")
if(ALIGNOPS_TORCH_VERSION VERSION_LESS ALIGNOPS_TORCH_FLOOR)
  message(FATAL_ERROR "torch ${ALIGNOPS_TORCH_VERSION} is older than ${ALIGNOPS_TORCH_FLOOR}")
endif()

add_library(alignops_torch INTERFACE)
target_include_directories(alignops_torch SYSTEM INTERFACE "${ALIGNOPS_TORCH_ROOT}/include")
target_compile_definitions(alignops_torch INTERFACE TORCH_TARGET_VERSION=${ALIGNOPS_TORCH_TARGET})
target_link_libraries(alignops_torch INTERFACE "${ALIGNOPS_TORCH_ROOT}/lib/libtorch_cpu.so")
