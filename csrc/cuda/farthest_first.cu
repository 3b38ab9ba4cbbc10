// Greedy k-center, farthest point first (Gonzalez 1985): every centre is the point farthest from
// the centres before it; radius[k] is that distance after k + 1 centres. Ties: the lowest index.
// points (n, dim) float32, n < 2^32 - 1. No centre is chosen twice, also among duplicates.
//
// One persistent grid, no word to the host between centres. For each new centre each warp takes 32
// points at a time, a lane for each, which
//
//   1. sums the differences of heads (head.cuh) until they rule the point out: as a rule 64 bytes
//      and the 4 of the distance that it knows;
//   2. measures those that are left, by all lanes row after row: 4 dim bytes;
//   3. keeps the largest distance and its index, one key per block, one atomicMax on it.
//
// A grid barrier follows. Rounding cannot let a point be ruled out that would have moved, so the
// sequence is that of the plain loop, to the bit. Bytes per centre: n (4 + 64 to 256 + 4 dim of
// those left). Flops: 3 for each number read. A distance is summed by each lane along its part of
// the row, then over the lanes. Without axes, 8 lanes share a row and every point is measured.
#include "head.cuh"

#include "kernels.h"

namespace npad::cuda {

namespace {

constexpr int kThreads = 512;  // few blocks, so that barriers and the atomic function cost little
constexpr int kBlocks = 2;     // on a processor, at least: all the warps that sm_75 has
constexpr int kPiece = 4;      // groups of a head that are on their way at a time
constexpr int64_t kLaunch = 256;  // centres of one launch; the host may stop between two
constexpr int64_t kShort = 96;    // dimensions; up to these a row is hardly longer than a head

struct State {
    unsigned long long* farthest;  // [3]; step k fills k % 3
    unsigned* largest;             // of the squared norms of heads, its bits
    float4* heads;
    float* squared;  // (n) distance to the nearest centre; negative: it is one

