// Distance of every x (n, channels) to the nearest of the centroids (k, channels), and its index.
//
//   || x - c ||^2 / 2 = || x ||^2 / 2 + s,   s = || c ||^2 / 2 - x . c   (x, c less the centroids'
//   mean)
//
// A matrix product in registers gives s for kWide centroids and kTile embeddings at a time, and
// only the least s of the kWide is kept. Rounding can swap two centroids in s, so the groups whose
// least s lies within the error bound of the best, nearly always one or two, are measured by
// differences. The result is that of the plain loop over differences, of equals the lowest index,
// at the speed of the product. A thread owns whole embeddings: the result does not depend on the
// number of threads. Flops: 2 n k channels. NaN in x: distance NaN, index 0.
//
// With an index of the centroids (centroid_search.h), products of bytes along a few axes rule out
// nearly all of them, and this product is for the tiles of embeddings that they do not serve:
// without structure in the centroids, with NaN or overflow. Without AVX2 an index is ignored.
#include <cmath>

#include <omp.h>

#include "panel_product.h"
#include "squared_distance.h"
#if defined(__AVX2__)
#include "centroid_search.h"
#endif

namespace npad::cpu::NPAD_ISA {

namespace {

constexpr int64_t kRows = 256;  // at most: embeddings that meet a panel of centroids in turn
constexpr int64_t kTileBytes = 400 << 10;  // of them, so that they stay in the second-level cache
constexpr double kSmall = 1 << 20;  // products below which waking threads costs more than it gives
constexpr int64_t kSkip = 7;  // tiles that go to the full product untried after one that had to
constexpr int64_t kMeanRows = 256;          // centroids whose mean is the origin
constexpr int64_t kPackedBytes = 12 << 20;  // centroids packed at a time, shared by all threads

// least[j] = min over the panel's centroids of half_norm - x_j . c
void least_of_panel(const float* centroids, const float* half_norm, const float* x,
                    int64_t channels, float* least) {
    Register product[kWide][2];
    multiply(centroids, x, channels, product);
    Register least0 = INFINITY - Register{}, least1 = least0;
#pragma GCC unroll 14
    for (int64_t i = 0; i < kWide; ++i) {
        const Register s0 = half_norm[i] - product[i][0], s1 = half_norm[i] - product[i][1];
        least0 = s0 < least0 ? s0 : least0;
        least1 = s1 < least1 ? s1 : least1;
    }
    store_register(least, least0);
    store_register(least + kRegister, least1);
}

// Centroids packed for the product, a block of panels at a time.
class Packed {
  public:
    Packed(const float* centroids, int64_t k, int64_t channels)
        : centroids_(centroids),
          k_(k),
          channels_(channels),
          panels_(limit_panels(k, channels)),
          mean_(channels),
          data_(panels_ * kWide * channels),
          half_norm_(panels_ * kWide) {
        for (int64_t c = 0; c < channels; ++c) mean_[c] = 0;
        const int64_t sample = k < kMeanRows ? k : kMeanRows;
        for (int64_t i = 0; i < sample; ++i)
            for (int64_t c = 0; c < channels; ++c)
                mean_[c] += centroids[i * k / sample * channels + c] / static_cast<float>(sample);
    }

    void load_block(int64_t first, int threads);

    // How far s of any of these centroids can be from its exact value, for x of this norm, in units
    // of half a squared distance; the measured distance adds its own part.
    float error(float norm, float least) const {
        const float rounding = (static_cast<float>(channels_) + 16) * 0x1p-24f;
        const float half_distance = std::fmax(norm * norm / 2 + least, 0.0f);
        return rounding * (norm * largest_norm_ + largest_norm_ * largest_norm_ + half_distance);
    }

    const float* mean() { return mean_.data(); }
    const float* panel(int64_t p) { return data_.data() + p * kWide * channels_; }
    const float* half_norm(int64_t p) { return half_norm_.data() + p * kWide; }
    int64_t panels() const { return panels_; }
    int64_t panels_at(int64_t first) const {
        const int64_t left = (k_ - first + kWide - 1) / kWide;
        return left < panels_ ? left : panels_;
    }

