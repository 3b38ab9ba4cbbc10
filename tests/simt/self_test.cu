// Kernels that test the emulator and device_utils.cuh; tests/test_simt.py runs them. They are CUDA
// like any other: nvcc compiles this file too, with -D'SIMT_EXPORT(launcher)='.
#include "device_utils.cuh"

namespace npad::cuda {

namespace {

constexpr int kTile = 32, kRows = 8;

__global__ void __launch_bounds__(kTile* kRows)
    transpose_kernel(const float* __restrict__ x, int64_t height, int64_t width,
                     float* __restrict__ y) {
    __shared__ float tile[kTile][kTile + 1];
    const int64_t left = int64_t{blockIdx.x} * kTile, top = int64_t{blockIdx.y} * kTile;
    for (int r = threadIdx.y; r < kTile; r += kRows)
        if (top + r < height && left + threadIdx.x < width)
            tile[r][threadIdx.x] = x[(top + r) * width + left + threadIdx.x];
    __syncthreads();
    for (int r = threadIdx.y; r < kTile; r += kRows)
        if (left + r < width && top + threadIdx.x < height)
            y[(left + r) * height + top + threadIdx.x] = tile[threadIdx.x][r];
}

// One block per row; result (rows, 4): sum, sum of squares, minimum, maximum.
constexpr int kReduceThreads = 96;

__global__ void __launch_bounds__(kReduceThreads)
    reduce_rows_kernel(const float* __restrict__ x, int64_t columns, float* __restrict__ result) {
    const float* row = x + blockIdx.x * columns;
    float sum = 0, squares = 0, least = INFINITY, most = -INFINITY;
    for (int64_t i = threadIdx.x; i < columns; i += kReduceThreads) {
        sum += row[i];
        squares += row[i] * row[i];
        least = Minimum()(least, row[i]);
        most = Maximum()(most, row[i]);
    }
    sum = block_reduce<kReduceThreads>(sum, Sum());
    squares = block_reduce<kReduceThreads>(squares, Sum());  // the same shared memory again
    least = block_reduce<kReduceThreads>(least, Minimum());
    most = block_reduce<kReduceThreads>(most, Maximum());
    if (threadIdx.x == 0) {
        result[4 * blockIdx.x] = sum;
        result[4 * blockIdx.x + 1] = squares;
        result[4 * blockIdx.x + 2] = least;
        result[4 * blockIdx.x + 3] = most;
    }
}

// What each warp function gives each lane of one warp; result (functions, 32).
__global__ void warp_functions_kernel(const int* x, int* result) {
    const int lane = threadIdx.x, value = x[lane];
    int row = 0;
    const auto put = [&](int v) { result[row++ * kWarp + lane] = v; };
    put(__shfl_sync(kAllLanes, value, 5));
    put(__shfl_sync(kAllLanes, value, 3, 8));
    put(__shfl_xor_sync(kAllLanes, value, 9));
    put(__shfl_up_sync(kAllLanes, value, 2));
    put(__shfl_down_sync(kAllLanes, value, 3, 16));
    put(static_cast<int>(__ballot_sync(kAllLanes, value > 0)));
    put(__any_sync(kAllLanes, value > 1000));
    put(__all_sync(kAllLanes, value < 1000));
    // Two halves of the warp, each by itself.
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    int sum = value;
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(half, sum, distance);
    put(sum);
    put(__syncthreads_count(value > 0));
    put(__syncthreads_or(value > 1000));
    put(__syncthreads_and(value < 1000));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    put(__reduce_add_sync(kAllLanes, value));
    put(__reduce_min_sync(kAllLanes, value));
    put(static_cast<int>(__reduce_xor_sync(kAllLanes, static_cast<unsigned>(value))));
#endif
}

// c (16, 8) += a (16, depth) b (depth, 8) by one warp; a word of a row is 4 bytes. b is transposed.
template <typename T, bool kShuffles>
__global__ void product_kernel(const uint32_t* a, const uint32_t* b, int64_t words, float* c) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    for (int64_t w = 0; w < words; w += 8) {
        uint32_t row[4], column[2];
        for (int i = 0; i < 4; ++i) row[i] = a[(g + i % 2 * 8) * words + w + t + i / 2 * 4];
        for (int i = 0; i < 2; ++i) column[i] = b[g * words + w + t + i * 4];
        if constexpr (kShuffles)
            mma_by_shuffles<T>(sum, row, column);
        else
            mma<T>(sum, row, column);
    }
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// The sum of all stages of kCopyThreads floats, each copied while the one before is summed. Zeros
// follow the last, behind which nothing is read.
constexpr int kCopyThreads = 64;
enum CopyFault { kNoFault, kNoWait, kNoBarrier, kEarlyWait };

template <CopyFault kFault>
__global__ void __launch_bounds__(kCopyThreads)
    copy_kernel(const float* __restrict__ x, int64_t stages, float* __restrict__ sum) {
    float* buffer = dynamic_shared<float>();  // (2, kCopyThreads)
    const int t = threadIdx.x;
    const auto start = [&](int64_t stage) {
        if (t < kCopyThreads / 4)
            cp_async(buffer + stage % 2 * kCopyThreads + 4 * t, x + stage * kCopyThreads + 4 * t,
                     stage < stages);
        cp_async_commit();
    };
    float total = 0;
    start(0);
    for (int64_t stage = 0; stage <= stages; ++stage) {
        start(stage + 1);
        if (kFault != kNoWait) cp_async_wait<kFault == kEarlyWait ? 2 : 1>();
        __syncthreads();
        total += buffer[stage % 2 * kCopyThreads + (t + 1) % kCopyThreads];
        if (kFault != kNoBarrier) __syncthreads();
    }
    sum[t] = total;
}

// Each block offers its part to two keys; after the barrier all divide by the farthest distance.
__global__ void extremes_kernel(const float* x, int64_t n, unsigned long long* keys,
                                float* scaled) {
    __shared__ int64_t first;  // each block keeps its own over the barriers
    if (threadIdx.x == 0) first = int64_t{blockIdx.x} * blockDim.x;
    if (blockIdx.x == 0 && threadIdx.x == 0) keys[0] = ~0ull, keys[1] = 0;
    grid_barrier();
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = first + threadIdx.x; i < n; i += stride) {
        atomicMin(&keys[0], NearestKey::make(x[i], static_cast<uint32_t>(i)));
        atomicMax(&keys[1], FarthestKey::make(x[i], static_cast<uint32_t>(i)));
    }
    grid_barrier();
    const float most = FarthestKey::distance(keys[1]);
    for (int64_t i = first + threadIdx.x; i < n; i += stride) scaled[i] = x[i] / most;
}

__global__ void split_kernel(const float* x, int64_t n, float* hi, float* lo) {
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i >= n) return;
    uint32_t bits_hi, bits_lo;
    split_tf32(x[i], bits_hi, bits_lo);
    hi[i] = __uint_as_float(bits_hi);
    lo[i] = __uint_as_float(bits_lo);
}

