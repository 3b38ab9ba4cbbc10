// Feature levels -> embeddings on one grid, channels last:
//
//   embedding[n, y, x, level's channels] = sum over rows r and columns c of
//                                          w_y[r] w_x[c] level[n, channels, r, c]
//
// Along each axis the weights are those of resample.h, or 1/3 for each of three pixels where the
// level has the grid's size; zeros outside of the level. Levels are float32, float16 or bfloat16
// with any strides, the sums float32.
//
// A block owns 32 channels of one level in four rows and up to 32 columns of the grid. It first
// sums rows: a thread takes four channels of one column of the level through all four rows of the
// grid, and leaves sums in shared memory, channels last. Then it sums columns: a thread takes four
// channels of neighbouring columns, with what they share in registers. Where the channels of a
// pixel are side by side and every address is a multiple of four elements, one load brings four
// channels (16 bytes of float32), and eight threads read or write a line of 128 bytes; other levels
// are read one element at a time, along their columns where those are side by side, and turned on
// the way to shared memory. An embedding at an odd address is written one element at a time too.
//
// Fewest bytes: every level read once, the embeddings written once. A block reads the rows that it
// shares with its neighbours again, from L2: a level of the grid's size 3/2 times, one of half its
// side, a quarter of what is written, three times. Flops: up to 10 per value and axis.
//
// One launch does up to eight levels. Limits: 2^31 blocks in one launch, and 2^30 for the product
// of a level's side and the grid's.
#include "device_utils.cuh"
#include "kernels.h"
#include "resample.h"

namespace npad::cuda {

namespace {

constexpr int kChannels = 32;           // of a block: 128 bytes of an embedding
constexpr int kQuads = kChannels / 4;   // of four channels
constexpr int kRows = 4;                // of the grid
constexpr int kCells = 32;              // columns of the grid, at most
constexpr int kColumns = kCells + 4;    // of the level that they can need
constexpr int kStride = kChannels + 4;  // eight quads, or eight columns, lie in 32 banks
constexpr int kThreads = 256;           // one float4 of each row of the grid
constexpr int kBlocks = 4;              // per multiprocessor: up to 64 registers
constexpr int kMaxLevels = 8;           // of one launch: 0.7 KB of parameters

struct LevelPlan {
    Level level;
    int64_t offset;  // of its channels in an embedding
    unsigned first_block;
    int cells;  // columns of the grid that one block takes
    bool same_size, vector_loads, vector_stores, columns_adjacent;
};

struct Plan {
    LevelPlan levels[kMaxLevels];
    int n_levels, height, width;
    int64_t channels;
};

struct Shared {
    float sums[kRows][kColumns][kStride];  // of rows of the level
    Taps<int> rows[kRows], columns[kCells];
};

template <typename T>
__device__ __forceinline__ float widen(T x) {
    if constexpr (std::is_same_v<T, __half>)
        return __half2float(x);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return __bfloat162float(x);
    else
        return x;
}

template <typename T>
__device__ __forceinline__ float4 load_quad(const T* p) {
    if constexpr (std::is_same_v<T, float>) {
        return load<float4>(p);
    } else {
        const uint2 words = load<uint2>(p);
        const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
        return make_float4(low.x, low.y, high.x, high.y);
    }
}

// The sum of resample.h, or its first half; the order is the same everywhere.
template <bool kBilinear>
__device__ __forceinline__ float combine(float first, float second, float third, float last,
                                         float near, float far) {
    const float middle = second + third;
    const float sum = near * (first + middle);
    return kBilinear ? fmaf(far, middle + last, sum) : sum;
}
template <bool kBilinear>
__device__ __forceinline__ float4 combine(const float4& first, const float4& second,
                                          const float4& third, const float4& last, float near,
                                          float far) {
    return make_float4(combine<kBilinear>(first.x, second.x, third.x, last.x, near, far),
                       combine<kBilinear>(first.y, second.y, third.y, last.y, near, far),
                       combine<kBilinear>(first.z, second.z, third.z, last.z, near, far),
                       combine<kBilinear>(first.w, second.w, third.w, last.w, near, far));
}

// Four channels of one column of a level; `row` may lie outside.
template <bool kVector, typename T>
struct Column {
    const T* top;  // the first of the channels in row 0
    int64_t row_stride, channel_stride;
    int height;    // 0 outside of the level
    int channels;  // that there are

