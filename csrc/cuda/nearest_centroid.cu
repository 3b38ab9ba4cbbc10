// Distance of every x (n, channels) to the nearest of the centroids (k, channels), and its index.
//
//   || x - c ||^2 / 2 = || x ||^2 / 2 + s,   s = || c ||^2 / 2 - x . c   (x, c less the centroids'
//   mean)
//
// Rows less the mean are scaled by a power of two each, which brings their norm below 1, and
// rounded to float16 once; of the centroids that is in their index. A block owns 128 embeddings and
// a group of 128 centroids. Their product on tensor cores is right to 2^-10; of each embedding only
// the group's least s, whose it is, and the second least are kept. Rounding can swap centroids in
// s, so all whose s may lie within the error bound of the best, nearly always a few, are then
// measured by differences; the whole group where its second is among them. The result is that of
// the plain loop over differences, of equals the lowest index. NaN in x: distance NaN, index 0.
//
// Flops: 2 n k channels in float16. Bytes: x read twice and written once in half; from the caches
// n k channels / 32. Workspace: of so many embeddings at a time that it stays bounded, those in
// half and 12 bytes for each group. Sums over channels: in the product by the matrix instruction,
// 16 at a time; measured, by each lane over four neighbours of every 128, then over lanes. Nothing
// depends on the order of blocks.
#include "kernels.h"
#include "rounded_rows.cuh"

namespace npad::cuda {

namespace {

constexpr int kSwath = 16;  // tiles of x that meet the centroids together: both stay in cache
constexpr int64_t kRecordBytes = 32 << 20, kRowBytes = 64 << 20;  // at a time, in half the latter
constexpr int kDown = kTile / kWarpRows;
static_assert(kThreads == kTile);  // an embedding each, in the end

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

// Two lanes, `distance` apart, have 2 kHalf embeddings in common: each takes half of them.
template <int kHalf>
__device__ __forceinline__ void take_half(int lane, int distance, Record* best) {
    const bool upper = lane & distance;
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
        const Record other = upper ? best[j] : best[j + kHalf];
        if (upper) best[j] = best[j + kHalf];
        merge(best[j], {__shfl_xor_sync(kAllLanes, other.least, distance),
                        __shfl_xor_sync(kAllLanes, other.second, distance),
                        __shfl_xor_sync(kAllLanes, other.index, distance)});
    }
}

struct Workspace {
    __half* rounded;        // (rows / kTile) tiles, operand b
    float *scale, *square;  // (rows): 2^e, and the squared norm
    Record* records;        // (rows, groups)
    int64_t rows, bytes;

    Workspace(void* memory, int64_t n, int64_t k, int64_t channels) {
        const Index index(nullptr, k, channels);
        const int64_t half = sizeof(__half), word = sizeof(float), record = sizeof(Record);
        const int64_t row_bytes = half * index.slices * kDepth, row_records = record * index.groups;
        const int64_t by_records = kRecordBytes / (kTile * row_records);
        const int64_t by_rows = kRowBytes / (kTile * row_bytes);
        const int64_t fit = by_records < by_rows ? by_records : by_rows;
        const int64_t tiles = ceil_div(n, kTile);
        rows = kTile * (fit < 1 ? 1 : fit < tiles ? fit : tiles);
        rounded = static_cast<__half*>(memory);
        scale = reinterpret_cast<float*>(rounded + rows * index.slices * kDepth);
        square = scale + rows;
        records = reinterpret_cast<Record*>(square + rows);
        bytes = rows * (row_bytes + 2 * word + row_records);
    }
};

struct Problem {
    const float *x, *centroids;
    int64_t n, k, channels;
    Index index;
    Workspace of_x;
};

// A warp for each embedding.
template <bool kVectors>
__global__ void __launch_bounds__(kThreads) round_kernel(const Problem p) {
    const int64_t row = row_of_warp();
    const Rounded of_row = round_row<Operand::kB, kVectors>(p.x, row, p.n, p.channels, p.index.mean,
                                                            p.index.slices, p.of_x.rounded);
    if (threadIdx.x % kWarp != 0) return;
    p.of_x.scale[row] = of_row.scale;
    p.of_x.square[row] = of_row.square;
}

__global__ void __launch_bounds__(kThreads, 2) product_kernel(const Problem p) {
    const int64_t tile = int64_t{blockIdx.y} * kSwath + blockIdx.x % kSwath, row = tile * kTile;
    const int64_t group = blockIdx.x / kSwath;
    if (row >= p.n) return;

    const int64_t tile_halves = p.index.slices * kSliceHalves;
    Sums sum = {};
    add_product(p.index.rounded + group * tile_halves, p.of_x.rounded + tile * tile_halves,
                static_cast<int>(p.index.slices), sum);

    const WarpTile w;
    const int g = w.lane / 4, t = w.lane % 4;
    // A lane has kColumns embeddings, of each every 8th centroid of the warp.
    constexpr int kColumns = kWarpColumns / 4;
    Centroid centroid[kWarpRows / 8];
#pragma unroll
    for (int r = 0; r < kWarpRows / 8; ++r)
        centroid[r] = p.index.centroids[group * kTile + w.top + 8 * r + g];
    Record best[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        const float scale = p.of_x.scale[row + w.left + j / 2 * 8 + 2 * t + j % 2];
        best[j] = {INFINITY, INFINITY, w.top + g};
#pragma unroll
        for (int r = 0; r < kWarpRows / 8; ++r) {
            const float product = sum[r / 2][j / 2][r % 2 * 2 + j % 2] * scale * centroid[r].scale;
            merge(best[j], {centroid[r].half_norm - product, INFINITY, w.top + 8 * r + g});
        }
    }
    take_half<kColumns / 2>(w.lane, 16, best);
    take_half<kColumns / 4>(w.lane, 8, best);
    take_half<kColumns / 8>(w.lane, 4, best);
    Record* partial = dynamic_shared<Record>();  // (kDown, kTile), in place of the slices
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
        const int j = g * (kColumns / 8) + i;
        partial[w.top / kWarpRows * kTile + w.left + j / 2 * 8 + 2 * t + j % 2] = best[i];
    }
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x);
    Record result = partial[i];
