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
// offset. Limits: fewer than 2^31 positions.
#include <algorithm>

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
constexpr int kMeans = kPatch * kSlots / kThreads;  // found by one thread
constexpr int kStride = kColumns + 1;               // rows and columns are read without conflict
constexpr int kVectors = static_cast<int>(kPanel) / 4;  // of 16 bytes in a column of a panel

struct Grid {
    int height, width, radius, start, stop, channels;
};

// The clipped window of one position; of size 0 where there is nothing to do.
struct Clipped {
    int position, top, left, width, size;

    Clipped() = default;
    __device__ Clipped(const Grid& grid, int y, int x) : position(0), size(0) {
        const int64_t p = int64_t{y} * grid.width + x;
        if (x >= grid.width || p < grid.start || p >= grid.stop) return;
        const Window w(p, grid.height, grid.width, 2 * grid.radius + 1);
        position = static_cast<int>(p);
        top = static_cast<int>(w.top);
        left = static_cast<int>(w.left);
        width = static_cast<int>(w.right - w.left);
        size = static_cast<int>(w.size());
    }
};

struct Shared {
    union {
        float deviations[kPatch][kDepth][kSlots];
        float tiles[2][kRows][kStride];
    };
    Clipped windows[kPatch];
    int64_t total[kPatch];  // samples in the window
    float scale[kPatch];    // 1 / (total - 1)
    // Of each window, kDepth neighbours at a time.
    int64_t count[kPatch][kDepth];
    int64_t offset[kPatch][kDepth];  // of its mean
    float weight[kPatch][kDepth], root[kPatch][kDepth];
};

// By all threads of the block; the barrier is the caller's.
__device__ __forceinline__ void find_neighbors(const Grid& grid, const int64_t* __restrict__ count,
                                               int first, Shared& shared) {
    if (threadIdx.x >= kPatch * kDepth) return;
    const int k = threadIdx.x / kDepth, d = threadIdx.x % kDepth, i = first + d;
    const Clipped& w = shared.windows[k];
    const bool inside = i < w.size;
    // Where there is no neighbour, the position itself, weighing nothing.
    const int q = inside ? (w.top + i / w.width) * grid.width + w.left + i % w.width : w.position;
    const int64_t n = inside ? count[q] : 0;
    shared.offset[k][d] = int64_t{q} * grid.channels;
    shared.count[k][d] = n;
    shared.weight[k][d] = static_cast<float>(n);
    shared.root[k][d] = sqrtf(static_cast<float>(n));
}

// A tile, its row 0 and column 0 at these channels, to its place and its mirror image.
__device__ __forceinline__ void write_tile(const float (&tile)[kRows][kStride], int top, int left,
                                           int channels, float* __restrict__ dense) {
    constexpr int kRowStep = kThreads / kColumns, kColumnStep = kThreads / kRows;
    const int t = static_cast<int>(threadIdx.x);
    // One unsigned comparison stands for both ends of a range; a limit of 0 for an empty one.
    {
        const int r = t / kColumns, c = t % kColumns, row = top + r, column = left + c;
        const unsigned limit = column < 0 ? 0 : max(channels - column, 0);
        float values[kRows / kRowStep];
#pragma unroll
        for (int i = 0; i < kRows / kRowStep; ++i) values[i] = tile[r + i * kRowStep][c];
        float* to = dense + int64_t{row} * channels + column;
        const int64_t step = int64_t{kRowStep} * channels;
#pragma unroll
        for (int i = 0; i < kRows / kRowStep; ++i, to += step)
            if (static_cast<unsigned>(row - column + i * kRowStep) < limit) *to = values[i];
    }
    const int r = t % kRows, c = t / kRows, row = top + r, column = left + c;
    const unsigned limit = row < channels ? max(row, 0) : 0;
    float values[kColumns / kColumnStep];
#pragma unroll
    for (int i = 0; i < kColumns / kColumnStep; ++i) values[i] = tile[r][c + i * kColumnStep];
    float* to = dense + int64_t{column} * channels + row;
    const int64_t step = int64_t{kColumnStep} * channels;
#pragma unroll
    for (int i = 0; i < kColumns / kColumnStep; ++i, to += step)
        if (static_cast<unsigned>(column + i * kColumnStep) < limit) *to = values[i];
}