    __device__ __forceinline__ float4 operator()(int row) const {
        float4 v{};
        if (static_cast<unsigned>(row) >= static_cast<unsigned>(height)) return v;
        const T* p = top + row * row_stride;
        if constexpr (kVector) return load_quad(p);
        v.x = widen(p[0]);
        if (channels > 1) v.y = widen(p[channel_stride]);
        if (channels > 2) v.z = widen(p[2 * channel_stride]);
        if (channels > 3) v.w = widen(p[3 * channel_stride]);
        return v;
    }
};

// What a block does.
struct Task {
    int64_t image;
    int c0, y0, x0;             // its first channel, row and column
    int channels, rows, cells;  // that there are
    int origin, columns;        // of the level: the first, and how many
};

// Sums of rows of the level, by columns and quads of channels, to shared memory.
template <bool kBilinear, bool kVector, typename T>
__device__ __forceinline__ void sum_rows(const LevelPlan& p, const Task& task, Shared& shared) {
    const Level& level = p.level;
    const T* data = static_cast<const T*>(level.data) + task.image * level.stride_n;
    for (int item = threadIdx.x; item < task.columns * kQuads; item += kThreads) {
        const bool adjacent = !kVector && p.columns_adjacent;
        const int i = adjacent ? item % task.columns : item / kQuads;
        const int c = (adjacent ? item / task.columns : item % kQuads) * 4;
        const int x = task.origin + i;
        const bool inside = x >= 0 && x < level.width && c < task.channels;
        const Column<kVector, T> column{
            data + (task.c0 + c) * level.stride_c + x * level.stride_w, level.stride_h,
            level.stride_c, inside ? static_cast<int>(level.height) : 0, task.channels - c};
        float* sums = &shared.sums[0][i][c];
        float4 rows[kRows + 2];
        if constexpr (!kBilinear)
#pragma unroll
            for (int r = 0; r < kRows + 2; ++r) rows[r] = column(task.y0 - 1 + r);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float4 sum;
            if constexpr (kBilinear) {
                const Taps<int> t = shared.rows[r];
                sum = combine<true>(column(t.first), column(t.first + 1), column(t.first + 2),
                                    column(t.last), t.near, t.far);
            } else {
                sum = combine<false>(rows[r], rows[r + 1], rows[r + 2], float4{}, 1.0f, 0.0f);
            }
            *reinterpret_cast<float4*>(sums + r * kColumns * kStride) = sum;
        }
    }
}

// Sums of columns for neighbouring cells of one row of the grid, to the embeddings: Value is float4
// or float.
template <bool kBilinear, typename Value>
__device__ __forceinline__ void sum_columns(const Task& task, const Shared& shared, int64_t width,
                                            int64_t stride, float* embedding) {
    constexpr int kWidth = sizeof(Value) / sizeof(float);
    constexpr int kLanes = kChannels / kWidth;
    constexpr int kRun = kRows * kCells / (kThreads / kLanes);
    const int channel = static_cast<int>(threadIdx.x) % kLanes * kWidth;
    const int begin = static_cast<int>(threadIdx.x) / kLanes * kRun, row = begin / kCells;
    if (row >= task.rows || channel >= task.channels) return;
    const float* sums = &shared.sums[row][0][channel];
    const auto at = [&](int column) {
        return load<Value>(sums + (column - task.origin) * kStride);
    };
    float* out = embedding + row * width * stride + channel;
    Value first{}, second{}, third{}, last{};
    int held = -3;  // the column that `first` is: none
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
        const int i = begin % kCells + k;
        if (i >= task.cells) return;
        const Taps<int> t = shared.columns[i];
        if (t.first == held + 1) {
            first = second;
            second = third;
            third = at(t.first + 2);
        } else if (t.first != held) {
            first = at(t.first);
            second = at(t.first + 1);
            third = at(t.first + 2);
        }
        if (kBilinear && t.first != held) last = at(t.last);
        held = t.first;
        *reinterpret_cast<Value*>(out + i * stride) =
            combine<kBilinear>(first, second, third, last, t.near, t.far);
    }
}

