// Distance of each embedding to the nearest Gaussian of its window:
//
//   distance[n, p] = min over q in window(p) of || W_q (x[n, p] - mean_q) ||
//
// Windows are symmetric: a block owns one q and up to 32 of the batch * |window(q)| embeddings that
// have q in their window, and holds z = x - mean_q of them in shared memory. The packed W_q comes
// through a ring in shared memory, in which each lane has places of its own, into the fragments of
// matrix instructions, and the squares of W_q z are added. Blocks that share a q are neighbours in
// the grid and leave W_q to the caches, so it leaves device memory about once: C (C + 1) / 2 factor
// elements per position, which bounds small batches; large ones are bound by C^2 flops per
// embedding, two or three times over for the sake of precision.
//
// Precision. z = hi + lo; the products below are exact, and their sum is near that of float32:
//
//   bfloat16   W lo + W hi in TF32
//   float16    the same in float16, z scaled by a power of two so that its largest |z_i| is near
//              2^14; what is lost is at most 2^-40 of that
//   float32    W is split as well; W_lo hi + W_hi lo + W_hi hi in TF32
//   int8       as float16, which holds every byte; the products of 16 columns are multiplied by the
//              scale of their block when they are added
//
// Matrix instructions round their sums towards zero, so each covers 8 or 16 columns at most, and
// these are added in float32.
//
// Order. The row sums run over columns upwards, the squares over a warp's rows, over lanes, over
// warps. None of it depends on the batch, on the window, or on timing: the distance of an embedding
// to a Gaussian has the same bits in any batch. The minimum is atomic, on integers that order like
// the distances, in the distance buffer itself; window 1 needs none.
#include "device_utils.cuh"
#include "kernels.h"
#include "packed.h"
#include "window.h"

namespace npad::cuda {

namespace {

constexpr int kMaxWarps = 5;  // two such blocks on a processor leave 168 registers per thread
constexpr int kMaxTiles = 4;  // of 8 embeddings each: 64 sums per thread
constexpr int kGroup = 8;     // panels per warp at a time, 64 rows: see multiply()
constexpr int kPieces = 4;    // of 16 bytes, per thread: 2 KiB of the factor per warp and step
constexpr int kMeans = 8;     // columns at a time whose mean is on its way to a thread

// Steps that a warp has in flight; the second number where embeddings take the room. That is 64 or
// 32 KiB for two blocks of four warps. 3.0 TB/s for 132 processors, 600 to 800 ns late, are 14 to
// 18 KB for each, 4.3 TB/s 20 to 26 KB.
constexpr int kStages = 4, kFewStages = 2;

// Bytes of shared memory of a block that are the driver's, and those that are its own beside the
// ring and z.
constexpr int64_t kReserved = 1024;
constexpr int64_t kStaticBytes = kMaxTiles * 8 * (sizeof(int64_t) + sizeof(float));

// Columns in a step of T, in slices of 8. One of bytes is a block, which has one scale a panel.
template <typename T>
constexpr int kSlices = 4 / static_cast<int>(sizeof(T));
template <typename T>
constexpr bool kHasScales = std::is_same_v<T, int8_t>;
template <typename T>
constexpr int kColumns = 8 * kSlices<T>;
static_assert(kColumns<int8_t> == kBlockColumns);

// What the matrix instruction takes, and how many of them follow one another along a step.
template <typename T>
constexpr bool kInHalf = std::is_same_v<T, __half> || kHasScales<T>;
template <typename T>
using Word = std::conditional_t<kInHalf<T>, __half, Tf32>;
template <typename T>
constexpr int kInstructions = kInHalf<T> ? kSlices<T> / 2 : kSlices<T>;

// Instructions whose products are summed before they are added to those of other columns.
template <typename T>
constexpr int kTogether = kHasScales<T> ? 1 : kInstructions<T>;

// Elements from one factor to the next.
template <typename T>
__device__ __forceinline__ int64_t stored_size(int64_t channels) {
    const PackedLayout layout(channels);
    return kHasScales<T> ? layout.byte_size() : layout.size();
}

// Squared distances as integers whose order is NaN < 0 < ... < infinity < not yet written: one
// minimum then finds the nearest Gaussian and lets NaN through.
__device__ __forceinline__ unsigned encode(float squared) {
    return squared != squared ? 0 : __float_as_uint(squared) + 1;
}
__device__ __forceinline__ float decode(unsigned key) {
    return __uint_as_float(key == 0 ? 0x7fc00000 : key - 1);
}

// How C is cut. Columns are counted from `pad` before the first, so that panel p ends at column
// 8 (p + 1); groups are counted so that the first is the short one. Both cost least there.
struct Shape {
    int panels, pad, groups, missing;  // panels that the first group lacks
    int warps;                         // two groups each, or a larger even number
    int stride;  // floats per z: the columns of all steps, and 4 that spread 8 rows over all banks

