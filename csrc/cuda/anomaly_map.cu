// Anomaly maps and scores from the maps M and E of both distances on the grid:
//
//   x = M^a E^b + c  or  a M + b E + c
//   map = rows (x - min x) columns^T + min x;   score = max map
//
//   M, E (n, h, w), maps (n, height, width), scores (n), all float32
//
// rows and columns upsample and smooth one axis each: matrices of a few neighbouring taps to a row.
// What is left of a constant map after its minimum is exactly zero; a value that is not finite
// makes the minimum, and so the whole map, NaN.
//
// Two kernels. The first fuses: a block owns a part of one grid, of which it also keeps the least
// and the largest value. In the second a block owns kRows rows of one map: it blends the grid's
// rows into shared memory, still w wide, then a thread widens whole columns of them in registers.
// Fewest bytes: the maps written once, 4 n height width; a block reads the few grid rows under its
// own from the cache. Sums run over taps in order; the maximum is an atomic on bits that order as
// the floats do. A block needs kRows w floats of shared memory: w at most some 3000.
#include "device_utils.cuh"
#include "kernels.h"

namespace npad::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kPart = 1024;  // cells of the grid that a block fuses
constexpr int kRows = 8;     // two vectors of shared memory for a thread and tap

struct Workspace {
    float2* range;  // (n, parts): least and largest
    float* fused;   // (n, cells)
    int64_t parts, bytes;

    Workspace(void* memory, int64_t n, int64_t cells) : parts(ceil_div(cells, kPart)) {
        range = static_cast<float2*>(memory);
        fused = reinterpret_cast<float*>(range + n * parts);
        bytes = n * (parts * static_cast<int64_t>(sizeof(float2)) +
                     cells * static_cast<int64_t>(sizeof(float)));
    }
};

struct Fusion {
    float a, b, c;
};

template <bool kProduct>
__global__ void __launch_bounds__(kThreads)
    fuse_kernel(const float* __restrict__ mahalanobis, const float* __restrict__ euclidean,
                const Fusion f, int64_t cells, const Workspace w, float* __restrict__ scores) {
    const int64_t n = blockIdx.x / w.parts, part = blockIdx.x % w.parts;
    const int64_t end = min((part + 1) * kPart, cells);
    float low = INFINITY, high = -INFINITY;
    for (int64_t i = part * kPart + threadIdx.x; i < end; i += kThreads) {
        const float m = mahalanobis[n * cells + i], e = euclidean[n * cells + i];
        const float x =
            kProduct ? fmaf(powf(m, f.a), powf(e, f.b), f.c) : fmaf(f.a, m, fmaf(f.b, e, f.c));
        w.fused[n * cells + i] = x;
        low = Minimum()(low, x);
        high = Maximum()(high, x);
    }
    low = block_reduce<kThreads>(low, Minimum());
    high = block_reduce<kThreads>(high, Maximum());
    if (threadIdx.x == 0) {
        w.range[blockIdx.x] = make_float2(low, high);
        if (part == 0) scores[n] = -INFINITY;
    }
}

struct Band {
    const int32_t* first;
    const float* taps;  // (outputs, width)
    int width;
};

struct Grid {
    int64_t h, w;
    Band rows, columns;
};

// Aligned, so that both halves of a column's rows are one load each.
struct alignas(16) Column {
    float4 upper, lower;
};
static_assert(kRows == 8);

