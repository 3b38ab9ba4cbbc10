// A short image of every point, its head, that bounds distances from below.
//
// With orthonormal axes q_j, y = x - mean and the residual r(x) = || y - sum_j (q_j . y) q_j ||:
//
//   || x - c ||^2 >= (r(x) - r(c))^2 + sum_j (q_j . x - q_j . c)^2
//
// and so is every part of that sum. A head holds the residual first, then 63 coordinates along axes
// of which the leading come first, so that the first few numbers already tell most points apart.
//
// Heads of 32 points lie together, (groups of 4 numbers, points) float4: a warp, a lane for each
// point, reads 512 bytes at a time, its next groups follow in the same pages of memory, and nothing
// is summed across lanes.
//
// A block of the kernel owns 64 points. Products are float32, on no tensor cores, and summed from
// zero over every 32 channels: the bound on their rounding holds whatever a library is set to. The
// residual is that of the differences, for which the points are read a second time: || y ||^2 less
// the squares of the coordinates would cancel, and lose all that tells near points apart.
// Flops: 256 dim per point. Bytes: 8 dim, of which the second half may come from the cache, and
// 256.
#pragma once

#include "device_utils.cuh"

namespace npad::cuda {

constexpr int kHead = 64;           // floats of a head
constexpr int kGroups = kHead / 4;  // that a lane loads at a time

constexpr int kHeadPoints = 64, kHeadThreads = 256;  // 16 x 16 of them: 4 points, 4 axes each
constexpr int kDepth = 32;                           // channels of a slice
constexpr int kHeadStride = kHeadPoints + 4;  // keeps vectors aligned and spreads rows over banks
static_assert(kHead == kHeadPoints);

// A bound rules a point out if it exceeds (1 + kSlack) d^2 + tolerance. Half of the slack is for
// rounding of the sums d^2 and bound, which for up to 2^17 dimensions are right to 2^-10; the other
// half for heads: (d + e)^2 <= (1 + s) d^2 + (1 + 1 / s) e^2, s = kSlack / 2.
constexpr float kSlack = 0x1p-9f;

// `largest` is the largest squared norm of a head, nearly that of a point's distance to the mean,
// R^2. In units of 2^-24 R, a point's head is off by
//
//   8 k        63 coordinates, each a sum of products with k = 32 + dim / 32 roundings in a row
//   8          axes rounded to float32
//   9 k + 592  the residual: both of these once more, its differences of 64 products, its norm
//   1          y
//
// that is at most 12.1 k + 594 in all. Twice that, for two points, is below 31 (k + 48). What is
// left of 32 covers the rounding of R and of this. The last term is for squares that are subnormal.
// Where R^2 overflows nothing is ruled out, nor where it is NaN.
__device__ __forceinline__ float head_tolerance(float largest, int dim) {
    const int roundings = kDepth + (dim + kDepth - 1) / kDepth;
    const float error = 32 * static_cast<float>(roundings + 48) * 0x1p-24f;
    return (1 + 2 / kSlack) * error * error * largest + static_cast<float>(dim) * 0x1p-126f;
}

struct Heads {
    const float4* data;
    __device__ __forceinline__ const float4* of(int64_t i) const {
        return data + i / kWarp * (kGroups * kWarp) + i % kWarp;
    }
    __device__ __forceinline__ float4 group(int64_t i, int g) const { return of(i)[g * kWarp]; }
    static int64_t floats(int64_t n) { return ceil_div(n, kHeadPoints) * kHeadPoints * kHead; }
};

using HeadSlice = float[kDepth][kHeadStride];

// Channels start .. start + kDepth - 1 of 64 rows less `mean`, transposed; zero above dim.
// Of points, the last one stands for those past it.
__device__ __forceinline__ void load_slice(const float* __restrict__ rows, int64_t last, int dim,
                                           const float* __restrict__ mean, int start,
                                           HeadSlice& slice) {
    const int c = static_cast<int>(threadIdx.x) % kDepth;
    const bool inside = start + c < dim;
    const float origin = inside && mean != nullptr ? mean[start + c] : 0;
#pragma unroll
    for (int i = 0; i < kHeadPoints * kDepth / kHeadThreads; ++i) {
        const int64_t r = threadIdx.x / kDepth + i * (kHeadThreads / kDepth);
        slice[c][r] = inside ? rows[min(r, last) * dim + start + c] - origin : 0;
    }
}

__device__ __forceinline__ void add_multiple(float factor, float4 x, float (&sum)[4]) {
    sum[0] = fmaf(factor, x.x, sum[0]);
    sum[1] = fmaf(factor, x.y, sum[1]);
    sum[2] = fmaf(factor, x.z, sum[2]);
    sum[3] = fmaf(factor, x.w, sum[3]);
}

// points (n, dim); mean (dim); axes (kHead, dim), the first zero, where the residual goes.
// `largest` holds the bits of a float that is not negative.
static __global__ void __launch_bounds__(kHeadThreads, 2)
    head_kernel(const float* __restrict__ points, int64_t n, int dim,
                const float* __restrict__ mean, const float* __restrict__ axes,
                float4* __restrict__ heads, unsigned* largest) {
    __shared__ HeadSlice y, q;
    __shared__ float head[kHead][kHeadStride];
    const int column = threadIdx.x % 16, row = threadIdx.x / 16 * 4;  // row: first of four points
    const int64_t start = int64_t{blockIdx.x} * kHeadPoints;
    const auto load_slices = [&](int channel) {
        __syncthreads();  // the last ones have been read
        load_slice(points + start * dim, n - 1 - start, dim, mean, channel, y);
        load_slice(axes, kHead - 1, dim, nullptr, channel, q);
        __syncthreads();
    };

    float sum[4][4] = {};  // axes 4 column + a, points row + b
    for (int channel = 0; channel < dim; channel += kDepth) {
        load_slices(channel);
        float part[4][4] = {};
#pragma unroll 4
        for (int c = 0; c < kDepth; ++c) {
            const float4 x = load<float4>(&y[c][row]), axis = load<float4>(&q[c][4 * column]);
            add_multiple(axis.x, x, part[0]);
            add_multiple(axis.y, x, part[1]);
            add_multiple(axis.z, x, part[2]);
            add_multiple(axis.w, x, part[3]);
        }
#pragma unroll
        for (int a = 0; a < 4; ++a)
#pragma unroll
            for (int b = 0; b < 4; ++b) sum[a][b] += part[a][b];
    }
#pragma unroll
    for (int a = 0; a < 4; ++a)
        *reinterpret_cast<float4*>(&head[4 * column + a][row]) =
            make_float4(sum[a][0], sum[a][1], sum[a][2], sum[a][3]);

    float square[4] = {};
    for (int channel = 0; channel < dim; channel += kDepth) {
        load_slices(channel);
#pragma unroll
        for (int c = column; c < kDepth; c += 16) {
            const float4 x = load<float4>(&y[c][row]);
            float rest[4] = {x.x, x.y, x.z, x.w};
#pragma unroll 2
            for (int j = 0; j < kHead; j += 4) {
                const float4 axis = load<float4>(&q[c][j]);
                add_multiple(-axis.x, load<float4>(&head[j][row]), rest);
                add_multiple(-axis.y, load<float4>(&head[j + 1][row]), rest);
                add_multiple(-axis.z, load<float4>(&head[j + 2][row]), rest);
                add_multiple(-axis.w, load<float4>(&head[j + 3][row]), rest);
            }
#pragma unroll
            for (int b = 0; b < 4; ++b) square[b] = fmaf(rest[b], rest[b], square[b]);
        }
    }
    __syncthreads();
#pragma unroll
    for (int b = 0; b < 4; ++b) {
#pragma unroll
        for (int distance = 8; distance > 0; distance /= 2)
            square[b] += __shfl_xor_sync(kAllLanes, square[b], distance);
        if (column == 0) head[0][row + b] = __fsqrt_rn(square[b]);
    }
    __syncthreads();

    if (threadIdx.x < kHeadPoints) {
        float norm = 0;
        for (int j = 0; j < kHead; ++j)
            norm = fmaf(head[j][threadIdx.x], head[j][threadIdx.x], norm);
        // Not negative, so ordered as the bits are, NaN above infinity.
        norm = warp_reduce(fabsf(norm), Maximum());
        if (threadIdx.x % kWarp == 0) atomicMax(largest, __float_as_uint(norm));
    }
    float4* out = heads + start * kGroups;
#pragma unroll
    for (int i = threadIdx.x; i < kHeadPoints * kGroups; i += kHeadThreads) {
        const int g = i / kWarp % kGroups * 4, p = i / (kWarp * kGroups) * kWarp + i % kWarp;
        out[i] = make_float4(head[g][p], head[g + 1][p], head[g + 2][p], head[g + 3][p]);
    }
}

}  // namespace npad::cuda