    Shape(int64_t channels, int slices) {
        panels = static_cast<int>(PackedLayout(channels).panels);
        pad = static_cast<int>(PackedLayout(channels).pad);
        groups = static_cast<int>(ceil_div(panels, kGroup));
        missing = groups * kGroup - panels;
        warps = static_cast<int>(ceil_div(groups, 2 * ceil_div(groups, 2 * kMaxWarps)));
        const int whole = max(slices, 2);  // slices, of which there are no parts
        stride = static_cast<int>(ceil_div(panels, whole)) * whole * 8 + 4;
    }
};

// The group that a warp works on in a round, negative at the end: largest first, in alternating
// direction, so that warps get the same bytes.
__device__ __forceinline__ int group_of(const Shape& shape, int warp, int round) {
    const int turn = round % 2 ? shape.warps - 1 - warp : warp;
    return shape.groups - 1 - (round * shape.warps + turn);
}

// Steps to the end of a group's last panel.
template <typename T>
__device__ __forceinline__ int steps_of(const Shape& shape, int group) {
    return group < 0 ? 0 : ((group + 1) * kGroup - shape.missing + kSlices<T> - 1) / kSlices<T>;
}

// PackedLayout's offset(), in 32 bits.
__device__ __forceinline__ int panel_offset(const Shape& shape, int p) {
    return 8 * p * (4 * (p + 1) - shape.pad);
}

// What a warp holds of W for one step; of bytes, the scales of its panels' blocks as well.
template <typename T>
struct Stage {
    uint4 pieces[kPieces][kWarp];
};
template <>
struct Stage<int8_t> {
    uint4 pieces[kPieces][kWarp];
    float scales[kGroup];
};

// Copies a warp's groups of W to its ring, each from its first column to its last. In a step, lane
// l gets two columns of each slice of panel g of the group, where g = l / 4 and t = l % 4: columns
// t and t + 4, of bytes 2 t and 2 t + 1, so that 16 bytes are a column, half of one, or two. Zeros
// stand where the panel has no such column. The first of the four lanes gets the panel's scale.
//
// A lane reads what it has copied itself and no more. So it need not meet the others, and its wait
// for one step leaves the next ones on their way.
template <typename T>
class Reader {
  public:
    __device__ Reader(const Shape& shape, const T* factor, int warp)
        : shape_(shape), factor_(factor), warp_(warp) {
        open();
    }

    // Starts the copies of the next step, one group of them, empty at the end.
    __device__ __forceinline__ void load(Stage<T>& stage) {
        if (left_ > 0) {
            copy(stage);
            if (--left_ == 0) {
                ++round_;
                open();
            }
        }
        cp_async_commit();
    }