  private:
    static int64_t limit_panels(int64_t k, int64_t channels) {
        const int64_t all = (k + kWide - 1) / kWide;
        const int64_t fit =
            kPackedBytes / (kWide * channels * static_cast<int64_t>(sizeof(float))) + 1;
        return all < fit ? all : fit;
    }

    const float* centroids_;
    int64_t k_, channels_, panels_;
    Buffer<float> mean_, data_, half_norm_;
    float largest_norm_ = 0;
};

void Packed::load_block(int64_t first, int threads) {
    const int64_t panels = panels_at(first);
    float largest = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : largest)
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t start = first + p * kWide, count = k_ - start < kWide ? k_ - start : kWide;
        float* panel = data_.data() + p * kWide * channels_;
        float squares[kWide];
        pack<kWide>(centroids_ + start * channels_, count, channels_, mean_.data(), panel, squares);
        for (int64_t i = 0; i < kWide; ++i) {
            half_norm_[p * kWide + i] = i < count ? squares[i] / 2 : INFINITY;
            if (squares[i] > largest) largest = squares[i];
        }
    }
    largest_norm_ = std::sqrt(largest);
}

// Measures the centroids first .. stop - 1 in order.
void measure(const float* x, const float* centroids, int64_t first, int64_t stop, int64_t channels,
             Nearest& nearest) {
    for (int64_t i = first; i < stop; ++i) {
        const float d = squared_distance(x, centroids + i * channels, channels, nearest.squared);
        if (d < nearest.squared) nearest = {d, i};
    }
}

// By the product with all centroids.
void search_all(const float* x, int64_t n, const float* centroids, int64_t k, int64_t channels,
                float* distance, int64_t* index, int threads) {
    if (static_cast<double>(n) * k * channels < kSmall) threads = 1;
    Packed packed(centroids, k, channels);
    const int64_t scratch_size = kRows * channels + packed.panels() * kRows;
    Buffer<float> scratch(threads * scratch_size);
    const int64_t share = n / (4 * threads);  // four turns for each thread
    const int64_t fit = kTileBytes / (channels * static_cast<int64_t>(sizeof(float)));
    int64_t rows = share < fit ? share : fit;
    rows = rows < kTile ? kTile : rows > kRows ? kRows : rows / kTile * kTile;

    for (int64_t first = 0; first < k; first += packed.panels() * kWide) {
        packed.load_block(first, threads);
        const int64_t panels = packed.panels_at(first);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t start = 0; start < n; start += rows) {
            const int64_t count = n - start < rows ? n - start : rows;
            float* tiles = scratch.data() + omp_get_thread_num() * scratch_size;
            float* least = tiles + kRows * channels;  // (panels, kRows)
            float squares[kRows], best[kRows];
            for (int64_t t = 0; t < count; t += kTile)
                pack<kTile>(x + (start + t) * channels, count - t < kTile ? count - t : kTile,
                            channels, packed.mean(), tiles + t * channels, squares + t);
            for (int64_t p = 0; p < panels; ++p)
                for (int64_t t = 0; t < count; t += kTile)
                    least_of_panel(packed.panel(p), packed.half_norm(p), tiles + t * channels,
                                   channels, least + p * kRows + t);

            for (int64_t i = 0; i < kRows; ++i) best[i] = INFINITY;
            for (int64_t p = 0; p < panels; ++p)
                for (int64_t i = 0; i < count; ++i) {
                    const float s = least[p * kRows + i];
                    best[i] = s < best[i] ? s : best[i];
                }

            for (int64_t i = 0; i < count; ++i) {
                const float* row = x + (start + i) * channels;
                // Not a number after NaN or overflow: then every group is measured.
                const float limit = best[i] + 2 * packed.error(std::sqrt(squares[i]), best[i]);

                Nearest nearest;
                if (first == 0)
                    nearest = {squared_distance(row, centroids, channels, INFINITY), 0};
                else
                    nearest = {distance[start + i], index[start + i]};
                for (int64_t p = 0; p < panels; ++p) {
                    if (least[p * kRows + i] > limit) continue;
                    const int64_t begin = first + p * kWide;
                    measure(row, centroids, begin, k - begin < kWide ? k : begin + kWide, channels,
                            nearest);
                }
                distance[start + i] = nearest.squared;
                index[start + i] = nearest.index;
            }
        }
    }
    for (int64_t i = 0; i < n; ++i) distance[i] = std::sqrt(distance[i]);
}

