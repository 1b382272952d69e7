# ALIGNOPS_SANITIZERS=address,undefined for the C++ tests: any report ends the program. -O1, since
# instrumented intrinsics compile slowly.

if(ALIGNOPS_SANITIZERS)
  set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1")
  add_compile_options(-fsanitize=${ALIGNOPS_SANITIZERS} -fno-sanitize-recover=all
                      -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${ALIGNOPS_SANITIZERS})
endif()
