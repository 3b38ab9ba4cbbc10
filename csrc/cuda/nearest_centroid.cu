// Distance of every x (n, channels) to the nearest of the centroids (k, channels), and its index.
//
//   || x - c ||^2 / 2 = || x ||^2 / 2 + s,   s = || c ||^2 / 2 - x . c   (x, c less the centroids'
//   mean)
//
// A block owns 128 embeddings and a group of 128 centroids. Their product on tensor cores, as three
// products of bfloat16 parts, is right to 2^-14; of each embedding only the group's least s, whose
// it is, and the second least are kept. Rounding can swap centroids in s, so all whose s may lie
// within the error bound of the best, nearly always one or two, are then measured by differences;
// the whole group where its second is among them. The result is that of the plain loop over
// differences, of equals the lowest index. NaN in x: distance NaN, index 0.
//
// Flops: 6 n k channels in bfloat16, and splitting in registers in their shadow. Bytes from the
// caches: n k channels / 16; workspace: 12 for each embedding and group, of so many embeddings at a
// time that they stay in the second-level cache. Sums over channels: in the product by the matrix
// instruction, 16 at a time in ascending order; measured, by each lane over every 32nd channel,
// then over lanes. Nothing depends on the order of blocks.
#include "tile_product.cuh"

#include "kernels.h"

namespace npad::cuda {

namespace {

constexpr int kSwath = 16;  // tiles of x that meet the centroids together: both stay in cache
constexpr int64_t kRecordBytes = 32 << 20;  // at a time
constexpr int kMeanRows = 64;               // centroids whose mean is the origin

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
    float* mean;        // (channels), zero up to the end of the last slice
    float* half_norm;   // (k)
    unsigned* largest;  // (groups) bits of the largest squared norm
    Record* records;    // (rows, groups)
    int64_t groups, rows, bytes;

    Workspace(void* memory, int64_t n, int64_t k, int64_t channels) : groups(ceil_div(k, kTile)) {
        const int64_t fit = kRecordBytes / (groups * kTile * static_cast<int64_t>(sizeof(Record)));
        const int64_t tiles = ceil_div(n, kTile);
        rows = kTile * (fit < 1 ? 1 : fit < tiles ? fit : tiles);
        const int64_t floats = ceil_div(channels, kDepth) * kDepth;
        mean = static_cast<float*>(memory);
        half_norm = mean + floats;
        largest = reinterpret_cast<unsigned*>(half_norm + k);
        records = reinterpret_cast<Record*>(largest + groups);
        bytes = (floats + k + groups) * static_cast<int64_t>(sizeof(float)) +
                rows * groups * static_cast<int64_t>(sizeof(Record));
    }
};

__global__ void __launch_bounds__(kThreads)
    mean_kernel(const float* __restrict__ centroids, int64_t k, int64_t channels,
                float* __restrict__ mean) {
    const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (c >= ceil_div(channels, kDepth) * kDepth) return;
    const int64_t sample = k < kMeanRows ? k : kMeanRows;
    float sum = 0;
    if (c < channels)
        for (int64_t i = 0; i < sample; ++i)
            sum += centroids[i * k / sample * channels + c] / static_cast<float>(sample);
    mean[c] = sum;
}

// A warp for each centroid.
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const float* __restrict__ centroids, int64_t k, int64_t channels,
                const float* __restrict__ mean, float* __restrict__ half_norm, unsigned* largest) {
    const int64_t j = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
    if (j >= k) return;
    float sum = 0;
    for (int64_t c = threadIdx.x % kWarp; c < channels; c += kWarp) {
        const float z = centroids[j * channels + c] - mean[c];
        sum = fmaf(z, z, sum);
    }
    sum = warp_reduce(sum, Sum());
    if (threadIdx.x % kWarp != 0) return;
    half_norm[j] = sum / 2;
    atomicMax(largest + j / kTile,
              __float_as_uint(fabsf(sum)));  // as integers, and NaN above infinity
}

struct Problem {
    const float *x, *centroids, *mean, *half_norm;
    int64_t n, k, channels;
    Record* records;
};

// kBytes: of one copy to shared memory, to which rows are aligned.
template <int kBytes>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const Problem p) {
    const int64_t row = (int64_t{blockIdx.y} * kSwath + blockIdx.x % kSwath) * kTile;
    const int64_t group = blockIdx.x / kSwath, column = group * kTile;
    if (row >= p.n) return;

    const int last_row = static_cast<int>(min(p.n - row, int64_t{kTile})) - 1;
    const int last_column = static_cast<int>(min(p.k - column, int64_t{kTile})) - 1;
    Sums sum = {};
    add_product<kBytes>(p.x + row * p.channels, last_row, p.centroids + column * p.channels,
                        last_column, p.mean, static_cast<int>(p.channels), sum);

    const WarpTile w;
    const int g = w.lane / 4, t = w.lane % 4, across = w.left / kWarpColumns;
    Record* partial = dynamic_shared<Record>();  // (kTile, kAcross), in place of the slices
    float half_norm[kWarpColumns / 8][2];
    const int mine = w.left + 2 * t;  // of the group
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            half_norm[j][i] =
                mine + 8 * j + i <= last_column ? p.half_norm[column + mine + 8 * j + i] : INFINITY;
#pragma unroll
    for (int r = 0; r < kWarpRows / 8; ++r) {
        Record best = {INFINITY, INFINITY, mine};
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                merge(best,
                      {half_norm[j][i] - sum[r / 2][j][r % 2 * 2 + i], INFINITY, mine + 8 * j + i});
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
// units of half a squared distance. The parts of the product leave out 3 x 2^-16, and a matrix
// instruction, of which there are 3 for 16 channels, may truncate its sum and 16 terms by 2^-24
// each. The last term is for subnormal products.
__device__ __forceinline__ float error_bound(float norm, float largest, float least,
                                             int64_t channels) {
    const float rounding = 0x1p-14f + 4 * static_cast<float>(channels) * 0x1p-24f;
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
    const auto aligned = [](const float* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    const bool vectors = channels % 4 == 0 && aligned(x) && aligned(centroids);

    cudaError_t error = launch(
        mean_kernel, static_cast<unsigned>(ceil_div(ceil_div(channels, kDepth) * kDepth, kThreads)),
        kThreads, 0, stream, centroids, k, channels, w.mean);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(w.largest, 0, static_cast<size_t>(w.groups) * sizeof *w.largest,
                                stream);
    if (error == cudaSuccess)
        error = launch(norm_kernel, warp_blocks(k), kThreads, 0, stream, centroids, k, channels,
                       w.mean, w.half_norm, w.largest);
    for (int64_t start = 0; start < n && error == cudaSuccess; start += w.rows) {
        const int64_t rows = n - start < w.rows ? n - start : w.rows;
        const Problem p = {
            x + start * channels, centroids, w.mean, w.half_norm, rows, k, channels, w.records};
        const dim3 grid(static_cast<unsigned>(kSwath * w.groups),
                        static_cast<unsigned>(ceil_div(rows, kSwath * kTile)));
        error = launch(vectors ? product_kernel<16> : product_kernel<4>, grid, kThreads,
                       kProductShared, stream, p);
        if (error == cudaSuccess)
            error = launch(measure_kernel, warp_blocks(rows), kThreads, 0, stream, p, w.largest,
                           distance + start, index + start);
    }
    return error;
}

}  // namespace npad::cuda
