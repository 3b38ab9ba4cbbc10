// The product of two matrices' 128 rows each, in half precision with float32 sums: sum += a b^T.
//
// Tiles of 128 rows lie as matrix instructions take them, slices of kDepth channels one after
// another. Of a slice a lane's 16 bytes are its registers (see mma() for words and lanes)
//
//   of a   (16 rows, half of the depth, lane): of one instruction, for 16 rows and channels
//   of b   (8 rows, lane): of two, for 8 rows and all channels
//
// so that nothing is moved between loads and instructions, and 8 lanes that load at a time read all
// 32 banks. Any order of the channels will do that both sides share: a lane has 8 neighbours, a
// piece, which of b are 16 neighbouring bytes of a row. Slices are added in ascending order, those
// of one by the hardware's own.
#pragma once

#include "device_utils.cuh"

namespace npad::cuda {

// 4 warps share a tile, 2 x 2, each 64 x 64: 128 sums a thread, which leaves room for two blocks on
// a processor, and 16 loads of 16 bytes for 64 matrix instructions. Shared memory moves 48 KiB for
// a slice, in 3/4 of the time of its products on sm_80; tiles of 64 x 32 would have it move 64.
constexpr int kTile = 128, kWarpRows = 64, kWarpColumns = 64, kThreads = 128;
constexpr int kAcross = kTile / kWarpColumns;
// Channels of a slice. Three slices of both sides need one barrier for each, and fit twice into
// 100 KiB.
constexpr int kDepth = 32, kSlices = 3;
constexpr int kSliceHalves = kTile * kDepth;
constexpr size_t kProductShared = kSlices * 2 * kSliceHalves * sizeof(__half);
constexpr int kPiece = 16 / sizeof(__half);  // halves of one copy or load
constexpr int kPieces = kDepth / kPiece;

// ---- Memory ------------------------------------------------------------------------------------

enum class Operand { kA, kB };

// Stores a piece of row r of a tile: channels kPiece p .. kPiece p + 7.
template <Operand kOperand>
__device__ __forceinline__ void store_piece(__half* tile, int r, int64_t p, uint4 words) {
    __half* slice = tile + p / kPieces * kSliceHalves;
    const int t = static_cast<int>(p % kPieces);
    if constexpr (kOperand == Operand::kB) {
        *reinterpret_cast<uint4*>(slice + r * kDepth + t * kPiece) = words;
    } else {
        const int lane = r % 8 * 4 + t, lower = r / 8 % 2;
        auto* to = reinterpret_cast<uint32_t*>(slice) + (r / 16 * 2 * kWarp + lane) * 4 + lower;
        to[0] = words.x;
        to[2] = words.y;
        to[4 * kWarp] = words.z;
        to[4 * kWarp + 2] = words.w;
    }
}

// ---- Product -----------------------------------------------------------------------------------

// What a warp computes of the tile.
struct WarpTile {
    int lane, top, left;
    __device__ __forceinline__ WarpTile()
        : lane(threadIdx.x % kWarp),
          top(static_cast<int>(threadIdx.x) / kWarp / kAcross * kWarpRows),
          left(static_cast<int>(threadIdx.x) / kWarp % kAcross * kWarpColumns) {}
};

using Sums = float[kWarpRows / 16][kWarpColumns / 8][4];  // as mma() holds them

// Slices on their way to shared memory, (kSlices, 2, kSliceHalves), those of a first.
class Slices {
  public:
    __device__ __forceinline__ Slices(const __half* a, const __half* b, int count)
        : a_(a + threadIdx.x * kPiece), b_(b + threadIdx.x * kPiece), left_(count) {
        for (int s = 0; s < kSlices - 1; ++s) start();
    }

    // The next slice, until the call after the next; all threads have read those before.
    __device__ __forceinline__ const __half* next() {
        cp_async_wait<kSlices - 2>();
        __syncthreads();
        start();
        const __half* slice = dynamic_shared<__half>() + reading_;
        reading_ = after(reading_);
        return slice;
    }

  private:
    static constexpr int kBoth = 2 * kSliceHalves;
    __device__ __forceinline__ static int after(int slot) {
        return slot == (kSlices - 1) * kBoth ? 0 : slot + kBoth;
    }

    __device__ __forceinline__ void start() {
        if (left_ > 0) {
            __half* to = dynamic_shared<__half>() + writing_ + threadIdx.x * kPiece;
#pragma unroll
            for (int i = 0; i < kSliceHalves; i += kThreads * kPiece) {
                cp_async(to + i, a_ + i);
                cp_async(to + kSliceHalves + i, b_ + i);
            }
            a_ += kSliceHalves;
            b_ += kSliceHalves;
            writing_ = after(writing_);
            --left_;
        }
        cp_async_commit();
    }

    const __half *a_, *b_;  // of this thread's first piece of the next slice
    int left_, reading_ = 0, writing_ = 0;
};

// sum += a b^T over a slice, of the warp's tile.
__device__ __forceinline__ void multiply(const __half* slice, WarpTile w, Sums& sum) {
    const __half* a = slice + w.top * kDepth + w.lane * kPiece;
    const __half* b = slice + kSliceHalves + w.left * kDepth + w.lane * kPiece;
    uint4 columns[kWarpColumns / 8];
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8; ++j) columns[j] = load<uint4>(b + j * kWarp * kPiece);
#pragma unroll
    for (int r = 0; r < kWarpRows / 16; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 v = load<uint4>(a + (2 * r + half) * kWarp * kPiece);
            const uint32_t rows[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < kWarpColumns / 8; ++j) {
                const uint4 c = columns[j];
                const uint32_t words[2] = {half ? c.z : c.x, half ? c.w : c.y};
                mma<__half>(sum[r][j], rows, words);
            }
        }
}

// A block of kThreads with kProductShared bytes; a and b are a tile each, aligned to 16 bytes. At
// the end nobody needs shared memory.
__device__ __forceinline__ void add_product(const __half* a, const __half* b, int count,
                                            Sums& sum) {
    const WarpTile w;
    Slices slices(a, b, count);
    for (int s = 0; s < count; ++s) multiply(slices.next(), w, sum);
    cp_async_wait<0>();
    __syncthreads();
}

}  // namespace npad::cuda
