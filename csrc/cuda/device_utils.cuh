// What every CUDA kernel uses, each behind one function: launches, loads, reductions, matrix
// instructions, ordered keys. The emulator in tests/simt runs kernels on a CPU; it knows CUDA's own
// names as far as they are used here, which is why kernels keep to these functions.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include "ptx.cuh"
#else
#include "simt.h"
#endif

namespace npad::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffff;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Launches ----------------------------------------------------------------------------------

// Static and dynamic shared memory beyond 48 KiB has to be asked for. The most that the device has,
// not `bytes`: another thread may be launching the same kernel with a different size.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
    if (bytes == 0) return cudaSuccess;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess || attributes.sharedSizeBytes + bytes <= 48 * 1024) return error;
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                most - static_cast<int>(attributes.sharedSizeBytes));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_as(bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
    const cudaError_t error = allow_shared(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = cooperative;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cooperative;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
    return launch_as(false, kernel, grid, block, shared_bytes, stream, arguments...);
}

// For kernels that call grid_barrier(): `grid` is at most resident_blocks().
template <typename... Parameters, typename... Arguments>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                               size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
    return launch_as(true, kernel, grid, block, shared_bytes, stream, arguments...);
}

// How many blocks the device runs at the same time.
template <typename Kernel>
cudaError_t resident_blocks(Kernel* kernel, int threads, size_t shared_bytes, int* blocks) {
    int device = 0, processors = 0;
    *blocks = 0;
    cudaError_t error = allow_shared(kernel, shared_bytes);
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error =
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes);
    *blocks *= processors;
    return error;
}

// Every thread of a cooperative launch waits here for all others and sees what they wrote.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// ---- Memory ------------------------------------------------------------------------------------

// The block's dynamic shared memory; aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
    return static_cast<T*>(ptx::dynamic_shared());
}

// One load of a whole Vector (float4, uint4, ...), to whose size `p` is aligned.
template <typename Vector>
__device__ __forceinline__ Vector load(const void* p) {
    return *static_cast<const Vector*>(p);
}

// The same for data that is read once: it is the first to leave the caches.
template <typename Vector>
__device__ __forceinline__ Vector load_once(const void* p) {
    return __ldcs(static_cast<const Vector*>(p));
}

// Starts a copy of 4, 8 or 16 bytes (both addresses aligned to them) to shared memory. It has
// arrived, for this thread, after commit and wait; for others, after a barrier on top of that.
// sm_75 copies at once.
template <int kBytes = 16>
__device__ __forceinline__ void cp_async(void* shared, const void* global) {
    __pipeline_memcpy_async(shared, global, kBytes);
}

// The same, or zeros where `stored` is false; `global` may then be any address, aligned. 16 bytes
// pass L1 by, which may be smaller than what is to be in flight. Copies that share a sector of 32
// bytes should go through it, lest L2 sends the sector for each.
template <int kBytes = 16, bool kThroughL1 = (kBytes < 16)>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool stored) {
    ptx::cp_async_or_zeros<kBytes, kThroughL1>(shared, global, stored);
}

// Closes a group: the copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() { __pipeline_commit(); }

// Waits until all but the latest kGroups groups have arrived.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
    __pipeline_wait_prior(kGroups);
    ptx::keep_memory_order();
}

// ---- Reductions --------------------------------------------------------------------------------

struct Sum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};

// NaN propagates, as in torch.minimum; fminf would drop it.
struct Minimum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a < b || a != a ? a : b;
    }
};

struct Maximum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a > b || a != a ? a : b;
    }
};

// Every lane of a whole warp gets the same result, summed in the same order on every run.
template <typename Op, typename T>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        value = op(value, __shfl_xor_sync(kAllLanes, value, distance));
    return value;
}

// The same over a one-dimensional block of kThreads, a multiple of 32.
template <int kThreads, typename Op, typename T>
__device__ __forceinline__ T block_reduce(T value, Op op) {
    static_assert(kThreads % kWarp == 0);
    __shared__ T partial[kThreads / kWarp];
    value = warp_reduce(value, op);
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = partial[0];
#pragma unroll
    for (int i = 1; i < kThreads / kWarp; ++i) value = op(value, partial[i]);
    __syncthreads();  // the next call writes `partial` again
    return value;
}

// ---- Matrix instructions -----------------------------------------------------------------------

// Tag of a float32 of which the instruction reads only the upper 19 bits: sign, exponent, 10 bits.
struct Tf32 {};

// x = hi + lo to within 2^-23 |x|; three products hi hi + hi lo + lo hi are near float32. Rounding
// hi to nearest leaves lo one bit more than it can keep; truncation would leave three. NaN and
// infinity come out as NaN.
__device__ __forceinline__ void split_tf32(float x, uint32_t& hi, uint32_t& lo) {
    hi = (__float_as_uint(x) + 0x1000) & 0xffffe000;
    lo = __float_as_uint(x - __uint_as_float(hi));
}

// Two 16-bit floats of one 32-bit word; x is the lower half, which comes first in memory.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
    } else {
        static_assert(std::is_same_v<T, __half>);
        const auto bits = [](uint32_t half) {
            return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
        };
        return make_float2(bits(word & 0xffff), bits(word >> 16));
    }
}