// kRadius is that of the window, or negative: any.
template <int kRadius>
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
    const int across = static_cast<int>(ceil_div(grid.width, kPatchColumns));
    const int y0 = grid.start / grid.width + static_cast<int>(blockIdx.x) / across * kPatchRows;
    const int x0 = static_cast<int>(blockIdx.x) % across * kPatchColumns;
    if (threadIdx.x < kPatch) {
        const int k = threadIdx.x;
        shared.windows[k] = Clipped(grid, y0 + k / kPatchColumns, x0 + k % kPatchColumns);
        shared.total[k] = 0;
    }
    __syncthreads();
    int largest = 0;
    for (int k = 0; k < kPatch; ++k) largest = max(largest, shared.windows[k].size);
    if (largest == 0) return;

    // Means: of each position's rows and columns of the tile, this thread finds every kThreads-th.
    const auto own = [&](int j, int& k, int& slot) {  // returns the channel
        k = (threadIdx.x + j * kThreads) / kSlots;
        slot = (threadIdx.x + j * kThreads) % kSlots;
        return (slot < kRows ? top + slot : left + slot - kRows) - pad;
    };
    const auto stand_in = [&](int c) { return c >= 0 && c < channels ? c : 0; };  // for padding
    float origin[kMeans] = {}, mu[kMeans] = {};
    for (int first = 0; first < largest; first += kDepth) {
        find_neighbors(grid, count, first, shared);
        __syncthreads();
        if (threadIdx.x < kPatch)
            for (int d = 0; d < kDepth; ++d)
                shared.total[threadIdx.x] += shared.count[threadIdx.x][d];
#pragma unroll
        for (int j = 0; j < kMeans; ++j) {
            int k, slot;
            const float* mean_c = mean + stand_in(own(j, k, slot));
            if (first == 0) origin[j] = mean_c[shared.offset[k][0]];
#pragma unroll
            for (int d = 0; d < kDepth; ++d)
                mu[j] = fmaf(shared.weight[k][d], mean_c[shared.offset[k][d]] - origin[j], mu[j]);
        }
        __syncthreads();
    }
    if (threadIdx.x < kPatch)
        shared.scale[threadIdx.x] = 1.0f / static_cast<float>(shared.total[threadIdx.x] - 1);