// A product and a sum that a compiler may fuse, and the same that it may not.
__global__ void fuse_kernel(const float* x, int64_t n, float* plain, float* rounded) {
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i >= n) return;
    plain[i] = x[i] * x[i] - 1;
    rounded[i] = __fsub_rn(__fmul_rn(x[i], x[i]), 1);
}

template <typename T>
__global__ void unpack_kernel(const uint32_t* words, int64_t n, float* values) {
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float2 pair = unpack<T>(words[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
}

// Every fault that the emulator must report; 64 threads in each of 2 blocks, x (n), n >= 128.
__global__ void fault_kernel(int fault, float* x, int64_t n) {
    float* dynamic = dynamic_shared<float>();  // (64)
    __shared__ float fixed[64];
    const int t = threadIdx.x;
    const int64_t i = int64_t{blockIdx.x} * 64 + t;
    dynamic[t] = fixed[t] = x[i];
    __syncthreads();
    switch (fault) {
        case 0: {  // none: ordered within the warp alone
            __syncwarp();
            fixed[t] += 1;
            __syncwarp();
            x[i] = fixed[t ^ 1];
            break;
        }
        case 1:  // reads past the end of a global buffer
            dynamic[t] = x[i + n - 127];
            break;
        case 2:  // writes before its beginning
            x[i - 1] = 0;
            break;
        case 3:  // reads past dynamic shared memory
            x[i] = dynamic[t + 1];
            break;
        case 4:  // an index past a fixed array
            x[i] = fixed[t + 1];
            break;
        case 5:  // 16 bytes at an address aligned to 4
            x[i] = load<float4>(x + 1 + t / 32).x;
            break;
        case 6:  // a barrier is missing between write and read
            dynamic[t] = 1;
            x[i] = dynamic[(t + 32) % 64];
            break;
        case 7:  // the same in fixed shared memory, within a warp
            fixed[t] = 1;
            x[i] = fixed[t ^ 1];
            break;
        case 8:  // a barrier is missing between read and write
            x[i] = dynamic[(t + 32) % 64];
            dynamic[t] = 1;
            break;
        case 9:  // reads shared memory that nobody wrote
            x[i] = dynamic_shared<float>()[64 + t];
            break;
        case 10:  // two blocks write the same global memory
            x[t] = 1;
            break;
        case 11:  // one block reads what the other writes
            x[i] = x[(i + 64) % 128];
            break;
        case 12:  // a barrier that half of the block never reaches
            if (t < 32) return;
            __syncthreads();
            break;
        case 13:  // a barrier in both branches
            if (t < 32)
                __syncthreads();
            else
                __syncthreads();
            break;
        case 14:  // a shuffle that names a lane which has returned
            if (t % 32 == 7) return;
            x[i] = __shfl_sync(kAllLanes, x[i], 0);
            break;
        case 15:  // a shuffle that names a lane which waits elsewhere
            if (t % 32 == 7)
                __syncthreads();
            else
                x[i] = __shfl_sync(kAllLanes, x[i], 0);
            break;
        case 16:  // a shuffle that does not name the calling lane
            x[i] = __shfl_sync(0xffff, x[i], 0);
            break;
        case 17:  // a shuffle from a lane that is not named
            if (t < 16) x[i] = __shfl_sync(0xffff, x[i], 20);
            break;
        case 18:  // a grid barrier without a cooperative launch
            grid_barrier();
            break;
        case 19:  // a plain write beside atomic ones
            if (t == 0) x[0] = 0;
            atomicAdd(x, 1.0f);
            break;
        case 20:  // a read past the end by an instruction of 16 bytes
            x[i] = load_once<float4>(x + 4 * (n / 4)).y;
            break;
        case 21:  // a shuffle in both branches
            if (t % 32 < 7)
                x[i] = __shfl_sync(kAllLanes, x[i], 0);
            else
                x[i] = __shfl_sync(kAllLanes, x[i], 0);
            break;
        case 22:  // a vote in both branches, on one line
            x[i] = static_cast<float>(t % 2 ? __any_sync(kAllLanes, t) : __any_sync(kAllLanes, i));
            break;
    }
}

__global__ void ticket_kernel(int* counter, int* ticket) {
    ticket[threadIdx.x] = atomicAdd(counter, 1);
}

__global__ void idle_kernel() {}
__global__ void meet_kernel() { grid_barrier(); }

}  // namespace

cudaError_t transpose(const float* x, int64_t height, int64_t width, float* y,
                      cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(width, kTile)),
                    static_cast<unsigned>(ceil_div(height, kTile)));
    return launch(transpose_kernel, grid, dim3(kTile, kRows), 0, stream, x, height, width, y);
}
SIMT_EXPORT(transpose)

