// Rows less a mean, rounded to float16, as tile_product.cuh takes them; and the memory of a
// centroid index.
//
// Each row is scaled by a power of two, which brings its norm below 1, and rounded once. Rows up to
// the end of the last tile are zero.
#pragma once

#include "tile_product.cuh"

namespace npad::cuda {

// What nearest_centroid needs to know of a centroid besides.
struct Centroid {
    float half_norm, scale;  // half the squared norm, infinite past the last; 2^e
};

// Where everything lies in the index of k centroids. All zeros mean that nothing is known: every
// centroid may then be the nearest, and is measured.
struct Index {
    __half* rounded;      // (groups) tiles, operand a
    Centroid* centroids;  // (groups, kTile)
    float* mean;          // (channels)
    unsigned* largest;    // (groups) bits of the largest squared norm
    int64_t groups, slices, bytes;

    Index(void* memory, int64_t k, int64_t channels)
        : groups(ceil_div(k, kTile)), slices(ceil_div(channels, kDepth)) {
        rounded = static_cast<__half*>(memory);
        centroids = reinterpret_cast<Centroid*>(rounded + groups * slices * kSliceHalves);
        mean = reinterpret_cast<float*>(centroids + groups * kTile);  // aligned to 16 bytes
        largest = reinterpret_cast<unsigned*>(mean + channels);
        const int64_t half = sizeof(__half), word = sizeof(float), centroid = sizeof(Centroid);
        bytes = groups * (half * slices * kSliceHalves + centroid * kTile + word) + word * channels;
    }
};

// Whether load_four may load a vector of a matrix with so many channels.
inline bool vectors_fit(const float* rows, int64_t channels) {
    return channels % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(float4) == 0;
}

// Channels c .. c + 3 of a row, c a multiple of 4 below `channels`; zero past the last.
template <bool kVectors>
__device__ __forceinline__ float4 load_four(const float* row, int64_t c, int64_t channels) {
    if constexpr (kVectors) {
        return load<float4>(row + c);
    } else {
        const auto at = [&](int64_t i) { return i < channels ? row[i] : 0.0f; };
        return make_float4(row[c], at(c + 1), at(c + 2), at(c + 3));
    }
}

__device__ __forceinline__ float4 subtract(float4 a, float4 b) {
    return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
}

__device__ __forceinline__ float add_square(float4 a, float sum) {
    return fmaf(a.w, a.w, fmaf(a.z, a.z, fmaf(a.y, a.y, fmaf(a.x, a.x, sum))));
}

__device__ __forceinline__ uint32_t round_pair(float x, float y) {
    const __half2 pair = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
}

struct Rounded {
    float scale, square;  // 2^e, and the squared norm
};

// Rounds row r of rows (count, channels), by a warp.
template <Operand kOperand, bool kVectors>
__device__ __forceinline__ Rounded round_row(const float* __restrict__ rows, int64_t r,
                                             int64_t count, int64_t channels,
                                             const float* __restrict__ mean, int64_t slices,
                                             __half* __restrict__ rounded) {
    const int lane = threadIdx.x % kWarp;
    const float* row = rows + r * channels;
    const int64_t stop = r < count ? channels : 0;
    const auto at = [&](int64_t c) {
        return subtract(load_four<kVectors>(row, c, channels),
                        load_four<kVectors>(mean, c, channels));
    };
    float square = 0;
#pragma unroll kVectors ? 4 : 1
    for (int64_t c = 4 * lane; c < stop; c += 4 * kWarp) square = add_square(at(c), square);
    square = warp_reduce(square, Sum());
    const float norm = __fsqrt_rn(square);  // 0, or from 2^-75 to 2^64, or not finite
    const bool regular = norm > 0 && norm < INFINITY;
    const unsigned e = regular ? (__float_as_uint(norm) >> 23) + 1 : 127;  // 127 stands for 2^0
    const float down = __uint_as_float((254 - e) << 23);
    const auto pairs = [&](int64_t c) {
        const float4 x = c < stop ? at(c) : make_float4(0, 0, 0, 0);
        return make_uint2(round_pair(x.x * down, x.y * down), round_pair(x.z * down, x.w * down));
    };
    __half* tile = rounded + r / kTile * slices * kSliceHalves;
    for (int64_t p = lane; p < slices * kPieces; p += kWarp) {
        const uint2 left = pairs(p * kPiece), right = pairs(p * kPiece + 4);
        store_piece<kOperand>(tile, static_cast<int>(r % kTile), p,
                              make_uint4(left.x, left.y, right.x, right.y));
    }
    return {__uint_as_float(e << 23), square};
}

// For kernels with a warp for each row.
inline unsigned warp_blocks(int64_t rows) {
    return static_cast<unsigned>(ceil_div(rows, kThreads / kWarp));
}
__device__ __forceinline__ int64_t row_of_warp() {
    return (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
}

}  // namespace npad::cuda