  private:
    __device__ __forceinline__ void copy(Stage<T>& stage) {
        constexpr int kParts = std::is_same_v<T, float> ? 2 : 1;  // pieces to a column
        constexpr int kApart = kColumns<T> * kParts / kPieces;    // columns
        const int lane = threadIdx.x % kWarp;
        if (kHasScales<T> && shape_.pad % 2 == 1) {  // pairs of columns are not aligned
#pragma unroll
            for (int i = 0; i < 2 * kPieces; ++i) {
                const int column = i / 2 * kApart + i % 2;
                cp_async<8>(reinterpret_cast<uint2*>(&stage.pieces[i / 2][lane]) + i % 2,
                            source_ + column * 8, is_stored(column));
            }
        } else {
#pragma unroll
            for (int i = 0; i < kPieces; ++i) {
                const int column = i / kParts * kApart;
                cp_async<16, kParts == 2>(&stage.pieces[i][lane],
                                          source_ + (column * 8 + i % kParts * 4),
                                          is_stored(column));
            }
        }
        if constexpr (kHasScales<T>) {
            // A block has a scale where its first column is there, were it one of the padding.
            if (lane % 4 == 0) cp_async<4>(&stage.scales[lane / 4], scale_, column_ < columns_);
            ++scale_;
        }
        column_ += kColumns<T>;
        source_ += kColumns<T> * 8;
    }

    __device__ __forceinline__ bool is_stored(int column) const {
        return static_cast<unsigned>(column_ + column) < static_cast<unsigned>(columns_);
    }

    __device__ __forceinline__ void open() {
        const int group = group_of(shape_, warp_, round_), lane = threadIdx.x % kWarp;
        const int p = group * kGroup - shape_.missing + lane / 4;
        left_ = steps_of<T>(shape_, group);
        columns_ = p < 0 ? 0 : 8 * (p + 1) - shape_.pad;
        column_ = p < 0 ? 0 : (kHasScales<T> ? 2 : 1) * (lane % 4) - shape_.pad;
        source_ = factor_ + panel_offset(shape_, p) + column_ * 8;
        if constexpr (kHasScales<T>)
            scale_ = reinterpret_cast<const float*>(factor_ + panel_offset(shape_, shape_.panels)) +
                     PackedLayout::first_scale(p);
    }