#if defined(__AVX2__)
// By the index, and by the product for the tiles that it leaves.
template <class Dot>
void search_by_index(const float* x, int64_t n, const float* centroids, int64_t k, int64_t channels,
                     const float* index, float* distance, int64_t* nearest, int threads) {
    if (static_cast<double>(n) * k * channels < kSmall) threads = 1;
    const IndexLayout layout(k, channels);
    Sketcher sketcher(index + layout.mean(), index + layout.axis(channels), layout.axes, channels);
    const int64_t tiles = (n + kTile - 1) / kTile;
    const int64_t scratch_size = Search<Dot>::scratch_size(layout, sketcher);
    Buffer<float> scratch(threads * scratch_size);
    Buffer<bool> found(tiles);
#pragma omp parallel num_threads(threads)
    {
        Search<Dot> search(centroids, k, channels, index, sketcher,
                           scratch.data() + omp_get_thread_num() * scratch_size);
        int64_t skip = 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t start = t * kTile, count = n - start < kTile ? n - start : kTile;
            found[t] = skip == 0 &&
                       search.find(x + start * channels, count, distance + start, nearest + start);
            skip = found[t] ? 0 : skip > 0 ? skip - 1 : kSkip;
        }
    }

    int64_t rest = 0;
    for (int64_t t = 0; t < tiles; ++t)
        if (!found[t]) rest += n - t * kTile < kTile ? n - t * kTile : kTile;
    if (rest == 0) return;
    Buffer<float> rows(rest * channels), rest_distance(rest);
    Buffer<int64_t> rest_nearest(rest);
    const auto for_rest = [&](auto&& action) {
        int64_t row = 0;
        for (int64_t t = 0; t < tiles; ++t) {
            if (found[t]) continue;
            const int64_t start = t * kTile, count = n - start < kTile ? n - start : kTile;
            action(start, row, static_cast<size_t>(count));
            row += count;
        }
    };
    for_rest([&](int64_t start, int64_t row, size_t count) {
        std::memcpy(rows.data() + row * channels, x + start * channels,
                    count * static_cast<size_t>(channels) * sizeof(float));
    });
    search_all(rows.data(), rest, centroids, k, channels, rest_distance.data(), rest_nearest.data(),
               threads);
    for_rest([&](int64_t start, int64_t row, size_t count) {
        std::memcpy(distance + start, rest_distance.data() + row, count * sizeof(float));
        std::memcpy(nearest + start, rest_nearest.data() + row, count * sizeof(int64_t));
    });
}

template <class Dot>
void search(const float* x, int64_t n, const float* centroids, int64_t k, int64_t channels,
            const float* index, float* distance, int64_t* nearest, int threads) {
    if (index != nullptr && index[0] != 0)
        search_by_index<Dot>(x, n, centroids, k, channels, index, distance, nearest, threads);
    else
        search_all(x, n, centroids, k, channels, distance, nearest, threads);
}
#endif

}  // namespace

#if defined(__AVX2__)
void nearest_centroid(const float* x, int64_t n, const float* centroids, int64_t k,
                      int64_t channels, const float* index, float* distance, int64_t* nearest,
                      int threads) {
    search<DotPairs>(x, n, centroids, k, channels, index, distance, nearest, threads);
}

void nearest_centroid_vnni(const float* x, int64_t n, const float* centroids, int64_t k,
                           int64_t channels, const float* index, float* distance, int64_t* nearest,
                           int threads) {
    search<DotVnni>(x, n, centroids, k, channels, index, distance, nearest, threads);
}
#else
void nearest_centroid(const float* x, int64_t n, const float* centroids, int64_t k,
                      int64_t channels, const float*, float* distance, int64_t* nearest,
                      int threads) {
    search_all(x, n, centroids, k, channels, distance, nearest, threads);
}
#endif

}  // namespace npad::cpu::NPAD_ISA
