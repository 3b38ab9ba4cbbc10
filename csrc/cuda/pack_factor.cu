// Dense lower-triangular factors -> the packed layout of packed.h, rounded to nearest even:
//
//   factor (count, C, C) float32 -> packed (count, packed) float32, float16 or bfloat16
//
// A block owns one panel of one matrix, a thread whole columns of it: eight loads, each coalesced
// over the columns of one row, and one store of 16 bytes (two in float32). What the layout does not
// keep is not read, so the kernel moves C (C + 1) / 2 floats in and as many elements out; there is
// no arithmetic.
#include "device_utils.cuh"
#include "kernels.h"
#include "packed.h"

namespace npad::cuda {

namespace {

constexpr int kThreads = 128;  // most panels are a few hundred columns wide

template <typename T>
__device__ __forceinline__ uint32_t pair(float x, float y) {
    if constexpr (std::is_same_v<T, __half>)
        return __half_as_ushort(__float2half_rn(x)) |
               static_cast<uint32_t>(__half_as_ushort(__float2half_rn(y))) << 16;
    else
        return __bfloat16_as_ushort(__float2bfloat16_rn(x)) |
               static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(y))) << 16;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_factor_kernel(const float* __restrict__ factor, int64_t channels, T* __restrict__ packed) {
    const PackedLayout layout(channels);
    const int64_t k = blockIdx.x / layout.panels, p = blockIdx.x % layout.panels;
    const int64_t row0 = layout.first_row(p);
    const float* dense = factor + k * channels * channels;
    T* panel = packed + k * layout.size() + layout.offset(p);
    for (int64_t j = threadIdx.x; j < layout.columns(p); j += kThreads) {
        float v[kPanel];
#pragma unroll
        for (int i = 0; i < kPanel; ++i) {
            const int64_t row = row0 + i;
            v[i] = j <= row ? dense[row * channels + j] : 0.0f;
        }
        if constexpr (std::is_same_v<T, float>) {
            auto* column = reinterpret_cast<float4*>(panel + j * kPanel);
            column[0] = make_float4(v[0], v[1], v[2], v[3]);
            column[1] = make_float4(v[4], v[5], v[6], v[7]);
        } else {
            *reinterpret_cast<uint4*>(panel + j * kPanel) = make_uint4(
                pair<T>(v[0], v[1]), pair<T>(v[2], v[3]), pair<T>(v[4], v[5]), pair<T>(v[6], v[7]));
        }
    }
}

template <typename T>
cudaError_t run(const float* factor, int64_t count, int64_t channels, void* packed,
                cudaStream_t stream) {
    const int64_t blocks = count * PackedLayout(channels).panels;
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return launch(pack_factor_kernel<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, factor,
                  channels, static_cast<T*>(packed));
}

}  // namespace

int pack_factor(const float* factor, int64_t count, int64_t channels, void* packed, DataType type,
                Stream stream) {
    switch (type) {
        case DataType::kFloat32:
            return run<float>(factor, count, channels, packed, stream);
        case DataType::kFloat16:
            return run<__half>(factor, count, channels, packed, stream);
        case DataType::kBFloat16:
            return run<__nv_bfloat16>(factor, count, channels, packed, stream);
        case DataType::kInt8:
            break;  // made of float32, in npad/ops/packed.py
    }
    return cudaErrorInvalidValue;
}

}  // namespace npad::cuda
