// The product of two matrices' 128 rows each, less a mean: sum += (x - mean) (c - mean)^T.
//
// Each float32 is the sum of two bfloat16 numbers to within 2^-16; three products on tensor cores,
// lo hi + hi lo + hi hi, leave out lo lo, so that a sum is right to within 3 x 2^-16 | x | | c |
// and what the matrix instructions truncate. sm_75, whose tensor cores do not know bfloat16,
// computes in float32. Slices of 16 channels are added in ascending order, those of one by the
// hardware's own.
#pragma once

#include "device_utils.cuh"

namespace npad::cuda {

// 8 warps share a tile, 2 x 4, each 64 x 32: 64 sums a thread, which leaves room for two blocks on
// a processor, and 13 loads for 48 matrix instructions.
constexpr int kTile = 128, kWarpRows = 64, kWarpColumns = 32, kThreads = 256;
constexpr int kAcross = kTile / kWarpColumns;
// A slice of channels is the depth of one matrix instruction. Two rows of it fill the 32 banks, and
// 8 lanes, which load 16 bytes each at a time, read two rows. Three slices need one barrier for
// each and fit the 64 KiB of sm_75.
constexpr int kDepth = 16, kSlices = 3;
constexpr int kSliceFloats = (2 * kTile + 1) * kDepth;  // x, centroids, mean
constexpr size_t kProductShared = kSlices * kSliceFloats * sizeof(float);

// What a warp computes of the tile.
struct WarpTile {
    int lane, top, left;
    __device__ __forceinline__ WarpTile()
        : lane(threadIdx.x % kWarp),
          top(static_cast<int>(threadIdx.x) / kWarp / kAcross * kWarpRows),
          left(static_cast<int>(threadIdx.x) / kWarp % kAcross * kWarpColumns) {}
};

// Starts the copies of a slice of kTile rows of a matrix. Rows past the last repeat it, channels
// past the end are zero.
template <int kBytes>
__device__ __forceinline__ void copy_rows(const float* rows, int last, int channels, int channel,
                                          float* slice) {
    constexpr int kWidth = kBytes / sizeof(float), kPieces = kDepth / kWidth;
#pragma unroll 2
    for (int i = threadIdx.x; i < kTile * kPieces; i += kThreads) {
        const int r = i / kPieces, c = i % kPieces * kWidth;
        float* to = slice + r * kDepth + c;
        if (channel + c < channels) {
            cp_async<kBytes>(to, rows + min(r, last) * channels + channel + c);
        } else {
            for (int j = 0; j < kWidth; ++j) to[j] = 0;
        }
    }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTensorCores = false;
#else
constexpr bool kTensorCores = true;
#endif

using Sums = float[kWarpRows / 16][kWarpColumns / 8][4];  // as mma() holds them

__device__ __forceinline__ float4 centred(const float* p, float4 mean) {
    const float4 v = load<float4>(p);
    return {v.x - mean.x, v.y - mean.y, v.z - mean.z, v.w - mean.w};
}

// x, y = hi + lo to within 2^-16 |x|, 2^-16 |y|; as words of two.
__device__ __forceinline__ void split(float x, float y, uint32_t& hi, uint32_t& lo) {
    const auto word = [](__nv_bfloat162 v) { return *reinterpret_cast<const uint32_t*>(&v); };
    hi = word(__floats2bfloat162_rn(x, y));
    const float2 rounded = unpack<__nv_bfloat16>(hi);
    lo = word(__floats2bfloat162_rn(x - rounded.x, y - rounded.y));
}

// sum += x . c over a slice, of the warp's tile. Words t and t + 4 of the matrix instruction are
// channels 4 t .. 4 t + 3: any order will do that both sides share.
__device__ __forceinline__ void multiply(const float* slice, WarpTile w, Sums& sum) {
    const int g = w.lane / 4, t = w.lane % 4;
    const float* x = slice + (w.top + g) * kDepth + 4 * t;
    const float* c = slice + (kTile + w.left + g) * kDepth + 4 * t;
    const float4 mean = load<float4>(slice + 2 * kTile * kDepth + 4 * t);
    uint32_t c_hi[kWarpColumns / 8][2], c_lo[kWarpColumns / 8][2];
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) {
        const float4 v = centred(c + j * 8 * kDepth, mean);
        split(v.x, v.y, c_hi[j][0], c_lo[j][0]);
        split(v.z, v.w, c_hi[j][1], c_lo[j][1]);
    }
#pragma unroll
    for (int r = 0; r < kWarpRows / 16; ++r) {
        uint32_t x_hi[4], x_lo[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 v = centred(x + (r * 16 + i * 8) * kDepth, mean);
            split(v.x, v.y, x_hi[i], x_lo[i]);
            split(v.z, v.w, x_hi[i + 2], x_lo[i + 2]);
        }
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) mma<__nv_bfloat16>(sum[r][j], x_lo, c_hi[j]);
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) mma<__nv_bfloat16>(sum[r][j], x_hi, c_lo[j]);
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) mma<__nv_bfloat16>(sum[r][j], x_hi, c_hi[j]);
    }
}

