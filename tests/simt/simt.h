// CUDA C++ on a CPU, for tests: with this header a .cu file compiles, unchanged, as C++20.
//
// A thread of a block is a fibre; the fibres of a grid take turns on one thread of the processor,
// in an order that the test chooses. What is reported:
//
//   always    threads that wait for one another in vain: a barrier or a warp function that some
//             thread of the block or lane of the mask does not reach, or reaches at another place
//             of the source
//   checked   (kernels compiled with -fsanitize=thread,bounds,alignment and linked without any
//             sanitizer's library) accesses out of bounds or misaligned, races in shared and global
//             memory, shared memory that is read before it is written
//
// A fault ends the launch with cudaErrorLaunchFailure and simt_report() says where it happened.
//
// Only the part of CUDA that npad's kernels use is here. A kernel may not use volatile variables or
// spinning to pass data on: nothing ever runs at the same time. Numbers are those of the host:
// products and sums are fused where the code says fmaf and, in simt_fma, wherever the compiler can,
// as nvcc does, though perhaps not the same ones. A matrix instruction truncates its sum as tensor
// cores do.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

// ---- Language ----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// Static shared memory is all that the kernels' library holds in thread-local storage, so its
// storage is one range; the emulator swaps its contents when another block's turn comes.
#define __shared__ thread_local

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim simt_block_size()  // names of fields, too
#define gridDim simt_grid_size()
inline constexpr int warpSize = 32;

// Lets a test call `launcher` (a name without namespace, written inside of it) from Python.
#define SIMT_EXPORT(launcher)                                                              \
    extern "C" __attribute__((visibility("default"))) decltype(&launcher) simt_##launcher; \
    decltype(&launcher) simt_##launcher = &launcher;

// ---- Vectors -----------------------------------------------------------------------------------

#define SIMT_VECTORS(type, name)                                                \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                    \
    struct name##3 { type x, y, z; };                                           \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };              \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTORS(float, float)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
#undef SIMT_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- Emulator -----------------------------------------------------------------------------------

struct cudaLaunchConfig_t;
enum cudaError_t : int;

// Constant while a kernel runs in one fibre.
[[gnu::const]] dim3 simt_block_size();
[[gnu::const]] dim3 simt_grid_size();

namespace simt {

using Where = std::source_location;

[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] int lane();

void* dynamic_shared();
int block_barrier(const char* name, int value, Where where);  // number of values that are not 0
void grid_barrier(Where where);
void warp_barrier(unsigned mask, Where where);

uint64_t shuffle(const char* name, unsigned mask, uint64_t value, int source, Where where);
unsigned ballot(const char* name, unsigned mask, bool value, Where where);
enum class Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };
unsigned reduce(const char* name, unsigned mask, Reduction op, unsigned value, Where where);
int reduce(const char* name, unsigned mask, Reduction op, int value, Where where);
enum class Element { kTf32, kFloat16, kBFloat16 };
void mma(Element type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where);

// Records what an atomic function, which returns to `caller`, touches.
void atomic_access(void* address, size_t bytes, void* caller);

void copy_async(void* shared, const void* global, size_t bytes, size_t zeros);
void commit_copies();
void wait_copies(size_t groups);

struct Body {
    void (*run)(const void* arguments);
    const void* arguments;
    size_t bytes;
};
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Body& body);
cudaError_t allow_dynamic_shared(const void* kernel, size_t bytes);
inline constexpr int kBlocksPerProcessor = 2;
int processors();
size_t most_shared();  // bytes that a block may have

template <typename To, typename From>
inline To bits_as(From value) {
    static_assert(sizeof(From) <= sizeof(To) || sizeof(To) <= 8);
    To to{};
    std::memcpy(&to, &value, std::min(sizeof to, sizeof value));
    return to;
}

}  // namespace simt

// ---- Barriers and warp functions ---------------------------------------------------------------

// The default argument is the place of the call.
#define SIMT_WHERE simt::Where where = simt::Where::current()

