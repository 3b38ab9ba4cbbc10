// What nearest_centroid needs of the centroids (k, channels) alone: their mean, and of each, less
// the mean, half its squared norm and itself in float16. See rounded_rows.cuh for where it lies.
//
// The mean is that of up to 64 centroids: any origin among them keeps norms small. Bytes: the
// centroids twice, the second time from a cache, and half of them written. Sums over channels: by
// each lane over four neighbours of every 128, then over lanes.
#include "rounded_rows.cuh"

#include "kernels.h"

namespace npad::cuda {

namespace {

constexpr int kMeanRows = 64;  // centroids whose mean is the origin

__global__ void __launch_bounds__(kThreads)
    mean_kernel(const float* __restrict__ centroids, int64_t k, int64_t channels,
                float* __restrict__ mean) {
    const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (c >= channels) return;
    const int64_t sample = k < kMeanRows ? k : kMeanRows;
    float sum = 0;
    for (int64_t i = 0; i < sample; ++i)
        sum += centroids[i * k / sample * channels + c] / static_cast<float>(sample);
    mean[c] = sum;
}

// A warp for each centroid.
template <bool kVectors>
__global__ void __launch_bounds__(kThreads)
    index_kernel(const float* __restrict__ centroids, int64_t k, int64_t channels,
                 const Index index) {
    const int64_t j = row_of_warp();
    const Rounded row = round_row<Operand::kA, kVectors>(centroids, j, k, channels, index.mean,
                                                         index.slices, index.rounded);
    if (threadIdx.x % kWarp != 0) return;
    index.centroids[j] = {j < k ? row.square / 2 : INFINITY, row.scale};
    atomicMax(index.largest + j / kTile,
              __float_as_uint(fabsf(row.square)));  // as integers, and NaN above infinity
}

}  // namespace

int64_t centroid_index_bytes(int64_t k, int64_t channels) {
    return Index(nullptr, k, channels).bytes;
}

int centroid_index(const float* centroids, int64_t k, int64_t channels, void* memory,
                   Stream stream) {
    const Index index(memory, k, channels);
    cudaError_t error = launch(mean_kernel, static_cast<unsigned>(ceil_div(channels, kThreads)),
                               kThreads, 0, stream, centroids, k, channels, index.mean);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(index.largest, 0,
                                static_cast<size_t>(index.groups) * sizeof *index.largest, stream);
    if (error == cudaSuccess)
        error = launch(vectors_fit(centroids, channels) ? index_kernel<true> : index_kernel<false>,
                       warp_blocks(index.groups * kTile), kThreads, 0, stream, centroids, k,
                       channels, index);
    return error;
}

}  // namespace npad::cuda
