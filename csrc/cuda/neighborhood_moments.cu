// Update of count n, mean m and scatter S of every position with a batch (Chan, Golub, LeVeque
// 1983):
//
//   delta = mean_b(x) - m
//   S += sum_b (x_b - mean_b(x)) (x_b - mean_b(x))^T + n B / (n + B) delta delta^T
//   m += B / (n + B) delta;  n += B
//
// The correction is one more row, sqrt(n B / (n + B)) delta, of the rank update.
//
// A block owns 64 rows of the packed S of one position and walks along them in tiles of 64 columns.
// It centres its rows of x once, the columns of each tile as it comes to it; the tile of S is on
// its way meanwhile. Fewest bytes: S read and written once, x read once; the tiles read x C / 128
// times in all, from L2, and the mean's kernel once more. Flops: C^2 (B + 1) per position.
//
// Order: a mean sums its even rows, then its odd rows, and adds the two; every block finds the same
// mean. Products of 32 rows are summed from zero, 8 at a time in three TF32 products of the tensor
// cores and what is left in FMA units, then added to S: the tensor cores do not round their sums to
// nearest, and over S itself or over many rows that would be a drift.
//
// m and n change in a second kernel, after all blocks have read them.
#include "device_utils.cuh"
#include "kernels.h"
#include "packed.h"

namespace npad::cuda {

namespace {

constexpr int kTile = 64;                // rows and columns of a tile
constexpr int kWarpTile = 32;            // of those, what one warp owns
constexpr int kThreads = 4 * kWarp;      // 2 x 2 warps; two threads load one row or column
constexpr int kBlocks = 4;               // per multiprocessor: 128 registers hold S and its update
constexpr int kDepth = 32;               // rows of the batch in shared memory at a time
constexpr int kLoads = kDepth / 2;       // of those, what one thread loads
constexpr int kStride = kTile + 8;       // a fragment's 4 x 8 floats lie in 32 banks
constexpr int kMeanThreads = 4 * kWarp;  // a block for each position

// Deviations: rows of the batch, and the correction; columns are rows or columns of a tile.
using Deviations = float[kDepth + 1][kStride];

// One row or column of a tile, in slots: channel + pad. A thread holds its even or its odd rows of
// the batch. Slots that are padding read as zeros.
struct Slot {
    const float* x;  // first of the batch
    int64_t image;   // floats from one row of the batch to the next
    int64_t batch;   // 0 for padding
    int index;       // in the tile
    int odd;
    float values[kLoads];
    float batch_mean = 0, correction = 0;

    __device__ Slot(const float* position, int64_t image_, int64_t batch_, int channel,
                    int channels)
        : x(position + channel),
          image(image_),
          batch(channel >= 0 && channel < channels ? batch_ : 0),
          index(threadIdx.x % kTile),
          odd(threadIdx.x / kTile) {}

    __device__ void load_rows(int64_t first) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int64_t b = first + 2 * i + odd;
            values[i] = b < batch ? x[b * image] : 0.0f;
        }
    }

    // All threads of the block. Leaves the last rows of the batch in `values`.
    __device__ void centre(float (&partial)[2][kTile], const float* mean, float scale) {
        float sum = 0;
        for (int64_t first = 0; first < batch; first += kDepth) {
            load_rows(first);
#pragma unroll
            for (int i = 0; i < kLoads; ++i) sum += values[i];
        }
        partial[odd][index] = sum;
        __syncthreads();
        if (batch > 0) {
            batch_mean = (partial[0][index] + partial[1][index]) / static_cast<float>(batch);
            correction = scale * (batch_mean - *mean);
        } else {
            load_rows(0);
        }
        __syncthreads();  // the next call writes `partial` again
    }

    __device__ void store(Deviations& d, int rows, bool last) const {
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            if (2 * i + odd < rows) d[2 * i + odd][index] = values[i] - batch_mean;
        if (last && odd == 0) d[rows][index] = correction;
    }
};

