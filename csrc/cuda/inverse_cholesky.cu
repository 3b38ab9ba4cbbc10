// Covariances -> packed inverse Cholesky factors: A = L L^T, W = L^-1.
//
//   covariance (count, C, C) float32, symmetric -> packed (count, packed) float32, float16 or
//   bfloat16, and info (count): 0, or the order of the first leading minor that is not positive
//
// A block owns one matrix at a time, in tiles of 64 x 64. With D_i = L_ii^-1, down the columns,
// then along the rows:
//
//   S = A_ij - sum_{k < j} L_ik L_jk^T;   L_ij = S D_j^T;   D_j from S where i = j
//   W_ij = -D_i sum_{j <= k < i} L_ik W_kj;   W_ii = D_i, which is all of L_ii that anybody needs
//
// W_ij takes the place of L_ij, which no later tile reads. A product takes 16 rows of its factors
// at a time from the workspace, three slices deep; every tile lies there in the order in which it
// is read, L_ij and D_i column by column, W_ij row by row. Rows are padded at the top with those of
// an identity, where a row is shortest (as in packed.h).
//
// Fewest bytes: half of A read, the packed factor written. The workspace, half a matrix for each
// block that runs, is read C / 192 times by each factor of the sums in each of the two passes; one
// factor of the two comes from the second-level cache, at a small C both. Flops: 2 C^3 / 3, and
// 2 C^2 64 for what multiplies by D.
//
// Order. Sums go upwards, of 16 products (8 on tensor cores, where float32 is split in two and
// which truncate; 4 within a diagonal tile) that are themselves summed from zero: it errs less than
// one long sum. Nothing depends on the number of blocks. Limits: C < 2^15, 2^30 matrices.
#include "square_tile.cuh"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "packed.h"

namespace npad::cuda {

namespace {

constexpr int kSlices = 3;      // one barrier for each
constexpr int kInFlight = 640;  // blocks at a time, on any device

using Slice = float[kDepth][kStride];

struct Shared {
    union {
        Slice slices[kSlices][2];
        float tile[kTile][kStride];
    };
    float inverse[kTile][kStride];  // D of the column or row in hand, column by column
    float pivots[2][kTile];
};

struct Shape {
    PackedLayout layout;
    int channels, tiles;  // across a matrix
    int pad;              // rows above row 0

    explicit Shape(int64_t c)
        : layout(c),
          channels(static_cast<int>(c)),
          tiles(static_cast<int>(ceil_div(c, kTile))),
          pad(tiles * kTile - channels) {}

    __host__ __device__ int64_t workspace() const {  // floats for one matrix: a triangle, then D_i
        return int64_t{tiles} * (tiles + 3) / 2 * kTileFloats;
    }
};

// The workspace of a block.
class Tiles {
  public:
    __device__ Tiles(float* data, int tiles) : data_(data), tiles_(tiles) {}
    // Tiles (i, 0), (i, 1) ... (i, i).
    __device__ __forceinline__ float* row(int i) const {
        return data_ + i * (i + 1) / 2 * kTileFloats;
    }
    __device__ __forceinline__ float* tile(int i, int j) const { return row(i) + j * kTileFloats; }
    __device__ __forceinline__ float* inverse(int i) const { return row(tiles_) + i * kTileFloats; }

