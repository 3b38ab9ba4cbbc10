// The product of two matrices' 128 rows each, in half precision with float32 sums: sum += x c^T.
//
// Rows are `stride` halves apart, a multiple of kDepth, and zero from their last channel on. Slices
// of kDepth channels are added in ascending order, those of one by the hardware's own.
#pragma once

#include "device_utils.cuh"

namespace npad::cuda {

// 8 warps share a tile, 2 x 4, each 64 x 32: 64 sums a thread, which leaves room for two blocks on
// a processor, and 12 loads of 16 bytes for 32 matrix instructions.
constexpr int kTile = 128, kWarpRows = 64, kWarpColumns = 32, kThreads = 256;
constexpr int kAcross = kTile / kWarpColumns;
// Channels of a slice. Two rows of it fill the 32 banks, and the 8 lanes that load 16 bytes each at
// a time read two rows. Three slices need one barrier for each, and fit twice into 100 KiB.
constexpr int kDepth = 32, kSlices = 3;
constexpr int kSliceHalves = 2 * kTile * kDepth;  // x, c
constexpr size_t kProductShared = kSlices * kSliceHalves * sizeof(__half);
constexpr int kPiece = 16 / sizeof(__half);  // halves of one copy or load

// What a warp computes of the tile.
struct WarpTile {
    int lane, top, left;
    __device__ __forceinline__ WarpTile()
        : lane(threadIdx.x % kWarp),
          top(static_cast<int>(threadIdx.x) / kWarp / kAcross * kWarpRows),
          left(static_cast<int>(threadIdx.x) / kWarp % kAcross * kWarpColumns) {}
};

using Sums = float[kWarpRows / 16][kWarpColumns / 8][4];  // as mma() holds them

// Starts the copies of a slice of kTile rows, of which the last stands for those past it.
__device__ __forceinline__ void copy_rows(const __half* rows, int last, int64_t stride,
                                          __half* slice) {
    constexpr int kPieces = kDepth / kPiece;
#pragma unroll
    for (int i = 0; i < kTile * kPieces / kThreads; ++i) {
        const int p = static_cast<int>(threadIdx.x) + i * kThreads;
        const int r = p / kPieces, c = p % kPieces * kPiece;
        cp_async(slice + r * kDepth + c, rows + min(r, last) * stride + c);
    }
}

// sum += x . c over a slice, of the warp's tile. A lane's 16 bytes are its words of two matrix
// instructions: any order of the channels will do that both sides share.
__device__ __forceinline__ void multiply(const __half* slice, WarpTile w, Sums& sum) {
    const int g = w.lane / 4, t = w.lane % 4;
    const __half* x = slice + (w.top + g) * kDepth + kPiece * t;
    const __half* c = slice + (kTile + w.left + g) * kDepth + kPiece * t;
    uint4 columns[kWarpColumns / 8];
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) columns[j] = load<uint4>(c + j * 8 * kDepth);
#pragma unroll
    for (int r = 0; r < kWarpRows / 16; ++r) {
        const uint4 upper = load<uint4>(x + r * 16 * kDepth);
        const uint4 lower = load<uint4>(x + (r * 16 + 8) * kDepth);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) {
            const uint32_t words[2] = {columns[j].x, columns[j].y};
            mma<__half>(sum[r][j], first, words);
        }
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) {
            const uint32_t words[2] = {columns[j].z, columns[j].w};
            mma<__half>(sum[r][j], second, words);
        }
    }
}

// A block of kThreads with kProductShared bytes; x and c, aligned to 16 bytes, hold rows 0 .. last.
// At the end nobody needs shared memory.
__device__ __forceinline__ void add_product(const __half* x, int last_x, const __half* c,
                                            int last_c, int64_t stride, Sums& sum) {
    __half* shared = dynamic_shared<__half>();  // (kSlices, kSliceHalves)
    const int slices = static_cast<int>(stride / kDepth);
    const auto start = [&](int s) {
        __half* slice = shared + s % kSlices * kSliceHalves;
        if (s < slices) {
            copy_rows(x + s * kDepth, last_x, stride, slice);
            copy_rows(c + s * kDepth, last_c, stride, slice + kTile * kDepth);
        }
        cp_async_commit();
    };
    const WarpTile w;
    for (int s = 0; s < kSlices - 1; ++s) start(s);
    for (int s = 0; s < slices; ++s) {
        cp_async_wait<kSlices - 2>();
        __syncthreads();
        start(s + kSlices - 1);
        multiply(shared + s % kSlices * kSliceHalves, w, sum);
    }
    cp_async_wait<0>();
    __syncthreads();
}

}  // namespace npad::cuda