    const Shape& shape_;
    const T* factor_;
    int warp_, round_ = 0, left_;
    int columns_, column_;  // of the panel; a column that is negative or too large is not stored
    const T* source_;
    const float* scale_ = nullptr;
};

// The column that a place of z holds: columns that meet in a lane stand 4 places apart in a slice.
template <typename T>
__device__ __forceinline__ int column_of(int place) {
    return kHasScales<T> ? (place & ~7) | (place & 3) << 1 | (place >> 2 & 1) : place;
}

// Two 16-bit words of x and y in one: the lower halves, or the upper ones.
__device__ __forceinline__ uint32_t lower(uint32_t x, uint32_t y) {
    return __byte_perm(x, y, 0x5410);
}
__device__ __forceinline__ uint32_t upper(uint32_t x, uint32_t y) {
    return __byte_perm(x, y, 0x7632);
}

// Bytes `first` and `first` + 1, their signs turned, as float16: such a byte is the mantissa of
// 1024 to 1279 = 1152 + the byte.
__device__ __forceinline__ uint32_t halves(uint32_t turned, int first) {
    return subtract_halves(__byte_perm(turned, 0x64646464, 0x4140 + 0x0101 * first), 0x64806480);
}

// Rows 2 m and 2 m + 1 of what a lane holds of W, as the fragment of instruction i; `lo` of float
// only.
template <typename T>
__device__ __forceinline__ void split_factor(const uint4 (&pieces)[kPieces], int i, int m,
                                             uint32_t (&hi)[4], uint32_t (&lo)[4]) {
    const auto at = [&](int piece, int word) {
        const uint4& p = pieces[piece];
        return word == 0 ? p.x : word == 1 ? p.y : word == 2 ? p.z : p.w;
    };
#pragma unroll
    for (int k = 0; k < 2; ++k)
        if constexpr (std::is_same_v<T, float>) {  // two pieces to a column
#pragma unroll
            for (int row = 0; row < 2; ++row)
                split_tf32(__uint_as_float(at(2 * k + m / 2, m % 2 * 2 + row)), hi[2 * k + row],
                           lo[2 * k + row]);
        } else if constexpr (std::is_same_v<T, __half>) {
            hi[2 * k] = lower(at(2 * k, m), at(2 * k + 1, m));
            hi[2 * k + 1] = upper(at(2 * k, m), at(2 * k + 1, m));
        } else if constexpr (kHasScales<T>) {  // two columns to a piece
            const uint32_t x = at(2 * i + k, m / 2), y = at(2 * i + k, 2 + m / 2);
            const uint32_t rows = __byte_perm(x, y, m % 2 ? 0x7362 : 0x5140) ^ 0x80808080;
            hi[2 * k] = halves(rows, 0);
            hi[2 * k + 1] = halves(rows, 2);
        } else {
            const float2 rows = unpack<T>(at(2 * i + k, m));
            hi[2 * k] = __float_as_uint(rows.x);
            hi[2 * k + 1] = __float_as_uint(rows.y);
        }
}

// What instruction i needs of one z.
template <typename T>
__device__ __forceinline__ void split_z(const float* z, int i, uint32_t (&hi)[2],
                                        uint32_t (&lo)[2]) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
        if constexpr (kInHalf<T>) {  // see halve()
            hi[k] = __float_as_uint(z[8 * (2 * i + k)]);
            lo[k] = __float_as_uint(z[8 * (2 * i + k) + 4]);
        } else {
            split_tf32(z[8 * i + 4 * k], hi[k], lo[k]);
        }
}

// A warp turns z, in place, into pairs of float16: places c and c + 4 of a slice get the upper
// parts of both columns and the lower ones. Returns what undoes the scale.
__device__ __forceinline__ float halve(float* z, int columns) {
    const int lane = threadIdx.x % kWarp;
    float most = 0;
    for (int c = lane; c < columns; c += kWarp) most = Maximum()(most, fabsf(z[c]));
    const int exponent = __float_as_int(warp_reduce(most, Maximum())) >> 23;
    const int scale = min(127 + 14 + 127 - exponent, 253);
    __syncwarp();  // all have read
    for (int i = lane; i < columns / 2; i += kWarp) {
        float* place = z + i / 4 * 8 + i % 4;
        uint32_t hi = 0, lo = 0;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const float value = place[4 * part] * __int_as_float(scale << 23);
            const __half top = __float2half_rn(value);
            const __half rest = __float2half_rn(value - __half2float(top));
            hi |= static_cast<uint32_t>(__half_as_ushort(top)) << 16 * part;
            lo |= static_cast<uint32_t>(__half_as_ushort(rest)) << 16 * part;
        }
        place[0] = __uint_as_float(hi);
        place[4] = __uint_as_float(lo);
    }
    return __int_as_float((254 - scale) << 23);
}