#pragma unroll
    for (int d = 1; d < kDown; ++d) merge(result, partial[d * kTile + i]);
    p.of_x.records[(row + i) * p.index.groups + group] = result;
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
template <bool kVectors>
__global__ void __launch_bounds__(kThreads)
    measure_kernel(const Problem p, float* __restrict__ distance, int64_t* __restrict__ index) {
    const int64_t row = row_of_warp();
    const int lane = threadIdx.x % kWarp;
    if (row >= p.n) return;
    const float* x = p.x + row * p.channels;
    const int64_t groups = p.index.groups;
    const Record* records = p.of_x.records + row * groups;

    const float square = p.of_x.square[row], norm = __fsqrt_rn(square);
    bool nan = false;
    if (!(square < INFINITY))  // then it may be the mean's, or infinity
#pragma unroll 1
        for (int64_t c = lane; c < p.channels; c += kWarp) nan |= x[c] != x[c];
    const auto bound = [&](int64_t g) {
        return error_bound(norm, __fsqrt_rn(__uint_as_float(p.index.largest[g])), records[g].least,
                           p.channels);
    };
    // Not a number after overflow: then every centroid is measured.
    float most = INFINITY;
#pragma unroll 1
    for (int64_t g = lane; g < groups; g += kWarp)
        most = Minimum()(most, records[g].least + bound(g));
    most = warp_reduce(most, Minimum());

    float nearest = INFINITY;
    int64_t winner = 0;
    const auto measure = [&](int64_t first, int64_t stop) {
        for (int64_t j = first; j < stop; ++j) {
            const float* centroid = p.centroids + j * p.channels;
            float sum = 0;
#pragma unroll kVectors ? 4 : 1
            for (int64_t c = 4 * lane; c < p.channels; c += 4 * kWarp)
                sum = add_square(subtract(load_four<kVectors>(x, c, p.channels),
                                          load_four<kVectors>(centroid, c, p.channels)),
                                 sum);
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

}  // namespace

int64_t nearest_centroid_workspace(int64_t n, int64_t k, int64_t channels) {
    return Workspace(nullptr, n, k, channels).bytes;
}

int nearest_centroid(const float* x, int64_t n, const float* centroids, int64_t k, int64_t channels,
                     const void* index, void* workspace, float* distance, int64_t* nearest,
                     Stream stream) {
    if (n == 0) return cudaSuccess;
    const Workspace of_x(workspace, n, k, channels);
    const Index of_centroids(const_cast<void*>(index), k, channels);  // which nothing here writes
    const bool x_fits = vectors_fit(x, channels);
    const bool both_fit = x_fits && vectors_fit(centroids, channels);
    const auto round = x_fits ? round_kernel<true> : round_kernel<false>;
    const auto measure = both_fit ? measure_kernel<true> : measure_kernel<false>;
    cudaError_t error = cudaSuccess;
    for (int64_t start = 0; start < n && error == cudaSuccess; start += of_x.rows) {
        const int64_t rows = n - start < of_x.rows ? n - start : of_x.rows;
        const int64_t tiles = ceil_div(rows, kTile);
        const Problem p = {x + start * channels, centroids, rows, k, channels, of_centroids, of_x};
        const dim3 grid(static_cast<unsigned>(kSwath * of_centroids.groups),
                        static_cast<unsigned>(ceil_div(tiles, kSwath)));
        error = launch(round, warp_blocks(tiles * kTile), kThreads, 0, stream, p);
        if (error == cudaSuccess)
            error = launch(product_kernel, grid, kThreads, kProductShared, stream, p);
        if (error == cudaSuccess)
            error = launch(measure, warp_blocks(rows), kThreads, 0, stream, p, distance + start,
                           nearest + start);
    }
    return error;
}

}  // namespace npad::cuda