inline void __syncthreads(SIMT_WHERE) { simt::block_barrier("__syncthreads", 0, where); }
inline int __syncthreads_count(int value, SIMT_WHERE) {
    return simt::block_barrier("__syncthreads_count", value, where);
}
inline int __syncthreads_or(int value, SIMT_WHERE) {
    return simt::block_barrier("__syncthreads_or", value, where) > 0;
}
inline int __syncthreads_and(int value, SIMT_WHERE) {
    return simt::block_barrier("__syncthreads_and", !value, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff, SIMT_WHERE) { simt::warp_barrier(mask, where); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_WHERE) {
    const int from = (simt::lane() & -width) | (source & (width - 1));
    return simt::bits_as<T>(
        simt::shuffle("__shfl_sync", mask, simt::bits_as<uint64_t>(value), from, where));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_WHERE) {
    const int lane = simt::lane(), other = lane ^ bits;
    const int from = other < (lane & -width) + width ? other : lane;
    return simt::bits_as<T>(
        simt::shuffle("__shfl_xor_sync", mask, simt::bits_as<uint64_t>(value), from, where));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, SIMT_WHERE) {
    const int lane = simt::lane(), other = lane + static_cast<int>(distance);
    const int from = other < (lane & -width) + width ? other : lane;
    return simt::bits_as<T>(
        simt::shuffle("__shfl_down_sync", mask, simt::bits_as<uint64_t>(value), from, where));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, SIMT_WHERE) {
    const int lane = simt::lane(), other = lane - static_cast<int>(distance);
    const int from = other >= (lane & -width) ? other : lane;
    return simt::bits_as<T>(
        simt::shuffle("__shfl_up_sync", mask, simt::bits_as<uint64_t>(value), from, where));
}

inline unsigned __ballot_sync(unsigned mask, int value, SIMT_WHERE) {
    return simt::ballot("__ballot_sync", mask, value != 0, where);
}
inline int __any_sync(unsigned mask, int value, SIMT_WHERE) {
    return simt::ballot("__any_sync", mask, value != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int value, SIMT_WHERE) {
    return simt::ballot("__all_sync", mask, value != 0, where) == mask;
}

#define SIMT_REDUCE(name, op)                                                \
    template <typename T>                                                    \
    T name(unsigned mask, T value, SIMT_WHERE) {                             \
        return simt::reduce(#name, mask, simt::Reduction::op, value, where); \
    }
SIMT_REDUCE(__reduce_add_sync, kAdd)
SIMT_REDUCE(__reduce_min_sync, kMin)
SIMT_REDUCE(__reduce_max_sync, kMax)
SIMT_REDUCE(__reduce_and_sync, kAnd)
SIMT_REDUCE(__reduce_or_sync, kOr)
SIMT_REDUCE(__reduce_xor_sync, kXor)
#undef SIMT_REDUCE

namespace cooperative_groups {
struct grid_group {
    void sync(SIMT_WHERE) const { simt::grid_barrier(where); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

// ---- Memory ------------------------------------------------------------------------------------

// There is no __ldg: nobody would notice if a kernel wrote what it loads past the coherent caches.
// nvcc makes that load of `const T* __restrict__`, too; a kernel with a grid barrier gives it only
// to what no block writes.
template <typename T>
T __ldcs(const T* p) {
    return *p;
}

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes,
                                    size_t zeros = 0) {
    simt::copy_async(shared, global, bytes, zeros);
}
inline void __pipeline_commit() { simt::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups) { simt::wait_copies(groups); }

// An atomic reports itself as such, so its own load and store must not count as plain ones.
#define SIMT_ATOMIC(name, result)                                                                  \
    template <typename T>                                                                          \
    __attribute__((noinline, no_sanitize("thread"))) T name(T* p, std::type_identity_t<T> value) { \
        simt::atomic_access(p, sizeof(T), __builtin_return_address(0));                            \
        const T old = *p;                                                                          \
        *p = result;                                                                               \
        return old;                                                                                \
    }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicExch, value)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, value > old ? value : old)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
#undef SIMT_ATOMIC
template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* p, std::type_identity_t<T> expected,
                                                             std::type_identity_t<T> value) {
    simt::atomic_access(p, sizeof(T), __builtin_return_address(0));
    const T old = *p;
    if (old == expected) *p = value;
    return old;
}

// ---- Arithmetic --------------------------------------------------------------------------------

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// Never fused with what is around them.
[[gnu::noinline]] inline float __fadd_rn(float a, float b) { return a + b; }
[[gnu::noinline]] inline float __fsub_rn(float a, float b) { return a - b; }
[[gnu::noinline]] inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) { return simt::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return simt::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits_as<float>(x); }
inline float __int_as_float(int x) { return simt::bits_as<float>(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i)
        result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }

struct __half {
    unsigned short bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
inline float __half2float(__half x) { return static_cast<float>(simt::bits_as<_Float16>(x)); }
inline __half __float2half_rn(float x) { return simt::bits_as<__half>(static_cast<_Float16>(x)); }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.x) - __half2float(b.x),
                             __half2float(a.y) - __half2float(b.y));
}

struct __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return {x}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x), tie_to_even = 0x7fff + (bits >> 16 & 1);
    return {static_cast<unsigned short>(x != x ? 0x7fff : (bits + tie_to_even) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline float2 __bfloat1622float2(__nv_bfloat162 x) {
    return {__bfloat162float(x.x), __bfloat162float(x.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16(x), __float2bfloat16(y)};
}

// ---- csrc/cuda/ptx.cuh -------------------------------------------------------------------------

namespace npad::cuda::ptx {

inline void* dynamic_shared() { return simt::dynamic_shared(); }
inline void keep_memory_order() {}
template <int kBytes, bool kThroughL1>
void cp_async_or_zeros(void* shared, const void* global, bool stored) {
    simt::copy_async(shared, global, kBytes, stored ? 0 : kBytes);
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             SIMT_WHERE) {
    simt::mma(simt::Element::kTf32, c, a, b, where);
}
inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             SIMT_WHERE) {
    simt::mma(simt::Element::kFloat16, c, a, b, where);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              SIMT_WHERE) {
    simt::mma(simt::Element::kBFloat16, c, a, b, where);
}
// The upper half of the depth is zero.
inline void mma_m16n8k8_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b, SIMT_WHERE) {
    simt::mma(simt::Element::kFloat16, c, {a0, a1, 0, 0}, {b, 0}, where);
}

}  // namespace npad::cuda::ptx

#undef SIMT_WHERE

// ---- Runtime -----------------------------------------------------------------------------------

enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
    cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

using cudaStream_t = struct CUstream_st*;
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 grid, block;
    dim3& gridDim { return grid; }
    dim3& blockDim { return block; }
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? simt::processors()
                                                         : static_cast<int>(simt::most_shared());
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
    attributes->sharedSizeBytes = 0;  // not known of one kernel
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
    return simt::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), value);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
    *blocks = simt::kBlocksPerProcessor;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    std::memset(p, value, bytes);
    return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    const auto call = [kernel, ... values = static_cast<Parameters>(arguments)] {
        kernel(values...);
    };
    const auto run = [](const void* p) { (*static_cast<const decltype(call)*>(p))(); };
    return simt::launch(*config, reinterpret_cast<const void*>(kernel), {run, &call, sizeof call});
}