__global__ void __launch_bounds__(kThreads)
    map_kernel(const Workspace workspace, const Grid grid, int64_t height, int64_t width,
               float* __restrict__ maps, float* __restrict__ scores) {
    const int64_t strips = ceil_div(height, kRows);
    const int64_t n = blockIdx.x / strips, top = blockIdx.x % strips * kRows;
    const int count = static_cast<int>(min(height - top, int64_t{kRows}));

    // Every warp for itself, the same values in the same order.
    float low = INFINITY, high = -INFINITY;
    for (int64_t i = threadIdx.x % kWarp; i < workspace.parts; i += kWarp) {
        const float2 range = workspace.range[n * workspace.parts + i];
        low = Minimum()(low, range.x);
        high = Maximum()(high, range.y);
    }
    low = warp_reduce(low, Minimum());
    high = warp_reduce(high, Maximum());
    const float base = low + 0 * (high - low);

    float* blended = dynamic_shared<float>();  // (w, kRows)
    const float* fused = workspace.fused + n * grid.h * grid.w;
    const int w = static_cast<int>(grid.w);
    for (int i = threadIdx.x; i < kRows * w; i += kThreads) {
        const int row = i / w, column = i % w;
        float sum = 0;
        if (row < count) {
            const float* taps = grid.rows.taps + (top + row) * grid.rows.width;
            const float* x = fused + grid.rows.first[top + row] * grid.w + column;
            for (int k = 0; k < grid.rows.width; ++k)
                sum = fmaf(taps[k], x[k * grid.w] - base, sum);
        }
        blended[column * kRows + row] = sum;
    }
    __syncthreads();

    float peak = 0;
    float* map = maps + (n * height + top) * width;
    for (int64_t j = threadIdx.x; j < width; j += kThreads) {
        const float* taps = grid.columns.taps + j * grid.columns.width;
        const float* x = blended + grid.columns.first[j] * kRows;
        float sum[kRows] = {};
        for (int k = 0; k < grid.columns.width; ++k) {
            const float tap = taps[k];
            const auto [upper, lower] = load<Column>(x + k * kRows);
            sum[0] = fmaf(tap, upper.x, sum[0]);
            sum[1] = fmaf(tap, upper.y, sum[1]);
            sum[2] = fmaf(tap, upper.z, sum[2]);
            sum[3] = fmaf(tap, upper.w, sum[3]);
            sum[4] = fmaf(tap, lower.x, sum[4]);
            sum[5] = fmaf(tap, lower.y, sum[5]);
            sum[6] = fmaf(tap, lower.z, sum[6]);
            sum[7] = fmaf(tap, lower.w, sum[7]);
        }
#pragma unroll
        for (int row = 0; row < kRows; ++row)
            if (row < count) {
                map[row * width + j] = sum[row] + base;
                peak = fmaxf(peak, sum[row]);
            }
    }
    peak = block_reduce<kThreads>(peak, Maximum());
    if (threadIdx.x == 0) atomic_max(scores + n, peak + base);
}

}  // namespace

int64_t anomaly_map_workspace(int64_t n, int64_t h, int64_t w) {
    return Workspace(nullptr, n, h * w).bytes;
}

int anomaly_map(const float* mahalanobis, const float* euclidean, bool product, double a, double b,
                double c, int64_t n, int64_t h, int64_t w, const int32_t* row_first,
                const float* row_taps, int64_t row_width, const int32_t* column_first,
                const float* column_taps, int64_t column_width, int64_t height, int64_t width,
                void* workspace, float* maps, float* scores, Stream stream) {
    if (n == 0) return cudaSuccess;
    if (mahalanobis == nullptr) mahalanobis = euclidean, a = 0;
    if (euclidean == nullptr) euclidean = mahalanobis, b = 0;
    const Fusion fusion = {static_cast<float>(a), static_cast<float>(b), static_cast<float>(c)};
    const Grid grid = {h,
                       w,
                       {row_first, row_taps, static_cast<int>(row_width)},
                       {column_first, column_taps, static_cast<int>(column_width)}};
    const Workspace space(workspace, n, h * w);
    const int64_t parts = n * space.parts, strips = n * ceil_div(height, kRows);
    if (parts > INT32_MAX || strips > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaError_t error =
        launch(product ? fuse_kernel<true> : fuse_kernel<false>, static_cast<unsigned>(parts),
               kThreads, 0, stream, mahalanobis, euclidean, fusion, h * w, space, scores);
    if (error == cudaSuccess)
        error = launch(map_kernel, static_cast<unsigned>(strips), kThreads,
                       static_cast<size_t>(kRows * w) * sizeof(float), stream, space, grid, height,
                       width, maps, scores);
    return error;
}

}  // namespace npad::cuda
