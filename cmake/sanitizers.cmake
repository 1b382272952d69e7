# ALIGNOPS_SANITIZERS=address,undefined for the C++ tests: any report ends the program.

if(ALIGNOPS_SANITIZERS)
  add_compile_options(-fsanitize=${ALIGNOPS_SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${ALIGNOPS_SANITIZERS})
endif()
