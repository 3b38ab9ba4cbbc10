// Distance of each embedding to the nearest Gaussian of its window:
//
//   distance[n, p] = min over q in window(p) of || W_q (x[n, p] - mean_q) ||
//
// A thread owns whole positions q, streams W_q once and applies it to all batch * window^2
// embeddings that have q in their window, held in cache as z = x - mean_q. Small batches are bound
// by that stream (C (C + 1) / 2 factor elements per position), large ones by C^2 flops per
// embedding. Products and squares are summed in float32 in a fixed order; the minimum is taken
// atomically on integers that order like the distances, so neither threads nor their timing change
// the result.
//
// A factor in bytes is multiplied by the scales of its blocks as it is loaded: the distance is that
// of the float32 factor which the bytes stand for.
//
// The first rows of W use the first channels alone, so the distance in a prefix of the channels is
// what the sum of squares has reached there: one more sum for each embedding, taken on the way. A
// group of rows that the prefix ends in stops at its last column, since what comes behind reaches
// the rows above as zero times z, which is NaN where z is infinite.
#include <cmath>

#include "../packed.h"
#include "../window.h"
#include "simd.h"

namespace npad::cpu::NPAD_ISA {

namespace {

constexpr int kMaxTile = kLanes == 16 ? 12 : 6;  // embeddings per tile: 24 or 12 vectors of sums
constexpr int kFew = 2;                          // embeddings, whose sums alone wait for each other
constexpr int64_t kMaxEmbeddings = 576;          // z of one position stays in L2

// Squared distances as integers whose order is NaN < 0 < ... < infinity < not yet written: one
// minimum then finds the nearest Gaussian and lets NaN through.
constexpr uint32_t kNotWritten = 0xffffffffu;
uint32_t encode(float squared) {
    return std::isnan(squared) ? 0 : __builtin_bit_cast(uint32_t, squared) + 1;
}
float decode(uint32_t key) {
    return key == 0 ? __builtin_bit_cast(float, 0x7fc00000u) : __builtin_bit_cast(float, key - 1);
}

// A tile takes a group of panels at once: this many vectors of rows. How panels are grouped changes
// no sum.
constexpr int group_vectors(int64_t embeddings) { return embeddings <= kFew ? 4 : 2; }
constexpr int kPanels = kLanes / kPanel;  // to a vector

void atomic_min(uint32_t* target, uint32_t key) {
    uint32_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
    while (key < seen && !__atomic_compare_exchange_n(target, &seen, key, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
    }
}

template <class T>
inline constexpr bool kHasScales = false;
template <>
inline constexpr bool kHasScales<Int8> = true;

// Elements from one factor to the next.
template <class T>
int64_t stored_size(const PackedLayout& layout) {
    return kHasScales<T> ? layout.byte_size() : layout.size();
}

// The scale of each lane's panel in a block of columns.
template <class T>
inline Vec scales_of(const T* factor, const PackedLayout& layout, int64_t p, int64_t block) {
    Vec scale;
    for (int i = 0; i < kLanes; i += kPanel, ++p) {
        float of_panel = 0;  // where there is none, the columns are zero
        if (p < layout.panels && block < layout.scales(p))
            std::memcpy(&of_panel, factor + layout.size() + 4 * (layout.first_scale(p) + block), 4);
        for (int lane = i; lane < i + kPanel; ++lane) scale[lane] = of_panel;
    }
    return scale;
}

// acc[e][v] += sum over columns [begin, end) of W[rows, column] z_e[column], for panels from p0 on;
// those before `first` have ended.
template <int kTile, int kVectors, class T>
inline void multiply(const T* factor, const PackedLayout& layout, int64_t p0, int64_t first,
                     int64_t begin, int64_t end, const float* z, int64_t stride,
                     Vec (*acc)[kVectors]) {
    static constexpr T kZeros[kPanel] = {};
    const T* w[kVectors * kPanels];
    int64_t step[kVectors * kPanels];
    for (int64_t i = 0; i < kVectors * kPanels; ++i) {
        const bool live = i >= first && p0 + i < layout.panels;
        w[i] = live ? factor + layout.offset(p0 + i) + begin * kPanel : kZeros;
        step[i] = live ? kPanel : 0;
    }
    // Panels are too short for a processor to foresee the next ones. The next group follows in
    // memory and is about as large: it is asked for as this one is read.
    const T* next = factor + layout.offset(p0 + kVectors * kPanels);
    Vec sums[kTile][kVectors];  // in registers, whatever else may point to acc
    for (int e = 0; e < kTile; ++e)
        for (int v = 0; v < kVectors; ++v) sums[e][v] = acc[e][v];
    for (int64_t j = begin; j < end;) {
        int64_t stop = end;
        [[maybe_unused]] Vec scale[kVectors];
        if constexpr (kHasScales<T>) {
            const int64_t block = (j + layout.pad) / kBlockColumns;
            const int64_t block_end = (block + 1) * kBlockColumns - layout.pad;
            stop = block_end < end ? block_end : end;
            for (int v = 0; v < kVectors; ++v)
                scale[v] = scales_of(factor, layout, p0 + v * kPanels, block);
        }
        for (; j < stop; ++j) {
            if constexpr (kTile <= kFew) __builtin_prefetch(next + j * kVectors * kLanes);
            Vec rows[kVectors];
            for (int v = 0; v < kVectors; ++v) {
                rows[v] = load_panels(w + v * kPanels);
                if constexpr (kHasScales<T>) rows[v] *= scale[v];
            }
            for (int i = 0; i < kVectors * kPanels; ++i) w[i] += step[i];
            for (int e = 0; e < kTile; ++e) {
                const Vec z_j = broadcast(z[e * stride + j]);
                for (int v = 0; v < kVectors; ++v) sums[e][v] += rows[v] * z_j;
            }
        }
    }
    for (int e = 0; e < kTile; ++e)
        for (int v = 0; v < kVectors; ++v) acc[e][v] = sums[e][v];
}

// above[e] = squares[e] and the squares of what the group's first `rows` rows have come to.
template <int kTile, int kVectors>
void add_rows(const Vec (*acc)[kVectors], int64_t rows, const float* squares, float* above) {
    Lanes lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    Lanes taken[kVectors];
    for (int v = 0; v < kVectors; ++v)
        taken[v] = lane < static_cast<int32_t>(rows) - v * kLanes;  // all ones, or zero
    for (int e = 0; e < kTile; ++e) {
        Vec total = load(squares + e * kLanes);
        for (int v = 0; v < kVectors; ++v) {
            const Vec square = acc[e][v] * acc[e][v];
            total += reinterpret_cast<Vec>(reinterpret_cast<Lanes>(square) & taken[v]);
        }
        store(above + e * kLanes, total);
    }
}

// squares[e] += the squares of the group's rows of W z_e, for kTile embeddings; above[e] = their
// sum over the rows of W above row `prefix`, which is one of the group's, or negative for none.
template <int kTile, int kVectors, class T>
void apply_group(const T* factor, const PackedLayout& layout, int64_t p0, const float* z,
                 int64_t stride, float* squares, int64_t prefix, float* above) {
    Vec acc[kTile][kVectors] = {};
    int64_t done = 0;
    // Panels end 8 columns apart; one that has ended, or does not exist, goes on as zeros.
    for (int64_t last = 0; last < kVectors * kPanels && p0 + last < layout.panels;) {
        const int64_t end = layout.columns(p0 + last);
        const int64_t columns = done < prefix && prefix < end ? prefix : end;
        multiply<kTile, kVectors>(factor, layout, p0, last, done, columns, z, stride, acc);
        done = columns;
        if (done == prefix)
            add_rows<kTile, kVectors>(acc, prefix - layout.first_row(p0), squares, above);
        if (done == end) ++last;
    }
    for (int e = 0; e < kTile; ++e)
        for (int v = 0; v < kVectors; ++v) {
            float* s = squares + e * kLanes;
            store(s, load(s) + acc[e][v] * acc[e][v]);
        }
}

template <class T>
using ApplyGroup = void(const T*, const PackedLayout&, int64_t, const float*, int64_t, float*,
                        int64_t, float*);

template <class T, int... kTiles>
struct Tiles {
    static constexpr ApplyGroup<T>* kApply[] = {apply_group<kTiles, group_vectors(kTiles), T>...};
};
template <class T>
ApplyGroup<T>* apply_for(int64_t embeddings) {
    if constexpr (kMaxTile == 12)
        return Tiles<T, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>::kApply[embeddings - 1];
    else
        return Tiles<T, 1, 2, 3, 4, 5, 6>::kApply[embeddings - 1];
}

template <class T>
void run(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels,
         const float* mean, const T* factor, int64_t window, int64_t prefix, float* distance,
         int threads) {
    const PackedLayout layout(channels);
    const int64_t positions = height * width, outputs = prefix > 0 ? 2 : 1;
    const int64_t size = outputs * batch * positions;
    auto* keys = reinterpret_cast<uint32_t*>(distance);
    auto* all_keys = keys + (outputs - 1) * batch * positions;
    for (int64_t i = 0; i < size; ++i) keys[i] = kNotWritten;

    const int64_t side_y = window < 2 * height ? window : 2 * height;
    const int64_t side_x = window < 2 * width ? window : 2 * width;
    const int64_t most = batch * side_y * side_x;
    const int64_t capacity = most < kMaxEmbeddings ? most : kMaxEmbeddings;

#pragma omp parallel num_threads(threads)
    {
        Buffer<float> z(capacity * channels), squares(outputs * capacity * kLanes);
        Buffer<int64_t> owner(capacity);
        float* above = squares.data() + (outputs - 1) * capacity * kLanes;

        const auto flush = [&](const T* factor_q, int64_t held) {
            std::memset(squares.data(), 0, static_cast<size_t>(held * kLanes) * sizeof(float));
            const int64_t tiles = (held + kMaxTile - 1) / kMaxTile;
            const int64_t panels = group_vectors(held) * kPanels;
            // The first panel of the group that the prefix ends in, if there is one.
            const int64_t split =
                prefix > 0 ? (prefix + layout.pad) / kPanel / panels * panels : -1;
            for (int64_t p0 = 0; p0 < layout.panels; p0 += panels)
                for (int64_t t = 0; t < tiles; ++t) {
                    const int64_t begin = held * t / tiles, end = held * (t + 1) / tiles;
                    apply_for<T>(end - begin)(factor_q, layout, p0, z.data() + begin * channels,
                                              channels, squares.data() + begin * kLanes,
                                              p0 == split ? prefix : -1, above + begin * kLanes);
                }
            const auto settle = [&](uint32_t* nearest, const float* sums) {
                for (int64_t e = 0; e < held; ++e)
                    atomic_min(nearest + owner[e], encode(sum(load(sums + e * kLanes))));
            };
            settle(all_keys, squares.data());
            if (outputs > 1) settle(keys, above);
        };

#pragma omp for schedule(static)
        for (int64_t q = 0; q < positions; ++q) {
            // Windows are symmetric: the positions that have q in their window are those in q's.
            const Window w(q, height, width, window);
            const float* mean_q = mean + q * channels;
            const T* factor_q = factor + q * stored_size<T>(layout);
            int64_t held = 0;
            for (int64_t n = 0; n < batch; ++n)
                for (int64_t row = w.top; row < w.bottom; ++row)
                    for (int64_t col = w.left; col < w.right; ++col) {
                        owner[held] = n * positions + row * width + col;
                        const float* x_p = x + owner[held] * channels;
                        float* z_e = z.data() + held * channels;
                        for (int64_t c = 0; c < channels; ++c) z_e[c] = x_p[c] - mean_q[c];
                        if (++held == capacity) {
                            flush(factor_q, held);
                            held = 0;
                        }
                    }
            if (held > 0) flush(factor_q, held);
        }
    }
    for (int64_t i = 0; i < size; ++i) distance[i] = std::sqrt(decode(keys[i]));
}

}  // namespace

void mahalanobis(const float* x, int64_t batch, int64_t height, int64_t width, int64_t channels,
                 const float* mean, const void* factor, DataType type, int64_t window,
                 int64_t prefix, float* distance, int threads) {
    switch (type) {
        case DataType::kFloat32:
            return run(x, batch, height, width, channels, mean, static_cast<const float*>(factor),
                       window, prefix, distance, threads);
        case DataType::kFloat16:
            return run(x, batch, height, width, channels, mean, static_cast<const Float16*>(factor),
                       window, prefix, distance, threads);
        case DataType::kBFloat16:
            return run(x, batch, height, width, channels, mean,
                       static_cast<const BFloat16*>(factor), window, prefix, distance, threads);
        case DataType::kInt8:
            return run(x, batch, height, width, channels, mean, static_cast<const Int8*>(factor),
                       window, prefix, distance, threads);
    }
}

}  // namespace npad::cpu::NPAD_ISA
