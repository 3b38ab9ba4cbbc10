// Mean and covariance of each position over its clipped window (law of total covariance, exact):
//
//   n = sum n_q;  mu = sum n_q m_q / n
//   S = sum [ S_q + n_q (m_q - mu)(m_q - mu)^T ];  covariance = S / (n - 1)
//
// A block owns a tile of 32 rows and 64 columns of the lower triangle at 2 x 4 positions of the
// grid, so that a scatter which lies in several of their windows is loaded once: (w + 1) (w + 3) /
// 8 loads per position in place of w^2. Blocks of the same tile follow one another over the grid;
// what neighbours share, a few megabytes, stays in L2. Fewest bytes: each packed scatter read once,
// each dense matrix written once, 6 C^2 per position. Flops: (1 + 2) w^2 C^2 / 2 per position.
//
// Order: scatters are summed over the window row by row, then the products of the deviations are
// added in the same order, all in float32; the result does not depend on `start` and `stop`. The
// mean is summed as differences from the window's first mean, which loses nothing to a common
// offset.
#include "device_utils.cuh"
#include "kernels.h"
#include "packed.h"
#include "window.h"

namespace npad::cuda {

namespace {

constexpr int kRows = 32, kColumns = 64;            // of a tile; both triangles in whole sectors
constexpr int kSlots = kRows + kColumns;            // rows, then columns
constexpr int kPatchRows = 2, kPatchColumns = 4;    // positions of a block
constexpr int kPatch = kPatchRows * kPatchColumns;  // 8 x 8 sums in registers
constexpr int kThreads = 8 * kWarp;                 // each has 4 rows and 2 columns of the tile
constexpr int kBlocks = 2;                          // per multiprocessor: up to 128 registers
constexpr int kDepth = 9;                           // neighbours in shared memory: 3 x 3
constexpr int kStride = kColumns + 1;               // rows and columns are read without conflict
constexpr int kVectors = static_cast<int>(kPanel) / 4;  // of 16 bytes in a column of a panel

struct Grid {
    int64_t height, width, window, start, stop;
    int channels;
};

struct Shared {
    union {
        float deviations[kPatch][kDepth][kSlots];
        float tile[kRows][kStride];
    };
    float mean[kPatch][kSlots];
    float count[kPatch];  // of the whole window
    float root[kPatch][kDepth];
    int64_t neighbor[kPatch][kDepth];
};

__global__ void __launch_bounds__(kThreads, kBlocks)
    window_covariance_kernel(const int64_t* __restrict__ count, const float* __restrict__ mean,
                             const float* __restrict__ scatter, Grid grid,
                             float* __restrict__ window_mean, float* __restrict__ covariance) {
    __shared__ __align__(16) Shared shared;
    const PackedLayout layout(grid.channels);
    const int channels = grid.channels, pad = static_cast<int>(layout.pad);
    const int top = static_cast<int>(blockIdx.y) * kRows;
    const int left = static_cast<int>(blockIdx.z) * kColumns;
    if (left >= top + kRows) return;  // above the diagonal

    const int64_t across = ceil_div(grid.width, kPatchColumns);
    const int64_t y0 = grid.start / grid.width + blockIdx.x / across * kPatchRows;
    const int64_t x0 = blockIdx.x % across * kPatchColumns;
    const auto position = [&](int k) {  // -1 where there is nothing to do
        const int64_t y = y0 + k / kPatchColumns, x = x0 + k % kPatchColumns;
        const int64_t p = y * grid.width + x;
        return x < grid.width && p >= grid.start && p < grid.stop ? p : -1;
    };
    const auto window = [&](int64_t p) { return Window(p, grid.height, grid.width, grid.window); };
    const auto channel = [&](int slot) {  // of a row or column of the tile
        return (slot < kRows ? top + slot : left + slot - kRows) - pad;
    };

    // Means, and the largest window.
    int64_t largest = 0;
#pragma unroll
    for (int k = 0; k < kPatch; ++k)
        if (position(k) >= 0) largest = max(largest, window(position(k)).size());
    if (largest == 0) return;
    for (int i = threadIdx.x; i < kPatch * kSlots; i += kThreads) {
        const int k = i / kSlots, slot = i % kSlots, c = channel(slot);
        const int64_t p = position(k);
        float mu = 0;
        if (p >= 0 && c >= 0 && c < channels) {
            const Window w = window(p);
            const float origin = mean[(w.top * grid.width + w.left) * channels + c];
            float sum = 0;
            int64_t n = 0;
            for (int64_t y = w.top; y < w.bottom; ++y)
                for (int64_t q = y * grid.width + w.left; q < y * grid.width + w.right; ++q) {
                    sum = fmaf(static_cast<float>(count[q]), mean[q * channels + c] - origin, sum);
                    n += count[q];
                }
            mu = origin + sum / static_cast<float>(n);
            if (left == 0 && slot < kRows) window_mean[(p - grid.start) * channels + c] = mu;
        }
        shared.mean[k][slot] = mu;
    }

    // This thread owns rows r .. r + 3 in columns c and c + 16, of each position.
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int row = warp / 2 * static_cast<int>(kPanel) + lane % 2 * 4;
    const int column = warp % 2 * kWarp + lane / 2;
    const int panel = (top + row) / static_cast<int>(kPanel);
    const float4* place = reinterpret_cast<const float4*>(scatter + layout.offset(panel)) +
                          (left + column - pad) * kVectors + lane % 2;
    bool stored[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int c = left + column + 16 * e;
        stored[e] = panel < layout.panels && c >= pad && c < layout.columns(panel) + pad;
    }

    float sum[kPatch][2][4] = {};
    const int64_t radius = grid.window / 2, last_row = y0 + kPatchRows - 1 + radius;
    const int64_t last_column = x0 + kPatchColumns - 1 + radius;
    for (int64_t y = max(y0 - radius, int64_t{0}); y <= min(last_row, grid.height - 1); ++y)
        for (int64_t x = max(x0 - radius, int64_t{0}); x <= min(last_column, grid.width - 1); ++x) {
            const float4* from = place + (y * grid.width + x) * (layout.size() / 4);
            float4 s[2] = {};
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (stored[e]) s[e] = load<float4>(from + 16 * kVectors * e);
#pragma unroll
            for (int k = 0; k < kPatch; ++k) {
                const int64_t below = y - (y0 + k / kPatchColumns);
                const int64_t right = x - (x0 + k % kPatchColumns);
                if (below < -radius || below > radius || right < -radius || right > radius)
                    continue;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    sum[k][e][0] += s[e].x;
                    sum[k][e][1] += s[e].y;
                    sum[k][e][2] += s[e].z;
                    sum[k][e][3] += s[e].w;
                }
            }
        }

