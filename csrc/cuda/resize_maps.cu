// Each map (height, width) at a size of its own (heights[i], widths[i]), bilinearly:
//
//   out[y, x] = map at row (y + 1/2) height / heights[i] - 1/2, column likewise, clamped to the map
//
// all float32, the results one after another. A block owns kRows rows of 256 columns of one result,
// a thread one of the columns, in which it goes down and keeps the two values that it blends until
// it has passed the lower of them. Positions are exact integers, their fractions rounded once.
// Fewest bytes: the results written once; of the maps, what is under a block, from the cache. The
// sizes of kImages maps travel with the launch; more maps, more launches.
#include "device_utils.cuh"
#include "kernels.h"

namespace npad::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;    // over which a thread's column is found once
constexpr int kImages = 64;  // 1.5 KB of the 4 KB that a launch may carry

struct Images {
    int64_t height[kImages], width[kImages], offset[kImages];
};

// Where an output lies: `fraction` of the way from sample `first` to `second`, its neighbour if
// there is one.
struct Position {
    int64_t first, second;
    float fraction;
};

// ((2 i + 1) size / outputs - 1) / 2, clamped.
__device__ __forceinline__ Position locate(int64_t i, int64_t outputs, int64_t size) {
    const int64_t numerator = max((2 * i + 1) * size - outputs, int64_t{0});
    const int64_t denominator = 2 * outputs, first = numerator / denominator;
    const float remainder = static_cast<float>(numerator - first * denominator);
    return {first, min(first + 1, size - 1), remainder / static_cast<float>(denominator)};
}

__device__ __forceinline__ float blend(float from, float to, float fraction) {
    return fmaf(fraction, to - from, from);
}

__global__ void __launch_bounds__(kThreads)
    resize_kernel(const float* __restrict__ maps, int64_t height, int64_t width,
                  const __grid_constant__ Images images, float* __restrict__ resized) {
    const int64_t rows = images.height[blockIdx.y], columns = images.width[blockIdx.y];
    const int64_t across = ceil_div(columns, kThreads);
    const int64_t top = blockIdx.x / across * kRows;
    const int64_t column = blockIdx.x % across * kThreads + threadIdx.x;
    if (top >= rows) return;  // as many blocks as the largest result needs

    __shared__ Position row[kRows];
    if (threadIdx.x < kRows) row[threadIdx.x] = locate(top + threadIdx.x, rows, height);
    __syncthreads();
    if (column >= columns) return;

    const float* map = maps + blockIdx.y * height * width;
    float* out = resized + images.offset[blockIdx.y] + top * columns + column;
    const auto [left, right, fraction] = locate(column, columns, width);
    const auto value = [&](int64_t y) {
        return blend(map[y * width + left], map[y * width + right], fraction);
    };
    int64_t above = -1;
    float upper = 0, lower = 0;
    for (int i = 0; i < kRows && top + i < rows; ++i, out += columns) {
        if (row[i].first != above) {  // the same in all threads
            above = row[i].first;
            upper = value(above);
            lower = value(row[i].second);
        }
        *out = blend(upper, lower, row[i].fraction);
    }
}

}  // namespace

int resize_maps(const float* maps, int64_t n, int64_t height, int64_t width, const int64_t* heights,
                const int64_t* widths, float* resized, Stream stream) {
    cudaError_t error = cudaSuccess;
    for (int64_t start = 0; start < n && error == cudaSuccess; start += kImages) {
        const int64_t count = n - start < kImages ? n - start : kImages;
        Images images = {};
        int64_t pixels = 0, blocks = 0;
        for (int64_t i = 0; i < count; ++i) {
            images.height[i] = heights[start + i];
            images.width[i] = widths[start + i];
            images.offset[i] = pixels;
            pixels += images.height[i] * images.width[i];
            const int64_t own =
                ceil_div(images.height[i], kRows) * ceil_div(images.width[i], kThreads);
            blocks = own > blocks ? own : blocks;
        }
        if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
        const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
        error = launch(resize_kernel, grid, kThreads, 0, stream, maps + start * height * width,
                       height, width, images, resized);
        resized += pixels;
    }
    return error;
}

}  // namespace npad::cuda