cudaError_t reduce_rows(const float* x, int64_t rows, int64_t columns, float* result,
                        cudaStream_t stream) {
    return launch(reduce_rows_kernel, static_cast<unsigned>(rows), kReduceThreads, 0, stream, x,
                  columns, result);
}
SIMT_EXPORT(reduce_rows)

cudaError_t warp_functions(const int* x, int* result, cudaStream_t stream) {
    return launch(warp_functions_kernel, 1, kWarp, 0, stream, x, result);
}
SIMT_EXPORT(warp_functions)

cudaError_t product(int type, bool shuffles, const uint32_t* a, const uint32_t* b, int64_t words,
                    float* c, cudaStream_t stream) {
    using Kernel = void (*)(const uint32_t*, const uint32_t*, int64_t, float*);
    static constexpr Kernel kKernels[3][2] = {
        {product_kernel<Tf32, false>, product_kernel<Tf32, true>},
        {product_kernel<__half, false>, product_kernel<__half, true>},
        {product_kernel<__nv_bfloat16, false>, product_kernel<__nv_bfloat16, true>}};
    return launch(kKernels[type][shuffles], 1, kWarp, 0, stream, a, b, words, c);
}
SIMT_EXPORT(product)

cudaError_t copy(int fault, const float* x, int64_t stages, float* sum, cudaStream_t stream) {
    using Kernel = void (*)(const float*, int64_t, float*);
    static constexpr Kernel kKernels[] = {copy_kernel<kNoFault>, copy_kernel<kNoWait>,
                                          copy_kernel<kNoBarrier>, copy_kernel<kEarlyWait>};
    return launch(kKernels[fault], 1, kCopyThreads, 2 * kCopyThreads * sizeof(float), stream, x,
                  stages, sum);
}
SIMT_EXPORT(copy)

