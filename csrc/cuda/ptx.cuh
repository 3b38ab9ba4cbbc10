// What CUDA C++ has no name for: PTX instructions and untyped shared memory, one function each.
// Only device_utils.cuh includes this file. Tests on a CPU put tests/simt/simt.h in its place.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace npad::cuda::ptx {

// The block's dynamic shared memory. Typed `extern` arrays of two kernels would clash.
__device__ __forceinline__ void* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char shared[];
    return shared;
}

// The compiler moves no access to memory across this place. CUDA's wait for asynchronous copies is
// volatile but does not say that it changes memory: a thread that reads what it has copied itself
// has no barrier after the wait that would say so.
__device__ __forceinline__ void keep_memory_order() { asm volatile("" ::: "memory"); }

// Starts a copy of kBytes to shared memory, or of zeros: then nothing is read. CUDA's own function
// takes that choice as a constant alone. Only 16 bytes go past L1.
template <int kBytes, bool kThroughL1>
__device__ __forceinline__ void cp_async_or_zeros(void* shared, const void* global, bool stored) {
#if __CUDA_ARCH__ < 800
    using Vector =
        std::conditional_t<kBytes == 4, unsigned, std::conditional_t<kBytes == 8, uint2, uint4>>;
    *static_cast<Vector*>(shared) = stored ? *static_cast<const Vector*>(global) : Vector();
#else
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int bytes = stored ? kBytes : 0;
    if constexpr (kThroughL1)
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(to), "l"(global), "n"(kBytes), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(to), "l"(global), "n"(kBytes), "r"(bytes)
                     : "memory");
#endif
}

// c += a b with the fragments that mma() in device_utils.cuh describes. Templates, so that an
// architecture without the instruction never meets it. Volatile, since all lanes must arrive at the
// instruction together: it may not move to where only some of them need its result. It touches
// registers alone, so memory is not clobbered and loads move past it.
template <typename = void>
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename = void>
__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename = void>
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Half the depth, for sm_75: a holds the two words of columns 0 .. 7.
__device__ __forceinline__ void mma_m16n8k8_f16(float (&c)[4], uint32_t a0, uint32_t a1,
                                                uint32_t b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

}  // namespace npad::cuda::ptx