  private:
    float* data_;
    int tiles_;
};

// sum += a^T b over rows first .. end - 1 of the workspace: row k of a is at a + k * kTile, and
// those of b's slice from row k on are at b(k). No thread needs the slices before or afterwards.
template <typename Source>
__device__ __forceinline__ void accumulate(const float* a, Source b, int first, int end, bool idle,
                                           Shared& shared, Sums& sum) {
    const auto start = [&](int s) {
        const int k = first + s * kDepth;
        if (k < end) {
            copy_rows<kDepth>(a + k * kTile, shared.slices[s % kSlices][0]);
            copy_rows<kDepth>(b(k), shared.slices[s % kSlices][1]);
        }
        cp_async_commit();
    };
    for (int s = 0; s < kSlices - 1; ++s) start(s);
#pragma unroll 1
    for (int s = 0; first + s * kDepth < end; ++s) {
        cp_async_wait<kSlices - 2>();
        __syncthreads();
        start(s + kSlices - 1);
        const auto& slice = shared.slices[s % kSlices];
        if (!idle) add_product(slice[0], slice[1], sum);
    }
    cp_async_wait<0>();
    __syncthreads();
}

// A tile of the padded matrix, column by column; from the upper triangle, where a column's rows lie
// side by side.
__device__ __forceinline__ void load_tile(const Shape& shape, const float* __restrict__ matrix,
                                          int i, int j, Rows* tile) {
    const int r = static_cast<int>(threadIdx.x) % kTile, row = i * kTile + r - shape.pad;
#pragma unroll 8
    for (int c = static_cast<int>(threadIdx.x) / kTile; c < kTile; c += kThreads / kTile) {
        const int column = j * kTile + c - shape.pad;
        if (row >= 0 && column >= 0)
            cp_async<4>(&tile[c][r], matrix + int64_t{column} * shape.channels + row);
        else
            tile[c][r] = row == column ? 1.0f : 0.0f;
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
}

template <typename T>
__device__ __forceinline__ void store4(T* to, float x, float y, float z, float w) {
    if constexpr (std::is_same_v<T, float>) {
        *reinterpret_cast<float4*>(to) = make_float4(x, y, z, w);
    } else {
        const auto word = [](const auto& v) { return *reinterpret_cast<const uint32_t*>(&v); };
        uint2 words;
        if constexpr (std::is_same_v<T, __half>)
            words = make_uint2(word(__floats2half2_rn(x, y)), word(__floats2half2_rn(z, w)));
        else
            words =
                make_uint2(word(__floats2bfloat162_rn(x, y)), word(__floats2bfloat162_rn(z, w)));
        *reinterpret_cast<uint2*>(to) = words;
    }
}

// Tile (i, j) of W to its place in the packed matrix: half a column of a panel at a time.
template <typename T>
__device__ __forceinline__ void pack_tile(const Shape& shape, int i, int j, const Sums& w,
                                          T* __restrict__ packed) {
    constexpr int kRows = static_cast<int>(kPanel);
    const Owner own;
    const int skip = shape.pad - static_cast<int>(shape.layout.pad);  // whole panels
    const int row = i * kTile + own.top - skip;
    if (row < 0) return;
    T* panel = packed + shape.layout.offset(row / kRows) + row % kRows;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const int column = j * kTile + own.column(e) - shape.pad;
        if (column >= 0 && column < shape.layout.columns(row / kRows))
            store4(panel + column * kRows, w[e][0], w[e][1], w[e][2], w[e][3]);
    }
}

// L below the diagonal and D; 0, or the order of the first leading minor that is not positive.
template <typename T>
__device__ __forceinline__ int cholesky(const Shape& shape, const float* __restrict__ matrix,
                                        const Tiles& tiles, Shared& shared,
                                        T* __restrict__ packed) {
    const Owner own;
    const int padding = shape.pad / kDepth * kDepth;  // rows of slices that are zero
#pragma unroll 1
    for (int j = 0; j < shape.tiles; ++j) {
        const auto row_j = [&](int k) { return tiles.row(j) + k * kTile; };
#pragma unroll 1
        for (int i = j; i < shape.tiles; ++i) {
            Sums s = {};
            accumulate(tiles.row(i), row_j, padding, j * kTile, i == j && own.above, shared, s);
            load_tile(shape, matrix, i, j, shared.tile);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float4 a = load<float4>(&shared.tile[own.column(e)][own.top]);
                s[e][0] = a.x - s[e][0];
                s[e][1] = a.y - s[e][1];
                s[e][2] = a.z - s[e][2];
                s[e][3] = a.w - s[e][3];
            }
            if (i == j) {
                const int bad = invert_factor(j == 0 ? shape.pad : 0, s, shared.pivots);
                if (bad < kTile) return j * kTile + bad - shape.pad + 1;
                store_columns(shared.inverse[0], kStride, s);
                store_columns(tiles.inverse(j), kTile, s);
                store_rows(tiles.tile(j, j), kTile, s);
                pack_tile(shape, j, j, s, packed);
            } else {
                store_columns(shared.tile[0], kStride, s);
                __syncthreads();
                Sums l = {};
                multiply(shared.tile, shared.inverse, j == 0 ? padding : 0, l);
                store_columns(tiles.tile(i, j), kTile, l);
            }
            __syncthreads();
        }
    }
    return 0;
}

// W below the diagonal, in place of L.
template <typename T>
__device__ __forceinline__ void invert(const Shape& shape, const Tiles& tiles, Shared& shared,
                                       T* __restrict__ packed) {
    const int padding = shape.pad / kDepth * kDepth;
#pragma unroll 1
    for (int i = 1; i < shape.tiles; ++i) {
        copy_rows<kTile>(tiles.inverse(i), shared.inverse);  // the first slice waits for it, too
        cp_async_commit();
#pragma unroll 1
        for (int j = 0; j < i; ++j) {
            const auto column_j = [&](int k) {
                return tiles.tile(k / kTile, j) + k % kTile * kTile;
            };
            Sums s = {};
            accumulate(tiles.row(i), column_j, j == 0 ? padding : j * kTile, i * kTile, false,
                       shared, s);
            store_rows(shared.tile[0], kStride, s);
            __syncthreads();
            Sums w = {};
            multiply(shared.inverse, shared.tile, 0, w);
#pragma unroll
            for (int e = 0; e < 8; ++e)
#pragma unroll
                for (int r = 0; r < 4; ++r) w[e][r] = -w[e][r];
            store_rows(tiles.tile(i, j), kTile, w);
            pack_tile(shape, i, j, w, packed);
            __syncthreads();
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    inverse_cholesky_kernel(const float* __restrict__ covariance, int count, const Shape shape,
                            float* workspace, T* __restrict__ packed, int32_t* __restrict__ info) {
    __shared__ __align__(16) Shared shared;
    const Tiles tiles(workspace + blockIdx.x * shape.workspace(), shape.tiles);
    const int64_t square = int64_t{shape.channels} * shape.channels;
    const int size = static_cast<int>(shape.layout.size());
#pragma unroll 1
    for (int m = static_cast<int>(blockIdx.x); m < count; m += static_cast<int>(gridDim.x)) {
        T* out = packed + int64_t{m} * size;
        const int order = cholesky(shape, covariance + m * square, tiles, shared, out);
        if (threadIdx.x == 0) info[m] = order;
        if (order == 0) {
            invert(shape, tiles, shared, out);
        } else {
            __syncthreads();
#pragma unroll 1
            for (int i = 4 * static_cast<int>(threadIdx.x); i < size; i += 4 * kThreads)
                store4(out + i, NAN, NAN, NAN, NAN);
        }
    }
}

template <typename T>
cudaError_t run(const float* covariance, int64_t count, int64_t channels, void* workspace,
                void* packed, int32_t* info, cudaStream_t stream) {
    int resident = 0;
    const auto kernel = inverse_cholesky_kernel<T>;
    const cudaError_t error = resident_blocks(kernel, kThreads, 0, &resident);
    if (error != cudaSuccess) return error;
    const Shape shape(channels);
    const int n = static_cast<int>(count), blocks = std::min({n, resident, kInFlight});
    return launch(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, covariance, n, shape,
                  static_cast<float*>(workspace), static_cast<T*>(packed), info);
}

}  // namespace

int64_t inverse_cholesky_workspace(int64_t count, int64_t channels) {
    return std::min(count, int64_t{kInFlight}) * Shape(channels).workspace() *
           static_cast<int64_t>(sizeof(float));
}

int inverse_cholesky(const float* covariance, int64_t count, int64_t channels, void* workspace,
                     void* packed, DataType type, int32_t* info, Stream stream) {
    if (count == 0) return cudaSuccess;
    if (count > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
    switch (type) {
        case DataType::kFloat32:
            return run<float>(covariance, count, channels, workspace, packed, info, stream);
        case DataType::kFloat16:
            return run<__half>(covariance, count, channels, workspace, packed, info, stream);
        case DataType::kBFloat16:
            return run<__nv_bfloat16>(covariance, count, channels, workspace, packed, info, stream);
        case DataType::kInt8:
            break;  // made of float32, in npad/ops/packed.py
    }
    return cudaErrorInvalidValue;
}

}  // namespace npad::cuda
