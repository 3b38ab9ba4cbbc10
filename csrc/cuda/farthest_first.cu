// Greedy k-center, farthest point first (Gonzalez 1985): every centre is the point farthest from
// the centres before it; radius[k] is that distance after k + 1 centres. Ties: the lowest index.
// points (n, dim) float32, n < 2^32 - 1. No centre is chosen twice, also among duplicates.
//
// One persistent grid, no word to the host between centres. For each new centre:
//
//   1. its distance to every earlier centre: (centres so far) x dim floats;
//   2. each warp takes 32 points at a time. A point whose own centre is more than twice as far from
//      the new one as the point is keeps its distance by the triangle inequality, and only the
//      distance and the centre it knows are read: 8 bytes. Of the others the row is read, by 8
//      lanes each;
//   3. the largest distance and its index, one key per block, one atomicMax on it.
//
// A grid barrier follows 1 and 3. Rounding cannot let a point be skipped that would have moved, so
// the sequence is that of the plain loop, to the bit. Bytes per centre: at most n (4 dim + 8), with
// the rows far fewer where the points have clusters. Flops: 3 dim per row read. A distance is
// summed by each lane along its part of the row, then over the lanes.
#include "device_utils.cuh"

#include "kernels.h"

namespace npad::cuda {

namespace {

constexpr int kThreads = 512;  // few blocks, so that barriers and the atomic function cost little
constexpr int kBlocks = 2;     // on a processor, at least: all the warps that sm_75 has
constexpr int kLanes = 8;      // of one row: 8 x 16 bytes are one line
constexpr int kRows = kWarp / kLanes;  // that a warp reads at a time
constexpr int64_t kLaunch = 256;       // centres of one launch; the host may stop between two

// A point keeps its distance d if its centre is D away from the new one with D^2 > kFar d^2 +
// kTiny. Exactly it would be 4 and 0. Sums of up to 512 squares in a lane are right to 2^-14, which
// the first number covers; the second covers squares that are subnormal.
constexpr float kFar = 4.01f, kTiny = 1e-37f;

struct State {
    unsigned long long* farthest;  // [3]; step k fills k % 3
    float* squared;                // (n) distance to the nearest centre; negative: it is one
    uint32_t* owner;               // (n) which centre that is
    float* apart;                  // (n) squared distance of earlier centres to the new one

    static constexpr int64_t kKeys = 256;  // bytes, so that the rest stays aligned
    State(void* workspace, int64_t n)
        : farthest(static_cast<unsigned long long*>(workspace)),
          squared(reinterpret_cast<float*>(static_cast<char*>(workspace) + kKeys)),
          owner(reinterpret_cast<uint32_t*>(squared + n)),
          apart(squared + 2 * n) {}
    static int64_t bytes(int64_t n) { return kKeys + 3 * n * static_cast<int64_t>(sizeof(float)); }
};

__device__ __forceinline__ void add_square(float a, float b, float& sum) {
    const float d = a - b;
    sum = fmaf(d, d, sum);
}
__device__ __forceinline__ void add_square(float4 a, float4 b, float& sum) {
    add_square(a.x, b.x, sum);
    add_square(a.y, b.y, sum);
    add_square(a.z, b.z, sum);
    add_square(a.w, b.w, sum);
}

// Each kLanes lanes give the distance of their row; the whole warp takes part.
template <typename Vector>
__device__ __forceinline__ float squared_distance(const float* row, const float* centre, int dim) {
    constexpr int kWidth = sizeof(Vector) / sizeof(float);
    float sum = 0;
#pragma unroll 4
    for (int c = static_cast<int>(threadIdx.x) % kLanes * kWidth; c < dim; c += kLanes * kWidth)
        add_square(load<Vector>(row + c), load<Vector>(centre + c), sum);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
    return sum;
}

// Adds the centres begin .. end - 1. Vector: float4 where rows are aligned to it.
template <typename Vector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    farthest_first_kernel(const float* __restrict__ points, int64_t n, int dim, int64_t first,
                          int64_t begin, int64_t end, State state, int64_t* index, float* radius) {
    __shared__ int visits[kThreads / kWarp][kWarp];
    float* centre = dynamic_shared<float>();  // (dim)
    const int lane = threadIdx.x % kWarp, group = lane / kLanes;
    int* visit_list = visits[threadIdx.x / kWarp];
    const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp);
    const int64_t warp = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int64_t batches = (ceil_div(n, kWarp) - warp + warps - 1) / warps;  // of this warp
    const bool leader = blockIdx.x == 0 && threadIdx.x == 0;