// sum += the product of 32 columns and 32 rows of a tile, over `depth` rows of the batch. With
// g = lane / 4 and t = lane % 4, element [m][2 i + h][2 e + f] belongs to column 16 m + 8 e + g and
// row 16 i + 4 t + 2 f + h: four rows side by side in the packed layout.
__device__ __forceinline__ void add_products(const Deviations& d_columns, int column,
                                             const Deviations& d_rows, int row, int depth,
                                             float (&sum)[2][4][4]) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    int k = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    for (; k + 8 <= depth; k += 8) {
        // Upper and lower part of each factor.
        uint32_t a[2][2][4], b[2][4][2];
#pragma unroll
        for (int w = 0; w < 8; ++w)
            split_tf32(d_columns[k + t + w % 4 / 2 * 4][column + w / 4 * 16 + w % 2 * 8 + g],
                       a[0][w / 4][w % 4], a[1][w / 4][w % 4]);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float2 pair = load<float2>(&d_rows[k + t + w % 2 * 4][row + w / 2 * 16 + 2 * g]);
            const int n = w / 2 * 2;
            split_tf32(pair.x, b[0][n][w % 2], b[1][n][w % 2]);
            split_tf32(pair.y, b[0][n + 1][w % 2], b[1][n + 1][w % 2]);
        }
#pragma unroll
        for (int part = 2; part >= 0; --part)  // the large products last
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) mma<Tf32>(sum[m][n], a[part % 2][m], b[part / 2][n]);
    }
#endif
    for (; k < depth; ++k) {
        float a[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) a[j] = d_columns[k][column + 8 * j + g];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 b = load<float4>(&d_rows[k][row + 16 * i + 4 * t]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float* even = sum[j / 2][2 * i] + j % 2 * 2;
                float* odd = sum[j / 2][2 * i + 1] + j % 2 * 2;
                even[0] = fmaf(a[j], b.x, even[0]);
                odd[0] = fmaf(a[j], b.y, odd[0]);
                even[1] = fmaf(a[j], b.z, even[1]);
                odd[1] = fmaf(a[j], b.w, odd[1]);
            }
        }
    }
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    scatter_kernel(const float* __restrict__ x, int64_t batch, int64_t positions, int channels,
                   const int64_t* __restrict__ count, const float* __restrict__ mean,
                   float* __restrict__ scatter) {
    __shared__ __align__(16) Deviations d_rows, d_columns;
    __shared__ float partial[2][kTile];
    const PackedLayout layout(channels);
    const int pad = static_cast<int>(layout.pad), slots = channels + pad;
    const int strips = static_cast<int>(ceil_div(slots, kTile));
    const int64_t position = blockIdx.x / strips, image = positions * channels;
    const int top = (strips - 1 - static_cast<int>(blockIdx.x) % strips) * kTile;  // longest first
    x += position * channels;
    mean += position * channels;
    scatter += position * layout.size();
    const float n = static_cast<float>(count[position]), b = static_cast<float>(batch);
    const float scale = sqrtf(n / (n + b) * b);

    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const int row0 = warp / 2 * kWarpTile, column0 = warp % 2 * kWarpTile;
    const int thread_slot = static_cast<int>(threadIdx.x) % kTile - pad;
    const int row_channel = top + thread_slot;
    Slot row(x, image, batch, row_channel, channels);
    row.centre(partial, mean + row_channel, scale);

    for (int left = 0; left <= top; left += kTile) {
        // The float4 of 4 rows in column 16 m + 8 e + g that this thread owns.
        const auto place = [&](int m, int i, int e, int& r, int& c) {
            r = top + row0 + 16 * i + 4 * t;
            c = left + column0 + 16 * m + 8 * e + g;
            const int panel = r / static_cast<int>(kPanel);
            const bool stored = r < slots && c >= pad && c < (panel + 1) * kPanel;
            const int64_t offset = layout.offset(panel) + (c - pad) * kPanel + r % kPanel;
            return stored ? scatter + offset : nullptr;
        };
        float4 s[2][2][2] = {};
#pragma unroll
        for (int w = 0; w < 8; ++w) {
            int r, c;
            const float* from = place(w / 4, w / 2 % 2, w % 2, r, c);
            if (from) s[w / 4][w / 2 % 2][w % 2] = load_once<float4>(from);
        }

        const bool diagonal = left == top;
        const int column_channel = left + thread_slot;
        Slot column(x, image, batch, column_channel, channels);
        if (!diagonal) column.centre(partial, mean + column_channel, scale);
        for (int64_t first = 0; first < batch; first += kDepth) {
            const bool last = batch - first <= kDepth;
            const int rows = static_cast<int>(last ? batch - first : kDepth);
            if (left == 0 || batch > kDepth) {
                row.load_rows(first);
                row.store(d_rows, rows, last);
            }
            if (!diagonal) {
                if (batch > kDepth) column.load_rows(first);
                column.store(d_columns, rows, last);
            }
            __syncthreads();
            if (top + row0 < slots && left + column0 <= top + row0) {
                float sum[2][4][4] = {};
                add_products(diagonal ? d_rows : d_columns, column0, d_rows, row0, rows + last,
                             sum);
#pragma unroll
                for (int w = 0; w < 8; ++w) {
                    const int m = w / 4, i = w / 2 % 2, e = w % 2;
                    int r, c;
                    place(m, i, e, r, c);
                    float4& v = s[m][i][e];  // zeros above the diagonal stay
                    if (c <= r) v.x += sum[m][2 * i][2 * e];
                    if (c <= r + 1) v.y += sum[m][2 * i + 1][2 * e];
                    if (c <= r + 2) v.z += sum[m][2 * i][2 * e + 1];
                    if (c <= r + 3) v.w += sum[m][2 * i + 1][2 * e + 1];
                }
            }
            __syncthreads();  // before the deviations are overwritten
        }

#pragma unroll
        for (int w = 0; w < 8; ++w) {
            int r, c;
            float* to = place(w / 4, w / 2 % 2, w % 2, r, c);
            if (to) *reinterpret_cast<float4*>(to) = s[w / 4][w / 2 % 2][w % 2];
        }
    }
}

