// Chooses, at run time, among the instruction sets that the kernels were compiled for.
#include "../kernels.h"

namespace npad::cpu {

#define NPAD_KERNELS_OF(isa)                                                                    \
    namespace isa {                                                                             \
    NeighborhoodMoments neighborhood_moments;                                                   \
    WindowCovariance window_covariance;                                                         \
    PackFactor pack_factor;                                                                     \
    InverseCholesky inverse_cholesky;                                                           \
    Mahalanobis mahalanobis;                                                                    \
    CentroidIndex centroid_index;                                                               \
    NearestCentroid nearest_centroid;                                                           \
    FarthestFirst farthest_first;                                                               \
    constexpr Isa kIsa{#isa,                                                                    \
                       {neighborhood_moments, window_covariance, pack_factor, inverse_cholesky, \
                        mahalanobis, centroid_index, nearest_centroid, farthest_first}};        \
    }

NPAD_KERNELS_OF(baseline)
#if defined(NPAD_X86_64)
NPAD_KERNELS_OF(avx2)
NPAD_KERNELS_OF(avx512)

// The same kernels, but nearest_centroid with the instruction for products of bytes.
#define NPAD_VNNI_OF(isa)                                                                        \
    namespace isa {                                                                              \
    NearestCentroid nearest_centroid_vnni;                                                       \
    constexpr Isa kVnni{#isa "_vnni",                                                            \
                        {neighborhood_moments, window_covariance, pack_factor, inverse_cholesky, \
                         mahalanobis, centroid_index, nearest_centroid_vnni, farthest_first}};   \
    }
NPAD_VNNI_OF(avx2)
NPAD_VNNI_OF(avx512)
#endif

int available_isas(const Isa* isas[kMaxIsas]) {
    int n = 0;
#if defined(NPAD_X86_64)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        if (__builtin_cpu_supports("avx512vnni")) isas[n++] = &avx512::kVnni;
        isas[n++] = &avx512::kIsa;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
        if (__builtin_cpu_supports("avxvnni")) isas[n++] = &avx2::kVnni;
        isas[n++] = &avx2::kIsa;
    }
#endif
    isas[n++] = &baseline::kIsa;
    return n;
}

}  // namespace npad::cpu
