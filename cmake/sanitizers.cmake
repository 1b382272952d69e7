# ALIGNOPS_SANITIZERS=address,undefined for the C++ tests: any report ends the program.
# -O1: at -O3 the instrumented vector kernels take minutes to compile.

if(ALIGNOPS_SANITIZERS)
  add_compile_options(-fsanitize=${ALIGNOPS_SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1)
  add_link_options(-fsanitize=${ALIGNOPS_SANITIZERS})
endif()