// One block per position; the batch's mean in the order of Slot::centre.
__global__ void __launch_bounds__(kMeanThreads)
    mean_kernel(const float* __restrict__ x, int64_t batch, int64_t positions, int channels,
                int64_t* __restrict__ count, float* __restrict__ mean) {
    const int64_t position = blockIdx.x, image = positions * channels;
    const float n = static_cast<float>(count[position]), b = static_cast<float>(batch);
    const float weight = b / (n + b);
    for (int c = threadIdx.x; c < channels; c += kMeanThreads) {
        const int64_t i = position * channels + c;
        float even = 0, odd = 0;
#pragma unroll 8
        for (int64_t k = 0; k < batch; k += 2) {
            even += x[k * image + i];
            if (k + 1 < batch) odd += x[(k + 1) * image + i];
        }
        mean[i] += weight * ((even + odd) / b - mean[i]);
    }
    __syncthreads();
    if (threadIdx.x == 0) count[position] += batch;
}

}  // namespace

int neighborhood_moments(const float* x, int64_t batch, int64_t positions, int64_t channels,
                         int64_t* count, float* mean, float* scatter, Stream stream) {
    if (batch == 0 || positions == 0) return cudaSuccess;
    const int64_t blocks = positions * ceil_div(channels, kTile);  // padding adds less than a tile
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const int c = static_cast<int>(channels);
    const cudaError_t error = launch(scatter_kernel, static_cast<unsigned>(blocks), kThreads, 0,
                                     stream, x, batch, positions, c, count, mean, scatter);
    if (error != cudaSuccess) return error;
    return launch(mean_kernel, static_cast<unsigned>(positions), kMeanThreads, 0, stream, x, batch,
                  positions, c, count, mean);
}

}  // namespace npad::cuda