    static constexpr int64_t kKeys = 256;  // bytes, so that the rest stays aligned
    State(void* workspace, int64_t head_floats)
        : farthest(static_cast<unsigned long long*>(workspace)),
          largest(reinterpret_cast<unsigned*>(farthest + 3)),
          heads(reinterpret_cast<float4*>(static_cast<char*>(workspace) + kKeys)),
          squared(reinterpret_cast<float*>(heads) + head_floats) {}
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
template <typename Vector, int kLanes>
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

using Piece = float4[kPiece];

__device__ __forceinline__ void load_piece(const float4* head, Piece& piece) {
#pragma unroll
    for (int p = 0; p < kPiece; ++p) piece[p] = head[p * kWarp];
}

// Whether the bound by the head, whose first piece is given, leaves the lane's point. All lanes.
__device__ __forceinline__ bool may_be_nearer(Piece& piece, const float4* head,
                                              const float4* centre, bool left, float limit) {
    float bound = 0;
#pragma unroll 1
    for (int g = 0;;) {
        if (left) {
#pragma unroll
            for (int p = 0; p < kPiece; ++p) add_square(piece[p], centre[g + p], bound);
            left = !(bound > limit);
        }
        g += kPiece;
        if (g == kGroups || !__any_sync(kAllLanes, left)) return left;
        if (left) load_piece(head + g * kWarp, piece);
    }
}

// Adds the centres begin .. end - 1. Vector: float4 where rows are aligned to it.
template <typename Vector, bool kHeads>
__global__ void __launch_bounds__(kThreads, kBlocks)
    farthest_first_kernel(const float* __restrict__ points, int64_t n, int dim, int64_t first,
                          int64_t begin, int64_t end, State state, int64_t* index, float* radius) {
    constexpr int kLanes = kHeads ? kWarp : 8;  // of one row: few are left, or all, and short
    constexpr int kRows = kWarp / kLanes;       // that a warp reads at a time
    __shared__ float4 centre_head[kGroups];
    float* centre = dynamic_shared<float>();  // (dim)
    const int lane = threadIdx.x % kWarp, group = lane / kLanes;
    const int warps = static_cast<int>(gridDim.x) * (kThreads / kWarp);
    const int warp = static_cast<int>(blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp);
    const int all = static_cast<int>(ceil_div(n, kWarp));
    const int batches = (all - warp + warps - 1) / warps;  // of this warp
    const bool leader = blockIdx.x == 0 && threadIdx.x == 0;
    const Heads heads{state.heads};
    const float tolerance = kHeads ? head_tolerance(__uint_as_float(*state.largest), dim) : 0;

    for (int64_t k = begin; k < end; ++k) {
        const int64_t chosen = k == 0 ? first : FarthestKey::index(state.farthest[(k + 2) % 3]);
        if (leader) {
            index[k] = chosen;
            state.farthest[(k + 1) % 3] = 0;  // all have read it before the latest barrier
        }
        for (int c = threadIdx.x; c < dim; c += kThreads) centre[c] = points[chosen * dim + c];
        if (kHeads && threadIdx.x < kGroups)
            centre_head[threadIdx.x] = heads.group(chosen, static_cast<int>(threadIdx.x));
        __syncthreads();

        unsigned long long best = 0;
        for (int b = 0; b < batches; ++b) {
            // There and back, so that a pass begins with what the last one left in the cache.
            const int batch = warp + (k % 2 == 0 ? b : batches - 1 - b) * warps;
            const int64_t start = int64_t{batch} * kWarp;
            const int64_t i = start + lane;
            Piece piece;
            if (kHeads) load_piece(heads.of(i), piece);  // on its way beside the distance
            float nearest = -1;
            if (i < n) {
                nearest = k == 0 ? INFINITY : state.squared[i];
                if (i == chosen) state.squared[i] = nearest = -1;
            }
            bool visit = nearest > 0;
            if (kHeads)
                visit = may_be_nearer(piece, heads.of(i), centre_head, visit,
                                      fmaf(nearest, 1 + kSlack, tolerance));
            unsigned left = __ballot_sync(kAllLanes, visit);
            const int turn = __popc(left & ((1u << lane) - 1));
            float measured = INFINITY;
            for (int v = 0; left != 0; v += kRows) {
                int target = 0;  // each group of lanes takes the next one, if there is one
#pragma unroll
                for (int r = 0; r < kRows && left != 0; ++r) {
                    if (group >= r) target = __ffs(static_cast<int>(left)) - 1;
                    left &= left - 1;
                }
                const float d =
                    squared_distance<Vector, kLanes>(points + (start + target) * dim, centre, dim);
                const float answer = __shfl_sync(kAllLanes, d, (turn - v) * kLanes);
                if (turn >= v && turn < v + kRows) measured = answer;
            }
            if (visit && (k == 0 || measured < nearest)) state.squared[i] = nearest = measured;
            if (!(nearest < 0))
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

int64_t head_floats(int64_t n, bool heads) { return heads ? Heads::floats(n) : 0; }

}  // namespace

int64_t farthest_first_axes(int64_t dim) { return dim > kShort ? kHead : 0; }

int64_t farthest_first_workspace(int64_t n, int64_t n_axes) {
    return State::kKeys + (head_floats(n, n_axes > 0) + n) * static_cast<int64_t>(sizeof(float));
}

int farthest_first(const float* points, int64_t n, int64_t dim, int64_t n_centroids, int64_t first,
                   const float* mean, const float* axes, void* workspace, int64_t* index,
                   float* radius, Stream stream) {
    if (n_centroids == 0) return cudaSuccess;
    const State state(workspace, head_floats(n, axes != nullptr));
    const bool aligned = dim % 4 == 0 && reinterpret_cast<uintptr_t>(points) % sizeof(float4) == 0;
    const auto kernel =
        axes == nullptr
            ? (aligned ? farthest_first_kernel<float4, false> : farthest_first_kernel<float, false>)
            : (aligned ? farthest_first_kernel<float4, true> : farthest_first_kernel<float, true>);
    const size_t shared = static_cast<size_t>(dim) * sizeof(float);
    int blocks = 0;
    cudaError_t error = resident_blocks(kernel, kThreads, shared, &blocks);
    const int64_t useful = ceil_div(n, kThreads);
    if (blocks > useful) blocks = static_cast<int>(useful);
    if (error == cudaSuccess) error = cudaMemsetAsync(workspace, 0, State::kKeys, stream);
    if (error == cudaSuccess && axes != nullptr)
        error = launch(head_kernel, static_cast<unsigned>(ceil_div(n, kHeadPoints)), kHeadThreads,
                       0, stream, points, n, static_cast<int>(dim), mean, axes, state.heads,
                       state.largest);
    for (int64_t k = 0; k < n_centroids && error == cudaSuccess; k += kLaunch) {
        const int64_t end = k + kLaunch < n_centroids ? k + kLaunch : n_centroids;
        error = launch_cooperative(kernel, static_cast<unsigned>(blocks), kThreads, shared, stream,
                                   points, n, static_cast<int>(dim), first, k, end, state, index,
                                   radius);
    }
    return error;
}

}  // namespace npad::cuda
