# Decides whether the CUDA library is built, and collects it: alignops/_cuda.so holds the CUDA
# kernels of every core.

set(ALIGNOPS_BUILD_CUDA OFF)
if(ALIGNOPS_CUDA)
  include(CheckLanguage)
  check_language(CUDA)
  if(ALIGNOPS_CUDA STREQUAL "auto")
    if(CMAKE_CUDA_COMPILER AND EXISTS "${ALIGNOPS_TORCH_ROOT}/lib/libtorch_cuda.so")
      set(ALIGNOPS_BUILD_CUDA ON)
    endif()
  elseif(CMAKE_CUDA_COMPILER)
    set(ALIGNOPS_BUILD_CUDA ON)
  else()
    message(
      FATAL_ERROR "ALIGNOPS_CUDA=${ALIGNOPS_CUDA}, but no CUDA compiler was found: set CUDACXX to nvcc"
    )
  endif()
endif()

if(ALIGNOPS_BUILD_CUDA)
  # Explicit, since CMake's default is one old architecture and "native" needs a GPU in the building
  # machine.
  list(TRANSFORM ALIGNOPS_CUDA_ARCHS APPEND -real OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
  list(GET ALIGNOPS_CUDA_ARCHS -1 newest)
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest}-virtual)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
endif()

# alignops_add_cuda(<core> KERNELS <file.cu>... OPS <file.cpp>...)
function(alignops_add_cuda name)
  cmake_parse_arguments(PARSE_ARGV 1 cuda "" "" "KERNELS;OPS")
  if(NOT TARGET _cuda)
    add_library(_cuda MODULE)
    set_target_properties(_cuda PROPERTIES PREFIX "" SUFFIX ".so")
    alignops_configure(_cuda)
    target_include_directories(_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
    target_link_libraries(_cuda PRIVATE alignops_torch ${CMAKE_DL_LIBS})
    install(TARGETS _cuda LIBRARY DESTINATION .)
  endif()
  target_sources(_cuda PRIVATE ${cuda_KERNELS} ${cuda_OPS})
endfunction()
