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
constexpr int kVectors = kPanel / 4;     // of 16 bytes in a column of a panel
constexpr int kMeanThreads = 4 * kWarp;  // a block for each position

// Deviations: rows of the batch, and the correction; columns are rows or columns of a tile.
using Deviations = float[kDepth + 1][kStride];

struct Centre {
    float mean[kTile], correction[kTile];
};

// The batch at one position.
struct Batch {
    const float* x;
    const float* mean;  // before the update
    int64_t image;      // floats from one row to the next
    int size, channels;
    float scale;  // of the correction
};

// Two threads share a row or column of a tile: one holds the even rows of the batch, the other the
// odd ones.
__device__ __forceinline__ int slot() { return static_cast<int>(threadIdx.x) % kTile; }
__device__ __forceinline__ int odd() { return static_cast<int>(threadIdx.x) / kTile; }

// This thread's part of the kDepth rows from `first` on; zeros past the last row or channel.
__device__ __forceinline__ void load_rows(const Batch& batch, int channel, int first,
                                          float (&values)[kLoads]) {
    const bool inside = channel >= 0 && channel < batch.channels;
    const int rows = inside ? min(batch.size - first, kDepth) - odd() : 0;
    const float* x = batch.x + int64_t{first + odd()} * batch.image + channel;
#pragma unroll
    for (int i = 0; i < kLoads; ++i, x += 2 * batch.image) values[i] = 2 * i < rows ? *x : 0.0f;
}

// The batch's mean and the correction at each of 64 channels; leaves the last rows in `values`.
__device__ __forceinline__ void find_centre(const Batch& batch, int channel,
                                            float (&values)[kLoads], float (&partial)[2][kTile],
                                            Centre& centre) {
    const bool inside = channel >= 0 && channel < batch.channels;
    const float old_mean = inside ? batch.mean[channel] : 0.0f;
    float sum = 0;
    for (int first = 0; first < batch.size; first += kDepth) {
        load_rows(batch, channel, first, values);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) sum += values[i];
    }
    partial[odd()][slot()] = sum;
    __syncthreads();
    if (odd() == 0) {
        const float mean =
            (partial[0][slot()] + partial[1][slot()]) / static_cast<float>(batch.size);
        centre.mean[slot()] = mean;
        centre.correction[slot()] = batch.scale * (mean - old_mean);
    }
    __syncthreads();
}

__device__ __forceinline__ void store_deviations(const float (&values)[kLoads],
                                                 const Centre& centre, int rows, bool last,
                                                 Deviations& d) {
    const float mean = centre.mean[slot()];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
        if (2 * i + odd() < rows) d[2 * i + odd()][slot()] = values[i] - mean;
    if (last && odd() == 0) d[rows][slot()] = centre.correction[slot()];
}

// sum += the product of 32 columns and 32 rows of a tile, over `depth` rows of the batch. With
// g = lane / 4 and t = lane % 4, element [m][2 i + h][2 e + f] belongs to column 16 m + 8 e + g and
// row 16 i + 4 t + 2 f + h: four rows side by side in the packed layout.
__device__ __forceinline__ void add_products(const Deviations& d_columns, int column,
                                             const Deviations& d_rows, int row, int depth,
                                             float (&sum)[2][4][4]) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    int k = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#pragma unroll 1
    for (; k + 8 <= depth; k += 8) {
        uint32_t a[2][2][4];  // upper and lower parts
#pragma unroll
        for (int w = 0; w < 8; ++w)
            split_tf32(d_columns[k + t + w % 4 / 2 * 4][column + w / 4 * 16 + w % 2 * 8 + g],
                       a[0][w / 4][w % 4], a[1][w / 4][w % 4]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t b[2][2][2];
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                const float2 pair = load<float2>(&d_rows[k + t + 4 * w][row + 16 * i + 2 * g]);
                split_tf32(pair.x, b[0][0][w], b[1][0][w]);
                split_tf32(pair.y, b[0][1][w], b[1][1][w]);
            }
#pragma unroll
            for (int part = 2; part >= 0; --part)  // the large products last
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        mma<Tf32>(sum[m][2 * i + h], a[part % 2][m], b[part / 2][h]);
        }
    }
