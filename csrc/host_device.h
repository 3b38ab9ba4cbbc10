// What runs on the host and, in a CUDA file, on the device too.
#pragma once

#if defined(__CUDACC__)
#define NPAD_HOST_DEVICE __host__ __device__
#else
#define NPAD_HOST_DEVICE
#endif
