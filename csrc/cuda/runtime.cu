// What bindings.cpp asks of the CUDA runtime, which is linked into this module and is not PyTorch's
// copy of it.
#include <cuda_runtime.h>

#include "kernels.h"

namespace npad::cuda {

int set_device(int device) { return cudaSetDevice(device); }
const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int runtime_version() {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

// 0 where there is no driver.
int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace npad::cuda
