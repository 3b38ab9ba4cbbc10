# The CUDA kernels: one static library with the runtime in it, so that the module loads where there is
# no driver. A developer names one architecture: CUDAARCHS=90 in the environment.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(npad_all_architectures ON)
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(WARNING "npad: nvcc ${CMAKE_CUDA_COMPILER_VERSION} has no C++20; CUDA kernels need 12.0")
  return()
endif()
if(npad_all_architectures)
  # Machine code for each, and PTX of 90, 100 and the newest, of which the driver of any other GPU from
  # there on makes its own.
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(architectures 75-real 80-real 86-real 89-real 90 100 120)
  else()
    set(architectures 75-real 80-real 86-real 89-real 90)
  endif()
  # In the cache, where CMake's own default would be found the next time.
  set(CMAKE_CUDA_ARCHITECTURES ${architectures} CACHE STRING "CUDA architectures" FORCE)
endif()
message(STATUS "npad: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

add_library(npad_cuda STATIC ${NPAD_CUDA_KERNELS} csrc/cuda/runtime.cu)
set_target_properties(npad_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_include_directories(npad_cuda PRIVATE csrc)
target_link_libraries(npad_cuda PRIVATE ${CMAKE_DL_LIBS})
if("cuda_std_20" IN_LIST CMAKE_CUDA_COMPILE_FEATURES)
  set_target_properties(npad_cuda PROPERTIES CUDA_STANDARD 20)
else()
  # A CMake older than the nvcc does not know that dialect and appends the flag of the one it knows.
  set(CMAKE_CUDA17_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA17_EXTENSION_COMPILE_OPTION "-std=c++20")
  set_target_properties(npad_cuda PROPERTIES CUDA_STANDARD 17)
endif()
target_compile_options(npad_cuda PRIVATE -Werror all-warnings "-Xcompiler=-Wall,-Wextra")
list(JOIN CMAKE_CUDA_ARCHITECTURES "," architectures)
target_compile_definitions(
  npad_cuda INTERFACE NPAD_HAS_CUDA NPAD_CUDA_ARCHITECTURES="${architectures}")
