// Chooses, at run time, among the instruction sets that the kernels were compiled for.
#include "../kernels.h"

namespace npad::cpu {

#define NPAD_KERNELS_OF(isa)                                                             \
    namespace isa {                                                                      \
    Embed embed;                                                                         \
    NeighborhoodMoments neighborhood_moments;                                            \
    WindowCovariance window_covariance;                                                  \
    PackFactor pack_factor;                                                              \
    InverseCholesky inverse_cholesky;                                                    \
    Mahalanobis mahalanobis;                                                             \
    CentroidIndex centroid_index;                                                        \
    NearestCentroid nearest_centroid;                                                    \
    FarthestFirst farthest_first;                                                        \
    AnomalyMap anomaly_map;                                                              \
    ResizeMaps resize_maps;                                                              \
    constexpr Isa kIsa{#isa,                                                             \
                       {embed, neighborhood_moments, window_covariance, pack_factor,     \
                        inverse_cholesky, mahalanobis, centroid_index, nearest_centroid, \
                        farthest_first, anomaly_map, resize_maps}};                      \
    }

NPAD_KERNELS_OF(baseline)
#if defined(NPAD_X86_64)
NPAD_KERNELS_OF(avx2)
NPAD_KERNELS_OF(avx512)

// The same kernels, but nearest_centroid with the instruction for products of bytes.
constexpr Isa with_vnni(Isa isa, const char* name, NearestCentroid* nearest_centroid) {
    isa.name = name;
    isa.kernels.nearest_centroid = nearest_centroid;
    return isa;
}
#define NPAD_VNNI_OF(isa)                                                       \
    namespace isa {                                                             \
    NearestCentroid nearest_centroid_vnni;                                      \
    constexpr Isa kVnni = with_vnni(kIsa, #isa "_vnni", nearest_centroid_vnni); \
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
