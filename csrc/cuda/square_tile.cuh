// Tiles of 64 x 64 in shared memory, for a block of 128 threads: their products, and the inverse of
// the Cholesky factor of one. A tile is a row of 64 floats for each k over which products are
// summed; sums are in registers.
#pragma once

#include <cmath>

#include "device_utils.cuh"

namespace npad::cuda {

constexpr int kTile = 64;  // rows and columns of a tile
constexpr int kTileFloats = kTile * kTile;
constexpr int kWarpTile = 32;        // of those, what one warp owns
constexpr int kThreads = 4 * kWarp;  // 2 x 2 warps; 32 sums each
constexpr int kStride = kTile + 8;   // a fragment's 4 x 8 floats lie in 32 banks
constexpr int kDepth = 16;           // rows that a product takes at a time

// Tensor cores where three of their products take less time than one of float32. Blocks on a
// multiprocessor, as far as shared memory holds them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000
constexpr bool kTensorCores = true;
constexpr int kBlocks = 4;
#else
constexpr bool kTensorCores = __CUDA_ARCH__ == 800;
constexpr int kBlocks = 3;
#endif

using Rows = float[kStride];

// What a thread owns of a tile: [e][r] is column left + 16 (e / 4) + e % 4, row top + r.
using Sums = float[8][4];
struct Owner {
    int top, left;
    bool above;  // the diagonal of a diagonal tile, with the whole warp

    __device__ __forceinline__ Owner() {
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
        top = warp / 2 * kWarpTile + lane / 4 * 4;
        left = warp % 2 * kWarpTile + lane % 4 * 4;
        above = warp == 1;
    }
    __device__ __forceinline__ int column(int e) const { return left + e / 4 * 16 + e % 4; }
};

// Starts the copies of kRows rows, which follow one another in memory.
template <int kRows>
__device__ __forceinline__ void copy_rows(const float* from, Rows* to) {
    constexpr int kVectors = kTile / 4;
#pragma unroll
    for (int i = 0; i < kRows * kVectors / kThreads; ++i) {
        const int v = static_cast<int>(threadIdx.x) + i * kThreads;
        cp_async(&to[v / kVectors][v % kVectors * 4], from + v * 4);
    }
}

__device__ __forceinline__ void store_columns(float* tile, int stride, const Sums& s) {
    const Owner own;
#pragma unroll
    for (int e = 0; e < 8; ++e)
        *reinterpret_cast<float4*>(tile + own.column(e) * stride + own.top) =
            make_float4(s[e][0], s[e][1], s[e][2], s[e][3]);
}

__device__ __forceinline__ void store_rows(float* tile, int stride, const Sums& s) {
    const Owner own;
#pragma unroll
    for (int e = 0; e < 8; e += 4)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            *reinterpret_cast<float4*>(tile + (own.top + r) * stride + own.column(e)) =
                make_float4(s[e][r], s[e + 1][r], s[e + 2][r], s[e + 3][r]);
}

// sum += a^T b over kDepth rows of a and b. So that a thread holds what it owns, row g + 8 u of
// instruction m is row 4 g + 2 m + u of the warp's tile, and column n of instruction h is column
// 16 half + 2 n + h.
__device__ __forceinline__ void add_product_by_mma(const Rows* a, const Rows* b, Sums& sum) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const Owner own;
    const int left = own.left - 4 * t + 2 * g;  // of the warp's tile, and 2 n
#pragma unroll 1
    for (int k = t; k < kDepth; k += 8) {
        uint32_t a_part[2][2][4];  // upper and lower
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            const float4 v = load<float4>(&a[k + 4 * w][own.top]);
            split_tf32(v.x, a_part[0][0][2 * w], a_part[1][0][2 * w]);
            split_tf32(v.y, a_part[0][0][2 * w + 1], a_part[1][0][2 * w + 1]);
            split_tf32(v.z, a_part[0][1][2 * w], a_part[1][1][2 * w]);
            split_tf32(v.w, a_part[0][1][2 * w + 1], a_part[1][1][2 * w + 1]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t b_part[2][2][2];
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                const float2 v = load<float2>(&b[k + 4 * w][left + 16 * half]);
                split_tf32(v.x, b_part[0][0][w], b_part[1][0][w]);
                split_tf32(v.y, b_part[0][1][w], b_part[1][1][w]);
            }
            float product[2][2][4] = {};
#pragma unroll
            for (int part = 2; part >= 0; --part)  // the large products last
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        mma<Tf32>(product[m][h], a_part[part % 2][m], b_part[part / 2][h]);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    sum[4 * half + e][r] += product[r / 2][e % 2][r % 2 * 2 + e / 2];
        }
    }
}