    for (int64_t first = 0; first < largest; first += kDepth) {
        const int depth = static_cast<int>(min(largest - first, int64_t{kDepth}));
        if (threadIdx.x < kPatch * kDepth) {
            const int k = threadIdx.x / kDepth, i = threadIdx.x % kDepth;
            const int64_t p = position(k);
            int64_t q = max(p, int64_t{0});  // weight 0: no neighbour, but no other NaN either
            float root = 0;
            if (p >= 0 && first + i < window(p).size()) {
                const Window w = window(p);
                q = (w.top + (first + i) / (w.right - w.left)) * grid.width + w.left +
                    (first + i) % (w.right - w.left);
                root = sqrtf(static_cast<float>(count[q]));
            }
            shared.neighbor[k][i] = q;
            shared.root[k][i] = root;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kPatch * depth * kSlots; i += kThreads) {
            const int slot = i % kSlots, k = i / kSlots % kPatch, d = i / kSlots / kPatch;
            const int c = channel(slot);
            float deviation = 0;
            if (c >= 0 && c < channels)
                deviation = shared.root[k][d] *
                            (mean[shared.neighbor[k][d] * channels + c] - shared.mean[k][slot]);
            shared.deviations[k][d][slot] = deviation;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kPatch; ++k)
            for (int d = 0; d < depth; ++d) {
                const float* at = shared.deviations[k][d];
                const float4 a = load<float4>(at + row);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float b = at[kRows + column + 16 * e];
                    sum[k][e][0] = fmaf(a.x, b, sum[k][e][0]);
                    sum[k][e][1] = fmaf(a.y, b, sum[k][e][1]);
                    sum[k][e][2] = fmaf(a.z, b, sum[k][e][2]);
                    sum[k][e][3] = fmaf(a.w, b, sum[k][e][3]);
                }
            }
        __syncthreads();
    }

#pragma unroll
    for (int k = 0; k < kPatch; ++k) {
        const int64_t p = position(k);
        if (p < 0) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int i = 0; i < 4; ++i) shared.tile[row + i][column + 16 * e] = sum[k][e][i];
        __syncthreads();
        int64_t n = 0;
        const Window w = window(p);
        for (int64_t y = w.top; y < w.bottom; ++y)
            for (int64_t q = y * grid.width + w.left; q < y * grid.width + w.right; ++q)
                n += count[q];
        const float scale = 1.0f / static_cast<float>(n - 1);
        float* dense = covariance + (p - grid.start) * channels * channels;
        for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
            const int r = i / kColumns, c = i % kColumns;
            const int64_t to = top + r - pad, from = left + c - pad;
            if (from >= 0 && from <= to && to < channels)
                dense[to * channels + from] = scale * shared.tile[r][c];
        }
        for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
            const int r = i % kRows, c = i / kRows;
            const int64_t to = top + r - pad, from = left + c - pad;
            if (from >= 0 && from < to && to < channels)
                dense[from * channels + to] = scale * shared.tile[r][c];
        }
        __syncthreads();
    }
}

}  // namespace

int window_covariance(const int64_t* count, const float* mean, const float* scatter, int64_t height,
                      int64_t width, int64_t channels, int64_t window, int64_t start, int64_t stop,
                      float* window_mean, float* covariance, Stream stream) {
    if (start == stop) return cudaSuccess;
    const int64_t rows = (stop - 1) / width - start / width + 1;
    const int64_t patches = ceil_div(rows, kPatchRows) * ceil_div(width, kPatchColumns);
    if (patches > INT32_MAX) return cudaErrorInvalidConfiguration;
    const int64_t slots = PackedLayout(channels).panels * kPanel;
    const dim3 blocks(static_cast<unsigned>(patches), static_cast<unsigned>(ceil_div(slots, kRows)),
                      static_cast<unsigned>(ceil_div(slots, kColumns)));
    const Grid grid{height, width, window, start, stop, static_cast<int>(channels)};
    return launch(window_covariance_kernel, blocks, kThreads, 0, stream, count, mean, scatter, grid,
                  window_mean, covariance);
}

}  // namespace npad::cuda
