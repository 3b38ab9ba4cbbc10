# The CUDA kernels: one static library with the runtime in it, so that the module loads where there is
# no driver.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NPAD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "NPAD_CUDA=ON, but no nvcc was found; put it on PATH or set CUDACXX")
  endif()
  return()
endif()

include(cmake/architectures.cmake)
npad_choose_architectures(${CMAKE_CUDA_COMPILER} architectures)
if(NOT architectures)
  message(STATUS "npad: no CUDA kernels: nvcc is here, but no GPU that it compiles for. CUDAARCHS=90 in "
                 "the environment builds them for one, NPAD_CUDA=ON for all, which takes minutes")
  return()
endif()
# Not in the cache, where CMake too would put CUDAARCHS: the next run chooses anew.
set(CMAKE_CUDA_ARCHITECTURES ${architectures})
unset(ENV{CUDAARCHS})
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(WARNING "npad: nvcc ${CMAKE_CUDA_COMPILER_VERSION} has no C++20; CUDA kernels need 12.0")
  return()
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
target_compile_options(npad_cuda PRIVATE "-Xcompiler=-Wall,-Wextra")
list(JOIN CMAKE_CUDA_ARCHITECTURES "," architectures)
target_compile_definitions(
  npad_cuda INTERFACE NPAD_HAS_CUDA NPAD_CUDA_ARCHITECTURES="${architectures}")
