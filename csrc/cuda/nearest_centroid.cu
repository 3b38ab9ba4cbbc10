// Distance of every x (n, channels) to the nearest of the centroids (k, channels), and its index.
//
//   || x - c ||^2 / 2 = || x ||^2 / 2 + s,   s = || c ||^2 / 2 - x . c   (x, c less the centroids'
//   mean)
//
// Rows less the mean are scaled by a power of two each, which brings their norm below 1, and
// rounded to float16 once. A block owns 128 embeddings and a group of 128 centroids. Their product
// on tensor cores is right to 2^-10; of each embedding only the group's least s, whose it is, and
// the second least are kept. Rounding can swap centroids in s, so all whose s may lie within the
// error bound of the best, nearly always a few, are then measured by differences; the whole group
// where its second is among them. The result is that of the plain loop over differences, of equals
// the lowest index. NaN in x: distance NaN, index 0.
//
// Flops: 2 n k channels in float16. Bytes: x read twice and written once in half; from the caches
// n k channels / 32. Workspace: the centroids in half, and of so many embeddings at a time that it
// stays bounded, those in half and 12 bytes for each group. Sums over channels: in the product by
// the matrix instruction, 16 at a time in ascending order; measured, by each lane over every 32nd
// channel, then over lanes. Nothing depends on the order of blocks.
#include "tile_product.cuh"

#include "kernels.h"

namespace npad::cuda {

namespace {

constexpr int kSwath = 16;  // tiles of x that meet the centroids together: both stay in cache
constexpr int64_t kRecordBytes = 32 << 20, kRowBytes = 64 << 20;  // at a time, in half the latter
constexpr int kMeanRows = 64;  // centroids whose mean is the origin

// Of one embedding and the centroids of a group.
struct Record {
    float least, second;  // of s
    int32_t index;        // of the centroid with the least
};

__device__ __forceinline__ void merge(Record& a, const Record& b) {
    if (b.least < a.least) {
        a = {b.least, fminf(a.least, b.second), b.index};
    } else {
        a.second = fminf(a.second, b.least);
    }
}

struct Workspace {
    __half *centroids, *x;     // (k, stride) and (rows, stride)
    float* mean;               // (channels)
    float* half_norm;          // (k)
    float *scale_c, *scale_x;  // (k) and (rows)
    unsigned* largest;         // (groups) bits of the largest squared norm
    Record* records;           // (rows, groups)
    int64_t groups, stride, rows, bytes;