// sums[tile][m] += W z over one step; `stage` gets the one that comes into flight. Which rows of W
// make up the 16 rows of an instruction is free, since their squares are added in the end: rows g
// and g + 8 of instruction m are rows 2 m and 2 m + 1 of panel g, so that a thread feeds four
// instructions with the columns it has loaded.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply(Stage<T>& stage, Reader<T>& reader,
                                         const float* const (&z)[kTiles], int column,
                                         float (&sums)[kTiles][4][4]) {
    const int lane = threadIdx.x % kWarp;
    uint4 pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = stage.pieces[i][lane];
    float scale = 1;
    if constexpr (kHasScales<T>) {
        if (lane % 4 == 0) scale = stage.scales[lane / 4];
        scale = __shfl_sync(kAllLanes, scale, lane / 4 * 4);
    }
    reader.load(stage);
#pragma unroll
    for (int first = 0; first < kInstructions<T>; first += kTogether<T>) {
        uint32_t hi[kTogether<T>][4][4], lo[kTogether<T>][4][4];
#pragma unroll
        for (int i = 0; i < kTogether<T>; ++i)
#pragma unroll
            for (int m = 0; m < 4; ++m) split_factor<T>(pieces, first + i, m, hi[i][m], lo[i][m]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            uint32_t z_hi[kTogether<T>][2], z_lo[kTogether<T>][2];
#pragma unroll
            for (int i = 0; i < kTogether<T>; ++i)
                split_z<T>(z[tile] + column, first + i, z_hi[i], z_lo[i]);
            float product[4][4] = {};
            const auto add = [&](const auto& a, const auto& b) {
#pragma unroll
                for (int i = 0; i < kTogether<T>; ++i)
#pragma unroll
                    for (int m = 0; m < 4; ++m) mma<Word<T>>(product[m], a[i][m], b[i]);
            };
            if constexpr (std::is_same_v<T, float>) add(lo, z_hi);
            add(hi, z_lo);
            add(hi, z_hi);
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = sums[tile][m][i];
                    sum = kHasScales<T> ? fmaf(scale, product[m][i], sum) : sum + product[m][i];
                }
        }
    }
}