// The same without matrix instructions: each thread computes the sums that it holds.
__device__ __forceinline__ void multiply_by_fma(const float* slice, WarpTile w, Sums& sum) {
    const int g = w.lane / 4, t = w.lane % 4;
    const float* x = slice + (w.top + g) * kDepth;
    const float* c = slice + (kTile + w.left + 2 * t) * kDepth;
#pragma unroll 1
    for (int d = 0; d < kDepth; d += 4) {
        const float4 mean = load<float4>(slice + 2 * kTile * kDepth + d);
        float4 row[kWarpRows / 8];
#pragma unroll
        for (int r = 0; r < kWarpRows / 8; ++r) row[r] = centred(x + r * 8 * kDepth + d, mean);
#pragma unroll
        for (int j = 0; j < kWarpColumns / 4; ++j) {
            const float4 v = centred(c + (j / 2 * 8 + j % 2) * kDepth + d, mean);
#pragma unroll
            for (int r = 0; r < kWarpRows / 8; ++r) {
                float& s = sum[r / 2][j / 2][r % 2 * 2 + j % 2];
                s = fmaf(row[r].x, v.x, s);
                s = fmaf(row[r].y, v.y, s);
                s = fmaf(row[r].z, v.z, s);
                s = fmaf(row[r].w, v.w, s);
            }
        }
    }
}

// A block of kThreads with kProductShared bytes; x and c hold rows 0 .. last, of which the last
// stands for those past it. kBytes: of one copy to shared memory, to which rows are aligned. The
// mean is zero from `channels` up to the end of the slice. At the end nobody needs shared memory.
template <int kBytes>
__device__ __forceinline__ void add_product(const float* x, int last_x, const float* c, int last_c,
                                            const float* mean, int channels, Sums& sum) {
    float* shared = dynamic_shared<float>();  // (kSlices, kSliceFloats)
    const auto start = [&](int s) {
        float* slice = shared + s % kSlices * kSliceFloats;
        const int channel = s * kDepth;
        if (channel < channels) {
            copy_rows<kBytes>(x, last_x, channels, channel, slice);
            copy_rows<kBytes>(c, last_c, channels, channel, slice + kTile * kDepth);
            if (threadIdx.x < kDepth)
                cp_async<4>(slice + 2 * kTile * kDepth + threadIdx.x, mean + channel + threadIdx.x);
        }
        cp_async_commit();
    };
    const WarpTile w;
    for (int s = 0; s < kSlices - 1; ++s) start(s);
    for (int s = 0; s * kDepth < channels; ++s) {
        cp_async_wait<kSlices - 2>();
        __syncthreads();
        start(s + kSlices - 1);
        const float* slice = shared + s % kSlices * kSliceFloats;
        if (kTensorCores)
            multiply(slice, w, sum);
        else
            multiply_by_fma(slice, w, sum);
    }
    cp_async_wait<0>();
    __syncthreads();
}

}  // namespace npad::cuda