    Workspace(void* memory, int64_t n, int64_t k, int64_t channels)
        : groups(ceil_div(k, kTile)), stride(ceil_div(channels, kDepth) * kDepth) {
        const int64_t half = sizeof(__half), word = sizeof(float), record = sizeof(Record);
        const int64_t tiles = ceil_div(n, kTile);
        const int64_t by_records = kRecordBytes / (groups * kTile * record);
        const int64_t by_rows = kRowBytes / (stride * kTile * half);
        const int64_t fit = by_records < by_rows ? by_records : by_rows;
        rows = kTile * (fit < 1 ? 1 : fit < tiles ? fit : tiles);
        centroids = static_cast<__half*>(memory);
        x = centroids + k * stride;
        mean = reinterpret_cast<float*>(x + rows * stride);
        half_norm = mean + channels;
        scale_c = half_norm + k;
        scale_x = scale_c + k;
        largest = reinterpret_cast<unsigned*>(scale_x + rows);
        records = reinterpret_cast<Record*>(largest + groups);
        bytes = half * stride * (k + rows) + word * (channels + 2 * k + rows + groups) +
                record * rows * groups;
    }
};

__global__ void __launch_bounds__(kThreads)
    mean_kernel(const float* __restrict__ centroids, int64_t k, int64_t channels,
                float* __restrict__ mean) {
    const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (c >= channels) return;
    const int64_t sample = k < kMeanRows ? k : kMeanRows;
    float sum = 0;
    for (int64_t i = 0; i < sample; ++i)
        sum += centroids[i * k / sample * channels + c] / static_cast<float>(sample);
    mean[c] = sum;
}

// A warp for each row: less the mean, times 2^-e, in half; scale is 2^e. Of centroids the norms
// too.
__global__ void __launch_bounds__(kThreads)
    round_kernel(const float* __restrict__ rows, int64_t count, int64_t channels,
                 const float* __restrict__ mean, int64_t stride, __half* __restrict__ rounded,
                 float* __restrict__ scale, float* __restrict__ half_norm, unsigned* largest) {
    const int64_t j = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (j >= count) return;
    const float* row = rows + j * channels;
    float sum = 0;
    for (int64_t c = lane; c < channels; c += kWarp) {
        const float z = row[c] - mean[c];
        sum = fmaf(z, z, sum);
    }
    sum = warp_reduce(sum, Sum());
    const float norm = __fsqrt_rn(sum);  // 0, or from 2^-75 to 2^64, or not finite
    const bool regular = norm > 0 && norm < INFINITY;
    const unsigned e = regular ? (__float_as_uint(norm) >> 23) + 1 : 127;  // 127 stands for 2^0
    const float down = __uint_as_float((254 - e) << 23);
    const auto at = [&](int64_t c) { return c < channels ? (row[c] - mean[c]) * down : 0.0f; };
    auto* pairs = reinterpret_cast<__half2*>(rounded + j * stride);
    for (int64_t c = lane; c < stride / 2; c += kWarp)
        pairs[c] = __floats2half2_rn(at(2 * c), at(2 * c + 1));
    if (lane != 0) return;
    scale[j] = __uint_as_float(e << 23);
    if (half_norm == nullptr) return;
    half_norm[j] = sum / 2;
    atomicMax(largest + j / kTile,
              __float_as_uint(fabsf(sum)));  // as integers, and NaN above infinity
}

struct Problem {
    const float *x, *centroids, *mean, *half_norm, *scale_c, *scale_x;
    const __half *rounded_x, *rounded_c;
    int64_t n, k, channels, stride;
    Record* records;
};

__global__ void __launch_bounds__(kThreads, 2) product_kernel(const Problem p) {
    const int64_t row = (int64_t{blockIdx.y} * kSwath + blockIdx.x % kSwath) * kTile;
    const int64_t group = blockIdx.x / kSwath, column = group * kTile;
    if (row >= p.n) return;

    const int last_row = static_cast<int>(min(p.n - row, int64_t{kTile})) - 1;
    const int last_column = static_cast<int>(min(p.k - column, int64_t{kTile})) - 1;
    Sums sum = {};
    add_product(p.rounded_x + row * p.stride, last_row, p.rounded_c + column * p.stride,
                last_column, p.stride, sum);

    const WarpTile w;
    const int g = w.lane / 4, t = w.lane % 4, across = w.left / kWarpColumns;
    Record* partial = dynamic_shared<Record>();  // (kTile, kAcross), in place of the slices
    const int mine = w.left + 2 * t;             // of the group
    float half_norm[kWarpColumns / 8][2], scale_c[kWarpColumns / 8][2];
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool any = mine + 8 * j + i <= last_column;
            half_norm[j][i] = any ? p.half_norm[column + mine + 8 * j + i] : INFINITY;
            scale_c[j][i] = any ? p.scale_c[column + mine + 8 * j + i] : 0;
        }
#pragma unroll
    for (int r = 0; r < kWarpRows / 8; ++r) {
        const float scale_x = p.scale_x[row + min(w.top + r * 8 + g, last_row)];
        Record best = {INFINITY, INFINITY, mine};
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float product = sum[r / 2][j][r % 2 * 2 + i] * scale_x * scale_c[j][i];
                merge(best, {half_norm[j][i] - product, INFINITY, mine + 8 * j + i});
            }
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2)
            merge(best, {__shfl_xor_sync(kAllLanes, best.least, distance),
                         __shfl_xor_sync(kAllLanes, best.second, distance),
                         __shfl_xor_sync(kAllLanes, best.index, distance)});
        if (t == 0) partial[(w.top + r * 8 + g) * kAcross + across] = best;
    }
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x);
    if (i > last_row) return;
    Record best = partial[i * kAcross];
#pragma unroll
    for (int a = 1; a < kAcross; ++a) merge(best, partial[i * kAcross + a]);
    p.records[(row + i) * ceil_div(p.k, kTile) + group] = best;
}

// How far s of a centroid can be from its exact value, and what the measured distance adds, in
// units of half a squared distance. Rounding to half takes 2^-11 of either side, and of channels
// far below the norm 2^-25 of it; a matrix instruction, of which there is one for 16 channels, may
// truncate its sum and 16 terms by 2^-24 each. The last term is for what underflows in float32.
__device__ __forceinline__ float error_bound(float norm, float largest, float least,
                                             int64_t channels) {
    const float rounding = 0x1.08p-10f + 2 * static_cast<float>(channels) * 0x1p-24f;
    const float half_distance = fmaxf(norm * norm / 2 + least, 0.0f);
    return rounding * (norm * largest + largest * largest + half_distance) +
           static_cast<float>(channels) * 0x1p-120f;
}

