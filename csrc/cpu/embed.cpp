// Feature levels -> embeddings on one grid, channels last:
//
//   embedding[n, y, x, level's channels] = sum over rows r and columns c of
//                                          w_y[r] w_x[c] level[n, channels, r, c]
//
// Along each axis the weights are those of resample.h, or 1/3 for each of three pixels where the
// level has the grid's size; zeros outside of the level. A thread owns 64 channels of a level in
// eight rows of the grid. For each row it first sums the three or four rows of the level that count
// into one, widened to float32 and channels last, which stays in L1; a level that comes with its
// channels apart is transposed on the way. Then it sums pixels of that row. Both are the same sum
// of vectors, over channels (or over columns, where those are side by side), in the same order.
//
// Fewest bytes: every level read once, the embeddings written once; rows of the grid share rows of
// the level, in L1. Flops: up to 10 per value and axis.
#include "../resample.h"
#include "simd.h"

namespace npad::cpu::NPAD_ISA {

namespace {

constexpr int64_t kBlock = 64;  // channels: three rows of 32 pixels and their sums stay in L1
constexpr int64_t kBand = 8;    // rows of the grid, for which most rows are found in L1
constexpr int64_t kLargeBytes = 8 << 20;  // of embeddings: more than a core's own caches

struct Weights {
    float near, far;
};

// A row of a level: its pixels, or its channels where those are apart, lie `step` elements apart.
// Nothing is read at or past `end`.
template <class T>
struct Row {
    const T* data;
    int64_t step;
    const T* end;
};

// Up to kBlock channels of a level, and how they are taken to the grid.
template <class T>
struct Plan {
    Level level;
    const Taps<int64_t>* columns;  // of the grid, with the patch's 1/9 in their weights
    const T* end;                  // of the whole level
    Row<T> zeros;                  // stands for the rows above and below
    int64_t offset;                // of the channels in an embedding
    bool same_size, channels_last, past_caches;
};

// The sum of resample.h, or its first half; element i of each.
template <bool kBilinear>
inline Vec combine(Vec first, Vec second, Vec third, Vec last, Weights w) {
    const Vec middle = second + third;
    const Vec sum = w.near * (first + middle);
    return kBilinear ? sum + w.far * (middle + last) : sum;
}
template <bool kBilinear, class T>
inline Vec combine(const T* const (&p)[4], int64_t i, Weights w) {
    return combine<kBilinear>(load(p[0] + i), load(p[1] + i), load(p[2] + i),
                              kBilinear ? load(p[3] + i) : Vec{}, w);
}

// The first n < kLanes lanes, anything behind them.
template <class T>
inline Vec load_few(const T* p, int64_t n, const T* end) {
    if (end - p >= kLanes) return load(p);
    T few[kLanes] = {};
    std::memcpy(few, p, static_cast<size_t>(n) * sizeof(T));
    return load(few);
}
template <bool kBilinear, class T>
inline Vec combine_few(const T* const (&p)[4], int64_t n, const Row<T> (&rows)[4], Weights w) {
    Vec v[4];
    for (int k = 0; k < 4; ++k) v[k] = load_few(p[k], n, rows[k].end);
    return combine<kBilinear>(v[0], v[1], v[2], v[3], w);
}

// n >= kLanes sums; the last vector overlaps the one before it.
template <bool kBilinear, class T>
inline void combine_all(const T* const (&p)[4], int64_t n, Weights w, float* out) {
    for (int64_t i = 0; i + kLanes <= n; i += kLanes) store(out + i, combine<kBilinear>(p, i, w));
    if (n % kLanes != 0) store(out + n - kLanes, combine<kBilinear>(p, n - kLanes, w));
}

// Sums of whole vectors, to aligned addresses.
template <bool kBilinear>
inline void combine_past_caches(const float* const (&p)[4], int64_t n, Weights w, float* out) {
    for (int64_t i = 0; i < n; i += kLanes) store_past_caches(out + i, combine<kBilinear>(p, i, w));
}

// Sums rows of a level whose channels are side by side; `sums` has a pixel every kBlock floats.
template <bool kBilinear, class T>
void sum_rows_of_pixels(const Level& level, const Row<T> (&rows)[4], Weights w, float* sums) {
    for (int64_t x = 0; x < level.width; ++x, sums += kBlock) {
        const T* p[4];
        for (int k = 0; k < 4; ++k) p[k] = rows[k].data + x * rows[k].step;
        if (level.channels >= kLanes)
            combine_all<kBilinear>(p, level.channels, w, sums);
        else
            store(sums, combine_few<kBilinear>(p, level.channels, rows, w));
    }
}

// The same where columns are side by side: blocks of kLanes channels and columns are transposed.
template <bool kBilinear, class T>
void sum_rows_of_channels(const Level& level, const Row<T> (&rows)[4], Weights w, float* sums) {
    const int64_t columns = level.width < kLanes ? level.width : kLanes;
    for (int64_t c = 0; c < level.channels; c += kLanes)
        for (int64_t x0 = 0; x0 < level.width; x0 += kLanes) {
            const int64_t x = x0 + columns < level.width ? x0 : level.width - columns;
            Vec block[kLanes] = {};
            for (int64_t j = 0; j < kLanes && c + j < level.channels; ++j) {
                const T* p[4];
                for (int k = 0; k < 4; ++k) p[k] = rows[k].data + (c + j) * rows[k].step + x;
                block[j] = columns < kLanes ? combine_few<kBilinear>(p, columns, rows, w)
                                            : combine<kBilinear>(p, 0, w);
            }
            transpose(block);
            for (int64_t i = 0; i < columns; ++i) store(sums + (x + i) * kBlock + c, block[i]);
        }
}

// One row of the grid; `sums` has pixels of zeros on either side.
template <bool kBilinear, class T>
void embed_row(const Plan<T>& plan, int64_t image, int64_t y, int64_t height, int64_t width,
               int64_t stride, float* sums, float* out) {
    const Level& level = plan.level;
    const Taps<int64_t> taps(y, height, level.height);
    Row<T> rows[4];
    for (int k = 0; k < 4; ++k) {
        const int64_t r = k < 3 ? taps.first + k : taps.last;
        rows[k] = r < 0 || r >= level.height
                      ? plan.zeros
                      : Row<T>{static_cast<const T*>(level.data) + image * level.stride_n +
                                   r * level.stride_h,
                               plan.channels_last ? level.stride_w : level.stride_c, plan.end};
    }
    const auto sum_rows =
        plan.channels_last ? sum_rows_of_pixels<kBilinear, T> : sum_rows_of_channels<kBilinear, T>;
    sum_rows(level, rows, {taps.near, taps.far}, sums);

    for (int64_t x = 0; x < width; ++x) {
        const Taps<int64_t>& t = plan.columns[x];
        const float* first = sums + t.first * kBlock;
        const float* const p[4] = {first, first + kBlock, first + 2 * kBlock,
                                   sums + t.last * kBlock};
        const Weights w{t.near, t.far};
        float* to = out + x * stride;
        if (plan.past_caches) {
            combine_past_caches<kBilinear>(p, level.channels, w, to);
        } else if (level.channels >= kLanes) {
            combine_all<kBilinear>(p, level.channels, w, to);
        } else {
            const Vec v = combine<kBilinear>(p, 0, w);
            std::memcpy(to, &v, static_cast<size_t>(level.channels) * sizeof(float));
        }
    }
}

template <class T>
void run(const Level* levels, int64_t n_levels, int64_t batch, int64_t height, int64_t width,
         float* embedding, int threads) {
    int64_t channels = 0, blocks = 0, longest = kBlock;
    for (int64_t l = 0; l < n_levels; ++l) {
        channels += levels[l].channels;
        blocks += (levels[l].channels + kBlock - 1) / kBlock;
        if (levels[l].width > longest) longest = levels[l].width;
    }
    Buffer<T> zeros(longest);
    std::memset(zeros.data(), 0, static_cast<size_t>(longest) * sizeof(T));
    // Embeddings that no cache would keep until they are read are not brought into one first.
    const bool past_caches =
        batch * height * width * channels * int64_t{sizeof(float)} >= kLargeBytes &&
        channels % kLanes == 0 && reinterpret_cast<uintptr_t>(embedding) % sizeof(Vec) == 0;

    Buffer<Taps<int64_t>> columns(n_levels * width);
    Buffer<Plan<T>> plans(blocks);
    Plan<T>* next = plans.data();
    for (int64_t l = 0, offset = 0; l < n_levels; ++l) {
        Level level = levels[l];
        Taps<int64_t>* taps = columns.data() + l * width;
        for (int64_t x = 0; x < width; ++x) {
            taps[x] = {x, width, level.width};
            taps[x].near /= 9;
            taps[x].far /= 9;
        }
        const T* data = static_cast<const T*>(level.data);
        const T* last = data + (batch - 1) * level.stride_n +
                        (level.channels - 1) * level.stride_c +
                        (level.height - 1) * level.stride_h + (level.width - 1) * level.stride_w;
        for (int64_t c = 0; c < levels[l].channels; c += kBlock, offset += level.channels) {
            const int64_t left = levels[l].channels - c;
            level.data = data + c * level.stride_c;
            level.channels = left < kBlock ? left : kBlock;
            *next++ = {level,
                       taps,
                       last + 1,
                       {zeros.data(), 0, zeros.data() + longest},
                       offset,
                       level.height == height && level.width == width,
                       level.stride_c == 1,
                       past_caches && offset % kLanes == 0 && level.channels % kLanes == 0};
        }
    }

    const int64_t bands = (height + kBand - 1) / kBand;
#pragma omp parallel num_threads(threads)
    {
        Buffer<float> buffer((longest + 2) * kBlock);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * bands * blocks; ++task) {
            const Plan<T>& plan = plans[task % blocks];
            const int64_t image = task / blocks / bands, top = task / blocks % bands * kBand;
            const int64_t bottom = top + kBand < height ? top + kBand : height;
            const auto embed_plan = plan.same_size ? embed_row<false, T> : embed_row<true, T>;
            float* sums = buffer.data() + kBlock;
            std::memset(sums - kBlock, 0, kBlock * sizeof(float));
            std::memset(sums + plan.level.width * kBlock, 0, kBlock * sizeof(float));
            for (int64_t y = top; y < bottom; ++y)
                embed_plan(plan, image, y, height, width, channels, sums,
                           embedding + (image * height + y) * width * channels + plan.offset);
        }
        store_fence();
    }
}

}  // namespace

void embed(const Level* levels, int64_t n_levels, DataType type, int64_t batch, int64_t height,
           int64_t width, float* embedding, int threads) {
    switch (type) {
        case DataType::kFloat32:
            return run<float>(levels, n_levels, batch, height, width, embedding, threads);
        case DataType::kFloat16:
            return run<Float16>(levels, n_levels, batch, height, width, embedding, threads);
        case DataType::kBFloat16:
            return run<BFloat16>(levels, n_levels, batch, height, width, embedding, threads);
        case DataType::kInt8:
            return;  // no level is
    }
}

}  // namespace npad::cpu::NPAD_ISA