cudaError_t extremes(const float* x, int64_t n, unsigned long long* keys, float* scaled,
                     cudaStream_t stream) {
    constexpr int kThreads = 32;
    int blocks = 0;
    const cudaError_t error = resident_blocks(extremes_kernel, kThreads, 0, &blocks);
    if (error != cudaSuccess) return error;
    return launch_cooperative(extremes_kernel, blocks, kThreads, 0, stream, x, n, keys, scaled);
}
SIMT_EXPORT(extremes)

cudaError_t split(const float* x, int64_t n, float* hi, float* lo, cudaStream_t stream) {
    return launch(split_kernel, static_cast<unsigned>(ceil_div(n, 64)), 64, 0, stream, x, n, hi,
                  lo);
}
SIMT_EXPORT(split)

cudaError_t fuse(const float* x, int64_t n, float* plain, float* rounded, cudaStream_t stream) {
    return launch(fuse_kernel, static_cast<unsigned>(ceil_div(n, 64)), 64, 0, stream, x, n, plain,
                  rounded);
}
SIMT_EXPORT(fuse)

cudaError_t unpack_words(bool bfloat16, const uint32_t* words, int64_t n, float* values,
                         cudaStream_t stream) {
    return launch(bfloat16 ? unpack_kernel<__nv_bfloat16> : unpack_kernel<__half>,
                  static_cast<unsigned>(ceil_div(n, 64)), 64, 0, stream, words, n, values);
}
SIMT_EXPORT(unpack_words)

cudaError_t fault(int fault, float* x, int64_t n, int64_t floats, cudaStream_t stream) {
    return launch(fault_kernel, 2, 64, static_cast<size_t>(floats) * sizeof(float), stream, fault,
                  x, n);
}
SIMT_EXPORT(fault)

cudaError_t tickets(int* counter, int* ticket, cudaStream_t stream) {
    return launch(ticket_kernel, 1, 64, 0, stream, counter, ticket);
}
SIMT_EXPORT(tickets)

cudaError_t idle(int64_t blocks, int64_t threads, int64_t shared_bytes, cudaStream_t stream) {
    return launch(idle_kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                  static_cast<size_t>(shared_bytes), stream);
}
SIMT_EXPORT(idle)

cudaError_t meet(int64_t blocks, cudaStream_t stream) {
    return launch_cooperative(meet_kernel, static_cast<unsigned>(blocks), kWarp, 0, stream);
}
SIMT_EXPORT(meet)

}  // namespace npad::cuda