#pragma unroll
    for (int j = 0; j < kMeans; ++j) {
        int k, slot;
        const int c = own(j, k, slot);
        mu[j] = origin[j] + mu[j] / static_cast<float>(shared.total[k]);
        if (left == 0 && slot < kRows && c >= 0 && c < channels && shared.windows[k].size > 0)
            window_mean[int64_t{shared.windows[k].position - grid.start} * channels + c] = mu[j];
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
    const auto load_scatter = [&](int y, int x, float4(&s)[2]) {
        const float4* from = place + (int64_t{y} * grid.width + x) * (layout.size() / 4);
#pragma unroll
        for (int e = 0; e < 2; ++e)
            s[e] = stored[e] ? load<float4>(from + 16 * kVectors * e) : float4{};
    };
    // The scatter dy rows and dx columns from the block's first position, to whom it concerns.
    const auto add_scatter = [&](const float4(&s)[2], int dy, int dx, int radius) {
#pragma unroll
        for (int k = 0; k < kPatch; ++k) {
            if (abs(dy - k / kPatchColumns) > radius || abs(dx - k % kPatchColumns) > radius)
                continue;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                sum[k][e][0] += s[e].x;
                sum[k][e][1] += s[e].y;
                sum[k][e][2] += s[e].z;
                sum[k][e][3] += s[e].w;
            }
        }
    };
    if constexpr (kRadius >= 0) {  // who is concerned is known, and loads start together
        constexpr int kAcross = kPatchColumns + 2 * kRadius, kTogether = kAcross % 3 ? 4 : 3;
#pragma unroll
        for (int i = 0; i < (kPatchRows + 2 * kRadius) * kAcross; i += kTogether) {
            const int dy = i / kAcross - kRadius, dx = i % kAcross - kRadius;
            const bool inside = static_cast<unsigned>(y0 + dy) < static_cast<unsigned>(grid.height);
            float4 s[kTogether][2] = {};
#pragma unroll
            for (int j = 0; j < kTogether; ++j) {
                const int x = x0 + dx + j;
                if (inside && static_cast<unsigned>(x) < static_cast<unsigned>(grid.width))
                    load_scatter(y0 + dy, x, s[j]);
            }
#pragma unroll
            for (int j = 0; j < kTogether; ++j) add_scatter(s[j], dy, dx + j, kRadius);
        }
    } else {
        const int radius = grid.radius;
        const int first_y = max(y0 - radius, 0), end_y = min(y0 + kPatchRows + radius, grid.height);
        const int first_x = max(x0 - radius, 0);
        const int end_x = min(x0 + kPatchColumns + radius, grid.width);
        float4 next[2];
        load_scatter(first_y, first_x, next);
        for (int y = first_y, x = first_x; y < end_y;) {
            const int dy = y - y0, dx = x - x0;
            const float4 s[2] = {next[0], next[1]};
            if (++x == end_x) ++y, x = first_x;
            if (y < end_y) load_scatter(y, x, next);
            add_scatter(s, dy, dx, radius);
        }
    }

    for (int first = 0; first < largest; first += kDepth) {
        const int depth = min(largest - first, kDepth);
        if (largest > kDepth) {
            find_neighbors(grid, count, first, shared);
            __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < kMeans; ++j) {
            int k, slot;
            const float* mean_c = mean + stand_in(own(j, k, slot));
            float deviation[kDepth];  // all loads before the first store
#pragma unroll
            for (int d = 0; d < kDepth; ++d)
                deviation[d] = shared.root[k][d] * (mean_c[shared.offset[k][d]] - mu[j]);
#pragma unroll
            for (int d = 0; d < kDepth; ++d) shared.deviations[k][d][slot] = deviation[d];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kPatch; ++k)
#pragma unroll 3
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
        const Clipped& w = shared.windows[k];
        const float scale = shared.scale[k];
        auto& tile = shared.tiles[k % 2];  // the other one may still be read
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int i = 0; i < 4; ++i) tile[row + i][column + 16 * e] = scale * sum[k][e][i];
        __syncthreads();
        if (w.size > 0)
            write_tile(tile, top - pad, left - pad, channels,
                       covariance + int64_t{w.position - grid.start} * channels * channels);
    }
}

}  // namespace

int window_covariance(const int64_t* count, const float* mean, const float* scatter, int64_t height,
                      int64_t width, int64_t channels, int64_t window, int64_t start, int64_t stop,
                      float* window_mean, float* covariance, Stream stream) {
    if (start == stop) return cudaSuccess;
    if (height * width > INT32_MAX) return cudaErrorInvalidConfiguration;
    const int64_t rows = (stop - 1) / width - start / width + 1;
    const int64_t patches = ceil_div(rows, kPatchRows) * ceil_div(width, kPatchColumns);
    const int64_t slots = PackedLayout(channels).panels * kPanel;
    const dim3 blocks(static_cast<unsigned>(patches), static_cast<unsigned>(ceil_div(slots, kRows)),
                      static_cast<unsigned>(ceil_div(slots, kColumns)));
    const int64_t radius = std::min(window / 2, std::max(height, width));
    const Grid grid{static_cast<int>(height), static_cast<int>(width), static_cast<int>(radius),
                    static_cast<int>(start),  static_cast<int>(stop),  static_cast<int>(channels)};
    const auto kernel = radius == 0   ? window_covariance_kernel<0>
                        : radius == 1 ? window_covariance_kernel<1>
                                      : window_covariance_kernel<-1>;
    return launch(kernel, blocks, kThreads, 0, stream, count, mean, scatter, grid, window_mean,
                  covariance);
}

}  // namespace npad::cuda
