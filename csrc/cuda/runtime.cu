// What bindings.cpp asks of the CUDA runtime, which is linked into this module and is not PyTorch's
// copy of it.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include "kernels.h"

namespace npad::cuda {

int set_device(int device) { return cudaSetDevice(device); }
const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int runtime_version() { return CUDART_VERSION; }

// 0 where there is no driver. The driver itself is asked: cudaDriverGetVersion() would initialise
// it, after which CUDA_VISIBLE_DEVICES is not read again and forked processes have no GPU.
int driver_version() {
    using GetVersion = int(int*);
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
    void* function = driver != nullptr ? dlsym(driver, "cuDriverGetVersion") : nullptr;
    int version = 0;
    if (function != nullptr) reinterpret_cast<GetVersion*>(function)(&version);
    return version;
}

}  // namespace npad::cuda