    for (int64_t k = begin; k < end; ++k) {
        const int64_t chosen = k == 0 ? first : FarthestKey::index(state.farthest[(k + 2) % 3]);
        if (leader) {
            index[k] = chosen;
            state.farthest[(k + 1) % 3] = 0;  // all have read it before the latest barrier
        }
        for (int c = threadIdx.x; c < dim; c += kThreads) centre[c] = points[chosen * dim + c];
        __syncthreads();

        for (int64_t j = warp * kRows; j < k; j += warps * kRows) {
            const int64_t mine = j + group < k ? j + group : k - 1;
            const float d = squared_distance<Vector>(points + index[mine] * dim, centre, dim);
            if (j + group < k && lane % kLanes == 0) state.apart[mine] = d;
        }
        if (k > 0) grid_barrier();

        unsigned long long best = 0;
        for (int64_t b = 0; b < batches; ++b) {
            // There and back, so that a pass begins with what the last one left in the cache.
            const int64_t start = (warp + (k % 2 == 0 ? b : batches - 1 - b) * warps) * kWarp;
            const int64_t i = start + lane;
            float nearest = -1;
            bool visit = false;
            if (i < n) {
                nearest = k == 0 ? INFINITY : state.squared[i];
                if (i == chosen) state.squared[i] = nearest = -1;
                visit = nearest > 0 &&
                        (k == 0 || !(state.apart[state.owner[i]] > kFar * nearest + kTiny));
            }
            const unsigned mask = __ballot_sync(kAllLanes, visit);
            const int count = __popc(mask), turn = __popc(mask & ((1u << lane) - 1));
            if (visit) visit_list[turn] = lane;
            __syncwarp();
            float measured = INFINITY;
            for (int v = 0; v < count; v += kRows) {
                const int target = visit_list[v + group < count ? v + group : v];
                const float d =
                    squared_distance<Vector>(points + (start + target) * dim, centre, dim);
                const float answer = __shfl_sync(kAllLanes, d, (turn - v) * kLanes);
                if (turn >= v && turn < v + kRows) measured = answer;
            }
            __syncwarp();  // before the list is written again
            if (visit && (k == 0 || measured < nearest)) {
                state.squared[i] = nearest = measured;
                state.owner[i] = static_cast<uint32_t>(k);
            }
            if (nearest >= 0)
                best = Maximum()(best, FarthestKey::make(nearest, static_cast<uint32_t>(i)));
        }
        best = block_reduce<kThreads>(best, Maximum());
        if (threadIdx.x == 0) atomicMax(&state.farthest[k % 3], best);
        grid_barrier();
        if (leader) {
            const unsigned long long farthest = state.farthest[k % 3];
            radius[k] = farthest == 0 ? 0 : __fsqrt_rn(FarthestKey::distance(farthest));
        }
    }
}

}  // namespace

int64_t farthest_first_workspace(int64_t n, int64_t) { return State::bytes(n); }

int farthest_first(const float* points, int64_t n, int64_t dim, int64_t n_centroids, int64_t first,
                   void* workspace, int64_t* index, float* radius, Stream stream) {
    if (n_centroids == 0) return cudaSuccess;
    const State state(workspace, n);
    const bool aligned = dim % 4 == 0 && reinterpret_cast<uintptr_t>(points) % sizeof(float4) == 0;
    const auto kernel = aligned ? farthest_first_kernel<float4> : farthest_first_kernel<float>;
    const size_t shared = static_cast<size_t>(dim) * sizeof(float);
    int blocks = 0;
    cudaError_t error = resident_blocks(kernel, kThreads, shared, &blocks);
    const int64_t useful = ceil_div(n, kThreads);
    if (blocks > useful) blocks = static_cast<int>(useful);
    if (error == cudaSuccess) error = cudaMemsetAsync(state.farthest, 0, State::kKeys, stream);
    for (int64_t k = 0; k < n_centroids && error == cudaSuccess; k += kLaunch) {
        const int64_t end = k + kLaunch < n_centroids ? k + kLaunch : n_centroids;
        error = launch_cooperative(kernel, static_cast<unsigned>(blocks), kThreads, shared, stream,
                                   points, n, static_cast<int>(dim), first, k, end, state, index,
                                   radius);
    }
    return error;
}

}  // namespace npad::cuda
