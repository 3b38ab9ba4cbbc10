# For which GPUs the CUDA kernels are compiled.

# Of a release. Machine code for each; without -real also PTX, which serves GPUs that are newer and
# have no machine code here: those between two generations, and those after the last.
set(NPAD_RELEASE_ARCHITECTURES 75-real 80-real 86-real 89-real 90 100 120)

# Sets `result` in the caller's scope: what CMAKE_CUDA_ARCHITECTURES or CUDAARCHS in the environment
# names; else with NPAD_CUDA=ON those of a release that nvcc knows; else those of this machine's GPUs.
# Empty where there is none of these.
function(npad_choose_architectures nvcc result)
  set(chosen ${CMAKE_CUDA_ARCHITECTURES})
  if(NOT chosen)
    set(chosen $ENV{CUDAARCHS})
  endif()
  if(NOT chosen)
    execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE listed)
    string(REGEX MATCHALL "[0-9]+" known "${listed}")
    list(SORT known COMPARE NATURAL)
    if(NPAD_CUDA STREQUAL "ON")
      foreach(architecture ${NPAD_RELEASE_ARCHITECTURES})
        string(REPLACE "-real" "" number ${architecture})
        if(number IN_LIST known)
          list(APPEND chosen ${architecture})
        endif()
      endforeach()
    elseif(known)
      list(GET known -1 newest)
      execute_process(
        COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE gpus ERROR_QUIET RESULT_VARIABLE code TIMEOUT 30)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" gpus "${gpus}")
      string(REPLACE "." "" gpus "${gpus}")
      foreach(number ${gpus})
        if(number IN_LIST known AND number GREATER_EQUAL 75)
          list(APPEND chosen ${number}-real)
        elseif(number GREATER newest)
          list(APPEND chosen ${newest}-virtual)  # the driver makes machine code of it
        endif()
      endforeach()
      list(REMOVE_DUPLICATES chosen)
    endif()
  endif()
  set(${result} ${chosen} PARENT_SCOPE)
endfunction()