template <bool kBilinear, typename T>
__device__ __forceinline__ void embed_task(const LevelPlan& p, const Task& task, Shared& shared,
                                           int64_t width, int64_t stride, float* embedding) {
    if (p.vector_loads)
        sum_rows<kBilinear, true, T>(p, task, shared);
    else
        sum_rows<kBilinear, false, T>(p, task, shared);
    __syncthreads();
    if (p.vector_stores)
        sum_columns<kBilinear, float4>(task, shared, width, stride, embedding);
    else
        sum_columns<kBilinear, float>(task, shared, width, stride, embedding);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    embed_kernel(const __grid_constant__ Plan plan, float* __restrict__ embedding) {
    __shared__ __align__(16) Shared shared;
    int l = 0;
    while (l + 1 < plan.n_levels && blockIdx.x >= plan.levels[l + 1].first_block) ++l;
    const LevelPlan& p = plan.levels[l];
    const Level& level = p.level;

    // Blocks of the same cells follow one another over the channels.
    const int slabs = static_cast<int>(ceil_div(level.channels, kChannels));
    const int across = static_cast<int>(ceil_div(plan.width, p.cells));
    const int down = static_cast<int>(ceil_div(plan.height, kRows));
    int block = static_cast<int>(blockIdx.x - p.first_block);
    Task task;
    task.c0 = block % slabs * kChannels;
    block /= slabs;
    task.x0 = block % across * p.cells;
    block /= across;
    task.y0 = block % down * kRows;
    task.image = block / down;
    task.channels = static_cast<int>(min(level.channels - task.c0, int64_t{kChannels}));
    task.rows = min(plan.height - task.y0, kRows);
    task.cells = min(plan.width - task.x0, p.cells);

    const int t = static_cast<int>(threadIdx.x);
    if (t < kRows)  // rows beyond the grid: the last again
        shared.rows[t] = {task.y0 + min(t, task.rows - 1), plan.height,
                          static_cast<int>(level.height)};
    if (t >= kWarp && t < kWarp + task.cells) {
        Taps<int> taps(task.x0 + t - kWarp, plan.width, static_cast<int>(level.width));
        taps.near /= 9;
        taps.far /= 9;
        shared.columns[t - kWarp] = taps;
    }
    __syncthreads();
    task.origin = shared.columns[0].first;
    task.columns = shared.columns[task.cells - 1].first + (p.same_size ? 3 : 4) - task.origin;

    embedding += ((task.image * plan.height + task.y0) * plan.width + task.x0) * plan.channels +
                 p.offset + task.c0;
    if (p.same_size)
        embed_task<false, T>(p, task, shared, plan.width, plan.channels, embedding);
    else
        embed_task<true, T>(p, task, shared, plan.width, plan.channels, embedding);
}

// Whether quads of its channels lie at multiples of four elements, of so many bytes each.
bool in_quads(const Level& level, int64_t bytes) {
    return level.stride_c == 1 && level.channels % 4 == 0 && level.stride_n % 4 == 0 &&
           level.stride_h % 4 == 0 && level.stride_w % 4 == 0 &&
           reinterpret_cast<uintptr_t>(level.data) % (4 * bytes) == 0;
}

template <typename T>
cudaError_t run(const Level* levels, int64_t n_levels, int64_t batch, int64_t height, int64_t width,
                float* embedding, cudaStream_t stream) {
    Plan plan{};
    plan.height = static_cast<int>(height);
    plan.width = static_cast<int>(width);
    for (int64_t l = 0; l < n_levels; ++l) plan.channels += levels[l].channels;
    for (int64_t l = 0, offset = 0, blocks = 0; l < n_levels; ++l) {
        const Level& level = levels[l];
        LevelPlan& p = plan.levels[plan.n_levels++];
        constexpr int64_t kLimit = int64_t{1} << 30;
        if (level.height * height > kLimit || level.width * width > kLimit)
            return cudaErrorInvalidConfiguration;
        p.level = level;
        p.offset = offset;
        p.first_block = static_cast<unsigned>(blocks);
        // Cells lie level.width / width columns apart, and one needs four.
        p.cells =
            static_cast<int>(min(max(kCells * width / level.width, int64_t{1}), int64_t{kCells}));
        p.same_size = level.height == height && level.width == width;
        p.vector_loads = in_quads(level, sizeof(T));
        p.vector_stores = offset % 4 == 0 && plan.channels % 4 == 0 && level.channels % 4 == 0 &&
                          reinterpret_cast<uintptr_t>(embedding) % sizeof(float4) == 0;
        p.columns_adjacent = level.stride_w < level.stride_c;
        offset += level.channels;
        blocks += batch * ceil_div(height, kRows) * ceil_div(width, p.cells) *
                  ceil_div(level.channels, kChannels);
        if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
        if (plan.n_levels < kMaxLevels && l + 1 < n_levels) continue;
        if (blocks > 0) {
            const cudaError_t error = launch(embed_kernel<T>, static_cast<unsigned>(blocks),
                                             kThreads, 0, stream, plan, embedding);
            if (error != cudaSuccess) return error;
        }
        plan.n_levels = 0;
        blocks = 0;
    }
    return cudaSuccess;
}

}  // namespace

int embed(const Level* levels, int64_t n_levels, DataType type, int64_t batch, int64_t height,
          int64_t width, float* embedding, Stream stream) {
    switch (type) {
        case DataType::kFloat32:
            return run<float>(levels, n_levels, batch, height, width, embedding, stream);
        case DataType::kFloat16:
            return run<__half>(levels, n_levels, batch, height, width, embedding, stream);
        case DataType::kBFloat16:
            return run<__nv_bfloat16>(levels, n_levels, batch, height, width, embedding, stream);
        case DataType::kInt8:
            break;
    }
    return cudaErrorInvalidValue;
}

}  // namespace npad::cuda