// A warp for each embedding: measures what may be the nearest.
__global__ void __launch_bounds__(kThreads)
    measure_kernel(const Problem p, const unsigned* __restrict__ largest,
                   float* __restrict__ distance, int64_t* __restrict__ index) {
    const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
    const int lane = threadIdx.x % kWarp;
    if (row >= p.n) return;
    const float* x = p.x + row * p.channels;
    const int64_t groups = ceil_div(p.k, kTile);
    const Record* records = p.records + row * groups;

    float square = 0;
    bool nan = false;
    for (int64_t c = lane; c < p.channels; c += kWarp) {
        const float y = x[c] - p.mean[c];
        square = fmaf(y, y, square);
        nan |= x[c] != x[c];
    }
    const float norm = __fsqrt_rn(warp_reduce(square, Sum()));
    const auto bound = [&](int64_t g) {
        return error_bound(norm, __fsqrt_rn(__uint_as_float(largest[g])), records[g].least,
                           p.channels);
    };
    // Not a number after overflow: then every centroid is measured.
    float most = INFINITY;
    for (int64_t g = lane; g < groups; g += kWarp)
        most = Minimum()(most, records[g].least + bound(g));
    most = warp_reduce(most, Minimum());

    float nearest = INFINITY;
    int64_t winner = 0;
    const auto measure = [&](int64_t first, int64_t stop) {
        for (int64_t j = first; j < stop; ++j) {
            const float* centroid = p.centroids + j * p.channels;
            float sum = 0;
#pragma unroll 4
            for (int64_t c = lane; c < p.channels; c += kWarp) {
                const float d = x[c] - centroid[c];
                sum = fmaf(d, d, sum);
            }
            sum = warp_reduce(sum, Sum());
            if (sum < nearest) nearest = sum, winner = j;
        }
    };
    if (__any_sync(kAllLanes, nan)) {
        nearest = NAN;
    } else {
        for (int64_t start = 0; start < groups; start += kWarp) {
            const bool any = start + lane < groups;
            const Record mine = any ? records[start + lane] : Record{};
            const float limit = any ? most + bound(start + lane) : 0;
            unsigned near = __ballot_sync(kAllLanes, any && !(mine.least > limit));
            const unsigned single = __ballot_sync(kAllLanes, mine.second > limit);
            for (; near != 0; near &= near - 1) {
                const int l = __ffs(near) - 1;
                const int64_t first = (start + l) * kTile;
                const int64_t stop = first + kTile < p.k ? first + kTile : p.k;
                const int64_t one = first + __shfl_sync(kAllLanes, mine.index, l);
                const bool alone = single >> l & 1;
                measure(alone ? one : first, alone ? one + 1 : stop);
            }
        }
    }
    if (lane == 0) {
        distance[row] = __fsqrt_rn(nearest);
        index[row] = winner;
    }
}

unsigned warp_blocks(int64_t warps) {
    return static_cast<unsigned>(ceil_div(warps, kThreads / kWarp));
}

}  // namespace

int64_t nearest_centroid_workspace(int64_t n, int64_t k, int64_t channels) {
    return Workspace(nullptr, n, k, channels).bytes;
}

int nearest_centroid(const float* x, int64_t n, const float* centroids, int64_t k, int64_t channels,
                     void* workspace, float* distance, int64_t* index, Stream stream) {
    if (n == 0) return cudaSuccess;
    const Workspace w(workspace, n, k, channels);
    cudaError_t error = launch(mean_kernel, static_cast<unsigned>(ceil_div(channels, kThreads)),
                               kThreads, 0, stream, centroids, k, channels, w.mean);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(w.largest, 0, static_cast<size_t>(w.groups) * sizeof *w.largest,
                                stream);
    if (error == cudaSuccess)
        error = launch(round_kernel, warp_blocks(k), kThreads, 0, stream, centroids, k, channels,
                       w.mean, w.stride, w.centroids, w.scale_c, w.half_norm, w.largest);
    for (int64_t start = 0; start < n && error == cudaSuccess; start += w.rows) {
        const int64_t rows = n - start < w.rows ? n - start : w.rows;
        const Problem p = {
            x + start * channels, centroids, w.mean, w.half_norm, w.scale_c, w.scale_x, w.x,
            w.centroids,          rows,      k,      channels,    w.stride,  w.records};
        const dim3 grid(static_cast<unsigned>(kSwath * w.groups),
                        static_cast<unsigned>(ceil_div(rows, kSwath * kTile)));
        error = launch(round_kernel, warp_blocks(rows), kThreads, 0, stream, p.x, rows, channels,
                       w.mean, w.stride, w.x, w.scale_x, nullptr, nullptr);
        if (error == cudaSuccess)
            error = launch(product_kernel, grid, kThreads, kProductShared, stream, p);
        if (error == cudaSuccess)
            error = launch(measure_kernel, warp_blocks(rows), kThreads, 0, stream, p, w.largest,
                           distance + start, index + start);
    }
    return error;
}

}  // namespace npad::cuda