#endif
#pragma unroll 1
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
    scatter_kernel(const float* __restrict__ x, int size, int64_t positions, int channels,
                   const int64_t* __restrict__ count, const float* __restrict__ mean,
                   float* __restrict__ scatter) {
    __shared__ __align__(16) Deviations d_rows, d_columns;
    __shared__ float partial[2][kTile];
    __shared__ Centre row_centre, column_centre;
    const PackedLayout layout(channels);
    const int pad = static_cast<int>(layout.pad), slots = channels + pad;
    const int strips = static_cast<int>(ceil_div(slots, kTile));
    const int64_t position = blockIdx.x / strips;
    const int top = (strips - 1 - static_cast<int>(blockIdx.x) % strips) * kTile;  // longest first
    scatter += position * layout.size();
    const float n = static_cast<float>(count[position]), b = static_cast<float>(size);
    const Batch batch{
        x + position * channels, mean + position * channels, positions * channels, size, channels,
        sqrtf(n / (n + b) * b)};

    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const int row0 = warp / 2 * kWarpTile, column0 = warp % 2 * kWarpTile;
    // This thread owns, of each tile, rows r + 16 i .. r + 16 i + 3 in columns c + 8 j: a float4.
    const int r = top + row0 + 4 * t;
    float4* const vectors = reinterpret_cast<float4*>(scatter);
    int place[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        place[i] = static_cast<int>((layout.offset(r / kPanel + 2 * i) + r % kPanel) / 4) +
                   (column0 + g - pad) * kVectors;
    const int channel = slot() - pad;
    float values[kLoads];
    find_centre(batch, top + channel, values, partial, row_centre);

    for (int left = 0; left <= top; left += kTile) {
        const int c = left + column0 + g;
        const auto stored = [&](int i, int j) {
            const int last = (r + 16 * i) | (kPanel - 1);  // of the panel
            return c + 8 * j >= pad && c + 8 * j <= last && last < slots;
        };
        float4 s[2][4] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (stored(i, j))
                    s[i][j] = load_once<float4>(vectors + place[i] + 8 * j * kVectors);

        const bool diagonal = left == top;
        if (!diagonal) find_centre(batch, left + channel, values, partial, column_centre);
        for (int first = 0; first < size; first += kDepth) {
            const bool last = size - first <= kDepth;
            const int rows = min(size - first, kDepth);
            if (!diagonal) {
                if (size > kDepth) load_rows(batch, left + channel, first, values);
                store_deviations(values, column_centre, rows, last, d_columns);
            }
            if (left == 0 || size > kDepth) {
                load_rows(batch, top + channel, first, values);
                store_deviations(values, row_centre, rows, last, d_rows);
            }
            __syncthreads();
            if (top + row0 < slots && left + column0 <= top + row0) {
                float sum[2][4][4] = {};
                add_products(diagonal ? d_rows : d_columns, column0, d_rows, row0, rows + last,
                             sum);
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {  // zeros above the diagonal stay
                        const float* even = sum[j / 2][2 * i] + j % 2 * 2;
                        const float* odd = sum[j / 2][2 * i + 1] + j % 2 * 2;
                        const int above = c + 8 * j - (r + 16 * i);
                        if (above <= 0) s[i][j].x += even[0];
                        if (above <= 1) s[i][j].y += odd[0];
                        if (above <= 2) s[i][j].z += even[1];
                        if (above <= 3) s[i][j].w += odd[1];
                    }
            }
            __syncthreads();  // before the deviations are overwritten
        }

#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (stored(i, j)) vectors[place[i] + 8 * j * kVectors] = s[i][j];
#pragma unroll
        for (int i = 0; i < 2; ++i) place[i] += kTile * kVectors;
    }
}

// One block per position; the batch's mean in the order of find_centre().
__global__ void __launch_bounds__(kMeanThreads)
    mean_kernel(const float* __restrict__ x, int size, int64_t positions, int channels,
                int64_t* __restrict__ count, float* __restrict__ mean) {
    const int64_t position = blockIdx.x, image = positions * channels;
    const float n = static_cast<float>(count[position]), b = static_cast<float>(size);
    const float weight = b / (n + b);
    for (int c = threadIdx.x; c < channels; c += kMeanThreads) {
        const int64_t i = position * channels + c;
        float even = 0, odd = 0;
#pragma unroll 8
        for (int k = 0; k < size; k += 2) {
            even += x[k * image + i];
            if (k + 1 < size) odd += x[(k + 1) * image + i];
        }
        mean[i] += weight * ((even + odd) / b - mean[i]);
    }
    __syncthreads();
    if (threadIdx.x == 0) count[position] += size;
}

}  // namespace

int neighborhood_moments(const float* x, int64_t batch, int64_t positions, int64_t channels,
                         int64_t* count, float* mean, float* scatter, Stream stream) {
    if (batch == 0 || positions == 0) return cudaSuccess;
    const int64_t blocks = positions * ceil_div(channels, kTile);  // padding adds less than a tile
    if (blocks > INT32_MAX || batch > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
    const int b = static_cast<int>(batch), c = static_cast<int>(channels);
    const cudaError_t error = launch(scatter_kernel, static_cast<unsigned>(blocks), kThreads, 0,
                                     stream, x, b, positions, c, count, mean, scatter);
    if (error != cudaSuccess) return error;
    return launch(mean_kernel, static_cast<unsigned>(positions), kMeanThreads, 0, stream, x, b,
                  positions, c, count, mean);
}

}  // namespace npad::cuda
