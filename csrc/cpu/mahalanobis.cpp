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

constexpr int kGroupVectors = 2;                               // vectors of rows per tile
constexpr int kGroupPanels = kGroupVectors * kLanes / kPanel;  // 4 with AVX-512, 2 with AVX2
constexpr int kMaxTile = kLanes == 16 ? 12 : 6;                // embeddings per tile: 24 or 12 sums
constexpr int64_t kMaxEmbeddings = 576;                        // z of one position stays in L2

// Squared distances as integers whose order is NaN < 0 < ... < infinity < not yet written: one
// minimum then finds the nearest Gaussian and lets NaN through.
constexpr uint32_t kNotWritten = 0xffffffffu;
uint32_t encode(float squared) {
    return std::isnan(squared) ? 0 : __builtin_bit_cast(uint32_t, squared) + 1;
}
float decode(uint32_t key) {
    return key == 0 ? __builtin_bit_cast(float, 0x7fc00000u) : __builtin_bit_cast(float, key - 1);
}

void atomic_min(uint32_t* target, uint32_t key) {
    uint32_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
    while (key < seen && !__atomic_compare_exchange_n(target, &seen, key, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
    }
}

// acc[e][v] += sum over columns of W[rows, column] z_e[column], for a group of panels.
template <int kTile, class T>
inline void multiply(const T* const* panel, const int64_t* step, const float* z, int64_t stride,
                     int64_t columns, Vec (*acc)[kGroupVectors]) {
    const T* w[kGroupPanels];
    for (int i = 0; i < kGroupPanels; ++i) w[i] = panel[i];
    for (int64_t j = 0; j < columns; ++j) {
        Vec rows[kGroupVectors];
        for (int v = 0; v < kGroupVectors; ++v) rows[v] = load_panels(w + v * (kLanes / kPanel));
        for (int i = 0; i < kGroupPanels; ++i) w[i] += step[i];
        for (int e = 0; e < kTile; ++e) {
            const Vec z_j = broadcast(z[e * stride + j]);
            for (int v = 0; v < kGroupVectors; ++v) acc[e][v] += rows[v] * z_j;
        }
    }
}

// above[e] = squares[e] and the squares of what the group's first `rows` rows have come to.
template <int kTile>
void add_rows(const Vec (*acc)[kGroupVectors], int64_t rows, const float* squares, float* above) {
    Lanes lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    Lanes taken[kGroupVectors];
    for (int v = 0; v < kGroupVectors; ++v)
        taken[v] = lane < static_cast<int32_t>(rows) - v * kLanes;  // all ones, or zero
    for (int e = 0; e < kTile; ++e) {
        Vec total = load(squares + e * kLanes);
        for (int v = 0; v < kGroupVectors; ++v) {
            const Vec square = acc[e][v] * acc[e][v];
            total += reinterpret_cast<Vec>(reinterpret_cast<Lanes>(square) & taken[v]);
        }
        store(above + e * kLanes, total);
    }
}

// squares[e] += the squares of the group's rows of W z_e, for kTile embeddings; above[e] = their
// sum over the rows of W above row `prefix`, which is one of the group's, or negative for none.
template <int kTile, class T>
void apply_group(const T* factor, const PackedLayout& layout, int64_t p0, const float* z,
                 int64_t stride, float* squares, int64_t prefix, float* above) {
    static constexpr T kZeros[kPanel] = {};
    Vec acc[kTile][kGroupVectors] = {};
    const T* panel[kGroupPanels];
    int64_t step[kGroupPanels];
    int64_t done = 0;
    // Panels end 8 columns apart; one that has ended, or does not exist, goes on as zeros.
    for (int64_t last = 0; last < kGroupPanels && p0 + last < layout.panels;) {
        const int64_t end = layout.columns(p0 + last);
        const int64_t columns = done < prefix && prefix < end ? prefix : end;
        for (int64_t i = 0; i < kGroupPanels; ++i) {
            const bool live = i >= last && p0 + i < layout.panels;
            panel[i] = live ? factor + layout.offset(p0 + i) + done * kPanel : kZeros;
            step[i] = live ? kPanel : 0;
        }
        multiply<kTile>(panel, step, z + done, stride, columns - done, acc);
        done = columns;
        if (done == prefix) add_rows<kTile>(acc, prefix - layout.first_row(p0), squares, above);
        if (done == end) ++last;
    }
    for (int e = 0; e < kTile; ++e)
        for (int v = 0; v < kGroupVectors; ++v) {
            float* s = squares + e * kLanes;
            store(s, load(s) + acc[e][v] * acc[e][v]);
        }
}

template <class T>
using ApplyGroup = void(const T*, const PackedLayout&, int64_t, const float*, int64_t, float*,
                        int64_t, float*);

template <class T, int... kTiles>
struct Tiles {
    static constexpr ApplyGroup<T>* kApply[] = {apply_group<kTiles, T>...};
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
    // The first panel of the group that the prefix ends in, if there is one.
    constexpr int64_t kGroupRows = kGroupPanels * kPanel;
    const int64_t split = prefix > 0 ? (prefix + layout.pad) / kGroupRows * kGroupPanels : -1;

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
            for (int64_t p0 = 0; p0 < layout.panels; p0 += kGroupPanels)
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
            const T* factor_q = factor + q * layout.size();
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
                 const float* mean, const void* factor, FloatType type, int64_t window,
                 int64_t prefix, float* distance, int threads) {
    switch (type) {
        case FloatType::kFloat32:
            return run(x, batch, height, width, channels, mean, static_cast<const float*>(factor),
                       window, prefix, distance, threads);
        case FloatType::kFloat16:
            return run(x, batch, height, width, channels, mean, static_cast<const Float16*>(factor),
                       window, prefix, distance, threads);
        case FloatType::kBFloat16:
            return run(x, batch, height, width, channels, mean,
                       static_cast<const BFloat16*>(factor), window, prefix, distance, threads);
    }
}

}  // namespace npad::cpu::NPAD_ISA