// With a prefix, `distance` begins with those in its channels. The first rows of W are the factor
// of their Gaussian, so that some of the squares are theirs, too.
template <typename T, int kTiles, bool kPrefix>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2)
    mahalanobis_kernel(const float* __restrict__ x, int64_t batch, int64_t height, int64_t width,
                       int64_t channels, const float* __restrict__ mean,
                       const T* __restrict__ factor, int64_t window, int64_t chunks, int held,
                       Shape shape, int stages, int prefix, float* __restrict__ distance) {
    constexpr int kSums = kPrefix ? 2 : 1;  // of the prefix, and of all
    __shared__ int64_t owner[kMaxTiles * 8];
    __shared__ float unscale[kMaxTiles * 8];                           // of float16
    auto* rings = dynamic_shared<Stage<T>>();                          // (warps, stages)
    auto* z = reinterpret_cast<float*>(rings + shape.warps * stages);  // (held, stride)
    const int64_t q = blockIdx.x / chunks, first = blockIdx.x % chunks * held;
    const int64_t positions = height * width;
    const int thread = threadIdx.x, threads = shape.warps * kWarp;

    const Window near(q, height, width, window);
    const int64_t rest = batch * near.size() - first;
    if (rest <= 0) return;  // windows are clipped at the border
    const int count = static_cast<int>(rest < held ? rest : held);
    if (thread < count) {
        const int64_t n = (first + thread) / near.size(), i = (first + thread) % near.size();
        const int64_t row = i / (near.right - near.left), col = i % (near.right - near.left);
        owner[thread] = n * positions + (near.top + row) * width + near.left + col;
    }

    // x goes first: the factor is then on its way while z is made of it. Channels that there are
    // not become zeros.
    __syncthreads();
    const int columns = shape.stride - 4;
    const auto channel_of = [&](int place) { return column_of<T>(place) - shape.pad; };
    const auto is_channel = [&](int c) { return 0 <= c && c < channels; };
    for (int e = 0; e < count; ++e)
        for (int place = thread; place < columns; place += threads) {
            const int c = channel_of(place);
            cp_async<4>(z + e * shape.stride + place, x + owner[e] * channels + c, is_channel(c));
        }
    cp_async_commit();

    // The shuffle tells the compiler that the whole warp takes the same turns.
    const int warp = __shfl_sync(kAllLanes, thread / kWarp, 0);
    const int lane = thread % kWarp, g = lane / 4, t = lane % 4;
    const T* factor_q = factor + q * stored_size<T>(channels);
    Reader<T> reader(shape, factor_q, warp);
    Stage<T>* const ring = rings + warp * stages;
    for (int s = 0; s < stages; ++s) reader.load(ring[s]);

    // Each thread subtracts the mean from what it has copied itself.
    for (int begin = thread; begin < columns; begin += kMeans * threads) {
        float mean_c[kMeans];
#pragma unroll
        for (int i = 0; i < kMeans; ++i) {
            const int c = channel_of(begin + i * threads);
            mean_c[i] = is_channel(c) ? mean[q * channels + c] : 0;
        }
        cp_async_wait<kFewStages>();  // behind x are as many groups at least
        for (int e = 0; e < count; ++e)
#pragma unroll
            for (int i = 0; i < kMeans; ++i)
                if (begin + i * threads < columns)
                    z[e * shape.stride + begin + i * threads] -= mean_c[i];
    }
    __syncthreads();
    if constexpr (kInHalf<T>) {
        for (int e = warp; e < count; e += shape.warps) {
            const float factor_e = halve(z + e * shape.stride, columns);
            if (lane == 0) unscale[e] = factor_e;
        }
        __syncthreads();
    }

    const float* z_tile[kTiles];  // embeddings that are not there repeat the last one
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
        z_tile[tile] = z + min(tile * 8 + g, count - 1) * shape.stride + t;
    float sums[kTiles][4][4] = {}, squares[kSums][kTiles][2] = {};
    int round = 0, column = 0, left = steps_of<T>(shape, group_of(shape, warp, 0));
    for (int s = 0; left > 0; s = s + 1 == stages ? 0 : s + 1) {
        if (stages == kStages)  // only the other steps may still be on their way
            cp_async_wait<kStages - 1>();
        else
            cp_async_wait<kFewStages - 1>();
        multiply<T, kTiles>(ring[s], reader, z_tile, column, sums);
        column += kColumns<T>;
        if (--left > 0) continue;
        // Rows of the prefix among this lane's eight, which follow one another.
        const int inside =
            prefix - 8 * (group_of(shape, warp, round) * kGroup - shape.missing + g) + shape.pad;
#pragma unroll
        for (int i = 0; i < kTiles * 16; ++i) {
            float& sum = sums[i / 16][i / 4 % 4][i % 4];
            float& all = squares[kSums - 1][i / 16][i % 2];
            all = fmaf(sum, sum, all);
            if constexpr (kPrefix) {
                float& below = squares[0][i / 16][i % 2];
                if (i / 2 % 8 < inside) below = fmaf(sum, sum, below);
            }
            sum = 0;
        }
        column = 0;
        left = steps_of<T>(shape, group_of(shape, warp, ++round));
    }

    // Lanes of equal t hold rows of the same two embeddings. A warp leaves its sums in its ring,
    // which is empty.
    const auto partial = [&](int w) { return reinterpret_cast<float*>(rings + w * stages); };
    __syncwarp();
#pragma unroll
    for (int part = 0; part < kSums; ++part)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float sum = squares[part][tile][i];
#pragma unroll
                for (int distance = 4; distance < kWarp; distance *= 2)
                    sum += __shfl_xor_sync(kAllLanes, sum, distance);
                if (g == 0) partial(warp)[(part * kMaxTiles + tile) * 8 + 2 * t + i] = sum;
            }
    __syncthreads();
    if (thread < count) {
#pragma unroll
        for (int part = 0; part < kSums; ++part) {
            float sum = 0;
            for (int w = 0; w < shape.warps; ++w) sum += partial(w)[part * kMaxTiles * 8 + thread];
            if constexpr (kInHalf<T>) sum = sum * unscale[thread] * unscale[thread];
            float* target = distance + part * batch * positions + owner[thread];
            if (window == 1)
                *target = sqrtf(sum);
            else
                atomicMin(reinterpret_cast<unsigned*>(target), encode(sum));
        }
    }
}

constexpr int kDecodeThreads = 256;

