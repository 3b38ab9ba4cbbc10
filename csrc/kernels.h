// Every kernel launcher of npad, in one place: plain pointers, int64 sizes, then a thread count or
// a stream. bindings.cpp makes a Python function of each signature. All arrays but levels are
// contiguous and row-major; embeddings are channels last. Arguments are checked in
// npad/ops/__init__.py and nowhere else. Equations: docs/method.md; packed layout: packed.h.
#pragma once

#include <cstdint>

struct CUstream_st;  // CUDA's own, not npad's: a launcher has one name with and without its headers

namespace npad {

// Storage of feature levels and factors; of kInt8, factors alone.
enum class DataType { kFloat32, kFloat16, kBFloat16, kInt8 };

// A level of features, (batch, channels, height, width), which may have any strides; in elements.
// In Python a row of eight int64: level_table() of npad/ops/_extension.py.
struct Level {
    const void* data;
    int64_t channels, height, width;
    int64_t stride_n, stride_c, stride_h, stride_w;
};
static_assert(sizeof(Level) == 8 * sizeof(int64_t));

// Called now and then from the calling thread; returns false to stop the kernel.
struct Progress {
    bool (*step)(void* user, int64_t done, int64_t total);
    void* user;
};

namespace cpu {

// levels, each with stride_c or stride_w 1 -> embedding (batch, height, width, sum of channels).
using Embed = void(const Level* levels, int64_t n_levels, DataType type, int64_t batch,
                   int64_t height, int64_t width, float* embedding, int threads);

// x (batch, positions, channels); count (positions), mean (positions, channels) and
// scatter (positions, packed) are updated in place.
using NeighborhoodMoments = void(const float* x, int64_t batch, int64_t positions, int64_t channels,
                                 int64_t* count, float* mean, float* scatter, int threads);

// count, mean, scatter of the whole grid -> window_mean (stop - start, channels) and
// covariance (stop - start, channels, channels).
using WindowCovariance = void(const int64_t* count, const float* mean, const float* scatter,
                              int64_t height, int64_t width, int64_t channels, int64_t window,
                              int64_t start, int64_t stop, float* window_mean, float* covariance,
                              int threads);

// factor (count, channels, channels), lower triangular -> packed (count, packed).
using PackFactor = void(const float* factor, int64_t count, int64_t channels, float* packed,
                        int threads);

// covariance (count, channels, channels), symmetric -> W = L^-1, packed (count, packed), and info
// (count): 0, or the order of the first leading minor that is not positive, where packed is NaN.
using InverseCholesky = void(const float* covariance, int64_t count, int64_t channels,
                             float* packed, int32_t* info, int threads);

// x (batch, height * width, channels) -> distance (batch, height * width); with a prefix, which is
// not 0, (2, batch, height * width): in so many of the channels, and in all.
using Mahalanobis = void(const float* x, int64_t batch, int64_t height, int64_t width,
                         int64_t channels, const float* mean, const void* factor, DataType type,
                         int64_t window, int64_t prefix, float* distance, int threads);

// Axes of a centroid index, a multiple of four; those above the number of channels are zero.
inline int64_t centroid_index_axes(int64_t channels) {
    return channels < 128 ? (channels + 3) / 4 * 4 : 128;
}

// centroids (k, channels), mean (channels) and orthonormal axes (axes, channels) -> index, whose
// size is that of npad/ops/reference.py.
using CentroidIndex = void(const float* centroids, int64_t k, int64_t channels, const float* mean,
                           const float* axes, float* index, int threads);

// x (n, channels), centroids (k, channels), their index or null -> distance (n) and nearest (n).
using NearestCentroid = void(const float* x, int64_t n, const float* centroids, int64_t k,
                             int64_t channels, const float* index, float* distance,
                             int64_t* nearest, int threads);

// points (n, dim) -> index (n_centroids) and radius (n_centroids); false if stopped. Any mean (dim)
// will do; `axes` has this many rows of dim: orthonormal, about the leading principal axes of the
// points, the leading first, then zeros. Either may be null, which finds the same more slowly.
constexpr int64_t farthest_first_axes() { return 62; }
using FarthestFirst = bool(const float* points, int64_t n, int64_t dim, int64_t n_centroids,
                           int64_t first, const float* mean, const float* axes, int64_t* index,
                           float* radius, Progress progress, int threads);

// mahalanobis and euclidean (n, h, w), of which one may be null -> maps (n, height, width) and
// their largest values, scores (n). Row i of a map is sum_j row_taps[i, j] x[row_first[i] + j],
// with row_width taps; columns likewise.
using AnomalyMap = void(const float* mahalanobis, const float* euclidean, bool product, double a,
                        double b, double c, int64_t n, int64_t h, int64_t w,
                        const int32_t* row_first, const float* row_taps, int64_t row_width,
                        const int32_t* column_first, const float* column_taps, int64_t column_width,
                        int64_t height, int64_t width, float* maps, float* scores, int threads);

// maps (n, height, width) -> resized: n maps of heights[i] x widths[i], one after another.
using ResizeMaps = void(const float* maps, int64_t n, int64_t height, int64_t width,
                        const int64_t* heights, const int64_t* widths, float* resized, int threads);

struct Kernels {
    Embed* embed;
    NeighborhoodMoments* neighborhood_moments;
    WindowCovariance* window_covariance;
    PackFactor* pack_factor;
    InverseCholesky* inverse_cholesky;
    Mahalanobis* mahalanobis;
    CentroidIndex* centroid_index;
    NearestCentroid* nearest_centroid;
    FarthestFirst* farthest_first;
    AnomalyMap* anomaly_map;
    ResizeMaps* resize_maps;
};

// Instruction sets compiled in and runnable on this processor, best first, ending in "baseline".
inline constexpr int kMaxIsas = 5;
struct Isa {
    const char* name;
    Kernels kernels;
};
int available_isas(const Isa* isas[kMaxIsas]);

// A hint for memory that is about to be written.
void use_huge_pages(void* memory, int64_t bytes);

}  // namespace cpu

// Device pointers. Launched on the stream, which is cudaStream_t; nothing is allocated, nothing
// waited for. The result is cudaError_t.
namespace cuda {

using Stream = CUstream_st*;

int set_device(int device);
const char* error_name(int error);
const char* error_text(int error);
int runtime_version();
int driver_version();

// `levels` lies in the host's memory; their data on the device.
int embed(const Level* levels, int64_t n_levels, DataType type, int64_t batch, int64_t height,
          int64_t width, float* embedding, Stream stream);

int neighborhood_moments(const float* x, int64_t batch, int64_t positions, int64_t channels,
                         int64_t* count, float* mean, float* scatter, Stream stream);

int window_covariance(const int64_t* count, const float* mean, const float* scatter, int64_t height,
                      int64_t width, int64_t channels, int64_t window, int64_t start, int64_t stop,
                      float* window_mean, float* covariance, Stream stream);

int pack_factor(const float* factor, int64_t count, int64_t channels, void* packed, DataType type,
                Stream stream);

// Bytes that the next launcher's workspace needs, aligned to 256.
int64_t inverse_cholesky_workspace(int64_t count, int64_t channels);
int inverse_cholesky(const float* covariance, int64_t count, int64_t channels, void* workspace,
                     void* packed, DataType type, int32_t* info, Stream stream);

int mahalanobis(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels,
                const float* mean, const void* factor, DataType type, int64_t window,
                int64_t prefix, float* distance, Stream stream);

// Bytes of an index, aligned to 16. All zeros will do for one, and every centroid is measured.
int64_t centroid_index_bytes(int64_t k, int64_t channels);
int centroid_index(const float* centroids, int64_t k, int64_t channels, void* index, Stream stream);

int64_t nearest_centroid_workspace(int64_t n, int64_t k, int64_t channels);
int nearest_centroid(const float* x, int64_t n, const float* centroids, int64_t k, int64_t channels,
                     const void* index, void* workspace, float* distance, int64_t* nearest,
                     Stream stream);

// How many rows `axes` has, (rows, dim): the first is zero, the others orthonormal, about the
// leading principal axes of the points, the leading first. Without axes, null, every point is
// measured; that is best where this returns 0. Any mean will do. The workspace is for that many
// axes, or for none.
int64_t farthest_first_axes(int64_t dim);
int64_t farthest_first_workspace(int64_t n, int64_t n_axes);
int farthest_first(const float* points, int64_t n, int64_t dim, int64_t n_centroids, int64_t first,
                   const float* mean, const float* axes, void* workspace, int64_t* index,
                   float* radius, Stream stream);

int64_t anomaly_map_workspace(int64_t n, int64_t h, int64_t w);
int anomaly_map(const float* mahalanobis, const float* euclidean, bool product, double a, double b,
                double c, int64_t n, int64_t h, int64_t w, const int32_t* row_first,
                const float* row_taps, int64_t row_width, const int32_t* column_first,
                const float* column_taps, int64_t column_width, int64_t height, int64_t width,
                void* workspace, float* maps, float* scores, Stream stream);

// heights and widths are on the host, and read before this returns.
int resize_maps(const float* maps, int64_t n, int64_t height, int64_t width, const int64_t* heights,
                const int64_t* widths, float* resized, Stream stream);

}  // namespace cuda
}  // namespace npad