// c + a . b of one word: one product for Tf32, two for 16-bit floats.
template <typename T>
__device__ __forceinline__ float dot(uint32_t a, uint32_t b, float c) {
    if constexpr (std::is_same_v<T, Tf32>) {
        constexpr uint32_t kRead = 0xffffe000;
        return fmaf(__uint_as_float(a & kRead), __uint_as_float(b & kRead), c);
    } else {
        const float2 x = unpack<T>(a), y = unpack<T>(b);
        return fmaf(x.y, y.y, fmaf(x.x, y.x, c));
    }
}

// mma() without matrix instructions, for sm_75.
template <typename T>
__device__ __forceinline__ void mma_by_shuffles(float (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
    const int lane = threadIdx.x % kWarp, group = lane / 4 * 4, column = lane % 4 * 2;
#pragma unroll
    for (int w = 0; w < 8; ++w) {
        const int t = w % 4, half = w / 4;
        const uint32_t upper = __shfl_sync(kAllLanes, a[2 * half], group + t);
        const uint32_t lower = __shfl_sync(kAllLanes, a[2 * half + 1], group + t);
        const uint32_t left = __shfl_sync(kAllLanes, b[half], column * 4 + t);
        const uint32_t right = __shfl_sync(kAllLanes, b[half], (column + 1) * 4 + t);
        c[0] = dot<T>(upper, left, c[0]);
        c[1] = dot<T>(upper, right, c[1]);
        c[2] = dot<T>(lower, left, c[2]);
        c[3] = dot<T>(lower, right, c[3]);
    }
}

// x - y of the two float16 in each.
__device__ __forceinline__ uint32_t subtract_halves(uint32_t x, uint32_t y) {
    const __half2 difference =
        __hsub2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(y));
    return reinterpret_cast<const uint32_t&>(difference);
}

// c += a b by a whole warp: c is 16 x 8 float32, a is 16 x K, b is K x 8.
//
// Think of a row of a, and of a column of b, as 8 words of 32 bits. A word is one element of Tf32
// (K = 8), or two neighbours along K of __half or __nv_bfloat16 (K = 16), the first one in the
// lower half. Lane l, with g = l / 4 and t = l % 4, holds
//
//   a[0]  row g,     word t        b[0]  column g, word t        c[0]  row g,     column 2 t
//   a[1]  row g + 8, word t        b[1]  column g, word t + 4    c[1]  row g,     column 2 t + 1
//   a[2]  row g,     word t + 4                                  c[2]  row g + 8, column 2 t
//   a[3]  row g + 8, word t + 4                                  c[3]  row g + 8, column 2 t + 1
//
// The order of the sum along K is the hardware's own, the same on every run.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    if constexpr (std::is_same_v<T, __half>) {
        ptx::mma_m16n8k8_f16(c, a[0], a[1], b[0]);
        ptx::mma_m16n8k8_f16(c, a[2], a[3], b[1]);
    } else {
        mma_by_shuffles<T>(c, a, b);
    }
#else
    if constexpr (std::is_same_v<T, Tf32>) {
        ptx::mma_m16n8k8_tf32(c, a, b);
    } else if constexpr (std::is_same_v<T, __half>) {
        ptx::mma_m16n8k16_f16(c, a, b);
    } else {
        static_assert(std::is_same_v<T, __nv_bfloat16>);
        ptx::mma_m16n8k16_bf16(c, a, b);
    }
#endif
}

// ---- Keys --------------------------------------------------------------------------------------

// A distance and its index in one integer, so that one atomicMin or atomicMax settles both; of
// equal distances the lowest index wins.

// Bits that order as the floats do, negative ones too, and NaN above infinity.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
    const uint32_t bits = x != x ? 0x7fffffff : __float_as_uint(x);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

__device__ __forceinline__ float from_ordered_bits(uint32_t bits) {
    return __uint_as_float(bits & 0x80000000 ? bits & 0x7fffffff : ~bits);
}

// Raises *p, which started at -infinity, to x; NaN stays. Floats of one sign order as their bits
// do.
__device__ __forceinline__ void atomic_max(float* p, float x) {
    const unsigned bits = x != x ? 0x7fffffff : __float_as_uint(x);
    if (bits & 0x80000000)
        atomicMin(reinterpret_cast<unsigned*>(p), bits);
    else
        atomicMax(reinterpret_cast<int*>(p), static_cast<int>(bits));
}

struct NearestKey {  // for atomicMin
    __device__ static unsigned long long make(float distance, uint32_t index) {
        return static_cast<unsigned long long>(ordered_bits(distance)) << 32 | index;
    }
    __device__ static uint32_t index(unsigned long long key) { return static_cast<uint32_t>(key); }
    __device__ static float distance(unsigned long long key) {
        return from_ordered_bits(static_cast<uint32_t>(key >> 32));
    }
};

struct FarthestKey {  // for atomicMax
    __device__ static unsigned long long make(float distance, uint32_t index) {
        return NearestKey::make(distance, ~index);
    }
    __device__ static uint32_t index(unsigned long long key) { return ~NearestKey::index(key); }
    __device__ static float distance(unsigned long long key) { return NearestKey::distance(key); }
};

}  // namespace npad::cuda
