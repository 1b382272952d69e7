# Common flags, and one function per core: per-ISA kernel files, operator files, C++ tests.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_SKIP_RPATH ON)
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

find_program(ALIGNOPS_CCACHE ccache)
if(ALIGNOPS_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${ALIGNOPS_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${ALIGNOPS_CCACHE})
endif()

# Instruction sets are flags of single files, never of a target: everything else runs on any x86-64.
set(ALIGNOPS_AVX2_FLAGS -mavx2 -mfma -mf16c -mbmi2)
set(ALIGNOPS_AVX512_FLAGS
    ${ALIGNOPS_AVX2_FLAGS}
    -mavx512f
    -mavx512bw
    -mavx512dq
    -mavx512vl
    -mavx512vnni
    -mavx512vbmi)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 takes the intrinsics' own "undefined" registers for a mistake of the caller (GCC bug
  # 105593).
  list(APPEND ALIGNOPS_AVX512_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set(ALIGNOPS_AVX512BF16_FLAGS ${ALIGNOPS_AVX512_FLAGS} -mavx512bf16)

set(ALIGNOPS_WARNINGS -Wall -Wextra -Wpedantic -Wshadow -Wconversion)
if(ALIGNOPS_WERROR)
  list(APPEND ALIGNOPS_WARNINGS -Werror)
endif()

function(alignops_configure target)
  target_include_directories(${target} PRIVATE ${CMAKE_SOURCE_DIR}/csrc)
  target_compile_options(
    ${target}
    PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>
            $<$<COMPILE_LANGUAGE:CXX>:-fno-math-errno>
            $<$<COMPILE_LANGUAGE:CXX>:-fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=>
            "$<$<COMPILE_LANGUAGE:CXX>:${ALIGNOPS_WARNINGS}>")
endfunction()

# alignops_add_core(<name> KERNELS <file>... [OPS <file>...] [BIND <file>...] [OPS_CUDA <file>...]
#                   [CUDA <file>...] [TESTS <file>...] [CUDA_TESTS <file>...])
# Paths are relative to csrc/<name>, those of TESTS to the root. KERNELS may use neither torch nor
# Python; a file cpu/<isa>_*.cpp is compiled for that instruction set. BIND files belong to the
# Python module.
function(alignops_add_core name)
  cmake_parse_arguments(PARSE_ARGV 1 core "" "" "KERNELS;OPS;BIND;OPS_CUDA;CUDA;TESTS;CUDA_TESTS")
  foreach(kind KERNELS OPS BIND OPS_CUDA CUDA)
    list(TRANSFORM core_${kind} PREPEND csrc/${name}/)
  endforeach()
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    list(FILTER core_KERNELS EXCLUDE REGEX "/cpu/avx")
  endif()
  foreach(source ${core_KERNELS})
    if(source MATCHES "/cpu/avx2_")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${ALIGNOPS_AVX2_FLAGS}")
    elseif(source MATCHES "/cpu/avx512_")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${ALIGNOPS_AVX512_FLAGS}")
    elseif(source MATCHES "/cpu/avx512bf16_")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
                                                       "${ALIGNOPS_AVX512BF16_FLAGS}")
    endif()
  endforeach()

  add_library(alignops_${name} OBJECT ${core_KERNELS})
  alignops_configure(alignops_${name})
  set_property(GLOBAL APPEND PROPERTY ALIGNOPS_OBJECTS alignops_${name})

  if(ALIGNOPS_TESTS)
    add_executable(${name}_test ${core_TESTS})
    target_link_libraries(${name}_test PRIVATE alignops_${name} alignops_common)
    alignops_configure(${name}_test)
    alignops_add_cuda_test(${name} ${core_CUDA_TESTS})
    add_test(NAME ${name} COMMAND ${name}_test)
    return()
  endif()

  if(core_OPS)
    add_library(alignops_${name}_ops OBJECT ${core_OPS})
    alignops_configure(alignops_${name}_ops)
    target_link_libraries(alignops_${name}_ops PRIVATE alignops_torch)
    set_property(GLOBAL APPEND PROPERTY ALIGNOPS_OBJECTS alignops_${name}_ops)
  endif()
  set_property(GLOBAL APPEND PROPERTY ALIGNOPS_BINDINGS ${core_BIND})
  if(ALIGNOPS_BUILD_CUDA)
    alignops_add_cuda(${name} KERNELS ${core_CUDA} OPS ${core_OPS_CUDA})
  endif()
endfunction()

# CUDA kernels as host code: the tests include the .cu files. Needs CUDA's headers, but no CUDA
# compiler and no GPU.
function(alignops_add_cuda_test name)
  find_path(
    ALIGNOPS_CUDA_INCLUDE cuda_runtime_api.h
    HINTS ENV CUDA_PATH
    PATHS /usr/local/cuda
    PATH_SUFFIXES include)
  if(NOT ARGN OR NOT ALIGNOPS_CUDA_INCLUDE)
    return()
  endif()
  add_executable(${name}_cuda_test ${ARGN})
  target_include_directories(${name}_cuda_test SYSTEM PRIVATE ${ALIGNOPS_CUDA_INCLUDE})
  target_link_libraries(${name}_cuda_test PRIVATE alignops_${name} alignops_common)
  alignops_configure(${name}_cuda_test)
  target_compile_options(${name}_cuda_test PRIVATE -Wno-unknown-pragmas)
  add_test(NAME ${name}_cuda COMMAND ${name}_cuda_test)
endfunction()

# The one Python module, alignops._C: bindings plus the objects of every core.
function(alignops_add_python_module)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
  find_package(pybind11 2.13 CONFIG REQUIRED)
  get_property(objects GLOBAL PROPERTY ALIGNOPS_OBJECTS)
  get_property(bindings GLOBAL PROPERTY ALIGNOPS_BINDINGS)
  pybind11_add_module(_C MODULE NO_EXTRAS ${ARGN} ${bindings})
  alignops_configure(_C)
  target_compile_definitions(
    _C
    PRIVATE ALIGNOPS_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
            ALIGNOPS_BUILD_TYPE="${CMAKE_BUILD_TYPE}"
            ALIGNOPS_BUILD_TORCH="${ALIGNOPS_TORCH_VERSION}"
            ALIGNOPS_TORCH_FLOOR="${ALIGNOPS_TORCH_FLOOR}")
  target_link_libraries(_C PRIVATE alignops_common ${objects} alignops_torch)
  install(TARGETS _C LIBRARY DESTINATION .)
endfunction()