__global__ void __launch_bounds__(kDecodeThreads) decode_kernel(float* distance, int64_t n) {
    const int64_t i = int64_t{blockIdx.x} * kDecodeThreads + threadIdx.x;
    if (i < n) distance[i] = sqrtf(decode(__float_as_uint(distance[i])));
}

template <typename T>
cudaError_t run(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels,
                const float* mean, const void* factor, int64_t window, int64_t prefix,
                float* distance, cudaStream_t stream) {
    const int64_t positions = height * width, n = (prefix == 0 ? 1 : 2) * batch * positions;
    if (n == 0) return cudaSuccess;
    int device = 0, shared = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;

    // As many embeddings to a block as leave room for a second one, dealt out evenly: each block
    // reads the factor. What they leave is the ring's.
    const Shape shape(channels, kSlices<T>);
    const int64_t row_bytes = shape.stride * static_cast<int64_t>(sizeof(float));
    const int64_t stage_bytes = shape.warps * static_cast<int64_t>(sizeof(Stage<T>));
    const int64_t half = (shared - kReserved) / 2 - kStaticBytes;
    const int64_t most = batch * min(window, height) * min(window, width);
    const int64_t rows = (half - kFewStages * stage_bytes) / row_bytes;
    const int64_t room = max(int64_t{1}, min(int64_t{kMaxTiles * 8}, rows));
    const int64_t chunks = ceil_div(most, room), held = ceil_div(most, chunks);
    const bool all_fit = held * row_bytes + kStages * stage_bytes <= half;
    const int stages = all_fit ? kStages : kFewStages;
    const int64_t blocks = positions * chunks, decoders = ceil_div(n, kDecodeThreads);
    if (blocks > INT32_MAX || decoders > INT32_MAX) return cudaErrorInvalidConfiguration;

    using Kernel = void (*)(const float*, int64_t, int64_t, int64_t, int64_t, const float*,
                            const T*, int64_t, int64_t, int, Shape, int, int, float*);
    static constexpr Kernel kKernels[2][kMaxTiles] = {
        {mahalanobis_kernel<T, 1, false>, mahalanobis_kernel<T, 2, false>,
         mahalanobis_kernel<T, 3, false>, mahalanobis_kernel<T, 4, false>},
        {mahalanobis_kernel<T, 1, true>, mahalanobis_kernel<T, 2, true>,
         mahalanobis_kernel<T, 3, true>, mahalanobis_kernel<T, 4, true>}};
    if (window > 1) error = cudaMemsetAsync(distance, 0xff, n * sizeof(float), stream);
    if (error == cudaSuccess)
        error =
            launch(kKernels[prefix != 0][(held - 1) / 8], static_cast<unsigned>(blocks),
                   shape.warps * kWarp, held * row_bytes + stages * stage_bytes, stream, x, batch,
                   height, width, channels, mean, static_cast<const T*>(factor), window, chunks,
                   static_cast<int>(held), shape, stages, static_cast<int>(prefix), distance);
    if (error == cudaSuccess && window > 1)
        error = launch(decode_kernel, static_cast<unsigned>(decoders), kDecodeThreads, 0, stream,
                       distance, n);
    return error;
}

}  // namespace

int mahalanobis(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels,
                const float* mean, const void* factor, DataType type, int64_t window,
                int64_t prefix, float* distance, Stream stream) {
    switch (type) {
        case DataType::kFloat32:
            return run<float>(x, batch, height, width, channels, mean, factor, window, prefix,
                              distance, stream);
        case DataType::kFloat16:
            return run<__half>(x, batch, height, width, channels, mean, factor, window, prefix,
                               distance, stream);
        case DataType::kBFloat16:
            return run<__nv_bfloat16>(x, batch, height, width, channels, mean, factor, window,
                                      prefix, distance, stream);
        case DataType::kInt8:
            return run<int8_t>(x, batch, height, width, channels, mean, factor, window, prefix,
                               distance, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace npad::cuda