__device__ __forceinline__ void add_product_by_fma(const Rows* a, const Rows* b, Sums& sum) {
    const Owner own;
    Sums product = {};
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
        const float4 row = load<float4>(&a[k][own.top]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 v = load<float4>(&b[k][own.left + 16 * half]);
            const float column[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float (&p)[4] = product[4 * half + e];
                p[0] = fmaf(row.x, column[e], p[0]);
                p[1] = fmaf(row.y, column[e], p[1]);
                p[2] = fmaf(row.z, column[e], p[2]);
                p[3] = fmaf(row.w, column[e], p[3]);
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[e][r] += product[e][r];
}

__device__ __forceinline__ void add_product(const Rows* a, const Rows* b, Sums& sum) {
    if constexpr (kTensorCores)
        add_product_by_mma(a, b, sum);
    else
        add_product_by_fma(a, b, sum);
}

// sum += a^T b of two tiles in shared memory; rows before `first` are zero in one of them.
__device__ __forceinline__ void multiply(const Rows* a, const Rows* b, int first, Sums& sum) {
#pragma unroll 1
    for (int k = first; k < kTile; k += kDepth) add_product(a + k, b + k, sum);
}

// 1 / sqrt(x) to the last bit or two.
__device__ __forceinline__ float reciprocal_root(float x) {
    const float y = rsqrtf(x);
    return fmaf(0.5f * y, fmaf(-x * y, y, 1.0f), y);
}

// S -> L^-1 in place, S = L L^T, by elimination of S beside an identity, whose first c columns
// stand, after c steps, where those of S were. Of what is left of S only the lower triangle is
// right, and needed. Four steps are summed from zero. Pivots before `first` are 1, their rows those
// of an identity. Returns which pivot is not positive, or kTile.
__device__ __forceinline__ int invert_factor(int first, Sums& s, float (&pivots)[2][kTile]) {
    const Owner own;
#pragma unroll 1
    for (int c4 = first / 4 * 4; c4 < kTile; c4 += 4) {
        const bool has_row = own.top == c4;
        Sums update = {};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int c = c4 + q;
            const auto below = [&](int r) { return r > q ? own.top >= c4 : own.top > c4; };
            // What all need for this step: row c up to the diagonal, then column c. Where they
            // were, row c of L^-1 and column c of the rest begin, from zero; above it is zero for
            // good.
            float* line = pivots[q % 2];  // the other one may still be read
            const auto take = [&](int e, int r) {
                const float value = s[e][r] - update[e][r];
                s[e][r] = update[e][r] = 0;
                return value;
            };
#pragma unroll
            for (int e = q; e < 8; e += 4)
                if (own.column(e) == c) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const float value = take(e, r);
                        if (below(r) || (has_row && r == q)) line[own.top + r] = value;
                    }
                }
            if (has_row) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const float value = take(e, q);
                    if (own.column(e) < c) line[own.column(e)] = value;
                }
            }
            __syncthreads();
            const float pivot = line[c];
            if (!(pivot > 0 && pivot < INFINITY)) return c;
            if (own.above || own.top / kWarpTile * kWarpTile + kWarpTile <= c) continue;

            const float scale = reciprocal_root(pivot);
            const float4 v = load<float4>(line + own.top);
            float row[4] = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
#pragma unroll
            for (int r = 0; r < 4; ++r)
                if (!below(r)) row[r] = has_row && r == q ? -1.0f : 0.0f;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 u = load<float4>(line + own.left + 16 * half);
                float column[4] = {u.x * scale, u.y * scale, u.z * scale, u.w * scale};
                if (own.left + 16 * half == c4) column[q] = scale;
#pragma unroll
                for (int e = 0; e < 4; ++e)
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        float& sum = update[4 * half + e][r];
                        sum = fmaf(row[r], column[e], sum);
                    }
            }
        }
#pragma unroll
        for (int e = 0; e < 8; ++e)
#pragma unroll
            for (int r = 0; r < 4; ++r) s[e][r] -= update[e][r];
    }
    return kTile;
}

}  // namespace npad::cuda
